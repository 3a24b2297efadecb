"""Internal snapshots of images: QEMU's commands for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import NotFound
from nbdfleece.block import internal_snapshots
from nbdfleece.control.command import Command
from nbdfleece.control.commands.nodes import describe_snapshot
from nbdfleece.control.devices import served_disks
from nbdfleece.control.transaction import Action, ActionKind
from nbdfleece.fleece.drive import drive
from nbdfleece.protocol.qmp.schema import Integer, String, Struct

if TYPE_CHECKING:
    from nbdfleece.block.internal_snapshots import SnapshotInfo
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json


class _Create(Action):
    """Make a snapshot of a disk, or node, inside its image."""

    _node: Node
    _made: SnapshotInfo

    def nodes(self) -> list[Node]:
        """See Action.nodes."""
        node = _image_of(self.context, self.arguments.string("device"))
        return [] if node is None else [node]

    async def prepare(self) -> None:
        """See Action.prepare."""
        name = self.arguments.string("name")
        internal_snapshots.check_new(_find(self.context, self.arguments), name)
        await self.transaction.quieten(self)
        self._node = _find(self.context, self.arguments)
        self._made = await internal_snapshots.create(self._node, name)

    async def abort(self) -> None:
        """See Action.abort."""
        await internal_snapshots.delete(self._node, self._made.id, None)


async def _delete(context: Context, arguments: Arguments) -> Json:
    """Delete a snapshot inside an image, by id or name or both, and say what it was."""
    id_, name = arguments.optional_string("id"), arguments.optional_string("name")
    node = _find(context, arguments)
    return describe_snapshot(await internal_snapshots.delete(node, id_, name))


def _find(context: Context, arguments: Arguments) -> Node:
    device = arguments.string("device")
    node = _image_of(context, device)
    if node is None:
        raise NotFound(f"Cannot find device='{device}' nor node-name='{device}'")
    return node


def _image_of(context: Context, device: str) -> Node | None:
    """Return the node with the image of a served disk, or of a node, below all its filters."""
    node = context.graph.get(device)
    for export in served_disks(context):
        if export.options.id == device:
            node = drive(export) or node
    while node is not None and node.driver.is_filter and node.file is not None:
        node = node.file.node
    return node


_INFO: Final = Struct(
    {
        "id": String(),
        "name": String(),
        **dict.fromkeys(
            ("vm-state-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"), Integer()
        ),
    },
    {"icount": Integer()},
)
_NOTHING: Final = Struct()

CREATE: Final = ActionKind(
    "blockdev-snapshot-internal-sync", Struct({"device": String(), "name": String()}), _Create
)

COMMANDS: Final = (
    CREATE.command(_NOTHING),
    Command(
        "blockdev-snapshot-delete-internal-sync",
        Struct({"device": String()}, {"id": String(), "name": String()}),
        _delete,
        returns=_INFO,
    ),
)
