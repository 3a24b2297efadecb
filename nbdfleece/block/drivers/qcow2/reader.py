"""An internal snapshot of a qcow2 node while it is read, beside a guest that writes.

Nothing has to be locked for that: what a snapshot refers to is never written, nor freed while
somebody holds the snapshot, and that goes for its own L2 tables too. They are kept here, a few at
a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent, merge
from nbdfleece.base.limits import MAX_SIZE
from nbdfleece.base.units import MiB
from nbdfleece.block.drivers.qcow2.commit import all_of, ended
from nbdfleece.block.drivers.qcow2.snapshots import read_l1
from nbdfleece.datapath.step import background
from nbdfleece.formats.qcow2 import tables as t

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Coroutine

    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.block.drivers.qcow2.snapshots import Snapshots
    from nbdfleece.formats.qcow2.snapshots import Snapshot
    from nbdfleece.formats.qcow2.tables import Entries, Run

    ReadRun = Callable[[Run, int, memoryview], Coroutine[object, None, None]]
    BackingStatus = Callable[[int, int], Awaitable[list[Extent]]]

_TABLES: Final = 1 * MiB  # bytes of L2 tables kept for one snapshot, but four tables at least
_STATUS_EXTENTS: Final = 4096  # most extents found by one call


class SnapshotReader:
    """See block.internal_snapshots.PointInTime.

    Args:
        image: Whose.
        snapshots: Where it is held, until `close`.
        snapshot: Which.
        l1: Its L1 table.
        read_run: Reads what an L2 table has told of.
        backing_status: Block status of the backing.
    """

    def __init__(
        self,
        image: Image,
        snapshots: Snapshots,
        snapshot: Snapshot,
        l1: Entries[int],
        read_run: ReadRun,
        backing_status: BackingStatus,
    ) -> None:
        self.size = image.header.size if snapshot.disk_size is None else snapshot.disk_size
        self._image: Final = image
        self._snapshots: Final = snapshots
        self._snapshot: Final = snapshot
        self._l1: Final = l1
        self._read_run: Final = read_run
        self._backing_status: Final = backing_status
        self._tables: dict[int, Entries[int]] = {}
        self._most: Final = max(4, _TABLES >> image.header.cluster_bits)

    def close(self) -> None:
        """See PointInTime.close."""
        self._snapshots.release(self._snapshot)

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Read what is one run of data in the page cache; see Driver.read_now."""
        geometry = self._image.geometry
        table = self._tables.get(offset >> geometry.span_bits)
        if table is None:
            return False
        try:
            run = t.find_run(table, geometry, offset, len(view))
        except ImageError:
            return False
        if run.length < len(view):
            return False
        if run.kind in (t.ZERO_PLAIN, t.ZERO_HOST):
            view[:] = bytes(len(view))
            return True
        data = self._image.data
        if run.kind != t.DATA or run.host + run.length > data.size:
            return False
        return data.read_now(run.host, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """See Driver.read."""
        running: list[asyncio.Future[None]] = []
        try:
            while view:
                run = await self._run(offset, len(view))
                part, view = view[: run.length], view[run.length :]
                if run.kind in (t.ZERO_PLAIN, t.ZERO_HOST):
                    part[:] = bytes(run.length)
                else:
                    running.append(background(self._read_run(run, offset, part)))
                offset += run.length
        except IoError:
            await ended(running)  # they write to a buffer of the caller
            raise
        await all_of(running)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See Driver.block_status."""
        found: list[Extent] = []
        end = offset + length
        while offset < end and len(found) < _STATUS_EXTENTS:
            run = await self._run(offset, end - offset)
            if run.kind == t.UNALLOCATED:
                found += await self._backing_status(offset, run.length)
            elif run.kind == t.ZERO_PLAIN:
                found.append(Extent(offset, run.length, HOLE | ZERO))
            else:
                found.append(Extent(offset, run.length, ZERO if run.kind == t.ZERO_HOST else DATA))
            offset = found[-1].end
        return merge(found)

    async def _run(self, offset: int, length: int) -> Run:
        """Return what the snapshot's tables say of its disk from `offset` on."""
        geometry = self._image.geometry
        try:
            table = await self._table(offset >> geometry.span_bits)
            if table is None:
                span = 1 << geometry.span_bits
                return t.Run(t.UNALLOCATED, min(length, span - offset % span), 0, False)
            return t.find_run(table, geometry, offset, length)
        except ImageError as error:
            raise self._image.damaged(error) from error

    async def _table(self, index: int) -> Entries[int] | None:
        """Return the L2 table of an L1 entry, or None where there is none.

        Raises:
            ImageError: It is in an impossible place.
            IoError: It cannot be read.
        """
        table = self._tables.get(index)
        if table is not None:
            return table
        image = self._image
        at = t.table_offset(self._l1[index], image.header.cluster_bits)
        if not at:
            return None
        if at + image.header.cluster_size > image.file.size:
            raise ImageError(f"L2 table at {at:#x} is not in the file")
        table = t.load_entries(await image.read_file(at, image.header.cluster_size))
        while len(self._tables) >= self._most:
            del self._tables[next(iter(self._tables))]
        self._tables[index] = table
        return table


async def open_reader(
    image: Image,
    snapshots: Snapshots,
    snapshot: Snapshot,
    read_run: ReadRun,
    backing_status: BackingStatus,
) -> SnapshotReader:
    """Return a reader of a snapshot that is held by the caller.

    Raises:
        CommandError: Its tables are damaged, or cannot be read.
    """
    try:
        l1 = await read_l1(image, snapshot)
    except IoError as error:
        raise CommandError(f"Could not open snapshot '{snapshot.name}': {error}") from error
    reader = SnapshotReader(image, snapshots, snapshot, l1, read_run, backing_status)
    if image.header.l1_needed(reader.size) > len(l1) or reader.size > MAX_SIZE:
        raise CommandError(f"Snapshot '{snapshot.name}' has an L1 table too small for its disk")
    return reader
