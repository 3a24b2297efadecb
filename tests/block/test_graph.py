"""Graph changes and permissions: T-G1 to T-G5 of the fleecing document, drains, refusals."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

from nbdfleece.base.errors import CommandError, InUse, NotFound
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Child, Role
from nbdfleece.block.drain import drained
from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.throttle import ThrottleDriver
from nbdfleece.block.graph import Graph, GraphChange
from nbdfleece.block.node import Node
from nbdfleece.block.throttle import Limits
from nbdfleece.block.throttle_group import ThrottleGroups
from tests.support.memory import MemoryDriver

SIZE = 65536
FILTERED = Role.FILTERED | Role.PRIMARY


class PassThrough(Driver):
    """A filter that forwards permissions."""

    name: ClassVar[str] = "pass-through"
    is_filter: ClassVar[bool] = True

    async def open(self) -> int:
        assert self.node.file is not None
        return self.node.file.node.size

    async def read(self, offset: int, view: memoryview) -> None:
        assert self.node.file is not None
        await self.node.file.node.read(offset, view)


class Exclusive(PassThrough):
    """A filter that writes and shares no writes, once it has parents (or always)."""

    name: ClassVar[str] = "exclusive"

    def __init__(self, *, always: bool = False) -> None:
        self.always = always

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        if not (self.node.parents or self.always):
            return perms.NONE, perms.ALL
        return perms.WRITE | perms.CONSISTENT_READ, perms.ALL & ~perms.WRITE


class Overlay(PassThrough):
    """A format node over `file` with a `backing`."""

    name: ClassVar[str] = "overlay"
    is_filter: ClassVar[bool] = False

    async def open(self) -> int:
        return SIZE


class Selector(PassThrough):
    """Writes through the selected one of two children only (as in QEMU's graph test)."""

    name: ClassVar[str] = "selector"
    is_filter: ClassVar[bool] = False

    def __init__(self) -> None:
        self.selected = "a"

    async def open(self) -> int:
        return SIZE

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        if edge.name == self.selected:
            return perms.WRITE, perms.ALL & ~perms.WRITE
        return perms.NONE, perms.ALL


class Root:
    def __init__(self, name: str = "root") -> None:
        self.name = name
        self.drains = 0
        self.quiet_edges: list[int] = []
        self.busy = asyncio.Event()
        self.busy.set()

    def describe_parent(self) -> str:
        return f"export '{self.name}'"

    def child_attached(self, edge: Child) -> None: ...

    def child_detached(self, edge: Child) -> None: ...

    def drained_begin(self) -> None:
        self.drains += 1

    def drained_end(self) -> None:
        self.drains -= 1
        self.quiet_edges.append(self.drains)

    def is_idle(self) -> bool:
        return self.busy.is_set()

    async def wait_idle(self) -> None:
        await self.busy.wait()


async def plain(graph: Graph, name: str | None = None) -> Node:
    return await graph.add(
        name, MemoryDriver(bytearray(SIZE)), read_only=False, discard_enabled=True
    )


async def over(graph: Graph, driver: Driver, **children: tuple[Node, Role]) -> Node:
    return await graph.add(None, driver, children, read_only=False, discard_enabled=True)


def writer(graph: Graph, node: Node, *, share_write: bool = True) -> Child:
    shared = perms.ALL if share_write else perms.ALL & ~perms.WRITE
    return graph.attach_root("root", Root(), node, perm=perms.WRITE, shared=shared)


def picture(graph: Graph) -> list[tuple[str, str, str, int, int]]:
    return sorted(
        (node.name, edge.parent.describe_parent(), edge.name, edge.perm, edge.shared)
        for node in graph
        for edge in node.parents
    )


async def test_a_filter_that_would_make_two_writers_is_refused_and_nothing_changes() -> None:
    """T-G1."""
    graph = Graph()
    node = await plain(graph)
    writer(graph, node)
    overlay = await over(graph, Overlay(), file=(await plain(graph), Role.DATA | Role.PRIMARY),
                         backing=(node, Role.COW))  # fmt: skip
    graph.attach_root("root", Root(), overlay, perm=perms.CONSISTENT_READ, shared=perms.ALL)
    exclusive = await over(graph, Exclusive(), file=(node, FILTERED))
    writer_beside = graph.attach_root("x", Root("beside"), exclusive.file.node,  # type: ignore
                                      perm=perms.WRITE, shared=perms.ALL)  # fmt: skip
    writer_beside.frozen = ["held here"]
    before = picture(graph)
    with pytest.raises(CommandError):
        graph.insert_filter(exclusive)
    assert picture(graph) == before


async def test_appending_leaves_the_backing_of_the_filters_own_target_alone() -> None:
    """T-G2."""
    graph = Graph()
    source = await plain(graph)
    overlay = await over(graph, Overlay(), backing=(source, Role.COW))
    edge = writer(graph, source)
    cbw = await over(graph, PassThrough(), file=(source, FILTERED), target=(overlay, Role.DATA))
    graph.insert_filter(cbw)
    assert edge.node is cbw
    assert overlay.backing is not None
    assert overlay.backing.node is source


async def test_one_filter_is_replaced_by_another_over_the_same_exclusive_writer() -> None:
    """T-G3."""
    graph = Graph()
    node = await plain(graph)
    first = await over(graph, Exclusive(), file=(node, FILTERED))
    edge = writer(graph, first)
    second = await over(graph, Exclusive(), file=(node, FILTERED))
    graph.replace(first, second)
    assert edge.node is second
    assert first.parents == []


async def test_a_switch_between_two_branches_over_one_base_works_both_ways() -> None:
    """T-G4: a depth-first update would see two writers on the base for a moment."""
    graph = Graph()
    base = await plain(graph)
    left = await over(graph, PassThrough(), file=(base, FILTERED))
    right = await over(graph, PassThrough(), file=(base, FILTERED))
    selector = Selector()
    top = await over(graph, selector, a=(left, Role.DATA), b=(right, Role.DATA))
    for selected in ("b", "a", "b"):
        selector.selected = selected
        perms.refresh([top])
        writing = [edge.parent for edge in base.parents if edge.perm & perms.WRITE]
        assert writing == [right if selected == "b" else left]


async def test_a_filter_that_wants_exclusive_writes_is_appended_but_not_attached_beside() -> None:
    """T-G5: the state between attaching and replacing would conflict."""
    graph = Graph()
    node = await plain(graph)
    edge = writer(graph, node)
    with pytest.raises(CommandError):
        await over(graph, Exclusive(always=True), file=(node, FILTERED))
    assert node.parents == [edge]
    exclusive = await over(graph, Exclusive(), file=(node, FILTERED))
    graph.insert_filter(exclusive)
    assert edge.node is exclusive
    assert [parent.parent for parent in node.parents] == [exclusive]


async def test_file_and_backing_follow_the_children() -> None:
    graph = Graph()
    low, data = await plain(graph), await plain(graph)
    overlay = await over(
        graph, Overlay(), file=(data, Role.DATA | Role.PRIMARY), backing=(low, Role.COW)
    )
    assert overlay.file is not None
    assert overlay.backing is not None
    assert overlay.file.node is data
    assert overlay.backing.node is low
    change = GraphChange()
    change.detach(overlay.backing)
    change.commit([low])
    assert overlay.backing is None
    assert low.parents == []
    change = GraphChange()
    change.attach(Child("backing", Role.COW, overlay, low, perm=0, shared=perms.ALL))
    change.undo()
    assert overlay.backing is None


@pytest.mark.parametrize("name", ["", "1x", "-a", "a b", "a" * 32, "taken"])
async def test_bad_node_names_are_refused(name: str) -> None:
    graph = Graph()
    await plain(graph, "taken")
    with pytest.raises(CommandError):
        await plain(graph, name)
    assert len(list(graph)) == 1


async def test_unknown_nodes_are_not_found() -> None:
    with pytest.raises(NotFound):
        Graph().find("nobody")


async def test_a_node_in_use_is_not_removed() -> None:
    graph = Graph()
    node = await plain(graph)
    edge = writer(graph, node)
    with pytest.raises(InUse):
        await graph.remove(node)
    graph.detach_root(edge)
    await graph.remove(node)
    assert list(graph) == []


async def test_a_cycle_is_refused() -> None:
    graph = Graph()
    low = await plain(graph)
    middle = await over(graph, PassThrough(), file=(low, FILTERED))
    top = await over(graph, PassThrough(), file=(middle, FILTERED))
    assert middle.file is not None
    change = GraphChange()
    with pytest.raises(CommandError, match="cycle"):
        change.repoint(middle.file, top)
    with pytest.raises(CommandError, match="cycle"):
        change.repoint(middle.file, middle)
    assert middle.file.node is low


async def test_a_frozen_edge_is_neither_removed_nor_repointed() -> None:
    graph = Graph()
    low = await plain(graph)
    top = await over(graph, PassThrough(), file=(low, FILTERED))
    other = await over(graph, PassThrough(), file=(low, FILTERED))
    assert top.file is not None
    top.file.frozen = ["a job needs it"]
    change = GraphChange()
    with pytest.raises(CommandError, match=f"frozen.*{top.name}.*{low.name}"):
        change.detach(top.file)
    with pytest.raises(CommandError):
        graph.insert_filter(other)
    assert top.file.node is low


async def test_a_writer_on_a_read_only_node_is_refused() -> None:
    graph = Graph()
    node = await graph.add(
        None, MemoryDriver(bytearray(SIZE)), read_only=True, discard_enabled=True
    )
    with pytest.raises(CommandError, match="read-only"):
        writer(graph, node)
    assert node.parents == []


async def test_a_driver_that_cannot_open_leaves_no_trace() -> None:
    class Broken(PassThrough):
        async def open(self) -> int:
            raise CommandError("no")

    graph = Graph()
    low = await plain(graph)
    with pytest.raises(CommandError):
        await over(graph, Broken(), file=(low, FILTERED))
    assert list(graph) == [low]
    assert low.parents == []


class Slow(MemoryDriver):
    """A driver that opens, or fails to, when it is told so."""

    def __init__(self, data: bytearray, *, fails: bool) -> None:
        super().__init__(data)
        self.may_open = asyncio.Event()
        self.fails = fails

    async def open(self) -> int:
        await self.may_open.wait()
        if self.fails:
            raise CommandError("no")
        return await super().open()


@pytest.mark.parametrize("fails", [False, True])
async def test_nobody_finds_a_node_before_it_is_open(fails: bool) -> None:
    """Else it would be exported without its size, or stay in use when it cannot be opened."""
    graph, driver = Graph(), Slow(bytearray(SIZE), fails=fails)
    opening = asyncio.ensure_future(
        graph.add("slow", driver, read_only=False, discard_enabled=True)
    )
    await asyncio.sleep(0)

    assert graph.get("slow") is None
    assert list(graph) == []
    with pytest.raises(CommandError, match="Duplicate"):
        graph.check_new_name("slow")

    driver.may_open.set()
    await asyncio.wait([opening])
    assert [node.name for node in graph] == ([] if opening.exception() else ["slow"])
    assert fails == (opening.exception() is not None)
    if fails:
        graph.check_new_name("slow")


async def test_a_node_is_removed_once() -> None:
    """Whoever comes later is told so, and touches neither what is closed nor its successor."""
    graph = Graph()
    limits = ThrottleGroups().add("g", Limits(), is_object=False)
    low = await plain(graph)
    old = await graph.add(
        "x",
        ThrottleDriver(ThrottleGroups(), limits),
        {"file": (low, FILTERED)},
        read_only=False,
        discard_enabled=True,
    )
    await graph.remove(old)
    with pytest.raises(NotFound):
        await graph.remove(old)
    new = await graph.add("x", MemoryDriver(bytearray(SIZE)), read_only=False, discard_enabled=True)
    with pytest.raises(NotFound):
        await graph.remove(old)
    assert graph.find("x") is new
    async with drained(old):
        pass


async def test_a_child_that_was_replaced_meanwhile_is_not_taken() -> None:
    graph = Graph()
    old = await graph.add("x", MemoryDriver(bytearray(SIZE)), read_only=False, discard_enabled=True)
    await graph.remove(old)
    await graph.add("x", MemoryDriver(bytearray(SIZE)), read_only=False, discard_enabled=True)
    with pytest.raises(NotFound):
        await over(graph, PassThrough(), file=(old, FILTERED))
    assert old.parents == []


async def test_a_drain_reaches_the_roots_and_waits_for_them() -> None:
    graph = Graph()
    low = await plain(graph)
    top = await over(graph, PassThrough(), file=(low, FILTERED))
    root = Root()
    graph.attach_root("root", root, top, perm=perms.CONSISTENT_READ, shared=perms.ALL)
    root.busy.clear()
    inside = asyncio.Event()

    async def section() -> None:
        async with drained(low):
            inside.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(section())
        for _ in range(5):
            await asyncio.sleep(0)
        assert root.drains == 1
        assert not inside.is_set()
        root.busy.set()
    assert inside.is_set()
    assert root.drains == 0


async def test_a_root_stays_quiet_while_it_is_moved_between_drained_nodes() -> None:
    graph = Graph()
    low = await plain(graph)
    root = Root()
    graph.attach_root("root", root, low, perm=perms.WRITE, shared=perms.ALL)
    new = await over(graph, PassThrough(), file=(low, FILTERED))
    async with drained(low, new):
        graph.insert_filter(new)
        assert root.drains > 0
        assert 0 not in root.quiet_edges
    assert root.drains == 0
