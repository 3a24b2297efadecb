"""Backup: the disk as it is when the job starts, copied to another node while guests go on.

::

    before:  guests -> source          during:  guests -> [backup filter] -> source
                                                                 `--------> target

The instant is the drained section in which the filter goes in. From then on a guest's write first
saves what it overwrites to the target; the job copies all the rest (`full`), what the top layer
holds (`top`), or nothing (`none`: then the target holds what has been overwritten since).

Invariants
  B1  The filter is in the graph from the creation of the job until its `clean`, under all parents
      that the source had, and those that came meanwhile.
  B2  A job that ends without an error has the disk of its instant in the target (sync full), on
      stable storage.
  B3  Every refusal comes before the first change, or undoes it.
  B4  A bitmap is frozen from the instant until `clean`. Then it holds what has changed since the
      instant, and whatever else the target does not have; see `_settle_bitmap`.

Follows: QEMU block/backup.c and blockdev.c (do_backup_common); fleecing.md 2.3.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse, IoError, NotFound
from nbdfleece.base.limits import (
    BACKUP_CLUSTER,
    COPY_PIECE,
    JOB_CANCEL_GRACE_S,
    JOB_RETRY_S,
    JOB_STATUS_PIECE,
    JOB_WORKERS,
)
from nbdfleece.base.units import align_down
from nbdfleece.block import permissions
from nbdfleece.block.bitmap import abdicate, find_bitmap, freeze, reclaim
from nbdfleece.block.child import Role
from nbdfleece.block.drain import quiet
from nbdfleece.block.drivers.backup_filter import BackupFilter, SourceError
from nbdfleece.block.drivers.copy_before_write import OnCbwError
from nbdfleece.jobs.job import Job, JobOptions, OnError, check_speed

if TYPE_CHECKING:
    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.jobs.group import JobGroup
    from nbdfleece.jobs.manager import JobManager

_log = logging.getLogger(__name__)

_INT_MAX: Final = (1 << 31) - 1


class Sync(enum.Enum):
    """What is copied; values as in QMP."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


_BY_BITMAP: Final = frozenset({Sync.INCREMENTAL, Sync.BITMAP})


class BitmapMode(enum.Enum):
    """What becomes of the bitmap at the end; values as in QMP."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What blockdev-backup is told.

    Attributes:
        device: Node to copy.
        target: Node to copy to.
        sync: What is copied.
        bitmap: Name of a bitmap of the source.
        bitmap_mode: See BitmapMode.
        compress: Write compressed.
        on_source_error: What a failed read does.
        on_target_error: What a failed write does.
        filter_node_name: Name of the filter; None: a private one.
        on_cbw_error: What gives way when old data cannot be saved before a guest's write:
            `break-guest-write`, or `break-snapshot`; then the job fails.
        max_workers: Pieces in flight.
        max_chunk: Bytes of a piece; 0: no limit of the user's.
        discard_source: Give up at the source what has been copied.
    """

    device: str
    target: str
    sync: Sync
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    compress: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    on_cbw_error: str = "break-guest-write"
    max_workers: int = 64
    max_chunk: int = 0
    discard_source: bool = False


def check_backup(graph: Graph, jobs: JobManager, options: BackupOptions) -> tuple[Node, Node]:
    """Check all that can be checked without a change; return source and target.

    Raises:
        CommandError: What is wrong.
    """
    source, target = _find(graph, options.device), _find(graph, options.target)
    _check_bitmap(source, options)
    if source is target:
        raise CommandError("Source and target cannot be the same")
    if options.compress:  # no driver of ours can write compressed
        raise CommandError("Compression is not supported for this drive")
    jobs.check_not_busy(source)
    jobs.check_not_busy(target)
    if not 1 <= options.max_workers <= _INT_MAX:
        raise CommandError(f"max-workers must be between 1 and {_INT_MAX}")
    if options.max_chunk < 0:
        raise CommandError("max-chunk must be zero (which means no limit) or positive")
    if source.size != target.size:
        raise CommandError("Source and target image have different sizes")
    if options.filter_node_name is not None:
        try:
            graph.check_new_name(options.filter_node_name)
        except CommandError as error:
            raise CommandError(f"Could not create node: {error}") from error
    cluster = max(BACKUP_CLUSTER, target.driver.cluster_size())
    if 0 < options.max_chunk < cluster:
        raise CommandError(
            f"Required max-chunk ({options.max_chunk}) is less than backup cluster size ({cluster})"
        )
    if options.discard_source and not source.driver.stays_at_node:
        # A guest's write between the copy of a cluster and its discard would be lost.
        raise CommandError("discard-source needs a snapshot-access node for a source")
    return source, target


async def prepare_backup(
    graph: Graph,
    jobs: JobManager,
    options: BackupOptions,
    job_options: JobOptions,
    group: JobGroup | None = None,
) -> Job:
    """Make a job and put its filter in; source and target are drained by the caller.

    The job's point in time is that of the drained section. `jobs.start` or `Job.abandon` follows.

    Raises:
        CommandError: It cannot be. The graph is unchanged, and there is no job.
    """
    source, target = check_backup(graph, jobs, options)
    if not (source.is_drained and target.is_drained):
        raise InUse(f"Node '{options.device}' or '{options.target}' has just been replaced")
    jobs.check_id(job_options.id)
    check_speed(job_options.speed)
    bitmap = None if options.bitmap is None else find_bitmap(source, options.bitmap)
    driver = BackupFilter(
        on_cbw_error=OnCbwError(options.on_cbw_error),
        bitmap=bitmap if options.sync in _BY_BITMAP else None,
    )
    node = await graph.add(
        options.filter_node_name,
        driver,
        {"file": (source, Role.FILTERED | Role.PRIMARY), "target": (target, Role.DATA)},
        read_only=source.read_only,
        discard_enabled=True,
    )
    work = Backup(graph, options, node, driver)
    job = Job(job_options, work, jobs.news, group)
    try:
        # The world may have changed while the filter was made.
        jobs.check_id(job_options.id)
        _check_bitmap(source, options)
        graph.insert_filter(node)
        try:
            work.hold(job)
        except CommandError:
            work.let_go()
            graph.remove_filter(node)
            raise
    except CommandError:
        await graph.remove(node)
        raise
    if bitmap is not None:
        work.freeze(source, bitmap)
    node.is_implicit = options.filter_node_name is None
    jobs.add(job)
    return job


class Backup:
    """The work of a backup job (jobs.job.Work).

    Args:
        graph: Where the filter is.
        options: What the user said.
        node: The filter.
        driver: Its driver.
    """

    type = "backup"

    def __init__(
        self, graph: Graph, options: BackupOptions, node: Node, driver: BackupFilter
    ) -> None:
        self._graph = graph
        self._options = options
        self._node = node
        self._driver = driver
        self._target = node.child("target").node
        self._job: Job | None = None
        self._bitmap: tuple[Node, DirtyBitmap] | None = None
        self._has_run = False
        self._last_progress: tuple[int, int] | None = None  # when `clean` was first held up
        self._cursor = 0  # where to look for the next piece

    def hold(self, job: Job) -> None:
        """Give the job its edges, so that nobody removes the nodes and drains reach the job.

        Raises:
            CommandError: The permissions conflict.
        """
        self._job = job
        for name, node in (("main node", self._node), ("target", self._target)):
            edge = self._graph.attach_root(
                name, job, node, perm=permissions.NONE, shared=permissions.ALL
            )
            edge.stays = True

    def freeze(self, source: Node, bitmap: DirtyBitmap) -> None:
        """Have the successor of a bitmap of the source record from now on (B4)."""
        freeze(source.bitmaps, bitmap)
        self._bitmap = source, bitmap

    def let_go(self) -> None:
        """Take the edges away again."""
        assert self._job is not None, "the work has its job"
        for edge in list(self._job.edges):
            self._graph.detach_root(edge)

    # --- jobs.job.Work -------------------------------------------------------------------------

    async def run(self, job: Job) -> None:
        """Copy; see Work.run.

        Raises:
            IoError: The filter gave way to a guest, or the target could not be flushed.
        """
        self._has_run = True
        unsubscribe = self._driver.broken.subscribe(job.fail)
        try:
            if self._options.sync is Sync.NONE:
                await job.wait_cancelled()
                return
            if self._options.sync is Sync.TOP and not await self._skip_lower_layers(job):
                return
            await self._copy_all(job)
        finally:
            unsubscribe()

    async def clean(self) -> None:
        """Take the filter out; see Work.clean.

        While requests are stuck the filter stays, and the job does not conclude; guests go on.

        Raises:
            CommandError: Parents of the filter cannot be given the source. Then the filter stays,
                in the hands of the monitor.
        """
        self._settle_bitmap()
        assert self._job is not None, "the work has its job"
        if self._job.is_abandoned and self._node.is_drained and self._target.is_drained:
            self._driver.forget_beginning()
        while not await self._take_filter_out():
            pass
        await self._graph.remove(self._node)

    async def _take_filter_out(self) -> bool:
        """Take the filter out of the graph; False: not this time.

        Raises:
            CommandError: See `clean`.
        """
        node = self._node
        edge = node.file
        assert edge is not None, "the filter has its source"
        below = edge.node
        async with contextlib.AsyncExitStack() as section:
            try:
                await section.enter_async_context(quiet(node, below, self._target))
            except CommandError as error:
                self._held_up(error)
                return False
            if edge.node is not below:
                return False  # another filter went in between, or left
            self.let_go()
            try:
                self._graph.remove_filter(node)
            except CommandError:
                node.owned_by_monitor = True
                raise
        return True

    def _held_up(self, error: CommandError) -> None:
        """Have guests save nothing any more for a job that is over, while its filter stays."""
        assert self._job is not None, "the work has its job"
        if self._last_progress is None:
            self._last_progress = self._driver.progress()
            _log.warning("job '%s': its filter stays for now: %s", self._job.id, error)
        self._driver.skip(0, self._node.size)
        if self._job.has_failed and any(self._driver.not_copied()):  # copies that are on their way
            self._yank_target()

    def _settle_bitmap(self) -> None:
        """Have the bitmap hold what it should, by mode and end (fleecing.md 2.2).

        ::

                        it went well              it did not
            on-success  changed since             old and changed since
            always      changed since             changed since, and not copied
            never       old and changed since     old and changed since
        """
        if self._bitmap is None:
            return
        assert self._job is not None, "the work has its job"
        source, bitmap = self._bitmap
        self._bitmap = None
        mode, has_failed = self._options.bitmap_mode, self._job.has_failed
        is_synced = mode is BitmapMode.ALWAYS or (mode is not BitmapMode.NEVER and not has_failed)
        if not (is_synced and self._has_run):
            reclaim(source.bitmaps, bitmap)
            return
        abdicate(source.bitmaps, bitmap, also=self._driver.not_copied() if has_failed else ())

    def progress(self) -> tuple[int, int]:
        """Return what is in the target, and what will be."""
        return self._last_progress or self._driver.progress()

    def hurry(self) -> None:
        """Let go, after a while, of a target that may never answer."""
        asyncio.get_running_loop().call_later(JOB_CANCEL_GRACE_S, self._yank)

    def _yank(self) -> None:
        assert self._job is not None, "the work has its job"
        if not self._job.is_idle():
            self._yank_target()

    def _yank_target(self) -> None:
        for node in permissions.topological([self._target]):
            node.driver.yank()

    # --- copying -------------------------------------------------------------------------------

    async def _copy_all(self, job: Job) -> None:
        """Copy what is neither copied nor skipped, with several workers.

        Raises:
            IoError: The target could not be flushed.
        """
        workers = min(self._options.max_workers, JOB_WORKERS)
        while self._driver.next_unsaved(0, self._chunk)[1] and not job.has_failed:
            self._cursor = 0
            # Again for what a guest's write tried to copy, and could not.
            async with asyncio.TaskGroup() as tasks:
                for _ in range(workers):
                    tasks.create_task(self._copy_pieces(job), name=f"job {job.id}: copying")
        # The last copies may be those of guests' writes: wait for them.
        everything = await self._copy_piece(job, 0, self._node.size, is_last=True)
        if everything and await job.begin(0):
            try:
                await self._target.flush()
            finally:
                job.end()

    async def _copy_pieces(self, job: Job) -> None:
        while not job.has_failed:
            offset, length = self._driver.next_unsaved(self._cursor, self._chunk)
            if not length:
                return
            self._cursor = offset + length
            if not await self._copy_piece(job, offset, length):
                return

    async def _copy_piece(
        self, job: Job, offset: int, length: int, *, is_last: bool = False
    ) -> bool:
        """Copy a range, again and again if the user wants that; False: the job is to stop.

        `is_last` is for the look at the whole disk, where next to nothing is left to copy.
        """
        while await job.begin(0 if is_last else length):
            try:
                await self._driver.save(offset, length)
                if self._options.discard_source and not is_last:
                    await self._discard_at_source(offset, length)
            except SourceError as error:
                job.piece_failed(error, self._options.on_source_error, is_read=True)
            except IoError as error:
                if error is self._driver.error:  # no use trying again
                    job.fail(error)
                    return False
                job.piece_failed(error, self._options.on_target_error, is_read=False)
            else:
                return True
            finally:
                job.end()
            if not job.has_failed:
                await job.rest(JOB_RETRY_S)
        return False

    async def _discard_at_source(self, offset: int, length: int) -> None:
        edge = self._node.file
        assert edge is not None, "the filter has its source"
        with contextlib.suppress(IoError):  # it is for the space only
            await edge.node.discard(offset, length)

    async def _skip_lower_layers(self, job: Job) -> bool:
        """Leave out what the top layer of the source does not hold; False: the job is to stop."""
        edge = self._node.file
        assert edge is not None, "the filter has its source"
        offset, size = 0, self._node.size
        while offset < size:
            length = min(JOB_STATUS_PIECE, size - offset)
            if not await job.begin(0):
                return False
            try:
                found = await edge.node.allocation_depth(offset, length)
            except IoError as error:
                job.piece_failed(error, self._options.on_source_error, is_read=True)
                continue
            finally:
                job.end()
            for extent in found:
                if extent.flags != 1:
                    self._driver.skip(extent.offset, min(extent.end, size) - extent.offset)
            offset = max(found[-1].end, offset + 1)
        return True

    @property
    def _chunk(self) -> int:
        """Bytes of a piece: whole clusters, at most what is copied at once."""
        cluster = self._driver.cluster
        return max(
            cluster, align_down(min(self._options.max_chunk or COPY_PIECE, COPY_PIECE), cluster)
        )


def _find(graph: Graph, name: str) -> Node:
    """Return a node.

    Raises:
        NotFound: There is none.
    """
    node = graph.get(name)
    if node is None:
        raise NotFound(f"Cannot find device='{name}' nor node-name='{name}'")
    return node


def _check_bitmap(source: Node, options: BackupOptions) -> None:
    """Check what is said of bitmaps.

    Raises:
        CommandError: What is wrong.
    """
    sync, mode = options.sync, options.bitmap_mode
    if options.bitmap is None:
        if sync in _BY_BITMAP:
            raise CommandError(f"must provide a valid bitmap name for '{sync.value}' sync mode")
        if mode is not None:
            raise CommandError("Cannot specify bitmap sync mode without a bitmap")
        return
    if sync is Sync.INCREMENTAL and mode not in (None, BitmapMode.ON_SUCCESS):
        raise CommandError(
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
        )
    try:
        bitmap = find_bitmap(source, options.bitmap)
    except NotFound as error:
        raise NotFound(f"Bitmap '{options.bitmap}' could not be found") from error
    if mode is None and sync is not Sync.INCREMENTAL:
        raise CommandError("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check_usable(to_change=mode is not BitmapMode.NEVER)
    if sync is Sync.NONE:
        raise CommandError("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode is BitmapMode.NEVER and sync not in _BY_BITMAP:
        raise CommandError(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode "
            f"'{sync.value}'"
        )
