"""The job of a backup: disk by disk, read the point in time and write where it goes.

A disk that fails does not keep the others from being backed up; the job fails at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from nbdfleece.backup.content import image_size
from nbdfleece.backup.errors import BackupError
from nbdfleece.backup.files import Files
from nbdfleece.backup.manifest import Change
from nbdfleece.backup.names import Kind
from nbdfleece.backup.writing import NewImage
from nbdfleece.base.errors import CommandError, IoError, NbdfleeceError
from nbdfleece.block import permissions
from nbdfleece.fleece.copying import Copy, Stopped, allocated, changed, to_end
from nbdfleece.fleece.sinks import FileSink, StreamSink

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor, ThreadPoolExecutor
    from pathlib import Path

    from nbdfleece.backup.folder import DiskFolder
    from nbdfleece.backup.manifest import Point
    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.fleece.copying import Sink
    from nbdfleece.fleece.snapshot import Snapshot
    from nbdfleece.jobs.job import Job

T = TypeVar("T")
P = ParamSpec("P")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Part:
    """The backup of one disk.

    Attributes:
        disk: Its name.
        snapshot: The point in time.
        size: Bytes of the disk.
        bitmap: Name of the bitmap that began at the instant; empty: none.
        folder: DIR/DISK, locked; None: it goes to a stream.
        point: What will be in the manifest, as far as that is known; None: it goes to a stream.
        dirty: What an increment holds; None: all is read.
        done: Bytes that have been dealt with.
        total: Bytes to deal with.
        data_bytes: Bytes of data that were written.
        is_finished: The point is in the manifest, or the stream is complete.
        error: Why it failed, or None.
        is_broken: It failed because the snapshot broke.
    """

    disk: str
    snapshot: Snapshot
    size: int
    bitmap: str = ""
    folder: DiskFolder | None = None
    point: Point | None = None
    dirty: DirtyBitmap | None = None
    done: int = 0
    total: int = 0
    data_bytes: int = 0
    is_finished: bool = False
    error: str | None = None
    is_broken: bool = False


class Settle(Protocol):
    """What is done about a part at the end: snapshot and bitmaps."""

    async def __call__(self, part: Part) -> None:
        """Delete the snapshot; settle the bitmaps by `part.is_finished`.

        Raises:
            CommandError: It cannot be done now.
        """


class BackupWork:
    """The work of a backup job (jobs.job.Work).

    Args:
        graph: Where the snapshots are.
        parts: Disk by disk.
        stream: The FIFO of a single part without folder; None: all have folders.
        executor: Threads of this backup; they end with it.
        discard: Give up the temporary space of what has been put.
        settle: See Settle.
    """

    type = "backup"

    def __init__(
        self,
        graph: Graph,
        parts: list[Part],
        *,
        stream: Path | None,
        executor: ThreadPoolExecutor,
        discard: bool,
        settle: Settle,
    ) -> None:
        self._graph = graph
        self._parts = parts
        self._stream = stream
        self._executor = executor
        self._discard = discard
        self._settle = settle
        self._job: Job | None = None
        self._sink: StreamSink | None = None

    def hold(self, job: Job) -> None:
        """Give the job its edges, so that nobody removes the snapshots and drains reach the job.

        Raises:
            CommandError: A snapshot is gone.
        """
        self._job = job
        for part in self._parts:
            edge = self._graph.attach_root(
                part.disk,
                job,
                self._node(part),
                perm=permissions.NONE,
                shared=permissions.ALL,
            )
            edge.stays = True

    def let_go(self) -> None:
        """Take the edges away again."""
        assert self._job is not None, "the work has its job"
        for edge in list(self._job.edges):
            self._graph.detach_root(edge)

    # --- jobs.job.Work -------------------------------------------------------------------------

    async def run(self, job: Job) -> None:
        """Back up one disk after the other; see Work.run.

        Raises:
            BackupError: A disk was not backed up.
        """
        for part in self._parts:
            try:
                if self._stream is not None:
                    await self._to_stream(job, part, self._stream)
                else:
                    await self._to_folder(job, part)
            except Stopped:
                part.error = "it was cancelled"
            except (NbdfleeceError, OSError) as error:
                part.is_broken = isinstance(error, IoError) and part.snapshot.error is not None
                part.error = _reason(part, error)
                _log.error("job '%s': disk %s: %s", job.id, part.disk, part.error)
        failed = [f"{part.disk}: {part.error}" for part in self._parts if part.error is not None]
        if failed and not job.has_failed:
            raise BackupError("; ".join(failed))

    async def clean(self) -> None:
        """Settle every part; see Work.clean.

        Raises:
            CommandError: A snapshot cannot be deleted, or a bitmap settled.
        """
        self.let_go()
        failed: list[str] = []
        for part in self._parts:
            try:
                await self._settle(part)
            except CommandError as error:
                failed.append(f"{part.disk}: {error}")
        for part in self._parts:
            if part.folder is not None:
                await self._in_thread(part.folder.close)
        self._executor.shutdown(wait=False)
        if failed:
            raise BackupError("; ".join(failed))

    def progress(self) -> tuple[int, int]:
        """Return bytes that have been dealt with, and that will be."""
        return sum(part.done for part in self._parts), sum(part.total for part in self._parts)

    def hurry(self) -> None:
        """Give up a stream whose reader takes nothing."""
        if self._sink is not None:
            self._sink.stop()

    # --- one disk ------------------------------------------------------------------------------

    async def _to_folder(self, job: Job, part: Part) -> None:
        """Write the file of a part, and finish it.

        Raises:
            NbdfleeceError, OSError: It failed; the unfinished file is gone.
            Stopped: The job is to stop; likewise.
        """
        folder, point = part.folder, part.point
        assert folder is not None, "the part has its folder"
        assert point is not None, "the part has its point"
        path = folder.partial(point)
        fd = await self._in_thread(Files().create, path)
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._in_thread, os.close, fd)
            try:
                image = await self._in_thread(NewImage, fd, image_size(part.size), _backing(part))
                sink = FileSink(image, compress=point.compressed)
                await self._copy(job, part, sink)
                await self._flush(job, part)
                sha256, file_bytes = await self._in_thread(image.finish)
                part.point = replace(point, sha256=sha256, file_bytes=file_bytes)
                await self._in_thread(folder.finish, Change(part.point), fd)
                part.data_bytes = image.data_bytes
                part.is_finished = True
                part.done = part.total
            except BaseException:
                with contextlib.suppress(OSError):
                    await self._in_thread(path.unlink, missing_ok=True)
                raise

    async def _to_stream(self, job: Job, part: Part, path: Path) -> None:
        """Write the whole disk to a FIFO.

        Raises:
            NbdfleeceError, OSError: It failed.
            Stopped: The job is to stop.
        """
        self._sink = sink = StreamSink(path, part.size)
        try:
            await self._copy(job, part, sink)
            await self._in_thread(sink.finish)
            part.is_finished = True
            part.done = part.total
        finally:
            sink.close()

    async def _copy(self, job: Job, part: Part, sink: Sink[T]) -> None:
        """Read what the part holds, and put it.

        Raises:
            NbdfleeceError, OSError: Reading or putting failed.
            Stopped: The job is to stop.
        """
        node, dirty = self._node(part), part.dirty
        part.total = part.size if dirty is None else dirty.count()

        def moved(end: int, length: int) -> None:
            part.done = min(end if dirty is None else part.done + length, part.total)

        copy = Copy(job, node, sink, self._executor, discard=self._discard, moved=moved)
        if dirty is None:
            await copy.run(allocated(job, node))
        else:
            await copy.run(changed(job, node, dirty.dirty_ranges()))

    async def _flush(self, job: Job, part: Part) -> None:
        """Make the disk hold, whatever crashes, what was in it at the instant (backup, B4).

        Raises:
            IoError: It failed.
            Stopped: The job is to stop.
        """
        if not await job.begin(0):
            raise Stopped
        try:
            assert part.snapshot.filter is not None, "the job keeps the snapshot"
            await part.snapshot.filter.flush()
        finally:
            job.end()

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await in_thread(self._executor, function, *args, **kwargs)

    def _node(self, part: Part) -> Node:
        """Return the node that shows the point in time.

        Raises:
            NotFound: It is gone.
        """
        return self._graph.find(part.snapshot.node_name)


async def in_thread(
    executor: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Return what a function that blocks gives, called in a thread.

    Cancel: see copying.to_end.
    """
    loop = asyncio.get_running_loop()
    call = functools.partial(function, *args, **kwargs)
    return await to_end(loop.run_in_executor(executor, call))


def _backing(part: Part) -> str | None:
    assert part.folder is not None, "the part has its folder"
    assert part.point is not None, "the part has its point"
    if part.point.parent is None:
        return None
    below = part.folder.manifest.point(part.point.parent)
    assert below is not None, "the parent was chosen from the manifest"
    return below.file


def _reason(part: Part, error: NbdfleeceError | OSError) -> str:
    """Return why a part failed, for people."""
    if part.is_broken:
        return f"the snapshot is broken: {part.snapshot.error}"
    if isinstance(error, OSError):
        # One without a name is of an open file, which is the backup's: nodes give IoError.
        where = error.filename or (part.folder.path if part.folder is not None else None)
        return f"'{where}': {error.strerror}" if where else str(error.strerror)
    return str(error)


def kind_of(part: Part) -> str:
    """Return what a part makes: `full`, `inc` or `stream`."""
    if part.point is None:
        return "stream"
    return Kind(part.point.kind).value
