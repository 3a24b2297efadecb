"""One request of a monitor, from its JSON to its answer: the command boundary.

Whatever goes wrong in a command becomes an error answer here, and nowhere else.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ConfigError, InUse, NbdfleeceError, NotFound
from nbdfleece.control.commands import COMMANDS
from nbdfleece.fleece.errors import SnapshotBroken
from nbdfleece.protocol.qmp import messages
from nbdfleece.protocol.qmp.schema import Arguments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.values import Json

_log = logging.getLogger(__name__)

_REASONS: Final = (
    (NotFound, "not-found"),
    (InUse, "in-use"),
    (SnapshotBroken, "broken"),
    (ConfigError, "usage"),
)


class CommandNotFound(CommandError):
    """There is no such command, or not at this point of the conversation."""

    qmp_class = "CommandNotFound"


class Dispatcher:
    """Runs the requests of one monitor, which negotiates first.

    Args:
        context: What commands work on.

    Attributes:
        negotiating: `qmp_capabilities` has not been done: no other command works, no event is sent.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.negotiating = True
        self._oob = False  # the client may ask for out-of-band execution

    async def answer(self, message: Mapping[str, Json]) -> Json:
        """Carry out one request and return the answer. Never raises but CancelledError.

        Cancel: the command is abandoned at its next await; commands undo what they had begun.
        """
        identity = messages.request_id(message)
        try:
            return messages.success(await self._run(message), identity)
        except NbdfleeceError as error:
            kind = error.qmp_class if isinstance(error, CommandError) else CommandError.qmp_class
            return messages.failure(kind, str(error), identity, reason=_reason(message, error))
        except Exception as error:  # noqa: BLE001 - a fault of ours ends one command
            _log.exception("command failed by a fault of nbdfleece")
            return messages.failure(
                CommandError.qmp_class, f"internal error: {type(error).__name__}", identity
            )

    async def _run(self, message: Mapping[str, Json]) -> Json:
        request = messages.parse_request(message, oob=self._oob)
        command = COMMANDS.get(request.execute)
        if self.negotiating and (command is None or not command.in_negotiation):
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        if command is None:
            raise CommandNotFound(f"The command {request.execute} has not been found")
        if request.out_of_band:
            # As in QEMU's own storage daemon: it may be asked for, and no command can do it.
            raise CommandError(f"The command {request.execute} does not support OOB")
        if command.in_negotiation and not self.negotiating:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        arguments = Arguments(command.arguments, request.arguments)
        result = await command.run(self._context, arguments)
        if command.in_negotiation:
            self.negotiating = False
            self._oob = messages.OOB in arguments.strings("enable")
        return result


def _reason(message: Mapping[str, Json], error: NbdfleeceError) -> str | None:
    """Sort an error for our own command line; QEMU's commands answer as QEMU does."""
    execute = message.get("execute")
    if not isinstance(execute, str) or "fleece-" not in execute:
        return None
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return None
