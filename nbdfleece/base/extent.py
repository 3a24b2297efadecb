"""Extents: ranges of a node with what is known of them.

Invariants: an extent list is sorted, without gaps or overlaps, and no extent is empty.
`ZERO` and `HOLE` are claims ("reads as zeroes", "takes no space"); leaving one out is always safe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

DATA: Final = 0
HOLE: Final = 1  # not allocated (base:allocation bit 0)
ZERO: Final = 2  # reads as zeroes (base:allocation bit 1)


class Extent(NamedTuple):
    """`length` bytes at `offset` that share `flags` (of DATA, HOLE, ZERO)."""

    offset: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        """First byte behind the extent."""
        return self.offset + self.length


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Return the extents with equal neighbours joined."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and merged[-1].flags == extent.flags and merged[-1].end == extent.offset:
            last = merged[-1]
            merged[-1] = Extent(last.offset, last.length + extent.length, last.flags)
        else:
            merged.append(extent)
    return merged


def clip(extents: Iterable[Extent], offset: int, length: int) -> list[Extent]:
    """Return the parts of `extents` that lie inside the range."""
    end = offset + length
    clipped = []
    for extent in extents:
        first, last = max(extent.offset, offset), min(extent.end, end)
        if first < last:
            clipped.append(Extent(first, last - first, extent.flags))
    return clipped
