"""Driver `null-co`: the kit, and its options."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from tests.support.driver_kit import DriverKit, read, remove_all, stepped


class TestKit(DriverKit):
    keeps_data = False

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        return await make(graph, size, read_only=read_only)


class TestKitWithLatency(TestKit):
    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        return await make(graph, size, read_only=read_only, latency_ns=1000)


async def make(
    graph: Graph,
    size: int,
    *,
    read_only: bool = False,
    read_zeroes: bool = False,
    latency_ns: int = 0,
) -> Node:
    return await graph.add(
        None,
        NullDriver(size=size, read_zeroes=read_zeroes, latency_ns=latency_ns),
        read_only=read_only,
        discard_enabled=True,
    )


@pytest.mark.parametrize("latency_ns", [0, 1000])
async def test_rubbish_in_a_used_buffer_is_never_what_is_read(latency_ns: int) -> None:
    graph = Graph()
    node = await make(graph, 1000, latency_ns=latency_ns)
    buffer = bytearray(b"secret of another client")

    if not node.read_now(0, memoryview(buffer)):
        await stepped(node.read(0, memoryview(buffer)))

    assert not any(buffer)
    await remove_all(graph)


@pytest.mark.parametrize(("read_zeroes", "flags"), [(False, DATA), (True, HOLE | ZERO)])
async def test_read_zeroes_is_what_status_says(read_zeroes: bool, flags: int) -> None:
    graph = Graph()
    node = await make(graph, 1000, read_zeroes=read_zeroes)
    assert await node.block_status(10, 500) == [Extent(10, 500, flags)]
    await remove_all(graph)


async def test_every_request_takes_the_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    node = await make(graph, 1000, latency_ns=2_500_000)
    loop = asyncio.get_running_loop()
    asked: list[float] = []
    real = loop.call_later

    def call_later(delay: float, *args: object) -> object:
        asked.append(delay)
        return real(0, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", call_later)
    assert not node.read_now(0, memoryview(bytearray(1)))
    await read(node, 0, 1)
    await node.write(0, memoryview(b"x"), fua=False)
    await node.write_zeroes(0, 1, fua=False, may_unmap=False, no_fallback=True)
    await node.discard(0, 1)
    await node.flush()

    assert asked == [0.0025] * 5
    await remove_all(graph)


async def test_a_size_that_breaks_clients_is_refused() -> None:
    with pytest.raises(CommandError, match="too large"):
        await make(Graph(), 1 << 63)
