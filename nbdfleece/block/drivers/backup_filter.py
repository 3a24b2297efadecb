"""The filter of a backup job: copy-before-write whose copies the job makes, too.

::

    guests -> [backup filter] --file----> source
       job -------^    `-------target---> target

Guest writes are copied before they go through, as always; the job claims and copies the rest. At
the end the target holds the disk as it was when the filter went in. Nothing is kept out of the
target because it is zero, unless the target reads as zeroes by itself.

There is no access node on this filter: it goes when the job ends.

Follows: QEMU block/backup.c and block/block-copy.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import ZERO, clip, merge
from nbdfleece.base.limits import BACKUP_CLUSTER, COPY_PIECE
from nbdfleece.base.units import align_up, ceil_div
from nbdfleece.block.drivers.copy_before_write import (
    ALL_ZERO,
    DONE,
    GONE,
    MOVING,
    UNCOPIED,
    CopyBeforeWrite,
    OnCbwError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdfleece.block.bitmap import DirtyBitmap

_NOTHING: Final = (0, 0)


class SourceError(IoError):
    """What failed was reading old data, not writing it to the target."""


class BackupFilter(CopyBeforeWrite):
    """See the module.

    Args:
        on_cbw_error: What gives way when old data cannot be saved before a guest's write.
        bitmap: Copy only what is dirty here at `open`; None: everything.
    """

    def __init__(self, *, on_cbw_error: OnCbwError, bitmap: DirtyBitmap | None = None) -> None:
        super().__init__(on_cbw_error=on_cbw_error, min_cluster_size=BACKUP_CLUSTER, bitmap=bitmap)

    def has_point_in_time(self) -> bool:
        """Say no: the filter goes when its job ends."""
        return False

    @property
    def cluster(self) -> int:
        """The unit of copying, in bytes."""
        return self._cluster

    def next_unsaved(self, offset: int, limit: int) -> tuple[int, int]:
        """Return (offset, length), at most `limit`, of what nobody has copied or is copying.

        Args:
            offset: Where to look from; a border of clusters, or the end.
            limit: Bytes, whole clusters.

        Returns:
            Length 0: there is nothing from `offset` on.
        """
        count = len(self._states)
        first = self._states.find(UNCOPIED, ceil_div(offset, self._cluster), count)
        if first < 0:
            return _NOTHING
        last = self._states.run_end(first, min(count, first + limit // self._cluster))
        return self._bytes(first, last)

    async def save(self, offset: int, length: int) -> None:
        """Return when the range is in the target, or was skipped; waits for others' copies too.

        Raises:
            IoError: A copy of this call failed; what it had claimed is free again. Or the filter
                gave way to a guest's write, and what is in the target is not of the point in time.
        """
        if self.error is not None:
            raise self.error
        await self._save(*self._clusters(offset, length))
        if self.error is not None:  # it broke meanwhile: a guest's write may be in what was copied
            raise self.error

    def skip(self, offset: int, length: int) -> None:
        """Leave whole clusters inside the range out of the copy, where none has begun."""
        end = offset + length
        first = ceil_div(offset, self._cluster)
        last = len(self._states) if end == self.node.size else end // self._cluster
        if first >= last:
            return
        for start, stop, state in self._states.runs(first, last):
            if state == UNCOPIED:
                self._states.fill(start, stop, GONE)

    def not_copied(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what was to be copied and is not in the target."""
        for first, last, state in self._states.runs(0, len(self._states)):
            if state in (UNCOPIED, MOVING):
                yield self._bytes(first, last)

    def progress(self) -> tuple[int, int]:
        """Return (done, total) in bytes, whole clusters, without what was skipped."""
        states = self._states
        done = states.count(DONE) + states.count(ALL_ZERO)
        total = done + states.count(UNCOPIED) + states.count(MOVING)
        return done * self._cluster, total * self._cluster

    # --- how old data is copied ----------------------------------------------------------------

    async def _copy(self, first: int, last: int) -> None:
        """As CopyBeforeWrite._copy; but zeroes are looked up first, so that sparse stays sparse."""
        offset, length = self._bytes(first, last)
        end = offset + length
        while offset < end:
            stop, is_zero = await self._old_extent(offset, end)
            if is_zero:
                await self._settle_zeroes(offset, stop)
            else:
                await self._copy_data(offset, stop)
            offset = stop

    async def _old_extent(self, offset: int, end: int) -> tuple[int, bool]:
        """Return how far whole clusters from `offset` on are zero, or not known to be."""
        try:
            found = await self._source().block_status(offset, end - offset)
        except IoError:
            # The read will say what is wrong.
            return min(end, offset + max(COPY_PIECE, self._cluster)), False
        self._check_whole()
        extent = merge(clip(found, offset, end - offset))[0]
        if not extent.flags & ZERO:
            return min(end, align_up(extent.end, self._cluster)), False
        stop = end if extent.end == end else self._align_down(extent.end)
        if stop > offset:
            return stop, True
        return min(end, offset + self._cluster), False

    async def _read_old(self, offset: int, view: memoryview) -> None:
        try:
            await super()._read_old(offset, view)
        except IoError as error:
            raise SourceError(error.errno, error.where) from error
