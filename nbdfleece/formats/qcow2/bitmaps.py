"""Bitmaps in a qcow2 image: header extension, directory and tables; bytes and what they mean.

::

    extension (24 bytes) -> directory: one entry per bitmap -> table: one entry per cluster of bits
                                                            -> cluster of bits, or all 0, or all 1

Bit `n` of a bitmap is bit `n % 8` (of value `1 << n % 8`) of byte `n // 8` of its bits, and stands
for the bytes of the disk from `n << granularity_bits` on.

The extension counts only while the autoclear feature BITMAPS of the header is set: who does not
know bitmaps clears that when it writes. What is read here is within the bounds below, and every
offset is a multiple of the cluster size; whether it is inside the file is for the caller to check.

Follows: QEMU's document of the format, "Bitmaps extension" and "Bitmaps".
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import (
    MAX_QCOW2_BITMAP_BYTES,
    MAX_QCOW2_BITMAP_DIRECTORY,
    MAX_QCOW2_BITMAP_NAME,
    MAX_QCOW2_BITMAPS,
)
from nbdfleece.base.units import align_up, ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")

_IN_USE: Final = 1 << 0
_AUTO: Final = 1 << 1
_EXTRA_COMPATIBLE: Final = 1 << 2
_KNOWN: Final = _IN_USE | _AUTO | _EXTRA_COMPATIBLE
_DIRTY_TRACKING: Final = 1
_MIN_GRANULARITY_BITS: Final = 9
_MAX_GRANULARITY_BITS: Final = 31

_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55 of a table entry
ALL_CLEAR: Final = 0  # a table entry without a cluster: its bits are all 0,
ALL_SET: Final = 1  # or all 1


@dataclass(frozen=True, slots=True)
class Extension:
    """Where the directory is: `count` entries in `size` bytes at `offset` of the file."""

    count: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One bitmap in the directory.

    Attributes:
        name: Unique in the image.
        granularity_bits: 9 to 31.
        table_offset: Where its table is in the file.
        table_entries: How many entries that has, eight bytes each.
        in_use: Somebody has it open, or crashed with it: its bits are not to be trusted.
        auto: It records writes.
        extra_compatible: It may be used although its extra data is not understood.
        extra: Extra data; nobody has defined any yet.
    """

    name: str
    granularity_bits: int
    table_offset: int
    table_entries: int
    in_use: bool = False
    auto: bool = True
    extra_compatible: bool = False
    extra: bytes = b""

    @property
    def usable(self) -> bool:
        """Whether it may be used; otherwise it is to be left as it is."""
        return not self.extra or self.extra_compatible


def parse_extension(data: bytes, cluster_size: int) -> Extension:
    """Return what the header extension says.

    Raises:
        ImageError: It breaks the format or a bound.
    """
    if len(data) != _EXTENSION.size:
        raise ImageError(f"bitmaps_ext: Invalid extension length ({len(data)})")
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if not 1 <= count <= MAX_QCOW2_BITMAPS:
        raise ImageError(f"bitmaps_ext: Image has {count} bitmaps, which is not supported")
    if not count * _ENTRY.size < size <= MAX_QCOW2_BITMAP_DIRECTORY:
        raise ImageError(f"bitmaps_ext: Invalid directory size ({size}) for {count} bitmaps")
    if offset == 0 or offset % cluster_size or offset >> 63:
        raise ImageError(f"bitmaps_ext: Invalid bitmap directory offset ({offset:#x})")
    return Extension(count, size, offset)


def encode_extension(extension: Extension) -> bytes:
    """Return the data of the header extension."""
    return _EXTENSION.pack(extension.count, 0, extension.size, extension.offset)


def parse_directory(data: bytes, count: int, cluster_size: int, disk_size: int) -> list[Entry]:
    """Return the entries of a directory, which is all of `data`.

    Raises:
        ImageError: It breaks the format or a bound; the text says which entry.
    """
    entries: list[Entry] = []
    offset = 0
    while offset < len(data):
        if len(entries) == count:
            raise ImageError("Bitmap directory holds more than the extension says")
        entry, offset = _parse_entry(data, offset)
        _check(entry, cluster_size, disk_size)
        entries.append(entry)
    if len(entries) != count:
        raise ImageError(f"Bitmap directory holds {len(entries)} bitmaps instead of {count}")
    if len({entry.name for entry in entries}) != count:
        raise ImageError("Bitmap directory holds two bitmaps of the same name")
    return entries


def _parse_entry(data: bytes, offset: int) -> tuple[Entry, int]:
    if len(data) - offset < _ENTRY.size:
        raise ImageError("Bitmap directory ends within an entry")
    table_offset, table_entries, flags, kind, granularity_bits, name_length, extra_length = (
        _ENTRY.unpack_from(data, offset)
    )
    start = offset + _ENTRY.size
    texts = data[start : start + extra_length + name_length]
    end = align_up(start + extra_length + name_length, 8)
    if end > len(data):
        raise ImageError("Bitmap directory ends within an entry")
    if not 1 <= name_length <= MAX_QCOW2_BITMAP_NAME:
        raise ImageError(f"Bitmap directory entry has a name of {name_length} bytes")
    name = texts[extra_length:].decode(errors="surrogateescape")
    if flags & ~_KNOWN:
        raise ImageError(f"Bitmap '{name}' has unknown flags ({flags & ~_KNOWN:#x})")
    if kind != _DIRTY_TRACKING:
        raise ImageError(f"Bitmap '{name}' has the unknown type {kind}")
    entry = Entry(
        name=name,
        granularity_bits=granularity_bits,
        table_offset=table_offset,
        table_entries=table_entries,
        in_use=bool(flags & _IN_USE),
        auto=bool(flags & _AUTO),
        extra_compatible=bool(flags & _EXTRA_COMPATIBLE),
        extra=texts[:extra_length],
    )
    return entry, end


def _check(entry: Entry, cluster_size: int, disk_size: int) -> None:
    name = entry.name
    if not _MIN_GRANULARITY_BITS <= entry.granularity_bits <= _MAX_GRANULARITY_BITS:
        raise ImageError(f"Bitmap '{name}' has granularity bits {entry.granularity_bits}")
    if entry.table_offset == 0 or entry.table_offset % cluster_size or entry.table_offset >> 63:
        raise ImageError(f"Bitmap '{name}' has its table at {entry.table_offset:#x}")
    if entry.table_entries == 0 or entry.table_entries * cluster_size > MAX_QCOW2_BITMAP_BYTES:
        raise ImageError(f"Bitmap '{name}' has a table of {entry.table_entries} entries")
    needed = table_entries(disk_size, entry.granularity_bits, cluster_size)
    # Of one in use the table may be that of before a resize, which its bits are too.
    if not entry.in_use and entry.table_entries < needed:
        raise ImageError(f"Bitmap '{name}' is too small for the disk")


def encode_directory(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of a directory.

    Raises:
        ImageError: There are too many bitmaps, or it would be too long.
    """
    parts = [_encode_entry(entry) for entry in entries]
    data = b"".join(parts)
    if len(parts) > MAX_QCOW2_BITMAPS or len(data) > MAX_QCOW2_BITMAP_DIRECTORY:
        raise ImageError("Too many bitmaps in the image")
    return data


def _encode_entry(entry: Entry) -> bytes:
    name = entry.name.encode(errors="surrogateescape")
    if not 1 <= len(name) <= MAX_QCOW2_BITMAP_NAME:
        raise ImageError(f"Bitmap name is {len(name)} bytes long")
    flags = _IN_USE * entry.in_use | _AUTO * entry.auto
    flags |= _EXTRA_COMPATIBLE * entry.extra_compatible
    fixed = _ENTRY.pack(
        *(entry.table_offset, entry.table_entries, flags, _DIRTY_TRACKING),
        *(entry.granularity_bits, len(name), len(entry.extra)),
    )
    data = fixed + entry.extra + name
    return data + bytes(-len(data) % 8)


def bits_length(disk_size: int, granularity_bits: int) -> int:
    """Return how many bytes the bits of a bitmap take."""
    return ceil_div(ceil_div(disk_size, 1 << granularity_bits), 8)


def table_entries(disk_size: int, granularity_bits: int, cluster_size: int) -> int:
    """Return how many entries the table of a bitmap needs: one per cluster of bits, at least 1."""
    return max(1, ceil_div(bits_length(disk_size, granularity_bits), cluster_size))


def parse_table(data: bytes, cluster_size: int, name: str = "") -> array[int]:
    """Return the entries of a bitmap's table: ALL_CLEAR, ALL_SET, or the offset of a cluster.

    Raises:
        ImageError: An entry breaks the format.
    """
    entries = array("Q", data)
    if struct.pack("=H", 1) == b"\1\0":
        entries.byteswap()
    for entry in entries:
        if entry > ALL_SET and (entry & ~_OFFSET or entry % cluster_size):
            raise ImageError(f"Bitmap '{name}' has a table with the entry {entry:#x}")
    return entries


def encode_table(entries: Sequence[int]) -> bytes:
    """Return the bytes of a bitmap's table."""
    return struct.pack(f">{len(entries)}Q", *entries)
