"""What a command is, and what commands work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdfleece.control.events import Events
    from nbdfleece.fleece.fleece import Fleece
    from nbdfleece.protocol.qmp.schema import Arguments, Struct
    from nbdfleece.protocol.qmp.values import Json
    from nbdfleece.server.server import Server


@dataclass(frozen=True, slots=True)
class Context:
    """The program, as commands see it.

    Attributes:
        fleece: Disks and snapshots.
        server: Sessions.
        events: Where commands tell everybody of something.
        quit: Begins the daemon's shutdown; returns at once.
        started: When the daemon started, in RFC 3339.
    """

    fleece: Fleece
    server: Server
    events: Events
    quit: Callable[[], None]
    started: str


Handler: TypeAlias = "Callable[[Context, Arguments], Awaitable[Json]]"


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        name: As on the wire.
        arguments: What it takes.
        run: Does it and returns what the client gets.
        in_negotiation: It works before `qmp_capabilities`, and only there.
    """

    name: str
    arguments: Struct
    run: Handler
    in_negotiation: bool = False
