"""What a disk or a snapshot holds where: data, zeroes, holes, saved old data, dirty granules.

A picture for people. It is made piece by piece while the guest writes, so it is of no one instant,
and no decision about data may be based on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import HOLE, Extent, clip, merge
from nbdfleece.base.limits import MAX_MAP_EXTENTS
from nbdfleece.block.drivers.copy_before_write import GIVEN_UP, HELD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
    from nbdfleece.block.node import Node

# Flags of extents, beside those of base.extent.
SAVED: Final = 4  # old data, held by the snapshot
DIRTY: Final = 8  # in the bitmap
GONE: Final = 16  # given up by the snapshot's reader

_OF_HELD: Final = {0: 0, HELD: SAVED, GIVEN_UP: GONE}


@dataclass(frozen=True, slots=True)
class Map:
    """Extents of a node of `size` bytes, up to `end`: less than all where there are too many."""

    size: int
    end: int
    extents: list[Extent]


async def map_node(
    node: Node, cbw: CopyBeforeWrite | None, bitmap: DirtyBitmap | None, offset: int
) -> Map:
    """Return what a node holds from `offset` (bytes) on.

    Args:
        node: The disk, or the access node of a snapshot.
        cbw: The snapshot's filter; None: it is the disk.
        bitmap: What to tell of too, or None.
        offset: Where to begin; behind the end there is nothing.

    Raises:
        CommandError: It cannot be told.

    Cancel: safe.
    """
    extents: list[Extent] = []
    size = node.size
    try:
        while offset < size and len(extents) < MAX_MAP_EXTENTS:
            piece = await _piece(node, cbw, bitmap, offset)
            offset = piece[-1].end
            if extents and extents[-1].flags == piece[0].flags:
                first = extents.pop()
                piece[0] = Extent(first.offset, piece[0].end - first.offset, first.flags)
            extents += piece
    except IoError as error:
        raise CommandError(str(error)) from error
    return Map(size, offset, extents)


async def _piece(
    node: Node, cbw: CopyBeforeWrite | None, bitmap: DirtyBitmap | None, offset: int
) -> list[Extent]:
    """Return extents from `offset` on, at least one."""
    length = node.size - offset
    layers: list[list[Extent]] = []
    if cbw is not None:
        held = [Extent(at, size, _OF_HELD[flags]) for at, size, flags in cbw.held(offset, length)]
        if held[0].flags == GONE:
            return [Extent(offset, held[0].length, GONE | HOLE)]
        layers.append(list(takewhile(lambda extent: extent.flags != GONE, held)))
        length = layers[0][-1].end - offset
    layers.append(clip(await node.block_status(offset, length), offset, length))
    if bitmap is not None:
        found = await bitmap.status(offset, layers[-1][-1].end - offset)
        layers.append([Extent(at, size, DIRTY if flags else 0) for at, size, flags in found])
    return overlay(layers)


def overlay(layers: Sequence[Sequence[Extent]]) -> list[Extent]:
    """Return extents with the flags of all layers; as far as the shortest of them goes.

    Args:
        layers: Extents without gaps, each from the same offset on.
    """
    united: list[Extent] = []
    positions = [0] * len(layers)
    start = layers[0][0].offset
    while all(at < len(layer) for at, layer in zip(positions, layers, strict=True)):
        here = [layer[at] for at, layer in zip(positions, layers, strict=True)]
        stop = min(extent.end for extent in here)
        flags = 0
        for extent in here:
            flags |= extent.flags
        united.append(Extent(start, stop - start, flags))
        start = stop
        positions = [at + (extent.end == stop) for at, extent in zip(positions, here, strict=True)]
    return merge(united)
