"""What a command is, and what commands work on."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from nbdfleece.server.addresses import Address, FdAddress, TcpAddress, UnixAddress, VsockAddress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdfleece.block.graph import Graph
    from nbdfleece.control.events import Events
    from nbdfleece.control.objects import Objects
    from nbdfleece.fleece.backup import Backups
    from nbdfleece.fleece.fleece import Fleece
    from nbdfleece.jobs.manager import JobManager
    from nbdfleece.protocol.qmp.schema import Arguments, Struct, Type, Union
    from nbdfleece.protocol.qmp.values import Json
    from nbdfleece.server.exports import Exports
    from nbdfleece.server.listener import Listener
    from nbdfleece.server.server import Server
    from nbdfleece.server.service import NbdService


@dataclass(frozen=True, slots=True)
class Context:
    """The program, as commands see it.

    Attributes:
        graph: The nodes.
        exports: What is offered.
        fleece: Disks and snapshots.
        server: Sessions.
        events: Where commands tell everybody of something.
        quit: Begins the daemon's shutdown; returns at once.
        started: When the daemon started, in RFC 3339.
        nbd: The server, as commands start and stop it.
        objects: What `object-add` has made.
        jobs: Backups and other long work.
        backups: Backups into folders.
        transacting: Held by a transaction (control.transaction); never by requests.
    """

    graph: Graph
    exports: Exports
    fleece: Fleece
    server: Server
    events: Events
    quit: Callable[[], None]
    started: str
    nbd: NbdService
    objects: Objects
    jobs: JobManager
    backups: Backups
    transacting: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        elif sock.family == socket.AF_VSOCK:
            found.append(VsockAddress(name[0], name[1]))
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
        returns: What it returns, for introspection; None: not declared.
        features: QEMU's words about it, such as `deprecated` and `unstable`.
    """

    name: str
    arguments: Struct | Union
    run: Handler
    in_negotiation: bool = False
    returns: Type | None = None
    features: tuple[str, ...] = ()
