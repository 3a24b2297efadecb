"""Driver `raw`: the child as it is, or a window of it.

::

    file   |......|================|......|
           0    offset       offset + size
    raw           0                size

Without a window it is like a filter: the edge is FILTERED, permissions pass through, and the node
follows the child in everything. With one, the edge is DATA.

Follows: QEMU block/raw-format.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nbdfleece.base.errors import CommandError
from nbdfleece.base.extent import Extent, clip
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Child, Role
from nbdfleece.block.driver import Driver, Reopening

if TYPE_CHECKING:
    from nbdfleece.block.driver import Place
    from nbdfleece.block.node import Node
    from nbdfleece.datapath.route import EarlyReply


class RawDriver(Driver):
    """Child `file`, with the roles that `file_role` says.

    Args:
        offset: Where the node begins in the child; None: at its start.
        size: Bytes of the node; None: to the end of the child.
    """

    name: ClassVar[str] = "raw"
    changeable: ClassVar[frozenset[str]] = frozenset({"offset", "size"})

    def __init__(self, *, offset: int | None, size: int | None) -> None:
        self._set_window(offset, size)
        self._before = (self._has_window, self._offset, self._wanted_size)

    def _set_window(self, offset: int | None, size: int | None) -> None:
        self._has_window = offset is not None or size is not None
        self._offset = offset or 0
        self._wanted_size = size

    @staticmethod
    def file_role(*, offset: int | None, size: int | None) -> Role:
        """Return what the `file` edge of such a node has to be."""
        has_window = offset is not None or size is not None
        return Role.PRIMARY | (Role.DATA if has_window else Role.FILTERED)

    async def open(self) -> int:
        """Check that the window lies in the child; see Driver.open."""
        return self.size_now()

    def size_now(self) -> int:
        """Return the size of the window; see Driver.size_now."""
        whole = self._below().size
        if self._offset < 0 or (self._wanted_size or 0) < 0:
            raise CommandError("Offset and size of 'raw' cannot be negative")
        if self._offset > whole:
            raise CommandError(
                f"Offset ({self._offset}) cannot be greater than size of the containing file "
                f"({whole})"
            )
        if self._wanted_size is None:
            return whole - self._offset
        if self._wanted_size > whole - self._offset:
            raise CommandError(
                f"The sum of offset ({self._offset}) and size ({self._wanted_size}) has to be "
                f"smaller or equal to the actual size of the containing file ({whole})"
            )
        return self._wanted_size

    async def truncate(self, size: int) -> None:
        """Resize the child, unless the window has a size; see Driver.truncate."""
        if self._wanted_size is not None:
            raise CommandError("Cannot resize fixed-size raw disks")
        await self._below().truncate(self._offset + size)

    def reopen_apply(self, to: Reopening) -> None:
        """Move the window; see Driver.reopen_apply."""
        offset, size = to.options.get("offset"), to.options.get("size")
        assert offset is None or isinstance(offset, int)
        assert size is None or isinstance(size, int)
        self._before = (self._has_window, self._offset, self._wanted_size)
        self._set_window(offset, size)

    def reopen_undo(self) -> None:
        """Move the window back; see Driver.reopen_undo."""
        self._has_window, self._offset, self._wanted_size = self._before

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Pass through; under a window nobody may resize.

        The default for DATA edges would ask for more than the parents do (QEMU takes that back for
        raw in the same way).
        """
        return (perm, shared & ~perms.RESIZE) if self._has_window else (perm, shared)

    # --- I/O -------------------------------------------------------------------------------

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Forward; see Driver.read_now."""
        # A format above takes offsets from the image, and no node looks at them on this way.
        if self._has_window and offset + len(view) > self.node.size:
            return False
        return self._below().read_now(self._offset + offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """Forward; see Driver.read."""
        await self._below().read(self._offset + offset, view)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Forward, and move the answer back; see Driver.block_status."""
        start = self._offset + offset
        # What the child says of bytes outside the window is none of this node.
        found = clip(await self._below().block_status(start, length), start, length)
        return [Extent(at - self._offset, size, flags) for at, size, flags in found]

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """Forward, and move the answer back; see Driver.allocation_depth."""
        start = self._offset + offset
        found = clip(await self._below().allocation_depth(start, length), start, length)
        return [Extent(at - self._offset, size, depth) for at, size, depth in found]

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Forward; see Driver.write."""
        await self._below().write(self._offset + offset, data, fua=fua)

    def place(self, offset: int, length: int) -> Place | None:
        """Ask below; see Driver.place."""
        return self._below().place(self._offset + offset, length)

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        """Forward; see Driver.write_replying."""
        await self._below().write_replying(self._offset + offset, data, reply)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Forward; see Driver.write_zeroes."""
        await self._below().write_zeroes(
            self._offset + offset, length, fua=fua, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        """Forward; see Driver.discard."""
        await self._below().discard(self._offset + offset, length)

    async def flush(self) -> None:
        """Forward; see Driver.flush."""
        await self._below().flush()

    # --- facts (asked of the node below: its driver is not called for I/O) -----------------------

    def cluster_size(self) -> int:
        """Return the child's, where the node begins with one of its clusters."""
        below = self._below().driver.cluster_size()
        return below if self._offset % below == 0 else 1

    def reads_zero_when_new(self) -> bool:
        """Tell what the child tells."""
        return self._below().driver.reads_zero_when_new()

    async def allocated_size(self) -> int | None:
        """Return the child's, all of it."""
        return await self._below().driver.allocated_size()

    def _below(self) -> Node:
        edge = self.node.file
        assert edge is not None, "raw has a file child"
        return edge.node
