"""What programs written for a virtual machine ask: is it running, stop it, let it go on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import ask, client, eventually, serving, snapshot, soon
from tests.support.nbd_client import connected
from tests.support.storage_daemon import StorageDaemon

pytestmark = pytest.mark.slow


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with serving(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        yield running


async def status(daemon: Daemon) -> str:
    answer = await ask(daemon, "query-status")
    assert answer["running"] is (answer["status"] == "running")
    return answer["status"]


async def test_a_guest_that_is_stopped_writes_when_it_goes_on(
    daemon: Daemon, short_tmp: Path
) -> None:
    disk = short_tmp / "vda.raw"
    async with client(daemon, "vda") as guest:
        await snapshot(daemon, "vda", name="one")
        await ask(daemon, "stop")
        assert await status(daemon) == "paused"
        await ask(daemon, "stop")
        write = asyncio.create_task(guest.write(0, b"\7" * 4096))
        async with client(daemon, "vda@one") as reader, client(daemon, "vda") as late:
            late_write = asyncio.create_task(late.write(8192, b"\7" * 4096))
            for _ in range(50):  # all of these were asked for after the writes
                assert await soon(reader.read(0, 4096)) == b"\1" * 4096
            await snapshot(daemon, "vda", name="two")
            assert not write.done()
            assert not late_write.done()
            assert disk.read_bytes() == b"\1" * (1 << 20)

            await ask(daemon, "cont")
            await soon(write)
            await soon(late_write)
        assert await status(daemon) == "running"
        await ask(daemon, "cont")
        assert disk.read_bytes()[:4096] == b"\7" * 4096
        async with client(daemon, "vda@two") as reader:
            assert await reader.read(0, 4096) == b"\1" * 4096


async def test_a_disk_that_comes_while_guests_are_stopped_is_held_too(
    daemon: Daemon, short_tmp: Path
) -> None:
    await ask(daemon, "stop")
    disk = make_disk(short_tmp / "vdb.raw", 4096)
    await ask(daemon, "fleece-disk-add", {"disk": "vdb", "location": str(disk)})
    async with client(daemon, "vdb") as guest, client(daemon, "vda") as other:
        write = asyncio.create_task(guest.write(0, b"\7" * 512))
        for _ in range(20):
            await ask(daemon, "query-status")
        assert not write.done()
        assert disk.read_bytes() == b"\1" * 4096
        await ask(daemon, "cont")
        await soon(write)
        assert await soon(other.read(0, 1)) == b"\1"
    # A held export can be removed, and the others are let go.
    await eventually(lambda: _nobody_connected(daemon))
    await ask(daemon, "stop")
    await ask(daemon, "fleece-disk-remove", {"disk": "vdb"})
    await ask(daemon, "cont")


async def _nobody_connected(daemon: Daemon) -> bool:
    return not await ask(daemon, "query-fleece-clients")


async def test_a_held_write_is_not_carried_out_by_the_end_of_the_daemon(
    daemon: Daemon, short_tmp: Path
) -> None:
    async with client(daemon, "vda") as guest:
        await ask(daemon, "stop")
        write = asyncio.create_task(guest.write(0, b"\7" * 4096))
        await ask(daemon, "query-status")
        os.kill(daemon.process.pid, signal.SIGTERM)
        assert await asyncio.to_thread(daemon.process.wait, 20) == 0
        with pytest.raises((OSError, EOFError, AssertionError)):
            await soon(write)
    assert (short_tmp / "vda.raw").read_bytes() == b"\1" * (1 << 20)


async def test_a_storage_daemon_answers_what_a_machine_is_asked_first(short_tmp: Path) -> None:
    disk = make_disk(short_tmp / "a.raw", 1 << 20)
    with StorageDaemon(
        short_tmp,
        *("--blockdev", "file,node-name=a,filename=a.raw"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=live,node-name=a,name=live,writable=on"),
    ) as machine:
        first = [machine.ask(name) for name in ("query-status", "query-name", "query-tpm")]
        assert first == [{"running": True, "singlestep": False, "status": "running"}, {}, []]
        machine.ask("block-dirty-bitmap-add", {"node": "a", "name": "b"})
        (row,) = machine.ask("query-block")
        assert row["device"] == "live"
        assert [each["name"] for each in row["inserted"]["dirty-bitmaps"]] == ["b"]
        assert row["inserted"]["image"]["virtual-size"] == 1 << 20
        drive = {"path": row["qdev"], "property": "drive"}
        assert machine.ask("qom-get", drive) == "a"

        async with connected(str(short_tmp / "nbd.sock"), "live") as guest:
            machine.ask("stop")
            assert machine.ask("query-status")["status"] == "paused"
            write = asyncio.create_task(guest.write(0, b"\7" * 4096))
            for _ in range(20):
                await asyncio.to_thread(machine.ask, "query-status")
            assert not write.done()
            assert disk.read_bytes() == b"\1" * (1 << 20)
            machine.ask("cont")
            await soon(write)
        (row,) = machine.ask("query-block")
        assert row["inserted"]["dirty-bitmaps"][0]["count"] == 64 << 10
