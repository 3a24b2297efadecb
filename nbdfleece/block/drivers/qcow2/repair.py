"""Counting the references of an image anew, after a crash with lazy refcounts.

Every table that uses clusters is walked: header, refcounts, the active L1 table and those of
internal snapshots, their L2 tables, and bitmaps. An image in which two tables claim one cluster is
damaged in another way, and refused: it needs `qemu-img check -r`.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import MAX_QCOW2_L1
from nbdfleece.block.drivers.qcow2.image import KEPT_AUTOCLEAR
from nbdfleece.block.drivers.qcow2.snapshots import flag_own
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2 import tables as t

if TYPE_CHECKING:
    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.formats.qcow2.tables import Entries

_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_BITMAPS: Final = struct.Struct(">IIQQ")
_BITMAP: Final = struct.Struct(">QIIBBHI")
_MOST_NAMES: Final = 1 << 20  # bytes behind the fixed part of an entry
_PART_BITS: Final = 12  # counts are kept in parts of so many clusters


class _References:
    """How often each host cluster is referred to; takes memory for those that are.

    Args:
        image: Of which.
    """

    def __init__(self, image: Image) -> None:
        self._bits: Final = image.header.cluster_bits
        self._end: Final = (image.file.size + image.header.cluster_size - 1) >> self._bits
        self._parts: dict[int, array[int]] = {}
        self.last = 0  # the highest that is referred to

    def add(self, offset: int, length: int) -> None:
        """Count one reference to the clusters of a range.

        Raises:
            ImageError: They are not in the file.
        """
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        if last >= self._end:
            raise ImageError(f"reference to {offset:#x}, behind the end of the file")
        for cluster in range(first, last + 1):
            part = self._parts.get(cluster >> _PART_BITS)
            if part is None:
                part = array("I", bytes(4 << _PART_BITS))
                self._parts[cluster >> _PART_BITS] = part
            part[cluster & ((1 << _PART_BITS) - 1)] += 1
        self.last = max(self.last, last)

    def get(self, cluster: int) -> int:
        """Return how often a cluster is referred to."""
        part = self._parts.get(cluster >> _PART_BITS)
        return 0 if part is None else part[cluster & ((1 << _PART_BITS) - 1)]


async def repair(image: Image) -> None:
    """Set all refcounts right, and clear the dirty bit.

    Raises:
        ImageError: The image is damaged beyond that.
        IoError: It cannot be read or written.
    """
    # What an unknown feature refers to is not counted.
    known = image.header.autoclear & KEPT_AUTOCLEAR
    if known != image.header.autoclear:
        await image.write_features(replace(image.header, autoclear=known))
    found = await _count(image)
    await image.counts.set_all(found.get, found.last)
    await image.commit.run(with_refcounts=True)
    if not image.header.has_data_file:
        await flag_own(image)
        await image.commit.run(with_refcounts=True)
    header = image.header
    await image.write_features(replace(header, incompatible=header.incompatible & ~h.DIRTY))


async def _count(image: Image) -> _References:
    header, found = image.header, _References(image)
    found.add(0, 1)
    found.add(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    for offset in image.counts.table:
        if offset:
            found.add(offset, 1)
    await _count_l1(image, found, header.l1_table_offset, image.tables.l1)
    for offset, entries in await _snapshots(image, found):
        data = await image.read_file(offset, 8 * entries)
        await _count_l1(image, found, offset, t.load_entries(data))
    await _count_bitmaps(image, found)
    await _check_copied(image, found)
    return found


async def _count_l1(image: Image, found: _References, offset: int, l1: Entries[int]) -> None:
    bits = image.header.cluster_bits
    words = 2 if image.geometry.is_extended else 1
    if len(l1):
        found.add(offset, 8 * len(l1))
    for entry in l1:
        at = t.table_offset(entry, bits)
        if not at:
            continue
        found.add(at, 1)
        if at + (1 << bits) > image.file.size:
            raise ImageError(f"the L2 table at {at:#x} is not in the image's file")
        table = t.load_entries(await image.read_file(at, 1 << bits))
        for l2_entry in table[::words]:
            if l2_entry & t.COMPRESSED_FLAG:
                found.add(*t.compressed_range(l2_entry, bits))
            elif l2_entry & t.OFFSET_MASK and not image.header.has_data_file:
                found.add(l2_entry & t.OFFSET_MASK, 1)


async def _check_copied(image: Image, found: _References) -> None:
    """Check that what the active tables call theirs alone is referred to once."""
    if image.header.has_data_file:
        return
    bits = image.header.cluster_bits
    words = 2 if image.geometry.is_extended else 1
    for entry in image.tables.l1:
        at = t.table_offset(entry, bits)
        if not at:
            continue
        if entry & t.COPIED and found.get(at >> bits) != 1:
            raise ImageError(f"the L2 table at {at:#x} is shared and says that it is not")
        for l2_entry in t.load_entries(await image.read_file(at, 1 << bits))[::words]:
            is_alone = l2_entry & t.COPIED and not l2_entry & t.COMPRESSED_FLAG
            if is_alone and found.get((l2_entry & t.OFFSET_MASK) >> bits) != 1:
                raise ImageError(f"cluster {l2_entry:#x} is shared and says that it is not")


async def _snapshots(image: Image, found: _References) -> list[tuple[int, int]]:
    """Return (offset, entries) of the L1 table of each internal snapshot."""
    header = image.header
    tables: list[tuple[int, int]] = []
    at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        fixed = await image.read_file(at, _SNAPSHOT.size)
        offset, entries, id_size, name_size, _, _, _, _, extra = _SNAPSHOT.unpack(fixed)
        if 8 * entries > MAX_QCOW2_L1 or extra > _MOST_NAMES or offset % header.cluster_size:
            raise ImageError(f"damaged snapshot table at {at:#x}")
        tables.append((offset, entries))
        length = _SNAPSHOT.size + extra + id_size + name_size
        at += length + -length % 8
        if at > image.file.size:
            raise ImageError("the snapshot table is not in the image's file")
    if header.nb_snapshots:
        found.add(header.snapshots_offset, at - header.snapshots_offset)
    return tables


async def _count_bitmaps(image: Image, found: _References) -> None:
    extension = image.header.extension(h.EXT_BITMAPS)
    if extension is None or not image.header.autoclear & h.BITMAPS:
        return
    if len(extension) != _BITMAPS.size:
        raise ImageError("damaged bitmaps extension")
    count, _, size, offset = _BITMAPS.unpack(extension)
    if not size or size > image.file.size:
        raise ImageError("damaged bitmaps extension")
    found.add(offset, size)
    at = offset
    for _ in range(count):
        table, entries, _, _, _, name, extra = _BITMAP.unpack(
            await image.read_file(at, _BITMAP.size)
        )
        if 8 * entries > MAX_QCOW2_L1 or extra > _MOST_NAMES or at >= offset + size:
            raise ImageError(f"damaged bitmap directory at {at:#x}")
        if entries:
            found.add(table, 8 * entries)
            for entry in t.load_entries(await image.read_file(table, 8 * entries)):
                if entry & t.OFFSET_MASK:
                    found.add(entry & t.OFFSET_MASK, 1)
        length = _BITMAP.size + extra + name
        at += length + -length % 8
