"""Making the disk of a qcow2 image longer or shorter, while the node is drained.

A crash in between leaves the old size, or the new one; the old table, or the new one.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.limits import MAX_QCOW2_L1, MAX_SIZE
from nbdfleece.base.units import align_up, ceil_div
from nbdfleece.block.drivers.qcow2.counts import OTHER
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.tables import OFFSET_MASK, dump_entries

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.block.drivers.qcow2.writer import Writer


async def resize(
    image: Image, writer: Writer, size: int, reads_zero: Callable[[int, int], bool]
) -> None:
    """Give the disk another size; what is added reads as zeroes.

    Raises:
        CommandError: It cannot have that. Nothing has changed.
        IoError: It failed; the disk has its old size.
    """
    header = image.header
    if header.nb_snapshots and header.version < 3:
        raise CommandError("Can't resize a version 2 image which has snapshots")
    if not 0 <= size <= MAX_SIZE or 8 * header.l1_needed(size) > MAX_QCOW2_L1:
        raise CommandError(f"The image cannot have {size} bytes with clusters of its size")
    if size == header.size:
        return
    image.bitmaps.check_size(size)
    await image.begin_changes()
    before = image.node.size
    try:
        if size > header.size:
            await _grow_l1(image, header.l1_needed(size))
            image.node.size = size
            await _drop_behind(image, writer, before, size)
            await _zero_new(image, writer, before, size, reads_zero)
        else:
            await writer.drop(
                align_up(size, header.cluster_size), align_up(before, header.cluster_size)
            )
            await _drop_l2(image, header.l1_needed(size))
        await image.commit.run()
        if header.has_data_file:
            await image.data.truncate(size)
        await image.write_fields(h.SIZE_AT, h.SIZE_FIELD.pack(size))
        image.header = replace(image.header, size=size)
    except (IoError, CommandError):
        image.node.size = before
        raise


async def _grow_l1(image: Image, entries: int) -> None:
    """Move the L1 table to a place where it may have so many entries."""
    tables, header = image.tables, image.header
    if entries <= len(tables.l1):
        return
    first = await image.counts.allocate_whole(ceil_div(8 * entries, header.cluster_size))
    await image.commit.run(with_refcounts=True)
    l1 = array("Q", tables.l1) + array("Q", bytes(8 * (entries - len(tables.l1))))
    offset = first << header.cluster_bits
    await image.write_file(offset, dump_entries(l1))
    await image.file.flush()
    await image.write_fields(h.L1_SIZE_AT, h.L1_FIELDS.pack(entries, offset))
    tables.l1 = l1
    image.header = replace(image.header, l1_size=entries, l1_table_offset=offset)
    if header.l1_size:
        image.forget_metadata(header.l1_table_offset, 8 * header.l1_size)
        image.frees.add(header.l1_table_offset, 8 * header.l1_size, OTHER)
    image.note_metadata()


async def _drop_behind(image: Image, writer: Writer, before: int, size: int) -> None:
    """Let go of what lies where the disk gets longer: the state of a virtual machine, perhaps."""
    first, end = (align_up(each, image.header.cluster_size) for each in (before, size))
    bits = image.geometry.span_bits
    for index in range(first >> bits, len(image.tables.l1)):
        if image.tables.l1[index] & OFFSET_MASK:
            await writer.drop(max(first, index << bits), min(end, index + 1 << bits))


async def _zero_new(
    image: Image,
    writer: Writer,
    before: int,
    size: int,
    reads_zero: Callable[[int, int], bool],
) -> None:
    """Make what is added read as zeroes: the rest of the last cluster, and a longer backing."""
    cluster_end = min(size, align_up(before, image.header.cluster_size))
    if before < cluster_end:
        await writer.write_or_zero(before, cluster_end - before)
    if cluster_end < size and not reads_zero(cluster_end, 1):
        backing = image.node.backing
        assert backing is not None, "what does not read as zeroes has a backing"
        end = min(size, align_up(backing.node.size, image.header.cluster_size))
        await writer.write_or_zero(cluster_end, end - cluster_end)


async def _drop_l2(image: Image, entries: int) -> None:
    """Let go of L2 tables from an L1 entry on."""
    tables = image.tables
    for index in range(entries, len(tables.l1)):
        offset = tables.l1[index] & OFFSET_MASK
        if offset:
            image.frees.add(offset, 1, OTHER)
            tables.l1[index] = 0
            tables.l1_dirty.add(index)
    tables.forget_from(entries)
