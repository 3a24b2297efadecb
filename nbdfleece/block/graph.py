"""Changes of the graph: who is whose child.

Every change is made as a whole on the final graph, then the permissions are checked, and on any
refusal the old graph is put back. An intermediate state may conflict where the final one does not.

Invariants
  G1  Only this module makes, re-points and removes edges.
  G2  After every public call the permissions hold everywhere (block.permissions), whether the
      call succeeded or not.
  G3  An edge that joins or leaves a drained node carries the drain to or from its parent.
  G4  There is no cycle.

Follows: QEMU block.c (bdrv_replace_node, bdrv_append, bdrv_refresh_perms).
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse, IoError, NotFound
from nbdfleece.base.limits import MAX_NODE_NAME
from nbdfleece.block import permissions
from nbdfleece.block.child import Child, Parent, Role
from nbdfleece.block.drain import flush_in_time, quiet
from nbdfleece.block.node import Node
from nbdfleece.block.throttle_group import ThrottleGroups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from nbdfleece.block.driver import Driver

_log = logging.getLogger(__name__)

_NODE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Graph:
    """All nodes by name, and the changes to them.

    Attributes:
        reopening: Held by whoever gives nodes other options (block.reopen): one at a time.
        dropping: Held by whoever removes nodes that nobody uses any more, until they are gone.
        throttle_groups: What nodes of the driver `throttle` refer to.
    """

    def __init__(self) -> None:
        self.throttle_groups = ThrottleGroups()
        self.reopening = asyncio.Lock()  # never held by requests
        self.dropping = asyncio.Lock()  # likewise
        self._nodes: dict[str, Node] = {}  # that are open
        self._opening: set[str] = set()  # names of nodes that are about to be
        self._unnamed = 0

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    def find(self, name: str) -> Node:
        """Return the node called `name`.

        Raises:
            NotFound: There is none.
        """
        node = self._nodes.get(name)
        if node is None:
            raise NotFound(f"Cannot find device='' nor node-name='{name}'")
        return node

    def get(self, name: str) -> Node | None:
        """Return the node called `name`, or None."""
        return self._nodes.get(name)

    def _check_there(self, node: Node) -> None:
        """Check that a node has not been removed; another may have its name now.

        Raises:
            NotFound: It has.
        """
        if self.find(node.name) is not node:
            raise NotFound(f"Cannot find device='' nor node-name='{node.name}'")

    def unused_name(self) -> str:
        """Return a fresh name for a node that the user did not name (as QEMU's `#block123`)."""
        self._unnamed += 1
        return f"#block{self._unnamed:03}"

    def check_new_name(self, name: str) -> None:
        """Check that a new node may be called `name`.

        Raises:
            CommandError: The name is not well-formed, too long, or taken.
        """
        if _NODE_NAME.fullmatch(name) is None:
            raise CommandError(f"Invalid node-name: '{name}'")
        if len(name) > MAX_NODE_NAME:
            raise CommandError("Node name too long")
        if name in self._nodes or name in self._opening:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")

    async def add(
        self,
        name: str | None,
        driver: Driver,
        children: Mapping[str, tuple[Node, Role]] | None = None,
        *,
        read_only: bool,
        discard_enabled: bool,
    ) -> Node:
        """Make a node over existing children and open it; until then nobody finds it.

        Args:
            name: Node name, or None for a private one.
            driver: Its behaviour, not opened yet; belongs to the node from now on.
            children: Child name -> (node, role), in the order of attachment.
            read_only: No parent may write.
            discard_enabled: Hand discards to the driver.

        Returns:
            The opened node; nobody owns it yet.

        Raises:
            CommandError: The name is bad, the permissions conflict, or the driver cannot open.
                The graph is unchanged.
        """
        if name is None:
            name = self.unused_name()
        else:
            self.check_new_name(name)
        for child, _ in (children or {}).values():
            self._check_there(child)  # it may have been removed while the caller waited
        node = Node(name, driver, read_only=read_only, discard_enabled=discard_enabled)
        self._opening.add(name)
        change = GraphChange()
        try:
            for child_name, (child, role) in (children or {}).items():
                change.attach(Child(child_name, role, node, child, perm=0, shared=permissions.ALL))
            change.commit([node])
            node.size = await driver.open()
            try:
                permissions.refresh([node])  # what the driver needs may be known only now
            except CommandError:
                await driver.close()
                raise
        except BaseException:
            change.undo()
            permissions.refresh([child for child, _ in (children or {}).values()])
            raise
        finally:
            self._opening.remove(name)
        self._nodes[name] = node
        return node

    async def remove(self, node: Node) -> None:
        """Close a node that nobody uses, and forget it, with the children made as part of it.

        Raises:
            InUse: It has parents. Nothing has changed.
            CommandError: It is gone already, or work on it does not end. Nothing has changed.
        """
        self._check_there(node)
        _check_unused(node)
        async with quiet(node):
            self._check_there(node)  # it may have been removed meanwhile
            _check_unused(node)
            del self._nodes[node.name]
            await node.driver.close()
        change = GraphChange()
        below = [edge.node for edge in node.children]
        for edge in list(node.children):
            change.detach(edge)
        change.commit(below)
        for child in below:
            await self.remove_if_left(child)

    async def remove_if_left(self, node: Node) -> None:
        """Remove a node that was made as part of its parent, when it has no parents any more."""
        if node.goes_with_parent and not node.parents and node.name in self._nodes:
            await self.remove(node)

    async def remove_made_by_monitor(self) -> None:
        """Remove whatever blockdev-add made and nobody else uses, parents first, data flushed.

        What cannot be removed is logged: it keeps nothing else in its place.
        """
        given_up: set[Node] = set()
        while left := [
            node
            for node in self
            if node.owned_by_monitor and not node.parents and node not in given_up
        ]:
            for node in left:
                try:
                    await self._remove_flushed(node)
                except CommandError as error:
                    _log.error("node %s: %s", node.name, error)
                    given_up.add(node)

    async def _remove_flushed(self, node: Node) -> None:
        """Remove a node when what was written is flushed, or cannot be.

        Raises:
            CommandError: It does not answer, or cannot be removed.
        """
        if not node.read_only:
            try:
                await flush_in_time(node)
            except IoError as error:
                _log.error("node %s: last flush failed: %s", node.name, error)
        await self.remove(node)

    async def resize(self, node: Node, size: int) -> None:
        """Make a node longer or shorter; all nodes above that have its size follow.

        Raises:
            CommandError: Somebody does not bear it, it cannot be done, or requests do not end.
                Nothing has changed.
            IoError: The file or its file system refused.

        Cancel: before it has begun.
        """
        async with quiet(node):
            self.find(node.name)  # it may have been removed meanwhile
            edge = self.attach_root(
                "root", _Resizer(), node, perm=permissions.RESIZE, shared=permissions.ALL
            )
            try:
                await truncate(node, size)
            finally:
                self.detach_root(edge)

    def attach_root(
        self, name: str, parent: Parent, node: Node, *, perm: int, shared: int
    ) -> Child:
        """Give `parent` (an export, a job) an edge to `node`.

        Raises:
            CommandError: The permissions conflict. The graph is unchanged.
        """
        edge = Child(name, Role.NONE, parent, node, perm=perm, shared=shared)
        change = GraphChange()
        change.attach(edge)
        change.commit([node])
        return edge

    def detach_root(self, edge: Child) -> None:
        """Take away an edge that `attach_root` made."""
        change = GraphChange()
        change.detach(edge)
        change.commit([edge.node])

    def insert_filter(self, filter_node: Node) -> None:
        """Put a filter above its FILTERED child: all other parents of the child now use the filter.

        Both must be drained by the caller. These edges stay where they are: those of nodes that the
        filter itself leads to (an overlay that is the filter's target keeps its backing), and
        those whose driver `stays_at_node` (an access node keeps its point in time).

        Raises:
            CommandError: Sizes differ, a frozen edge, or a conflict. The graph is unchanged.
        """
        edge = filter_node.file
        assert edge is not None, "a filter has a filtered child"
        self.replace(edge.node, filter_node)

    def remove_filter(self, filter_node: Node) -> None:
        """Take a filter out of the graph's paths: its parents now use its FILTERED child.

        Both must be drained by the caller. The filter node itself remains, without parents.

        Raises:
            InUse: A parent's driver `stays_at_node`. The graph is unchanged.
            CommandError: A frozen edge, or a conflict. The graph is unchanged.
        """
        for parent in filter_node.parents:
            if _stays_at_node(parent):
                raise InUse(
                    f"Node '{filter_node.name}' is busy: {parent.parent.describe_parent()} uses it"
                )
        edge = filter_node.file
        assert edge is not None, "a filter has a filtered child"
        self.replace(filter_node, edge.node)

    def replace(self, old: Node, new: Node) -> None:
        """Re-point the parents of `old` to `new`, except those that stay (see `insert_filter`).

        Both must be drained by the caller.

        Raises:
            CommandError: Sizes differ, a frozen edge, or a conflict. The graph is unchanged.
        """
        if old.size != new.size:
            raise CommandError(
                f"Nodes '{old.name}' and '{new.name}' have different sizes "
                f"({old.size} and {new.size} bytes)"
            )
        change = GraphChange()
        try:
            for edge in _edges_to_move(old, new):
                change.repoint(edge, new)
            change.commit([old, new])
        except CommandError:
            change.undo()
            raise

    def append(self, overlay: Node, node: Node) -> GraphChange:
        """Put `node` behind `overlay`, and have all parents of `node` use the overlay.

        Both must be drained by the caller. Edges that stay: see `insert_filter`.

        Returns:
            The change, for `take_back`.

        Raises:
            CommandError: A cycle, a frozen edge, or a conflict. The graph is unchanged.
        """
        change = GraphChange()
        try:
            moving = _edges_to_move(node, overlay)
            edge = Child("backing", Role.COW, overlay, node, perm=0, shared=permissions.ALL)
            change.attach(edge)
            for moved in moving:
                change.repoint(moved, overlay)
            change.commit([node, overlay])
        except CommandError:
            change.undo()
            raise
        return change

    def take_back(self, change: GraphChange, nodes: Sequence[Node]) -> None:
        """Undo a change that was committed; `nodes` are still drained, as they were for it.

        Raises:
            CommandError: Somebody outside the program has taken a permission meanwhile.
        """
        change.undo()
        permissions.refresh(nodes)


class _Resizer:
    """Who holds a node while it is resized."""

    def describe_parent(self) -> str:
        return "an unnamed block device"

    def child_attached(self, edge: Child) -> None: ...

    def child_detached(self, edge: Child) -> None: ...

    def drained_begin(self) -> None: ...

    def drained_end(self) -> None: ...

    def is_idle(self) -> bool:
        return True

    async def wait_idle(self) -> None: ...


def above(*nodes: Node) -> list[Node]:
    """Return the nodes and all nodes above them, children before parents."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.parents:
            if isinstance(edge.parent, Node):
                visit(edge.parent)
        order.append(node)

    for node in nodes:
        visit(node)
    order.reverse()
    return order


async def truncate(node: Node, size: int) -> None:
    """Make a node longer or shorter, and all above that have its size; RESIZE is the caller's.

    Raises:
        CommandError: It cannot be done. Nothing has changed.
        IoError: The file or its file system refused.
    """
    check_bitmaps_idle(above(node))
    await node.truncate(size)
    for upper in above(node):
        if upper.size != upper.driver.size_now():
            upper.resized(upper.driver.size_now())


def check_bitmaps_idle(nodes: Iterable[Node]) -> None:
    """Check that no bitmap of the nodes is busy, so that they may be resized.

    Raises:
        InUse: One is.
    """
    for node in nodes:
        for bitmap in node.bitmaps.values():
            if bitmap.busy:
                raise InUse(
                    f"Bitmap '{bitmap.name}' of node '{node.name}' is currently in use by another "
                    "operation and cannot be used"
                )


class GraphChange:
    """Edge changes that are done together: made at once, checked at `commit`, or all undone.

    `commit` undoes everything itself when the permissions conflict.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def attach(self, edge: Child) -> None:
        """Add a new edge.

        Raises:
            CommandError: It would close a cycle.
        """
        if isinstance(edge.parent, Node) and edge.parent in permissions.topological([edge.node]):
            raise _cycle(edge.node, edge.name, edge.parent)
        _link(edge)
        self._undo.append(lambda: _unlink(edge))

    def detach(self, edge: Child) -> None:
        """Remove an edge.

        Raises:
            CommandError: It is frozen.
        """
        _check_not_frozen(edge)
        _unlink(edge)
        self._undo.append(lambda: _link(edge))

    def repoint(self, edge: Child, node: Node) -> None:
        """Make an edge lead to another node.

        Raises:
            CommandError: It is frozen, or the result has a cycle.
        """
        self.repoint_all([(edge, node)])

    def repoint_all(self, moves: Iterable[tuple[Child, Node]]) -> None:
        """Make edges lead to other nodes, all at once: only the graph at the end may have no cycle.

        Raises:
            CommandError: One is frozen, or the result has a cycle. None has changed.
        """
        moves = list(moves)
        for edge, _ in moves:
            _check_not_frozen(edge)
        _check_no_cycle(dict(moves))
        back = [(edge, edge.node) for edge, _ in moves]
        _lead_to(moves)
        self._undo.append(lambda: _lead_to(back))

    def set_role(self, edge: Child, role: Role) -> None:
        """Change what an edge is for; PRIMARY and COW stay as they are."""
        old = edge.role
        assert not (old ^ role) & (Role.PRIMARY | Role.COW), "the child would become another one"
        edge.role = role

        def put_back() -> None:
            edge.role = old

        self._undo.append(put_back)

    def unguard(self, edge: Child) -> None:
        """Let everybody look through an edge that leads elsewhere now."""
        old, edge.guard = edge.guard, None

        def put_back() -> None:
            edge.guard = old

        self._undo.append(put_back)

    def commit(self, nodes: Iterable[Node]) -> None:
        """Check the permissions of the final graph and keep the change.

        Args:
            nodes: Those whose parents or permissions may have changed.

        Raises:
            CommandError: They conflict. The graph is as it was before the first change.
        """
        nodes = list(nodes)
        try:
            permissions.refresh(nodes)
        except CommandError:
            self.undo()
            raise

    def undo(self) -> None:
        """Put back every edge, latest change first, with the permissions that went with it."""
        while self._undo:
            self._undo.pop()()


def _lead_to(moves: Sequence[tuple[Child, Node]]) -> None:
    # One drain more in between, so that a parent between two drained nodes stays quiet.
    for edge, _ in moves:
        edge.parent.drained_begin()
    for edge, _ in moves:
        _unlink(edge)
    for edge, node in moves:
        edge.node = node
        _link(edge)
    for edge, _ in moves:
        edge.parent.drained_end()


def _check_no_cycle(moves: dict[Child, Node]) -> None:
    """Check that edges may lead elsewhere.

    Raises:
        CommandError: One of them would be on a cycle.
    """

    def reaches(node: Node, wanted: Parent, seen: set[Node]) -> bool:
        if node is wanted:
            return True
        if node in seen:
            return False
        seen.add(node)
        return any(reaches(moves.get(edge, edge.node), wanted, seen) for edge in node.children)

    for edge, node in reversed(moves.items()):
        if isinstance(edge.parent, Node) and reaches(node, edge.parent, set()):
            raise _cycle(node, edge.name, edge.parent)


def _cycle(node: Node, name: str, parent: Node) -> CommandError:
    return CommandError(
        f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle"
    )


def _link(edge: Child) -> None:
    edge.node.parents.append(edge)
    edge.parent.child_attached(edge)
    if edge.node.is_drained:
        edge.parent.drained_begin()


def _unlink(edge: Child) -> None:
    if edge.node.is_drained:
        edge.parent.drained_end()
    edge.parent.child_detached(edge)
    edge.node.parents.remove(edge)


def _check_unused(node: Node) -> None:
    if node.parents:
        user = node.parents[0].parent.describe_parent()
        raise InUse(f"Node '{node.name}' is busy: {user} uses it")


def check_not_backing(node: Node) -> None:
    """Check that the node is behind no overlay, which counts on what it is.

    Raises:
        InUse: It is.
    """
    for edge in node.parents:
        if edge.role & Role.COW and isinstance(edge.parent, Node):
            raise InUse(
                f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'"
            )


def _edges_to_move(old: Node, new: Node) -> list[Child]:
    """Return the edges of `old` that are to lead to `new` when that takes its place."""
    below_new = set(permissions.topological([new]))
    return [
        edge for edge in old.parents if edge.parent not in below_new and not _stays_at_node(edge)
    ]


def _stays_at_node(edge: Child) -> bool:
    return edge.stays or (isinstance(edge.parent, Node) and edge.parent.driver.stays_at_node)


def _check_not_frozen(edge: Child) -> None:
    if edge.frozen:
        raise CommandError(
            f"Cannot change frozen '{edge.name}' link from {edge.parent.describe_parent()} "
            f"to '{edge.node.name}': {edge.frozen[0]}"
        )
