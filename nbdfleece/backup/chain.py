"""Which files make a point, and what becomes of them when points are given up. Pure.

A chain is a full file and the increments over it. A point is restored from the files of its
lineage: itself, its parent, and so on down to the full one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdfleece.backup.names import Kind

if TYPE_CHECKING:
    from collections.abc import Container

    from nbdfleece.backup.manifest import Manifest, Point


def lineage(manifest: Manifest, point: Point) -> list[Point]:
    """Return the points whose files make `point`, the full one first."""
    found = [point]
    while found[-1].parent is not None:
        below = manifest.point(found[-1].parent)
        assert below is not None, "the manifest has been checked"
        found.append(below)
    return found[::-1]


def restorable(manifest: Manifest, present: Container[str]) -> list[Point]:
    """Return the points of which every file is `present` (names of finished files)."""
    return [
        point
        for point in manifest.points
        if all(below.file in present for below in lineage(manifest, point))
    ]


@dataclass(frozen=True, slots=True)
class Merge:
    """Some files become one.

    Attributes:
        parts: Points next to each other, the oldest first; the last one stays, the others go.
        parent: The parent of the first; None: the result is a full file.
    """

    parts: tuple[Point, ...]
    parent: str | None

    @property
    def kind(self) -> Kind:
        """What the result is."""
        return Kind.FULL if self.parent is None else Kind.INCREMENT


def next_merge(manifest: Manifest, keep: Container[str]) -> Merge | None:
    """Return the oldest merge that brings the points nearer to `keep`; None: there is none.

    Points that nothing is built upon are not merged: see `useless`.
    """
    for point in manifest.points:
        if point.name not in keep:
            continue
        parts = [point]
        while parts[0].parent is not None and parts[0].parent not in keep:
            below = manifest.point(parts[0].parent)
            assert below is not None, "the manifest has been checked"
            parts.insert(0, below)
        if len(parts) > 1:
            return Merge(tuple(parts), parts[0].parent)
    return None


def useless(manifest: Manifest, keep: Container[str]) -> list[str]:
    """Return the points that are not kept and that no kept point needs, the newest first."""
    needed: set[str] = set()
    for point in manifest.points:
        if point.name in keep:
            needed |= {below.name for below in lineage(manifest, point)}
    return [point.name for point in reversed(manifest.points) if point.name not in needed]
