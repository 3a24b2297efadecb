"""Permissions of edges: what a parent does to a node, and what it bears others doing.

Invariant, over the whole graph and after every change: no parent of a node holds a permission
that another parent of the same node does not share. `refresh` is the only writer of the `perm` and
`shared` fields of edges: it computes the final graph in topological order (parents before
children; a depth-first walk would meet states that never exist and report false conflicts),
checks it whole, and leaves everything as it was when anything conflicts.

Follows: QEMU docs/devel and include/block/block-common.h (BLK_PERM_*); names as in QMP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbdfleece.block.child import Child
    from nbdfleece.block.node import Node

CONSISTENT_READ: Final = 1  # reads must give what was written last
WRITE: Final = 2
WRITE_UNCHANGED: Final = 4  # rewrites that do not change what is read
RESIZE: Final = 8
NONE: Final = 0
ALL: Final = 15

NAMES: Final = {
    CONSISTENT_READ: "consistent-read",
    WRITE: "write",
    WRITE_UNCHANGED: "write-unchanged",
    RESIZE: "resize",
}


def names(permissions: int) -> list[str]:
    """Return the QMP names of the permission bits."""
    return [name for bit, name in NAMES.items() if permissions & bit]


def topological(nodes: Iterable[Node]) -> list[Node]:
    """Return `nodes` and all below them, every node behind all of its parents in that set."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for child in node.children:
            visit(child.node)
        order.append(node)

    for node in nodes:
        visit(node)
    order.reverse()
    return order


def cumulative(node: Node) -> tuple[int, int]:
    """Return (what all parents of `node` need, what all of them share)."""
    perm, shared = NONE, ALL
    for edge in node.parents:
        perm |= edge.perm
        shared &= edge.shared
    return perm, shared


def refresh(nodes: Iterable[Node], check: Callable[[], None] | None = None) -> None:
    """Recompute the permissions of all edges below `nodes`.

    Args:
        nodes: The nodes whose parents have changed or were given other permissions.
        check: Called when the edges have their new permissions; may refuse them by a CommandError.

    Raises:
        CommandError: Two parents of a node conflict, a read-only node would be written, or a
            driver cannot get the permission from outside (image locks). Nothing has changed.
    """
    order = topological(nodes)
    before: list[tuple[Child, int, int]] = []
    checked: list[Node] = []
    try:
        for node in order:
            perm, shared = cumulative(node)
            _check_conflicts(node, perm)
            checked.append(node)
            node.driver.check_permissions(perm, shared)
            for edge in node.children:
                before.append((edge, edge.perm, edge.shared))
                edge.perm, edge.shared = node.driver.child_permissions(edge, perm, shared)
        if check is not None:
            check()
    except CommandError:
        for edge, perm, shared in reversed(before):
            edge.perm, edge.shared = perm, shared
        for node in checked:
            node.driver.abort_permissions()
        raise
    for node in order:
        node.driver.set_permissions(*cumulative(node))


class ReadOnlyNode(CommandError):
    """Somebody would write a node that is read-only."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"Block node '{node.name}' is read-only")
        self.node = node


def conflict(node: Node, denied: int, needing: str, refusing: Child) -> CommandError:
    """Return the error for permissions on `node` that one needs and another does not share."""
    return CommandError(
        f"Permission conflict on node '{node.name}': permissions '{', '.join(names(denied))}' "
        f"are both required by {needing} and unshared by {refusing.describe()}."
    )


def _check_conflicts(node: Node, perm: int) -> None:
    if perm & (WRITE | WRITE_UNCHANGED) and node.read_only:
        raise ReadOnlyNode(node)
    for needing in node.parents:
        for refusing in node.parents:
            denied = needing.perm & ~refusing.shared
            if denied and needing is not refusing:
                raise conflict(node, denied, needing.describe(), refusing)
