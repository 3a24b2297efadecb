"""The order in which metadata goes to disk.

A commit takes what has changed at one moment, and writes it in steps. Between two steps everything
is on stable storage, data included::

    1  refcount blocks; a moved refcount table, whole
    2  the refcount table's entries, or where the header says that it is
    3  L2 tables
    4  entries of the L1 table
    5  nothing: what the tables do not tell of any more is free from now on, in memory

Why a crash in any step, or the loss of any of the writes of one step, leaves the image whole:

- Counts go up in memory before a reference is made there (counts.py, C1), and both were taken at
  the same moment. So when step 3 makes a reference, step 1 has its count on disk. Clusters that are
  counted and not referred to are leaks, and harmless.
- Counts go down in memory in step 5, and on disk in step 1 of a later commit, when no table on disk
  refers to the cluster. Nobody is given it before.
- A block is on disk before the table tells of it (1, 2); so is an L2 table (3, 4), and the data
  (an entry changes in memory only when its data has been written; a barrier stands before step 3,
  whether or not the steps before it wrote anything).

A step with nothing to write needs no barrier behind it. A commit with nothing at all is one flush.

With lazy refcounts steps 1 and 2 are left out, until the image is closed or the cache is full: the
dirty bit has been set on disk before the first change, and whoever opens the image then counts
anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.base.errors import IoError
from nbdfleece.datapath.step import background
from nbdfleece.formats.qcow2 import header as h

if TYPE_CHECKING:
    from nbdfleece.block.drivers.qcow2.counts import Block
    from nbdfleece.block.drivers.qcow2.frees import Epoch, Free
    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.block.drivers.qcow2.tables import L2Table

Pieces = list[tuple[int, bytes]]
"""What to write: (offset, bytes)."""

_TELLS_OF_DATA: Final = 3  # the first such step
_AT_ONCE: Final = 64  # writes of one step that are under way together


class _Taken(NamedTuple):
    """What one commit writes."""

    blocks: list[tuple[Block, set[int]]]
    table_pieces: set[int]
    has_table_moved: bool
    l2_tables: list[tuple[int, L2Table, set[int]]]
    l1_pieces: set[int]
    frees: list[Free]
    epoch: Epoch
    steps: list[Pieces]


class Commit:
    """Writes the metadata of an image, one commit at a time."""

    def __init__(self, image: Image) -> None:
        self._image: Final = image
        self._begun = 0  # number of the last commit that has begun
        self._done = 0  # and of the last one that has succeeded
        self._running: asyncio.Future[None] | None = None

    def is_clean(self) -> bool:
        """Tell whether what has been written so far needs no metadata to be found again."""
        image = self._image
        return self._running is None and not image.tables.is_dirty and not image.counts.is_dirty

    async def run(self, *, with_refcounts: bool = False) -> None:
        """Return when everything that was complete at the call is on stable storage.

        Args:
            with_refcounts: Write them also where they are lazy.

        Raises:
            IoError: It is not; what was not written will be tried again by the next commit.
        """
        needed = self._begun + 1
        while self._done < needed or with_refcounts:
            if self._running is not None:
                await self._running
                continue
            self._image.check_no_doubt()
            self._begun = number = self._begun + 1
            self._running = asyncio.get_running_loop().create_future()
            try:
                await self._run(with_refcounts=with_refcounts)
                self._done = number
            finally:
                running, self._running = self._running, None
                running.set_result(None)
            await self._image.frees.settle()
            return

    async def _run(self, *, with_refcounts: bool) -> None:
        image = self._image
        taken = self._take(with_refcounts=with_refcounts)
        try:
            is_synced = False
            for number, pieces in enumerate(taken.steps, start=1):
                if not pieces:
                    continue
                if number >= _TELLS_OF_DATA and not is_synced:
                    await self._sync()
                await self._write(pieces)
                await self._sync()
                is_synced = True
            if not is_synced:
                await self._sync()
            if taken.frees:
                image.frees.gone_from_disk(taken.frees, taken.epoch)
        except BaseException:
            self._put_back(taken)
            raise
        finally:
            for block, _ in taken.blocks:
                block.busy = False
            for _, table, _ in taken.l2_tables:
                table.busy = False

    def _take(self, *, with_refcounts: bool) -> _Taken:
        """Take what has changed, in one moment."""
        image = self._image
        counts, tables, header = image.counts, image.tables, image.header
        blocks: list[tuple[Block, set[int]]] = []
        table_pieces: set[int] = set()
        has_moved = False
        first: Pieces = []
        second: Pieces = []
        if not image.lazy or with_refcounts or counts.is_full or counts.has_moved:
            for block in counts.take_dirty():
                blocks.append((block, block.dirty))
                first += [counts.dump(block, piece) for piece in sorted(block.dirty)]
                block.dirty, block.busy = set(), True
            has_moved, counts.has_moved = counts.has_moved, False
            table_pieces, counts.table_dirty = counts.table_dirty, set()
            if has_moved:
                pieces = range((len(counts.table) + 511) // 512)
                first += [counts.dump_table(piece) for piece in pieces]
                where = (header.refcount_table_offset, header.refcount_table_clusters)
                second.append((h.REFCOUNT_TABLE_AT, h.REFCOUNT_TABLE_FIELDS.pack(*where)))
            else:
                second += [counts.dump_table(piece) for piece in sorted(table_pieces)]
        l2_tables: list[tuple[int, L2Table, set[int]]] = []
        third: Pieces = []
        for index, table in tables.dirty.items():
            l2_tables.append((index, table, table.dirty))
            third += [table.dump(piece) for piece in sorted(table.dirty)]
            table.dirty, table.busy = set(), True
        tables.dirty.clear()
        l1_pieces = {index // 512 for index in tables.l1_dirty}
        tables.l1_dirty = set()
        fourth = [tables.dump_l1(piece) for piece in sorted(l1_pieces)]
        frees = image.frees.take()
        epoch = image.frees.begin_epoch() if frees else image.frees.epoch
        return _Taken(
            blocks,
            table_pieces,
            has_moved,
            l2_tables,
            l1_pieces,
            frees,
            epoch,
            [first, second, third, fourth],
        )

    def _put_back(self, taken: _Taken) -> None:
        """List everything as changed again: some of it has not been written."""
        image = self._image
        for block, pieces in taken.blocks:
            block.dirty |= pieces
            image.counts.put_back(block)
        image.counts.table_dirty |= taken.table_pieces
        image.counts.has_moved |= taken.has_table_moved
        for index, table, pieces in taken.l2_tables:
            table.dirty |= pieces
            image.tables.dirty[index] = table
        image.tables.l1_dirty |= {piece * 512 for piece in taken.l1_pieces}
        image.frees.waiting[:0] = taken.frees

    async def _write(self, pieces: Pieces) -> None:
        image = self._image
        if len(pieces) == 1:
            await image.write_file(*pieces[0])
            return
        await image.reach(max(offset + len(data) for offset, data in pieces))
        for start in range(0, len(pieces), _AT_ONCE):
            await all_of(
                [
                    background(image.write_file(offset, data))
                    for offset, data in pieces[start : start + _AT_ONCE]
                ]
            )

    async def _sync(self) -> None:
        image = self._image
        if image.header.has_data_file:
            await image.data.flush()
        await image.file.flush()


async def all_of(running: list[asyncio.Future[None]]) -> None:
    """Return when all have ended; raise the first error."""
    failed: IoError | None = None
    for each in running:
        try:
            await each
        except IoError as error:
            failed = failed or error
    if failed is not None:
        raise failed


async def ended(running: list[asyncio.Future[None]]) -> None:
    """Return when all have ended, however that was."""
    with contextlib.suppress(IoError):
        await all_of(running)
