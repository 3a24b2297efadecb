"""Driver `blkdebug`: the kit while it does nothing; then its faults, states and holds."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.fault import BlkdebugDriver, Injection, IoType, StateChange
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.datapath.step import background
from tests.support.driver_kit import DriverKit, Owner, fails, file_node, null_node, read, remove_all


async def over(
    graph: Graph, below: Node, driver: BlkdebugDriver, *, read_only: bool = False
) -> Node:
    return await graph.add(
        None,
        driver,
        {"image": (below, Role.FILTERED | Role.PRIMARY)},
        read_only=read_only,
        discard_enabled=True,
    )


class TestKit(DriverKit):
    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        below = await file_node(graph, folder / f"{size}.img", size, read_only=read_only)
        return await over(graph, below, BlkdebugDriver(), read_only=read_only)


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


@pytest.fixture
def fault() -> BlkdebugDriver:
    return BlkdebugDriver()


@pytest.fixture
async def node(graph: Graph, tmp_path: Path, fault: BlkdebugDriver) -> Node:
    return await over(graph, await file_node(graph, tmp_path / "image", 1 << 20), fault)


def request(node: Node, iotype: IoType, offset: int = 0) -> Coroutine[Any, Any, object]:
    """Return a request of 512 bytes of the given type."""
    if iotype is IoType.READ:
        return node.read(offset, memoryview(bytearray(512)))
    if iotype is IoType.WRITE:
        return node.write(offset, memoryview(b"w" * 512), fua=False)
    if iotype is IoType.WRITE_ZEROES:
        return node.write_zeroes(offset, 512, fua=False, may_unmap=True, no_fallback=True)
    if iotype is IoType.DISCARD:
        return node.discard(offset, 512)
    if iotype is IoType.FLUSH:
        return node.flush()
    return node.block_status(offset, 512)


async def failing_types(node: Node, offset: int = 0) -> dict[IoType, int]:
    results = {each: await fails(request(node, each, offset)) for each in IoType}
    return {each: number for each, number in results.items() if number}


# --- injections ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "iotype", "failing"),
    [
        ("read_aio", None, {IoType.READ}),
        ("write_aio", None, {IoType.WRITE}),
        ("pwritev_zero", None, {IoType.WRITE_ZEROES}),
        ("pdiscard", None, {IoType.DISCARD}),
        ("flush_to_disk", None, {IoType.FLUSH}),
        ("flush_to_os", None, {IoType.FLUSH}),
        ("block_status", None, {IoType.BLOCK_STATUS}),
        ("none", None, set(IoType) - {IoType.BLOCK_STATUS}),
        ("none", IoType.BLOCK_STATUS, {IoType.BLOCK_STATUS}),
        ("none", IoType.DISCARD, {IoType.DISCARD}),
        ("read_aio", IoType.WRITE, set()),
    ],
)
@pytest.mark.parametrize("immediately", [False, True])
async def test_event_and_iotype_choose_what_fails(
    event: str,
    iotype: IoType | None,
    failing: set[IoType],
    immediately: bool,
    node: Node,
    fault: BlkdebugDriver,
) -> None:
    fault.inject(Injection(event, iotype=iotype, errno=errno.EDOM, immediately=immediately))
    assert await failing_types(node) == dict.fromkeys(failing, errno.EDOM)

    fault.heal()
    assert await failing_types(node) == {}


async def test_a_range_chooses_requests_that_touch_it(node: Node, fault: BlkdebugDriver) -> None:
    fault.inject(Injection("none", offset=1024, length=512))

    assert await failing_types(node, 512) == {}
    assert await failing_types(node, 1536) == {}
    hit = await failing_types(node, 1535)
    assert set(hit) == {IoType.READ, IoType.WRITE, IoType.WRITE_ZEROES, IoType.DISCARD}
    assert set(hit.values()) == {errno.EIO}
    assert await fails(request(node, IoType.READ, 513)) == errno.EIO


async def test_once_is_once(node: Node, fault: BlkdebugDriver) -> None:
    fault.inject(Injection("read_aio", once=True))
    numbers = [await fails(request(node, IoType.READ)) for _ in range(3)]
    assert numbers == [errno.EIO, 0, 0]


async def test_a_failed_request_does_not_reach_the_node_below(
    node: Node, fault: BlkdebugDriver
) -> None:
    fault.fail_next(IoType.WRITE)
    assert await fails(request(node, IoType.WRITE)) == errno.EIO
    assert await read(node, 0, 512) == bytes(512)


async def test_fail_next_counts_and_leaves_other_types(node: Node, fault: BlkdebugDriver) -> None:
    fault.inject(Injection("write_aio", errno=errno.EDOM))
    fault.fail_next(IoType.WRITE, errno=errno.ENOSPC, count=2)

    assert await fails(request(node, IoType.READ)) == 0
    numbers = [await fails(request(node, IoType.WRITE)) for _ in range(3)]
    assert numbers == [errno.ENOSPC, errno.ENOSPC, errno.EDOM]


async def test_not_immediately_is_in_the_next_turn_of_the_loop(
    node: Node, fault: BlkdebugDriver
) -> None:
    fault.inject(Injection("read_aio", immediately=False))
    later = background(request(node, IoType.READ))
    assert not later.done()
    assert await fails(later) == errno.EIO

    fault.heal()
    fault.inject(Injection("read_aio", immediately=True))
    at_once = background(request(node, IoType.READ))
    assert at_once.done()
    assert await fails(at_once) == errno.EIO


async def test_states_switch_rules_on_and_off(graph: Graph) -> None:
    fault = BlkdebugDriver(
        inject_errors=[Injection("read_aio", state=2), Injection("write_aio", state=3)],
        set_states=[StateChange("write_aio", 1, 2), StateChange("flush_to_disk", 0, 3)],
    )
    node = await over(graph, await null_node(graph, 1 << 20), fault)

    assert await fails(request(node, IoType.READ)) == 0
    assert await fails(request(node, IoType.WRITE)) == 0  # state 1 -> 2
    assert await fails(request(node, IoType.READ)) == errno.EIO
    assert await fails(request(node, IoType.WRITE)) == 0
    assert await fails(request(node, IoType.FLUSH)) == 0  # -> 3
    assert await fails(request(node, IoType.READ)) == 0
    assert await fails(request(node, IoType.WRITE)) == errno.EIO


@pytest.mark.parametrize(
    "driver",
    [
        BlkdebugDriver(inject_errors=[Injection("l1_update")]),
        BlkdebugDriver(set_states=[StateChange("l1_update", 0, 1)]),
    ],
    ids=["inject", "state"],
)
async def test_unknown_events_are_refused_at_open(driver: BlkdebugDriver, graph: Graph) -> None:
    below = await null_node(graph, 1000)
    with pytest.raises(CommandError, match="'event' does not accept value 'l1_update'"):
        await over(graph, below, driver)


# --- holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("iotype", list(IoType))
async def test_held_requests_wait_until_released(
    iotype: IoType, node: Node, fault: BlkdebugDriver
) -> None:
    hold = fault.hold(iotype)
    running = [background(request(node, iotype)) for _ in range(3)]
    await hold.reached(3)
    assert [each.done() for each in running] == [False] * 3
    assert node.in_flight == 3

    hold.release_one()
    await running[0]
    assert hold.waiting == 2
    hold.release()
    for each in running:
        await each

    await request(node, iotype)  # held no more
    assert node.in_flight == 0


async def test_a_hold_before_comes_before_the_write_and_one_after_behind_it(
    node: Node, fault: BlkdebugDriver
) -> None:
    before = fault.hold(IoType.WRITE)
    after = fault.hold(IoType.WRITE, after=True)
    writing = background(request(node, IoType.WRITE))

    await before.reached()
    assert await read(node, 0, 512) == bytes(512)
    before.release()
    await after.reached()
    assert await read(node, 0, 512) == b"w" * 512
    assert not writing.done()
    after.release()
    await writing


async def test_a_hold_of_a_range_lets_others_pass(node: Node, fault: BlkdebugDriver) -> None:
    hold = fault.hold(IoType.READ, offset=1024, length=1024)
    await request(node, IoType.READ, 512)
    await request(node, IoType.READ, 2048)
    held = background(request(node, IoType.READ, 2047))
    await hold.reached()
    hold.release()
    await held


async def test_held_requests_may_be_released_to_fail(node: Node, fault: BlkdebugDriver) -> None:
    hold = fault.hold(IoType.WRITE)
    running = [background(request(node, IoType.WRITE)) for _ in range(2)]
    await hold.reached(2)

    hold.release_one(errno=errno.ENOSPC)
    hold.release()

    assert await fails(running[0]) == errno.ENOSPC
    assert await fails(running[1]) == 0


async def test_reads_at_once_are_refused_only_while_something_may_concern_them(
    node: Node, fault: BlkdebugDriver
) -> None:
    view = memoryview(bytearray(512))
    await request(node, IoType.WRITE)
    assert node.read_now(0, view)

    hold = fault.hold(IoType.READ)
    assert not node.read_now(0, view)
    hold.release()
    fault.fail_next(IoType.READ)
    assert not node.read_now(0, view)
    fault.heal()
    assert node.read_now(0, view)

    assert fault.seen == {IoType.WRITE: 1, IoType.READ: 2}


# --- permissions -----------------------------------------------------------------------------


async def test_options_take_and_unshare_permissions(graph: Graph) -> None:
    below = await null_node(graph, 1000)
    fault = BlkdebugDriver(
        take_child_perms=perms.RESIZE, unshare_child_perms=perms.WRITE | perms.RESIZE
    )
    node = await over(graph, below, fault)
    edge = graph.attach_root("root", Owner(), node, perm=perms.CONSISTENT_READ, shared=perms.ALL)

    assert node.file is not None
    assert node.file.perm == perms.CONSISTENT_READ | perms.RESIZE
    assert node.file.shared == perms.CONSISTENT_READ | perms.WRITE_UNCHANGED
    with pytest.raises(CommandError):
        graph.attach_root("root", Owner("other"), below, perm=perms.WRITE, shared=perms.ALL)
    graph.detach_root(edge)
