"""An export as the parent of its node: drained, re-pointed, idle or not."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from nbdfleece.base.units import KiB, MiB
from nbdfleece.block.child import Role
from nbdfleece.block.drain import drained
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.server.export import READ_ONLY_FLAGS, WRITABLE_FLAGS, ExportOptions
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import connected
from tests.support.nbd_server import pattern, serving
from tests.support.waiting import turns, until


def test_flags_are_those_of_qemu() -> None:
    assert READ_ONLY_FLAGS == 0x50F
    assert WRITABLE_FLAGS == 0xD6D


async def test_description_for_the_handshake(short_tmp: Path) -> None:
    async with serving(short_tmp, size=1048577) as served:
        info = served.exports.get("disk").describe()

        assert (info.name, info.size, info.flags) == ("disk", 1048577, WRITABLE_FLAGS)
        assert (info.minimum_block, info.preferred_block, info.maximum_block) == (
            1, 4 * KiB, 32 * MiB,
        )  # fmt: skip
        assert info.contexts == ("base:allocation", "qemu:allocation-depth")
        assert served.exports.get("frozen").describe().generation != info.generation


@pytest.mark.parametrize(
    ("cluster", "preferred"),
    [(1, 4 * KiB), (512, 4 * KiB), (64 * KiB, 64 * KiB), (3 << 20, 4 * KiB), (64 * MiB, 4 * KiB)],
)
async def test_preferred_block_follows_the_nodes_clusters(
    short_tmp: Path, cluster: int, preferred: int
) -> None:
    async with serving(short_tmp) as served:
        served.disk.cluster = cluster

        assert served.exports.get("disk").describe().preferred_block == preferred


async def test_drained_export_begins_no_request_and_keeps_its_connections(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        export = served.exports.get("disk")
        async with drained(export.node):
            waiting = await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
            late = await served.open()
            await late.connect()
            late_read = await late.submit(c.NBD_CMD_READ, 0, 4)
            await turns(50)
            assert not waiting.done()
            assert not late_read.done()
            assert served.disk.data[:4] == pattern(4)

        assert (await waiting).error == 0
        assert not (await late_read).error
        await late.close()


async def test_nested_drains_end_with_the_last(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        node = served.exports.get("disk").node
        async with drained(node):
            async with drained(node):
                read = await client.submit(c.NBD_CMD_READ, 0, 4)
            await turns(50)
            assert not read.done()
        assert (await read).data == pattern(4)


async def test_drain_waits_for_requests_in_flight(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        export = served.exports.get("disk")
        served.disk.hold = {"write"}
        write = await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
        await until(lambda: served.disk.waiting)
        assert not export.is_idle()
        is_drained = asyncio.Event()

        async def drain() -> None:
            async with drained(export.node):
                is_drained.set()
                assert export.is_idle()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(drain())
            await turns(20)
            assert not is_drained.is_set()
            served.disk.held.set()

        assert is_drained.is_set()
        assert (await write).error == 0


async def test_requests_of_a_client_that_is_gone_still_count(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        export = served.exports.get("disk")
        served.disk.hold = {"write"}
        client = await served.open()
        await client.connect()
        await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
        await until(lambda: served.disk.waiting)
        await client.close()
        await turns(20)

        assert export.is_used
        assert not export.is_idle()

        served.disk.held.set()
        await export.wait_unused()
        assert served.disk.data[:4] == b"abcd"


async def test_filter_is_put_under_a_running_client(short_tmp: Path) -> None:
    """A snapshot is taken under the guest's connection: no reconnect, no failed request."""
    rng = random.Random(1)
    async with serving(short_tmp) as served, connected(served.path) as client:
        export = served.exports.get("disk")
        active = export.node
        target = await served.add_node(MemoryDriver(bytearray(MiB), new=True))
        stop = asyncio.Event()

        async def guest() -> None:
            while not stop.is_set():
                offset = rng.randrange(MiB - 4096)
                await client.write(offset, rng.randbytes(100))
                await client.read(offset, 4096)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(guest())
            await turns(200)
            async with drained(active):
                instant = bytes(served.disk.data)
                cbw = await served.graph.add(
                    "cbw",
                    CopyBeforeWrite(),
                    {
                        "file": (active, Role.FILTERED | Role.PRIMARY),
                        "target": (target, Role.DATA),
                    },
                    read_only=False,
                    discard_enabled=True,
                )
                served.graph.insert_filter(cbw)
            assert export.node is cbw
            await turns(500)
            async with drained(cbw):
                served.graph.remove_filter(cbw)
            assert export.node is active
            await served.graph.remove(cbw)
            stop.set()

        assert served.disk.data != instant


async def test_export_names_itself_in_conflicts(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        assert served.exports.get("disk").describe_parent() == "export 'disk'"
        options = ExportOptions("second", "second", writable=True, description="")
        node = served.exports.get("disk").node

        second = served.exports.add(node, options)  # several exports of one node are fine

        assert second.node is node


class Durable(MemoryDriver):
    """Notes what is asked to be durable."""

    def __init__(self) -> None:
        super().__init__(bytearray(pattern(MiB)))
        self.asked: list[object] = []

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.asked.append(fua)
        await super().write(offset, data, fua=fua)

    async def flush(self) -> None:
        self.asked.append("flush")


@pytest.mark.parametrize("writethrough", [True, False])
async def test_writethrough_answers_writes_when_they_are_durable(
    short_tmp: Path, writethrough: bool
) -> None:
    async with serving(short_tmp) as served:
        driver = Durable()
        node = await served.add_node(driver)
        options = ExportOptions("w", "w", writable=True, description="", writethrough=writethrough)
        served.exports.add(node, options)
        async with connected(served.path, "w") as one:
            await one.write(0, b"x" * 512)
            await one.zero(512, 512)
            assert driver.asked == [writethrough, writethrough]
            driver.asked.clear()
            await one.trim(4096, 4096)
            assert driver.asked == (["flush"] if writethrough else [])
            assert await one.read(0, 512) == b"x" * 512


async def test_allocation_depth_is_offered_on_demand(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = served.exports.get("disk").node
        options = ExportOptions("d", "d", writable=False, description="", allocation_depth=False)
        assert served.exports.add(node, options).describe().contexts == ("base:allocation",)
