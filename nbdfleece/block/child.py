"""Edges of the graph: a child as its parent sees it, a parent as its child sees it.

An edge belongs to one parent (a node, an export, a job) and leads to one node. Only
`block.graph` makes, re-points and removes edges; only `block.permissions` sets `perm` and
`shared`, except that a parent outside the graph states its own when the edge is made.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.block.node import Node


class Role(enum.Flag):
    """What a parent uses a child for (several may hold).

    At most one child of a node is PRIMARY; at most one is FILTERED or COW; COW is never PRIMARY; a
    filter's FILTERED child is also PRIMARY.
    """

    NONE = 0
    DATA = enum.auto()  # guest data
    METADATA = enum.auto()  # the format's own tables
    FILTERED = enum.auto()  # reads through the parent give the child's data
    COW = enum.auto()  # what is not in the parent is read here (`backing`)
    PRIMARY = enum.auto()  # "the" child


class Parent(Protocol):
    """What whoever holds an edge must be able to do."""

    def describe_parent(self) -> str:
        """Return how to call the parent in an error: `node 'x'`, `export 'y'`."""

    def child_attached(self, edge: Child) -> None:
        """Learn that `edge` now exists and leads to `edge.node`."""

    def child_detached(self, edge: Child) -> None:
        """Learn that `edge` is gone, or is about to lead elsewhere."""

    def drained_begin(self) -> None:
        """Begin no new requests until the matching `drained_end`; nests."""

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""

    def is_idle(self) -> bool:
        """Tell whether no request of this parent is running."""

    async def wait_idle(self) -> None:
        """Return when `is_idle` has been true.

        Cancel: safe.
        """


class Child:
    """One edge: `parent` uses `node` under the name `name`.

    Attributes:
        name: `file`, `backing`, `target`, `root`, ...
        role: What for.
        parent: Who holds the edge.
        node: Where it leads.
        perm: What the parent does to the node (bits of block.permissions).
        shared: What it bears other parents doing.
        frozen: Why the edge may not be re-pointed now: reasons, of which any is enough.
        stays: The edge is left alone when a filter is put above the node (that of a job).
        guard: Asked behind each look through the edge (offset, length) whether what was seen may be
            given away; it raises IoError when not. See block.fleeced_backing.
    """

    __slots__ = ("frozen", "guard", "name", "node", "parent", "perm", "role", "shared", "stays")

    def __init__(
        self, name: str, role: Role, parent: Parent, node: Node, *, perm: int, shared: int
    ) -> None:
        self.name = name
        self.role = role
        self.parent = parent
        self.node = node
        self.perm = perm
        self.shared = shared
        self.frozen: list[str] = []
        self.stays = False
        self.guard: Callable[[int, int], None] | None = None

    def describe(self) -> str:
        """Return how to call this use of the node in an error."""
        return (
            f"{self.parent.describe_parent()} (uses node '{self.node.name}' as '{self.name}' child)"
        )
