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

import re
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse, NotFound
from nbdfleece.base.limits import MAX_NODE_NAME
from nbdfleece.block import permissions
from nbdfleece.block.child import Child, Parent, Role
from nbdfleece.block.drain import drained
from nbdfleece.block.node import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nbdfleece.block.driver import Driver

_NODE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Graph:
    """All nodes by name, and the changes to them."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
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
            raise CommandError(f"Node name '{name}' is longer than {MAX_NODE_NAME} characters")
        if name in self._nodes:
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
        """Make a node over existing children and open it.

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
        node = Node(name, driver, read_only=read_only, discard_enabled=discard_enabled)
        self._nodes[name] = node
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
            del self._nodes[name]
            permissions.refresh([child for child, _ in (children or {}).values()])
            raise
        return node

    async def remove(self, node: Node) -> None:
        """Close a node that nobody uses, and forget it.

        Raises:
            InUse: It has parents. Nothing has changed.
        """
        if node.parents:
            raise InUse(f"Node '{node.name}' is busy: {node.parents[0].describe()} uses it")
        async with drained(node):
            if node.parents:
                raise InUse(f"Node '{node.name}' is busy: {node.parents[0].describe()} uses it")
            del self._nodes[node.name]
            await node.driver.close()
        change = GraphChange()
        below = [edge.node for edge in node.children]
        for edge in list(node.children):
            change.detach(edge)
        change.commit(below)

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
                raise InUse(f"Node '{filter_node.name}' is busy: {parent.describe()} uses it")
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
        below_new = set(permissions.topological([new]))
        change = GraphChange()
        try:
            for edge in list(old.parents):
                if edge.parent in below_new or _stays_at_node(edge):
                    continue
                change.repoint(edge, new)
            change.commit([old, new])
        except CommandError:
            change.undo()
            raise


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
            raise CommandError(
                f"Making '{edge.node.name}' a child of '{edge.parent.name}' would create a cycle"
            )
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
        _check_not_frozen(edge)
        old = edge.node
        if isinstance(edge.parent, Node) and edge.parent in permissions.topological([node]):
            raise CommandError(
                f"Making '{node.name}' a child of '{edge.parent.name}' would create a cycle"
            )

        def lead_to(target: Node) -> None:
            # One drain more in between, so that a parent between two drained nodes stays quiet.
            edge.parent.drained_begin()
            _unlink(edge)
            edge.node = target
            _link(edge)
            edge.parent.drained_end()

        lead_to(node)
        self._undo.append(lambda: lead_to(old))

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


def _stays_at_node(edge: Child) -> bool:
    return isinstance(edge.parent, Node) and edge.parent.driver.stays_at_node


def _check_not_frozen(edge: Child) -> None:
    if edge.frozen is not None:
        raise CommandError(
            f"Cannot change frozen '{edge.name}' link from {edge.parent.describe_parent()} "
            f"to '{edge.node.name}': {edge.frozen}"
        )
