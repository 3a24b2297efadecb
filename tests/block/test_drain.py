"""Drained sections that give up: a stuck request makes a change fail, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import permissions as perms
from nbdfleece.block.drain import quiet
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from tests.support.driver_kit import Owner, read, remove_all
from tests.support.memory import MemoryDriver
from tests.support.waiting import until

SIZE = 1 << 16
RAW = {"driver": "raw", "node-name": "raw", "file": "memory"}
STUCK = "requests did not end within 0.06 seconds"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_MOMENTS_S", (0.01, 0.02))


class Stuck:
    """A node with a request that does not end until it is let go."""

    def __init__(self, graph: Graph, driver: MemoryDriver, node: Node) -> None:
        self.graph = graph
        self.driver = driver
        self.node = node
        self.request: asyncio.Task[bytes] | None = None

    async def begin(self, node: Node) -> None:
        self.driver.hold.add("read")
        self.request = asyncio.create_task(read(node, 0, 1))
        await until(lambda: self.driver.waiting.get("read"))

    async def let_go(self) -> None:
        self.driver.held.set()
        assert self.request is not None
        assert await self.request == b"\1"


@pytest.fixture
async def stuck() -> AsyncIterator[Stuck]:
    graph = Graph()
    driver = MemoryDriver(bytearray(b"\1" * SIZE))
    node = await graph.add("memory", driver, read_only=False, discard_enabled=True)
    found = Stuck(graph, driver, node)
    yield found
    assert not any(node.is_drained for node in graph)
    await found.let_go()
    await remove_all(graph)


async def test_a_removal_gives_up(stuck: Stuck) -> None:
    await stuck.begin(stuck.node)
    with pytest.raises(CommandError, match=STUCK):
        await stuck.graph.remove(stuck.node)
    assert stuck.graph.get("memory") is stuck.node


async def test_a_resize_gives_up(stuck: Stuck) -> None:
    await stuck.begin(stuck.node)
    with pytest.raises(CommandError, match=STUCK):
        await stuck.graph.resize(stuck.node, 512)
    assert stuck.node.size == SIZE
    assert stuck.node.parents == []


async def test_a_reopen_gives_up(stuck: Stuck) -> None:
    top = await add_from_options(stuck.graph, RAW)
    await stuck.begin(top)
    with pytest.raises(CommandError, match=STUCK):
        await reopen(stuck.graph, [{**RAW, "size": 512}])
    assert top.size == SIZE
    assert not stuck.graph.reopening.locked()


async def test_a_flush_that_does_not_end_is_given_up(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_TIMEOUT_S", 0.01)
    top = await add_from_options(stuck.graph, RAW)
    stuck.driver.hold.add("flush")
    stuck.driver.flush = lambda: stuck.driver._dawdle("flush")  # type: ignore[method-assign]
    edge = stuck.graph.attach_root("root", Owner("w"), top, perm=perms.WRITE, shared=perms.ALL)
    with pytest.raises(CommandError, match="flushing node"):
        await reopen(stuck.graph, [{**RAW, "size": 512}])
    assert top.size == SIZE
    stuck.graph.detach_root(edge)
    await stuck.begin(stuck.node)


async def test_who_gave_up_lets_the_others_go_on(stuck: Stuck) -> None:
    owner = Owner("guest")
    edge = stuck.graph.attach_root("root", owner, stuck.node, perm=0, shared=perms.ALL)
    await stuck.begin(stuck.node)
    with pytest.raises(CommandError, match=STUCK):
        async with quiet(stuck.node):
            raise AssertionError("it is not quiet")
    assert not stuck.node.is_drained
    stuck.graph.detach_root(edge)


async def test_an_error_in_the_section_is_its_own(stuck: Stuck) -> None:
    with pytest.raises(TimeoutError, match="mine"):
        async with quiet(stuck.node):
            raise TimeoutError("mine")
    await stuck.begin(stuck.node)


async def test_of_two_removals_one_finds_nothing(stuck: Stuck) -> None:
    node = await stuck.graph.add(
        "second", MemoryDriver(bytearray(1)), read_only=False, discard_enabled=True
    )
    done = await asyncio.gather(
        stuck.graph.remove(node), stuck.graph.remove(node), return_exceptions=True
    )
    assert sorted(str(result) for result in done) == [
        "Cannot find device='' nor node-name='second'",
        "None",
    ]
    await stuck.begin(stuck.node)
