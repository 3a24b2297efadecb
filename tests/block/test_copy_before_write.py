"""copy-before-write and snapshot-access: what each request does, and each way it can fail.

The letters and numbers of scenarios are those of the fleecing document (T-F..., T-C...).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, InUse, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.block import permissions as perms
from nbdfleece.block.accounting import Accounting
from nbdfleece.block.bitmap import DirtyBitmap
from nbdfleece.block.drivers import copy_before_write as module
from nbdfleece.block.drivers.copy_before_write import (
    ALL_ZERO,
    DONE,
    MOVING,
    CopyBeforeWrite,
    OnCbwError,
)
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.datapath import states as states_module
from nbdfleece.datapath import writes
from tests.support.early import Told
from tests.support.fleecing import (
    Fleecing,
    add_access,
    add_filter,
    add_plain,
    file_driver,
    read_all,
    start_fleecing,
    temp_driver,
)
from tests.support.interleaving import acting
from tests.support.memory import MemoryDriver
from tests.support.waiting import until

KIB, MIB = 1024, 1 << 20
BREAK_SNAPSHOT, BREAK_GUEST = OnCbwError.BREAK_SNAPSHOT, OnCbwError.BREAK_GUEST_WRITE


async def fleecing_over(
    disk: bytes, driver: CopyBeforeWrite | None = None, *, new: bool = True
) -> tuple[Fleecing, MemoryDriver, MemoryDriver]:
    active, temp = MemoryDriver(bytearray(disk)), MemoryDriver(bytearray(len(disk)), new=new)
    return await start_fleecing(active, temp, driver or CopyBeforeWrite()), active, temp


async def write(node: Node, offset: int, data: bytes) -> None:
    await node.write(offset, memoryview(data), fua=False)


async def read(node: Node, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    await node.read(offset, view)
    return bytes(view)


# --- what is copied ------------------------------------------------------------------------------


async def test_a_4k_write_saves_4k_and_a_second_one_nothing() -> None:
    fleecing, _, temp = await fleecing_over(b"a" * MIB)
    await write(fleecing.cbw, 64 * KIB, b"b" * 4096)
    assert temp.copied == 4096
    await write(fleecing.cbw, 64 * KIB, b"c" * 4096)
    assert temp.copied == 4096
    assert fleecing.filter.saved_bytes == 4096
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_an_unaligned_write_saves_the_clusters_it_touches() -> None:
    fleecing, _, temp = await fleecing_over(b"a" * MIB)
    await write(fleecing.cbw, 4095, b"bb")
    assert temp.copied == 8192
    assert await read(fleecing.access, 4000, 200) == b"a" * 200


async def test_the_last_cluster_of_an_odd_disk_is_saved_whole() -> None:
    disk = b"a" * (64 * KIB + 1537)
    fleecing, _, temp = await fleecing_over(disk)
    await write(fleecing.cbw, len(disk) - 1, b"b")
    assert temp.copied == 1537
    assert await read_all(fleecing.access) == disk


async def test_zeroes_of_the_source_cost_nothing_in_a_temp_of_ours() -> None:
    fleecing, _, temp = await fleecing_over(bytes(MIB))
    await write(fleecing.cbw, 0, b"b" * MIB)
    assert temp.writes == 0
    assert fleecing.filter.saved_bytes == 0
    assert await read_all(fleecing.access) == bytes(MIB)


async def test_zeroes_of_the_source_are_written_to_a_temp_that_held_something() -> None:
    active, temp = MemoryDriver(bytearray(MIB)), MemoryDriver(bytearray(b"x" * MIB))
    fleecing = await start_fleecing(active, temp, CopyBeforeWrite())
    await fleecing.cbw.discard(0, MIB)
    assert await read_all(fleecing.access) == bytes(MIB)
    assert bytes(temp.data) == bytes(MIB)


async def test_a_discard_of_the_whole_disk_saves_data_and_skips_zeroes() -> None:
    disk = bytearray(8 * MIB)
    disk[3 * MIB + 5000 : 3 * MIB + 30000] = b"d" * 25000
    fleecing, _, temp = await fleecing_over(bytes(disk))
    await fleecing.cbw.discard(0, 8 * MIB)
    assert temp.copied < 64 * KIB
    assert await read_all(fleecing.access) == disk
    assert await read_all(fleecing.cbw) == bytes(8 * MIB)


async def test_a_discard_that_the_disk_ignores_is_preserved_all_the_same() -> None:
    graph = Graph()
    active = MemoryDriver(bytearray(b"a" * MIB))
    source = await graph.add(None, active, read_only=False, discard_enabled=False)
    temp = await add_plain(graph, MemoryDriver(bytearray(MIB), new=True))
    cbw = await add_filter(graph, source, temp, CopyBeforeWrite())
    await cbw.discard(0, 4096)
    assert bytes(active.data[:4096]) == b"a" * 4096, "discards are off"
    driver = cbw.driver
    assert isinstance(driver, CopyBeforeWrite)
    assert driver.saved_bytes == 4096


async def test_a_write_waits_for_the_copy_that_another_write_has_begun() -> None:
    fleecing, active, temp = await fleecing_over(b"a" * MIB)
    temp.hold.add("write")
    async with asyncio.TaskGroup() as group:
        group.create_task(write(fleecing.cbw, 0, b"b" * 100))
        group.create_task(write(fleecing.cbw, 200, b"c" * 100))
        await until(lambda: temp.waiting.get("write"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert active.writes == 0
        assert temp.waiting["write"] == 1, "one cluster is copied once"
        temp.held.set()
    assert active.writes == 2
    assert await read(fleecing.access, 0, 400) == b"a" * 400


async def test_nothing_else_waits_while_a_copy_is_stuck() -> None:
    """Reads, also of the stuck cluster, writes to saved clusters, flush (fleecing document 1.8)."""
    fleecing, _, temp = await fleecing_over(b"a" * MIB)
    await write(fleecing.cbw, 128 * KIB, b"s" * 4096)
    temp.hold.add("write")
    async with asyncio.TaskGroup() as group:
        group.create_task(write(fleecing.cbw, 0, b"b" * 4096))
        await until(lambda: temp.waiting.get("write"))
        assert await read(fleecing.cbw, 0, 4096) == b"a" * 4096
        assert await read(fleecing.access, 0, 4096) == b"a" * 4096
        assert await read(fleecing.access, 128 * KIB, 4096) == b"a" * 4096
        await write(fleecing.cbw, 128 * KIB, b"t" * 4096)
        await fleecing.cbw.flush()
        assert await fleecing.access.block_status(0, 4096) == [Extent(0, 4096, DATA)]
        temp.held.set()


# --- T-C1, T-C2: errors of the temporary image -------------------------------------------------


@pytest.mark.parametrize("size", [4096, MIB])
async def test_break_snapshot_lets_the_guest_write_and_fails_every_read(size: int) -> None:
    fleecing, active, temp = await fleecing_over(
        b"a" * MIB, CopyBeforeWrite(on_cbw_error=BREAK_SNAPSHOT)
    )
    told: list[IoError] = []
    fleecing.filter.broken.subscribe(told.append)
    temp.fail["write"] = errno.EIO
    await write(fleecing.cbw, 0, b"b" * size)
    temp.fail.clear()
    assert bytes(active.data[:size]) == b"b" * size
    with pytest.raises(IoError) as failed:
        await read(fleecing.access, 0, MIB)
    assert failed.value.errno == errno.EACCES
    assert failed.value.wire_errno == errno.EIO
    with pytest.raises(IoError):
        await fleecing.access.block_status(MIB - 4096, 4096)
    assert not fleecing.access.read_now(MIB - 4096, memoryview(bytearray(4096)))
    await write(fleecing.cbw, 512 * KIB, b"c" * 4096)
    assert [error.errno for error in told] == [errno.EIO]
    assert temp.writes == 0, "no copying for a broken snapshot"


@pytest.mark.parametrize("size", [4096, MIB])
async def test_break_guest_write_fails_the_write_and_keeps_the_snapshot(size: int) -> None:
    fleecing, active, temp = await fleecing_over(b"a" * MIB)
    temp.fail["write"] = errno.EIO
    with pytest.raises(IoError) as failed:
        await write(fleecing.cbw, 0, b"b" * size)
    assert failed.value.errno == errno.EIO
    assert bytes(active.data) == b"a" * MIB
    assert await read_all(fleecing.access) == b"a" * MIB
    temp.fail.clear()
    await write(fleecing.cbw, 0, b"b" * size)
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_a_source_that_cannot_be_read_counts_as_a_failed_copy() -> None:
    fleecing, active, _ = await fleecing_over(b"a" * MIB)
    active.fail["read"] = errno.EIO
    with pytest.raises(IoError):
        await write(fleecing.cbw, 0, b"b")
    active.fail.clear()
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_a_failing_write_to_the_source_is_the_guests_and_not_the_snapshots() -> None:
    fleecing, active, _ = await fleecing_over(b"a" * MIB)
    active.fail["write"] = errno.EIO
    with pytest.raises(IoError):
        await write(fleecing.cbw, 0, b"b" * 4096)
    assert fleecing.filter.error is None
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_the_limit_of_temporary_space_is_enospc() -> None:
    fleecing, _, _ = await fleecing_over(b"a" * MIB, CopyBeforeWrite(temp_limit=8192))
    await write(fleecing.cbw, 0, b"b" * 8192)
    with pytest.raises(IoError) as failed:
        await write(fleecing.cbw, 8192, b"b")
    assert failed.value.errno == errno.ENOSPC
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_a_read_in_flight_when_the_snapshot_breaks_still_returns_old_data() -> None:
    """Invariants D and E: the write that breaks the snapshot waits for it."""
    fleecing, active, temp = await fleecing_over(
        b"a" * MIB, CopyBeforeWrite(on_cbw_error=BREAK_SNAPSHOT)
    )
    active.hold.add("read")
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read(fleecing.access, 0, 8192))
        await until(lambda: active.waiting.get("read"))
        active.hold.clear()
        temp.fail["write"] = errno.EIO
        writer = group.create_task(write(fleecing.cbw, 0, b"b" * 8192))
        await until(lambda: fleecing.filter.error)
        elsewhere = group.create_task(write(fleecing.cbw, MIB // 2, b"c" * 8192))
        overlapping = group.create_task(write(fleecing.cbw, 4096, b"d"))
        await until(elsewhere.done)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not writer.done()
        assert not overlapping.done()
        assert bytes(active.data[:8192]) == b"a" * 8192
        active.held.set()
    assert reader.result() == b"a" * 8192
    assert bytes(active.data[:4096]) == b"b" * 4096
    with pytest.raises(IoError):
        await read(fleecing.access, 0, 1)


async def test_a_read_overtaken_by_a_write_takes_the_rest_from_the_target() -> None:
    """Invariant C: the writer does not wait for the reader."""
    fleecing, active, _ = await fleecing_over(b"a" * MIB)
    active.hold.add("read")
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read(fleecing.access, 100, 20000))
        await until(lambda: active.waiting.get("read"))
        active.hold.clear()
        await write(fleecing.cbw, 8192, b"b" * 4096)
        assert bytes(active.data[8192:12288]) == b"b" * 4096
        active.held.set()
    assert reader.result() == b"a" * 20000


# --- T-C3 to T-C6: timeouts --------------------------------------------------------------------


async def stuck(
    policy: OnCbwError, timeout_s: float
) -> tuple[Fleecing, MemoryDriver, MemoryDriver]:
    fleecing, active, temp = await fleecing_over(
        b"a" * MIB, CopyBeforeWrite(on_cbw_error=policy, cbw_timeout_s=timeout_s)
    )
    temp.hold.add("write")
    return fleecing, active, temp


async def test_a_timeout_under_break_guest_write_fails_the_write_alone() -> None:
    fleecing, active, temp = await stuck(BREAK_GUEST, 0.02)
    with pytest.raises(IoError) as failed:
        await write(fleecing.cbw, 0, b"b" * 512 * KIB)
    assert failed.value.errno == errno.ETIMEDOUT
    assert bytes(active.data) == b"a" * MIB
    assert await read_all(fleecing.access) == b"a" * MIB
    temp.held.set()
    await write(fleecing.cbw, 0, b"b" * 512 * KIB)
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_a_timeout_under_break_snapshot_breaks_the_snapshot_alone() -> None:
    fleecing, active, temp = await stuck(BREAK_SNAPSHOT, 0.02)
    await write(fleecing.cbw, 0, b"b" * 512 * KIB)
    await write(fleecing.cbw, 512 * KIB, b"c" * 512 * KIB)
    assert bytes(active.data) == b"b" * 512 * KIB + b"c" * 512 * KIB
    with pytest.raises(IoError):
        await read(fleecing.access, 0, MIB)
    temp.held.set()


async def test_nothing_is_saved_any_more_when_guests_have_been_let_through() -> None:
    """An overlay that is the target is read by itself: what is in it has to be of the instant."""
    disk = b"a" * 3 * MIB
    fleecing, active, temp = await fleecing_over(
        disk, CopyBeforeWrite(on_cbw_error=BREAK_SNAPSHOT, cbw_timeout_s=0.02)
    )
    temp.hold.add("write")
    await write(fleecing.cbw, 0, b"b" * 3 * MIB)
    assert bytes(active.data) == b"b" * 3 * MIB
    temp.held.set()
    await until(lambda: fleecing.cbw.in_flight == 0)
    assert set(temp.data) == {0, ord("a")}


async def test_a_timeout_of_more_than_4_seconds_is_not_cut_to_32_bits() -> None:
    """T-C5: 5 s is 5 s. The loop is asked when it would fire, instead of waiting."""
    fleecing, _, temp = await stuck(BREAK_GUEST, 5.0)
    loop = asyncio.get_running_loop()
    asked: list[float] = []
    original = loop.call_later

    def spy(delay: float, *rest: object, **more: object) -> asyncio.TimerHandle:
        asked.append(delay)
        return original(delay, *rest, **more)  # type: ignore[arg-type]

    loop.call_later = spy  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as group:
        group.create_task(write(fleecing.cbw, 0, b"b"))
        await until(lambda: temp.waiting.get("write"))
        temp.held.set()
    assert asked == [5.0]


async def test_closing_after_a_timeout_waits_for_the_copy_in_the_background() -> None:
    """T-C6."""
    fleecing, _, temp = await stuck(BREAK_SNAPSHOT, 0.02)
    await write(fleecing.cbw, 0, b"b" * 4096)
    assert fleecing.cbw.in_flight == 1
    await fleecing.graph.remove(fleecing.access)
    async with asyncio.TaskGroup() as group:
        closing = group.create_task(fleecing.graph.remove(fleecing.cbw))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()
        temp.held.set()
    assert fleecing.cbw.in_flight == 0
    assert fleecing.temp.parents == []


# --- T-C7, T-C8, T-F4: discards, clusters, bitmaps -----------------------------------------------


async def test_a_discard_takes_whole_clusters_only() -> None:
    fleecing, _, _ = await fleecing_over(b"a" * MIB, CopyBeforeWrite(min_cluster_size=64 * KIB))
    await fleecing.access.discard(512, 192 * KIB - 1024)
    assert await read(fleecing.access, 0, 64 * KIB) == b"a" * 64 * KIB
    assert await read(fleecing.access, 128 * KIB, 64 * KIB) == b"a" * 64 * KIB
    with pytest.raises(IoError) as failed:
        await read(fleecing.access, 64 * KIB, 64 * KIB)
    assert failed.value.errno == errno.EACCES
    with pytest.raises(IoError):
        await read(fleecing.access, 0, MIB), "fails as a whole"


async def test_a_discard_within_a_cluster_does_nothing() -> None:
    fleecing, _, _ = await fleecing_over(b"a" * MIB)
    await fleecing.access.discard(1, 4094)
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_what_was_discarded_is_not_saved_any_more() -> None:
    """T-D2 without the bitmap."""
    fleecing, _, temp = await fleecing_over(b"a" * MIB)
    await fleecing.access.discard(0, MIB)
    await write(fleecing.cbw, 0, b"b" * MIB)
    assert temp.writes == 0


@pytest.mark.parametrize("size", [1000, 3 * 4096, 4097])
async def test_a_cluster_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(CommandError, match="power of 2"):
        await fleecing_over(b"a" * MIB, CopyBeforeWrite(min_cluster_size=size))


@pytest.mark.parametrize(
    ("target_cluster", "smallest", "copied"),
    [(1, 0, 4096), (65536, 0, 65536), (65536, 8192, 65536), (65536, 131072, 131072)],
)
async def test_the_unit_of_copying_is_the_largest_cluster(
    target_cluster: int, smallest: int, copied: int
) -> None:
    temp = MemoryDriver(bytearray(MIB), new=True)
    temp.cluster = target_cluster
    fleecing = await start_fleecing(
        MemoryDriver(bytearray(b"a" * MIB)), temp, CopyBeforeWrite(min_cluster_size=smallest)
    )
    await write(fleecing.cbw, 0, b"b")
    assert temp.copied == copied


async def test_only_what_the_bitmap_holds_can_be_read() -> None:
    """T-F4, and the bitmap is sampled: later changes do not matter."""
    bitmap = DirtyBitmap("b", size=MIB, granularity=64 * KIB, enabled=True)
    bitmap.set(100, 1)
    bitmap.set(512 * KIB, 64 * KIB)
    fleecing, _, temp = await fleecing_over(b"a" * MIB, CopyBeforeWrite(bitmap=bitmap))
    bitmap.set(0, MIB)
    for _ in range(2):
        assert await read(fleecing.access, 0, 64 * KIB) == b"a" * 64 * KIB
        assert await read(fleecing.access, 512 * KIB, 64 * KIB) == b"a" * 64 * KIB
        with pytest.raises(IoError) as failed:
            await read(fleecing.access, 64 * KIB - 1, 2)
        assert failed.value.wire_errno == errno.EACCES, "EINVAL on the wire"
        with pytest.raises(IoError):
            await fleecing.access.block_status(0, MIB)
        await write(fleecing.cbw, 0, b"b" * MIB)
    assert temp.copied == 128 * KIB


async def test_a_bitmap_of_another_size_or_busy_is_refused() -> None:
    small = DirtyBitmap("b", size=MIB - 1, granularity=65536, enabled=True)
    busy = DirtyBitmap("c", size=MIB, granularity=65536, enabled=True)
    busy.busy = True
    for bitmap in (small, busy):
        with pytest.raises(CommandError):
            await fleecing_over(b"a" * MIB, CopyBeforeWrite(bitmap=bitmap))


async def test_a_filter_that_nobody_used_meanwhile_preserves_no_point_in_time() -> None:
    """What was written past it is nowhere; what it had saved before is of another instant."""
    fleecing, _, _ = await fleecing_over(b"a" * MIB)
    await write(fleecing.cbw, 0, b"b" * 4096)
    await fleecing.graph.remove(fleecing.access)
    await write(fleecing.active, 4096, b"c" * 4096)

    access = await add_access(fleecing.graph, fleecing.cbw)
    for offset in (0, 4096):
        view = memoryview(bytearray(4096))
        assert not access.read_now(offset, view)
        with pytest.raises(IoError) as caught:
            await access.read(offset, view)
        assert caught.value.errno == errno.EACCES
    await write(fleecing.cbw, 8192, b"d" * 4096)
    assert fleecing.filter.saved_bytes == 4096


async def test_a_filter_that_has_saved_nothing_may_begin_again() -> None:
    fleecing, _, _ = await fleecing_over(b"a" * MIB)
    await fleecing.graph.remove(fleecing.access)
    await write(fleecing.active, 0, b"b" * 4096)

    access = await add_access(fleecing.graph, fleecing.cbw)
    await write(fleecing.cbw, 0, b"c" * 4096)
    assert await read_all(access) == b"b" * 4096 + b"a" * (MIB - 4096)


# --- T-F8: block status --------------------------------------------------------------------------


async def test_the_status_shows_the_point_in_time() -> None:
    disk = b"a" * 64 * KIB + bytes(64 * KIB) + b"c" * 64 * KIB
    fleecing, _, _ = await fleecing_over(disk)
    expected = [
        Extent(0, 64 * KIB, DATA),
        Extent(64 * KIB, 64 * KIB, HOLE | ZERO),
        Extent(128 * KIB, 64 * KIB, DATA),
    ]
    assert await fleecing.access.block_status(0, 192 * KIB) == expected
    await fleecing.cbw.write_zeroes(0, 64 * KIB, fua=False, may_unmap=True, no_fallback=False)
    await fleecing.cbw.discard(128 * KIB, 64 * KIB)
    await write(fleecing.cbw, 64 * KIB, b"x" * 64 * KIB)
    assert await fleecing.access.block_status(0, 192 * KIB) == expected


async def test_the_point_in_time_is_one_layer_and_the_filter_is_none() -> None:
    fleecing, _, _ = await fleecing_over(b"a" * 64 * KIB + bytes(64 * KIB))
    await write(fleecing.cbw, 0, b"x" * 4 * KIB)
    for node in (fleecing.access, fleecing.cbw):
        assert await node.allocation_depth(0, 128 * KIB) == [Extent(0, 128 * KIB, 1)]


# --- refusals ------------------------------------------------------------------------------------


async def test_the_access_node_refuses_writes() -> None:
    fleecing, active, _ = await fleecing_over(b"a" * MIB)
    with pytest.raises(IoError):
        await write(fleecing.access, 0, b"b")
    with pytest.raises(IoError):
        await fleecing.access.write_zeroes(0, 1, fua=False, may_unmap=True, no_fallback=False)
    await fleecing.access.flush()
    assert active.writes == 0


async def test_a_target_that_is_too_small_is_refused() -> None:
    with pytest.raises(CommandError, match="smaller"):
        await start_fleecing(
            MemoryDriver(bytearray(MIB)), MemoryDriver(bytearray(MIB - 1)), CopyBeforeWrite()
        )


async def test_a_larger_target_will_do() -> None:
    fleecing = await start_fleecing(
        MemoryDriver(bytearray(b"a" * MIB)), MemoryDriver(bytearray(2 * MIB)), CopyBeforeWrite()
    )
    await write(fleecing.cbw, 0, b"b" * MIB)
    assert await read_all(fleecing.access) == b"a" * MIB


async def test_source_and_target_must_differ() -> None:
    graph = Graph()
    node = await add_plain(graph, MemoryDriver(bytearray(MIB)))
    with pytest.raises(CommandError):
        await add_filter(graph, node, node, CopyBeforeWrite())
    assert node.parents == []
    assert list(graph) == [node]


async def test_access_needs_a_point_in_time_below_it() -> None:
    graph = Graph()
    node = await add_plain(graph, MemoryDriver(bytearray(MIB)))
    with pytest.raises(CommandError, match="point in time"):
        await add_access(graph, node)
    assert node.parents == []


# --- permissions (1.7) ---------------------------------------------------------------------------


class Root:
    """A parent outside the graph, as an export is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.drains = 0

    def describe_parent(self) -> str:
        return f"export '{self.name}'"

    def child_attached(self, edge: object) -> None: ...

    def child_detached(self, edge: object) -> None: ...

    def drained_begin(self) -> None:
        self.drains += 1

    def drained_end(self) -> None:
        self.drains -= 1

    def is_idle(self) -> bool:
        return True

    async def wait_idle(self) -> None: ...


READER = {"perm": perms.CONSISTENT_READ, "shared": perms.ALL & ~perms.RESIZE}
WRITER = {"perm": perms.CONSISTENT_READ | perms.WRITE, "shared": perms.ALL & ~perms.RESIZE}


async def test_a_filter_is_put_under_a_running_writer() -> None:
    graph = Graph()
    source = await add_plain(graph, MemoryDriver(bytearray(b"a" * MIB)))
    temp = await add_plain(graph, MemoryDriver(bytearray(MIB), new=True))
    live = Root("live")
    edge = graph.attach_root("root", live, source, **WRITER)
    cbw = await add_filter(graph, source, temp, CopyBeforeWrite())
    with pytest.raises(CommandError):
        await add_access(graph, cbw)  # the writer beside the filter is still there
    graph.insert_filter(cbw)
    assert edge.node is cbw
    access = await add_access(graph, cbw)
    with pytest.raises(CommandError):
        graph.attach_root("root", Root("other"), source, **WRITER)
    graph.attach_root("root", Root("reader"), source, **READER)
    with pytest.raises(CommandError):
        graph.attach_root("root", Root("thief"), temp, **WRITER)
    with pytest.raises(CommandError):
        await graph.remove(cbw)
    await graph.remove(access)
    graph.remove_filter(cbw)
    assert edge.node is source
    await graph.remove(cbw)
    await graph.remove(temp)


async def test_snapshots_stack_and_each_keeps_its_instant() -> None:
    graph = Graph()
    disk = await add_plain(graph, MemoryDriver(bytearray(b"0" * MIB)))
    live = graph.attach_root("root", Root("live"), disk, **WRITER)
    accesses, filters = [], []
    for number in range(3):
        await write(live.node, 0, bytes([number + 1]) * 4096)
        temp = await add_plain(graph, MemoryDriver(bytearray(MIB), new=True))
        filters.append(await add_filter(graph, live.node, temp, CopyBeforeWrite()))
        graph.insert_filter(filters[-1])
        accesses.append(await add_access(graph, filters[-1]))
    await write(live.node, 0, b"9" * MIB)
    for number, access in enumerate(accesses):
        expected = bytes([number + 1]) * 4096 + b"0" * (MIB - 4096)
        assert await read_all(access) == expected, number
    with pytest.raises(InUse):
        graph.remove_filter(filters[1])
    await graph.remove(accesses[1])
    graph.remove_filter(filters[1])
    await graph.remove(filters[1])
    await write(live.node, 0, b"8" * 8192)
    for number in (0, 2):
        expected = bytes([number + 1]) * 4096 + b"0" * (MIB - 4096)
        assert await read_all(accesses[number]) == expected, number


# --- the one-hop way on plain files --------------------------------------------------------------


async def on_files(
    tmp_path: Path, disk: bytes, driver: CopyBeforeWrite | None = None
) -> tuple[Fleecing, Path]:
    active, temp = tmp_path / "active", tmp_path / "temp"
    active.write_bytes(disk)
    fleecing = await start_fleecing(
        file_driver(active), temp_driver(temp, len(disk)), driver or CopyBeforeWrite()
    )
    return fleecing, temp


async def test_first_writes_on_files_save_4k_each(tmp_path: Path) -> None:
    disk = b"a" * 4 * MIB
    fleecing, temp = await on_files(tmp_path, disk)
    async with asyncio.TaskGroup() as group:
        for index in range(0, 1024, 16):
            group.create_task(write(fleecing.cbw, index * 4096, b"b" * 4096))
    assert fleecing.filter.saved_bytes == 64 * 4096
    assert temp.stat().st_blocks * 512 == 64 * 4096
    assert await read_all(fleecing.access) == disk
    await fleecing.close()


async def test_a_fault_in_the_thread_leaves_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as no memory: else each later write there would wait for ever."""
    disk = b"a" * MIB
    fleecing, _ = await on_files(tmp_path, disk)

    def fail(*_args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(writes, "_save", fail)
        with pytest.raises(MemoryError):
            await write(fleecing.cbw, 0, b"b" * 8192)
    assert await read_all(fleecing.cbw) == disk
    assert fleecing.filter.saved_bytes == 0
    async with asyncio.timeout(5):
        await write(fleecing.cbw, 4096, b"c" * 4096)
    assert await read_all(fleecing.access) == disk
    await fleecing.close()


@pytest.mark.parametrize("policy", list(OnCbwError))
async def test_the_one_hop_way_obeys_the_policy_when_the_temp_fails(
    tmp_path: Path, policy: OnCbwError, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = b"a" * MIB
    fleecing, _ = await on_files(tmp_path, disk, CopyBeforeWrite(on_cbw_error=policy))
    target = fleecing.temp.plain_file()
    assert target is not None
    read_only = (tmp_path / "temp").open("rb")
    writable, target.fd = target.fd, read_only.fileno()  # EBADF for writes
    if policy is BREAK_GUEST:
        with pytest.raises(IoError):
            await write(fleecing.cbw, 0, b"b" * 4096)
        target.fd = writable
        assert await read_all(fleecing.cbw) == disk
        assert await read_all(fleecing.access) == disk
        assert fleecing.filter.saved_bytes == 0
        await write(fleecing.cbw, 0, b"b" * 4096)
        assert await read_all(fleecing.access) == disk
    else:
        await write(fleecing.cbw, 0, b"b" * 4096)
        target.fd = writable
        assert fleecing.filter.error is not None
        assert (await read_all(fleecing.cbw))[:4096] == b"b" * 4096
        with pytest.raises(IoError):
            await read(fleecing.access, MIB - 1, 1)
    read_only.close()
    await fleecing.close()


class SettledMeanwhile(MemoryDriver):
    """A disk that lets a thread settle a cluster while it is being read."""

    meanwhile: Callable[[], None] | None = None

    async def _dawdle(self, verb: str) -> None:
        if self.meanwhile is not None:
            self.meanwhile()


@pytest.mark.parametrize("first", [b"a", b"\0"], ids=["data", "zeroes"])
@pytest.mark.parametrize("second_is_read", [False, True])
async def test_whenever_a_thread_settles_a_cluster_a_reader_gets_old_data(
    first: bytes, *, second_is_read: bool
) -> None:
    """One is settled and overwritten between any two lines of the reader, of three claimed ones."""
    disk = first * 4096 + b"b" * 4096 + b"c" * 4096
    line, reached = 0, 1
    while line <= reached:
        active, temp = SettledMeanwhile(bytearray(disk)), MemoryDriver(bytearray(12288), new=True)
        fleecing = await start_fleecing(active, temp, CopyBeforeWrite())
        fleecing.filter._states.fill(0, 3, MOVING)
        span = fleecing.filter._states.span(0, 3)
        assert span is not None

        def settle(cluster: int, page=span[0], active=active, temp=temp) -> None:
            """What writes.SavingWrite does."""
            place = slice(cluster * 4096, (cluster + 1) * 4096)
            is_zero = not any(disk[place])
            if not is_zero:
                temp.data[place] = disk[place]
            page[cluster] = ALL_ZERO if is_zero else DONE
            active.data[place] = b"n" * 4096

        if second_is_read:
            active.meanwhile = partial(settle, 1)
        with acting((module, states_module), {line: partial(settle, 0)}) as lines:
            found = await read(fleecing.access, 0, len(disk))
            status = await fleecing.access.block_status(0, len(disk))
        assert found == disk, line
        for extent in status:
            if extent.flags & ZERO:
                assert not any(disk[extent.offset : extent.end]), line
        line, reached = line + 1, lines.reached
    assert reached > 30


# --- replies before the event loop knows ---------------------------------------------------------


async def write_replying(node: Node, offset: int, data: bytes, replied: list[str]) -> None:
    await node.write_replying(offset, memoryview(data), Told(lambda: replied.append("early")))


async def test_a_first_write_is_replied_to_when_old_data_is_saved_and_new_data_written(
    tmp_path: Path,
) -> None:
    disk = b"a" * MIB
    fleecing, temp = await on_files(tmp_path, disk, CopyBeforeWrite())
    seen: list[tuple[bytes, bytes]] = []

    def reply() -> None:
        seen.append(((tmp_path / "active").read_bytes()[:4096], temp.read_bytes()[:4096]))

    await fleecing.cbw.write_replying(0, memoryview(b"b" * 4096), Told(reply))
    assert seen == [(b"b" * 4096, b"a" * 4096)]
    await fleecing.cbw.write_replying(
        0, memoryview(b"c" * 4096), Told(reply)
    )  # nothing left to save
    assert seen[1] == (b"c" * 4096, b"a" * 4096)
    assert await read_all(fleecing.access) == disk
    await fleecing.close()


async def test_a_write_whose_copy_fails_is_not_replied_to_early(tmp_path: Path) -> None:
    fleecing, _ = await on_files(tmp_path, b"a" * MIB, CopyBeforeWrite(on_cbw_error=BREAK_GUEST))
    target = fleecing.temp.plain_file()
    assert target is not None
    read_only = (tmp_path / "temp").open("rb")
    writable, target.fd = target.fd, read_only.fileno()  # EBADF for writes
    replied: list[str] = []
    with pytest.raises(IoError):
        await write_replying(fleecing.cbw, 0, b"b" * 4096, replied)
    assert replied == []
    target.fd = writable
    read_only.close()
    await fleecing.close()


async def test_whoever_got_an_early_reply_finds_bitmaps_marked(tmp_path: Path) -> None:
    fleecing, _ = await on_files(tmp_path, b"a" * MIB, CopyBeforeWrite())
    bitmap = DirtyBitmap("top", size=MIB, granularity=4096, enabled=True)
    fleecing.cbw.bitmaps["top"] = bitmap
    counts: list[int] = []
    await fleecing.cbw.write_replying(
        0, memoryview(b"b" * 4096), Told(lambda: counts.append(bitmap.count()))
    )
    assert counts == [4096]
    below = DirtyBitmap("below", size=MIB, granularity=4096, enabled=True)
    fleecing.active.bitmaps["below"] = below
    await fleecing.cbw.write_replying(
        8192, memoryview(b"b" * 4096), Told(lambda: counts.append(below.count()))
    )
    assert set(counts[1:]) <= {4096}
    assert below.count() == 4096
    await fleecing.close()


async def test_what_is_counted_is_not_replied_to_early(tmp_path: Path) -> None:
    fleecing, _ = await on_files(tmp_path, b"a" * MIB, CopyBeforeWrite())
    replied: list[str] = []
    fleecing.cbw.account(Accounting())
    await write_replying(fleecing.cbw, 0, b"b" * 4096, replied)
    fleecing.cbw.account(None)
    fleecing.cbw.write_threshold = MIB
    await write_replying(fleecing.cbw, 0, b"b" * 4096, replied)
    assert replied == []
    await fleecing.close()
