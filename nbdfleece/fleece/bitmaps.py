"""Bitmaps of disks: those tied to a snapshot, which say what has changed up to its instant.

::

    prepare -> freeze, at the instant -> settle, when the snapshot is deleted
                  `-> thaw -> discard            (the snapshot could not be taken)

Frozen at the instant means: every write that is in the snapshot is in the bitmap, and every write
that is not is in its successor. So none is missing from both.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.block.bitmap import DirtyBitmap, abdicate, freeze, new_bitmap, reclaim

if TYPE_CHECKING:
    from nbdfleece.block.node import Node

_log = logging.getLogger(__name__)


class TiedBitmap:
    """A bitmap of a disk's node that goes with one snapshot.

    One that is not there yet is made, and everything is dirty in it: nobody has a copy of any of it
    that increments could build upon.

    Args:
        node: The disk's node.
        name: Of the bitmap.

    Attributes:
        name: Of the bitmap.
    """

    def __init__(self, node: Node, name: str) -> None:
        self.name = name
        self._node = node
        self._new: DirtyBitmap | None = None
        self._frozen: DirtyBitmap | None = None

    @property
    def bitmap(self) -> DirtyBitmap:
        """What had changed up to the instant; from `freeze` to `settle`."""
        assert self._frozen is not None, "the bitmap is not frozen"
        return self._frozen

    async def prepare(self) -> None:
        """Make the bitmap if it is not there, beside the guest.

        Raises:
            CommandError: It cannot be made or used; `discard` is due.

        Cancel: `discard` is due.
        """
        found = self._node.bitmaps.get(self.name)
        if found is not None:
            _check(found)
            return
        bitmap = new_bitmap(self._node, self.name, None, enabled=True)
        bitmap.set(0, self._node.size)
        if self._node.bitmap_keeper is not None and not self._node.read_only:
            await self._node.bitmap_keeper.keep(bitmap)
        self._new = bitmap

    def freeze(self) -> None:
        """Make it stand still from this instant; no write is in flight.

        Raises:
            CommandError: It cannot be used any more. Nothing has changed.
        """
        bitmaps = self._node.bitmaps
        bitmap = bitmaps.get(self.name)
        if self._new is None:
            if bitmap is None:
                raise CommandError(f"Dirty bitmap '{self.name}' not found")
            _check(bitmap)
        else:
            if bitmap is not None:
                raise CommandError(
                    f"Bitmap already exists: {self.name} (it was added while the snapshot was "
                    "prepared, which makes it by itself; to add it first takes a command before)"
                )
            bitmap = bitmaps[self.name] = self._new
        freeze(bitmaps, bitmap)
        self._frozen = bitmap

    def thaw(self) -> None:
        """Undo `freeze`, in the same drained section or with the snapshot gone."""
        if self._frozen is None:
            return
        reclaim(self._node.bitmaps, self._frozen)
        self._frozen = None
        if self._new is not None:
            del self._node.bitmaps[self.name]

    async def discard(self) -> None:
        """Undo `prepare`, as far as it came; what stays is logged."""
        if self._new is None or self._new.store is None or self._node.bitmap_keeper is None:
            return
        self._new.store.abandon("its first snapshot could not be taken")
        try:
            await self._node.bitmap_keeper.forget(self._new)
        except CommandError as error:
            _log.error("bitmap '%s': %s", self.name, error)
        self._new = None

    def settle(self, *, succeeded: bool) -> None:
        """Say what became of the copy of the snapshot, when that is gone.

        Args:
            succeeded: All that was dirty has been copied: only what has changed since the instant
                stays dirty. Else nothing is forgotten.
        """
        if self._frozen is None:
            return
        settled = abdicate if succeeded else reclaim
        settled(self._node.bitmaps, self._frozen)
        self._frozen = self._new = None


def _check(bitmap: DirtyBitmap) -> None:
    """Check that a bitmap may be tied to a snapshot.

    Raises:
        CommandError: It may not.
    """
    bitmap.check_usable(to_change=True)
    if not bitmap.enabled:
        raise CommandError(
            f"Bitmap '{bitmap.name}' is disabled: it would not know of what is written from now on"
        )
