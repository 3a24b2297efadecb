"""The control socket of a real daemon: negotiation, errors, ids, several and slow monitors."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, make_disk


class Monitor:
    """A blocking client that can behave badly."""

    def __init__(self, daemon: Daemon, *, negotiate: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(daemon.control))
        self.file = self.sock.makefile("rb")
        self.greeting = self.receive()
        if negotiate:
            assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def receive(self):
        line = self.file.readline()
        return json.loads(line) if line else None

    def ask(self, message):
        self.sock.sendall(json.dumps(message).encode() + b"\n")
        return self.receive()

    def error_of(self, message) -> str:
        return self.ask(message)["error"]["desc"]


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


def test_negotiation(daemon: Daemon) -> None:
    with Monitor(daemon, negotiate=False) as monitor:
        assert set(monitor.greeting["QMP"]) == {"version", "capabilities"}
        refused = monitor.ask({"execute": "query-version", "id": 1})
        assert refused["error"]["class"] == "CommandNotFound"
        assert refused["id"] == 1
        assert monitor.ask({"execute": "qmp_capabilities", "id": 2}) == {"return": {}, "id": 2}
        again = monitor.ask({"execute": "qmp_capabilities"})
        assert again["error"] == {
            "class": "CommandNotFound",
            "desc": "Capabilities negotiation is already complete, command ignored",
        }


def test_errors_in_qemus_words(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        assert monitor.ask({"execute": "nope"})["error"] == {
            "class": "CommandNotFound",
            "desc": "The command nope has not been found",
        }
        add = {"execute": "fleece-disk-add", "arguments": {"disk": 1, "location": "x"}}
        assert monitor.error_of(add) == "Invalid parameter type for 'disk', expected: string"
        assert monitor.error_of({"execute": "fleece-disk-add"}) == "Parameter 'disk' is missing"
        assert monitor.error_of([1]) == "QMP input must be a JSON object"
        assert monitor.error_of({"arguments": {}}) == "QMP input lacks member 'execute'"
        version = monitor.ask({"execute": "query-version"})["return"]
        assert set(version["qemu"]) == {"major", "minor", "micro"}


def test_commands_are_listed(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        names = {row["name"] for row in monitor.ask({"execute": "query-commands"})["return"]}
    assert {
        *("qmp_capabilities", "query-version", "query-commands", "quit"),
        *("fleece-disk-add", "fleece-disk-remove", "query-fleece-disks"),
        *("fleece-snapshot-create", "fleece-snapshot-delete", "query-fleece-snapshots"),
        *("query-fleece-clients", "fleece-client-kick", "query-fleece-status"),
    } <= names


def test_disks_come_and_go(daemon: Daemon, short_tmp: Path) -> None:
    other = make_disk(short_tmp / "other.raw", 4096)
    with Monitor(daemon) as monitor:
        arguments = {"disk": "vdb", "location": str(other), "read-only": True}
        assert monitor.ask({"execute": "fleece-disk-add", "arguments": arguments}) == {"return": {}}
        taken = monitor.ask({"execute": "fleece-disk-add", "arguments": arguments})
        assert taken["error"]["reason"] == "in-use"
        rows = monitor.ask({"execute": "query-fleece-disks"})["return"]
        assert [(row["disk"], row["size"], row["read-only"]) for row in rows] == [
            ("vda", 1 << 20, False),
            ("vdb", 4096, True),
        ]
        remove = {"execute": "fleece-disk-remove", "arguments": {"disk": "vdb"}}
        assert monitor.ask(remove) == {"return": {}}
        assert monitor.ask(remove)["error"]["reason"] == "not-found"


def test_several_requests_in_one_write_are_answered_in_order(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        text = "".join(f'{{"execute":"query-version","id":{number}}}' for number in range(500))
        monitor.sock.sendall(text.encode())
        assert [monitor.receive()["id"] for _ in range(500)] == list(range(500))


def test_a_slow_monitor_stalls_nobody(daemon: Daemon) -> None:
    with Monitor(daemon) as slow, Monitor(daemon) as quick:
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(50):
            name = f"s{number}"
            arguments = {"disks": ["vda"], "name": name}
            quick.sock.sendall(
                json.dumps({"execute": "fleece-snapshot-create", "arguments": arguments}).encode()
            )
            assert "event" in quick.receive()
            assert "return" in quick.receive()
            arguments = {"disk": "vda", "snapshot": name}
            quick.sock.sendall(
                json.dumps({"execute": "fleece-snapshot-delete", "arguments": arguments}).encode()
            )
            assert "event" in quick.receive()
            assert "return" in quick.receive()
        events = [slow.receive()["event"] for _ in range(100)]
        assert events == ["FLEECE_SNAPSHOT_CREATED", "FLEECE_SNAPSHOT_DELETED"] * 50


def test_a_client_that_only_asks_does_not_fill_our_memory(daemon: Daemon) -> None:
    with Monitor(daemon) as greedy:
        greedy.sock.settimeout(0.5)
        request = b'{"execute":"query-commands"}' * 100
        with contextlib.suppress(TimeoutError):
            for _ in range(10_000):
                greedy.sock.sendall(request)
            pytest.fail("the daemon went on reading")
        assert daemon.run("status").code == 0


def test_too_deep_ends_this_monitor_alone(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor, Monitor(daemon) as other:
        monitor.sock.sendall(b"[" * 100)
        assert monitor.receive()["error"]["desc"] == "JSON nesting depth limit exceeded"
        assert monitor.receive() is None
        assert "return" in other.ask({"execute": "query-version"})


def test_a_command_goes_on_without_its_monitor(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        arguments = {"disks": ["vda"], "name": "one"}
        monitor.sock.sendall(
            json.dumps({"execute": "fleece-snapshot-create", "arguments": arguments}).encode()
        )
    with Monitor(daemon) as monitor:
        while not (rows := monitor.ask({"execute": "query-fleece-snapshots"}).get("return")):
            time.sleep(0.01)  # until the deadline of the test
        assert rows[0]["export"] == "vda@one"


def test_quit_is_answered_and_ends_the_daemon(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor, Monitor(daemon) as idle:
        assert monitor.ask({"execute": "quit", "id": "q"}) == {"return": {}, "id": "q"}
        assert daemon.process.wait(20) == 0
        assert idle.receive() is None
    assert not daemon.control.exists()


def test_clients_are_listed_and_kicked(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as client, Monitor(daemon) as monitor:
        client.connect(str(daemon.socket))
        client.settimeout(20)
        assert client.recv(8) == b"NBDMAGIC"
        (row,) = monitor.ask({"execute": "query-fleece-clients"})["return"]
        assert row["peer"].startswith("unix, uid ")
        kick = {"execute": "fleece-client-kick", "arguments": {"id": row["id"]}}
        assert monitor.ask(kick) == {"return": {}}
        while client.recv(100):
            pass
        assert monitor.ask({**kick, "id": 3})["error"]["reason"] == "not-found"
