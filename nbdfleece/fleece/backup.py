"""Backups of disks into folders: all disks at one instant, as a job.

::

    lock the folders -> snapshots, and a new bitmap, at one instant -> choose per disk: increment or
    full -> job: read the snapshots, write the files, finish them -> delete the snapshots, settle
    the bitmaps

A bitmap is named after the point whose instant it began at, and the manifest says that name. So it
is there exactly when all that changed since that point is known, whatever crashed in between:

Invariants
  B1  At the instant of a backup a new bitmap is started, named after the point to be. It stays if
      the point is finished; else it goes, and that of the last point has never stopped recording.
  B2  An increment holds all that was dirty in the bitmap of its parent. That is looked up behind
      the instant while it goes on recording: it may hold a little more, and never less.
  B3  The old bitmap is removed only when the manifest has the new point.
  B4  A point is finished only when its disk has been flushed behind the instant. A crash may take
      back writes that nobody has flushed; what the point holds and no bitmap knows any more must
      not be among them, or the next increment would lack what it was taken back to.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.backup.errors import BackupError
from nbdfleece.backup.folder import DiskFolder, folder_id
from nbdfleece.backup.manifest import Point
from nbdfleece.backup.names import Kind, point_name
from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import BACKUP_THREADS, MAX_BACKUP_RUNS
from nbdfleece.fleece.backup_bitmaps import bitmap_prefix, forget_bitmap, make_bitmap
from nbdfleece.fleece.backup_plan import Base, choose_base, damage_of
from nbdfleece.fleece.backup_work import BackupWork, Part, in_thread
from nbdfleece.fleece.errors import DiskNotFound, SnapshotNotFound
from nbdfleece.fleece.snapshot import SnapshotOptions
from nbdfleece.jobs.job import Job, Status, check_speed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.graph import Graph
    from nbdfleece.fleece.disk import Disk
    from nbdfleece.fleece.fleece import Fleece
    from nbdfleece.fleece.snapshot import Snapshot
    from nbdfleece.jobs.job import JobOptions
    from nbdfleece.jobs.manager import JobManager

_log = logging.getLogger(__name__)

_FOLDER_ID_BYTES: Final = 4
_POINT_ID_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What is asked for.

    Attributes:
        disks: Names of disks.
        folder: DIR, absolute; None: `stream`.
        stream: A FIFO that somebody reads, for the raw content of one disk; None: `folder`.
        full: Make full files.
        compress: Compress the data.
        discard: Give up the temporary space of what has been read.
    """

    disks: tuple[str, ...]
    folder: Path | None
    stream: Path | None = None
    full: bool = False
    compress: bool = False
    discard: bool = False

    def check(self) -> None:
        """Check what can be checked without the disks.

        Raises:
            CommandError: It makes no sense.
        """
        if not self.disks:
            raise CommandError("no disk is named")
        if len(set(self.disks)) < len(self.disks):
            raise CommandError("a disk is named twice")
        if (self.folder is None) is (self.stream is None):
            raise CommandError("a backup goes either to a folder or to a stream")
        if self.stream is not None and len(self.disks) > 1:
            raise CommandError("only one disk can go to a stream")
        place = self.folder or self.stream
        assert place is not None, "one of both"
        if not place.is_absolute():
            raise CommandError(f"'{place}' is no absolute path")


@dataclass(slots=True)
class BackupRun:
    """One backup of some disks, while it runs and after that.

    Attributes:
        job: Its job.
        instant: RFC 3339, UTC.
        parts: Disk by disk.
    """

    job: Job
    instant: str
    parts: list[Part]

    @property
    def state(self) -> str:
        """`running`, `done`, `failed` or `cancelled`."""
        if self.job.status not in (Status.CONCLUDED, Status.NULL):
            return "running"
        if self.job.is_cancelled:
            return "cancelled"
        return "done" if self.job.error is None else "failed"


class Backups:
    """All backups that run, and the last ones that have ended.

    Args:
        fleece: The disks.
        graph: Their nodes.
        jobs: Where the jobs go.

    Attributes:
        runs: The newest last.
    """

    def __init__(self, fleece: Fleece, graph: Graph, jobs: JobManager) -> None:
        self.runs: deque[BackupRun] = deque(maxlen=MAX_BACKUP_RUNS)
        self._fleece = fleece
        self._graph = graph
        self._jobs = jobs

    async def start(self, options: BackupOptions, job_options: JobOptions) -> BackupRun:
        """Take the instant, and start to copy.

        Returns:
            The backup, running.

        Raises:
            CommandError: It cannot be. Nothing has changed.

        Cancel: undone.
        """
        options.check()
        self._jobs.check_id(job_options.id)
        check_speed(job_options.speed)
        for disk in options.disks:
            self._fleece.disk(disk)
        executor = ThreadPoolExecutor(BACKUP_THREADS, thread_name_prefix=job_options.id)
        opened: list[_Opened] = []
        try:
            if options.folder is not None:
                await in_thread(executor, _open, options, options.folder, opened)
            run = await self._begin(options, job_options, executor, opened)
        except BaseException:
            for one in opened:
                await in_thread(executor, one.folder.close)
            executor.shutdown(wait=False)
            raise
        self.runs.append(run)
        return run

    async def _begin(
        self,
        options: BackupOptions,
        job_options: JobOptions,
        executor: ThreadPoolExecutor,
        opened: list[_Opened],
    ) -> BackupRun:
        """Take the instant and make the job; the caller closes what it has opened.

        Raises:
            CommandError: It cannot be. There are no snapshots, and no new bitmap.
        """
        bitmap = ""
        if opened:
            token = secrets.token_hex(_POINT_ID_BYTES)
            bitmap = bitmap_prefix(opened[0].folder.manifest.folder_id) + token
        parts = [
            Part(snapshot.disk, snapshot, snapshot.size, self._started(snapshot, bitmap))
            for snapshot in await self._take(options.disks, bitmap)
        ]
        try:
            self._jobs.check_id(job_options.id)  # the world may have changed meanwhile
            for part, one in zip(parts, opened, strict=bool(opened)):
                part.folder = one.folder
                self._choose(part, one, options)
            work = BackupWork(
                self._graph,
                parts,
                stream=options.stream,
                executor=executor,
                discard=options.discard,
                settle=self._settle,
            )
            job = Job(job_options, work, self._jobs.news)
            try:
                work.hold(job)
            except CommandError:
                work.let_go()
                raise
        except BaseException:
            for part in parts:
                await self._settle(part)
            raise
        self._jobs.add(job)
        self._jobs.start(job)
        return BackupRun(job, parts[0].snapshot.instant, parts)

    def _choose(self, part: Part, opened: _Opened, options: BackupOptions) -> None:
        """Decide between increment and full; no await stands between this and B2.

        Raises:
            BackupError: The clock stands before the newest point.
        """
        node, folder = self._fleece.disk(part.disk).node, opened.folder
        base = choose_base(
            folder,
            node,
            part.size,
            damage=opened.damage,
            full=options.full,
            is_in_place=bool(part.bitmap),
        )
        name = point_name(part.snapshot.instant, opened.names)
        newest = folder.manifest.newest
        if newest is not None and name <= newest.name:
            raise BackupError(
                f"the clock says {name}, which is before the newest point in '{folder.path}', "
                f"{newest.name}"
            )
        is_full = not isinstance(base, Base)
        part.point = Point(
            name=name,
            instant=part.snapshot.instant,
            kind=Kind.FULL if is_full else Kind.INCREMENT,
            parent=base.point.name if isinstance(base, Base) else None,
            size=part.size,
            file_bytes=0,
            sha256="",
            bitmap=part.bitmap,
            reason="" if isinstance(base, Base) else base,
            compressed=options.compress,
        )
        part.dirty = base.dirty if isinstance(base, Base) else None
        why = f" (full: {part.point.reason})" if part.point.reason else ""
        _log.info("disk %s: backup to '%s' begins%s", part.disk, part.point.file, why)

    async def _settle(self, part: Part) -> None:
        """See backup_work.Settle."""
        with contextlib.suppress(SnapshotNotFound, DiskNotFound):  # the disk has gone, with both
            await self._fleece.delete_snapshot(part.disk, part.snapshot.name, force=True)
            disk = self._fleece.disk(part.disk)
            for bitmap in list(disk.node.bitmaps.values()):
                if self._is_needless(part, bitmap.name):
                    await forget_bitmap(disk, bitmap)

    @staticmethod
    def _is_needless(part: Part, bitmap: str) -> bool:
        """Tell whether a bitmap is of no use, now that a part has ended (B1, B3)."""
        if not part.is_finished or part.folder is None:
            return bitmap == part.bitmap
        # Those of earlier points, and of attempts that ended with the daemon.
        mine = bitmap_prefix(part.folder.manifest.folder_id)
        return bitmap.startswith(mine) and bitmap != part.bitmap

    def _started(self, snapshot: Snapshot, bitmap: str) -> str:
        """Return the name of the bitmap that `_take` has started for a snapshot; empty: none."""
        return bitmap if bitmap in self._fleece.disk(snapshot.disk).node.bitmaps else ""

    async def _take(self, disks: Sequence[str], bitmap: str) -> list[Snapshot]:
        """Take the instant of some disks, and start a bitmap at it; an empty name: none.

        None is started where it would not know of what the guest writes (Disk.is_in_place).

        Raises:
            CommandError: It cannot be done. Nothing has changed.
        """
        async with self._fleece.changing:
            taking = self._fleece.take(disks, None, SnapshotOptions())
            made: list[tuple[Disk, DirtyBitmap]] = []
            try:
                for disk in taking.group if bitmap else ():
                    new = await make_bitmap(disk, bitmap)
                    made.append((disk, new))
                await taking.prepare()
                async with taking.quiet():
                    await taking.engage()
                    for disk, new in made:
                        if disk.is_in_place:
                            disk.node.bitmaps[new.name] = new
                await taking.expose()
                await taking.keep()
                for disk, new in made:
                    if new.name not in disk.node.bitmaps:
                        await forget_bitmap(disk, new)
            except BaseException:
                await taking.discard()
                for disk, new in made:
                    await forget_bitmap(disk, new)
                raise
            self._fleece.adopt(taking)
            return taking.made


@dataclass(frozen=True, slots=True)
class _Opened:
    """A folder of a disk.

    Attributes:
        folder: It, locked.
        damage: What is wrong with the files of the newest point, or None.
        names: Names of points, of which there are files or which the manifest says.
    """

    folder: DiskFolder
    damage: str | None
    names: frozenset[str]


def _open(options: BackupOptions, path: Path, opened: list[_Opened]) -> None:
    """Lock the folders of all disks, and look at what is there; blocks.

    Raises:
        CommandError: One cannot be had; `opened` are those that could.
    """
    known = folder_id(path) or secrets.token_hex(_FOLDER_ID_BYTES)
    for disk in options.disks:
        folder = DiskFolder(path / disk, for_change=True)
        try:
            if folder.is_new:
                folder.start(known)
            folder.check_room()
            names = {point.name for point in folder.manifest.points}
            names |= {file.partition(".")[0] for file in folder.present()}
            opened.append(_Opened(folder, damage_of(folder), frozenset(names)))
        except BaseException:
            folder.close()
            raise
