"""I/O limits under live exports, with real clients and time that the test makes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.child import Role
from nbdfleece.block.drain import drained
from nbdfleece.block.drivers.throttle import ThrottleDriver
from nbdfleece.block.node import Node
from nbdfleece.block.throttle import Limits
from nbdfleece.block.throttle_group import ThrottleGroups, make_throttle_group, set_property
from nbdfleece.fleece.io_limits import (
    below_limit,
    describe_limit,
    drop_unused_limits,
    limit_export,
    limit_node,
)
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.server.exports import RemoveMode
from tests.support.manual_clock import SECOND, ManualClock
from tests.support.nbd_client import NbdClient, connected
from tests.support.nbd_server import Served, pattern, serving
from tests.support.waiting import turns, until

KiB = 1 << 10


def limits(**members: int) -> Limits:
    return Limits().with_members({name.replace("_", "-"): n for name, n in members.items()})


NONE = limits()


class Live:
    """A server whose throttling goes by the test's clock."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.clock = ManualClock()
        served.graph.throttle_groups = ThrottleGroups(self.clock)
        self.disk = served.exports.get("disk")
        self.node = self.disk.node

    async def limit(self, wanted: Limits, group: str | None = None) -> None:
        await limit_export(self.served.graph, self.disk, wanted, group, "disk")

    @property
    def groups(self) -> list[str]:
        return [group.name for group in self.served.graph.throttle_groups]


@pytest.fixture
async def live(short_tmp: Path) -> AsyncIterator[Live]:
    async with serving(short_tmp) as served:
        live = Live(served)
        yield live
        for export in list(served.exports):
            await served.exports.remove(export.options.id, RemoveMode.HARD)
        await drop_unused_limits(served.graph)


class Guest:
    """A client that keeps `depth` requests in flight, as fio does, and counts the replies."""

    def __init__(self, client: NbdClient, rng: random.Random, length: int, depth: int = 8) -> None:
        self.client = client
        self.rng = rng
        self.length = length
        self.depth = depth
        self.done = 0
        self.running: set[asyncio.Future] = set()

    async def fill(self) -> None:
        """Begin as many requests as may be in flight."""
        while len(self.running) < self.depth:
            offset = self.rng.randrange(512) * KiB
            if self.rng.random() < 0.5:
                reply = await self.client.submit(c.NBD_CMD_READ, offset, self.length)
            else:
                data = bytes(self.length)
                reply = await self.client.submit(c.NBD_CMD_WRITE, offset, self.length, data=data)
            self.running.add(reply)

    async def collect(self) -> int:
        """Take the replies that have come; return how many."""
        over = {reply for reply in self.running if reply.done()}
        assert all(reply.result().error == 0 for reply in over)
        self.running -= over
        self.done += len(over)
        return len(over)


def waiting(live: Live) -> int:
    """Return how many requests are being held back."""
    return sum(
        len(queue)
        for group in live.served.graph.throttle_groups
        for member in group.members
        for queue in member.waiting.values()
    )


async def run_for(live: Live, guests: list[Guest], seconds: int) -> None:
    """Let the clock go on while every guest always has all the requests waiting that it may."""
    end_ns = live.clock.time_ns + seconds * SECOND
    depth = sum(guest.depth for guest in guests)
    while True:
        for guest in guests:
            await guest.collect()
            await guest.fill()
        await until(lambda: waiting(live) == depth or _any_done(guests))
        if _any_done(guests):
            continue
        if live.clock.timers[0].at_ns > end_ns:
            return
        live.clock.fire_next()


def _any_done(guests: list[Guest]) -> bool:
    return any(reply.done() for guest in guests for reply in guest.running)


async def end(guests: list[Guest]) -> None:
    for guest in guests:
        for reply in guest.running:
            assert (await reply).error == 0


async def test_a_client_gets_its_rate(live: Live, rng: random.Random) -> None:
    """T-T1, through the whole server: bytes counted against the clock of the throttle."""
    await live.limit(limits(bps_total=256 * KiB))
    async with connected(live.served.path) as client:
        guest = Guest(client, rng, 4 * KiB)
        await run_for(live, [guest], 20)

        expected = 20 * 256 / 4
        assert expected * 0.95 <= guest.done <= expected * 1.05
        await live.limit(NONE)
        await end([guest])
    assert live.node is live.disk.node
    assert live.groups == []


async def test_several_clients_share_the_limits_of_their_export(
    live: Live, rng: random.Random
) -> None:
    await live.limit(limits(iops_total=50))
    async with connected(live.served.path) as one, connected(live.served.path) as other:
        guests = [Guest(one, rng, 512), Guest(other, rng, 512)]
        await run_for(live, guests, 20)

        total = sum(guest.done for guest in guests)
        assert 950 <= total <= 1050
        await live.limit(NONE)
        await end(guests)


async def test_limits_come_and_go_under_a_client_that_writes(
    live: Live, rng: random.Random
) -> None:
    """No request fails, none is lost, and nothing of the filter is left."""
    async with connected(live.served.path) as client:
        guest = Guest(client, rng, 512)
        before = list(live.served.graph)
        for _ in range(10):
            await guest.fill()
            await live.limit(limits(iops_total=rng.randrange(1, 5)))
            assert below_limit(live.disk.node) is live.node
            assert live.disk.node is not live.node
            await guest.fill()
            await turns(rng.randrange(20))
            await live.limit(NONE)
            await turns(rng.randrange(20))
            await guest.collect()
        await end([guest])
        assert list(live.served.graph) == before
    assert live.groups == []
    assert live.clock.timers == []


async def test_a_drain_does_not_wait_for_throttled_requests(live: Live, rng: random.Random) -> None:
    await live.limit(limits(iops_total=1))
    async with connected(live.served.path) as client:
        guest = Guest(client, rng, 512)
        await guest.fill()
        await until(lambda: waiting(live) >= 6)

        async with drained(live.node):
            assert waiting(live) == 0
        await end([guest])


async def test_other_exports_of_the_node_are_not_limited(live: Live) -> None:
    """Only the root edge of the export is led through the filter."""
    frozen = live.served.exports.get("frozen")
    await live.limit(limits(iops_total=1))

    assert frozen.node is below_limit(frozen.node)
    assert live.disk.node.driver.name == "throttle"
    assert describe_limit(live.disk.node) == {
        "group": "disk", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 1, "iops_rd": 0, "iops_wr": 0,
    }  # fmt: skip
    assert describe_limit(live.node) == {}


async def test_limits_may_be_changed_and_groups_moved_between(live: Live) -> None:
    """T-T2: default group, moving, clearing."""
    await live.limit(limits(iops_total=1))
    assert live.groups == ["disk"]
    filter_node = live.disk.node
    await live.limit(limits(bps_read=5, iops_total=7, iops_total_max=10, iops_size=512))
    assert live.disk.node is filter_node
    told = describe_limit(filter_node)
    assert (told["iops_max"], told["iops_max_length"], told["iops_size"]) == (10, 1, 512)
    await live.limit(limits(iops_total=2), "other")
    assert live.groups == ["other"]
    frozen = live.served.exports.get("frozen")
    await limit_export(live.served.graph, frozen, limits(iops_total=3), "other", "frozen")
    assert live.groups == ["other"]
    assert describe_limit(live.disk.node)["iops"] == 3  # the limits are the group's
    await live.limit(NONE)
    assert live.groups == ["other"]
    await limit_export(live.served.graph, frozen, NONE, None, "frozen")
    assert live.groups == []


async def test_a_group_of_the_users_stays(live: Live) -> None:
    group = make_throttle_group(live.served.graph.throttle_groups, "mine", {})
    await live.limit(limits(iops_total=1), "mine")
    set_property(group, "limits", {"iops-total": 9})
    assert describe_limit(live.disk.node)["iops"] == 9
    await live.limit(NONE)
    assert live.groups == ["mine"]


async def test_a_node_is_limited_for_all_its_users(live: Live) -> None:
    graph = live.served.graph
    await limit_node(graph, live.node, limits(iops_total=5), None, "nodes")
    assert describe_limit(live.disk.node)["iops"] == 5
    await limit_node(graph, live.node, limits(iops_total=6), None, "nodes")
    assert describe_limit(live.disk.node)["iops"] == 6
    await limit_node(graph, live.node, NONE, None, "nodes")
    assert live.disk.node is live.node
    await limit_node(graph, live.node, NONE, None, "nodes")

    alone = await live.served.add_node(type(live.served.disk)(bytearray(512)))
    with pytest.raises(CommandError, match="is not in use"):
        await limit_node(graph, alone, limits(iops_total=5), None, "alone")
    assert live.groups == []


async def test_a_filter_put_above_the_node_comes_below_the_limits(live: Live) -> None:
    """As the filter of a snapshot: a reader of it does not use up the guest's limits."""
    graph = live.served.graph
    await live.limit(limits(iops_total=5))
    limiting = live.disk.node
    make_throttle_group(graph.throttle_groups, "upper", {})
    upper = await graph.add(
        "upper",
        ThrottleDriver(graph.throttle_groups, graph.throttle_groups.find("upper")),
        {"file": (below_limit(live.disk.node), Role.FILTERED | Role.PRIMARY)},
        read_only=False,
        discard_enabled=True,
    )
    async with drained(live.node):
        graph.insert_filter(upper)

    def chain(node: Node) -> list[Node]:
        return [node, *chain(node.file.node)] if node.file else [node]

    assert chain(live.disk.node) == [limiting, upper, live.node]
    await live.limit(NONE)
    assert chain(live.disk.node) == [upper, live.node]


async def test_content_is_that_of_the_node(live: Live) -> None:
    await live.limit(limits(iops_total=10**9))
    async with connected(live.served.path) as client:
        assert await client.read(100, 5000) == pattern(6000)[100:5100]
        await client.write(3, b"limited")
        assert live.served.disk.data[3:10] == b"limited"
