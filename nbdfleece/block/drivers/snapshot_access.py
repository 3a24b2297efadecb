"""snapshot-access: a point in time of the node below, as a node of its own.

It is the one that a copy-before-write filter preserves or, with the option `snapshot`, an internal
snapshot of an image. The node decides nothing: it refuses writes and forwards the rest. It asks for
no permission and shares all, so it can stand over a node that is being written.

Follows: QEMU block/snapshot-access.c, which has no option `snapshot`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import Extent, merge
from nbdfleece.block import permissions as perms
from nbdfleece.block.driver import Driver

if TYPE_CHECKING:
    from nbdfleece.block.child import Child
    from nbdfleece.block.internal_snapshots import PointInTime
    from nbdfleece.block.node import Node


class SnapshotAccess(Driver):
    """Driver `snapshot-access`; child `file` with roles DATA and PRIMARY.

    Args:
        snapshot: Id or name of an internal snapshot; None: what the filter below preserves.
    """

    name: ClassVar[str] = "snapshot-access"
    # The filter of a younger snapshot, put above ours, preserves another point in time.
    stays_at_node: ClassVar[bool] = True
    can_reopen: ClassVar[bool] = False

    def __init__(self, snapshot: str | None = None) -> None:
        self._snapshot = snapshot
        self._internal: PointInTime | None = None

    async def open(self) -> int:
        """Check that there is a point in time to access; see Driver.open."""
        below = self._below()
        if self._snapshot is not None:
            self._internal = await below.driver.open_snapshot(self._snapshot)
            return self._internal.size
        if not below.driver.has_point_in_time():
            raise CommandError(f"Node '{below.name}' does not preserve a point in time")
        return below.size

    async def close(self) -> None:
        """Let an internal snapshot go; see Driver.close."""
        if self._internal is not None:
            self._internal.close()
            self._internal = None

    def size_now(self) -> int:
        """Return the size of the point in time, which does not change."""
        return self.node.size

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Ask for nothing, share everything."""
        return perms.NONE, perms.ALL

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Forward; see Driver.snapshot_read_now."""
        if self._internal is not None:
            return self._internal.read_now(offset, view)
        return self._below().driver.snapshot_read_now(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """Forward; see Driver.snapshot_read."""
        if self._internal is not None:
            await self._internal.read(offset, view)
            return
        await self._below().snapshot_read(offset, view)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Forward; see Driver.snapshot_block_status."""
        if self._internal is not None:
            return await self._internal.block_status(offset, length)
        return await self._below().snapshot_block_status(offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """Answer 1: a point in time is one layer. Fails where a block status does."""
        found = await self.block_status(offset, length)
        return merge(Extent(at, size, 1) for at, size, _ in found)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Refuse: a point in time does not change."""
        raise IoError(errno.ENOTSUP, self._where("write", offset, len(data)))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Refuse, and not with ENOTSUP, which would make the node try plain writes."""
        raise IoError(errno.EPERM, self._where("write zeroes", offset, length))

    async def discard(self, offset: int, length: int) -> None:
        """Give the range up: it will not be read again; see Driver.snapshot_discard."""
        if self._internal is not None:
            raise IoError(errno.ENOTSUP, self._where("discard", offset, length))
        await self._below().snapshot_discard(offset, length)

    def _below(self) -> Node:
        edge = self.node.file
        assert edge is not None, "snapshot-access has a file child"
        return edge.node
