"""All commands, by name. A module of commands is a table with the functions that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.control.command import Command
from nbdfleece.control.commands import fleece, general

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json


async def _query_commands(_context: Context, _arguments: Arguments) -> Json:
    return [{"name": name} for name in sorted(COMMANDS)]


_TABLES: Final = (
    general.COMMANDS,
    fleece.COMMANDS,
    (Command("query-commands", general.NOTHING, _query_commands),),
)

COMMANDS: Final = {command.name: command for table in _TABLES for command in table}
