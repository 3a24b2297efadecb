"""Reads and writes past the page cache (`cache=none`), of any alignment.

::

    request   |---head---|=========== middle ===========|---tail---|
              buffered     O_DIRECT through aligned memory  buffered

The middle is whole pages. Head and tail go through the page cache; the kernel keeps a direct access
and the page cache coherent, provided that no page is written both ways at the same time. So writes
whose pages overlap go one after another.

Invariants
  D1  No two writes under way share a page.
  D2  Memory given to the kernel for direct I/O is aligned to a page, offsets and lengths too.

Correct first: every piece is copied through a buffer of its own.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

from nbdfleece.base.limits import COPY_PIECE
from nbdfleece.base.units import align_down, align_up
from nbdfleece.block.ranges import RangeList

if TYPE_CHECKING:
    from nbdfleece.datapath.fileio import FileIo

MIN_ALIGNMENT: Final = 4096  # serves every file system and the usual sectors; also the page


class DirectFile:
    """Direct I/O beside a FileIo of the same file.

    Args:
        fd: Open with O_DIRECT. The caller keeps it.
        buffered: The same file through the page cache.
        alignment: What the device asks for, a multiple of MIN_ALIGNMENT.
    """

    def __init__(self, fd: int, buffered: FileIo, *, alignment: int) -> None:
        self.fd = fd
        self._buffered = buffered
        self._alignment = alignment
        self._writing = RangeList()

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`.

        Raises:
            IoError: The read failed; EIO when the file ends inside the range.

        Cancel: not cancelled.
        """
        fd, buffered_fd, alignment = self.fd, self._buffered.fd, self._alignment
        await self._buffered.run(
            lambda: _read(fd, buffered_fd, alignment, offset, view), "read", offset, len(view)
        )

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write all of `data`; with `fua`, to stable storage.

        Raises:
            IoError: Any part of the range may have been written.

        Cancel: not cancelled.
        """
        fd, buffered_fd, alignment = self.fd, self._buffered.fd, self._alignment
        first = align_down(offset, alignment)
        length = align_up(offset + len(data), alignment) - first
        # Cannot wait for itself: a listed write holds nothing and ends by itself.
        await self._writing.wait_clear(first, length)
        key = self._writing.add(first, length)  # no await since the look
        if (first, length) != (offset, len(data)):
            self._buffered.uses_cache = True

        def work(flags: int) -> None:
            _write(fd, buffered_fd, alignment, offset, data, flags)

        try:
            await self._buffered.change(
                (lambda: self._buffered.durably(work)) if fua else (lambda: work(0)),
                "write",
                offset,
                len(data),
            )
        finally:
            self._writing.remove(key)


def probe(fd: int, alignment: int) -> None:
    """Read one aligned piece.

    Raises:
        OSError: Direct I/O of this alignment is not possible here.
    """
    with mmap.mmap(-1, alignment) as bounce:
        os.preadv(fd, (bounce,), 0)


def _cut(offset: int, end: int, alignment: int) -> tuple[int, int]:
    """Return where the aligned middle begins and ends; both `end` when there is none."""
    first, last = align_up(offset, alignment), align_down(end, alignment)
    return (first, last) if first < last else (end, end)


def _read(fd: int, buffered_fd: int, alignment: int, offset: int, view: memoryview) -> None:
    end = offset + len(view)
    first, last = _cut(offset, end, alignment)
    _read_buffered(buffered_fd, offset, view[: first - offset])
    if first < last:
        with mmap.mmap(-1, min(last - first, COPY_PIECE)) as bounce, memoryview(bounce) as memory:
            at = first
            while at < last:
                with memory[: min(len(bounce), last - at)] as piece:
                    count = os.preadv(fd, (piece,), at)
                    if count <= 0:
                        raise OSError(errno.EIO, "the file ends here")
                    if count % alignment:  # a file that has shrunk: let the tail find its end
                        count = align_down(count, alignment)
                        if count == 0:
                            raise OSError(errno.EIO, "the file ends here")
                    view[at - offset : at - offset + count] = piece[:count]
                at += count
    _read_buffered(buffered_fd, last, view[last - offset :])


def _read_buffered(fd: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(fd, (view,), offset)
        if count == 0:
            raise OSError(errno.EIO, "the file ends here")
        view = view[count:]
        offset += count


def _write(
    fd: int, buffered_fd: int, alignment: int, offset: int, data: memoryview, flags: int
) -> None:
    end = offset + len(data)
    first, last = _cut(offset, end, alignment)
    _write_buffered(buffered_fd, offset, data[: first - offset], flags)
    if first < last:
        with mmap.mmap(-1, min(last - first, COPY_PIECE)) as bounce, memoryview(bounce) as memory:
            at = first
            while at < last:
                with memory[: min(len(bounce), last - at)] as piece:
                    piece[:] = data[at - offset : at - offset + len(piece)]
                    count = align_down(os.pwritev(fd, (piece,), at, flags), alignment)
                if count <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                at += count
    _write_buffered(buffered_fd, last, data[last - offset :], flags)


def _write_buffered(fd: int, offset: int, data: memoryview, flags: int) -> None:
    while data:
        count = os.pwritev(fd, (data,), offset, flags)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        data = data[count:]
        offset += count
