"""Random transactions under a guest that writes to several disks, against a list of its writes.

The guest makes one write after the other, to whichever disk. So at any instant the disks are what a
prefix of the list makes of them. Whatever a transaction copies, and whatever bitmap it clears, must
be of one and the same prefix; a transaction that is refused, or whose group failed, leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import permissions as perms
from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.backup_filter import BackupFilter
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.drivers.raw import RawDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.control.commands.transaction import ACTIONS
from nbdfleece.control.objects import Objects
from nbdfleece.control.transaction import Transaction
from nbdfleece.jobs.job import JobEnded, JobNews
from nbdfleece.jobs.manager import JobManager
from nbdfleece.protocol.qmp.schema import Arguments
from tests.support.memory import MemoryDriver
from tests.support.waiting import turns, until

KiB = 1024
SIZE = 512 * KiB + 4096
DISKS = ("a", "b", "c")
GRANULARITY = 4096
NORMAL, LONG = 150, 3000

Write = tuple[str, int, bytes]


class Guest:
    """A program that stands above all disks and makes one write after the other."""

    def __init__(self, graph: Graph, disks: dict[str, Node], rng: random.Random) -> None:
        self.rng = rng
        self.writes: list[Write] = []  # those that are done
        self.wanted = asyncio.Event()
        self.running = False
        self.edges = {
            name: graph.attach_root("root", self, node, perm=perms.WRITE, shared=perms.ALL)
            for name, node in disks.items()
        }
        self.drains = 0

    def describe_parent(self) -> str:
        return "the guest"

    def child_attached(self, edge) -> None: ...

    def child_detached(self, edge) -> None: ...

    def drained_begin(self) -> None:
        self.drains += 1

    def drained_end(self) -> None:
        self.drains -= 1

    def is_idle(self) -> bool:
        return not self.running

    async def wait_idle(self) -> None:
        await until(self.is_idle)

    async def live(self) -> None:
        while True:
            await self.wanted.wait()
            if self.drains:
                await asyncio.sleep(0)
                continue
            name = self.rng.choice(DISKS)
            length = self.rng.choice((1, 512, 4096, 65536, self.rng.randrange(1, 100_000)))
            offset = self.rng.randrange(SIZE - length + 1)
            data = self.rng.randbytes(1) * length
            self.running = True
            await self.edges[name].node.write(offset, memoryview(data), fua=False)
            self.writes.append((name, offset, data))
            self.running = False
            await asyncio.sleep(0)

    async def stop(self) -> None:
        self.wanted.clear()
        await self.wait_idle()


class World:
    """Three disks, each with the bitmap `b`, and what is known of them."""

    def __init__(self, tasks: asyncio.TaskGroup, rng: random.Random) -> None:
        self.rng = rng
        self.graph = Graph()
        self.jobs = JobManager(tasks)
        self.ended: list[JobEnded] = []
        self.jobs.news.subscribe(self.hear)
        self.context = SimpleNamespace(
            graph=self.graph,
            jobs=self.jobs,
            transacting=asyncio.Lock(),
            fleece=None,
            objects=Objects(),
        )
        self.cleared = dict.fromkeys(DISKS, 0)  # number of writes before the bitmap was cleared
        self.results: dict[str, int] = {}

    def hear(self, news: JobNews) -> None:
        if isinstance(news, JobEnded):
            self.ended.append(news)

    async def set_up(self) -> Guest:
        disks = {name: await self.memory(name) for name in DISKS}
        for name in DISKS:
            await self.run([bitmap("add", name, granularity=GRANULARITY)])
        return Guest(self.graph, disks, self.rng)

    async def memory(self, name: str) -> Node:
        driver = MemoryDriver(bytearray(SIZE), self.rng)
        return await self.graph.add(name, driver, read_only=False, discard_enabled=True)

    async def run(self, actions: list[dict], *, grouped: bool = False) -> None:
        asked = [
            (ACTIONS[each["type"]], Arguments(ACTIONS[each["type"]].arguments, each["data"]))
            for each in actions
        ]
        await Transaction(self.context, grouped=grouped).run(asked)

    def picture(self) -> list[object]:
        """The graph: nodes, edges, bitmaps."""
        return [
            (
                node.name,
                [(edge.name, edge.node.name, edge.perm, edge.shared) for edge in node.children],
                [(type(edge.parent).__name__, edge.name, edge.perm) for edge in node.parents],
                [(name, found.enabled, found.busy) for name, found in node.bitmaps.items()],
            )
            for node in self.graph
        ]


def action(kind: str, **data: object) -> dict:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def bitmap(verb: str, node: str, **more: object) -> dict:
    return action(f"block-dirty-bitmap-{verb}", node=node, name="b", **more)


def backup(disk: str) -> dict:
    return action(
        "blockdev-backup",
        job_id=f"j{disk}",
        device=disk,
        target=f"t{disk}",
        sync="full",
        on_cbw_error="break-snapshot",  # a fault of the target is none of the guest's
    )


def granules(writes: list[Write], disk: str) -> set[int]:
    found: set[int] = set()
    for name, offset, data in writes:
        if name == disk:
            found |= set(range(offset // GRANULARITY, (offset + len(data) - 1) // GRANULARITY + 1))
    return found


def dirty(node: Node) -> set[int]:
    found: set[int] = set()
    for offset, length in node.bitmaps["b"].dirty_ranges():
        found |= set(range(offset // GRANULARITY, -(-(offset + length) // GRANULARITY)))
    return found


async def test_everything_in_a_transaction_is_of_one_instant(
    rng: random.Random, long_run: bool
) -> None:
    async with asyncio.TaskGroup() as tasks:
        world = World(tasks, rng)
        guest = await world.set_up()
        life = tasks.create_task(guest.live())
        disks = {name: bytearray(SIZE) for name in DISKS}  # after the first `done` writes
        done = 0
        for number in range(LONG if long_run else NORMAL):
            for name, offset, data in guest.writes[done:]:
                disks[name][offset : offset + len(data)] = data
            done = len(guest.writes)
            await one_round(world, guest, {name: bytes(disks[name]) for name in DISKS}, number)
        life.cancel()
        for name in ("refused", "grouped and failed", "failed", "taken"):
            assert world.results.get(name), world.results


async def one_round(world: World, guest: Guest, before: dict[str, bytes], number: int) -> None:
    """A transaction while the guest writes; `before` is what the disks are now, at rest."""
    rng, graph = world.rng, world.graph
    copied = rng.sample(DISKS, rng.randrange(4))
    targets = {disk: await world.memory(f"t{disk}") for disk in copied}
    grouped = rng.random() < 0.3
    cleared = [] if grouped else rng.sample(DISKS, rng.randrange(4))
    actions = [*map(backup, copied), *(bitmap("clear", disk) for disk in cleared)]
    rng.shuffle(actions)
    is_refused = rng.random() < 0.3
    if is_refused:
        actions.insert(rng.randrange(len(actions) + 1), action("abort"))
    faulty = rng.choice(copied) if copied and rng.random() < 0.3 else None
    if faulty is not None:
        targets[faulty].driver.fail["write"] = 5
    picture = world.picture()
    start = len(guest.writes)
    guest.wanted.set()
    some = start + rng.randrange(1, 4)
    await until(lambda: len(guest.writes) >= some)
    low = len(guest.writes)
    refusal = pytest.raises(CommandError, match="Abort action")
    with refusal if is_refused else contextlib.nullcontext():
        await world.run(actions, grouped=grouped)
    high = len(guest.writes) + 1  # one may be in flight
    await until(lambda: len(guest.writes) >= high + 2)
    await until(lambda: not list(world.jobs))
    await guest.stop()
    assert world.picture() == picture
    ended, world.ended = world.ended, []
    good = [job.id[1:] for job in ended if job.error is None]
    result = "taken"
    if is_refused:
        assert not ended
        result, cleared = "refused", []
    elif faulty is not None:
        expected = set() if grouped else set(copied) - {faulty}
        assert set(good) == expected, ended
        result = "grouped and failed" if grouped else "failed"
    else:
        assert set(good) == set(copied), ended
    world.results[result] = world.results.get(result, 0) + 1
    for disk in cleared:
        world.cleared[disk] = instant(world, guest, before, (start, low, high), good, cleared)
    if good and not cleared:
        instant(world, guest, before, (start, low, high), good, cleared)
    for disk in DISKS:
        wanted = granules(guest.writes[world.cleared[disk] :], disk)
        assert dirty(graph.find(disk)) == wanted, f"round {number}: bitmap of {disk}"
    for node in targets.values():
        await graph.remove(node)


def instant(
    world: World,
    guest: Guest,
    before: dict[str, bytes],
    places: tuple[int, int, int],
    copied: list[str],
    cleared: list[str],
) -> int:
    """Return how many writes were before the instant; there must be such a number for all."""
    start, low, high = places
    state = {disk: bytearray(before[disk]) for disk in DISKS}
    for number in range(start, min(high, len(guest.writes)) + 1):
        copies = all(
            world.graph.find(f"t{disk}").driver.data == state[disk]  # type: ignore[attr-defined]
            for disk in copied
        )
        after = guest.writes[number:]
        bitmaps = all(dirty(world.graph.find(d)) == granules(after, d) for d in cleared)
        if number >= low and copies and bitmaps:
            return number
        if number < len(guest.writes):
            disk, offset, data = guest.writes[number]
            state[disk][offset : offset + len(data)] = data
    raise AssertionError(f"of no instant from write {low} to {high}: {copied}, {cleared}")


def dawdling(verb: Callable[[Driver], Awaitable[object]]) -> object:
    """A verb of a driver that waits before and behind its work: two more places to be cancelled."""

    async def slow(driver: Driver) -> object:
        await turns(2)
        result = await verb(driver)
        await turns(2)
        return result

    return slow


async def test_wherever_it_is_cancelled_a_transaction_is_undone_or_complete(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (NullDriver, RawDriver, BackupFilter):
        for verb in ("open", "close"):
            monkeypatch.setattr(kind, verb, dawdling(getattr(kind, verb)))
    async with asyncio.TaskGroup() as tasks:
        world = World(tasks, rng)
        guest = await world.set_up()
        life = tasks.create_task(guest.live())
        guest.wanted.set()
        await until(lambda: guest.writes)
        actions = [
            action("blockdev-add", driver="null-co", node_name="n", size=SIZE, read_zeroes=True),
            action("blockdev-add", driver="raw", node_name="ta", file="n"),
            backup("a"),
            bitmap("disable", "b"),
            action("block-dirty-bitmap-add", node="c", name="new"),
            bitmap("remove", "a"),
            backup("b"),
        ]
        await world.memory("tb")
        picture = world.picture()
        complete = undone = 0
        for turns_first in range(10_000):
            task = asyncio.create_task(world.run(actions))
            for _ in range(turns_first):
                await asyncio.sleep(0)
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
            assert not world.context.transacting.locked()
            await until(lambda: not list(world.jobs))
            if world.graph.get("n") is None:
                assert outcome is not None
                assert world.picture() == picture
                undone += 1
                continue
            assert {end.id for end in world.ended} == {"ja", "jb"}
            world.ended.clear()
            complete += 1
            if outcome is None:
                break
            await world.run([bitmap("enable", "b"), bitmap("add", "a", granularity=GRANULARITY)])
            await world.run([action("block-dirty-bitmap-remove", node="c", name="new")])
            for name in ("ta", "n"):
                await world.graph.remove(world.graph.find(name))
            assert world.picture() == picture
        assert complete
        assert undone > 10
        await guest.stop()
        assert guest.drains == 0
        life.cancel()
