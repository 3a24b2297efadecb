"""L1 and L2 tables in memory.

Invariants
  T1  A table that differs from disk (`dirty`), or is being written (`busy`), stays in memory.
  T2  Tables change only in code without an await: from the look at an entry to its change.
  T3  A table is changed only if its L1 entry says COPIED; `writable` sees to that.
  T4  Several L1 entries may share a table on disk (an increment of large zeroes has such), none of
      which says COPIED then. In memory each has its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ImageError
from nbdfleece.base.units import ceil_div
from nbdfleece.block.drivers.qcow2.counts import OTHER
from nbdfleece.formats.qcow2.tables import (
    COPIED,
    OFFSET_MASK,
    dump_entries,
    empty_entries,
    load_entries,
    table_offset,
)

if TYPE_CHECKING:
    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.formats.qcow2.tables import Entries

PIECE: Final = 512  # numbers that are written at once, 4 KiB
_LEAST: Final = 4  # tables in memory; requests that need more than there are would starve


class L2Table:
    """An L2 table.

    Args:
        entries: As in formats.qcow2.tables.
        offset: Where it is in the image's file.
        index: Of its L1 entry.
        dirty_tables: Where to list it when it is changed.

    Attributes:
        entries: As in formats.qcow2.tables.
        offset: Where it is in the image's file.
        dirty: Numbers of pieces that differ from disk.
        busy: It is being written.
        used: It has been looked at since the last search for room.
    """

    __slots__ = ("_dirty_tables", "_index", "busy", "dirty", "entries", "offset", "used")

    def __init__(
        self, entries: Entries[int], offset: int, index: int, dirty_tables: dict[int, L2Table]
    ) -> None:
        self._index = index
        self._dirty_tables = dirty_tables
        self.entries = entries
        self.offset = offset
        self.dirty: set[int] = set()
        self.busy = False
        self.used = True

    def mark(self, first: int, count: int) -> None:
        """Note that numbers have changed."""
        piece, last = first // PIECE, (first + count - 1) // PIECE
        self.dirty.add(piece)
        if last > piece:
            self.dirty.update(range(piece + 1, last + 1))
        self._dirty_tables[self._index] = self

    def mark_all(self) -> None:
        """Note that nothing of it is on disk."""
        self.mark(0, len(self.entries))

    def dump(self, piece: int) -> tuple[int, bytes]:
        """Return (offset, bytes) of a piece, to be written."""
        return (
            self.offset + piece * PIECE * 8,
            dump_entries(self.entries[piece * PIECE : (piece + 1) * PIECE]),
        )


class L2Cache:
    """The L1 table, and as many L2 tables as may be in memory.

    Args:
        image: What they belong to.
        l1: The active L1 table.
        size: Bytes of L2 tables.

    Attributes:
        l1: As in memory.
        l1_dirty: Numbers of entries that differ from disk.
        loaded: L2 tables by their L1 index.
        dirty: Those of them that differ from disk.
    """

    def __init__(self, image: Image, l1: Entries[int], size: int) -> None:
        self._image: Final = image
        self.l1 = l1
        self.l1_dirty: set[int] = set()
        self.loaded: dict[int, L2Table] = {}
        self.dirty: dict[int, L2Table] = {}
        self._places: dict[int, int] = {}  # offsets of those in memory, and how many share each
        self._loading: dict[int, asyncio.Future[None]] = {}
        self.most = 0
        self.set_size(size)

    def set_size(self, size: int) -> None:
        """Set how many bytes of tables may be in memory."""
        self.most = max(_LEAST, size >> self._image.header.cluster_bits)

    @property
    def is_dirty(self) -> bool:
        """Whether anything differs from disk."""
        return bool(self.l1_dirty or self.dirty)

    async def get(self, index: int) -> L2Table | None:
        """Return the L2 table of an L1 entry, or None where there is none.

        Raises:
            IoError: It cannot be read.
        """
        while True:
            table = self.loaded.get(index)
            if table is not None:
                table.used = True
                return table
            if not self.l1[index] & OFFSET_MASK:
                return None
            await self._load(index)

    async def writable(self, index: int) -> L2Table:
        """Return the L2 table of an L1 entry, to be changed (T3); made when there is none.

        Raises:
            IoError: It cannot be read, or there is no room in the image's file.
        """
        image = self._image
        while True:
            table = await self.get(index)
            if table is not None and self.l1[index] & COPIED:
                return table
            if len(self.loaded) >= self.most and table is None:
                await self._make_room()
            cluster, _, _ = await image.counts.allocate(1)
            # Behind the awaits: somebody else may have done it, or the table may be gone again.
            if self.l1[index] & COPIED or self.loaded.get(index) is not table:
                image.counts.give_back(cluster, 1)
                continue
            offset = cluster << image.header.cluster_bits
            if table is None:
                count = image.header.cluster_size // 8
                table = self.loaded[index] = L2Table(
                    empty_entries(count), offset, index, self.dirty
                )
            else:
                self._leave(table.offset)
                image.frees.add(table.offset, 1, OTHER)
                table.offset = offset
            self._take(offset)
            table.mark_all()
            self.l1[index] = offset | COPIED
            self.l1_dirty.add(index)
            return table

    async def _load(self, index: int) -> None:
        loading = self._loading.get(index)
        if loading is not None:
            await loading
            return
        image = self._image
        self._loading[index] = loading = asyncio.get_running_loop().create_future()
        try:
            await self._make_room()
            # Nobody changes an L1 entry whose table is not in memory, but for the first time.
            offset = self._offset_of(index)
            if offset:
                data = await image.read_file(offset, image.header.cluster_size)
                self.loaded[index] = L2Table(load_entries(data), offset, index, self.dirty)
                self._take(offset)
        finally:
            del self._loading[index]
            loading.set_result(None)

    def _offset_of(self, index: int) -> int:
        """Return where the table of an L1 entry is; 0: there is none.

        Raises:
            IoError: It cannot be there: the image is damaged.
        """
        image = self._image
        bits = image.header.cluster_bits
        try:
            offset = table_offset(self.l1[index], bits)
        except ImageError as error:
            raise image.damaged(error) from error
        if offset + (1 << bits) > image.file.size:
            raise image.damaged(
                ImageError(f"L2 table at {offset:#x} is behind the end of the file")
            )
        if offset and offset >> bits in image.metadata and not self._is_shared(index, offset):
            raise image.damaged(ImageError(f"L2 table at {offset:#x} is something else"))
        return offset

    def _is_shared(self, index: int, offset: int) -> bool:
        """Tell whether an entry may share the table of entries whose tables are in memory (T4)."""
        sharing = [at for at, table in self.loaded.items() if table.offset == offset]
        return bool(sharing) and not any(self.l1[at] & COPIED for at in (index, *sharing))

    async def _make_room(self) -> None:
        while len(self.loaded) >= self.most:
            if not self._forget_one():
                await self._image.commit.run()

    def _forget_one(self) -> bool:
        """Forget a table that has not been used for a while; False: all differ from disk."""
        candidate = -1
        for index, table in self.loaded.items():
            if table.dirty or table.busy:
                continue
            candidate = index
            if not table.used:
                break
            table.used = False
        if candidate < 0:
            return False
        self._leave(self.loaded.pop(candidate).offset)
        return True

    def forget_from(self, index: int) -> None:
        """Forget tables from an L1 index on: the disk has become shorter."""
        for gone in [at for at in self.loaded if at >= index]:
            table = self.loaded.pop(gone)
            self.dirty.pop(gone, None)
            self._leave(table.offset)

    def _take(self, offset: int) -> None:
        """Note that a table is in memory whose place this is: nothing else may be written there."""
        self._places[offset] = self._places.get(offset, 0) + 1
        self._image.metadata.add(offset >> self._image.header.cluster_bits)

    def _leave(self, offset: int) -> None:
        """Undo one `_take`."""
        self._places[offset] -= 1
        if not self._places[offset]:
            del self._places[offset]
            self._image.metadata.discard(offset >> self._image.header.cluster_bits)

    def dump_l1(self, piece: int) -> tuple[int, bytes]:
        """Return (offset, bytes) of a piece of the L1 table, to be written."""
        entries = self.l1[piece * PIECE : (piece + 1) * PIECE]
        return self._image.header.l1_table_offset + piece * PIECE * 8, dump_entries(entries)

    def l1_clusters(self) -> int:
        """Return how many clusters the L1 table takes."""
        return ceil_div(len(self.l1) * 8, self._image.header.cluster_size)
