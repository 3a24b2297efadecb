"""A new qcow2 image, written from front to back, sans I/O.

The writer is told what the disk holds, in ascending order, and yields pieces (offset in the file,
bytes) that the caller writes. Nothing is written twice and nothing is read back; the header comes
last, so that a file whose writing ended early is no image::

    writer = ImageWriter(size, backing=("full.qcow2", "qcow2"))
    for offset, piece in writer.data(0, first_clusters): ...
    for offset, piece in writer.zeroes(1 << 20, 1 << 30): ...
    for offset, piece in writer.finish(): ...

What it is not told of is the backing file's, or zero where there is none.

Layout::

    header | data, with each L2 table behind its data, each refcount block behind its clusters |
    L1 table | refcount table | the last refcount blocks

Memory: the L1 table, one L2 table, the refcount blocks that may still change (three at most), and
a host cluster of compressed data. A range of zeroes over whole L2 tables takes one L2 table for all
of them, shared as snapshots share theirs, so that 64 TiB of zeroes over a backing file stay small.

Images are of version 3 with refcounts of 16 bits, as qemu-img makes them.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import MAX_QCOW2_L1
from nbdfleece.base.units import MiB, ceil_div
from nbdfleece.formats.qcow2.header import (
    EXT_BACKING_FORMAT,
    EXT_FEATURE_NAMES,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    Header,
    encode_feature_names,
    encode_header,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Buffer = bytes | bytearray | memoryview
Piece = tuple[int, Buffer]

_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1 << 0
_SECTOR: Final = 512
_MAX_REFCOUNT: Final = 0xFFFF
_NAMES_FIT: Final = 4096  # bytes of a cluster in which there is room for names of features
_TABLE_PIECE: Final = 1 * MiB  # bytes of the last tables yielded at once


class ImageWriter:
    """Writes one image; the generators it returns have to be run to their ends, in order.

    Args:
        size: Of the disk in bytes; any.
        cluster_bits: The cluster size is 1 << this; 9 to 21.
        backing: Name of the backing file as it is to stand in the header (relative to the image's
            folder, where it is relative), and its format, so that nobody has to guess.

    Raises:
        ImageError: The disk is too large for the cluster size, or the name too long.
    """

    def __init__(
        self,
        size: int,
        *,
        cluster_bits: int = 16,
        backing: tuple[str, str] | None = None,
    ) -> None:
        assert MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS
        self.size = size
        self.cluster_size = 1 << cluster_bits
        self._bits = cluster_bits
        self._backing = backing
        self._per_l2 = self.cluster_size // 8
        self._l1 = _new_l1(size, self._per_l2 << cluster_bits)
        self._l2: array[int] | None = None  # of L1 entry number _l2_index, where it has entries
        self._l2_index = 0
        self._told = 0  # of the disk, up to here
        self._zero_l2 = 0  # cluster of the L2 table of zeroes that is being shared, or 0
        self._zero_l2_index = 0  # the first L1 entry that has it
        self._tail = bytearray()  # of compressed data, in the file's cluster _tail_cluster
        self._tail_cluster = 0
        self._counts = _Refcounts(self.cluster_size)
        self._counts.allocate(1)
        self._header(0, 0, 0)  # a name that is too long is to be known at once

    # --- the disk ----------------------------------------------------------------------------

    def data(self, offset: int, data: Buffer) -> Iterator[Piece]:
        """Yield the pieces for `data`: whole clusters, but for the end of the disk.

        The pieces are views of `data` where that can be.
        """
        view = memoryview(data).cast("B")
        self._advance(offset, len(view))
        done = 0
        while done < len(view):
            yield from self._reach(offset + done)
            index = (offset + done) >> self._bits
            first = index % self._per_l2
            count = min(ceil_div(len(view) - done, self.cluster_size), self._per_l2 - first)
            cluster = self._counts.allocate(count)
            start = cluster << self._bits | _COPIED
            stop = start + (count << self._bits)
            self._entries()[first : first + count] = array(
                "Q", range(start, stop, self.cluster_size)
            )
            piece = view[done : done + (count << self._bits)]
            yield cluster << self._bits, piece
            rest = -len(piece) % self.cluster_size
            if rest:
                yield (cluster << self._bits) + len(piece), bytes(rest)
            done += len(piece)
            yield from self._retire()

    def compressed(self, offset: int, blob: Buffer) -> Iterator[Piece]:
        """Yield the pieces for one cluster that the caller has compressed.

        Args:
            offset: Of the cluster in the disk. The last one may reach behind the end of the disk;
                what was compressed is a whole cluster all the same.
            blob: A raw deflate stream with a window of 12 bits at most, shorter than a cluster.
        """
        assert offset % self.cluster_size == 0
        assert 0 < len(blob) < self.cluster_size
        self._advance(offset, min(self.cluster_size, self.size - offset))
        yield from self._reach(offset)
        if self._tail and not self._fits_tail(len(blob)):
            yield from self._end_tail()
        if not self._tail:
            self._tail_cluster = self._counts.allocate(1, refcount=0)
        start = (self._tail_cluster << self._bits) + len(self._tail)
        self._counts.add(self._tail_cluster)
        self._tail += blob
        if len(self._tail) >= self.cluster_size:
            yield self._tail_cluster << self._bits, bytes(self._tail[: self.cluster_size])
            del self._tail[: self.cluster_size]
            if self._tail:
                self._tail_cluster = self._counts.allocate(1)
        sectors = (start + len(blob) - 1) // _SECTOR - start // _SECTOR
        entry = _COMPRESSED | sectors << (62 - (self._bits - 8)) | start
        self._entries()[(offset >> self._bits) % self._per_l2] = entry
        yield from self._retire()

    def zeroes(self, offset: int, length: int) -> Iterator[Piece]:
        """Yield the pieces for zeroes: whole clusters, but for the end of the disk.

        None where there is no backing file: what is not there reads as zeroes.
        """
        self._advance(offset, length)
        if self._backing is None:
            return
        index, stop = offset >> self._bits, ceil_div(offset + length, self.cluster_size)
        last = ceil_div(self.size, self.cluster_size)
        while index < stop:
            yield from self._reach(index << self._bits)
            first = index % self._per_l2
            count = min(stop - index, self._per_l2 - first)
            if first == 0 and (count == self._per_l2 or index + count == last):
                yield from self._share_zeroes()
            else:
                zeroes = array("Q", [_ZERO]) * count
                self._entries()[first : first + count] = zeroes
            index += count
            yield from self._retire()

    def finish(self) -> Iterator[Piece]:
        """Yield the tables, and at last the header. Nothing may follow."""
        yield from self._end_l2()
        yield from self._end_tail()
        self._zero_l2 = 0
        l1_clusters = ceil_div(len(self._l1) * 8, self.cluster_size)
        l1_at = self._counts.allocate(l1_clusters) << self._bits
        yield from _pieces(l1_at, _big_endian(self._l1), l1_clusters << self._bits)
        yield from self._retire()
        table_clusters, block_count = self._room_for_refcounts()
        table_at = self._counts.allocate(table_clusters) << self._bits
        first = self._counts.allocate(block_count)
        for index, block in enumerate(self._counts.unplaced()):
            at = (first + index) << self._bits
            yield at, _big_endian(self._counts.place(block, at))
        table = _big_endian(self._counts.table())
        yield from _pieces(table_at, table, table_clusters << self._bits)
        yield 0, self._header(l1_at, table_at, table_clusters)

    # --- L2 tables -----------------------------------------------------------------------------

    def _advance(self, offset: int, length: int) -> None:
        """Check that a range comes behind what came before, and is of whole clusters."""
        assert offset >= self._told, "the disk is told of in ascending order"
        assert offset % self.cluster_size == 0
        assert length > 0
        end = offset + length
        assert end == self.size or (end % self.cluster_size == 0 and end < self.size)
        self._told = end

    def _reach(self, offset: int) -> Iterator[Piece]:
        """Make the L2 table of `offset` the current one."""
        index = (offset >> self._bits) // self._per_l2
        if index != self._l2_index:
            yield from self._end_l2()
            self._l2_index = index

    def _entries(self) -> array[int]:
        if self._l2 is None:
            self._l2 = array("Q", [0]) * self._per_l2
        return self._l2

    def _end_l2(self) -> Iterator[Piece]:
        if self._l2 is not None:
            at = self._counts.allocate(1) << self._bits
            self._l1[self._l2_index] = at | _COPIED
            yield at, _big_endian(self._l2)
            self._l2 = None
            yield from self._retire()

    def _share_zeroes(self) -> Iterator[Piece]:
        """Have the current L1 entry share the L2 table of zeroes, a new one where that is full."""
        assert self._l2 is None
        if self._zero_l2 and self._counts.get(self._zero_l2) < _MAX_REFCOUNT:
            self._counts.add(self._zero_l2)
            self._l1[self._l2_index] = self._zero_l2 << self._bits
            self._l1[self._zero_l2_index] = self._zero_l2 << self._bits
            return
        self._zero_l2 = self._counts.allocate(1)
        self._zero_l2_index = self._l2_index
        self._l1[self._l2_index] = self._zero_l2 << self._bits | _COPIED
        yield self._zero_l2 << self._bits, _big_endian(array("Q", [_ZERO]) * self._per_l2)

    def _fits_tail(self, length: int) -> bool:
        """Tell whether a blob can go behind the compressed data, into the next cluster perhaps."""
        if self._counts.get(self._tail_cluster) == _MAX_REFCOUNT:
            return False
        is_last = self._tail_cluster == self._counts.clusters - 1
        return is_last or length <= self.cluster_size - len(self._tail)

    def _end_tail(self) -> Iterator[Piece]:
        """Yield the cluster of compressed data that is being filled, as full as it is."""
        if self._tail:
            rest = self.cluster_size - len(self._tail)
            yield self._tail_cluster << self._bits, bytes(self._tail) + bytes(rest)
            self._tail.clear()

    # --- clusters of the file --------------------------------------------------------------------

    def _retire(self) -> Iterator[Piece]:
        """Yield the refcount blocks in which nothing changes any more."""
        while True:
            pinned = {self._counts.block_of(self._counts.clusters)}
            if self._tail:
                pinned.add(self._counts.block_of(self._tail_cluster))
            if self._zero_l2:
                pinned.add(self._counts.block_of(self._zero_l2))
            block = next((each for each in self._counts.unplaced() if each not in pinned), None)
            if block is None:
                return
            at = self._counts.allocate(1) << self._bits
            yield at, _big_endian(self._counts.place(block, at))

    def _room_for_refcounts(self) -> tuple[int, int]:
        """Return how many clusters the refcount table needs, and how many blocks it still lacks.

        Both are counted by blocks themselves.
        """
        table_clusters, lacking = 1, 1
        while True:
            end = self._counts.clusters + table_clusters + lacking
            blocks = self._counts.block_of(end - 1) + 1
            found = ceil_div(blocks * 8, self.cluster_size), blocks - self._counts.placed()
            if found == (table_clusters, lacking):
                return found
            table_clusters, lacking = found

    # --- header --------------------------------------------------------------------------------

    def _header(self, l1_at: int, table_at: int, table_clusters: int) -> bytes:
        name, format_ = self._backing or (None, None)
        header = Header(
            version=3,
            cluster_bits=self._bits,
            size=self.size,
            l1_size=len(self._l1),
            l1_table_offset=l1_at,
            refcount_table_offset=table_at,
            refcount_table_clusters=table_clusters,
            backing_file=name,
        )
        if format_ is not None:
            header = header.with_extension(EXT_BACKING_FORMAT, format_.encode())
        if self.cluster_size >= _NAMES_FIT:
            header = header.with_extension(EXT_FEATURE_NAMES, encode_feature_names())
        data = encode_header(header)
        return data + bytes(self.cluster_size - len(data))


class _Refcounts:
    """How often each cluster of the file is used: in blocks of one cluster, until they are placed.

    Attributes:
        clusters: Of the file.

    Args:
        cluster_size: Of the image.
    """

    def __init__(self, cluster_size: int) -> None:
        self.clusters = 0
        self._per_block = cluster_size // 2
        self._blocks: dict[int, array[int]] = {}  # those not placed yet
        self._offsets: dict[int, int] = {}  # of those that are

    def block_of(self, cluster: int) -> int:
        """Return the number of the block that counts a cluster."""
        return cluster // self._per_block

    def allocate(self, count: int, *, refcount: int = 1) -> int:
        """Return the first of `count` new clusters in a row, at the end of the file."""
        start = first = self.clusters
        self.clusters += count
        while first < self.clusters:
            number, index = divmod(first, self._per_block)
            block = self._blocks.get(number)
            if block is None:
                assert number not in self._offsets
                block = self._blocks[number] = array("H", [0]) * self._per_block
            here = min(self.clusters - first, self._per_block - index)
            block[index : index + here] = array("H", [refcount]) * here
            first += here
        return start

    def get(self, cluster: int) -> int:
        """Return the refcount of a cluster whose block is not placed."""
        number, index = divmod(cluster, self._per_block)
        return self._blocks[number][index]

    def add(self, cluster: int) -> None:
        """Count one more use of such a cluster."""
        number, index = divmod(cluster, self._per_block)
        self._blocks[number][index] += 1

    def unplaced(self) -> list[int]:
        """Return the numbers of the blocks that are not placed, in order."""
        return sorted(self._blocks)

    def place(self, number: int, offset: int) -> array[int]:
        """Return a block, which is to be written to `offset` of the file and changes no more."""
        self._offsets[number] = offset
        return self._blocks.pop(number)

    def placed(self) -> int:
        """Return how many blocks are placed."""
        return len(self._offsets)

    def table(self) -> array[int]:
        """Return the refcount table; all blocks are placed."""
        assert not self._blocks
        return array("Q", [self._offsets[number] for number in range(len(self._offsets))])


def _new_l1(size: int, covered: int) -> array[int]:
    """Return an empty L1 table for a disk of `size` bytes, of which an entry covers so many."""
    entries = max(1, ceil_div(size, covered))
    if entries * 8 > MAX_QCOW2_L1:
        raise ImageError(f"A disk of {size} bytes needs a larger cluster size")
    return array("Q", [0]) * entries


def _big_endian(table: array[int]) -> bytes:
    if sys.byteorder == "little":
        table = table[:]
        table.byteswap()
    return table.tobytes()


def _pieces(offset: int, table: bytes, length: int) -> Iterator[Piece]:
    """Yield a table, filled up with zeroes to `length`, in pieces."""
    view = memoryview(table + bytes(length - len(table)))
    for start in range(0, length, _TABLE_PIECE):
        yield offset + start, view[start : start + _TABLE_PIECE]
