"""Commands about the monitor and the daemon itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.control.command import Command
from nbdfleece.protocol.qmp.messages import OOB
from nbdfleece.protocol.qmp.schema import Array, Boolean, Enum, Integer, String, Struct

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json

NOTHING: Final = Struct()

_NUMBERS: Final = Struct({"major": Integer(), "minor": Integer(), "micro": Integer()})
_VERSION: Final = Struct({"qemu": _NUMBERS, "package": String(), "nbdfleece": _NUMBERS})
_STATUS: Final = Struct(
    {"running": Boolean(), "singlestep": Boolean(), "status": Enum(("running", "paused"))}
)

# Clients of QMP read the version as QEMU's and choose what they ask for by it.
_QEMU: Final = {"major": 7, "minor": 2, "micro": 0}


def version() -> Json:
    """Return what `query-version` and the greeting say."""
    numbers = [int(number) for number in re.findall(r"\d+", __version__)[:3]]
    names = ("major", "minor", "micro")
    return {
        "qemu": _QEMU,
        "package": f"nbdfleece {__version__}",
        "nbdfleece": dict(zip(names, numbers, strict=True)),
    }


async def _capabilities(_context: Context, _arguments: Arguments) -> Json:
    """End the negotiation. Must be the first command of a monitor."""
    return {}


async def _query_version(_context: Context, _arguments: Arguments) -> Json:
    """Tell which QEMU we answer like, and our own version."""
    return version()


async def _query_status(context: Context, _arguments: Arguments) -> Json:
    """Tell whether guests may write: what we have of a machine are its disks."""
    running = not context.exports.guests_are_stopped
    status = "running" if running else "paused"
    return {"status": status, "singlestep": False, "running": running}


async def _stop(context: Context, _arguments: Arguments) -> Json:
    """Hold all requests to writable exports until `cont`; what had begun ends and is flushed."""
    if not context.exports.guests_are_stopped:
        context.events.emit("STOP", {})
    await context.exports.stop_guests()
    return {}


async def _cont(context: Context, _arguments: Arguments) -> Json:
    """Let go the requests that `stop` holds."""
    if context.exports.guests_are_stopped:
        context.exports.let_guests_go()
        context.events.emit("RESUME", {})
    return {}


async def _query_name(_context: Context, _arguments: Arguments) -> Json:
    """Give the name of the machine, which has none."""
    return {}


async def _query_tpm(_context: Context, _arguments: Arguments) -> Json:
    """List the machine's TPM devices, of which there are none."""
    return []


async def _quit(context: Context, _arguments: Arguments) -> Json:
    """Shut the daemon down, as SIGTERM does."""
    context.quit()
    return {}


COMMANDS: Final = (
    Command(
        "qmp_capabilities",
        Struct(optional={"enable": Array(Enum((OOB,)))}),
        _capabilities,
        in_negotiation=True,
        returns=NOTHING,
    ),
    Command("query-version", NOTHING, _query_version, returns=_VERSION),
    Command("query-status", NOTHING, _query_status, returns=_STATUS),
    Command("stop", NOTHING, _stop, returns=NOTHING),
    Command("cont", NOTHING, _cont, returns=NOTHING),
    Command("query-name", NOTHING, _query_name, returns=Struct(optional={"name": String()})),
    Command("query-tpm", NOTHING, _query_tpm, returns=Array(Struct({"id": String()}))),
    Command("quit", NOTHING, _quit, returns=NOTHING),
)
