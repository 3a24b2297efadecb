"""The file of a dirty bitmap beside its disk: header, and one byte per granule.

::

    0      header, padded to 4096 bytes
    4096   granule 0, 1, 2 ...: 0 clean, anything else dirty; holes are clean

Header, little-endian: magic, version, CRC-32 of the header (its own field zero), flags,
granularity, size of the disk, boot id, identity of the disk, time of the disk's last change, CRC-32
of the body, lengths of name and reason, name, reason.

A byte and not a bit, so that marking is one write and never a read. While the file is in use it is
not `clean`, and holds no less than what is dirty. So after the death of the process it is complete
as it stands: what was written to a file is the kernel's. After a power cut it is not.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Final

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import MAX_BITMAP_NAME
from nbdfleece.base.units import is_power_of_2

HEADER_SIZE: Final = 4096
VERSION: Final = 1

_MAGIC: Final = b"NBDFLBMP"
_FIXED: Final = struct.Struct("<8sIIIIQ16s32sQIHH")
_CRC_AT: Final = 12
_MAX_REASON: Final = 1024  # bytes
_MIN_GRANULARITY: Final = 512

_CLEAN: Final = 1 << 0
_RECORDING: Final = 1 << 1
_ALL_DIRTY: Final = 1 << 2
_BROKEN: Final = 1 << 3


class UnknownVersion(CommandError):
    """The file was written by another version, and is not touched."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a bitmap's file says.

    Attributes:
        name: Of the bitmap.
        granularity: Bytes per granule.
        size: Bytes of the disk.
        identity: Tells the disk from others, 32 bytes.
        boot_id: Of the run of the machine in which it was last in use, 16 bytes.
        recording: Writes are to be recorded.
        clean: Nobody has it in use, and all of it is on stable storage.
        mtime_ns: When the disk was last changed; of one in use: no change of ours is later than
            this. 0: nobody knows.
        body_crc: If clean: CRC-32 of the body, see `BodySum`.
        all_dirty: Every granule is dirty, whatever the body says.
        broken: It cannot be trusted.
        reason: Why it is broken.
    """

    name: str
    granularity: int
    size: int
    identity: bytes
    boot_id: bytes
    recording: bool
    clean: bool = False
    mtime_ns: int = 0
    body_crc: int = 0
    all_dirty: bool = False
    broken: bool = False
    reason: str = ""

    def pack(self) -> bytes:
        """Return the header's HEADER_SIZE bytes."""
        flags = self.clean * _CLEAN | self.recording * _RECORDING
        flags |= self.all_dirty * _ALL_DIRTY | self.broken * _BROKEN
        name = self.name.encode()
        reason = self.reason.encode(errors="replace")[:_MAX_REASON]
        fixed = _FIXED.pack(
            _MAGIC,
            VERSION,
            0,
            flags,
            self.granularity,
            self.size,
            self.boot_id,
            self.identity,
            self.mtime_ns,
            self.body_crc,
            len(name),
            len(reason),
        )
        packed = bytearray((fixed + name + reason).ljust(HEADER_SIZE, b"\0"))
        struct.pack_into("<I", packed, _CRC_AT, zlib.crc32(packed))
        return bytes(packed)

    def broke(self, reason: str) -> Header:
        """Return a header that says that the file cannot be trusted."""
        return replace(self, broken=True, clean=False, reason=reason)


def unpack(data: bytes) -> Header | None:
    """Return what a header says; None: it is damaged.

    Raises:
        UnknownVersion: It is of another version.
    """
    if len(data) != HEADER_SIZE or data[: len(_MAGIC)] != _MAGIC:
        return None
    fields = _FIXED.unpack_from(data)
    _, version, crc, flags, granularity, size, boot_id, identity, mtime_ns, body_crc, *lengths = (
        fields
    )
    if version != VERSION:
        raise UnknownVersion(f"is of version {version}, and only {VERSION} is known")
    unsummed = bytearray(data)
    struct.pack_into("<I", unsummed, _CRC_AT, 0)
    name_length, reason_length = lengths
    if (
        crc != zlib.crc32(unsummed)
        or granularity < _MIN_GRANULARITY
        or not is_power_of_2(granularity)
        or not 0 < name_length <= MAX_BITMAP_NAME
        or reason_length > _MAX_REASON
    ):
        return None
    reason_at = _FIXED.size + name_length
    try:
        name = data[_FIXED.size : reason_at].decode()
    except UnicodeDecodeError:
        return None
    return Header(
        name=name,
        granularity=granularity,
        size=size,
        identity=identity,
        boot_id=boot_id,
        recording=bool(flags & _RECORDING),
        clean=bool(flags & _CLEAN),
        mtime_ns=mtime_ns,
        body_crc=body_crc,
        all_dirty=bool(flags & _ALL_DIRTY),
        broken=bool(flags & _BROKEN),
        reason=data[reason_at : reason_at + reason_length].decode(errors="replace"),
    )


def judge(
    header: Header, *, size: int, identity: bytes, boot_id: bytes, mtime_ns: int
) -> str | None:
    """Say why what a file holds cannot be trusted for a disk; None: it can.

    Args:
        header: Of the file.
        size: Bytes of the disk, now.
        identity: Of the disk, now.
        boot_id: Of this run of the machine.
        mtime_ns: When the disk was last changed; 0: nobody knows.
    """
    if header.broken:
        return header.reason or "it is broken"
    if header.identity != identity:
        return "the disk is not the one that it was made for"
    if header.size != size:
        return f"the disk has {size} bytes, and had {header.size}"
    if not header.clean and header.boot_id != boot_id:
        return "the machine stopped while it was in use"
    is_changed = mtime_ns != header.mtime_ns if header.clean else mtime_ns > header.mtime_ns
    if is_changed:
        return "the disk was changed while it was not served"
    return None


class BodySum:
    """Sums up a body, parts that are all clean left out, so that holes do not matter."""

    def __init__(self) -> None:
        self.crc = 0

    def add(self, first: int, states: bytes) -> None:
        """Add the bytes of the granules from `first` on, in order."""
        if states.strip(b"\0"):
            self.crc = zlib.crc32(states, zlib.crc32(struct.pack("<Q", first), self.crc))
