"""What `file` and `host_device` share: opening, image locks, plain I/O.

The one base class between Driver and a concrete driver: the two differ in what they accept and in
how they zero and discard, and a forward for every other verb in both would say nothing.

Invariants
  P1  The kind of file is checked on the open descriptor, not only on its name.
  P2  The size is exact, and found once.
  P3  The image locks stay with the descriptor on which they were taken, until the node is closed:
      a descriptor that is opened for other options finds our own locks in its way.
  P4  What a file system or device cannot do is asked of it once, and then remembered.

Follows: QEMU block/file-posix.c.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from abc import abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block.driver import Driver, Reopening
from nbdfleece.block.drivers._direct import MIN_ALIGNMENT, DirectFile, probe
from nbdfleece.block.drivers.locks import ImageLocks, Locking, can_lock
from nbdfleece.datapath.fileio import FileIo
from nbdfleece.datapath.workers import Lane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from nbdfleece.block.driver import Place
    from nbdfleece.datapath.route import EarlyReply

_log: Final = logging.getLogger(__name__)

_BLKSSZGET: Final = 0x1268  # <linux/fs.h>
_INT: Final = struct.Struct("@i")
# What the kernel says of an operation that it will not do on this file later either.
_UNSUPPORTED: Final = (errno.ENOTSUP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY)


class OpenImage(NamedTuple):
    """An open image and what was found out about it."""

    fd: int
    direct_fd: int  # -1 without cache_direct
    size: int  # bytes
    block: int  # bytes of a logical block of a device; 1 for a file
    has_locks: bool
    is_all_hole: bool


class _InForce(NamedTuple):
    """What requests go through."""

    io: FileIo
    direct: DirectFile | None
    cache_direct: bool

    def fds(self) -> set[int]:
        """Return its descriptors."""
        return {self.io.fd} if self.direct is None else {self.io.fd, self.direct.fd}


class PosixDriver(Driver):
    """An image that the kernel knows by a name.

    Args:
        filename: Its path.
        locking: Whether to take QEMU's image locks.
        cache_direct: Bypass the page cache (`cache=none`).
    """

    def __init__(self, *, filename: str, locking: Locking, cache_direct: bool) -> None:
        self.filename: Final = filename
        self._locking = locking
        self._cache_direct = cache_direct
        self._io: FileIo | None = None
        self._direct: DirectFile | None = None
        self._locks: ImageLocks | None = None
        self._locked_fd = -1  # P3
        self._spare: _InForce | None = None  # of a reopening: what is not in force
        self._cannot: set[str] = set()  # P4: names of operations

    # --- what the concrete drivers say -----------------------------------------------------

    @abstractmethod
    def check_kind(self, mode: int) -> None:
        """Check `st_mode` of the image.

        Raises:
            CommandError: It is not what this driver is for.
        """

    def image_opened(self, image: OpenImage) -> None:
        """Learn what was found out; before the size is known to the node."""

    # --- life ------------------------------------------------------------------------------

    async def open(self) -> int:
        """Open the image; see Driver.open.

        Cancel: not cancelled.
        """
        image = await self._open_in_time(
            lambda: self._open(read_only=self.node.read_only, direct=self._cache_direct),
            direct=self._cache_direct,
        )
        opened = self._in_force(image, cache_direct=self._cache_direct)
        self._io, self._direct = opened.io, opened.direct
        if image.has_locks:
            self._locks = ImageLocks(image.fd, self.filename)
            self._locked_fd = image.fd
        self.image_opened(image)
        return image.size

    async def _open_in_time(self, call: Callable[[], OpenImage], *, direct: bool) -> OpenImage:
        lane = Lane(f"opening {self.filename}", 1)  # a dead network file system may keep it
        try:
            return await lane.submit(call)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            if direct and error.errno == errno.EINVAL:
                reason += " (its file system may not support O_DIRECT)"
            raise CommandError(f"Could not open '{self.filename}': {reason}") from error
        except ValueError as error:  # a zero byte, or no valid text
            raise CommandError(f"Could not open {self.filename!a}: not a file name") from error
        finally:
            lane.close()

    def _in_force(self, image: OpenImage, *, cache_direct: bool) -> _InForce:
        io = FileIo(image.fd, self.filename, readable_now=not cache_direct)
        if image.direct_fd < 0:
            return _InForce(io, None, cache_direct)
        alignment = max(MIN_ALIGNMENT, image.block)
        return _InForce(io, DirectFile(image.direct_fd, io, alignment=alignment), cache_direct)

    async def close(self) -> None:
        """Close the image, which drops its locks; see Driver.close."""
        closing = _InForce(self._opened(), self._direct, self._cache_direct)
        fds = closing.fds() | ({self._locked_fd} if self._locked_fd >= 0 else set())
        self._io = self._direct = self._locks = None
        await self._close(closing.io, fds)

    async def _close(self, io: FileIo, fds: Iterable[int]) -> None:
        """Close descriptors, in a thread; the kernel has let go of them whatever it says then."""
        try:
            await io.run(lambda: _close(fds), "close", 0, 0)
        except IoError as error:
            _log.error("node '%s': %s", self.node.name, error)
        finally:
            io.close()

    async def reopen_prepare(self, to: Reopening) -> None:
        """Open the image in the other way, where that makes a difference.

        Raises:
            CommandError: It cannot be, or another file has its name now. Nothing has changed.
        """
        if (to.read_only, to.direct) == (self.node.read_only, self._cache_direct):
            return
        fd = self._opened().fd
        image = await self._open_in_time(
            lambda: self._open(read_only=to.read_only, direct=to.direct, same_as=fd),
            direct=to.direct,
        )
        self._spare = self._in_force(image, cache_direct=to.direct)

    def reopen_apply(self, to: Reopening) -> None:
        """Send requests through what was opened; see Driver.reopen_apply."""
        self._swap()

    def reopen_undo(self) -> None:
        """Send requests through what they went through before."""
        self._swap()

    def _swap(self) -> None:
        if self._spare is not None:
            spare, self._spare = (
                self._spare,
                _InForce(self._opened(), self._direct, self._cache_direct),
            )
            self._io, self._direct, self._cache_direct = spare

    async def reopen_finish(self) -> None:
        """Close what is not in force; see Driver.reopen_finish."""
        spare, self._spare = self._spare, None
        if spare is None:
            return
        await self._close(spare.io, spare.fds() - {self._locked_fd})

    def _open(self, *, read_only: bool, direct: bool, same_as: int = -1) -> OpenImage:
        """Open the image; in a thread, so nothing of ours changes. Nothing stays open on errors.

        Args:
            read_only: Not for writing.
            direct: Bypass the page cache.
            same_as: A descriptor of ours of the same file, which has the locks; -1: there is none.
        """
        access = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        self.check_kind(os.stat(self.filename).st_mode)  # opening a fifo would wait for ever
        fds = [os.open(self.filename, access)]
        try:
            fd = fds[0]
            if same_as >= 0:
                self._check_same(fd, same_as)
            mode = os.fstat(fd).st_mode
            self.check_kind(mode)
            size = os.lseek(fd, 0, os.SEEK_END)  # exact, also of a device
            block = _logical_block(fd) if stat.S_ISBLK(mode) else 1
            if direct:
                fds.append(os.open(self.filename, access | os.O_DIRECT))
                self._check_direct(fd, fds[1], size, max(MIN_ALIGNMENT, block))
            wants_locks = self._locking is not Locking.OFF and same_as < 0
            has_locks = wants_locks and self._find_locks(fd)
        except BaseException:
            _close(fds)
            raise
        direct_fd = fds[1] if direct else -1
        return OpenImage(fd, direct_fd, size, block, has_locks, _is_all_hole(fd))

    def _check_same(self, fd: int, before: int) -> None:
        if not os.path.samestat(os.fstat(fd), os.fstat(before)):
            raise CommandError(f"Could not open '{self.filename}': another file is there now")

    def _check_direct(self, fd: int, direct_fd: int, size: int, alignment: int) -> None:
        if not os.path.samestat(os.fstat(fd), os.fstat(direct_fd)):
            raise CommandError(f"Could not open '{self.filename}': it was replaced meanwhile")
        if size >= alignment:
            probe(direct_fd, alignment)

    def _find_locks(self, fd: int) -> bool:
        has_locks = can_lock(fd)
        if not has_locks and self._locking is Locking.ON:
            raise CommandError(
                f"Could not lock '{self.filename}': its file system has no image locks"
            )
        return has_locks

    def _opened(self) -> FileIo:
        assert self._io is not None, f"node '{self.node.name}' is open"
        return self._io

    # --- permissions -----------------------------------------------------------------------

    # Before `open` and behind `close` there is nothing to lock: a new node has no parents, and its
    # permissions are worked out again when it has been opened.

    def check_permissions(self, perm: int, shared: int) -> None:
        """Lock the image for them; see Driver.check_permissions."""
        if self._locks is not None:
            self._locks.check(perm, shared)

    def set_permissions(self, perm: int, shared: int) -> None:
        """Drop the locks not needed any more; see Driver.set_permissions."""
        if self._locks is not None:
            self._locks.commit(perm, shared)

    def abort_permissions(self) -> None:
        """Go back to the locks of before; see Driver.abort_permissions."""
        if self._locks is not None:
            self._locks.abort()

    # --- I/O -------------------------------------------------------------------------------

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Read what is in the page cache; see Driver.read_now."""
        io = self._io
        return io is not None and io.read_now(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """See Driver.read."""
        if self._direct is not None:
            await self._direct.read(offset, view)
        else:
            await self._opened().read(offset, view)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """See Driver.write."""
        if self._direct is not None:
            await self._direct.write(offset, data, fua=fua)
        else:
            await self._opened().write(offset, data, fua=fua)

    def place(self, offset: int, length: int) -> Place | None:
        """Return the file, unless requests take another way (O_DIRECT)."""
        if self._io is None or self._direct is not None:
            return None
        return self._io, offset, None

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        """See Driver.write_replying."""
        if self._direct is not None:
            await self._direct.write(offset, data, fua=False)
        else:
            await self._opened().write(offset, data, fua=False, reply=reply)

    async def flush(self) -> None:
        """See Driver.flush."""
        await self._opened().sync()

    # --- facts -----------------------------------------------------------------------------

    def plain_file(self) -> FileIo | None:
        """Return the open file, unless requests take another way than it (O_DIRECT)."""
        return None if self._cache_direct else self._io

    def bypasses_cache(self) -> bool:
        """Tell whether the file is open with O_DIRECT."""
        return self._cache_direct

    def image_name(self) -> str:
        """Return the path."""
        return self.filename

    def image_options(self) -> dict[str, object]:
        """Return driver and path; see Driver.image_options."""
        return {"driver": self.name, "filename": self.filename}

    # --- for the concrete drivers ------------------------------------------------------------

    async def try_once(self, name: str, operation: Awaitable[None]) -> bool:
        """Await an operation that may not exist here.

        Args:
            name: Under which it is remembered not to exist (see `can_try`).
            operation: The call.

        Returns:
            False when the file or device cannot do it, always or for this range; nothing has
            changed then.

        Raises:
            IoError: It can, and failed.
        """
        try:
            await operation
        except IoError as error:
            if error.errno in _UNSUPPORTED:
                self._cannot.add(name)
                return False
            if error.errno == errno.EINVAL:  # as some file systems say of odd ranges
                return False
            raise
        return True

    def can_try(self, name: str) -> bool:
        """Tell whether the operation has not been found to be impossible here."""
        return name not in self._cannot


def _logical_block(fd: int) -> int:
    size: int = _INT.unpack(fcntl.ioctl(fd, _BLKSSZGET, bytes(_INT.size)))[0]
    return size


def _is_all_hole(fd: int) -> bool:
    """Tell whether the file system knows that the file holds no data at all."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO  # no data up to the end
    return False


def _close(fds: Iterable[int]) -> None:
    """Close all; raise the last error."""
    failed: OSError | None = None
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed
