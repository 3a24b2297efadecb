"""QEMU's own Python library talks to us: negotiation, commands, errors, events."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from tests.support.daemon_process import Daemon, make_disk
from tests.support.storage_daemon import StorageDaemon


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


async def test_commands_errors_and_events(daemon: Daemon) -> None:
    client = QMPClient("test")
    created = EventListener(("FLEECE_SNAPSHOT_CREATED",))
    client.register_listener(created)
    await client.connect(str(daemon.control))
    try:
        assert client.greeting is not None
        assert client.greeting.QMP.version["qemu"]["major"] == 7
        assert (await client.execute("query-status"))["running"] is True
        names = [row["name"] for row in await client.execute("query-commands")]
        assert "fleece-snapshot-create" in names

        with pytest.raises(ExecuteError) as refused:
            await client.execute("nope")
        assert refused.value.error_class == "CommandNotFound"
        with pytest.raises(ExecuteError) as refused:
            await client.execute("fleece-disk-add", {"disk": "x"})
        assert str(refused.value) == "Parameter 'location' is missing"

        arguments = {"disks": ["vda"], "name": "one"}
        (made,) = await client.execute("fleece-snapshot-create", arguments)
        event = await created.get()
        assert event["data"]["snapshot"] == made["snapshot"] == "one"
        assert event["data"]["instant"] == made["instant"]
        assert {type(value) for value in event["timestamp"].values()} == {int}
    finally:
        await client.disconnect()


async def test_out_of_band_execution_is_refused(daemon: Daemon) -> None:
    client = QMPClient("test")
    await client.connect(str(daemon.control))
    try:
        with pytest.raises(ExecuteError, match="does not support OOB"):
            await client.execute("query-status", oob=True)
    finally:
        await client.disconnect()


async def test_two_monitors_at_once(daemon: Daemon) -> None:
    one, two = QMPClient("one"), QMPClient("two")
    await one.connect(str(daemon.control))
    await two.connect(str(daemon.control))
    try:
        with two.listener("FLEECE_SNAPSHOT_DELETED") as deleted:
            await one.execute("fleece-snapshot-create", {"disks": ["vda"], "name": "s"})
            await one.execute("fleece-snapshot-delete", {"disk": "vda", "snapshot": "s"})
            assert (await deleted.get())["data"] == {"disk": "vda", "snapshot": "s"}
    finally:
        await one.disconnect()
        await two.disconnect()


async def test_a_storage_daemon_under_a_backup(short_tmp: Path) -> None:
    nodes = (f"null-co,node-name={name},size=1048576,read-zeroes=on" for name in ("a", "b"))
    options = [word for node in nodes for word in ("--blockdev", node)]
    with StorageDaemon(short_tmp, *options):
        client = QMPClient("test")
        await client.connect(str(short_tmp / "qmp.sock"))
        try:
            states = []
            with client.listener(("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED")) as heard:
                arguments = {"job-id": "j", "device": "a", "target": "b", "sync": "full"}
                assert await client.execute("blockdev-backup", arguments) == {}
                async for event in heard:
                    states.append(event["data"].get("status", event["event"]))
                    if states[-1] == "null":
                        break
            assert [state for state in states if state not in ("paused", "running")] == [
                *("created", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null")
            ]
            with pytest.raises(ExecuteError) as refused:
                await client.execute("block-job-cancel", {"device": "j"})
            assert refused.value.error_class == "DeviceNotActive"
        finally:
            await client.disconnect()
