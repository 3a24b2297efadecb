"""Reading a point in time in order, against a model."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nbdfleece.backup.content import CHUNK, image_size
from nbdfleece.base.errors import IoError
from nbdfleece.base.limits import BACKUP_BATCH, BACKUP_CLUSTER, BACKUP_READS
from nbdfleece.base.notify import Notifier
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.fleece.copying import Copy, Run, Stopped, allocated, changed
from nbdfleece.jobs.job import Job, JobNews, JobOptions, Status
from tests.support.driver_kit import remove_all
from tests.support.memory import MemoryDriver
from tests.support.waiting import turns

SIZE = 5 * CHUNK + 12345


class NoWork:
    type = "test"

    async def run(self, job: Job) -> None: ...

    async def clean(self) -> None: ...

    def progress(self) -> tuple[int, int]:
        return 0, 0

    def hurry(self) -> None: ...


class ModelSink:
    """Keeps what it is given, and insists on C1."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(b"\xee" * size)
        self.runs: list[tuple[int, int, bool]] = []
        self.fault: OSError | None = None
        self._inside = threading.Lock()

    def prepare(
        self, offset: int, buffer: bytearray, start: int, length: int
    ) -> list[tuple[int, bytes]]:
        return [(offset, bytes(buffer[start : start + length]))]

    def zeroes(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        return [(offset, bytes(length))]

    def put(self, items: list[tuple[int, bytes]]) -> None:
        assert self._inside.acquire(blocking=False)
        if self.fault is not None:
            raise self.fault
        for offset, data in items:
            assert not self.runs or offset >= self.runs[-1][0] + self.runs[-1][1]
            self.runs.append((offset, len(data), not any(data)))
            self.data[offset : offset + len(data)] = data
        self._inside.release()


class Bench:
    """A disk in memory, a job, and a sink."""

    def __init__(self, graph: Graph, node: Node, driver: MemoryDriver) -> None:
        self.node = node
        self.driver = driver
        self.graph = graph
        self.news: Notifier[JobNews] = Notifier()
        self.job = Job(JobOptions("j"), NoWork(), self.news)
        self.job.status = Status.RUNNING
        self.sink = ModelSink(image_size(node.size))
        self.moved: list[tuple[int, int]] = []
        self.executor = ThreadPoolExecutor(3)

    async def copy(self, runs: AsyncIterator[Run], *, discard: bool = False) -> None:
        await Copy(
            self.job,
            self.node,
            self.sink,
            self.executor,
            discard=discard,
            moved=lambda *told: self.moved.append(told),
        ).run(runs)


def scattered(rng: random.Random, size: int) -> bytearray:
    """Mostly zeroes."""
    data = bytearray(size)
    for _ in range(12):
        at = rng.randrange(size)
        length = rng.choice((1, 4096, 70000, CHUNK + 5))
        data[at : at + length] = b"\7" * len(data[at : at + length])
    return data


@pytest.fixture
async def bench(rng: random.Random) -> AsyncIterator[Bench]:
    graph = Graph()
    driver = MemoryDriver(scattered(rng, SIZE), rng)
    node = await graph.add(None, driver, read_only=False, discard_enabled=True)
    found = Bench(graph, node, driver)
    yield found
    found.executor.shutdown()
    await remove_all(graph)


async def test_data_is_read_and_zeroes_are_not(bench: Bench) -> None:
    await bench.copy(allocated(bench.job, bench.node))

    disk = bytes(bench.driver.data)
    end = 0
    for offset, length, is_zero in bench.sink.runs:
        assert not any(disk[end:offset])
        assert not is_zero
        assert offset // CHUNK == (offset + length - 1) // CHUNK
        assert bench.sink.data[offset : offset + length].rstrip(b"\0") == disk[
            offset : offset + length
        ].rstrip(b"\0")
        end = offset + length
    assert not any(disk[end:])
    assert bench.moved[-1][0] == end


async def test_runs_of_data_are_as_long_as_they_can_be(bench: Bench) -> None:
    await bench.copy(allocated(bench.job, bench.node))

    for (first, length, _), (second, _, _) in zip(
        bench.sink.runs, bench.sink.runs[1:], strict=False
    ):
        assert first + length < second or second % CHUNK == 0


@pytest.mark.parametrize("granularity", [4096, 65536, 1 << 20])
async def test_what_is_dirty_is_read_whole(
    bench: Bench, rng: random.Random, granularity: int
) -> None:
    dirty: list[tuple[int, int]] = []
    at = 0
    while at < SIZE:
        at += rng.randrange(20) * granularity
        length = min(rng.randrange(1, 40) * granularity, SIZE - at)
        if length > 0:
            dirty.append((at, length))
        at += length + granularity

    await bench.copy(changed(bench.job, bench.node, dirty))

    disk = bytes(bench.driver.data) + bytes(-SIZE % 512)
    covered = bytearray(len(disk))
    for offset, length, _ in bench.sink.runs:
        assert offset % BACKUP_CLUSTER == 0
        assert length % BACKUP_CLUSTER == 0 or offset + length == len(disk)
        assert bench.sink.data[offset : offset + length] == disk[offset : offset + length]
        covered[offset : offset + length] = b"\1" * length
    for offset, length in dirty:
        assert all(covered[offset : offset + length])
    assert sum(length for _, length in bench.moved) == sum(covered)


async def test_a_failed_read_ends_the_copy(bench: Bench) -> None:
    bench.driver.fail["read"] = errno.EIO

    with pytest.raises(IoError):
        await bench.copy(allocated(bench.job, bench.node))
    assert bench.job.is_idle()


async def test_a_full_file_system_ends_the_copy(bench: Bench) -> None:
    bench.sink.fault = OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        await bench.copy(allocated(bench.job, bench.node))
    assert bench.job.is_idle()


async def test_a_cancelled_job_stops(bench: Bench) -> None:
    bench.job.is_cancelled = True

    with pytest.raises(Stopped):
        await bench.copy(allocated(bench.job, bench.node))


async def test_so_many_batches_are_read_at_a_time_and_no_more(bench: Bench) -> None:
    size = (BACKUP_READS + 2) * BACKUP_BATCH
    bench.driver.data[:] = b"\1" * size
    bench.driver.hold.add("read")
    bench.node.size = size
    bench.sink = ModelSink(size)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bench.copy(allocated(bench.job, bench.node)))
        await turns(200)
        assert bench.node.in_flight == BACKUP_READS
        bench.driver.hold.clear()
        bench.driver.held.set()

    assert bytes(bench.sink.data) == b"\1" * size


async def test_a_failed_read_waits_for_the_sink_that_is_writing(bench: Bench) -> None:
    """C2: the file is closed behind it, and its descriptor may then be another file's."""
    size = (BACKUP_READS + 2) * BACKUP_BATCH
    bench.driver.data[:] = b"\1" * size
    bench.node.size = size
    bench.sink = ModelSink(size)
    entered, go_on = threading.Event(), threading.Event()
    put = bench.sink.put

    def slow_put(items: list[tuple[int, bytes]]) -> None:
        entered.set()
        assert go_on.wait(30)
        put(items)

    bench.sink.put = slow_put  # type: ignore[method-assign]
    copying = asyncio.create_task(bench.copy(allocated(bench.job, bench.node)))
    await asyncio.to_thread(entered.wait, 30)
    bench.driver.fail["read"] = errno.EIO
    await asyncio.wait([copying], timeout=0)
    copying.cancel()
    await turns(200)
    assert not copying.done()

    go_on.set()
    with pytest.raises((IoError, asyncio.CancelledError)):
        await copying
    assert bench.sink.runs, "what had begun was put to its end"
    assert bench.job.is_idle()


async def test_what_has_been_put_is_given_up_if_wanted(bench: Bench) -> None:
    before = bytes(bench.driver.data)

    await bench.copy(allocated(bench.job, bench.node), discard=True)

    assert any(before)
    assert not any(bench.driver.data)


@pytest.mark.parametrize("verb", ["read", "block_status", "discard"])
async def test_what_has_begun_is_never_cancelled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Guests may wait for the same: for a table of an image that is being read, say."""
    bench.driver.data[:] = b"x" * SIZE
    shared: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    reached, real = asyncio.Event(), getattr(bench.driver, verb)

    async def late(*args: Any) -> object:
        reached.set()
        await shared
        return await real(*args)

    monkeypatch.setattr(bench.driver, verb, late)
    copying = asyncio.create_task(bench.copy(allocated(bench.job, bench.node), discard=True))
    await reached.wait()
    copying.cancel()
    await turns(20)
    assert not shared.cancelled()
    assert not copying.done()

    shared.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert bench.node.in_flight == 0
    assert bench.job.is_idle()
