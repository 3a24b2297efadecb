"""Read a point in time, piece by piece, and hand it on in order.

::

    runs -> batches -> read (several at a time) -> prepare (in threads) -> put (in order)

Nothing here blocks the loop: reading is the node's, the rest runs in threads of the backup's own,
so that a folder which hangs holds up nobody else.

Invariants
  C1  `put` gets every run once, in ascending order, and is never called twice at a time.
  C2  When `Copy.run` has returned, nobody uses the sink any more.
  C3  A request that has begun is never cancelled: others may wait for the same as it, and a future
      that one of them cancels is cancelled for all.
  C4  A piece of the job (jobs.job) is in flight while the node is read or discarded, and no longer:
      a drained section waits for no slow folder.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from nbdfleece.backup.content import CHUNK, image_size, split
from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import ZERO, clip
from nbdfleece.base.limits import BACKUP_BATCH, BACKUP_CLUSTER, BACKUP_READS, JOB_STATUS_PIECE
from nbdfleece.base.units import KiB, align_down, align_up
from nbdfleece.block.drain import started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from concurrent.futures import Executor

    from nbdfleece.block.node import Node
    from nbdfleece.jobs.job import Job

T = TypeVar("T")

_PIECE: Final = 256 * KiB  # read at a time: from the page cache that is done in the loop
_BATCH_RUNS: Final = 64
# The data of a batch begins so far behind its buffer, which may begin 16 bytes behind a page: to
# there some processors copy from the page cache at a fifth of the speed (a MiB in 730 microseconds,
# not 150).
_LEAD: Final = 64


class Run(NamedTuple):
    """Clusters of the image next to each other; of data, inside one chunk."""

    offset: int
    length: int
    is_zero: bool


class Sink(Protocol[T]):
    """Where the data goes. Both may block, and raise OSError or BackupError."""

    def prepare(self, offset: int, buffer: bytearray, start: int, length: int) -> list[T]:
        """Make of a run of data what `put` takes; several threads at a time.

        The run is in the buffer from `start` on, and is not changed before it has been put.
        """

    def zeroes(self, offset: int, length: int) -> list[T]:
        """The same for a run that reads as zeroes."""

    def put(self, items: list[T]) -> None:
        """Take what `prepare` and `zeroes` gave, in ascending order of runs."""


class Stopped(Exception):
    """The job is to stop."""


async def to_end(future: asyncio.Future[T]) -> T:
    """Return the result of what has to run to its end: a request, or a call in a thread.

    Cancel: it waits all the same; see C3, and a descriptor that is closed below a thread may be
    another file's a moment later.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # nobody else asks
        raise cancelled
    return future.result()


# --- what is to be read --------------------------------------------------------------------------


async def allocated(job: Job, node: Node) -> AsyncIterator[Run]:
    """Yield the runs of data of a whole node; what is between them reads as zeroes.

    Raises:
        IoError: The node cannot tell.
        Stopped: The job is to stop.
    """
    for offset, length in _windows(0, node.size):
        data = await _data_in(job, node, offset, length)
        for start, end in _joined(node, data):
            for at, size in split(start, end - start):
                yield Run(at, size, is_zero=False)


async def changed(job: Job, node: Node, dirty: Iterable[tuple[int, int]]) -> AsyncIterator[Run]:
    """Yield the runs that make up what is dirty, rounded to clusters.

    Args:
        job: Whose pieces these are.
        node: What is read.
        dirty: (offset, length), ascending.

    Raises:
        IoError: The node cannot tell.
        Stopped: The job is to stop.
    """
    for start, end in _joined(node, dirty):
        if end - start <= CHUNK:  # not worth a question
            for at, size in split(start, end - start):
                yield Run(at, size, is_zero=False)
            continue
        for offset, length in _windows(start, end):
            at = offset
            asked = min(length, node.size - offset)
            for first, last in _joined(node, await _data_in(job, node, offset, asked)):
                if first > at:
                    yield Run(at, first - at, is_zero=True)
                for piece, size in split(first, last - first):
                    yield Run(piece, size, is_zero=False)
                at = last
            if at < offset + length:
                yield Run(at, offset + length - at, is_zero=True)


def _windows(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of what is looked at at once."""
    while start < end:
        stop = min(align_down(start, JOB_STATUS_PIECE) + JOB_STATUS_PIECE, end)
        yield start, stop - start
        start = stop


def _whole(node: Node, start: int, end: int) -> tuple[int, int]:
    """Round outwards to clusters; the last one ends with the image."""
    return (
        align_down(start, BACKUP_CLUSTER),
        min(align_up(end, BACKUP_CLUSTER), image_size(node.size)),
    )


def _joined(node: Node, dirty: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of whole clusters; neighbours are joined."""
    pending: tuple[int, int] | None = None
    for offset, length in dirty:
        first, last = _whole(node, offset, offset + length)
        if pending is not None and first <= pending[1]:
            pending = pending[0], max(pending[1], last)
            continue
        if pending is not None:
            yield pending
        pending = first, last
    if pending is not None:
        yield pending


async def _data_in(job: Job, node: Node, offset: int, length: int) -> list[tuple[int, int]]:
    """Return (offset, length) of what is not known to read as zeroes."""
    found: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        if not await job.begin(0):
            raise Stopped
        try:
            told = await to_end(started(node.block_status(offset, end - offset)))
            extents = clip(told, offset, end - offset)
        finally:
            job.end()
        found += [(one.offset, one.length) for one in extents if not one.flags & ZERO]
        offset = extents[-1].end
    return found


# --- reading -------------------------------------------------------------------------------------


class _Batch(NamedTuple, Generic[T]):
    """Runs that are read by one task, one behind the other into one buffer, and put together."""

    runs: list[Run]
    buffer: bytearray
    ready: asyncio.Task[list[T]]


class Copy(Generic[T]):
    """One point in time on its way to a sink.

    Args:
        job: Whose pieces these are.
        node: What is read.
        sink: Where it goes.
        executor: Threads for the sink.
        discard: Give up at the node what has been put.
        moved: Told, in ascending order, of the offset up to which all is put, and by how many bytes
            of runs that is further.
    """

    def __init__(
        self,
        job: Job,
        node: Node,
        sink: Sink[T],
        executor: Executor,
        *,
        discard: bool,
        moved: Callable[[int, int], None],
    ) -> None:
        self._job = job
        self._node = node
        self._sink = sink
        self._executor = executor
        self._discard = discard
        self._moved = moved
        self._buffers: list[bytearray] = []
        self._room = asyncio.Semaphore(BACKUP_READS)

    async def run(self, runs: AsyncIterator[Run]) -> None:
        """Read and put all runs. The sink is at rest when this returns, however it does.

        Raises:
            IoError: Reading failed.
            OSError, BackupError: The sink failed.
            Stopped: The job is to stop.
        """
        ahead: asyncio.Queue[_Batch[T] | None] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._put_all(ahead), name=f"job {self._job.id}: writing")
                async for batch in _batches(runs):
                    await self._room.acquire()
                    buffer = (
                        self._buffers.pop() if self._buffers else bytearray(_LEAD + BACKUP_BATCH)
                    )
                    task = tasks.create_task(
                        self._read(batch, buffer), name=f"job {self._job.id}: reading"
                    )
                    ahead.put_nowait(_Batch(batch, buffer, task))
                ahead.put_nowait(None)
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _read(self, runs: list[Run], buffer: bytearray) -> list[T]:
        """Read the runs of a batch, and prepare them."""
        view = memoryview(buffer)
        at = _LEAD
        for run in runs:
            if not run.is_zero:
                await self._read_run(run, view[at : at + run.length])
                at += run.length
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._prepare, runs, buffer)

    async def _read_run(self, run: Run, view: memoryview) -> None:
        """Read a run: a piece of the job."""
        if not await self._job.begin(run.length):
            raise Stopped
        try:
            length = min(run.length, self._node.size - run.offset)
            for start in range(0, length, _PIECE):
                stop = min(start + _PIECE, length)
                await to_end(started(self._node.read(run.offset + start, view[start:stop])))
                await asyncio.sleep(0)  # guests have their turn
        finally:
            self._job.end()
        view[length:] = bytes(run.length - length)  # behind the disk's end

    def _prepare(self, runs: list[Run], buffer: bytearray) -> list[T]:
        """Prepare the runs of a batch; in a thread."""
        items: list[T] = []
        at = _LEAD
        for run in runs:
            if run.is_zero:
                items += self._sink.zeroes(run.offset, run.length)
            else:
                items += self._sink.prepare(run.offset, buffer, at, run.length)
                at += run.length
        return items

    async def _put_all(self, ahead: asyncio.Queue[_Batch[T] | None]) -> None:
        """Put batch after batch; others are read and prepared meanwhile."""
        loop = asyncio.get_running_loop()
        while batch := await ahead.get():
            items = await batch.ready
            await to_end(loop.run_in_executor(self._executor, self._sink.put, items))
            self._buffers.append(batch.buffer)
            for run in batch.runs:
                if self._discard and not run.is_zero:
                    await self._give_up(run)
                self._moved(run.offset + run.length, run.length)
            self._room.release()

    async def _give_up(self, run: Run) -> None:
        """Give up what has been put; it is for the space only."""
        if not await self._job.begin(0):
            raise Stopped
        try:
            length = min(run.length, self._node.size - run.offset)
            await to_end(started(self._node.discard(run.offset, length)))
        except IoError:
            pass
        finally:
            self._job.end()


async def _batches(runs: AsyncIterator[Run]) -> AsyncIterator[list[Run]]:
    """Join runs whose data fits a buffer: small ones are not worth a thread's while."""
    batch: list[Run] = []
    room = BACKUP_BATCH
    async for run in runs:
        size = 0 if run.is_zero else run.length
        if size > room or len(batch) == _BATCH_RUNS:
            yield batch
            batch, room = [], BACKUP_BATCH
        batch.append(run)
        room -= size
    if batch:
        yield batch


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
