"""`client list` and `client kick`, and what monitors hear of clients."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import client, eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


async def test_who_is_connected_is_listed(daemon: Daemon) -> None:
    assert daemon.run("client", "list").out == ""
    async with client(daemon, "vda") as one:
        await one.read(0, 8192)
        await one.write(0, b"x" * 4096)
        shown = daemon.run("client", "list")
        header, row = shown.out.splitlines()
        assert header.split() == [
            *("CLIENT", "EXPORT", "REQUESTS", "READ", "WRITTEN", "TLS", "IDENTITY", "PEER")
        ]
        uid = os.getuid()
        assert row.split() == [
            *("1", "vda", "2", "8", "KiB", "4", "KiB", "-", "uid", str(uid)),
            *("unix,", "uid", f"{uid},", "pid", str(os.getpid())),
        ]
        (found,) = daemon.run("client", "list", "--json").json
        assert found.pop("seconds") >= 0
        assert found == {
            "id": 1,
            "peer": f"unix, uid {uid}, pid {os.getpid()}",
            "identity": f"uid {uid}",
            "export": "vda",
            "requests": 2,
            "in-flight": 0,
            "bytes-read": 8192,
            "bytes-written": 4096,
        }


async def test_who_is_kicked_is_gone_at_once_and_may_come_back(daemon: Daemon) -> None:
    async with client(daemon, "vda") as one, client(daemon, "vda") as other:
        done = daemon.run("client", "kick", "1")
        assert (done.code, done.out, done.err) == (0, "", "")
        await one.wait_closed()
        assert await other.read(0, 4) == b"\1" * 4
        await eventually(lambda: 'how="kicked by an administrator"' in daemon.errors())
        async with client(daemon, "vda") as again:
            assert await again.read(0, 4) == b"\1" * 4


def test_who_says_nothing_can_be_kicked_too(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(daemon.socket))
        silent.settimeout(20)
        assert len(silent.recv(100)) == 18
        assert daemon.run("client", "kick", "1").code == 0
        assert silent.recv(100) == b""


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["kick", "77"], 5, "there is no client 77"),
        (["kick", "x"], 2, "is not a number"),
        (["kick"], 2, "ID"),
        ([], 2, "SUBCOMMAND"),
    ],
)
def test_mistakes(daemon: Daemon, args: list[str], code: int, text: str) -> None:
    done = daemon.run("client", *args)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert text in done.err


async def test_monitors_hear_who_comes_and_goes(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(daemon.control))
        monitor.settimeout(20)
        lines = monitor.makefile("r")
        lines.readline()
        monitor.sendall(b'{"execute": "qmp_capabilities"}')
        lines.readline()
        async with client(daemon, "vda") as one:
            await one.read(0, 4096)
            opened = json.loads(lines.readline())
            await one.disconnect()
        left = json.loads(lines.readline())
        lines.close()
    who = {"id": 1, "peer": f"unix, uid {os.getuid()}, pid {os.getpid()}"}
    who |= {"identity": f"uid {os.getuid()}", "export": "vda"}
    assert (opened["event"], opened["data"]) == ("FLEECE_CLIENT_CONNECTED", who)
    assert left["event"] == "FLEECE_CLIENT_DISCONNECTED"
    assert left["data"].pop("duration") >= 0
    assert left["data"] == {
        **who,
        "bytes-read": 4096,
        "bytes-written": 0,
        "requests": 1,
        "reason": "disconnects",
    }
