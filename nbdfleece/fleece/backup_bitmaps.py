"""The bitmaps that say what has changed since a point: started at its instant, removed with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.block.bitmap import DirtyBitmap, new_bitmap

if TYPE_CHECKING:
    from nbdfleece.block.node import Node

_log = logging.getLogger(__name__)


async def make_bitmap(node: Node, name: str) -> DirtyBitmap:
    """Make a clean bitmap for a disk's node, beside the guest; kept, where that is possible.

    It records from when it is put among the node's bitmaps, in a drained section.

    Raises:
        CommandError: It cannot be made.
    """
    bitmap = new_bitmap(node, name, None, enabled=True)
    if node.bitmap_keeper is not None and not node.read_only:
        await node.bitmap_keeper.keep(bitmap)
    return bitmap


async def forget_bitmap(node: Node, bitmap: DirtyBitmap) -> None:
    """Remove a bitmap, whether it is among the node's or not; what cannot be removed is logged.

    In use by somebody else it stays: the end of a later backup removes it.
    """
    try:
        bitmap.check_removable()
        if node.bitmaps.get(bitmap.name) is bitmap:
            del node.bitmaps[bitmap.name]
        if bitmap.store is not None:
            # It records no more: if it cannot be deleted, it is not to be found again as good.
            bitmap.store.abandon("it was removed")
        if bitmap.persistent and node.bitmap_keeper is not None:
            await node.bitmap_keeper.forget(bitmap)
    except CommandError as error:
        _log.error("bitmap '%s' cannot be removed: %s", bitmap.name, error)


def bitmap_prefix(folder_id: str) -> str:
    """Return what the names of the bitmaps of one folder begin with."""
    return f"backup-{folder_id}-"
