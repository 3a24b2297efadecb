"""All commands, by name. A module of commands is a table with the functions that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.control.command import Command
from nbdfleece.control.commands import (
    backup,
    bitmaps,
    exports,
    fleece,
    general,
    internal_snapshots,
    jobs,
    nodes,
    objects,
    overlays,
    qom,
    throttle,
    transaction,
)
from nbdfleece.control.event_table import EVENTS
from nbdfleece.protocol.qmp.introspect import Introspection
from nbdfleece.protocol.qmp.schema import Array, String, Struct

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json


async def _query_commands(_context: Context, _arguments: Arguments) -> Json:
    """List the names of all commands."""
    return [{"name": name} for name in sorted(COMMANDS)]


async def _query_schema(_context: Context, _arguments: Arguments) -> Json:
    """Describe all commands, their arguments, and all events."""
    described = Introspection()
    for command in COMMANDS.values():
        described.add_command(command.name, command.arguments, command.returns, command.features)
    for name, data in EVENTS.items():
        described.add_event(name, data)
    return described.entries


_LIST: Final = Array(Struct({"name": String()}))
_TABLES: Final = (
    general.COMMANDS,
    fleece.COMMANDS,
    backup.COMMANDS,
    jobs.COMMANDS,
    bitmaps.COMMANDS,
    exports.COMMANDS,
    nodes.COMMANDS,
    overlays.COMMANDS,
    internal_snapshots.COMMANDS,
    objects.COMMANDS,
    qom.COMMANDS,
    throttle.COMMANDS,
    transaction.COMMANDS,
    (
        Command("query-commands", general.NOTHING, _query_commands, returns=_LIST),
        Command("query-qmp-schema", general.NOTHING, _query_schema),
    ),
)

COMMANDS: Final = {command.name: command for table in _TABLES for command in table}
