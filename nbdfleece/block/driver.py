"""What a driver is: the behaviour of a node. The contract text of every verb lives here.

A driver never calls another driver. It calls the node behind one of its children
(`self.node.file.node.read(...)`), and `block.node` does bounds, counting and dirty marks.

Rules for every verb
  - Ranges lie inside the node and are not empty; `block.node` has checked that.
  - It runs to its end: request code is never cancelled. It may await futures of its own loop, and
    nothing that needs a current task (no asyncio.timeout, no TaskGroup), because the datapath
    steps request coroutines by hand.
  - It raises IoError and nothing else. After an error the content of the range is undefined, except
    where a driver promises more.
"""

from __future__ import annotations

import errno
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import DATA, Extent
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Child, Role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdfleece.block.internal_snapshots import InternalSnapshots, PointInTime
    from nbdfleece.block.node import Node
    from nbdfleece.datapath.fileio import FileIo
    from nbdfleece.datapath.route import EarlyReply

Buffer = bytes | bytearray | memoryview


class Counted(Protocol):
    """What counts writes that are on their way to a place.

    Attributes:
        count: How many; changed by whoever makes them.
    """

    count: int


Place = tuple["FileIo", int, Counted | None]
"""(file, offset in it, where to count the write while it runs): where a write goes."""


@dataclass(frozen=True, slots=True)
class Reopening:
    """What an open node is to become.

    Attributes:
        read_only: No parent may write.
        direct: Bypass the page cache.
        options: The driver's own options, defaults included, by QMP name.
    """

    read_only: bool
    direct: bool
    options: Mapping[str, object]


class Driver(ABC):
    """Behaviour of one node.

    Attributes:
        name: The driver's QMP name.
        is_filter: Reads through the node give the data of its FILTERED child.
        can_reopen: The options of a node may be changed while it is open.
        changeable: Those of the driver's own options that may be.
        repointable: Names of the children that may be replaced by others then.
        stays_at_node: The node's children are these very nodes, whatever is put above them: its
            edges are left alone when a filter is inserted.
        node: The node this driver belongs to; set before `open`.
    """

    name: ClassVar[str]
    is_filter: ClassVar[bool] = False
    can_reopen: ClassVar[bool] = True
    changeable: ClassVar[frozenset[str]] = frozenset()
    repointable: ClassVar[frozenset[str]] = frozenset({"file", "backing"})
    stays_at_node: ClassVar[bool] = False
    node: Node

    # --- life ------------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> int:
        """Open what the node stands for; its children are attached already.

        Returns:
            The size of the node in bytes.

        Raises:
            CommandError: It cannot be opened. Nothing is left open.
        """

    async def close(self) -> None:  # noqa: B027 - most drivers have nothing to close
        """Close what `open` opened. Called once, without requests in flight."""

    def yank(self) -> bool:
        """Let go of a peer that may never answer: what waits for it fails, now and from now on.

        The user gives the node up. It may have been the last chance of data that was written and
        not flushed.

        Returns:
            Whether there was such a peer.
        """
        return False

    def drain_begun(self) -> None:  # noqa: B027 - most drivers hold nothing back
        """Hold no request back of one's own accord until the matching `drain_ended`; nests.

        A drained section waits for requests that may be here, or may come here on their way.
        """

    def drain_ended(self) -> None:  # noqa: B027
        """Undo one `drain_begun`; may come after `close`."""

    # --- changes while it is open ------------------------------------------------------------

    async def truncate(self, size: int) -> None:
        """Make what the node stands on so long that the node has `size` bytes; it is drained.

        Raises:
            CommandError: It cannot be resized. Nothing has changed.
        """
        if not self.is_filter or self.node.file is None:
            raise CommandError("Image format driver does not support resize")
        await self.node.file.node.truncate(size)

    def size_now(self) -> int:
        """Return the size that the node should have, when a child may have got another size.

        Raises:
            CommandError: The child is too small now.
        """
        if self.is_filter and self.node.file is not None:
            return self.node.file.node.size
        return self.node.size

    async def reopen_prepare(self, to: Reopening) -> None:  # noqa: B027
        """Get ready for other options: whatever may take time, or fail. The node is drained.

        `reopen_finish` follows, if this succeeded, perhaps with `reopen_apply` in between.

        Raises:
            CommandError: It cannot be. Nothing has changed.
        """

    def reopen_apply(self, to: Reopening) -> None:  # noqa: B027
        """Take over the options; the children are already those of the new graph.

        Raises:
            CommandError: It cannot be. Nothing has changed.
        """

    def reopen_undo(self) -> None:  # noqa: B027
        """Undo `reopen_apply`, which was the last call but for permissions. Cannot fail."""

    async def reopen_finish(self) -> None:  # noqa: B027
        """Drop whatever is not in force: of before, or of the change that was not made."""

    def can_have_backing(self) -> bool:
        """Tell whether the node may have a child `backing`, and get or lose it while it is open."""
        return False

    def backing_file(self) -> str:
        """Return what the image itself says is behind it; empty: nothing."""
        return ""

    async def change_backing_file(self, name: str, driver: str) -> None:
        """Have the image say that `name`, of format `driver`, is behind it; see `backing_file`.

        Raises:
            CommandError: It cannot be. Nothing has changed.
            IoError: The image could not be written.
        """
        raise CommandError(f"Could not change backing file to '{name}': not supported")

    # --- permissions -----------------------------------------------------------------------

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Map what the node's parents need and share to what the node asks of one child.

        The default serves filters and the usual roles: DATA and FILTERED pass through, COW is read
        only and bears writers as far as the parents do.
        """
        if edge.role & Role.COW:
            keep = shared & (perms.WRITE | perms.RESIZE)
            return perms.CONSISTENT_READ, perms.CONSISTENT_READ | perms.WRITE_UNCHANGED | keep
        if edge.role & Role.FILTERED or self.is_filter:
            return perm, shared
        if perm & (perms.WRITE | perms.WRITE_UNCHANGED):
            perm |= perms.WRITE | perms.RESIZE
            perm &= ~perms.WRITE_UNCHANGED
        return perm, shared & ~perms.RESIZE

    def check_permissions(self, perm: int, shared: int) -> None:  # noqa: B027
        """Get ready for `set_permissions` or `abort_permissions`, one of which follows.

        Raises:
            CommandError: Somebody outside the program forbids it (image locks).
        """

    def set_permissions(self, perm: int, shared: int) -> None:  # noqa: B027
        """Take over what was checked. Cannot fail."""

    def abort_permissions(self) -> None:  # noqa: B027
        """Undo what `check_permissions` prepared. Cannot fail."""

    # --- reading ---------------------------------------------------------------------------

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from `offset` if that needs no waiting.

        Returns:
            True when `view` is filled. False when it would block or anything is unusual: nothing
            has been decided, the content of `view` is undefined, and the caller uses `read`.
        """
        return False

    @abstractmethod
    async def read(self, offset: int, view: memoryview) -> None:
        """Fill all of `view` with the bytes at `offset`."""

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Return extents from `offset` on, without gaps; they may end before or behind the range.

        At least the first byte is covered. Claiming only DATA is always right.
        """
        return [Extent(offset, length, DATA)]

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """As `block_status`, with depths for flags: which layer of the node holds the range.

        0: none; 1: the node's own; 2: its backing's, and so on. What has no backing holds
        everything, holes too.
        """
        return [Extent(offset, length, 1)]

    # --- writing ---------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write `data`, which the caller keeps unchanged until this returns.

        With `fua`, return only when it is on stable storage.
        """
        raise IoError(errno.ENOTSUP, self._where("write", offset, len(data)))

    def place(self, offset: int, length: int) -> Place | None:
        """Return where a write of the range goes, if it is one write to a file and nothing else.

        The caller makes it at once, without an await before it.
        """
        return None

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        """As `write` without FUA; may have `reply` sent as soon as the data is written.

        In any thread, and only if nothing is left to be done then but what no client can see. After
        an error, and by drivers that do more, it has not been sent.
        """
        await self.write(offset, data, fua=False)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Make the range read as zeroes.

        Args:
            offset: Bytes.
            length: Bytes; not bounded by any payload limit.
            fua: As in `write`.
            may_unmap: Space may be given back.
            no_fallback: Fail rather than do it at the speed of a write.

        Raises:
            IoError: ENOTSUP when the driver has no better way than writing; the node then writes
                zeroes in pieces, unless `no_fallback`.
        """
        raise IoError(errno.ENOTSUP, self._where("write zeroes", offset, length))

    async def discard(self, offset: int, length: int) -> None:  # noqa: B027 - a hint
        """Note that the content of the range is not needed. May do nothing, may round inwards."""

    async def flush(self) -> None:  # noqa: B027 - nothing to flush is a success
        """Return when every write that was complete at the call is on stable storage."""

    # --- points in time ----------------------------------------------------------------------

    def snapshot_read_now(self, offset: int, view: memoryview) -> bool:
        """As `read_now`, of the point in time that the node preserves."""
        return False

    async def snapshot_read(self, offset: int, view: memoryview) -> None:
        """As `read`, of the point in time that the node preserves."""
        raise IoError(errno.ENOTSUP, self._where("snapshot read", offset, len(view)))

    async def snapshot_block_status(self, offset: int, length: int) -> list[Extent]:
        """As `block_status`, of the point in time that the node preserves."""
        raise IoError(errno.ENOTSUP, self._where("snapshot block status", offset, length))

    async def snapshot_discard(self, offset: int, length: int) -> None:
        """Give up the range of the point in time: it will not be read again."""
        raise IoError(errno.ENOTSUP, self._where("snapshot discard", offset, length))

    def has_point_in_time(self) -> bool:
        """Tell whether the snapshot verbs work here."""
        return False

    def internal_snapshots(self) -> InternalSnapshots | None:
        """Return the snapshots that are kept in the node's image; None: it cannot have any."""
        return None

    async def open_snapshot(self, wanted: str) -> PointInTime:
        """Return an internal snapshot, by id or name, to be read until it is closed.

        Raises:
            CommandError: There is no such snapshot, or it cannot be read.
        """
        raise CommandError(f"Node '{self.node.name}' cannot have internal snapshots")

    # --- facts -----------------------------------------------------------------------------

    def cluster_size(self) -> int:
        """Return the unit of allocation in bytes; 1 when there is none."""
        return 1

    def reads_zero_when_new(self) -> bool:
        """Tell whether every byte reads as zero until it is written through this node."""
        return False

    def plain_file(self) -> FileIo | None:
        """Return the open file when reads and writes of this node are exactly those of the file.

        So that copy-before-write may work on two files in one step. None otherwise.
        """
        return None

    def bypasses_cache(self) -> bool:
        """Tell whether requests bypass the page cache, as far as the options say so."""
        return self.node.spec is not None and self.node.spec.direct

    def image_info(self) -> dict[str, object]:
        """Return what else QMP shows of the image (members of ImageInfo)."""
        return {}

    def image_name(self) -> str:
        """Return what QMP shows as the image's file name: of a filter, that of its child."""
        edge = self.node.file
        if edge is not None:
            below = edge.node.driver.image_name()
            is_plain = edge.role & Role.FILTERED and not below.startswith("json:")
            if self.is_filter or self.stays_at_node or is_plain:
                return below
        return f"json:{json.dumps(self.image_options())}"

    def image_options(self) -> dict[str, object]:
        """Return the options that say which image it is, those of the children among them."""
        spec = self.node.spec
        found: dict[str, object] = {"driver": self.name}
        if spec is not None:
            found |= {name: spec.driver_options.get(name) for name in sorted(spec.given)}
        for edge in self.node.children:
            found[edge.name] = edge.node.driver.image_options()
        return found

    async def allocated_size(self) -> int | None:
        """Return how many bytes of storage the node holds now, or None when unknown."""
        if self.is_filter and self.node.file is not None:
            return await self.node.file.node.driver.allocated_size()
        return None

    def _where(self, verb: str, offset: int, length: int) -> str:
        return f"node '{self.node.name}': {verb} of {length} bytes at {offset}"
