"""Driver `host_device`: a block device.

::

    write zeroes   |-edge-|======== blocks ========|-edge-|    edges of less than a block: written
    discard        | kept |======== blocks ========| kept |    rounded inwards

Zeroing whole blocks, in the order of trying: may the space go, punch a hole (the kernel does it
only where the device zeroes what it unmaps, and fast); else BLKZEROOUT, which the kernel may do by
writing, and which is therefore no way for `no_fallback`.

A discarded range reads as the device likes.

Follows: QEMU block/file-posix.c (bdrv_host_device); Linux block/ioctl.c and block/fops.c.
"""

from __future__ import annotations

import errno
import fcntl
import stat
import struct
from typing import ClassVar, Final

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.units import align_down, align_up
from nbdfleece.block.drivers._posix import OpenImage, PosixDriver

# <linux/fs.h>; not in any module of the standard library.
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_RANGE: Final = struct.Struct("@QQ")  # offset, length


class HostDeviceDriver(PosixDriver):
    """A block device."""

    name: ClassVar[str] = "host_device"
    _block = 512  # bytes of a logical block; known when the device is open

    def check_kind(self, mode: int) -> None:
        """Insist on a block device."""
        if not stat.S_ISBLK(mode):
            raise CommandError(
                f"'host_device' driver requires '{self.filename}' to be a block device"
            )

    def image_opened(self, image: OpenImage) -> None:
        """Remember the unit of the device."""
        self._block = image.block

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Zero whole blocks by the device, the edges by writing; see Driver.write_zeroes."""
        io = self._opened()
        end = offset + length
        first, last = self._whole_blocks(offset, end)
        if first < last:
            done = False
            if may_unmap and self.can_try("punch hole"):
                done = await self.try_once("punch hole", io.punch_hole(first, last - first))
            if not done and not no_fallback and self.can_try("zero out"):
                done = await self.try_once("zero out", self._ioctl(_BLKZEROOUT, first, last))
            if not done:
                raise IoError(errno.ENOTSUP, self._where("write zeroes", offset, length))
        for start, stop in ((offset, first), (last, end)):
            if start < stop:
                await self.write(start, memoryview(bytes(stop - start)), fua=False)
        if fua:
            await io.sync()

    async def discard(self, offset: int, length: int) -> None:
        """Discard whole blocks, where the device can; see Driver.discard."""
        first, last = self._whole_blocks(offset, offset + length)
        if first < last and self.can_try("discard"):
            await self.try_once("discard", self._ioctl(_BLKDISCARD, first, last))

    async def allocated_size(self) -> int | None:
        """Say nothing: a device does not tell."""
        return None

    def _whole_blocks(self, offset: int, end: int) -> tuple[int, int]:
        """Round inwards; both `end` when no whole block is inside."""
        first, last = align_up(offset, self._block), align_down(end, self._block)
        return (first, last) if first < last else (end, end)

    async def _ioctl(self, request: int, first: int, last: int) -> None:
        io = self._opened()
        verb = "discard" if request == _BLKDISCARD else "zero out"
        argument = _RANGE.pack(first, last - first)
        await io.change(lambda: fcntl.ioctl(io.fd, request, argument), verb, first, last - first)
