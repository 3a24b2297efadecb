"""Where the data of a backup goes: a new file of a folder, or a stream."""

from __future__ import annotations

import errno
import os
import select
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.backup import writing
from nbdfleece.backup.errors import BackupError
from nbdfleece.base.units import MiB

if TYPE_CHECKING:
    from pathlib import Path

    from nbdfleece.backup.writing import NewImage, Prepared

_ZEROES: Final = memoryview(bytes(MiB))
_LOOK_S: Final = 0.25  # a stuck stream looks so often whether it is to stop


class FileSink:
    """A new file of a backup (fleece.copying.Sink).

    Args:
        image: The file.
        compress: Whether its data is compressed.
    """

    def __init__(self, image: NewImage, *, compress: bool) -> None:
        self._image = image
        self._compress = compress

    def prepare(self, offset: int, buffer: bytearray, start: int, length: int) -> list[Prepared]:
        """See Sink.prepare."""
        return writing.prepare(offset, buffer, start, length, compress=self._compress)

    def zeroes(self, offset: int, length: int) -> list[Prepared]:
        """See Sink.zeroes."""
        return [writing.zeroes(offset, length)]

    def put(self, items: list[Prepared]) -> None:
        """See Sink.put."""
        self._image.put(items)


class Piece(NamedTuple):
    """Data for the stream; what is between two pieces is zeroes."""

    offset: int
    data: memoryview


class StreamSink:
    """The whole disk, raw, to a FIFO that somebody reads (fleece.copying.Sink).

    Args:
        path: The FIFO.
        size: Bytes of the disk.

    Raises:
        BackupError: There is no FIFO, or nobody reads it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._at = 0
        self._stop = threading.Event()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            why = "nobody reads it" if error.errno == errno.ENXIO else error.strerror
            raise BackupError(f"stream '{path}': {why}") from error

    def prepare(self, offset: int, buffer: bytearray, start: int, length: int) -> list[Piece]:
        """See Sink.prepare."""
        stop = start + min(length, self._size - offset)
        return [Piece(offset, memoryview(buffer)[start:stop])]

    def zeroes(self, offset: int, length: int) -> list[Piece]:
        """See Sink.zeroes."""
        return []

    def put(self, items: list[Piece]) -> None:
        """See Sink.put."""
        for offset, data in items:
            self._skip(offset)
            self._write(data)
            self._at = offset + len(data)

    def finish(self) -> None:
        """Write the zeroes up to the disk's end.

        Raises:
            OSError: The reader has gone.
        """
        self._skip(self._size)

    def stop(self) -> None:
        """Give up, also while the reader takes nothing; from any thread."""
        self._stop.set()

    def close(self) -> None:
        """Close the stream: its reader sees the end."""
        os.close(self._fd)

    def _skip(self, offset: int) -> None:
        while self._at < offset:
            piece = _ZEROES[: offset - self._at]
            self._write(piece)
            self._at += len(piece)

    def _write(self, data: memoryview) -> None:
        while data:
            if self._stop.is_set():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                select.select([], [self._fd], [], _LOOK_S)
