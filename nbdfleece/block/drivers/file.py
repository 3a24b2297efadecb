"""Driver `file`: a regular file.

Zeroing, in the order of trying: may the space go, punch a hole; else, or where there are no holes,
have the file system zero the range; else the node writes zeroes. Either of the first two is fast.

Follows: QEMU block/file-posix.c (bdrv_file).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, ClassVar

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block.drivers._posix import OpenImage, PosixDriver
from nbdfleece.datapath.workers import Lane

if TYPE_CHECKING:
    from nbdfleece.base.extent import Extent
    from nbdfleece.block.drivers.locks import Locking


class FileDriver(PosixDriver):
    """A regular file of any size, also one that is no multiple of anything.

    Args:
        filename: Its path.
        locking: Whether to take QEMU's image locks.
        cache_direct: Bypass the page cache (`cache=none`).
        new_and_sparse: The caller has just made the file, and set its size, and nothing else. Where
            the file system shows any data all the same, that is not passed on.
    """

    name: ClassVar[str] = "file"

    def __init__(
        self, *, filename: str, locking: Locking, cache_direct: bool, new_and_sparse: bool
    ) -> None:
        super().__init__(filename=filename, locking=locking, cache_direct=cache_direct)
        self._new_and_sparse = new_and_sparse

    def check_kind(self, mode: int) -> None:
        """Insist on a regular file."""
        if not stat.S_ISREG(mode):
            raise CommandError(f"'file' driver requires '{self.filename}' to be a regular file")

    def image_opened(self, image: OpenImage) -> None:
        """Look whether a new file is as empty as the caller says."""
        self._new_and_sparse = self._new_and_sparse and image.is_all_hole

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """See Driver.write_zeroes; `no_fallback` changes nothing, as both ways are fast."""
        io = self._opened()
        done = False
        if may_unmap and self.can_try("punch hole"):
            done = await self.try_once("punch hole", io.punch_hole(offset, length))
        if not done and self.can_try("zero range"):
            done = await self.try_once("zero range", io.zero_range(offset, length))
        if not done:
            raise IoError(errno.ENOTSUP, self._where("write zeroes", offset, length))
        if fua:
            await io.sync()

    async def truncate(self, size: int) -> None:
        """Set the size of the file; see Driver.truncate."""
        await self._opened().truncate(size)

    async def discard(self, offset: int, length: int) -> None:
        """Punch a hole, where there are holes; see Driver.discard."""
        if self.can_try("punch hole"):
            await self.try_once("punch hole", self._opened().punch_hole(offset, length))

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Tell data from holes, as the file system sees them."""
        return await self._opened().status(offset, length)

    def reads_zero_when_new(self) -> bool:
        """Tell whether the file was made empty for this node."""
        return self._new_and_sparse

    async def allocated_size(self) -> int | None:
        """Return what the file takes of its file system; does not wait behind stuck requests."""
        fd = self._opened().fd
        # Not in the lanes of the FileIo: all their threads may be waiting for a stuck disk.
        lane = Lane(f"stat {self.filename}", 1)
        try:
            found = await lane.submit(lambda: os.fstat(fd))
        except OSError as error:
            raise IoError.from_os(error, self._where("stat", 0, 0)) from error
        finally:
            lane.close()
        return found.st_blocks * 512  # st_blocks counts 512 bytes whatever the file system
