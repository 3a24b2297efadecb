"""The hash of a file's contents: what it says of the disk, whatever the form in which it says so.

SHA-256 over the size of the image and, in ascending order, over a record for each run of clusters
that the file holds::

    size of the image                8 bytes, big-endian
    offset, length, SHA-256 of data  8 + 8 + 32 bytes, a run of data inside one aligned chunk
    offset, length, 32 zero bytes    8 + 8 + 32 bytes, a run that reads as zeroes, of any length

A run ends at the image's end, also inside a cluster. That is the disk's end rounded up to a
sector; what is between them is zeroes. Clusters that the file does not hold have no
record: a full file shows zeroes there, an increment what is below. So each file is checked by
itself, and a restored point is right when each file of its lineage is. A run of data is as long as
it can be inside its chunk, so the hash does not depend on how the file was written.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

from nbdfleece.base.units import MiB, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK: Final = MiB  # runs of data end at its multiples, so that they can be hashed side by side

_SECTOR: Final = 512
_RECORD: Final = struct.Struct(">QQ32s")
_SIZE: Final = struct.Struct(">Q")
_ZERO: Final = bytes(32)


def image_size(size: int) -> int:
    """Return the size of the image of a disk of `size` bytes: whole sectors, as QEMU needs it."""
    return align_up(size, _SECTOR)


def split(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of CHUNK."""
    end = offset + length
    while offset < end:
        here = min(align_down(offset, CHUNK) + CHUNK, end)
        yield offset, here - offset
        offset = here


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the hash of a run of data. Lets other threads run meanwhile."""
    return hashlib.sha256(data).digest()


class ContentHash:
    """Takes the runs of one file in ascending order; neighbours of one kind are joined as need be.

    Args:
        size: Bytes of the image.
    """

    def __init__(self, size: int) -> None:
        self._hash = hashlib.sha256(_SIZE.pack(size))
        self._zero = (0, 0)

    def data(self, offset: int, length: int, digest: bytes) -> None:
        """Take a run of data; it is the whole run, as far as that lies in its chunk."""
        self._end_zero()
        self._hash.update(_RECORD.pack(offset, length, digest))

    def zero(self, offset: int, length: int) -> None:
        """Take a run that reads as zeroes, or a part of one."""
        start, so_far = self._zero
        if so_far and start + so_far == offset:
            self._zero = (start, so_far + length)
            return
        self._end_zero()
        self._zero = (offset, length)

    def hexdigest(self) -> str:
        """Return the hash of what was taken, as in the manifest."""
        self._end_zero()
        return self._hash.hexdigest()

    def _end_zero(self) -> None:
        offset, length = self._zero
        if length:
            self._hash.update(_RECORD.pack(offset, length, _ZERO))
        self._zero = (0, 0)
