"""The command `transaction`, and which actions there are: a new one is a line of ACTIONS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.control.command import Command
from nbdfleece.control.commands import (
    bitmaps,
    fleece,
    internal_snapshots,
    jobs,
    nodes,
    overlays,
)
from nbdfleece.control.transaction import Action, ActionKind, Transaction
from nbdfleece.protocol.qmp.schema import Arguments, Array, Enum, Struct, Union

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.control.transaction import Asked
    from nbdfleece.protocol.qmp.values import Json


class _Abort(Action):
    """Refuse the transaction, to see how all else is undone."""

    async def prepare(self) -> None:
        """See Action.prepare.

        Raises:
            CommandError: Always.
        """
        raise CommandError("Transaction aborted using Abort action")


_NOTHING: Final = Struct()

ACTIONS: Final = {
    kind.name: kind
    for kind in (
        ActionKind("abort", _NOTHING, _Abort, can_be_grouped=True),
        fleece.SNAPSHOT_CREATE,
        jobs.BACKUP,
        nodes.ADD,
        *overlays.ACTIONS,
        internal_snapshots.CREATE,
        *bitmaps.ACTIONS,
    )
}


async def _transaction(context: Context, arguments: Arguments) -> Json:
    """Carry out actions in order, at one instant: all of them, or none when one is refused."""
    properties = arguments.members.get("properties", {})
    assert isinstance(properties, Mapping), "as declared"
    transaction = Transaction(context, grouped=properties.get("completion-mode") == "grouped")
    await transaction.run([_asked(action) for action in _objects(arguments.members["actions"])])
    return {}


def _objects(value: Json) -> list[Mapping[str, Json]]:
    assert isinstance(value, Sequence), "as declared"
    return [item for item in value if isinstance(item, Mapping)]


def _asked(action: Mapping[str, Json]) -> Asked:
    kind, data = ACTIONS[str(action["type"])], action["data"]
    assert isinstance(data, Mapping), "as declared"
    return kind, Arguments(kind.arguments, data)


_ACTION: Final = Union(
    "type",
    Struct(),
    {name: Struct({"data": kind.arguments}) for name, kind in sorted(ACTIONS.items())},
)
_PROPERTIES: Final = Struct(optional={"completion-mode": Enum(("individual", "grouped"))})

COMMANDS: Final = (
    Command(
        "transaction",
        Struct({"actions": Array(_ACTION)}, {"properties": _PROPERTIES}),
        _transaction,
        returns=_NOTHING,
    ),
)
