"""The control socket of a real daemon: negotiation, errors, ids, several and slow monitors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nbdfleece.base.limits import MAX_QMP_QUEUE
from nbdfleece.control.command import Context
from nbdfleece.control.events import Events
from nbdfleece.control.monitor import Monitor as ControlMonitor
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
        """Return the answer to a request; events that come before it are passed over."""
        self.sock.sendall(json.dumps(message).encode() + b"\n")
        while "event" in (got := self.receive()):
            pass
        return got

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


def test_out_of_band_execution_may_be_asked_for_and_no_command_has_it(daemon: Daemon) -> None:
    with Monitor(daemon, negotiate=False) as monitor:
        assert monitor.greeting["QMP"]["capabilities"] == ["oob"]
        wrong = {"execute": "qmp_capabilities", "arguments": {"enable": ["speed"]}}
        assert monitor.error_of(wrong) == "Parameter 'enable[0]' does not accept value 'speed'"
        right = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
        assert monitor.ask(right) == {"return": {}}
        assert monitor.ask({"exec-oob": "query-version", "id": {"a": None}}) == {
            "error": {
                "class": "GenericError",
                "desc": "The command query-version does not support OOB",
            },
            "id": {"a": None},
        }
        unknown = monitor.ask({"exec-oob": "nope"})
        assert unknown["error"]["class"] == "CommandNotFound"
        assert "return" in monitor.ask({"execute": "query-version"})
    with Monitor(daemon) as monitor:
        plain = {"exec-oob": "query-version"}
        assert monitor.error_of(plain) == "QMP input member 'exec-oob' is unexpected"


def test_what_a_machine_with_disks_alone_answers(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        status = monitor.ask({"execute": "query-status"})["return"]
        assert status == {"status": "running", "singlestep": False, "running": True}
        assert monitor.ask({"execute": "query-name"}) == {"return": {}}
        assert monitor.ask({"execute": "query-tpm"}) == {"return": []}


def test_the_schema_describes_every_command(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        names = [row["name"] for row in monitor.ask({"execute": "query-commands"})["return"]]
        schema = monitor.ask({"execute": "query-qmp-schema"})["return"]
    entries = {entry["name"]: entry for entry in schema}
    assert len(entries) == len(schema)
    commands = [entry for entry in schema if entry["meta-type"] == "command"]
    assert sorted(entry["name"] for entry in commands) == names
    assert {entry["arg-type"] for entry in commands} <= set(entries)
    assert {entry["ret-type"] for entry in commands} <= set(entries)
    create = entries[entries["fleece-snapshot-create"]["arg-type"]]
    assert {"name": "name", "type": "str", "default": None} in create["members"]
    assert entries["FLEECE_SNAPSHOT_BROKEN"]["meta-type"] == "event"


def test_errors_in_qemus_words(daemon: Daemon) -> None:
    with Monitor(daemon) as monitor:
        assert monitor.ask({"execute": "nope"})["error"] == {
            "class": "CommandNotFound",
            "desc": "The command nope has not been found",
        }
        add = {"execute": "fleece-disk-add", "arguments": {"disk": 1, "location": "x"}}
        assert monitor.error_of(add) == "Invalid parameter type for 'disk', expected: string"
        assert monitor.error_of({"execute": "fleece-disk-add"}) == (
            "Parameter 'location' is missing"
        )
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
        added = monitor.ask({"execute": "fleece-disk-add", "arguments": arguments})["return"]
        taken = monitor.ask({"execute": "fleece-disk-add", "arguments": arguments})
        assert taken["error"]["reason"] == "in-use"
        rows = monitor.ask({"execute": "query-fleece-disks"})["return"]
        assert added == rows[1]
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
            assert "return" in quick.ask(
                {"execute": "fleece-snapshot-create", "arguments": arguments}
            )
            arguments = {"disk": "vda", "snapshot": name}
            assert "return" in quick.ask(
                {"execute": "fleece-snapshot-delete", "arguments": arguments}
            )
        events: list[str] = []
        while len(events) < 100:
            name = slow.receive()["event"]
            events += [name] * name.startswith("FLEECE_")
        assert events == ["FLEECE_SNAPSHOT_CREATED", "FLEECE_SNAPSHOT_DELETED"] * 50


async def test_events_for_a_monitor_that_does_not_read_are_bounded() -> None:
    events = Events()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    monitor = ControlMonitor(ours, cast("Context", SimpleNamespace(events=events)), {})
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(monitor.run())
        reader, writer = await asyncio.open_connection(sock=theirs)
        assert "QMP" in json.loads(await reader.readline())
        writer.write(b'{"execute": "qmp_capabilities"}')
        assert json.loads(await reader.readline()) == {"return": {}}
        begun = loop.time()
        for number in range(20_000):
            events.emit("E", {"number": number, "padding": "x" * 1000})
        assert loop.time() - begun < 20, "somebody waited"
        monitor.stop()
        got = [json.loads(line)["data"]["number"] async for line in reader]
        writer.close()
    assert len(got) == MAX_QMP_QUEUE
    assert got == list(range(20_000 - MAX_QMP_QUEUE, 20_000))


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
