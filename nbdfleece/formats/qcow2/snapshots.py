"""The snapshot table of a qcow2 image: its bytes, and what they mean.

The table is one contiguous piece of the file; the header says where it begins and how many entries
it has, and only the entries themselves say how long it is::

    L1 offset u64, L1 entries u32, id length u16, name length u16, date s u32 and ns u32,
    guest clock ns u64, state size u32, extra length u32, extra, id, name, padding to 8 bytes
    extra: state size u64, disk size u64, instruction count u64, what the future may add

What is not understood is kept: the extra data has its length again when it is written. A table that
this module has read is within the bounds below; nothing is said about whether its L1 tables are
inside the file, or are right.

Follows: QEMU's document of the format, "Snapshots".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import (
    MAX_QCOW2_L1,
    MAX_QCOW2_SNAPSHOT_EXTRA,
    MAX_QCOW2_SNAPSHOT_TABLE,
    MAX_QCOW2_SNAPSHOTS,
)
from nbdfleece.base.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_U64: Final = struct.Struct(">Q")
_MAX_U32: Final = (1 << 32) - 1
_NO_COUNT: Final = (1 << 64) - 1  # of an instruction count that was not recorded

_FIELDS: Final = 3  # of the extra data
EXTRA_V3: Final = 16  # bytes of extra data that images of version 3 must have


class TableEndsError(ImageError):
    """The table goes on behind the bytes that there are of it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry.

    Attributes:
        id: Unique in the image; of bytes that are no UTF-8 it keeps surrogates.
        name: Need not be unique, and may be empty.
        l1_offset: Where its L1 table is in the file; a multiple of the cluster size.
        l1_entries: How many entries that has, eight bytes each.
        date_s: Seconds since 1970.
        date_ns: And nanoseconds.
        clock_ns: How long the guest had run.
        state_size: Bytes of the machine's state, stored behind the end of the disk; mostly 0.
        disk_size: Of the disk at the instant; None: not recorded, as before version 3.
        instructions: Count of the guest's; None: not recorded.
        extra_length: Bytes of extra data in the file; at least what the three above need.
        unknown: The extra data behind the fields that are known.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    date_s: int = 0
    date_ns: int = 0
    clock_ns: int = 0
    state_size: int = 0
    disk_size: int | None = None
    instructions: int | None = None
    extra_length: int = EXTRA_V3 + 8
    unknown: bytes = b""

    def moved(self, l1_offset: int, l1_entries: int) -> Snapshot:
        """Return the same snapshot with its L1 table elsewhere."""
        return replace(self, l1_offset=l1_offset, l1_entries=l1_entries)


def parse_table(data: bytes, count: int, cluster_size: int) -> list[Snapshot]:
    """Return the entries of a table.

    Args:
        data: From its start on. Bytes behind it are not looked at, and its last few may be missing,
            as they only fill it up.
        count: Entries that the header tells of.
        cluster_size: Of the image.

    Raises:
        TableEndsError: There are not enough bytes.
        ImageError: The table breaks the format or a bound; the text says which entry.
    """
    if count > MAX_QCOW2_SNAPSHOTS:
        raise ImageError(f"Image has too many snapshots ({count})")
    found: list[Snapshot] = []
    offset = 0
    for index in range(count):
        fixed = data[offset : offset + _ENTRY.size]
        length = _entry_length(fixed, index)
        if offset + length > MAX_QCOW2_SNAPSHOT_TABLE:
            raise ImageError(f"Snapshot table is too long (at entry {index})")
        rest = data[offset + len(fixed) : offset + length]
        found.append(_parse_entry(fixed, rest, index))
        if found[-1].l1_offset % cluster_size:
            raise ImageError(f"Snapshot table entry {index}: L1 table is not aligned")
        offset += length
    return found


def _entry_length(fixed: bytes, index: int) -> int:
    """Return how many bytes an entry takes, from its first 40."""
    if len(fixed) < _ENTRY.size:
        raise TableEndsError(f"Snapshot table ends within entry {index}")
    id_length, name_length, extra = struct.unpack_from(">HH20xI", fixed, 12)
    if extra > MAX_QCOW2_SNAPSHOT_EXTRA:
        raise ImageError(f"Snapshot table entry {index} has too much extra data ({extra} bytes)")
    return align_up(_ENTRY.size + extra + id_length + name_length, 8)


def _parse_entry(fixed: bytes, rest: bytes, index: int) -> Snapshot:
    l1_offset, l1_entries, id_length, name_length, date_s, date_ns, clock, state, extra_length = (
        _ENTRY.unpack(fixed)
    )
    if l1_entries * 8 > MAX_QCOW2_L1:
        raise ImageError(f"Snapshot table entry {index}: L1 table is too large")
    if len(rest) < extra_length + id_length + name_length:
        raise TableEndsError(f"Snapshot table ends within entry {index}")
    extra, texts = rest[:extra_length], rest[extra_length:]
    known: list[int | None] = [
        _U64.unpack_from(extra, at)[0] if len(extra) >= at + 8 else None for at in (0, 8, 16)
    ]
    return Snapshot(
        id=_text(texts[:id_length]),
        name=_text(texts[id_length : id_length + name_length]),
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        date_s=date_s,
        date_ns=date_ns,
        clock_ns=clock,
        state_size=state if known[0] is None else known[0],
        disk_size=known[1],
        instructions=None if known[2] == _NO_COUNT else known[2],
        extra_length=extra_length,
        unknown=extra[_known_length(extra_length) :],
    )


def encode_table(snapshots: Iterable[Snapshot]) -> bytes:
    """Return the bytes of a table.

    Raises:
        ImageError: There would be too many, or a name is too long.
    """
    entries = [_encode_entry(snapshot) for snapshot in snapshots]
    if len(entries) > MAX_QCOW2_SNAPSHOTS:
        raise ImageError("Too many snapshots in the image")
    table = b"".join(entries)
    if len(table) > MAX_QCOW2_SNAPSHOT_TABLE:
        raise ImageError("Snapshot table would be too long")
    return table


def _encode_entry(snapshot: Snapshot) -> bytes:
    extra = _U64.pack(snapshot.state_size) + _U64.pack(snapshot.disk_size or 0)
    count = snapshot.instructions
    extra += _U64.pack(_NO_COUNT if count is None else count)
    extra = extra[: _known_length(snapshot.extra_length)] + snapshot.unknown
    assert len(extra) == snapshot.extra_length
    texts = [text.encode(errors="surrogateescape") for text in (snapshot.id, snapshot.name)]
    if max(len(text) for text in texts) > 0xFFFF:
        raise ImageError("Name of a snapshot is too long")
    fixed = _ENTRY.pack(
        *(snapshot.l1_offset, snapshot.l1_entries, len(texts[0]), len(texts[1])),
        *(snapshot.date_s, snapshot.date_ns, snapshot.clock_ns),
        snapshot.state_size if snapshot.state_size <= _MAX_U32 else 0,
        len(extra),
    )
    entry = fixed + extra + texts[0] + texts[1]
    return entry + bytes(-len(entry) % 8)


def find(snapshots: Iterable[Snapshot], wanted: str) -> Snapshot | None:
    """Return the snapshot whose id is `wanted`, else the first whose name is."""
    named = None
    for snapshot in snapshots:
        if snapshot.id == wanted:
            return snapshot
        if named is None and snapshot.name == wanted:
            named = snapshot
    return named


def new_id(snapshots: Iterable[Snapshot]) -> str:
    """Return an id that none of them has: one above the largest number among theirs."""
    numbers = [
        int(snapshot.id)
        for snapshot in snapshots
        if len(snapshot.id) < 20 and snapshot.id.isascii() and snapshot.id.isdigit()
    ]
    return str(max(numbers, default=0) + 1)


def _known_length(extra_length: int) -> int:
    """Return how many bytes of the extra data are fields that are understood, whole ones."""
    return min(extra_length // 8, _FIELDS) * 8


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
