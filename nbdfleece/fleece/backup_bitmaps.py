"""The bitmaps that say what has changed since a point: started at its instant, removed with it.

Whoever cleared one would make the next increment too small, so commands can only remove it: then
the next backup is a full one.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.block.bitmap import DirtyBitmap, new_bitmap

if TYPE_CHECKING:
    from nbdfleece.fleece.disk import Disk

_log = logging.getLogger(__name__)

OWNER: Final = "a backup"
_NAME: Final = re.compile("backup-[0-9a-f]{8}-[0-9a-f]{16}")  # of a folder's id and a point's


async def make_bitmap(disk: Disk, name: str) -> DirtyBitmap:
    """Make a clean bitmap for a disk's node, beside the guest.

    It is kept beside the disk, also if the disk is an image that can keep bitmaps itself: those are
    lost in a crash. It records from when it is put among the node's bitmaps, in a drained section.

    Raises:
        CommandError: It cannot be made.
    """
    bitmap = new_bitmap(disk.node, name, None, enabled=True)
    bitmap.owner = OWNER
    if not disk.node.read_only:
        await disk.kept.keep(bitmap)
    return bitmap


async def forget_bitmap(disk: Disk, bitmap: DirtyBitmap) -> None:
    """Remove a bitmap, whether it is among the node's or not; what cannot be removed is logged.

    In use by somebody else it stays: the end of a later backup removes it.
    """
    try:
        bitmap.check_removable()
        # It records until what is kept of it is gone, so that a crash finds it complete, or not.
        if bitmap.persistent:
            await disk.kept.forget(bitmap)
        if disk.node.bitmaps.get(bitmap.name) is bitmap:
            del disk.node.bitmaps[bitmap.name]
    except CommandError as error:
        _log.error("bitmap '%s' cannot be removed: %s", bitmap.name, error)


def own(bitmap: DirtyBitmap) -> None:
    """See to it that nobody changes a bitmap that was found, if it is one of these."""
    if _NAME.fullmatch(bitmap.name):
        bitmap.owner = OWNER


def bitmap_prefix(folder_id: str) -> str:
    """Return what the names of the bitmaps of one folder begin with."""
    return f"backup-{folder_id}-"
