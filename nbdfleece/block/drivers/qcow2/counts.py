"""Refcounts in memory, and the allocation of host clusters.

Invariants
  C1  A count in memory is never less than the number of references that tables in memory or on disk
      hold. It is raised before a reference is made, and lowered only when no table on disk tells of
      the cluster any more (image.py, I1).
  C2  Counts change only in code without an await.
  C3  A block that differs from disk, or is being written, stays in memory.

Where no block tells of a stretch of the file yet, all of it is free: the block is put into the
first cluster of the stretch, so that it tells of itself. The refcount table grows in the same way.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.base.limits import MAX_QCOW2_REFCOUNT_TABLE
from nbdfleece.base.units import ceil_div
from nbdfleece.formats.qcow2 import refcounts
from nbdfleece.formats.qcow2.tables import MAX_HOST, dump_entries

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.formats.qcow2.refcounts import Counts
    from nbdfleece.formats.qcow2.tables import Entries

_log: Final = logging.getLogger(__name__)

# Why a host cluster is let go of; whether its space is given back is an option for each.
REQUEST: Final = 0
SNAPSHOT: Final = 1
OTHER: Final = 2

PIECE: Final = 4096  # bytes of a block that are written at once
TABLE_PIECE: Final = 512  # numbers of the table that are written at once
_LEAST: Final = 4  # blocks in memory


class Block:
    """A refcount block.

    Attributes:
        number: Its index in the refcount table.
        counts: As in formats.qcow2.refcounts.
        offset: Where it is in the image's file.
        dirty: Numbers of pieces that differ from disk.
        busy: It is being written.
        used: It has been looked at since the last search for room.
    """

    __slots__ = ("busy", "counts", "dirty", "number", "offset", "used")

    def __init__(self, number: int, counts: Counts[int], offset: int) -> None:
        self.number = number
        self.counts = counts
        self.offset = offset
        self.dirty: set[int] = set()
        self.busy = False
        self.used = True


class RefcountCache:
    """The refcount table, and as many blocks as may be in memory.

    Args:
        image: What they belong to.
        table: The refcount table.
        size: Bytes of blocks.

    Attributes:
        table: Offsets of the blocks.
        table_dirty: Numbers of pieces that differ from disk.
        has_moved: The table lies elsewhere than the header on disk says; nothing of it is written.
        blocks: Blocks in memory, by their number.
    """

    def __init__(self, image: Image, table: Entries[int], size: int) -> None:
        self._image: Final = image
        self.table = table
        self.table_dirty: set[int] = set()
        self.has_moved = False
        self.blocks: dict[int, Block] = {}
        self._dirty: dict[int, Block] = {}
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._hint = 0  # no cluster below it is free
        self._order: Final = image.header.refcount_order
        self._bits: Final = image.header.cluster_bits
        self._block_bits: Final = refcounts.block_bits(self._bits, self._order)
        self.largest: Final = (1 << (1 << self._order)) - 1
        self.most = 0
        self.set_size(size)

    def set_size(self, size: int) -> None:
        """Set how many bytes of blocks may be in memory."""
        self.most = max(_LEAST, size >> self._bits)

    @property
    def is_dirty(self) -> bool:
        """Whether anything differs from disk."""
        return bool(self._dirty or self.table_dirty or self.has_moved)

    @property
    def is_full(self) -> bool:
        """Whether so much differs from disk that it should be written."""
        return 2 * len(self._dirty) >= self.most

    def take_dirty(self) -> list[Block]:
        """Return the blocks that differ from disk, and list them no more; for `commit`."""
        dirty, self._dirty = list(self._dirty.values()), {}
        return dirty

    def put_back(self, block: Block) -> None:
        """List a block again: it could not be written."""
        self._dirty[block.number] = block

    # --- allocating ------------------------------------------------------------------------

    async def allocate(self, wanted: int) -> tuple[int, int, bool]:
        """Take free clusters, as many in a row as `wanted` at most.

        Returns:
            (the first, how many, whether the file reads as zeroes there).

        Raises:
            IoError: There is no room, or the refcounts are damaged.
        """
        mask = (1 << self._block_bits) - 1
        while True:
            number = self._hint >> self._block_bits
            if (number + 1) << (self._block_bits + self._bits) > MAX_HOST:
                raise IoError(errno.EFBIG, f"node '{self._image.node.name}': the image is full")
            block = self._block_or_new(number)
            if block is None:
                await self._load(number)
                continue
            first, count = refcounts.free_run(block.counts, self._hint & mask, wanted)
            if count == 0:
                self._hint = (number + 1) << self._block_bits
                continue
            cluster = (number << self._block_bits) + first
            self._check_free(cluster, count)
            self._set_ones(block, first, count)
            self._hint = cluster + count
            return cluster, count, self._image.note_used(cluster, count)

    def allocate_fresh(self, count: int) -> int:
        """Take clusters in a row that read as zeroes, if memory tells of them; return the first.

        -1: ask `allocate`.

        Raises:
            IoError: The refcounts are damaged.
        """
        cluster, image = self._hint, self._image
        if cluster << self._bits < image.fresh:
            return -1
        block = self.blocks.get(cluster >> self._block_bits)
        at = cluster & ((1 << self._block_bits) - 1)
        if block is None or at + count > len(block.counts) or any(block.counts[at : at + count]):
            return -1
        self._check_free(cluster, count)
        self._set_ones(block, at, count)
        self._hint = cluster + count
        image.note_used(cluster, count)
        return cluster

    async def allocate_whole(self, count: int) -> int:
        """Take so many clusters in a row, and return the first. Only while the node is drained."""
        found = await self._find_room(count)
        for cluster in range(found, found + count):
            await self.change(cluster, 1)
        self._image.note_used(found, count)
        return found

    async def _find_room(self, count: int) -> int:
        """Return the first of so many free clusters in a row, of all of which a block tells.

        Where there is no block yet all is free. Such blocks go in front of the row: each in its own
        stretch, they would end every row that is longer than a stretch.
        """
        first, run = self._hint, 0
        missing: list[int] = []
        while run < count + len(missing):
            cluster = first + run
            if cluster << self._bits > MAX_HOST:
                raise IoError(errno.EFBIG, f"node '{self._image.node.name}': the image is full")
            number, at, part = self._parts(cluster, count + len(missing) - run)[0]
            if number >= len(self.table):
                self._grow_table(number + 1 + (count >> self._block_bits))
            if number not in self.blocks and not self.table[number]:
                run += part
                missing += [number] if number not in missing[-1:] else []
                continue
            block = await self._get(number)
            start, length = refcounts.free_run(block.counts, at, part)
            if start == at:
                run += length
            else:
                first, run, missing = (number << self._block_bits) + start, 0, []
        self._check_free(first, count + len(missing))
        for cluster, number in enumerate(missing, start=first):
            home = cluster >> self._block_bits
            if home != number:
                await self._get(home)
            self._new_block(number, cluster)
        return first + len(missing)

    def give_back(self, cluster: int, count: int) -> None:
        """Undo `allocate`, of clusters that no table has ever told of."""
        for number, at, part in self._parts(cluster, count):
            block = self.blocks.get(number)
            if block is not None:  # else it has been written, and the clusters are lost
                block.counts[at : at + part] = refcounts.zeroes(part, self._order)
                self._mark(block, at, part)
                self._hint = min(self._hint, (number << self._block_bits) + at)

    def _check_free(self, cluster: int, count: int) -> None:
        """Insist that what the refcounts call free is no metadata.

        Raises:
            IoError: It is: the refcounts are damaged.
        """
        if not self._image.metadata.isdisjoint(range(cluster, cluster + count)):
            error = ImageError(f"refcounts call metadata at {cluster << self._bits:#x} free")
            raise self._image.damaged(error)

    # --- single counts -----------------------------------------------------------------------

    async def count(self, cluster: int) -> int:
        """Return how often a cluster is used."""
        number, at = cluster >> self._block_bits, cluster & ((1 << self._block_bits) - 1)
        if number >= len(self.table) or not self.table[number]:
            return 0
        return (await self._get(number)).counts[at]

    async def change(self, cluster: int, delta: int) -> None:
        """Raise or lower the count of one cluster.

        Raises:
            IoError: It would be below 0, or too large for its width; nothing has changed.
        """
        number, at = cluster >> self._block_bits, cluster & ((1 << self._block_bits) - 1)
        block = self._block_or_new(number) or await self._get(number)
        value = block.counts[at] + delta
        if not 0 <= value <= self.largest:
            raise self._image.damaged(
                ImageError(
                    f"refcount of the cluster at {cluster << self._bits:#x} would be {value}"
                )
            )
        block.counts[at] = value
        self._mark(block, at, 1)

    async def last_references(self, cluster: int, count: int) -> list[tuple[int, int]]:
        """Return the runs (first, count) of a range whose counts are one."""
        found: list[tuple[int, int]] = []
        for number, at, part in self._parts(cluster, count):
            if number >= len(self.table) or not self.table[number]:
                continue
            counts = (await self._get(number)).counts[at : at + part]
            first = (number << self._block_bits) + at
            if counts == refcounts.ones(part, self._order):
                found.append((first, part))
            else:
                found += [(first + n, 1) for n, value in enumerate(counts) if value == 1]
        return found

    async def increase(self, cluster: int, count: int) -> None:
        """Raise counts of clusters in use by one.

        Raises:
            CommandError: One would be too large for its width. Nothing has changed.
            IoError: One is 0: the refcounts are damaged. Nothing has changed.
        """
        parts = self._parts(cluster, count)
        for number, at, part in parts:
            is_there = number < len(self.table) and self.table[number]
            counts = (await self._get(number)).counts[at : at + part] if is_there else [0]
            if min(counts) == 0:
                raise self._image.damaged(
                    ImageError(f"clusters at {cluster << self._bits:#x} are used and called free")
                )
            if max(counts) == self.largest:
                raise CommandError(f"a refcount would be larger than {self.largest}")
        for number, at, part in parts:
            block = await self._get(number)
            counts = block.counts[at : at + part]
            if counts == refcounts.ones(part, self._order):
                block.counts[at : at + part] = refcounts.from_numbers([2], 1, self._order) * part
            else:
                for n, value in enumerate(counts, start=at):
                    block.counts[n] = value + 1
            self._mark(block, at, part)

    async def decrease(self, cluster: int, count: int) -> None:
        """Lower counts by one; what reaches zero may be allocated at once."""
        for number, at, part in self._parts(cluster, count):
            if number >= len(self.table) or not self.table[number]:
                _log.warning("node '%s': freed clusters were free", self._image.node.name)
                continue
            block = await self._get(number)
            counts = block.counts[at : at + part]
            if counts == refcounts.ones(part, self._order):
                block.counts[at : at + part] = refcounts.zeroes(part, self._order)
            else:
                # Of damaged refcounts: what is free already stays so.
                for n, value in enumerate(counts, start=at):
                    block.counts[n] = max(0, value - 1)
            self._mark(block, at, part)
            self._hint = min(self._hint, (number << self._block_bits) + at)

    async def set_all(self, expected: Callable[[int], int], last: int) -> None:
        """Set every count to what it should be.

        Args:
            expected: Tells the references of a cluster; may be raised by what this needs itself.
            last: The highest cluster that has any.

        Raises:
            ImageError: A count is too large for its width, or clusters are in use of which the
                refcount table cannot tell.
        """
        if last >> self._block_bits >= len(self.table):
            raise ImageError("clusters are in use behind the end of the refcount table")
        per_block = 1 << self._block_bits
        missing: list[int] = []
        for number in range(len(self.table)):
            first = number << self._block_bits
            wanted = [expected(first + n) for n in range(per_block if first <= last else 0)]
            if max(wanted, default=0) > self.largest:
                raise ImageError("a cluster has more references than its refcount can count")
            if not self.table[number]:
                if any(wanted):
                    missing.append(number)
                continue
            block = await self._get(number)
            right = refcounts.from_numbers(wanted, per_block, self._order)
            if block.counts != right:
                block.counts = right
                self._mark(block, 0, per_block)
        self._hint = last + 1
        for number in missing:
            if number not in self.blocks:  # a block in a free cluster, perhaps of its own stretch
                home = self._hint >> self._block_bits
                if home in missing and not self.table[home]:
                    self._new_block(home, self._hint, expected)
                    self._hint += 1
                if not self.table[number]:
                    cluster, _, _ = await self.allocate(1)
                    self._new_block(number, cluster, expected)
        self._hint = 0

    def _parts(self, cluster: int, count: int) -> list[tuple[int, int, int]]:
        """Cut a range at the borders of blocks: (number, index in the block, how many)."""
        parts: list[tuple[int, int, int]] = []
        while count:
            number, at = cluster >> self._block_bits, cluster & ((1 << self._block_bits) - 1)
            part = min(count, (1 << self._block_bits) - at)
            parts.append((number, at, part))
            cluster, count = cluster + part, count - part
        return parts

    # --- blocks ----------------------------------------------------------------------------

    def _mark(self, block: Block, first: int, count: int) -> None:
        shift = self._order
        piece = (first << shift >> 3) // PIECE
        last = ((first + count - 1) << shift >> 3) // PIECE
        block.dirty.add(piece)
        if last > piece:
            block.dirty.update(range(piece + 1, last + 1))
        block.used = True
        self._dirty[block.number] = block

    def _set_ones(self, block: Block, first: int, count: int) -> None:
        block.counts[first : first + count] = refcounts.ones(count, self._order)
        self._mark(block, first, count)

    def dump(self, block: Block, piece: int) -> tuple[int, bytes]:
        """Return (offset, bytes) of a piece of a block, to be written."""
        per_piece = PIECE * 8 >> self._order
        counts = block.counts[piece * per_piece : (piece + 1) * per_piece]
        return block.offset + piece * PIECE, refcounts.dump_counts(counts, self._order)

    def dump_table(self, piece: int) -> tuple[int, bytes]:
        """Return (offset, bytes) of a piece of the table, to be written."""
        entries = self.table[piece * TABLE_PIECE : (piece + 1) * TABLE_PIECE]
        offset = self._image.header.refcount_table_offset + piece * TABLE_PIECE * 8
        return offset, dump_entries(entries)

    async def _get(self, number: int) -> Block:
        while (block := self.blocks.get(number)) is None:
            await self._load(number)
        block.used = True
        return block

    def _block_or_new(self, number: int) -> Block | None:
        """Return a block from memory, made when there is none yet; None: it must be loaded."""
        block = self.blocks.get(number)
        if block is not None:
            return block
        if number >= len(self.table):
            self._grow_table(number + 1)
            block = self.blocks.get(number)  # the new table may have needed it
            if block is not None:
                return block
        if self.table[number]:
            return None
        self._check_free(number << self._block_bits, 1)
        return self._new_block(number, number << self._block_bits)

    def _new_block(
        self, number: int, cluster: int, expected: Callable[[int], int] | None = None
    ) -> Block:
        """Make a block in a free cluster, which it may tell of itself.

        Args:
            number: Of the block.
            cluster: Where it is to be.
            expected: Tells the references of the clusters; None: there are none.
        """
        counts = refcounts.new_block(self._bits, self._order)
        if expected is not None:
            first = number << self._block_bits
            wanted = [expected(first + n) for n in range(len(counts))]
            counts = refcounts.from_numbers(wanted, len(counts), self._order)
        block = Block(number, counts, cluster << self._bits)
        self.blocks[number] = block
        self._mark(block, 0, len(block.counts))
        self.table[number] = block.offset
        self.table_dirty.add(number // TABLE_PIECE)
        self._image.metadata.add(cluster)
        home = cluster >> self._block_bits
        self._set_ones(self.blocks[home], cluster & ((1 << self._block_bits) - 1), 1)
        self._image.note_used(cluster, 1)
        return block

    def _grow_table(self, least: int) -> None:
        """Move the table to a larger place behind everything that the old one could tell of.

        Raises:
            IoError: It would be too large.
        """
        image, per_block = self._image, 1 << self._block_bits
        first_number = len(self.table)
        wanted = max(least, first_number * 3 // 2)
        start = first_number << self._block_bits
        blocks = 1
        while True:  # blocks and table tell of each other
            table_clusters = ceil_div(max(wanted, first_number + blocks) * 8, 1 << self._bits)
            need = ceil_div(blocks + table_clusters, per_block)
            if need <= blocks:
                break
            blocks = need
        if table_clusters << self._bits > MAX_QCOW2_REFCOUNT_TABLE:
            raise IoError(errno.EFBIG, f"node '{image.node.name}': the refcount table is full")
        self._check_free(start, blocks + table_clusters)
        old, header = self.table, image.header
        entries = (table_clusters << self._bits) // 8
        self.table = array("Q", old) + array("Q", bytes(8 * (entries - len(old))))
        self.has_moved = True
        for number in range(blocks):
            offset = (start + number) << self._bits
            counts = refcounts.new_block(self._bits, self._order)
            block = Block(first_number + number, counts, offset)
            self.blocks[first_number + number] = block
            self._mark(block, 0, len(block.counts))
            self.table[first_number + number] = offset
        for cluster in range(start, start + blocks + table_clusters):
            number = cluster >> self._block_bits
            self._set_ones(self.blocks[number], cluster & (per_block - 1), 1)
            image.metadata.add(cluster)
        image.note_used(start, blocks + table_clusters)
        old_length = header.refcount_table_clusters << self._bits
        image.forget_metadata(header.refcount_table_offset, old_length)
        image.frees.add(header.refcount_table_offset, old_length, OTHER)
        image.header = replace(
            header,
            refcount_table_offset=(start + blocks) << self._bits,
            refcount_table_clusters=table_clusters,
        )

    async def _load(self, number: int) -> None:
        loading = self._loading.get(number)
        if loading is not None:
            await loading
            return
        image = self._image
        self._loading[number] = loading = asyncio.get_running_loop().create_future()
        try:
            while len(self.blocks) >= self.most:
                if not self._forget_one():
                    await image.commit.run(with_refcounts=True)
            offset = self.table[number]
            if offset & ((1 << self._bits) - 1) or offset >= MAX_HOST:
                raise image.damaged(ImageError(f"refcount block at {offset:#x} cannot be"))
            if offset >> self._bits in image.metadata:
                raise image.damaged(ImageError(f"refcount block at {offset:#x} is something else"))
            if offset + (1 << self._bits) > image.file.size:
                raise image.damaged(
                    ImageError(f"refcount block at {offset:#x} is behind the end of the file")
                )
            data = await image.read_file(offset, 1 << self._bits)
            self.blocks[number] = Block(number, refcounts.load_counts(data, self._order), offset)
            image.metadata.add(offset >> self._bits)
        finally:
            del self._loading[number]
            loading.set_result(None)

    def _forget_one(self) -> bool:
        """Forget a block that has not been used for a while; False: all differ from disk."""
        candidate = -1
        for number, block in self.blocks.items():
            if block.dirty or block.busy:
                continue
            candidate = number
            if not block.used:
                break
            block.used = False
        if candidate < 0:
            return False
        self._image.metadata.discard(self.blocks.pop(candidate).offset >> self._bits)
        return True
