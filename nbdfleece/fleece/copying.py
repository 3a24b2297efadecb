"""Read a point in time, piece by piece, and hand it on in order.

::

    runs -> read (several at a time) -> prepare (in threads) -> put (in a thread, in order)

Nothing here blocks the loop: reading is the node's, the rest runs in threads of the backup's own,
so that a folder which hangs holds up nobody else.

Invariants
  C1  `put` gets every run once, in ascending order, and is never called twice at a time.
  C2  A piece of the job (jobs.job) is in flight while the node is read or discarded, and no longer:
      a drained section waits for no slow folder.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from nbdfleece.backup.content import CHUNK, image_size, split
from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import ZERO, clip
from nbdfleece.base.limits import BACKUP_CLUSTER, BACKUP_READS, JOB_STATUS_PIECE
from nbdfleece.base.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from concurrent.futures import Executor

    from nbdfleece.block.node import Node
    from nbdfleece.jobs.job import Job

T = TypeVar("T")


class Run(NamedTuple):
    """Clusters of the image next to each other; of data, inside one chunk."""

    offset: int
    length: int
    is_zero: bool


class Sink(Protocol[T]):
    """Where the data goes. Both may block, and raise OSError or BackupError."""

    def prepare(self, offset: int, buffer: bytearray, length: int) -> list[T]:
        """Make of a run of data what `put` takes; several threads at a time."""

    def zeroes(self, offset: int, length: int) -> list[T]:
        """The same for a run that reads as zeroes."""

    def put(self, items: list[T]) -> None:
        """Take what `prepare` and `zeroes` gave, in ascending order of runs."""


class Stopped(Exception):
    """The job is to stop."""


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
            extents = clip(await node.block_status(offset, end - offset), offset, end - offset)
        finally:
            job.end()
        found += [(one.offset, one.length) for one in extents if not one.flags & ZERO]
        offset = extents[-1].end
    return found


# --- reading -------------------------------------------------------------------------------------


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
        self._ahead: deque[tuple[Run, asyncio.Future[list[T]], bytearray | None]] = deque()

    async def run(self, runs: AsyncIterator[Run]) -> None:
        """Read and put all runs.

        Raises:
            IoError: Reading failed.
            OSError, BackupError: The sink failed.
            Stopped: The job is to stop.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                async for run in runs:
                    await self._begin(tasks, run)
                    if len(self._ahead) >= BACKUP_READS:
                        await self._put_first()
                while self._ahead:
                    await self._put_first()
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _begin(self, tasks: asyncio.TaskGroup, run: Run) -> None:
        loop = asyncio.get_running_loop()
        if run.is_zero:
            ready: asyncio.Future[list[T]] = loop.create_future()
            ready.set_result(self._sink.zeroes(run.offset, run.length))
            self._ahead.append((run, ready, None))
            return
        if not await self._job.begin(run.length):
            raise Stopped
        buffer = self._buffers.pop() if self._buffers else bytearray(CHUNK)
        task = tasks.create_task(self._read(run, buffer), name=f"job {self._job.id}: reading")
        self._ahead.append((run, task, buffer))

    async def _read(self, run: Run, buffer: bytearray) -> list[T]:
        """Read a run of a piece that has begun, and prepare it."""
        try:
            length = min(run.length, self._node.size - run.offset)
            await self._node.read(run.offset, memoryview(buffer)[:length])
        finally:
            self._job.end()
        buffer[length : run.length] = bytes(run.length - length)  # behind the disk's end
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._sink.prepare, run.offset, buffer, run.length
        )

    async def _put_first(self) -> None:
        """Put the first run, and those behind it that are ready."""
        items: list[T] = []
        taken: list[tuple[Run, bytearray | None]] = []
        while self._ahead and (not taken or self._ahead[0][1].done()):
            run, ready, buffer = self._ahead.popleft()
            items += await ready
            taken.append((run, buffer))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._sink.put, items)
        for run, buffer in taken:
            if buffer is not None:
                self._buffers.append(buffer)
                if self._discard:
                    await self._give_up(run)
            self._moved(run.offset + run.length, run.length)

    async def _give_up(self, run: Run) -> None:
        """Give up what has been put; it is for the space only."""
        if not await self._job.begin(0):
            raise Stopped
        try:
            length = min(run.length, self._node.size - run.offset)
            await self._node.discard(run.offset, length)
        except IoError:
            pass
        finally:
            self._job.end()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
