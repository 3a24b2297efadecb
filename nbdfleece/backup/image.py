"""One file of a backup, read: a qcow2 image as we write them.

What we never write (internal snapshots, external data, encryption, subclusters) is refused. Every
offset is checked against the file before it is used; the file may have been damaged, or replaced.

Everything here blocks.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from nbdfleece.backup.content import CHUNK, split
from nbdfleece.backup.errors import BackupError, Damaged
from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import BACKUP_CLUSTER, MAX_QCOW2_BACKING_NAME
from nbdfleece.base.units import ceil_div
from nbdfleece.formats.qcow2 import header as qcow2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from nbdfleece.backup.files import Files

_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00  # of an L1 or L2 entry
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1 << 0
_WINDOW: Final = -12  # of raw deflate streams in qcow2, as zlib says it
_BACKING_AT: Final = 8
_BACKING: Final = struct.Struct(">QI")  # offset and length of the name
_NAME_ROOM: Final = 4096  # a new name is written into the first cluster at a multiple of this
_FOREIGN: Final = qcow2.DIRTY | qcow2.CORRUPT | qcow2.DATA_FILE | qcow2.EXTENDED_L2


class Part(NamedTuple):
    """Clusters of data next to each other in disk and file; `host` is an offset in the file.

    `packed` is the length of one cluster's compressed data, in whole sectors; 0: as it is.
    """

    offset: int
    length: int
    host: int
    packed: int


class Run(NamedTuple):
    """A range that the file holds, inside one chunk: data in `parts`, or zeroes without any."""

    offset: int
    length: int
    parts: tuple[Part, ...]

    @property
    def is_zero(self) -> bool:
        """Whether it reads as zeroes."""
        return not self.parts


class Image:
    """A file of a backup, open for reading.

    Args:
        path: The file.

    Attributes:
        path: The file.
        file_bytes: Its length.
        size: Bytes of the image (content.image_size).
        backing_name: Name of the file below, or None.
        cluster_size: Bytes.
        span: Bytes of the disk that one L2 table tells of.

    Raises:
        Damaged: It is no such file.
        BackupError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BackupError(f"open '{path}': {error.strerror}") from error
        try:
            self.file_bytes = os.fstat(self._fd).st_size
            self._header = header = self._read_header()
            self.size = header.size
            self.backing_name = header.backing_file
            self.cluster_size = header.cluster_size
            self.span = self.cluster_size * header.l2_entries
            self._l1 = self._table(header.l1_table_offset, header.l1_size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def runs(self, span: int) -> list[Run]:
        """Return what the file holds of the disk from `span * self.span` on, as far as that goes.

        Runs of data are as long as they can be inside a chunk; those of zeroes end there too.

        Raises:
            Damaged: An offset makes no sense.
        """
        at = self._l1[span] & _OFFSET if span < len(self._l1) else 0
        if at == 0:
            return []
        table = self._table(at, self._header.l2_entries)
        if not any(table):
            return []
        start = span * self.span
        return list(_join(self._parts(table, start), self.size))

    def read(self, run: Run, view: memoryview) -> None:
        """Fill `view` (of run.length bytes) with the data of a run.

        Raises:
            Damaged: It cannot be decompressed, or the file is too short.
            BackupError: It cannot be read.
        """
        for part in run.parts:
            at = part.offset - run.offset
            target = view[at : min(at + part.length, run.length)]
            if part.packed:
                target[:] = self._decompress(part)[: len(target)]
            else:
                self._fill(part.host, target)

    # --- private -------------------------------------------------------------------------------

    def _read_header(self) -> qcow2.Header:
        first = self._bytes(0, min(qcow2.FIRST_READ, self.file_bytes))
        try:
            area = qcow2.header_area(first)
            header = qcow2.parse_header(self._bytes(0, min(area, self.file_bytes)))
        except ImageError as error:
            raise self._damaged(str(error)) from error
        if header.incompatible & _FOREIGN or header.nb_snapshots:
            raise self._damaged("something other than a backup has written to it")
        if header.compression_type != qcow2.ZLIB or header.cluster_size != BACKUP_CLUSTER:
            raise self._damaged("it was written by something else")
        return header

    def _parts(self, table: array[int], start: int) -> Iterator[Part]:
        """Yield the clusters of an L2 table; `host` 0 means zeroes."""
        cluster = self.cluster_size
        shift = 62 - (self._header.cluster_bits - 8)
        last: Part | None = None
        for index, entry in enumerate(table):
            if entry == 0:
                continue
            offset = start + index * cluster
            if offset >= self.size:
                break  # a table of zeroes may go on behind the end
            if entry & _COMPRESSED:
                host = entry & ((1 << shift) - 1)
                sectors = (entry >> shift & ((1 << (62 - shift)) - 1)) + 1
                part = Part(offset, cluster, host, sectors * 512 - host % 512)
            elif entry & _ZERO:
                part = Part(offset, cluster, 0, 0)
            else:
                part = Part(offset, cluster, entry & _OFFSET, 0)
                self._check_host(part)
            if last is not None:
                joined = _joined(last, part)
                if joined is not None:
                    last = joined
                    continue
                yield last
            last = part
        if last is not None:
            yield last

    def _check_host(self, part: Part) -> None:
        host = part.host
        if host < self.cluster_size or host % self.cluster_size or host >= self.file_bytes:
            raise self._damaged(f"data of {part.offset} is said to be at {host}")

    def _decompress(self, part: Part) -> bytes:
        data = self._bytes(part.host, min(part.packed, self.file_bytes - part.host))
        try:
            found = zlib.decompressobj(_WINDOW).decompress(data, self.cluster_size)
        except zlib.error as error:
            raise self._damaged(f"the cluster of {part.offset} cannot be decompressed") from error
        if len(found) != self.cluster_size:
            raise self._damaged(f"the cluster of {part.offset} is too short")
        return found

    def _table(self, offset: int, entries: int) -> array[int]:
        table = array("Q", self._bytes(offset, entries * 8))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def _bytes(self, offset: int, length: int) -> bytes:
        if length <= 0:
            raise self._damaged(f"it ends before {offset}")
        found = bytearray(length)
        self._fill(offset, memoryview(found))
        return bytes(found)

    def _fill(self, offset: int, view: memoryview) -> None:
        while view:
            try:
                got = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise BackupError(
                    f"read '{self.path}', {len(view)} bytes at {offset}: {error.strerror}"
                ) from error
            if got == 0:
                raise self._damaged(f"it ends at {offset}")
            view, offset = view[got:], offset + got

    def _damaged(self, why: str) -> Damaged:
        return Damaged(f"'{self.path}' is damaged: {why}")


def spans(size: int, span: int) -> int:
    """Return how many spans a disk of `size` bytes has."""
    return ceil_div(size, span)


def backing_name(path: Path) -> str | None:
    """Return the name of the file below `path`, as it stands there.

    Raises:
        Damaged: This is no file of a backup.
        BackupError: It cannot be read.
    """
    with Image(path) as found:
        return found.backing_name


def set_backing_name(path: Path, name: str, files: Files) -> None:
    """Let a file stand upon another one of the same content.

    The new name is synced before the one write, inside a sector, that makes it count.

    Raises:
        Damaged: This is no file of a backup.
        OSError: It failed; the old name or the new one counts.
    """
    with Image(path) as found:
        cluster = found.cluster_size
    data = name.encode()
    assert len(data) <= min(MAX_QCOW2_BACKING_NAME, _NAME_ROOM), "names of ours are short"
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        old, _ = _BACKING.unpack(os.pread(fd, _BACKING.size, _BACKING_AT))
        # Two places in turn, so that the old name stays while the new one is written.
        at = cluster - _NAME_ROOM if old != cluster - _NAME_ROOM else cluster - 2 * _NAME_ROOM
        files.write(fd, data, at)
        files.sync(fd)
        files.write(fd, _BACKING.pack(at, len(data)), _BACKING_AT)
        files.sync(fd)
    finally:
        os.close(fd)


def _joined(one: Part, two: Part) -> Part | None:
    """Return both as one part, if they are one."""
    if one.packed or two.packed or one.offset + one.length != two.offset:
        return None
    if (one.host == 0) is not (two.host == 0):
        return None
    if one.host and one.host + one.length != two.host:
        return None
    return Part(one.offset, one.length + two.length, one.host, 0)


def _join(parts: Iterator[Part], size: int) -> Iterator[Run]:
    """Yield the runs that the parts make up, cut at the disk's end."""
    data: list[Part] = []
    for part in parts:
        for offset, length in split(part.offset, part.length):
            host = part.host + offset - part.offset if part.host else 0
            piece = Part(offset, length, host, part.packed)
            if data and (
                host == 0 or data[-1].offset + data[-1].length != offset or offset % CHUNK == 0
            ):
                yield _run(data, size)
                data = []
            if host == 0:
                yield Run(offset, min(length, size - offset), ())
            else:
                data.append(piece)
    if data:
        yield _run(data, size)


def _run(parts: list[Part], size: int) -> Run:
    start, end = parts[0].offset, parts[-1].offset + parts[-1].length
    return Run(start, min(end, size) - start, tuple(parts))
