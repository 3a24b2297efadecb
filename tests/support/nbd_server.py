"""A real server on a unix socket, over disks in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbdfleece.base.units import MiB
from nbdfleece.block.driver import Driver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.server.addresses import UnixAddress
from nbdfleece.server.export import Export, ExportOptions
from nbdfleece.server.exports import Exports, RemoveMode
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.policy import Policy
from nbdfleece.server.server import Server
from nbdfleece.server.tls import TlsCredentials
from nbdfleece.server.tokens import Tokens
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import NbdClient


def pattern(size: int) -> bytes:
    """Bytes in which every 4-byte word tells its own position."""
    return b"".join(word.to_bytes(4, "big") for word in range(1, size // 4 + 2))[:size]


@dataclass
class Served:
    """What a test has at hand."""

    path: str
    server: Server
    graph: Graph
    exports: Exports
    drivers: dict[str, MemoryDriver] = field(default_factory=dict)

    @property
    def disk(self) -> MemoryDriver:
        return self.drivers["disk"]

    async def add_node(self, driver: Driver, *, read_only: bool = False) -> Node:
        return await self.graph.add(None, driver, read_only=read_only, discard_enabled=True)

    async def add(
        self, name: str, data: bytes, *, writable: bool = True, description: str = ""
    ) -> Export:
        """Offer a disk in memory."""
        self.drivers[name] = MemoryDriver(bytearray(data))
        node = await self.add_node(self.drivers[name])
        options = ExportOptions(name, name, writable=writable, description=description)
        return self.exports.add(node, options)

    async def open(self) -> NbdClient:
        """Connect, and no more."""
        return await NbdClient.open(self.path)


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    options: ServerOptions | None = None,
    size: int = MiB,
    credentials: TlsCredentials | None = None,
    tls: TlsMode = TlsMode.OFF,
    policy: Policy | None = None,
    tokens: Tokens | None = None,
) -> AsyncIterator[Served]:
    """A server with a writable disk `disk` and a read-only one, `frozen`, of the same content."""
    graph = Graph()
    exports = Exports(graph)
    path = str(folder / "nbd.sock")
    options = options or ServerOptions()
    async with Server(
        exports, options, policy=policy, credentials=credentials, tokens=tokens
    ) as server:
        await server.listen(UnixAddress(path), tls)
        served = Served(path, server, graph, exports)
        await served.add("disk", pattern(size), description="a disk")
        await served.add("frozen", pattern(size), writable=False)
        yield served
        for driver in served.drivers.values():
            driver.held.set()
    for export in exports:
        await exports.remove(export.options.id, RemoveMode.HARD)
    for node in reversed(list(graph)):  # parents were made after their children
        await graph.remove(node)
