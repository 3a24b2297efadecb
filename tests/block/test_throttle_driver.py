"""Driver `throttle`: the kit without limits; then waiting, drains, groups, the registry."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, InUse, IoError
from nbdfleece.block.child import Role
from nbdfleece.block.drain import drained
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.throttle import ThrottleDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.throttle import Direction
from nbdfleece.block.throttle_group import ThrottleGroups, make_throttle_group, set_property
from nbdfleece.datapath.step import background
from tests.support.driver_kit import DriverKit, file_node, read, remove_all
from tests.support.manual_clock import SECOND, ManualClock
from tests.support.memory import MemoryDriver
from tests.support.waiting import turns

KiB = 1 << 10


async def over(graph: Graph, below: Node, group: str, *, read_only: bool = False) -> Node:
    groups = graph.throttle_groups
    return await graph.add(
        None,
        ThrottleDriver(groups, groups.find(group)),
        {"file": (below, Role.FILTERED | Role.PRIMARY)},
        read_only=read_only,
        discard_enabled=True,
    )


class TestKit(DriverKit):
    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        if "g" not in graph.throttle_groups:
            make_throttle_group(graph.throttle_groups, "g", {"limits": {"iops-total": 10**12}})
        below = await file_node(graph, folder / f"{size}.img", size, read_only=read_only)
        return await over(graph, below, "g", read_only=read_only)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def graph(clock: ManualClock) -> AsyncIterator[Graph]:
    graph = Graph()
    graph.throttle_groups = ThrottleGroups(clock)
    make_throttle_group(graph.throttle_groups, "g", {"limits": {"bps-total": 64 * KiB}})
    yield graph
    await remove_all(graph)


@pytest.fixture
async def disk(graph: Graph) -> Node:
    return await graph.add(
        "disk", MemoryDriver(bytearray(1 << 20)), read_only=False, discard_enabled=True
    )


@pytest.fixture
async def node(graph: Graph, disk: Node) -> Node:
    return await over(graph, disk, "g")


def driver_of(node: Node) -> ThrottleDriver:
    assert isinstance(node.driver, ThrottleDriver)
    return node.driver


async def test_reads_writes_zeroes_and_discards_wait_and_flushes_do_not(
    node: Node, clock: ManualClock
) -> None:
    await node.write(0, memoryview(b"x" * 64 * KiB), fua=False)  # overflows the bucket
    piece = memoryview(bytearray(16 * KiB))
    waiting = [
        background(request)
        for request in (
            node.read(0, piece),
            node.write(0, piece, fua=False),
            node.write_zeroes(0, 16 * KiB, fua=False, may_unmap=True, no_fallback=False),
            node.discard(0, 16 * KiB),
        )
    ]
    await node.flush()
    assert (await node.block_status(0, 512))[0].offset == 0
    await turns(10)
    assert not any(request.done() for request in waiting)

    clock.advance(2 * SECOND)  # 64 KiB above the 6.4 KiB of the bucket, and three times 16 KiB
    await turns(10)

    assert all(request.done() for request in waiting)
    assert len(clock.timers) == 0


async def test_cached_reads_are_let_go_or_wait_but_are_counted_once(
    graph: Graph, disk: Node, clock: ManualClock, tmp_path: Path
) -> None:
    make_throttle_group(graph.throttle_groups, "ops", {"limits": {"iops-read": 20}})
    file = await file_node(graph, tmp_path / "cached", 1 << 20)
    node = await over(graph, file, "ops")
    await file.write(0, memoryview(b"cached" * 100), fua=False)
    view = memoryview(bytearray(512))

    done = [node.read_now(0, view) for _ in range(5)]

    assert done == [True, True, True, False, False]  # 20 / 10 operations, and one that overflows
    assert not (await over(graph, disk, "ops")).read_now(0, view)  # one bucket for the group
    clock.advance(SECOND)
    assert node.read_now(0, view)


async def test_what_is_below_decides_whether_a_cached_read_is_counted(
    node: Node, disk: Node, clock: ManualClock
) -> None:
    view = memoryview(bytearray(64 * KiB))
    for _ in range(5):
        assert not node.read_now(0, view)  # the disk in memory never answers at once
    await read(node, 0, 64 * KiB)  # so nothing was counted before


async def test_a_drain_lets_throttled_requests_through(node: Node, disk: Node) -> None:
    """Of a node below, the node itself: nobody has to wait for the timer."""
    for drained_node in (node, disk):
        waiting = [background(node.write(0, memoryview(bytes(KiB)), fua=False)) for _ in range(500)]
        await turns(3)
        assert sum(not request.done() for request in waiting) > 100

        async with drained(drained_node):
            assert all(request.done() for request in waiting)
        assert not driver_of(node)._open_member.lets_through
        assert not driver_of(node)._open_member.may_go(Direction.READ)


async def test_a_drain_of_a_filter_above_lets_a_throttled_target_go_on(
    graph: Graph, disk: Node
) -> None:
    """A guest write that waits for the copy to a throttled target (T-C3) is in flight above it."""
    temp = await graph.add(
        "temp", MemoryDriver(bytearray(1 << 20)), read_only=False, discard_enabled=True
    )
    slow = await over(graph, temp, "g")
    driver = CopyBeforeWrite(
        on_cbw_error=OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout_s=None,
        min_cluster_size=64 * KiB,
        bitmap=None,
        temp_limit=None,
    )
    cbw = await graph.add(
        "cbw",
        driver,
        {"file": (disk, Role.FILTERED | Role.PRIMARY), "target": (slow, Role.DATA)},
        read_only=False,
        discard_enabled=True,
    )
    offsets = range(0, 1 << 20, 64 * KiB)
    writes = [background(cbw.write(at, memoryview(b"new"), fua=False)) for at in offsets]
    await turns(20)
    assert not all(write.done() for write in writes)

    for drained_node in (disk, cbw):
        async with drained(drained_node):
            assert all(write.done() for write in writes)


async def test_removing_a_node_in_use_of_its_group(graph: Graph, node: Node) -> None:
    """T-R9: groups in use cannot be deleted; a node may change its group."""
    groups = graph.throttle_groups
    with pytest.raises(InUse, match="object 'g' is in use, can not be deleted"):
        groups.remove("g")
    fast = make_throttle_group(groups, "fast", {})
    waiting = [background(node.write(0, memoryview(bytes(KiB)), fua=False)) for _ in range(100)]
    driver_of(node).change_group(fast)
    await turns(10)

    assert all(request.done() for request in waiting)
    assert driver_of(node).group is fast
    groups.remove("g")
    await graph.remove(node)
    groups.remove("fast")


async def test_new_limits_hold_at_once(graph: Graph, node: Node, clock: ManualClock) -> None:
    waiting = [background(node.write(0, memoryview(bytes(KiB)), fua=False)) for _ in range(100)]
    set_property(graph.throttle_groups.find("g"), "limits", {"bps-total": 0})
    await turns(10)

    assert all(request.done() for request in waiting)
    assert not clock.timers


async def test_errors_of_the_node_below_come_through(node: Node, disk: Node) -> None:
    assert isinstance(disk.driver, MemoryDriver)
    disk.driver.fail["write"] = errno.EIO
    with pytest.raises(IoError) as caught:
        await node.write(0, memoryview(b"x"), fua=False)
    assert caught.value.errno == errno.EIO


async def test_options(graph: Graph) -> None:
    """T-T3: a filter without a group is refused; texts are those of QEMU."""
    disk = {"driver": "null-co", "size": 1 << 20}
    options: dict[str, object] = {"driver": "throttle", "node-name": "t", "file": disk}
    with pytest.raises(CommandError, match="Parameter 'throttle-group' is missing"):
        await add_from_options(graph, options)
    with pytest.raises(CommandError, match="Throttle group 'nope' does not exist"):
        await add_from_options(graph, options | {"throttle-group": "nope"})
    with pytest.raises(CommandError, match="Parameter 'file' is missing"):
        await add_from_options(
            graph, {"driver": "throttle", "node-name": "t", "throttle-group": "g"}
        )
    assert list(graph) == []

    node = await add_from_options(graph, options | {"throttle-group": "g"})

    assert node.size == 1 << 20
    assert node.driver.is_filter
    assert driver_of(node).group is graph.throttle_groups.find("g")
