"""Export: a node of the block graph, offered to clients under a name.

Invariants
  E1  While an export is drained none of its pumps begins a request, also not a pump that is opened
      meanwhile.
  E2  The route changes only when the root edge does, which happens in a drained section; no
      running request sees two nodes.
  E3  Each connection has a route of its own, with the flags that its client was told.
  E4  An export counts as idle only when every request of every connection it ever had has ended,
      whatever became of the connection.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.limits import MAX_PAYLOAD
from nbdfleece.base.units import KiB, is_power_of_2
from nbdfleece.block import permissions
from nbdfleece.block.accounting import CountedVerbs, Kind
from nbdfleece.datapath.pump import Pump
from nbdfleece.datapath.route import Route, StatusFunction
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_META_BASE_ALLOCATION,
    NBD_META_QEMU_ALLOCATION_DEPTH,
    NBD_META_QEMU_DIRTY_BITMAP,
)
from nbdfleece.protocol.nbd.haggle import ExportInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdfleece.base.extent import Extent
    from nbdfleece.block.accounting import Accounting
    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.child import Child
    from nbdfleece.block.node import Node
    from nbdfleece.datapath.pump import PumpLimits
    from nbdfleece.datapath.route import IoVerbs
    from nbdfleece.datapath.stream import Stream
    from nbdfleece.protocol.nbd.handshake import Transmission

# A flush reaches the one node behind all connections, so several of them are as good as one.
_FLAGS: Final = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_CAN_MULTI_CONN
    | NBD_FLAG_SEND_CACHE
)
READ_ONLY_FLAGS: Final = _FLAGS | NBD_FLAG_READ_ONLY
WRITABLE_FLAGS: Final = (
    _FLAGS | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
)

_KINDS: Final = {
    NBD_CMD_READ: Kind.READ,
    NBD_CMD_WRITE: Kind.WRITE,
    NBD_CMD_WRITE_ZEROES: Kind.WRITE,
    NBD_CMD_TRIM: Kind.UNMAP,
    NBD_CMD_FLUSH: Kind.FLUSH,
}

_PREFERRED_BLOCK: Final = 4 * KiB


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a node is offered.

    Attributes:
        id: Name of the export in the control plane; never seen by clients.
        name: Export name that clients ask for.
        writable: Clients may write.
        description: For people, in LIST and INFO; may be empty.
        allocation_depth: Offer the metadata context `qemu:allocation-depth`.
        writethrough: A write is answered when it is durable, whatever the client says.
    """

    id: str
    name: str
    writable: bool
    description: str
    allocation_depth: bool = True
    writethrough: bool = False


class Export:
    """One export, and the parent of the edge to its root node (block.child.Parent).

    Args:
        options: How the node is offered.
        generation: Tells this export from an earlier one of the same name.
        bitmaps: Offered as `qemu:dirty-bitmap:NAME`; their names differ.

    Attributes:
        options: How the node is offered.
        generation: Tells this export from an earlier one of the same name.
        root: The edge to the node; None before it is attached and after it is detached.
        is_closing: No new connection may use it.
        is_retired: Further requests of its clients are answered NBD_ESHUTDOWN.
        is_cut_off: Its clients are disconnected.
        when_unused: Called as soon as `is_used` is false; None: nobody waits for that.
        accounting: Where requests of clients are counted, if they are.
        refusal: What clients that ask for it are told in place of getting it; empty: they get it.
        holders: Sessions that have chosen it.
        pumps: Connections in transmission; a pump leaves when all of its requests have ended.
    """

    def __init__(
        self,
        options: ExportOptions,
        *,
        generation: int,
        bitmaps: Sequence[DirtyBitmap] = (),
    ) -> None:
        self.options = options
        self.generation = generation
        self.root: Child | None = None
        self.is_closing = self.is_retired = self.is_cut_off = False
        self.when_unused: Callable[[], None] | None = None
        self.refusal = ""
        self.accounting: Accounting | None = None
        self.holders = 0
        self.pumps: set[Pump] = set()
        self._contexts = self._make_contexts(bitmaps)
        self._bitmaps = [bitmap for bitmap in bitmaps if not bitmap.busy]  # to be held by this
        self._drains = 0
        self._unused_waiters: list[asyncio.Future[None]] = []

    @property
    def flags(self) -> int:
        """Transmission flags, without NBD_FLAG_SEND_DF."""
        return WRITABLE_FLAGS if self.options.writable else READ_ONLY_FLAGS

    @property
    def edge_permissions(self) -> tuple[int, int]:
        """(needed, shared) of the edge to the root node: nobody may resize it."""
        needed = permissions.CONSISTENT_READ
        if self.options.writable:
            needed |= permissions.WRITE
        return needed, permissions.ALL & ~permissions.RESIZE

    @property
    def node(self) -> Node:
        """The root node."""
        assert self.root is not None, "the export is not attached"
        return self.root.node

    def describe(self) -> ExportInfo:
        """Return what the handshake tells of this export."""
        node = self.node
        cluster = node.driver.cluster_size()
        is_block_size = is_power_of_2(cluster) and _PREFERRED_BLOCK < cluster <= MAX_PAYLOAD
        return ExportInfo(
            self.options.name,
            node.size,
            self.flags,
            self.options.description,
            preferred_block=cluster if is_block_size else _PREFERRED_BLOCK,
            contexts=tuple(self._contexts),
            generation=self.generation,
        )

    # --- connections -------------------------------------------------------------------------

    @property
    def is_used(self) -> bool:
        """Whether any client is connected, or any of its requests is running."""
        return self.holders > 0 or bool(self.pumps)

    def hold(self) -> None:
        """Count one more session that has chosen this export."""
        assert not self.is_closing, "the export is closing"
        self.holders += 1

    def release(self) -> None:
        """Undo one `hold`."""
        self.holders -= 1
        self._wake_if_unused()

    def open_pump(self, stream: Stream, chosen: Transmission, limits: PumpLimits) -> Pump:
        """Begin transmission on a connection that holds this export.

        The pump owns the stream. It has not started, and counts as this export's until all of its
        requests have ended.
        """
        pump = Pump(
            stream,
            self._new_route(chosen.export.flags),
            structured=chosen.structured,
            extended=chosen.extended,
            contexts=[(context, self._contexts[name]) for context, name in chosen.contexts],
            leftover=chosen.leftover,
            limits=limits,
        )
        if self.is_retired:
            pump.retire()
        if self._drains:
            pump.pause()
        self.pumps.add(pump)
        pump.closed.add_done_callback(lambda _: self._pump_closed(pump))
        return pump

    def retire(self) -> None:
        """Carry out no further request of anybody: they are answered NBD_ESHUTDOWN."""
        self.is_retired = True
        for pump in self.pumps:
            pump.retire()

    async def wait_unused(self) -> None:
        """Return when no client is connected and no request is running.

        Cancel: safe.
        """
        while self.is_used:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._unused_waiters.append(waiter)
            await waiter

    def _pump_closed(self, pump: Pump) -> None:
        self.pumps.discard(pump)
        self._wake_if_unused()

    def _wake_if_unused(self) -> None:
        if self.is_used:
            return
        if self.when_unused is not None:
            self.when_unused()
        waiters, self._unused_waiters = self._unused_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- metadata contexts ---------------------------------------------------------------------

    def hold_bitmaps(self) -> None:
        """Let nobody change or use the bitmaps while they are offered."""
        for bitmap in self._bitmaps:
            bitmap.busy = True

    def release_bitmaps(self) -> None:
        """Undo `hold_bitmaps`."""
        for bitmap in self._bitmaps:
            bitmap.busy = False

    def _make_contexts(self, bitmaps: Sequence[DirtyBitmap]) -> dict[str, StatusFunction]:
        """Return what is offered, by name."""
        found: dict[str, StatusFunction] = {NBD_META_BASE_ALLOCATION: self._allocation}
        if self.options.allocation_depth:
            found[NBD_META_QEMU_ALLOCATION_DEPTH] = self._allocation_depth
        for bitmap in bitmaps:
            found[NBD_META_QEMU_DIRTY_BITMAP + bitmap.name] = bitmap.status
        return found

    async def _allocation(self, offset: int, length: int) -> list[Extent]:
        """base:allocation. The flags of base.extent are those of the spec."""
        return await self.node.block_status(offset, length)

    async def _allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """qemu:allocation-depth: which layer of the node holds the range."""
        return await self.node.allocation_depth(offset, length)

    # --- as a parent (block.child.Parent) ------------------------------------------------------

    def describe_parent(self) -> str:
        """Return how errors call this export."""
        return f"export '{self.options.id}'"

    def child_attached(self, edge: Child) -> None:
        """Send all requests to the node at the end of `edge` from now on (E2)."""
        self.root = edge
        for pump in self.pumps:
            pump.route = self._new_route(pump.route.flags)

    def child_detached(self, edge: Child) -> None:
        """Forget the edge; in a drained section, or without connections."""
        assert self.root is edge, "not the root of this export"
        self.root = None

    def _new_route(self, flags: int) -> Route:
        node = self.node
        io: IoVerbs = _Writethrough(node) if self.options.writethrough else node
        if self.accounting is not None:
            route = Route(CountedVerbs(io, self.accounting), size=node.size, flags=flags)
            route.refused = self._count_refused
            return route
        route = Route(io, size=node.size, flags=flags)
        # `Node.read_now` does nothing but this call.
        route.read_now = node.verbs.read_now
        if not self.options.writethrough:
            route.begin_write = node.begin_write
            route.write_replying = node.write_replying
        return route

    # --- accounting ----------------------------------------------------------------------------

    def account(self, accounting: Accounting | None) -> None:
        """Count the requests that begin from now on; None: no more."""
        self.accounting = accounting
        self.renew_routes()

    def renew_routes(self) -> None:
        """Take up a change of how requests are counted, here or in the node.

        They go to the same node as before, so this needs no drained section (E2).
        """
        if self.root is not None:
            for pump in self.pumps:
                pump.route = self._new_route(pump.route.flags)

    def _count_refused(self, command: int) -> None:
        assert self.accounting is not None, "a route that counts"
        kind = _KINDS.get(command)
        if kind is not None:
            self.accounting.invalid(kind)

    # --- drained sections ----------------------------------------------------------------------

    def drained_begin(self) -> None:
        """Begin no requests until the matching `drained_end`; connections stay."""
        self._drains += 1
        if self._drains == 1:
            for pump in self.pumps:
                pump.pause()

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""
        assert self._drains > 0, "drained_end without drained_begin"
        self._drains -= 1
        if self._drains == 0:
            for pump in self.pumps:
                pump.resume()

    def is_idle(self) -> bool:
        """Tell whether no request is running."""
        return all(pump.is_idle() for pump in self.pumps)

    async def wait_idle(self) -> None:
        """Return when no request is running; only useful while drained.

        Cancel: safe.
        """
        while not self.is_idle():
            for pump in list(self.pumps):
                await pump.wait_idle()


class _Writethrough:
    """The verbs of a node, each write durable before it ends.

    Args:
        node: The node.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self.read_now = node.read_now
        self.read = node.read
        self.flush = node.flush
        self.block_status = node.block_status

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """See block.node."""
        del fua
        await self._node.write(offset, data, fua=True)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """See block.node."""
        del fua
        await self._node.write_zeroes(
            offset, length, fua=True, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        """See block.node."""
        await self._node.discard(offset, length)
        await self._node.flush()
