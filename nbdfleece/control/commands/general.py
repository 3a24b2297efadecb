"""Commands about the monitor and the daemon itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.control.command import Command
from nbdfleece.protocol.qmp.schema import Array, Enum, Struct

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json

NOTHING: Final = Struct()

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
    return {}


async def _query_version(_context: Context, _arguments: Arguments) -> Json:
    return version()


async def _quit(context: Context, _arguments: Arguments) -> Json:
    context.quit()
    return {}


COMMANDS: Final = (
    Command(
        "qmp_capabilities",
        Struct(optional={"enable": Array(Enum(()))}),
        _capabilities,
        in_negotiation=True,
    ),
    Command("query-version", NOTHING, _query_version),
    Command("quit", NOTHING, _quit),
)
