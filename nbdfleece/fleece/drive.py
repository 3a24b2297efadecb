"""Another node under a live export: what a program written for QEMU does by `qom-set` of `drive`.

::

    export -> [I/O limits] -> old node          export -> [I/O limits] -> new node

The clients stay connected and notice nothing: it happens in a drained section, and the sizes are
the same. That the new node has the same content is up to who asks, as it is when a medium is
changed; that no filter of a snapshot or a backup is left out is up to the permissions: such a
filter bears no writer beside itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, InUse
from nbdfleece.block.drain import quiet
from nbdfleece.block.graph import GraphChange
from nbdfleece.fleece.io_limits import below_limit

if TYPE_CHECKING:
    from nbdfleece.block.child import Child
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.server.export import Export


def drive(export: Export) -> Node | None:
    """Return the node below the export and its I/O limits; None: the export is on its way out."""
    if export.root is None or export.is_closing:
        return None
    return below_limit(export.node)


async def set_drive(graph: Graph, export: Export, node: Node) -> None:
    """Put `node` under an export, below the export's I/O limits.

    Raises:
        CommandError: Another size, a conflict of permissions, or requests that do not end. Nothing
            has changed.

    Cancel: undone.
    """
    old = _edge(export).node
    if old is node:
        return
    async with quiet(old, node):
        graph.find(node.name)  # it may have been removed meanwhile
        edge = _edge(export)
        if edge.node is not old:
            raise InUse(f"export '{export.options.id}' has just been changed by somebody else")
        if old.size != node.size:
            raise CommandError(
                f"Nodes '{old.name}' and '{node.name}' have different sizes "
                f"({old.size} and {node.size} bytes)"
            )
        change = GraphChange()
        change.repoint(edge, node)
        change.commit([old, node])
    await graph.remove_if_left(old)


def _edge(export: Export) -> Child:
    top = drive(export)
    if top is None or export.root is None:
        raise CommandError(f"export '{export.options.id}' is being removed")
    edge = export.root
    while edge.node is not top:
        assert edge.node.file is not None, "a filter of I/O limits"
        edge = edge.node.file
    return edge
