"""Several files over each other, read as one: pieces of the disk in ascending order.

Chunk by chunk, a file's runs lie over those of the files below it. To check the files, all of each
is read and hashed on the way; else only what shows.

Everything here blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.backup.content import CHUNK, ContentHash, digest_of
from nbdfleece.backup.errors import Damaged
from nbdfleece.backup.image import spans
from nbdfleece.base.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nbdfleece.backup.image import Image, Run

_NOTHING: Final = 0
_ZEROES: Final = 1
_DATA: Final = 2


class Piece(NamedTuple):
    """A range of the disk: its data, valid until the next piece is asked for; None: zeroes."""

    offset: int
    length: int
    data: memoryview | None


class Layers:
    """Files over each other.

    Args:
        images: The lowest first; all of one size.
        check: Read and hash all of each file.

    Attributes:
        size: Bytes of the image (content.image_size).

    Raises:
        Damaged: They do not fit together.
    """

    def __init__(self, images: Sequence[Image], *, check: bool) -> None:
        self._images = images
        self._check = check
        self.size = images[-1].size
        self._cluster = images[-1].cluster_size
        self._span = images[-1].span
        for image in images:
            if (image.size, image.cluster_size) != (self.size, self._cluster):
                raise Damaged(f"'{image.path}' and '{images[-1].path}' are not of one size")
        self._hashes = [ContentHash(self.size) for _ in images]
        self._buffer = bytearray(CHUNK)

    def hashes(self) -> list[str]:
        """Return the hash of each file, after all pieces were read with `check`."""
        return [found.hexdigest() for found in self._hashes]

    def pieces(self) -> Iterator[Piece]:
        """Yield what any of the files holds.

        Raises:
            Damaged: A file is.
            BackupError: A file cannot be read.
        """
        for span in range(spans(self.size, self._span)):
            chunks: dict[int, list[tuple[int, Run]]] = {}
            for layer, image in enumerate(self._images):
                for run in image.runs(span):
                    chunks.setdefault(run.offset // CHUNK, []).append((layer, run))
            for chunk in sorted(chunks):
                yield from self._chunk(chunk * CHUNK, chunks[chunk])

    def _chunk(self, start: int, runs: list[tuple[int, Run]]) -> Iterator[Piece]:
        """Yield the pieces of one chunk; `runs` are sorted by layer."""
        view = memoryview(self._buffer)
        shown = [self._shown(start, layer, run, runs) for layer, run in runs]
        states = bytearray(CHUNK // self._cluster)
        for (layer, run), is_shown in zip(runs, shown, strict=True):
            first, end = self._clusters(start, run)
            states[first:end] = bytes((_ZEROES if run.is_zero else _DATA,)) * (end - first)
            if run.is_zero:
                if self._check:
                    self._hashes[layer].zero(run.offset, run.length)
            elif self._check or is_shown:
                target = view[run.offset - start :][: run.length]
                self._images[layer].read(run, target)
                if self._check:
                    self._hashes[layer].data(run.offset, run.length, digest_of(target))
        yield from self._states(start, states, view)

    def _states(self, start: int, states: bytearray, view: memoryview) -> Iterator[Piece]:
        index = 0
        while index < len(states):
            state, end = states[index], index + 1
            while end < len(states) and states[end] == state:
                end += 1
            at = index * self._cluster
            length = min(end * self._cluster, self.size - start) - at
            if state == _DATA:
                yield Piece(start + at, length, view[at : at + length])
            elif state == _ZEROES:
                yield Piece(start + at, length, None)
            index = end

    def _clusters(self, start: int, run: Run) -> tuple[int, int]:
        first = (run.offset - start) // self._cluster
        return first, first + ceil_div(run.length, self._cluster)

    def _shown(self, start: int, layer: int, run: Run, runs: list[tuple[int, Run]]) -> bool:
        """Tell whether any cluster of a run is not hidden by a layer above."""
        first, end = self._clusters(start, run)
        hidden: set[int] = set()
        for above, other in runs:
            if above > layer:
                hidden.update(range(*self._clusters(start, other)))
        return any(index not in hidden for index in range(first, end))
