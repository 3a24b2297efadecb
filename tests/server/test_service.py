"""The one NBD server: started, stopped, and who holds it up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.graph import Graph
from nbdfleece.server.addresses import TcpAddress, UnixAddress
from nbdfleece.server.export import ExportOptions
from nbdfleece.server.exports import Exports
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.server import Server
from nbdfleece.server.service import NbdService, Terms
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import connected
from tests.support.waiting import until


class World:
    """A service that nobody has started, over one disk."""

    def __init__(self, folder: Path, server: Server, graph: Graph, exports: Exports) -> None:
        self.address = UnixAddress(str(folder / "nbd.sock"))
        self.graph = graph
        self.exports = exports
        self.service = NbdService(server, exports, is_permanent=False)
        self.disk = MemoryDriver(bytearray(4096))
        self.stops = 0

    async def start(self) -> None:
        await self.service.start(self.address, Terms(), self.stopped)

    def stopped(self) -> None:
        self.stops += 1

    async def offer(self, name: str) -> None:
        node = await self.graph.add(None, self.disk, read_only=False, discard_enabled=True)
        self.exports.add(node, ExportOptions(name, name, writable=True, description=""))


@asynccontextmanager
async def world_in(folder: Path) -> AsyncIterator[World]:
    graph = Graph()
    exports = Exports(graph)
    async with Server(exports, ServerOptions()) as server:
        world = World(folder, server, graph, exports)
        yield world
        if world.service.is_running:
            await world.service.stop()
    for node in graph:
        await graph.remove(node)


async def test_it_starts_once_and_again_when_stopped(short_tmp: Path) -> None:
    async with world_in(short_tmp) as world:
        with pytest.raises(CommandError, match="NBD server not running"):
            await world.service.stop()
        await world.start()
        world.service.check_running()
        with pytest.raises(CommandError, match="NBD server already running"):
            await world.start()
        assert world.stops == 0
        await world.service.stop()
        assert world.stops == 1
        assert world.address.path not in map(str, short_tmp.iterdir())  # noqa: ASYNC240
        await world.start()


async def test_what_it_could_not_start_with_is_let_go(short_tmp: Path) -> None:
    async with world_in(short_tmp) as world:
        cases = (
            (UnixAddress(str(short_tmp / "no" / "s")), "Failed to bind socket to .*: No such file"),
            (UnixAddress("x" * 200), "is too long"),
            (UnixAddress(""), "is too long"),
            (UnixAddress("a\0b"), "'a.x00b' is not a file name"),
            (UnixAddress("\ud800"), "is not a file name"),
            (TcpAddress("a..b", 1), "^address resolution failed for a..b:1: Name or service"),
            (TcpAddress("192.0.2.1", 1), "^Failed to bind socket: Cannot assign requested address"),
        )
        for address, text in cases:
            with pytest.raises(CommandError, match=text):
                await world.service.start(address, Terms(), world.stopped)
        assert world.stops == len(cases)
        assert not world.service.is_running


async def test_stopping_waits_for_requests_and_removes_the_exports(short_tmp: Path) -> None:
    async with world_in(short_tmp) as world:
        await world.offer("disk")
        gone: list[str] = []
        world.exports.removed.subscribe(gone.append)
        await world.start()
        async with connected(world.address.path) as client:
            await client.write(0, b"x" * 512)
            await world.service.stop()
            assert gone == ["disk"]
            await client.wait_closed()
        assert world.disk.data[:512] == b"x" * 512


async def test_a_permanent_server_is_not_stopped(short_tmp: Path) -> None:
    async with world_in(short_tmp) as world:
        server = NbdService(None, world.exports, is_permanent=True)  # type: ignore[arg-type]
        assert server.is_running
        with pytest.raises(CommandError, match="as long as the daemon does"):
            await server.stop()
        with pytest.raises(CommandError, match="already running"):
            await server.start(world.address, Terms(), world.stopped)


async def test_an_export_cut_off_goes_when_its_requests_have_ended(short_tmp: Path) -> None:
    async with world_in(short_tmp) as world:
        await world.offer("disk")
        gone: list[str] = []
        world.exports.removed.subscribe(gone.append)
        await world.start()
        world.disk.hold.add("write")
        async with connected(world.address.path) as client:
            await client.submit(1, 0, 512, data=b"y" * 512)
            await until(lambda: world.disk.waiting.get("write"))
            world.exports.cut_off("disk")
            world.exports.cut_off("disk")  # twice is as once
            assert gone == []
            world.disk.held.set()
            await until(lambda: gone)
        assert gone == ["disk"]
