"""Dirty bitmaps: which granules of a node have been written.

A bit covers [i * granularity, (i + 1) * granularity), cut at the end of the node. Marking rounds
outwards. Successors, merging and persistence come with the backup part; this is what
copy-before-write's `bitmap` option and the marking of writes need.

Follows: QEMU block/dirty-bitmap.c; the states as BlockDirtyInfo reports them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.base.units import ceil_div, is_power_of_2
from nbdfleece.datapath.states import StateMap

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLEAN, _DIRTY = 0, 1


class DirtyBitmap:
    """A dirty bitmap of one node.

    Attributes:
        name: Unique on its node.
        granularity: Bytes per bit, a power of two of at least 512.
        size: Bytes covered: the size of the node.
        enabled: Writes are recorded.
        busy: Somebody uses it; it may not be changed or used by others.
        inconsistent: Its content cannot be trusted; it can only be removed.
    """

    def __init__(self, name: str, *, size: int, granularity: int, enabled: bool) -> None:
        if not is_power_of_2(granularity) or granularity < 512:
            raise CommandError("Granularity must be a power of 2 and at least 512")
        self.name = name
        self.granularity = granularity
        self.size = size
        self.enabled = enabled
        self.busy = False
        self.inconsistent = False
        self._bits = StateMap(ceil_div(size, granularity))

    def mark(self, offset: int, length: int) -> None:
        """Record a write, if the bitmap records now."""
        if self.enabled:
            self.set(offset, length)

    def set(self, offset: int, length: int) -> None:
        """Make every granule that the range touches dirty."""
        first = offset // self.granularity
        self._bits.fill(first, ceil_div(offset + length, self.granularity), _DIRTY)

    def clear(self) -> None:
        """Make every granule clean."""
        self._bits = StateMap(ceil_div(self.size, self.granularity))

    def resize(self, size: int) -> None:
        """Follow the node to its new size: what is gone is forgotten, what is new is clean."""
        assert not self.busy, f"bitmap '{self.name}' is busy"
        bits = StateMap(ceil_div(size, self.granularity))
        for first, last in self._runs():
            if first < len(bits):
                bits.fill(first, min(last, len(bits)), _DIRTY)
        self.size, self._bits = size, bits

    def count(self) -> int:
        """Return dirty granules times granularity, in bytes (as QMP reports it)."""
        return sum(last - first for first, last in self._runs()) * self.granularity

    def dirty_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of every dirty run, in order."""
        for first, last in self._runs():
            offset = first * self.granularity
            yield offset, min(last * self.granularity, self.size) - offset

    def _runs(self) -> Iterator[tuple[int, int]]:
        index, count = 0, len(self._bits)
        while index < count:
            first = self._bits.find(_DIRTY, index, count)
            if first < 0:
                return
            last = self._bits.run_end(first, count)
            yield first, last
            index = last
