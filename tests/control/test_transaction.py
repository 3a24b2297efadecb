"""Transactions: order, undoing, one drained section, and what the actions do together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.control.transaction import Action, ActionKind, Transaction
from nbdfleece.protocol.qmp.schema import Arguments, String, Struct
from tests.support.waiting import turns


class Bench:
    """Actions that write down what is done with them, and refuse where they are told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.refuse: set[str] = set()
        self.graph = Graph()
        self.context = SimpleNamespace(transacting=asyncio.Lock(), graph=self.graph)
        self.touches: dict[str, list[Node]] = {}
        self.lock = asyncio.Lock()
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, *names: str, grouped: bool = False) -> None:
        kind = ActionKind("noted", Struct({"name": String()}), self._make, can_be_grouped=False)
        asked = [(kind, Arguments(kind.arguments, {"name": name})) for name in names]
        await Transaction(self.context, grouped=grouped).run(asked)

    def _make(self, transaction: Transaction, arguments: Arguments) -> Action:
        return Noted(self, transaction, arguments)

    async def node(self, name: str) -> Node:
        driver = NullDriver(size=1 << 20, read_zeroes=True, latency_ns=0)
        return await self.graph.add(name, driver, read_only=False, discard_enabled=True)

    def note(self, step: str, name: str) -> None:
        self.done.append(f"{step} {name}")
        if f"{step} {name}" in self.refuse:
            raise CommandError(f"no {step} {name}")


class Noted(Action):
    def __init__(self, bench: Bench, transaction: Transaction, arguments: Arguments) -> None:
        super().__init__(transaction, arguments)
        self.bench = bench
        self.name = arguments.string("name")

    def nodes(self) -> list[Node]:
        return self.bench.touches.get(self.name, [])

    async def begin(self) -> None:
        await self.transaction.lock(self.bench.lock)
        self.bench.note("begin", self.name)

    async def prepare(self) -> None:
        await self.transaction.quieten(self)
        assert all(node.is_drained for node in self.nodes())
        await self.bench.gate.wait()
        self.bench.note("prepare", self.name)

    def commit(self) -> None:
        self.bench.note("commit", self.name)

    async def abort(self) -> None:
        self.bench.note("abort", self.name)

    async def clean(self) -> None:
        assert not any(node.is_drained for node in self.nodes())
        self.bench.note("clean", self.name)


async def test_actions_are_begun_prepared_committed_and_cleaned_in_order() -> None:
    bench = Bench()
    await bench.run("a", "b")
    steps = ("begin", "prepare", "commit", "clean")
    assert bench.done == [f"{step} {name}" for step in steps for name in "ab"]


async def test_nothing_asked_for_succeeds() -> None:
    await Bench().run()


async def test_the_first_refusal_undoes_what_was_prepared_latest_first() -> None:
    bench = Bench()
    bench.refuse = {"prepare c", "prepare d"}
    with pytest.raises(CommandError, match=r"^no prepare c$"):
        await bench.run("a", "b", "c", "d")
    begun = [f"begin {name}" for name in "abcd"]
    cleaned = [f"clean {name}" for name in "abcd"]
    tried = ["prepare a", "prepare b", "prepare c", "abort b", "abort a"]
    assert bench.done == [*begun, *tried, *cleaned]


async def test_what_cannot_even_begin_is_cleaned_and_no_more() -> None:
    bench = Bench()
    bench.refuse = {"begin b"}
    with pytest.raises(CommandError, match=r"^no begin b$"):
        await bench.run("a", "b", "c")
    assert bench.done == ["begin a", "begin b", "clean a", "clean b"]


async def test_an_undoing_that_fails_is_logged_and_the_others_are_undone(caplog) -> None:
    bench = Bench()
    bench.refuse = {"prepare c", "abort b", "clean a"}
    with pytest.raises(CommandError, match=r"^no prepare c$"):
        await bench.run("a", "b", "c")
    assert bench.done[-5:] == ["abort b", "abort a", "clean a", "clean b", "clean c"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "no abort b" in caplog.text


async def test_what_is_drained_stays_so_until_all_is_committed() -> None:
    bench = Bench()
    one, two = await bench.node("one"), await bench.node("two")
    bench.touches = {"a": [one], "b": [two, one], "c": []}
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run("c", "a", "b"))
        await turns(5)
        assert one.is_drained
        assert two.is_drained, "of later actions too, at once"
        bench.gate.set()
        await task
    assert not one.is_drained
    assert not two.is_drained


async def test_a_drained_section_of_somebody_else_is_not_relied_upon() -> None:
    bench = Bench()
    node = await bench.node("one")
    bench.touches = {"a": [node]}
    bench.gate.clear()
    node.drained_begin()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run("a"))
        await turns(5)
        node.drained_end()
        assert node.is_drained
        bench.gate.set()
        await task
    assert not node.is_drained


async def test_requests_that_do_not_end_refuse_the_transaction(monkeypatch) -> None:
    monkeypatch.setattr("nbdfleece.fleece.change.QUIET_MOMENTS_S", (0.001, 0.001))
    bench = Bench()
    node = await bench.node("one")
    bench.touches = {"b": [node]}
    node.enter()
    with pytest.raises(CommandError, match="did not end"):
        await bench.run("a", "b")
    assert not node.is_drained
    node.leave()
    await bench.run("a", "b")


async def test_transactions_wait_for_each_other() -> None:
    bench = Bench()
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bench.run("a"))
        tasks.create_task(bench.run("b"))
        await turns(5)
        assert bench.done == ["begin a"]
        bench.gate.set()
    assert bench.done[4:5] == ["begin b"]
    assert not bench.lock.locked()


async def test_a_cancelled_transaction_is_undone() -> None:
    bench = Bench()
    node = await bench.node("one")
    bench.touches = {"a": [node]}
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run("a"))
        await turns(5)
        task.cancel()
    assert bench.done == ["begin a", "clean a"]
    assert not node.is_drained
    assert not bench.context.transacting.locked()


async def test_what_makes_no_job_cannot_be_grouped() -> None:
    bench = Bench()
    with pytest.raises(CommandError, match="Action 'noted' does not support Transaction property"):
        await bench.run("a", grouped=True)
    assert bench.done == ["begin a", "clean a"]
