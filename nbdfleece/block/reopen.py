"""Other options for nodes that are open (blockdev-reopen): several nodes, all or nothing.

::

    options --parse--> specs --plan--> changes --prepare--> --apply--> --finish-->
              ^ nothing is touched ^     files    all at once,   what is not in
                                         opened   or undone      force is closed

Invariants
  O1  `_plan` reads the graph and changes nothing. It runs again behind every await, so that what is
      applied fits the graph as it is then.
  O2  From the first edge that moves to the last check nothing is awaited: nobody sees a graph in
      between, and a refusal puts everything back.
  O3  The size of a node changes only if everybody above bears that; what a node stands on that is
      under a point in time keeps its content: else the point in time would change.

What the options mean: an option that is left out goes back to its default; one that the driver
cannot change must have its old value. A child is a name (the child is that node, as it is), or
nested options (the child stays, and gets these), if it was made as a part of its parent. `backing`
may be null (there is none from now on), and may be a name where there was none.

Follows: QEMU block.c (bdrv_reopen_multiple, bdrv_reopen_parse_file_or_backing).
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block import permissions
from nbdfleece.block.child import Child, Role
from nbdfleece.block.drain import flush_in_time, quiet
from nbdfleece.block.driver import Reopening
from nbdfleece.block.graph import GraphChange, above, check_bitmaps_idle
from nbdfleece.block.registry import NodeSpec, parse_node_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one node.

    Attributes:
        node: Which.
        spec: Its options from now on.
        moves: Its edges that lead to other nodes then.
        gone: Its edges that are no more then.
        new: Names of children that it has then, and has not now, with their nodes.
    """

    node: Node
    spec: NodeSpec
    moves: Mapping[Child, Node]
    gone: Sequence[Child]
    new: Mapping[str, Node]

    @property
    def to(self) -> Reopening:
        """The same, as the driver is told it."""
        return Reopening(self.spec.read_only, self.spec.direct, self.spec.driver_options)


async def reopen(graph: Graph, options: Sequence[Mapping[str, object]]) -> None:
    """Give nodes other options.

    Args:
        graph: The nodes.
        options: For each node, as blockdev-add has them. Of two for one node the later counts.

    Raises:
        CommandError: It cannot be. Nothing has changed.

    Cancel: undone before the change, of no effect behind it.
    """
    specs = [parse_node_options(entry, f"options[{index}].") for index, entry in enumerate(options)]
    async with graph.reopening:
        await _reopen(graph, specs)


async def _reopen(graph: Graph, specs: Sequence[NodeSpec]) -> None:
    nodes = _nodes(_plan(graph, specs))
    if not nodes:
        return
    for node in nodes:
        await _flush(node)  # beside the guests; what is left to the drained section is short
    async with quiet(*nodes), AsyncExitStack() as prepared:
        changes = _plan(graph, specs)
        for change in changes:
            await _prepare(change)
            prepared.push_async_callback(change.node.driver.reopen_finish)
        reopened = [change.node for change in changes]
        changes = _plan(graph, specs)
        if reopened != [change.node for change in changes] or not _nodes(changes) <= nodes:
            raise CommandError("the nodes have been changed by somebody else meanwhile")
        left = [edge.node for change in changes for edge in (*change.moves, *change.gone)]
        _apply(changes)
    for node in left:
        await graph.remove_if_left(node)


def _nodes(changes: Sequence[_Change]) -> set[Node]:
    """Return the nodes that have to be quiet."""
    found = {change.node for change in changes}
    for change in changes:
        for edge, node in change.moves.items():
            found |= {edge.node, node}
        found |= {edge.node for edge in change.gone} | set(change.new.values())
    return found


# --- planning (O1) -----------------------------------------------------------------------------


def _plan(graph: Graph, specs: Sequence[NodeSpec]) -> list[_Change]:
    """Find what is to change.

    Raises:
        CommandError: A node is not there, or an option cannot be changed.
    """
    found: dict[Node, _Change] = {}
    for spec in specs:
        if spec.node_name is None:
            raise CommandError("node-name not specified")
        node = graph.get(spec.node_name)
        if node is None:
            raise CommandError(f"Failed to find node with node-name='{spec.node_name}'")
        _plan_node(graph, node, spec, found)
    return list(found.values())


def _plan_node(graph: Graph, node: Node, spec: NodeSpec, found: dict[Node, _Change]) -> None:
    _check_options(node, spec)
    found.pop(node, None)
    has_backing = node.backing is not None or bool(node.driver.backing_file())
    if has_backing and "backing" not in spec.children:
        raise CommandError(f"backing is missing for '{node.name}'")
    moves: dict[Child, Node] = {}
    gone: list[Child] = []
    new: dict[str, Node] = {}
    for name, child in spec.children.items():
        edge = node.find_child(name)
        if edge is None:
            if isinstance(child, str):
                new[name] = graph.find(child)
            elif child is not None:
                raise CommandError(f"Cannot change the option '{name}.driver'")
        elif child is None:
            _check_may_move(node, edge)
            gone.append(edge)
        elif isinstance(child, str):
            wanted = graph.find(child)
            if wanted is not edge.node and wanted is not _looked_through(edge.node):
                _check_may_move(node, edge)
                _check_same_image(edge, wanted)
                moves[edge] = wanted
        elif edge.node.goes_with_parent:
            if child.node_name not in (None, edge.node.name):
                raise CommandError("Cannot change the option 'node-name'")
            _plan_node(graph, edge.node, child, found)
        else:
            # What the child is called by was a name: it has options of its own.
            raise CommandError(f"Cannot change the option '{name}.driver'")
    found[node] = _Change(node, spec, moves, gone, new)


def _check_options(node: Node, spec: NodeSpec) -> None:
    """Check that the driver can have these options from now on.

    Raises:
        CommandError: It cannot.
    """
    before = node.spec
    if before is None:
        raise CommandError(f"Node '{node.name}' was not made by blockdev-add")
    for name in sorted(before.given - spec.given - node.driver.changeable):
        if before.driver != spec.driver or before.driver_options.get(
            name
        ) != spec.driver_options.get(name):
            raise CommandError(f"Option '{name}' cannot be reset to its default value")
    if before.driver != spec.driver:
        raise CommandError("Cannot change the option 'driver'")
    if not node.driver.can_reopen:
        raise CommandError(
            f"Block format '{spec.driver}' used by node '{node.name}' "
            "does not support reopening files"
        )
    for name in sorted(spec.given - node.driver.changeable):
        if before.driver_options.get(name) != spec.driver_options.get(name):
            raise CommandError(f"Cannot change the option '{name}'")


def _looked_through(node: Node) -> Node:
    """Return the node under the filters that the user did not ask for."""
    while node.is_implicit and node.file is not None:
        node = node.file.node
    return node


def _check_may_move(parent: Node, edge: Child) -> None:
    """Check that an edge may lead elsewhere, as far as the two at its ends are concerned.

    Raises:
        CommandError: The driver cannot have another child, or the present one is a filter that the
            user did not ask for.
    """
    if edge.name not in parent.driver.repointable:
        raise CommandError(f"Cannot change the option '{edge.name}'")
    if edge.node.is_implicit:
        raise CommandError(f"Cannot replace implicit {edge.name} child of {parent.name}")


def _check_same_image(edge: Child, wanted: Node) -> None:
    """Check that a format keeps its image, of which much is in memory; filters may come and go.

    Raises:
        CommandError: It would not.
    """
    if edge.role & Role.METADATA and _unfiltered(wanted) is not _unfiltered(edge.node):
        raise CommandError(f"Cannot change the option '{edge.name}': it is another image")


def _unfiltered(node: Node) -> Node:
    while node.file is not None and node.file.role & Role.FILTERED:
        node = node.file.node
    return node


# --- preparing, applying -----------------------------------------------------------------------


async def _prepare(change: _Change) -> None:
    """Do what may take time or fail: write out what is unwritten, open files.

    Raises:
        CommandError: It failed. Nothing has changed.
    """
    await _flush(change.node)
    await change.node.driver.reopen_prepare(change.to)


async def _flush(node: Node) -> None:
    if node.read_only:
        return
    try:
        await flush_in_time(node)
    except IoError as error:
        raise CommandError(f"Error flushing drive: {error}") from error


def _apply(changes: Sequence[_Change]) -> None:
    """Make the changes, all of them or none (O2).

    Raises:
        CommandError: The graph at the end cannot be.
    """
    touched = list(_nodes(changes))
    affected = above(*touched)
    before = [(change.node, change.node.spec) for change in changes]
    sizes = [(node, node.size) for node in affected]
    content = _preserved(affected)
    edges = GraphChange()
    applied: list[Node] = []
    try:
        _change_edges(edges, changes)
        for change in changes:
            # What an image's children are for, the image has said when it was opened.
            roles = {} if change.spec.implied else change.spec.roles
            for name, role in roles.items():
                if change.node.child(name).role != role:
                    edges.set_role(change.node.child(name), role)
            change.node.driver.reopen_apply(change.to)
            applied.append(change.node)
            _set_spec(change.node, change.spec)
        for node in above(*touched):
            node.size = node.driver.size_now()
        resized = [node for node, size in sizes if node.size != size]
        _check_preserved(content)
        permissions.refresh(touched, partial(_check_may_resize, resized))
    except CommandError as error:
        for node in applied:
            node.driver.reopen_undo()
        for node, spec in before:
            assert spec is not None, "planned with its options"
            _set_spec(node, spec)
        for node, size in sizes:
            node.size = size
        edges.undo()
        raise _worded(error) from error
    for node in resized:
        node.resized(node.size)


def _change_edges(edges: GraphChange, changes: Sequence[_Change]) -> None:
    """Make all edges what they are to be. Only the graph at the end may have no cycle.

    Raises:
        CommandError: It has one, or an edge is frozen.
    """
    for change in changes:
        for edge in change.gone:
            edges.detach(edge)
    edges.repoint_all([move for change in changes for move in change.moves.items()])
    for change in changes:
        for edge in change.moves:
            edges.unguard(edge)
    for change in changes:
        for name, node in change.new.items():
            role = change.spec.roles[name]
            edges.attach(Child(name, role, change.node, node, perm=0, shared=permissions.ALL))


def _set_spec(node: Node, spec: NodeSpec) -> None:
    node.spec, node.read_only, node.discard_enabled = spec, spec.read_only, spec.discard


def _check_may_resize(nodes: Sequence[Node]) -> None:
    """Check that nodes may have another size than before.

    Raises:
        CommandError: A parent, or the user of a bitmap, does not bear it.
    """
    for node in nodes:
        below = _unfiltered(node)
        for edge in node.parents:
            if edge.role & Role.METADATA and below is not node and below.size == node.size:
                continue  # a filter that was put below a format: it had not seen its file grow
            if not edge.shared & permissions.RESIZE:
                needing = f"the new options of node '{node.name}'"
                raise permissions.conflict(node, permissions.RESIZE, needing, edge)
    check_bitmaps_idle(nodes)


def _worded(error: CommandError) -> CommandError:
    """Return the error as QEMU says it of a node that was to become read-only."""
    if isinstance(error, permissions.ReadOnlyNode) and not error.node.read_only:
        return CommandError(
            f"Read-only block node '{error.node.name}' cannot support read-write users"
        )
    return error


# --- points in time (O3) -------------------------------------------------------------------------


def _preserved(nodes: Sequence[Node]) -> dict[Child, object]:
    """Return what every point in time in use stands on."""
    return {
        edge: _content(edge.node)
        for node in nodes
        if node.driver.has_point_in_time() and node.parents
        for edge in node.children
    }


def _check_preserved(before: Mapping[Child, object]) -> None:
    """Check that every point in time still stands on the same.

    Raises:
        CommandError: One does not.
    """
    for edge, content in before.items():
        if _content(edge.node) != content:
            raise CommandError(
                f"Cannot change what is behind the '{edge.name}' child of "
                f"{edge.parent.describe_parent()}: it preserves a point in time"
            )


def _content(node: Node) -> object:
    """Return a value that tells whether two nodes have the same content, filters left out."""
    node = _unfiltered(node)
    options = {} if node.spec is None else node.spec.driver_options
    window = [(name, options.get(name)) for name in sorted(node.driver.changeable)]
    return node, window, [(edge.name, _content(edge.node)) for edge in node.children]
