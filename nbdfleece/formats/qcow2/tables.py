"""L1 and L2 tables of a qcow2 image: where the bytes of the disk are.

A table is held as an array of 64-bit numbers in the byte order of this machine; with extended
entries an L2 table has two numbers per cluster, the entry and its subcluster bitmap. `find_run`
turns what an L2 table says of a place into one of five kinds:

::

    UNALLOCATED   reads as the backing, or zeroes
    ZERO_PLAIN    reads as zeroes, has no host cluster
    ZERO_HOST     reads as zeroes, has a host cluster, whose content counts for nothing
    DATA          is in the host cluster
    COMPRESSED    is in the host's file, compressed
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nbdfleece.base.errors import ImageError

Entries = array  # of "Q"

COPIED: Final = 1 << 63  # the refcount is exactly one
COMPRESSED_FLAG: Final = 1 << 62
ZERO_FLAG: Final = 1
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
MAX_HOST: Final = 1 << 56  # bytes that an entry can tell
SECTOR: Final = 512  # of a compressed cluster

UNALLOCATED: Final = 0
ZERO_PLAIN: Final = 1
ZERO_HOST: Final = 2
DATA: Final = 3
COMPRESSED: Final = 4

ALL_ALLOCATED: Final = 0xFFFFFFFF  # subcluster bitmap
ALL_ZERO: Final = 0xFFFFFFFF << 32


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the sizes of an image follow from.

    Attributes:
        cluster_bits: See Header.
        is_extended: L2 entries tell of subclusters.
        has_zero_flag: An entry may say that a cluster reads as zeroes (version 3).
        has_data_file: Host offsets are those of the external data file; 0 is one of them.
        cluster_size: Bytes.
        inside_mask: Bits of an offset within its cluster.
        unit_bits: Of the unit of allocation: a cluster, or a subcluster.
        l2_bits: An L2 table has 1 << this many entries.
        index_mask: Bits of the number of a cluster that are its index in its L2 table.
        span_bits: An L2 table tells of 1 << this many bytes.
    """

    cluster_bits: int
    is_extended: bool
    has_zero_flag: bool
    has_data_file: bool
    cluster_size: int = field(init=False)
    inside_mask: int = field(init=False)
    unit_bits: int = field(init=False)
    l2_bits: int = field(init=False)
    index_mask: int = field(init=False)
    span_bits: int = field(init=False)

    def __post_init__(self) -> None:
        """Work out what follows, once: every request asks for it."""
        bits = self.cluster_bits
        l2_bits = bits - (4 if self.is_extended else 3)
        for name, value in (
            ("cluster_size", 1 << bits),
            ("inside_mask", (1 << bits) - 1),
            ("unit_bits", bits - 5 if self.is_extended else bits),
            ("l2_bits", l2_bits),
            ("index_mask", (1 << l2_bits) - 1),
            ("span_bits", bits + l2_bits),
        ):
            object.__setattr__(self, name, value)


class Run(NamedTuple):
    """Bytes of the disk that follow each other and share their kind.

    Attributes:
        kind: One of five.
        length: Bytes, at least 1.
        host: Of DATA and ZERO_HOST: where the first byte is. Of COMPRESSED: the entry.
        is_copied: The host clusters belong to this place alone: they may be written.
    """

    kind: int
    length: int
    host: int
    is_copied: bool


def load_entries(data: bytes | bytearray | memoryview) -> Entries[int]:
    """Return the numbers of a table as it is stored."""
    entries = array("Q")
    entries.frombytes(data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def dump_entries(entries: Entries[int]) -> bytes:
    """Return the bytes of a table, or of a slice of it."""
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def empty_entries(count: int) -> Entries[int]:
    """Return a table of zeroes."""
    return array("Q", bytes(8 * count))


def table_offset(entry: int, cluster_bits: int) -> int:
    """Return where the L2 table of an L1 entry is; 0: there is none.

    Raises:
        ImageError: It is not aligned to a cluster.
    """
    offset = entry & OFFSET_MASK
    if offset & ((1 << cluster_bits) - 1):
        raise ImageError(f"L2 table offset {offset:#x} unaligned")
    return offset


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return (offset, length) of the bytes that hold a compressed cluster; a few may be behind it.

    What was compressed may end before them: the length is stored in sectors.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1) & (MAX_HOST - 1)
    sectors = ((entry & (COMPRESSED_FLAG - 1)) >> shift) + 1
    return offset, sectors * SECTOR - offset % SECTOR


def plain_host(entries: Entries[int], geometry: Geometry, offset: int, length: int) -> int:
    """Return the host offset of a range in one cluster of data, or -1: ask `find_run`.

    The usual case of small requests.
    """
    inside = offset & geometry.inside_mask
    if geometry.is_extended or inside + length > geometry.cluster_size:
        return -1
    entry = entries[(offset >> geometry.cluster_bits) & geometry.index_mask]
    host = entry & OFFSET_MASK
    if not host or entry & (COMPRESSED_FLAG | ZERO_FLAG) or host & geometry.inside_mask:
        return -1
    return host + inside


def find_run(
    entries: Entries[int], geometry: Geometry, offset: int, length: int
) -> Run:  # `offset` in the disk; the range may end behind the table
    """Return what the table says of the disk from `offset` on, as far as it is of one kind.

    Args:
        entries: The L2 table that tells of `offset`.
        geometry: Of the image.
        offset: Bytes from the start of the disk.
        length: Bytes; the run is no longer than that, nor longer than the table tells.

    Raises:
        ImageError: The first entry is impossible.
    """
    bits = geometry.cluster_bits
    if geometry.is_extended:
        return _find_run_extended(entries, geometry, offset, length)
    inside = offset & ((1 << bits) - 1)
    index = (offset >> bits) & ((1 << geometry.l2_bits) - 1)
    last = min(len(entries), index + ((inside + length - 1) >> bits) + 1)
    entry = entries[index]
    if entry & COMPRESSED_FLAG:
        _check_compressed(geometry)
        return Run(COMPRESSED, min(length, (1 << bits) - inside), entry, False)
    host = entry & OFFSET_MASK
    kind = _kind(entry, host, geometry)
    at = index + 1
    if kind in (DATA, ZERO_HOST):
        expected = entry + (1 << bits)
        while at < last and entries[at] == expected:
            at += 1
            expected += 1 << bits
    else:
        while at < last and entries[at] == entry:
            at += 1
    run = min(length, ((at - index) << bits) - inside)
    return Run(kind, run, host + inside, bool(entry & COPIED))


def _kind(entry: int, host: int, geometry: Geometry) -> int:
    has_host = host or (geometry.has_data_file and entry & COPIED)
    if has_host and host & (geometry.cluster_size - 1):
        raise ImageError(f"cluster offset {host:#x} unaligned")
    if entry & ZERO_FLAG and not geometry.is_extended:
        if not geometry.has_zero_flag:
            raise ImageError("zero cluster in an image of version 2")
        return ZERO_HOST if has_host else ZERO_PLAIN
    return DATA if has_host else UNALLOCATED


def _check_compressed(geometry: Geometry) -> None:
    if geometry.has_data_file:
        raise ImageError("compressed cluster in an image with an external data file")


def _find_run_extended(entries: Entries[int], geometry: Geometry, offset: int, length: int) -> Run:
    bits, unit_bits = geometry.cluster_bits, geometry.unit_bits
    inside = offset & ((1 << bits) - 1)
    index = 2 * ((offset >> bits) & ((1 << geometry.l2_bits) - 1))
    entry, bitmap = entries[index], entries[index + 1]
    if entry & COMPRESSED_FLAG:
        _check_compressed(geometry)
        return Run(COMPRESSED, min(length, (1 << bits) - inside), entry, False)
    unit = inside >> unit_bits
    kind = subcluster_kind(entry, bitmap, unit, geometry)
    host = (entry & OFFSET_MASK) + inside
    units = _same_units(bitmap, unit, kind)
    run = ((unit + units) << unit_bits) - inside
    while run < length and unit + units == 32:  # up to the end of the cluster: does it go on?
        index += 2
        if index >= len(entries):
            break
        following, bitmap = entries[index], entries[index + 1]
        if following & COMPRESSED_FLAG:
            break
        if kind in (DATA, ZERO_HOST):
            if following != entry + (1 << bits):
                break
        elif bool(following & OFFSET_MASK) != bool(entry & OFFSET_MASK):
            break
        entry, unit = following, 0
        if subcluster_kind(entry, bitmap, 0, geometry) != kind:
            break
        units = _same_units(bitmap, 0, kind)
        run += units << unit_bits
    return Run(kind, min(run, length), host, bool(entries[_first(offset, geometry)] & COPIED))


def _first(offset: int, geometry: Geometry) -> int:
    return 2 * ((offset >> geometry.cluster_bits) & ((1 << geometry.l2_bits) - 1))


def subcluster_kind(entry: int, bitmap: int, unit: int, geometry: Geometry) -> int:
    """Return the kind of one subcluster of a cluster that is not compressed.

    Raises:
        ImageError: The entry is impossible.
    """
    host = entry & OFFSET_MASK
    has_host = _kind(entry, host, geometry) == DATA
    is_allocated, is_zero = bitmap >> unit & 1, bitmap >> (32 + unit) & 1
    if is_allocated:
        if is_zero or not has_host:
            raise ImageError(f"impossible subcluster bitmap {bitmap:#x}")
        return DATA
    if is_zero:
        return ZERO_HOST if has_host else ZERO_PLAIN
    return UNALLOCATED


def _same_units(bitmap: int, unit: int, kind: int) -> int:
    """Return how many subclusters from `unit` on are as the first one."""
    if kind == DATA:
        same = bitmap & ~(bitmap >> 32)
    elif kind == UNALLOCATED:
        same = ~(bitmap | bitmap >> 32)
    else:
        same = bitmap >> 32 & ~bitmap
    same = (same & 0xFFFFFFFF) >> unit
    return (~same & (same + 1)).bit_length() - 1
