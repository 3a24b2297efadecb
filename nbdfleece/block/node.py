"""A node of the graph, and the one way to do I/O on it.

Nobody calls a driver but the node it belongs to. The node checks bounds, counts requests in
flight, emulates what a driver lacks (FUA, zero writes), and marks its dirty bitmaps.

Invariants
  N1  `file` and `backing` are derived from `children`, and are set and cleared only in
      `child_attached` and `child_detached`.
  N2  A write, zero write or discard marks every recording bitmap of the node when it ends, whether
      or not it succeeded: part of a failed write may have landed. Those that are kept in a store it
      marks before it begins: the process may die in between. (They lose bits, or stand still, in
      drained sections only, so what was marked before is still there when the write ends.)
  N3  `in_flight` is the number of requests between entry and exit, background work included.
  N4  A drained node begins nothing new by itself and its parents send nothing new; requests that
      are already inside the graph pass through to their end.
"""

from __future__ import annotations

import asyncio
import errno
from time import monotonic
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.limits import ZERO_PIECE
from nbdfleece.block.accounting import CountedVerbs
from nbdfleece.block.child import Child, Role
from nbdfleece.datapath.writes import Write

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.base.extent import Extent
    from nbdfleece.block.accounting import Accounting
    from nbdfleece.block.bitmap import BitmapKeeper, DirtyBitmap
    from nbdfleece.block.driver import Driver, Place
    from nbdfleece.block.registry import NodeSpec
    from nbdfleece.datapath.fileio import FileIo
    from nbdfleece.datapath.route import EarlyReply, IoVerbs
    from nbdfleece.datapath.workers import Op

_ZEROES = memoryview(bytes(ZERO_PIECE))


class Node:
    """A node: `name`, a driver, edges up and down, and the requests on it.

    Attributes:
        name: Node name, unique in its graph.
        driver: Its behaviour; never shared.
        verbs: Reading and writing verbs of the driver, or what counts them; requests use these.
        accounting: Where `verbs` counts, if it does.
        size: Bytes; set when the driver has been opened.
        read_only: No parent may write.
        discard_enabled: Discards are handed to the driver (`discard=unmap`).
        children: Edges to the nodes below, in order of attachment.
        parents: Edges from whoever uses this node.
        file: The PRIMARY child (a filter's filtered one), or None.
        backing: The COW child, or None.
        bitmaps: Dirty bitmaps by name; anonymous ones under a unique private name.
        bitmap_keeper: Keeps those of them that outlive the process; None: none do.
        in_flight: See N3.
        owned_by_monitor: Named by the user; stays when the last parent goes.
        goes_with_parent: Made as part of its parent; goes when its last parent does.
        is_implicit: A filter that the user did not ask for; a parent's options look through it.
        spec: The options in force, of a node made from options; None of others.
        write_threshold: The first write that ends behind this many bytes is told of; 0: none is.
        threshold_exceeded: Told of that write: (the node, bytes by which it exceeds).
    """

    bitmap_keeper: BitmapKeeper | None = None

    def __init__(
        self, name: str, driver: Driver, *, read_only: bool, discard_enabled: bool
    ) -> None:
        self.name = name
        self.driver = driver
        self.verbs: IoVerbs = driver
        self.accounting: Accounting | None = None
        self.size = 0
        self.read_only = read_only
        self.discard_enabled = discard_enabled
        self.children: list[Child] = []
        self.parents: list[Child] = []
        self.file: Child | None = None
        self.backing: Child | None = None
        self.bitmaps: dict[str, DirtyBitmap] = {}
        self.in_flight = 0
        self.owned_by_monitor = False
        self.goes_with_parent = False
        self.is_implicit = False
        self.spec: NodeSpec | None = None
        self.write_threshold = 0
        self.threshold_exceeded: Callable[[Node, int], None] | None = None
        self._drains = 0
        self._idle_waiters: list[asyncio.Future[None]] = []
        driver.node = self

    def __repr__(self) -> str:
        return f"<Node {self.name} ({self.driver.name})>"

    def child(self, name: str) -> Child:
        """Return the child edge called `name`, which must exist."""
        edge = self.find_child(name)
        assert edge is not None, f"node '{self.name}' has no child '{name}'"
        return edge

    def find_child(self, name: str) -> Child | None:
        """Return the child edge called `name`, or None."""
        for edge in self.children:
            if edge.name == name:
                return edge
        return None

    # --- as a parent (block.child.Parent) ----------------------------------------------------

    def describe_parent(self) -> str:
        """Return how errors call this node."""
        return f"node '{self.name}'"

    def child_attached(self, edge: Child) -> None:
        """Take the edge in: the one place where `file` and `backing` are set (N1)."""
        self.children.append(edge)
        if edge.role & Role.COW:
            assert self.backing is None, f"node '{self.name}' has a backing child already"
            self.backing = edge
        elif edge.role & Role.PRIMARY:
            assert self.file is None, f"node '{self.name}' has a primary child already"
            self.file = edge

    def child_detached(self, edge: Child) -> None:
        """Let the edge go: the one place where `file` and `backing` are cleared (N1)."""
        self.children.remove(edge)
        if self.file is edge:
            self.file = None
        if self.backing is edge:
            self.backing = None

    def drained_begin(self) -> None:
        """Keep all parents from beginning requests (N4); nests."""
        self._drains += 1
        if self._drains == 1:
            for edge in self.parents:
                edge.parent.drained_begin()

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""
        assert self._drains > 0, "drained_end without drained_begin"
        self._drains -= 1
        if self._drains == 0:
            for edge in self.parents:
                edge.parent.drained_end()

    @property
    def is_drained(self) -> bool:
        """Whether a drained section is open on this node."""
        return self._drains > 0

    def is_idle(self) -> bool:
        """Tell whether nothing is in flight on this node or on any parent above it."""
        return self.in_flight == 0 and all(edge.parent.is_idle() for edge in self.parents)

    async def wait_idle(self) -> None:
        """Return when nothing is in flight here and above; only useful while drained.

        Cancel: safe.
        """
        while not self.is_idle():
            for edge in list(self.parents):
                await edge.parent.wait_idle()
            if self.in_flight:
                waiter = asyncio.get_running_loop().create_future()
                self._idle_waiters.append(waiter)
                await waiter

    def account(self, accounting: Accounting | None) -> None:
        """Count requests from now on; None: no more. Whoever has kept `verbs` asks for them again.

        Not a change of the graph: requests go the same way before and after.
        """
        self.accounting = accounting
        self.verbs = self.driver if accounting is None else CountedVerbs(self.driver, accounting)

    # --- requests --------------------------------------------------------------------------

    def enter(self) -> None:
        """Count one more request, or piece of background work, in flight."""
        self.in_flight += 1

    def leave(self) -> None:
        """Undo one `enter` and wake whoever waits for an idle node."""
        self.in_flight -= 1
        if self.in_flight == 0 and self._idle_waiters:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def plain_file(self) -> FileIo | None:
        """Return the open file, when using it directly is the same as using this node.

        Whoever writes to it calls `mark_before` or `mark_early`, and `mark` (N2).
        """
        if self.read_only or self.write_threshold or self.accounting:
            return None
        return self.driver.plain_file()

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill `view` without waiting, or return False; see Driver.read_now.

        The caller has checked the range. Nothing is counted: the read is over when this returns.
        """
        return self.verbs.read_now(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`.

        Args:
            offset: Bytes from the start of the node, any alignment.
            view: Writable, not empty; offset + len(view) <= size.

        Raises:
            IoError: The read failed; the content of `view` is undefined.

        Cancel: not cancelled.
        """
        self._check_range("read", offset, len(view))
        self.in_flight += 1
        try:
            await self.verbs.read(offset, view)
        finally:
            self.leave()

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write `data` at `offset`; with `fua`, to stable storage.

        Args:
            offset: Bytes from the start of the node, any alignment.
            data: Not empty; unchanged until this returns; offset + len(data) <= size.
            fua: Return only when it is on stable storage.

        Raises:
            IoError: Any part of the range may have been written.

        Cancel: not cancelled.
        """
        self._check_write("write", offset, len(data))
        if self.write_threshold:
            self._check_threshold(offset + len(data))
        self.in_flight += 1
        if self.bitmaps:
            self.mark_before(offset, len(data))
        try:
            await self.verbs.write(offset, data, fua=fua)
        finally:
            if self.bitmaps:
                self.mark(offset, len(data))
            self.leave()

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        """As `write` without FUA; may have sent `reply`, see Driver.write_replying.

        Not where something is counted behind the write. Bitmaps are marked before it as well: who
        has got the reply may look at them at once.

        Cancel: not cancelled.
        """
        if self.write_threshold or self.accounting is not None:
            await self.write(offset, data, fua=False)
            return
        self._check_write("write", offset, len(data))
        self.in_flight += 1
        if self.bitmaps:
            self.mark_early(offset, len(data))
        try:
            await self.driver.write_replying(offset, data, reply)
        finally:
            if self.bitmaps:
                self.mark(offset, len(data))
            self.leave()

    def begin_write(
        self,
        offset: int,
        data: memoryview,
        reply: EarlyReply | None,
        ended: Callable[[BaseException | None], None],
    ) -> bool:
        """Begin a write that is one system call; see route.BeginWrite.

        Args:
            offset: As in `write`.
            data: As in `write`.
            reply: As in `write_replying`.
            ended: Called once, later, in the event loop; with the error if there is one.
        """
        length = len(data)
        if (
            self.read_only
            or self.write_threshold
            or self.accounting is not None
            or offset + length > self.size  # `write` says what is wrong
        ):
            return False
        place = self.driver.place(offset, length)
        if place is None:
            return False
        self.in_flight += 1
        if self.bitmaps:
            self.mark_early(offset, length)
        write = _WriteInFlight(self, offset, data, place, ended)
        place[0].begin(write, reply, write.over)  # type: ignore[unused-awaitable]  # calls `over`
        return True

    def place(self, offset: int, length: int) -> Place | None:
        """As Driver.place, for the node above; None where something is counted here."""
        if self.read_only or self.bitmaps or self.write_threshold or self.accounting is not None:
            return None
        return self.driver.place(offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Make the range read as zeroes; arguments as in Driver.write_zeroes.

        Raises:
            IoError: ENOTSUP only with `no_fallback`. Else any part may have been zeroed.

        Cancel: not cancelled.
        """
        self._check_write("write zeroes", offset, length)
        if self.write_threshold:
            self._check_threshold(offset + length)
        self.in_flight += 1
        if self.bitmaps:
            self.mark_before(offset, length)
        try:
            try:
                await self.verbs.write_zeroes(
                    offset,
                    length,
                    fua=fua,
                    may_unmap=may_unmap and self.discard_enabled,
                    no_fallback=no_fallback,
                )
            except IoError as error:
                if error.errno != errno.ENOTSUP or no_fallback:
                    raise
                await self._write_zero_pieces(offset, length, fua=fua)
        finally:
            if self.bitmaps:
                self.mark(offset, length)
            self.leave()

    async def discard(self, offset: int, length: int) -> None:
        """Note that the range is not needed. A no-op success where discards are ignored.

        Raises:
            IoError: The range may hold old data, zeroes, or both.

        Cancel: not cancelled.
        """
        self._check_write("discard", offset, length)
        self.in_flight += 1
        if self.bitmaps:
            self.mark_before(offset, length)
        try:
            # A filter must see even a discard that the node below will ignore.
            if self.discard_enabled or self.driver.is_filter:
                await self.verbs.discard(offset, length)
        finally:
            if self.bitmaps:
                self.mark(offset, length)
            self.leave()

    async def flush(self) -> None:
        """Return when all writes complete before the call are on stable storage.

        Cancel: not cancelled.
        """
        self.in_flight += 1
        if self.bitmaps:
            self._renew_stores()  # an image writes metadata now
        try:
            await self.verbs.flush()
        finally:
            self.leave()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Return what is known of the range; see Driver.block_status.

        Cancel: not cancelled.
        """
        self._check_range("block status", offset, length)
        self.in_flight += 1
        try:
            return await self.driver.block_status(offset, length)
        finally:
            self.leave()

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """Return which layers hold the range; see Driver.allocation_depth.

        Cancel: not cancelled.
        """
        self._check_range("allocation depth", offset, length)
        self.in_flight += 1
        try:
            return await self.driver.allocation_depth(offset, length)
        finally:
            self.leave()

    def _renew_stores(self) -> None:
        for bitmap in self.bitmaps.values():
            if bitmap.store is not None and monotonic() > bitmap.store.renew_at:
                bitmap.store.renew()

    def mark_before(self, offset: int, length: int) -> None:
        """Mark the bitmaps that are kept in a store: a write is about to begin (N2)."""
        for bitmap in self.bitmaps.values():
            store = bitmap.store
            if store is not None:
                if monotonic() > store.renew_at:
                    store.renew()
                bitmap.mark(offset, length)

    def mark_early(self, offset: int, length: int) -> None:
        """As `mark_before`, and the others as well: the reply may come before the end."""
        for bitmap in self.bitmaps.values():
            store = bitmap.store
            if store is not None and monotonic() > store.renew_at:
                store.renew()
            bitmap.mark(offset, length)

    def mark(self, offset: int, length: int) -> None:
        """Mark the other recording bitmaps: a write has ended, however it did (N2)."""
        for bitmap in self.bitmaps.values():
            if bitmap.store is None:
                bitmap.mark(offset, length)

    # --- size ------------------------------------------------------------------------------

    async def truncate(self, size: int) -> None:
        """Make the node, and what it stands on, longer by zeroes or shorter; see Graph.resize.

        Raises:
            CommandError: It cannot be resized. Nothing has changed.
            IoError: It failed; the old size is still told.
        """
        if self.read_only:
            raise CommandError("Image is read-only")
        await self.driver.truncate(size)
        self.resized(size)

    def resized(self, size: int) -> None:
        """Learn the new size; bitmaps follow. In a drained section, and no bitmap is busy."""
        self.size = size
        for bitmap in self.bitmaps.values():
            bitmap.resize(size)

    # --- points in time (snapshot-access reads through these) ----------------------------------

    async def snapshot_read(self, offset: int, view: memoryview) -> None:
        """As `read`, of the point in time that the node preserves."""
        self._check_range("snapshot read", offset, len(view))
        self.in_flight += 1
        try:
            await self.driver.snapshot_read(offset, view)
        finally:
            self.leave()

    async def snapshot_block_status(self, offset: int, length: int) -> list[Extent]:
        """As `block_status`, of the point in time that the node preserves."""
        self._check_range("snapshot block status", offset, length)
        self.in_flight += 1
        try:
            return await self.driver.snapshot_block_status(offset, length)
        finally:
            self.leave()

    async def snapshot_discard(self, offset: int, length: int) -> None:
        """Give up a range of the point in time."""
        self._check_range("snapshot discard", offset, length)
        self.in_flight += 1
        try:
            await self.driver.snapshot_discard(offset, length)
        finally:
            self.leave()

    # --- private ---------------------------------------------------------------------------

    def _check_range(self, verb: str, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or length > self.size - offset:
            raise IoError(errno.EINVAL, f"node '{self.name}': {verb} of {length} bytes at {offset}")

    def _check_write(self, verb: str, offset: int, length: int) -> None:
        if self.read_only:
            raise IoError(errno.EROFS, f"node '{self.name}': {verb}")
        if offset < 0 or length <= 0 or length > self.size - offset:
            raise IoError(errno.ENOSPC, f"node '{self.name}': {verb} of {length} bytes at {offset}")

    def _check_threshold(self, end: int) -> None:
        """Tell of the first write behind the threshold, and of no further one."""
        exceeded = end - self.write_threshold
        if exceeded > 0 and self.threshold_exceeded is not None:
            self.threshold_exceeded(self, exceeded)
            self.write_threshold = 0

    async def _write_zero_pieces(self, offset: int, length: int, *, fua: bool) -> None:
        end = offset + length
        while offset < end:
            piece = min(ZERO_PIECE, end - offset)
            await self.verbs.write(offset, _ZEROES[:piece], fua=fua)
            offset += piece


class _WriteInFlight(Write):
    """A write of `Node.begin_write`, and what is to be done when it ends.

    Args:
        node: It is in flight there.
        offset: Of the write, in the node.
        data: Of the write.
        place: Where it goes.
        ended: As given.
    """

    __slots__ = ("_counted", "_ended", "_file", "_node", "_offset")

    def __init__(
        self,
        node: Node,
        offset: int,
        data: memoryview,
        place: Place,
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self._file, self.offset, self._counted = place
        self.fd = self._file.fd
        self.data = data
        self._node = node
        self._offset = offset
        self._ended = ended
        if self._counted is not None:
            self._counted.count += 1

    def over(self, op: Op[None]) -> None:
        """Let go of what it held, and tell."""
        node = self._node
        if self._counted is not None:
            self._counted.count -= 1
        if node.bitmaps:
            node.mark(self._offset, len(self.data))
        if node.in_flight == 1:
            node.leave()
        else:
            node.in_flight -= 1
        error = op.error
        if error is not None and isinstance(error, OSError):
            error = self._file.write_error(error, self.offset, len(self.data))
        self._ended(error)
