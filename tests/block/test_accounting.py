"""Accounting against time that the test makes: counts, times, intervals, histograms."""

from __future__ import annotations

import errno
import random

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.limits import MAX_HISTOGRAM_BINS, MAX_STATS_INTERVALS
from nbdfleece.block.accounting import (
    Accounting,
    CountedVerbs,
    Histogram,
    Kind,
    Stats,
    TimedAverage,
    check_boundaries,
    stats_of,
)
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from tests.support.manual_clock import SECOND, ManualClock
from tests.support.memory import MemoryDriver

# What qemu-storage-daemon 7.2 tells of each node.
QEMU = {
    *("account_failed", "account_invalid", "timed_stats", "wr_highest_offset"),
    *(f"{kind}_operations" for kind in ("rd", "wr", "flush", "unmap")),
    *(f"failed_{kind}_operations" for kind in ("rd", "wr", "flush", "unmap")),
    *(f"invalid_{kind}_operations" for kind in ("rd", "wr", "flush", "unmap")),
    *(f"{kind}_total_time_ns" for kind in ("rd", "wr", "flush", "unmap")),
    *(f"{kind}_bytes" for kind in ("rd", "wr", "unmap")),
    *(f"{kind}_merged" for kind in ("rd", "wr", "unmap")),
}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def accounting(clock: ManualClock) -> Accounting:
    return Accounting(clock.now_ns)


def counted(stats: Stats) -> dict[str, object]:
    """What is not zero, empty or a flag."""
    return {name: value for name, value in stats.items() if value and value is not True}


def test_nothing_counted_is_told_as_qemu_does(accounting: Accounting) -> None:
    assert set(accounting.stats()) == QEMU  # no idle time before the first request
    assert set(stats_of(None)) == QEMU
    assert not any(stats_of(None).values())
    assert counted(stats_of(accounting)) == {}


async def driven(accounting: Accounting, clock: ManualClock) -> tuple[CountedVerbs, Node]:
    """A node in memory whose every read takes 5 s, write 7 s, flush 11 s, discard 13 s."""

    class Slow(MemoryDriver):
        async def _dawdle(self, verb: str) -> None:
            clock.time_ns += {"read": 5, "write": 7, "flush": 11}.get(verb, 13) * SECOND // 2
            await super()._dawdle(verb)

    node = await Graph().add(
        "disk", Slow(bytearray(1 << 20)), read_only=False, discard_enabled=True
    )
    return CountedVerbs(node, accounting), node


async def test_each_verb_is_counted(accounting: Accounting, clock: ManualClock) -> None:
    """T-A1: operations, bytes, times, highest offset, idle time only after I/O."""
    verbs, _ = await driven(accounting, clock)

    await verbs.read(0, memoryview(bytearray(512)))
    await verbs.write(4096, memoryview(bytes(1024)), fua=False)
    await verbs.write(0, memoryview(bytes(10)), fua=True)
    await verbs.write_zeroes(8192, 4096, fua=False, may_unmap=True, no_fallback=False)
    await verbs.flush()
    await verbs.block_status(0, 512)
    await verbs.discard(0, 2048)
    clock.time_ns += 3 * SECOND

    stats = accounting.stats()
    assert stats["idle_time_ns"] == 3 * SECOND
    for name in list(stats):
        if name.endswith("_time_ns"):
            stats.pop(name)
    assert counted(stats) == {
        "rd_operations": 1,
        "rd_bytes": 512,
        "wr_operations": 3,
        "wr_bytes": 1024 + 10 + 4096,
        "wr_highest_offset": 8192 + 4096,
        "flush_operations": 1,
        "unmap_operations": 1,
        "unmap_bytes": 2048,
    }
    assert accounting.stats()["rd_total_time_ns"] == 5 * SECOND


@pytest.mark.parametrize("account_failed", [True, False])
async def test_failures_are_counted_and_timed_if_wanted(
    accounting: Accounting, clock: ManualClock, *, account_failed: bool
) -> None:
    """T-A1: account flags."""
    accounting.account_failed = account_failed
    accounting.set_histograms({Kind.READ: [SECOND]})
    accounting.set_intervals([1000])
    verbs, node = await driven(accounting, clock)
    assert isinstance(node.driver, MemoryDriver)
    node.driver.fail["read"] = errno.EIO

    with pytest.raises(IoError):
        await verbs.read(0, memoryview(bytearray(512)))

    stats = accounting.stats()
    assert (stats["failed_rd_operations"], stats["rd_operations"], stats["rd_bytes"]) == (1, 0, 0)
    assert bool(stats["rd_total_time_ns"]) is account_failed
    assert ("idle_time_ns" in stats) is account_failed
    assert stats["rd_latency_histogram"] == {"boundaries": [SECOND], "bins": [0, 1]}
    timed = stats["timed_stats"]
    assert isinstance(timed, list)
    assert bool(timed[0]["max_rd_latency_ns"]) is account_failed


@pytest.mark.parametrize(
    ("verb", "name"), [("write", "wr"), ("flush", "flush"), ("discard", "unmap"), ("zero", "wr")]
)
async def test_every_verb_counts_its_failures(accounting: Accounting, verb: str, name: str) -> None:
    class Failing(MemoryDriver):
        async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
            raise IoError(errno.EIO, "test")

        async def write_zeroes(self, *_: object, **__: object) -> None:
            raise IoError(errno.EIO, "test")

        async def discard(self, *_: object) -> None:
            raise IoError(errno.EIO, "test")

        async def flush(self) -> None:
            raise IoError(errno.EIO, "test")

    verbs = CountedVerbs(Failing(bytearray(512)), accounting)
    request = {
        "write": lambda: verbs.write(0, memoryview(b"x"), fua=False),
        "flush": verbs.flush,
        "discard": lambda: verbs.discard(0, 1),
        "zero": lambda: verbs.write_zeroes(0, 1, fua=False, may_unmap=True, no_fallback=False),
    }[verb]

    with pytest.raises(IoError):
        await request()

    stats = accounting.stats()
    assert stats[f"failed_{name}_operations"] == 1
    assert stats[f"{name}_operations"] == 0


async def test_a_refusal_to_zero_fast_is_no_failure(accounting: Accounting) -> None:
    class NoBetterWay(MemoryDriver):
        async def write_zeroes(self, *_: object, **__: object) -> None:
            raise IoError(errno.ENOTSUP, "test")

    node = await Graph().add(
        "disk", NoBetterWay(bytearray(1 << 20)), read_only=False, discard_enabled=True
    )
    node.account(accounting)

    await node.write_zeroes(0, 4096, fua=False, may_unmap=True, no_fallback=False)
    assert counted(accounting.stats())["wr_bytes"] == 4096
    assert "failed_wr_operations" not in counted(accounting.stats())


@pytest.mark.parametrize("account_invalid", [True, False])
def test_invalid_requests_count_as_use_if_wanted(
    accounting: Accounting, *, account_invalid: bool
) -> None:
    """T-A1."""
    accounting.account_invalid = account_invalid
    accounting.invalid(Kind.WRITE)

    stats = accounting.stats()
    assert stats["invalid_wr_operations"] == 1
    assert stats["wr_total_time_ns"] == 0
    assert ("idle_time_ns" in stats) is account_invalid


def test_a_cached_read_is_counted_only_when_it_is_done(accounting: Accounting) -> None:
    driver = MemoryDriver(bytearray(512), random.Random(1), now_share=1.0)
    verbs = CountedVerbs(driver, accounting)
    view = memoryview(bytearray(512))
    assert verbs.read_now(0, view)
    driver.hold.add("read")
    assert not verbs.read_now(0, view)

    assert accounting.stats()["rd_operations"] == 1


async def test_a_node_counts_only_while_asked(accounting: Accounting) -> None:
    driver = MemoryDriver(bytearray(512))
    node = await Graph().add("disk", driver, read_only=False, discard_enabled=True)
    assert node.verbs is driver  # nothing in the way
    await node.write(0, memoryview(b"x"), fua=False)
    node.account(accounting)
    await node.write(0, memoryview(b"yz"), fua=False)
    node.account(None)
    assert node.verbs is driver
    await node.write(0, memoryview(b"x"), fua=False)

    assert accounting.stats()["wr_bytes"] == 2


# --- intervals -----------------------------------------------------------------------------------


def test_latencies_of_the_last_interval(accounting: Accounting, clock: ManualClock) -> None:
    """T-A1: latency min, avg, max; queue depth."""
    accounting.set_intervals([60, 10])
    for latency_s in (1, 2, 3):
        clock.time_ns += latency_s * SECOND
        accounting.done(Kind.READ, 512, clock.time_ns - latency_s * SECOND)

    timed = accounting.stats()["timed_stats"]
    assert isinstance(timed, list)
    short, long = timed
    assert (short["interval_length"], long["interval_length"]) == (10, 60)
    assert long["min_rd_latency_ns"] == 1 * SECOND
    assert long["avg_rd_latency_ns"] == 2 * SECOND
    assert long["max_rd_latency_ns"] == 3 * SECOND
    assert long["min_wr_latency_ns"] == long["avg_wr_queue_depth"] == 0
    assert "avg_flush_queue_depth" not in long
    # The window of a minute that is told of began half a minute before we did.
    assert long["avg_rd_queue_depth"] == pytest.approx(6 / 36)

    clock.time_ns += 60 * SECOND
    timed = accounting.stats()["timed_stats"]
    assert isinstance(timed, list)
    assert [row["max_rd_latency_ns"] for row in timed] == [0, 0]


def test_timed_average_covers_half_a_period_to_a_whole(rng: random.Random) -> None:
    """Against a list of all that happened."""
    period = 1000
    average = TimedAverage(period, 0)
    happened: list[tuple[int, int]] = []
    now = 0
    for _ in range(2000):
        now += rng.choice((0, 1, 10, 400, 700))
        value = rng.randrange(100)
        average.account(value, now)
        happened.append((now, value))
        window = average.window(now)
        least = [value for at, value in happened if at > now - period // 2]
        most = [value for at, value in happened if at > now - period]
        assert len(least) <= window.count <= len(most)
        assert min(most) <= window.shortest <= min(least)
        assert max(least) <= window.longest <= max(most)


def test_intervals_are_checked(accounting: Accounting) -> None:
    for bad in ([0], [5, -1], list(range(1, MAX_STATS_INTERVALS + 2))):
        with pytest.raises(CommandError):
            accounting.set_intervals(bad)
    assert accounting.stats()["timed_stats"] == []


# --- histograms ----------------------------------------------------------------------------------


def test_one_request_lands_in_one_bin() -> None:
    """T-A2: bins are [b(i-1), b(i))."""
    histogram = Histogram([10, 20, 30])
    for latency in (0, 9, 10, 19, 20, 29, 30, 1000):
        histogram.account(latency)

    assert histogram.bins == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("boundaries", "good"),
    [
        ([1], True),
        ([1, 2, 3], True),
        ([], False),
        ([0], False),
        ([0, 1], False),
        ([2, 1], False),
        ([1, 1], False),
        ([-1, 1], False),
        (list(range(1, MAX_HISTOGRAM_BINS)), True),
        (list(range(1, MAX_HISTOGRAM_BINS + 1)), False),
    ],
)
def test_boundaries(boundaries: list[int], good: bool) -> None:
    assert check_boundaries(boundaries) is good


def test_histograms_are_set_apart(accounting: Accounting) -> None:
    """T-A2: only given kinds change."""
    accounting.set_histograms({Kind.READ: [10], Kind.WRITE: [20]})
    accounting.done(Kind.READ, 1, 0)
    accounting.set_histograms({Kind.WRITE: [30, 40]})

    stats = accounting.stats()
    assert stats["rd_latency_histogram"] == {"boundaries": [10], "bins": [1, 0]}
    assert stats["wr_latency_histogram"] == {"boundaries": [30, 40], "bins": [0, 0, 0]}
    assert "flush_latency_histogram" not in stats
