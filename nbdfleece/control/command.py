"""What a command is, and what commands work on."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from nbdfleece.server.addresses import Address, FdAddress, TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdfleece.control.events import Events
    from nbdfleece.fleece.fleece import Fleece
    from nbdfleece.protocol.qmp.schema import Arguments, Struct
    from nbdfleece.protocol.qmp.values import Json
    from nbdfleece.server.listener import Listener
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


def addresses(listener: Listener) -> list[Address]:
    """Return where `listener` really listens: a name resolved, a descriptor's own address."""
    if not isinstance(listener.address, TcpAddress | FdAddress):
        return [listener.address]
    found: list[Address] = []
    for sock in listener.sockets:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            found.append(UnixAddress(os.fsdecode(name)))
        elif sock.family in (socket.AF_INET, socket.AF_INET6):
            found.append(TcpAddress(name[0], name[1]))
    return found


def uris(server: Server, export: str) -> list[str]:
    """Return the URIs under which clients on this machine reach an export."""
    found: list[str] = []
    for listener in server.listeners:
        if isinstance(listener.address, FdAddress):
            places = addresses(listener)
        else:
            places = [listener.address]
        found += [
            place.uri(export, tls=listener.needs_tls)
            for place in places
            if not isinstance(place, FdAddress)
        ]
    return found


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
