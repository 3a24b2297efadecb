"""A new file of a backup, written from front to back.

`prepare` does for a run of data what costs time, and may run in any thread; `NewImage.put` takes
what it returns, in ascending order, in one thread at a time.

Everything here blocks.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.backup.content import ContentHash, digest_of
from nbdfleece.base.limits import BACKUP_CLUSTER
from nbdfleece.base.units import MiB
from nbdfleece.formats.qcow2.writer import ImageWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ZEROES: Final = bytes(BACKUP_CLUSTER)
_LEVEL: Final = 3  # of compression: near the best for disks, at twice the speed of zlib's default
_BEHIND: Final = 16 * MiB  # bytes that are written at a time behind our back
_WINDOW: Final = -12  # of raw deflate streams in qcow2, as zlib says it


class Prepared(NamedTuple):
    """A run, ready to be written.

    Attributes:
        offset: Where in the disk; at a multiple of a cluster.
        length: Of whole clusters, but for the image's end; of data, inside one chunk.
        data: The data; None: it reads as zeroes.
        digest: Of the data.
        packed: Per cluster its compressed data, or None where that is no shorter.
    """

    offset: int
    length: int
    data: memoryview | None
    digest: bytes = b""
    packed: tuple[bytes | None, ...] = ()


def zeroes(offset: int, length: int) -> Prepared:
    """Return a run that reads as zeroes."""
    return Prepared(offset, length, None)


def prepare(
    offset: int, buffer: bytearray, start: int, length: int, *, compress: bool
) -> list[Prepared]:
    """Find zeroes in a run of data, hash the rest, and compress it if that is wanted.

    Args:
        offset: Where the run is in the disk.
        buffer: Holds it; unchanged until the result was written.
        start: Where it begins there.
        length: Of the run.
        compress: Whether to.
    """
    view = memoryview(buffer)
    found: list[Prepared] = []
    for at, end, is_zero in _by_zero(buffer, start, length):
        if is_zero:
            found.append(zeroes(offset + at, end - at))
            continue
        data = view[start + at : start + end]
        packed: tuple[bytes | None, ...] = ()
        if compress:
            packed = tuple(
                _pack(data[each : each + BACKUP_CLUSTER]) for each in _clusters(len(data))
            )
        found.append(Prepared(offset + at, len(data), data, digest_of(data), packed))
    return found


class NewImage:
    """A file of a backup that is being written.

    Args:
        fd: The file, empty; stays open.
        size: Bytes of the image (content.image_size).
        backing: Name of the file below; None: this is a full one.

    Attributes:
        data_bytes: Bytes of the disk that it holds data of.
    """

    def __init__(self, fd: int, size: int, backing: str | None) -> None:
        self.data_bytes = 0
        self._begun = 0  # up to here the kernel has been told to write
        self._fd = fd
        self._is_full = backing is None
        self._hash = ContentHash(size)
        self._writer = ImageWriter(
            size,
            cluster_bits=BACKUP_CLUSTER.bit_length() - 1,
            backing=None if backing is None else (backing, "qcow2"),
        )

    def put(self, runs: Iterable[Prepared]) -> None:
        """Write runs that come behind all that were written.

        Raises:
            OSError: The file is of no use any more.
        """
        for run in runs:
            if run.data is not None:
                self._hash.data(run.offset, run.length, run.digest)
                self._write(self._data(run, run.data))
                self.data_bytes += run.length
            elif not self._is_full:
                self._hash.zero(run.offset, run.length)
                self._write(self._writer.zeroes(run.offset, run.length))

    def finish(self) -> tuple[str, int]:
        """Complete the file; return the hash of its contents and its bytes. Not synced.

        Raises:
            OSError: As in `put`.
        """
        self._write(self._writer.finish())
        return self._hash.hexdigest(), os.fstat(self._fd).st_size

    def _data(self, run: Prepared, data: memoryview) -> Iterator[tuple[int, object]]:
        if not run.packed:
            yield from self._writer.data(run.offset, data)
            return
        for at, packed in zip(_clusters(run.length), run.packed, strict=True):
            if packed is None:
                yield from self._writer.data(run.offset + at, data[at : at + BACKUP_CLUSTER])
            else:
                yield from self._writer.compressed(run.offset + at, packed)

    def _write(self, pieces: Iterable[tuple[int, object]]) -> None:
        for offset, piece in pieces:
            assert isinstance(piece, bytes | bytearray | memoryview)
            view, at = memoryview(piece), offset
            while view:
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
            if at - self._begun >= _BEHIND:
                # Lets the kernel begin to write, so that the sync at the end finds little to do,
                # and keeps the guests' data in the page cache rather than ours.
                os.posix_fadvise(self._fd, self._begun, at - self._begun, os.POSIX_FADV_DONTNEED)
                self._begun = at


def _clusters(length: int) -> range:
    return range(0, length, BACKUP_CLUSTER)


def _by_zero(buffer: bytearray, base: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, reads as zeroes), from `base` on, of the runs of clusters."""
    start, was_zero = 0, None
    for at in _clusters(length):
        end = min(at + BACKUP_CLUSTER, length)
        is_zero = buffer.startswith(_ZEROES[: end - at], base + at)
        if was_zero is not None and is_zero is not was_zero:
            yield start, at, was_zero
            start = at
        was_zero = is_zero
    if was_zero is not None:
        yield start, length, was_zero


def _pack(data: memoryview) -> bytes | None:
    """Return a cluster compressed; None: that is no shorter."""
    if len(data) < BACKUP_CLUSTER:  # at the disk's end: what is decompressed is a whole cluster
        data = memoryview(bytes(data) + bytes(BACKUP_CLUSTER - len(data)))
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW)
    found = packer.compress(data) + packer.flush()
    return found if len(found) < BACKUP_CLUSTER else None
