"""Writes, zeroes and discards of a qcow2 node.

A write where the disk owns its host clusters goes straight there. Any other write is made in this
order::

    1  list the guest clusters in `image.writing`; who wants to change their entries waits
    2  take host clusters, where the disk has none of its own there
    3  write the data, and around it what was there before, up to whole clusters (subclusters)
    4  change the L2 entries; let go of what they told of before

Whole clusters are not read before. Where the file reads as zeroes anyway (image.py, I2), and
so did the disk, nothing is written around the data. The first write to empty clusters
(`_take_first`) needs no waiting before step 3 where their tables are in memory.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.base.errors import ImageError, IoError
from nbdfleece.base.limits import MAX_QCOW2_FREES, ZERO_PIECE
from nbdfleece.base.units import align_down, align_up
from nbdfleece.block.drivers.qcow2.commit import all_of, ended
from nbdfleece.block.drivers.qcow2.counts import OTHER, REQUEST
from nbdfleece.datapath.step import background, let_others_run
from nbdfleece.formats.qcow2 import tables as t

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from nbdfleece.block.driver import Place
    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.block.drivers.qcow2.tables import L2Table
    from nbdfleece.datapath.route import EarlyReply

    Read = Callable[[int, memoryview], Awaitable[None]]
    IsZero = Callable[[int, int], bool]


# Looked up by every write in place.
_OWN: Final = t.COPIED
_HOST: Final = t.OFFSET_MASK
_KIND: Final = t.COPIED | t.COMPRESSED_FLAG | t.ZERO_FLAG  # _OWN alone: data of its own
_MOST_CLUSTERS: Final = 65536  # that one write takes at once


class _Span(NamedTuple):
    """Guest clusters in a row whose entries are to change.

    Attributes:
        first: Number of the first.
        clusters: How many.
        length: Bytes of the request that lie in them.
        owned: Host offset of the first, where the disk has them for itself; -1: to be taken.
        has_old: Something other than zeroes may be there.
        has_data: Of that, some is in the image itself, so that it has to move along.
    """

    first: int
    clusters: int
    length: int
    owned: int
    has_old: bool
    has_data: bool


class Writer:
    """The writing verbs.

    Args:
        image: Of the node.
        read: Reads the disk.
        reads_zero: Tells whether a range that the image does not hold reads as zeroes.
    """

    def __init__(self, image: Image, read: Read, reads_zero: IsZero) -> None:
        self._image: Final = image
        self._read: Final = read
        self._reads_zero: Final = reads_zero
        self._bits: Final = image.header.cluster_bits
        self._size: Final = image.header.cluster_size
        self._geometry: Final = image.geometry
        self._tables: Final = image.tables
        self._metadata: Final = image.metadata
        self._inside_mask: Final = image.geometry.inside_mask
        self._span_bits: Final = image.geometry.span_bits
        self._index_mask: Final = image.geometry.index_mask
        self._words: Final = 2 if image.geometry.is_extended else 1
        # No longer writes have a place: none at all in images of the rarer kinds.
        is_usual = not image.geometry.is_extended and not image.geometry.has_data_file
        self._most_placed: Final = self._size if is_usual else 0

    # --- writing ---------------------------------------------------------------------------

    def direct(self, offset: int, length: int) -> tuple[int, int]:
        """Return (host offset, length) of a start of the range that may be written in place.

        Length 0: none may.
        """
        image = self._image
        index = offset >> self._geometry.span_bits
        table = image.tables.loaded.get(index)
        if table is None or not image.tables.l1[index] & t.COPIED:
            return 0, 0
        table.used = True
        entry = table.entries[((offset >> self._bits) & self._geometry.index_mask) * self._words]
        if not entry:
            return 0, 0
        host = t.plain_host(table.entries, self._geometry, offset, length)
        if host >= 0 and host >> self._bits not in image.metadata:
            return (host, length) if entry & t.COPIED else (0, 0)
        try:
            run = t.find_run(table.entries, self._geometry, offset, length)
        except ImageError as error:
            raise image.damaged(error) from error
        if run.kind != t.DATA or not run.is_copied:
            return 0, 0
        image.check_no_metadata(run.host, run.length)
        return run.host, run.length

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write to the disk.

        With `fua` the data is stable, where it is written in place: nothing else is.
        """
        host, length = self.direct(offset, len(data))
        if length == len(data):  # the usual case
            await self.write_data(host, data, fua=fua)
            return
        first = self._take_first(offset, len(data)) if not length else -1
        if first >= 0:
            await self._write_first(first, offset, data)
            return
        running: list[asyncio.Future[None]] = []
        try:
            while data:
                host, length = self.direct(offset, len(data))
                if length:
                    running.append(background(self.write_data(host, data[:length], fua=fua)))
                else:
                    length = await self._write_new(offset, data)
                offset, data = offset + length, data[length:]
        except IoError:
            await ended(running)
            raise
        await all_of(running)

    async def write_data(self, host: int, data: memoryview, *, fua: bool) -> None:
        """Write data of the disk to where it belongs."""
        node, end = self._image.data, host + len(data)
        if end > node.size:
            await self._reach(host, end)
        await node.write(host, data, fua=fua)

    async def write_in_place(self, host: int, data: memoryview, reply: EarlyReply | None) -> None:
        """As `write_data` where `direct` says; see Driver.write_replying."""
        node, end = self._image.data, host + len(data)
        if end > node.size:
            await self._reach(host, end)
        await node.write_replying(host, data, reply)

    def place(self, offset: int, length: int) -> Place | None:
        """Return where a range is that may be written in place; see Driver.place.

        What `direct` says, for the usual write: in one cluster, which has its data in the file.
        """
        inside, index = offset & self._inside_mask, offset >> self._span_bits
        tables = self._tables
        table = tables.loaded.get(index)
        if table is None or inside + length > self._most_placed or not tables.l1[index] & _OWN:
            return None
        table.used = True
        entry = table.entries[offset >> self._bits & self._index_mask]
        host = entry & _HOST
        if (
            entry & _KIND != _OWN
            or not host
            or host & self._inside_mask
            or host >> self._bits in self._metadata
        ):
            return None
        host += inside
        node = self._image.file
        if host + length > node.size:
            return None
        place = node.place(host, length)
        return None if place is None else (place[0], place[1], self._image.frees.epoch)

    async def _reach(self, host: int, end: int) -> None:
        image = self._image
        if self._geometry.has_data_file:
            await image.reach_data(end)
            return
        image.check_no_metadata(host, end - host)
        await image.reach(end)

    def _take_first(self, offset: int, length: int) -> int:
        """Take host clusters for a write to empty clusters; return the first, -1: ask `_write_new`.

        What is around the data has to read as zeroes, before and behind it.
        """
        image, geometry = self._image, self._geometry
        index, inside = offset >> geometry.span_bits, offset & geometry.inside_mask
        table = image.tables.loaded.get(index)
        if (
            table is None
            or not image.tables.l1[index] & t.COPIED
            or self._words == 2
            or geometry.has_data_file
            or (offset + length - 1) >> geometry.span_bits != index
        ):
            return -1
        first, at = offset - inside, offset >> self._bits & geometry.index_mask
        count = ((inside + length - 1) >> self._bits) + 1
        if (
            any(table.entries[at : at + count])
            or not self._reads_zero(first, count << self._bits)
            or image.writing.overlaps(first, count << self._bits)
        ):
            return -1
        return image.counts.allocate_fresh(count)

    async def _write_first(self, host: int, offset: int, data: memoryview) -> None:
        """Write to the host clusters from `host` on, which `_take_first` took; let entries tell."""
        image, bits = self._image, self._bits
        inside = offset & self._geometry.inside_mask
        count = ((inside + len(data) - 1) >> bits) + 1
        key = image.writing.add(offset - inside, count << bits)
        try:
            await self.write_data((host << bits) + inside, data, fua=False)
            # Behind an await; the entries are ours, the table may be in another place.
            index = offset >> self._geometry.span_bits
            table = image.tables.loaded.get(index)
            if table is None or not image.tables.l1[index] & t.COPIED:
                table = await image.tables.writable(index)
        except BaseException:
            image.counts.give_back(host, count)
            raise
        else:
            at, entry = offset >> bits & self._geometry.index_mask, host << bits | t.COPIED
            told = range(entry, entry + (count << bits), self._size)
            table.entries[at : at + count] = array("Q", told)
            table.mark(at, count)
        finally:
            image.writing.remove(key)

    async def _write_new(self, offset: int, data: memoryview) -> int:
        """Write a start of `data` where an entry has to change; return its length.

        0: somebody else has changed the entry meanwhile.
        """
        image = self._image
        span_end = (offset >> self._geometry.span_bits) + 1 << self._geometry.span_bits
        length = min(len(data), span_end - offset)
        first = align_down(offset, self._size)
        if image.writing.overlaps(first, align_up(offset + length, self._size) - first):
            # Of a long range perhaps only the end is in use; the rest need not wait.
            if image.writing.overlaps(first, self._size):
                await image.writing.wait_clear(first, self._size)
                return 0
            length = min(length, first + self._size - offset)
        whole = align_up(offset + length, self._size) - first
        key = image.writing.add(first, whole)
        try:
            table = await image.tables.writable(offset >> self._geometry.span_bits)
            span = self._plan(table, offset, length)
            if span is None:
                return 0
            return await self._write_span(span, offset, data[: span.length])
        except ImageError as error:
            raise image.damaged(error) from error
        finally:
            image.writing.remove(key)

    def _plan(self, table: L2Table, offset: int, length: int) -> _Span | None:
        """Return the first clusters of the range that can be treated alike.

        None: a write in place is possible now.
        """
        part = 0
        while part < length:
            run = t.find_run(table.entries, self._geometry, offset + part, length - part)
            if run.kind == t.DATA and run.is_copied:
                break  # others may be writing there
            part += run.length
        if part == 0:
            return None
        first = offset >> self._bits
        last = min((offset + part - 1) >> self._bits, first + _MOST_CLUSTERS - 1)
        mask = (1 << self._geometry.l2_bits) - 1
        owned = self._owned(table, first & mask)
        count, has_old, has_data = 0, False, False
        while first + count <= last:
            host = self._owned(table, (first + count) & mask)
            if host != (owned + (count << self._bits) if owned >= 0 else -1):
                break
            old, data = self._content(table, first + count)
            has_old, has_data = has_old or old, has_data or data
            count += 1
        part = min(part, ((first + count) << self._bits) - offset)
        return _Span(first, count, part, owned, has_old, has_data)

    def _owned(self, table: L2Table, index: int) -> int:
        """Return the host offset of a cluster that the disk has for itself, or -1."""
        entry = table.entries[index * self._words]
        if entry & t.COPIED and not entry & t.COMPRESSED_FLAG:
            host = entry & t.OFFSET_MASK
            if host or self._geometry.has_data_file:
                return host
        return -1

    def _content(self, table: L2Table, cluster: int) -> tuple[bool, bool]:
        """Tell whether a cluster may read as anything but zeroes, and whether the image has it."""
        index = cluster & ((1 << self._geometry.l2_bits) - 1)
        entry = table.entries[index * self._words]
        if entry & t.COMPRESSED_FLAG:
            return True, True
        if self._geometry.is_extended:
            bitmap = table.entries[2 * index + 1]
            has_data, is_zero = bool(bitmap & t.ALL_ALLOCATED), bitmap == t.ALL_ZERO
        else:
            is_zero = bool(entry & t.ZERO_FLAG)
            has_data = bool(entry & t.OFFSET_MASK) and not is_zero
        if has_data:
            return True, True
        return not is_zero and not self._reads_zero(cluster << self._bits, self._size), False

    async def _write_span(self, span: _Span, offset: int, data: memoryview) -> int:
        image = self._image
        count, host, is_fresh, taken = span.clusters, span.owned, False, -1
        if host < 0 and self._geometry.has_data_file:
            host = span.first << self._bits
        elif host < 0:
            taken, count, is_fresh = await image.counts.allocate(span.clusters)
            host = taken << self._bits
        end = (span.first + count) << self._bits
        data = data[: end - offset]
        try:
            start, whole = await self._with_surroundings(
                span, count, offset, data, is_fresh=is_fresh
            )
            image.check_no_metadata(host, count << self._bits)
            await self.write_data(host + start - (span.first << self._bits), whole, fua=False)
            # Behind the awaits; the entries are ours, the table may be in another place.
            table = await image.tables.writable(offset >> self._geometry.span_bits)
        except BaseException:
            if taken >= 0:
                image.counts.give_back(taken, count)
            raise
        self._link(table, span, count, host, start, start + len(whole))
        if len(image.frees.waiting) > MAX_QCOW2_FREES:
            await image.commit.run()
        return len(data)

    async def _with_surroundings(
        self, span: _Span, count: int, offset: int, data: memoryview, *, is_fresh: bool
    ) -> tuple[int, memoryview]:
        """Return (offset in the disk, bytes) to write: the data, and what has to be around it."""
        unit = 1 << self._geometry.unit_bits
        end = offset + len(data)
        start, stop = align_down(offset, unit), align_up(end, unit)
        if span.has_data and span.owned < 0:
            # Other subclusters have data that moves along.
            start, stop = span.first << self._bits, (span.first + count) << self._bits
        if (start, stop) == (offset, end) or (is_fresh and not span.has_old):
            return offset, data
        whole = memoryview(bytearray(stop - start))
        whole[offset - start : end - start] = data
        if span.has_old:
            size = self._image.node.size
            for first, last in ((start, offset), (end, min(stop, size))):
                if first < last:
                    await self._read(first, whole[first - start : last - start])
        return start, whole

    def _link(
        self, table: L2Table, span: _Span, count: int, host: int, start: int, end: int
    ) -> None:
        """Let the entries tell of new host clusters, in which [start, end) has been written."""
        entries, words, bits = table.entries, self._words, self._bits
        index = span.first & ((1 << self._geometry.l2_bits) - 1)
        unit_bits = self._geometry.unit_bits
        for n in range(count):
            at = (index + n) * words
            before = entries[at]
            if span.owned < 0:
                self._let_go(before, OTHER)
            entries[at] = host + (n << bits) | t.COPIED
            if words == 1:
                continue
            cluster = (span.first + n) << bits
            low = max(start - cluster, 0) >> unit_bits
            high = align_up(min(end - cluster, self._size), 1 << unit_bits) >> unit_bits
            written = (1 << high) - (1 << low)
            bitmap = 0 if before & t.COMPRESSED_FLAG else entries[at + 1]
            entries[at + 1] = (bitmap | written) & ~(written << 32)
        table.mark(index * words, count * words)

    def _let_go(self, entry: int, why: int) -> None:
        """Note that an L2 entry does not tell of its host clusters any more."""
        image = self._image
        if image.header.has_data_file:
            return
        if entry & t.COMPRESSED_FLAG:
            image.frees.add(*t.compressed_range(entry, self._bits), OTHER)
        elif entry & t.OFFSET_MASK & self._geometry.inside_mask:
            image.damaged(ImageError(f"cluster offset {entry & t.OFFSET_MASK:#x} unaligned"))
        elif entry & t.OFFSET_MASK:
            image.frees.add(entry & t.OFFSET_MASK, 1, why)

    # --- zeroes ----------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zeroes.

        Raises:
            IoError: ENOTSUP in an image of version 2 where that needs writing.
        """
        image = self._image
        if image.header.is_data_file_raw:
            # That file has to read as zeroes by itself.
            await image.reach_data(offset + length)
            await image.data.write_zeroes(
                offset, length, fua=False, may_unmap=may_unmap, no_fallback=False
            )
        if not self._geometry.has_zero_flag and (
            not may_unmap or not self._reads_zero(offset, length)
        ):
            raise IoError(errno.ENOTSUP, f"node '{image.node.name}': zeroes in version 2")
        unit = 1 << self._geometry.unit_bits
        end = offset + length
        is_to_the_end = end == image.node.size
        first, last = align_up(offset, unit), end if is_to_the_end else align_down(end, unit)
        if first >= last:
            await self._zero_part(offset, length)
            return
        if offset < first:
            await self._zero_part(offset, first - offset)
        if last < end:
            await self._zero_part(last, end - last)
        await self._zero_whole(first, align_up(last, unit), may_unmap=may_unmap)

    async def _zero_whole(self, first: int, last: int, *, may_unmap: bool) -> None:
        """Zero whole units, of which some may be compressed together with others."""
        inner, outer = align_up(first, self._size), align_down(last, self._size)
        parts = [(first, last)]
        if self._geometry.is_extended:
            parts = (
                [(first, last)]
                if outer < inner
                else [(first, inner), (inner, outer), (outer, last)]
            )
        for start, stop in parts:
            if start >= stop:
                continue
            if stop - start < self._size and self._geometry.is_extended:
                table = await self._image.tables.get(start >> self._geometry.span_bits)
                mask = (1 << self._geometry.l2_bits) - 1
                at = 2 * ((start >> self._bits) & mask)
                if table is not None and table.entries[at] & t.COMPRESSED_FLAG:
                    end = min(stop, self._image.node.size)
                    await self.write(start, _ZEROES[: end - start], fua=False)
                    continue
            await self._for_tables(
                start,
                stop,
                lambda table, at, count: self._zero_units(table, at, count, may_unmap=may_unmap),
            )

    async def write_or_zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, by writing them where there is no better way."""
        try:
            await self.write_zeroes(offset, length, may_unmap=False)
        except IoError as error:
            if error.errno != errno.ENOTSUP:
                raise
            while length:
                piece = min(length, len(_ZEROES))
                await self.write(offset, _ZEROES[:piece], fua=False)
                offset, length = offset + piece, length - piece

    async def _zero_part(self, offset: int, length: int) -> None:
        """Zero a part of one unit, by writing, unless it reads as zeroes."""
        table = await self._image.tables.get(offset >> self._geometry.span_bits)
        if table is None:
            if self._reads_zero(offset, length):
                return
        else:
            try:
                run = t.find_run(table.entries, self._geometry, offset, length)
            except ImageError as error:
                raise self._image.damaged(error) from error
            if run.length >= length and (
                run.kind in (t.ZERO_PLAIN, t.ZERO_HOST)
                or (run.kind == t.UNALLOCATED and self._reads_zero(offset, length))
            ):
                return
        await self.write(offset, _ZEROES[:length], fua=False)

    async def discard(self, offset: int, length: int) -> None:
        """Let go of the whole clusters of a range; they read as zeroes then."""
        image = self._image
        end = offset + length
        first = align_up(offset, self._size)
        last = align_up(end, self._size) if end == image.node.size else align_down(end, self._size)
        if first >= last:
            return
        if image.header.is_data_file_raw:
            stop = min(last, image.data.size)
            if first < stop and image.frees.pass_discard[REQUEST]:
                await image.data.discard(first, stop - first)
            return
        if not self._geometry.has_zero_flag and not self._reads_zero(first, length):
            return  # what is let go of would show the backing
        await self._for_tables(
            first, last, lambda table, at, count: self._zero_units(table, at, count, may_unmap=True)
        )
        if image.header.has_data_file and image.frees.pass_discard[REQUEST]:
            stop = min(last, image.data.size)
            if first < stop:
                await image.data.discard(first, stop - first)

    async def drop(self, offset: int, end: int) -> None:
        """Let go of whole clusters, and leave their entries empty: the disk ends before them."""

        def change(table: L2Table, at: int, length: int) -> None:
            mask = (1 << self._geometry.l2_bits) - 1
            first, words = (at >> self._bits) & mask, self._words
            count = length >> self._bits
            for index in range(first * words, (first + count) * words, words):
                self._let_go(table.entries[index], REQUEST)
            table.entries[first * words : (first + count) * words] = t.empty_entries(count * words)
            table.mark(first * words, count * words)

        await self._for_tables(offset, end, change, only_if_there=True)

    async def _for_tables(
        self,
        offset: int,
        end: int,
        change: Callable[[L2Table, int, int], None],
        *,
        only_if_there: bool = False,
    ) -> None:
        """Change the entries of a range of whole units, table by table.

        Args:
            offset: Where it begins in the disk.
            end: Where it ends.
            change: Called with the table, the offset in the disk, and the bytes.
            only_if_there: Make no new tables.
        """
        image, span = self._image, 1 << self._geometry.span_bits
        while offset < end:
            stop = min(end, align_down(offset, span) + span)
            index = offset >> self._geometry.span_bits
            first = align_down(offset, self._size)
            whole = align_up(stop, self._size) - first
            if image.writing.overlaps(first, whole):
                await image.writing.wait_clear(first, whole)
                continue
            key = image.writing.add(first, whole)
            try:
                has_table = image.tables.l1[index] & t.OFFSET_MASK
                if has_table or not (only_if_there or self._reads_zero(offset, stop - offset)):
                    table = await image.tables.writable(index)
                    change(table, offset, stop - offset)
            except ImageError as error:
                raise image.damaged(error) from error
            finally:
                image.writing.remove(key)
            if len(image.frees.waiting) > MAX_QCOW2_FREES:
                await image.commit.run()
            offset = stop
            if offset < end:
                await let_others_run()  # a terabyte has thousands of tables

    def _zero_units(self, table: L2Table, offset: int, length: int, *, may_unmap: bool) -> None:
        mask = (1 << self._geometry.l2_bits) - 1
        first, end = offset >> self._bits, offset + length
        last = (end - 1) >> self._bits
        index, count = first & mask, last - first + 1
        entries, words = table.entries, self._words
        if words == 1:
            part = entries[index : index + count]
            empty = 0 if self._reads_zero(offset, length) else t.ZERO_FLAG
            if part.count(0) == count:  # a quick way for large empty disks
                entries[index : index + count] = array("Q", (empty,)) * count
            else:
                for n, entry in enumerate(part, start=index):
                    entries[n] = self._zeroed(entry, empty, may_unmap=may_unmap)
        else:
            unit_bits = self._geometry.unit_bits
            for cluster in range(first, last + 1):
                low = max(offset - (cluster << self._bits), 0) >> unit_bits
                high = min(end - (cluster << self._bits), self._size) >> unit_bits
                self._zero_subclusters(table, cluster & mask, low, high, may_unmap=may_unmap)
        table.mark(index * words, count * words)

    def _zeroed(self, entry: int, empty: int, *, may_unmap: bool) -> int:
        """Return what an entry becomes when its cluster is zeroed."""
        if self._geometry.has_data_file:
            has_host = entry & (t.COPIED | t.OFFSET_MASK)
            return entry | (t.ZERO_FLAG if has_host else empty)
        if entry & t.COMPRESSED_FLAG or (
            entry & t.OFFSET_MASK and (may_unmap or not entry & t.COPIED)
        ):
            self._let_go(entry, REQUEST)
            return empty
        if entry & t.OFFSET_MASK:
            return entry | t.ZERO_FLAG
        return entry or empty

    def _zero_subclusters(
        self, table: L2Table, index: int, low: int, high: int, *, may_unmap: bool
    ) -> None:
        entries, at = table.entries, 2 * index
        entry, bitmap = entries[at], entries[at + 1]
        whole = high - low == 32
        if entry & t.COMPRESSED_FLAG and not whole:
            raise ImageError("a part of a compressed cluster")  # _zero_whole has seen to it
        if whole and not self._geometry.has_data_file:
            owned = entry & t.COPIED and not entry & t.COMPRESSED_FLAG
            if may_unmap or not owned:
                self._let_go(entry, REQUEST)
                entry = 0
            bitmap = t.ALL_ZERO
        else:
            zeroed = (1 << high) - (1 << low)
            bitmap = (bitmap & ~zeroed) | zeroed << 32
        entries[at], entries[at + 1] = entry, bitmap


_ZEROES: Final = memoryview(bytes(ZERO_PIECE))
