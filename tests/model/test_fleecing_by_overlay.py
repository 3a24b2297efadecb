"""The older scheme at random: an overlay over the disk itself is the target, and is what is read.

As test_fleecing, with the same guests, readers and model; the disk is a file or a qcow2 image, and
every request dawdles as a seed tells it.
"""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.qcow2.driver import Qcow2Driver, Qcow2Options
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.formats.qcow2.create import NewImage
from tests.block.test_qcow2_driver import qcow2_node
from tests.model.test_fleecing import assert_live, make_disk, run_history
from tests.support.driver_kit import Owner, fails, read
from tests.support.fleecing import Fleecing, add_access, add_filter, add_plain, read_all
from tests.support.live import eventually
from tests.support.memory import MemoryDriver
from tests.support.qcow2 import check_qcow2, make_qcow2

KiB, MiB = 1 << 10, 1 << 20
OVERLAYS = {
    "plain": {},
    "small": {"cluster_size": 4096},
    "large": {"cluster_size": 1 << 20},
    "subclusters": {"extended_l2": True},
    "version 2": {"version": 2},
}


class Dawdling(MemoryDriver):
    """The file of an image, which gets longer."""

    async def truncate(self, size: int) -> None:
        self.data[size:] = bytes(max(0, size - len(self.data)))

    def size_now(self) -> int:
        return len(self.data)


async def in_memory(graph: Graph, folder: Path, new: NewImage, rng: random.Random) -> Node:
    path = make_qcow2(folder / "new.qcow2", new)
    data = bytearray(path.read_bytes())
    path.unlink()
    return await add_plain(graph, Dawdling(data, rng, now_share=0.5))


async def above(graph: Graph, file: Node, backing: Node | None = None) -> Node:
    children = {"file": (file, Role.DATA | Role.METADATA | Role.PRIMARY)}
    if backing is not None:
        children["backing"] = (backing, Role.COW)
    driver = Qcow2Driver(Qcow2Options())
    return await graph.add(None, driver, children, read_only=False, discard_enabled=True)


async def start(
    rng: random.Random,
    folder: Path,
    disk: bytearray,
    *,
    over: str,
    source: str = "raw",
    driver: CopyBeforeWrite | None = None,
) -> tuple[Fleecing, MemoryDriver]:
    """Return a fleecing whose access node is the overlay, and what is below the disk."""

    def more() -> random.Random:
        return random.Random(rng.random())

    graph, size = Graph(), len(disk)
    if source == "raw":
        below = MemoryDriver(bytearray(disk), more(), now_share=0.5)
        active = await add_plain(graph, below)
    else:
        file = await in_memory(graph, folder, NewImage(size=size, cluster_size=8192), more())
        assert isinstance(file.driver, MemoryDriver)
        below, active = file.driver, await above(graph, file)
        for offset in range(0, size, 100_000):
            part = memoryview(bytes(disk[offset : offset + 100_000]))
            if any(part):
                await active.write(offset, part, fua=False)
    file = await in_memory(graph, folder, NewImage(size=size, **OVERLAYS[over]), more())
    overlay = await above(graph, file, active)
    cbw = await add_filter(graph, active, overlay, driver or CopyBeforeWrite())
    graph.attach_root("guest", Owner("guest"), cbw, perm=2, shared=15)
    return Fleecing(graph, active, overlay, cbw, overlay), below


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("over", OVERLAYS)
@pytest.mark.parametrize("source", ["raw", "qcow2"])
async def test_the_overlay_is_the_instant_through_any_interleaving(
    rng: random.Random, tmp_path: Path, source: str, over: str, *, long_run: bool
) -> None:
    for _ in range(10 if long_run else 1):
        disk = make_disk(rng, 3 * MiB + 1536)
        fleecing, _ = await start(rng, tmp_path, disk, over=over, source=source)
        errors, model, crew = await run_history(fleecing, disk, rng, steps=60)
        assert errors == []
        assert sum(guest.failures for guest in crew) == 0
        assert await read_all(fleecing.access) == disk
        await assert_live(fleecing, model, crew)

        graph, overlay = fleecing.graph, fleecing.access
        cbw = fleecing.cbw.driver
        assert isinstance(cbw, CopyBeforeWrite)
        has_all = all(extent.flags for extent in cbw.held(0, len(disk)))
        graph.detach_root(fleecing.cbw.parents[0])
        await graph.remove(fleecing.cbw)
        await fleecing.active.write(0, memoryview(bytes([7]) * len(disk)), fua=False)
        refused = await no_byte_is_newer(overlay, disk)
        assert refused or has_all or over == "large"
        image = overlay.child("file").node
        await graph.remove(overlay)
        driver = image.driver
        assert isinstance(driver, MemoryDriver)
        (tmp_path / "after.qcow2").write_bytes(driver.data)
        check_qcow2(tmp_path / "after.qcow2")


async def no_byte_is_newer(node: Node, disk: bytearray) -> int:
    refused = 0
    for offset in range(0, node.size, 4096):
        view = memoryview(bytearray(min(4096, node.size - offset)))
        wanted = disk[offset : offset + len(view)]
        if node.read_now(offset, view):
            assert view == wanted
        else:
            assert await fails(node.read(offset, view)) in (0, errno.EIO)
        if await fails(node.read(offset, view)):
            refused += 1
            assert await fails(node.block_status(offset, len(view))) == errno.EIO
            assert await fails(node.allocation_depth(offset, len(view))) == errno.EIO
        else:
            assert view == wanted
    return refused


@pytest.mark.parametrize("source", ["raw", "qcow2"])
async def test_an_overlay_that_could_not_be_filled_gives_errors_and_nothing_newer(
    rng: random.Random, tmp_path: Path, source: str
) -> None:
    disk = make_disk(rng, 2 * MiB)
    driver = CopyBeforeWrite(on_cbw_error=OnCbwError.BREAK_SNAPSHOT)
    fleecing, _ = await start(rng, tmp_path, disk, over="plain", source=source, driver=driver)
    file = fleecing.access.child("file").node.driver
    assert isinstance(file, MemoryDriver)

    def failing() -> None:
        file.fail["write"] = errno.ENOSPC

    driver.saved.subscribe(lambda total: failing() if total > 300 * KiB else None)
    errors, model, crew = await run_history(fleecing, disk, rng, steps=60)
    assert driver.error is not None
    assert {error.errno for error in errors} == {errno.EIO}
    assert sum(guest.failures for guest in crew) == 0
    await assert_live(fleecing, model, crew)
    await no_byte_is_newer(fleecing.access, disk)


async def test_a_reader_that_was_on_its_way_to_the_disk_gets_what_was_saved_meanwhile(
    rng: random.Random, tmp_path: Path
) -> None:
    """Where QEMU lets the write wait for the reader."""
    disk = bytearray(rng.randbytes(MiB))
    fleecing, below = await start(rng, tmp_path, disk, over="plain")
    overlay = fleecing.access
    below.hold.add("read")
    view = memoryview(bytearray(200_000))

    reader = asyncio.create_task(overlay.read(1000, view))
    await eventually(lambda: below.waiting.get("read"))
    below.hold.clear()  # the reader still waits: others do not
    await fleecing.cbw.write(0, memoryview(bytes([1]) * MiB), fua=False)
    below.held.set()
    await reader
    assert view == disk[1000:201_000]


async def test_a_snapshot_inside_the_overlay_cannot_see_the_disk(
    rng: random.Random, tmp_path: Path
) -> None:
    """What is saved after it is in the overlay alone."""
    disk = bytearray(rng.randbytes(MiB))
    fleecing, _ = await start(rng, tmp_path, disk, over="plain")
    await fleecing.cbw.write(0, memoryview(bytes(65536)), fua=False)
    snapshots = fleecing.access.driver.internal_snapshots()
    assert snapshots is not None
    await snapshots.create("one", 0, 0)
    point = await fleecing.access.driver.open_snapshot("one")
    view = memoryview(bytearray(65536))
    await point.read(0, view)
    assert view == disk[:65536]
    assert await fails(point.read(65536, view)) == errno.EIO
    assert await fails(point.block_status(65536, 65536)) == errno.EIO
    point.close()


async def test_what_a_bitmap_leaves_out_cannot_be_read_through_the_overlay(
    rng: random.Random, tmp_path: Path
) -> None:
    disk = bytearray(rng.randbytes(MiB))
    fleecing, _ = await start(rng, tmp_path, disk, over="plain")
    access = await add_access(fleecing.graph, fleecing.cbw)
    await access.discard(0, 65536)  # given up: what guests write there is not saved
    await fleecing.cbw.write(0, memoryview(bytes([1]) * 131072), fua=False)
    view = memoryview(bytearray(4096))
    if not await fails(fleecing.access.read(0, view)):
        assert view == bytes(4096)  # as the discard has left it
    assert await read(fleecing.access, 65536, MiB - 65536) == disk[65536:]


async def test_an_overlay_is_of_one_instant_or_refused(rng: random.Random, tmp_path: Path) -> None:
    graph = Graph()
    active = await add_plain(graph, MemoryDriver(bytearray(MiB)))
    make_qcow2(tmp_path / "used.qcow2", NewImage(size=MiB))
    used = await qcow2_node(graph, tmp_path / "used.qcow2", backing=active)
    await used.write(512 * KiB, memoryview(b"x"), fua=False)
    with pytest.raises(CommandError, match="holds data already, at 524288"):
        await add_filter(graph, active, used, CopyBeforeWrite())
    make_qcow2(tmp_path / "new.qcow2", NewImage(size=MiB))
    new = await qcow2_node(graph, tmp_path / "new.qcow2", backing=active)
    cbw = await add_filter(graph, active, new, CopyBeforeWrite())
    with pytest.raises(CommandError, match="is, or has been, a point in time"):
        await add_filter(graph, active, new, CopyBeforeWrite())
    await graph.remove(cbw)  # nobody has counted on it
    cbw = await add_filter(graph, active, new, CopyBeforeWrite())
    edge = graph.attach_root("guest", Owner("guest"), cbw, perm=2, shared=15)
    graph.detach_root(edge)
    await graph.remove(cbw)
    assert await fails(new.read(0, memoryview(bytearray(1)))) == errno.EIO
    with pytest.raises(CommandError, match="is, or has been, a point in time"):
        await add_filter(graph, active, new, CopyBeforeWrite())
