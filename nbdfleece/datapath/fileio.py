"""System calls on one open file: at once when they cannot block, in threads when they may.

Four lanes per file. Small buffered writes go through one thread in order of submission: they are
memory copies, and one thread that stays awake does a burst of them faster than many that wake each
other. Those that are nothing else than that (`begin`) have a thread of their own, and are made by
one call where there are several (`writes`). The others save old data to this file before, or are
the first in their place: they take longer, and are begun while the event loop still works. What
waits for a disk has up to FILE_THREADS threads for reads and as many for changes: when writes are
stuck, reads go on.

Invariants
  F1  `read_now` never blocks: it reads with RWF_NOWAIT and gives up where the kernel would wait.
  F2  Nothing here decides policy: errors are IoError with the errno of the system call.
  F3  What the kernel could not write back it tells once, to whoever syncs first, and forgets the
      data. Nothing is called stable from then on: else that of another client would be, and is not.
      (What went past the page cache it never took; QEMU makes the same difference.)

# FAST: RWF_NOWAIT serves a cached 4 KiB read in 1.1 microseconds against about 65 through a
# thread; plain form in tests/reference/fileio.py
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import TYPE_CHECKING, Final, TypeVar

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.base.limits import FILE_THREADS
from nbdfleece.datapath.workers import Lane
from nbdfleece.datapath.writes import BatchWriter, SavingWrite, Write, read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.datapath.route import EarlyReply
    from nbdfleece.datapath.workers import Op
    from nbdfleece.datapath.writes import Save, SaveStates

T = TypeVar("T")

_log: Final = logging.getLogger(__name__)

_PUNCH_HOLE: Final = 0x02  # FALLOC_FL_*, not in the os module
_KEEP_SIZE: Final = 0x01
_ZERO_RANGE: Final = 0x10
_STATUS_EXTENTS: Final = 1024  # most extents found by one call
_SMALL_WRITE: Final = 128 * 1024  # larger writes gain more from a second core than from order

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FileIo:
    """I/O on one open file or block device.

    Args:
        fd: Open for what will be asked of it. The caller keeps it, and closes it behind `close`.
        name: For messages: what the file is to the user.
        readable_now: Reads may be tried with RWF_NOWAIT (not so with O_DIRECT).

    Attributes:
        uses_cache: Something may be in the page cache that is not on the disk.
    """

    __slots__ = (
        "_batches",
        "_data_end",
        "_data_start",
        "_lost",
        "_reads",
        "_serial",
        "_writes",
        "fd",
        "name",
        "readable_now",
        "uses_cache",
    )

    def __init__(self, fd: int, name: str, *, readable_now: bool = True) -> None:
        self.fd = fd
        self.name = name
        self.readable_now = self.uses_cache = readable_now
        self._batches = Lane(f"{name} writes in place", 1, BatchWriter)
        self._serial = Lane(f"{name} small writes", 1)
        self._writes = Lane(f"{name} writes", FILE_THREADS)
        self._reads = Lane(f"{name} reads", FILE_THREADS)
        self._data_start = self._data_end = 0  # a range known to be allocated data
        self._lost = 0  # errno: F3; also set in threads

    def close(self) -> None:
        """Let the threads go. Calls under way run to their end."""
        for lane in (self._batches, self._serial, self._writes, self._reads):
            lane.close()

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from the page cache; False when that needs waiting, or fails."""
        if not self.readable_now:
            return False
        try:
            return os.preadv(self.fd, (view,), offset, os.RWF_NOWAIT) == len(view)
        except OSError:
            return False

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`, in a thread.

        Raises:
            IoError: The read failed; EIO when the file ends inside the range.
        """
        await self.run(lambda: read_all(self.fd, offset, view), "read", offset, len(view))

    async def write(
        self, offset: int, data: memoryview, *, fua: bool, reply: EarlyReply | None = None
    ) -> None:
        """Write all of `data`; with `fua`, to stable storage.

        `reply`, if given, may have been sent when a write without `fua` returns.
        """
        fd = self.fd
        try:
            if fua:
                await self._writes.submit(
                    lambda: self.durably(lambda flags: write_all(fd, offset, data, flags))
                )
            else:
                lane = self._serial if len(data) <= _SMALL_WRITE else self._writes
                await lane.submit(Write(fd, offset, data), reply)
        except OSError as error:
            raise self.write_error(error, offset, len(data)) from error

    def begin(
        self,
        write: Write,
        reply: EarlyReply | None,
        callback: Callable[[Op[None]], object],
    ) -> Op[None]:
        """Begin a write that is nothing else than that; see Lane.submit.

        An error of the Op is an OSError.
        """
        lane = self._batches if len(write.data) <= _SMALL_WRITE else self._writes
        return lane.submit(write, reply, callback)

    async def save_then_write(
        self,
        target: FileIo,
        saves: list[Save],
        states: SaveStates,
        offset: int,
        data: memoryview,
        reply: EarlyReply | None = None,
    ) -> None:
        """Copy old data to `target`, set its states, then write `data` here: one hop.

        Args:
            target: Where old data goes, at its own offset.
            saves: What to save; states are set as soon as their old data is in `target`.
            states: What to set.
            offset: Where `data` goes.
            data: The new data.
            reply: May have been sent when this returns; None: nothing is.

        Raises:
            SaveError: A copy failed; the states of what was not copied are unchanged.
            IoError: All copies are done and the write failed.
        """
        # In the lane of the target: when it is stuck, writes here that need no copy must go on. And
        # reads that wait for the disk must not queue up behind each other.
        cached = all(not isinstance(old, int) for _, old, _, _, _ in saves)
        lane = target._serial if cached and len(data) <= _SMALL_WRITE else target._writes
        write = SavingWrite(self.fd, offset, data, target.fd, saves, states)
        try:
            await lane.submit(write, reply)
        except OSError as error:
            raise self.write_error(error, offset, len(data)) from error

    async def sync(self) -> None:
        """Return when all that was written before is on stable storage (fdatasync).

        Raises:
            IoError: It failed, now or at any time before (F3).
        """
        await self.change(self._sync, "flush", 0, 0)

    def _sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._lose(error)
            raise
        self._check_nothing_lost()

    def durably(self, write: Callable[[int], None]) -> None:
        """Call `write` with RWF_DSYNC; in a thread.

        Raises:
            OSError: It failed, or something else had been lost before (F3).
        """
        try:
            write(os.RWF_DSYNC)
        except OSError as error:
            if error.errno == errno.EIO:
                self._lose(error)
            else:  # no space, say: for this, which is no loss, or for what was written back?
                write(0)
                self._lose(error)
            raise
        self._check_nothing_lost()

    def _lose(self, error: OSError) -> None:
        if self.uses_cache and not self._lost:
            self._lost = error.errno or errno.EIO
            _log.error(
                "'%s': the kernel has lost data, and no flush succeeds any more: %s",
                self.name,
                os.strerror(self._lost),
            )

    def _check_nothing_lost(self) -> None:
        if self._lost:
            raise OSError(self._lost, "data that was written before is lost")

    async def truncate(self, size: int) -> None:
        """Set the size; what is added reads as zeroes."""
        self._forget_data()
        await self.change(lambda: os.ftruncate(self.fd, size), "truncate", size, 0)

    async def punch_hole(self, offset: int, length: int) -> None:
        """Give the range's space back; it reads as zeroes.

        Raises:
            IoError: ENOTSUP where the file system cannot.
        """
        self._forget_data()
        await self.change(
            lambda: _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length),
            "punch hole",
            offset,
            length,
        )
        self._forget_data()  # a status call may have looked before the hole was there

    async def zero_range(self, offset: int, length: int) -> None:
        """Make the range read as zeroes and keep its space.

        Raises:
            IoError: ENOTSUP where the file system cannot.
        """
        self._forget_data()
        await self.change(
            lambda: _fallocate(self.fd, _ZERO_RANGE | _KEEP_SIZE, offset, length),
            "zero range",
            offset,
            length,
        )
        self._forget_data()

    async def status(self, offset: int, length: int) -> list[Extent]:
        """Return extents of the range by SEEK_DATA and SEEK_HOLE, at most some hundreds.

        The last region of data found is remembered, so asking again for parts of it costs nothing;
        DATA remains a right answer whatever others do to the file.
        """
        if self._data_start <= offset and offset + length <= self._data_end:
            return [Extent(offset, length, DATA)]
        extents = await self.run(
            lambda: _seek_extents(self.fd, offset, offset + length), "block status", offset, length
        )
        last = extents[-1]
        if last.flags == DATA:
            self._data_start, self._data_end = last.offset, last.end
        return extents

    async def run(self, call: Callable[[], T], verb: str, offset: int, length: int) -> T:
        """Run a system call that may block and changes nothing, in a thread.

        Raises:
            IoError: What the call raised, said as `verb` of the range.
        """
        return await self._in_lane(self._reads, call, verb, offset, length)

    async def change(self, call: Callable[[], T], verb: str, offset: int, length: int) -> T:
        """As `run`, for a call that changes the file."""
        return await self._in_lane(self._writes, call, verb, offset, length)

    async def _in_lane(
        self, lane: Lane, call: Callable[[], T], verb: str, offset: int, length: int
    ) -> T:
        try:
            return await lane.submit(call)
        except OSError as error:
            raise self._error(error, verb, offset, length) from error

    def _forget_data(self) -> None:
        self._data_start = self._data_end = 0

    def write_error(self, error: OSError, offset: int, length: int) -> IoError:
        """Return what a failed write is to those who asked for it."""
        return self._error(error, "write", offset, length)

    def _error(self, error: OSError, verb: str, offset: int, length: int) -> IoError:
        return IoError.from_os(error, f"'{self.name}': {verb} of {length} bytes at {offset}")


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _seek_extents(fd: int, offset: int, end: int) -> list[Extent]:
    extents: list[Extent] = []
    while offset < end and len(extents) < _STATUS_EXTENTS:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                data = end
            elif error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # cannot tell: all is data
                extents.append(Extent(offset, end - offset, DATA))
                return extents
            else:
                raise
        if data > offset:
            stop = min(data, end)
            extents.append(Extent(offset, stop - offset, HOLE | ZERO))
            offset = stop
            continue
        stop = min(os.lseek(fd, offset, os.SEEK_HOLE), end)
        if stop == offset:  # a hole was punched between the two calls: look again
            continue
        extents.append(Extent(offset, stop - offset, DATA))
        offset = stop
    return extents
