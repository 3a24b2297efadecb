"""Whether a disk's next backup is an increment, and if not, why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdfleece.backup import chain
from nbdfleece.backup.verify import verify_files
from nbdfleece.base.units import format_size
from nbdfleece.block.bitmap import DirtyBitmap

if TYPE_CHECKING:
    from nbdfleece.backup.folder import DiskFolder
    from nbdfleece.backup.manifest import Point
    from nbdfleece.block.node import Node


@dataclass(frozen=True, slots=True)
class Base:
    """What an increment stands upon.

    Attributes:
        point: The point below.
        dirty: What has changed since then, and perhaps a little more; nobody else's.
    """

    point: Point
    dirty: DirtyBitmap


def choose_base(
    folder: DiskFolder,
    node: Node,
    size: int,
    *,
    damage: str | None,
    full: bool,
    is_in_place: bool = True,
) -> Base | str:
    """Return what an increment can stand upon, or why the next file has to be a full one.

    Args:
        folder: The backups of the disk.
        node: Where the disk's bitmaps are.
        size: Bytes of the disk at the new instant.
        damage: What `damage_of` has found.
        full: A full one was asked for.
        is_in_place: At the instant the node was what the guest writes; see Disk.
    """
    newest = folder.manifest.newest
    if newest is None:
        return "it is the first backup"
    if full:
        return "it was asked for"
    if newest.size != size:
        return f"the disk was resized from {format_size(newest.size)} to {format_size(size)}"
    if damage is not None:
        return damage
    if not is_in_place:
        return f"what is written goes past node '{node.name}', whose bitmaps do not know of it"
    if not newest.bitmap:
        return "the last backup left no bitmap that tells what has changed since"
    bitmap = node.bitmaps.get(newest.bitmap)
    if bitmap is None:
        return f"the disk has no bitmap '{newest.bitmap}' that tells what has changed since"
    if bitmap.inconsistent:
        why = f": {bitmap.reason}" if bitmap.reason else ""
        return f"bitmap '{newest.bitmap}' cannot be trusted{why}"
    if not bitmap.enabled or bitmap.busy:
        return f"bitmap '{newest.bitmap}' has not been recording, or is in use"
    return Base(newest, _copy(bitmap))


def damage_of(folder: DiskFolder) -> str | None:
    """Return what is wrong with the files of the newest point, or None. Blocks."""
    newest = folder.manifest.newest
    if newest is None:
        return None
    return verify_files(folder, chain.lineage(folder.manifest, newest))


def _copy(bitmap: DirtyBitmap) -> DirtyBitmap:
    """Return a bitmap of the same content that nobody knows."""
    found = DirtyBitmap(
        bitmap.name, size=bitmap.size, granularity=bitmap.granularity, enabled=False
    )
    found.put_back(bitmap.copy())
    return found
