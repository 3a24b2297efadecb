"""`disk add`, `remove` and `list` against a real daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, environment, make_disk
from tests.support.live import client

pytestmark = pytest.mark.slow


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


async def test_a_disk_is_added_used_and_removed(daemon: Daemon) -> None:
    disk = make_disk(daemon.folder / "data.raw", 2 << 20, b"\7")
    done = daemon.run("disk", "add", f"vdb={disk},discard=ignore,locking=off")
    assert (done.code, done.out) == (0, f"vdb {daemon.uri('vdb')}\n")
    async with client(daemon, "vdb") as one:
        assert await one.read(0, 4) == b"\7" * 4
        busy = daemon.run("disk", "remove", "vdb")
        assert busy.code == 4
        assert busy.err == (
            "nbdfleece: disk remove: disk 'vdb' is in use by 1 connections "
            "(--force disconnects clients and gives snapshots up)\n"
        )
        assert daemon.run("disk", "remove", "vdb", "--force").code == 0
        await one.wait_closed()
    assert daemon.run("disk", "list", "--quiet").out == "vda\n"


def test_disks_are_listed(daemon: Daemon) -> None:
    header, row = daemon.run("disk", "list").out.splitlines()
    assert header.split() == ["DISK", "SIZE", "MODE", "SNAPSHOTS", "CLIENTS", "LOCATION"]
    assert row.split() == ["vda", "1", "MiB", "rw", "0", "0", str(daemon.folder / "vda.raw")]
    (found,) = daemon.run("disk", "list", "--json").json
    assert (found["disk"], found["size"], found["read-only"]) == ("vda", 1 << 20, False)


def test_a_path_belongs_to_the_folder_of_who_types(daemon: Daemon) -> None:
    folder = daemon.folder / "elsewhere"
    folder.mkdir()
    make_disk(folder / "near.raw", 1 << 20)
    command = [sys.executable, "-m", "nbdfleece", "disk", "add", "near.raw", "--json"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'"location": "{os.path.join(folder, "near.raw")}"' in done.stdout
    assert '"disk": "near"' in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["add", "vda=/nowhere/x"], 4, "there is a disk 'vda' already"),
        (["add", "vdb=/nowhere/x"], 5, "No such file or directory"),
        (["add", "9=/nowhere/x"], 2, "cannot be the name of a disk"),
        (["add", "x=/nowhere,locking=maybe"], 2, "locking='maybe' is none of on, off"),
        (["add", "x=/nowhere,colour=red"], 2, "unknown key 'colour' (known: format, "),
        (["add", "x="], 2, "no location is given"),
        (["add", "x=nbd://localhost:1/x"], 1, "Connection refused"),
        (["remove", "nope"], 5, "there is no disk 'nope'"),
        (["remove"], 2, "NAME"),
        ([], 2, "SUBCOMMAND"),
    ],
)
def test_mistakes(daemon: Daemon, args: list[str], code: int, text: str) -> None:
    done = daemon.run("disk", *args)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert text in done.err
