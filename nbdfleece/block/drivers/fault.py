"""Driver `blkdebug`: a filter that makes requests fail, or wait, when it is told to.

For tests: nothing in it is random and nothing sleeps. A request goes through these steps::

    counted -> held "before"? -> to fail? -> the node below -> held "after"? -> ends

Faults come from injections (the options `inject-error`, with states moved on by `set-state`), from
`fail_next`, or from the release of a hold.

Here an event is what kind of request comes: `read_aio`, `write_aio`, `pwritev_zero`, `flush_to_os`,
`flush_to_disk`, or `none` for all of them; `pdiscard` and `block_status` are additions. QEMU also
has events of its formats' insides, which do not exist here.

Follows: QEMU block/blkdebug.c.
"""

from __future__ import annotations

import asyncio
import enum
import errno
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block import permissions as perms
from nbdfleece.block.driver import Driver

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nbdfleece.base.extent import Extent
    from nbdfleece.block.child import Child
    from nbdfleece.block.node import Node


class IoType(enum.Enum):
    """A kind of request; values as in QMP."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


EVENTS: Final[Mapping[str, frozenset[IoType]]] = MappingProxyType(
    {
        "none": frozenset(IoType),
        "read_aio": frozenset({IoType.READ}),
        "write_aio": frozenset({IoType.WRITE}),
        "pwritev_zero": frozenset({IoType.WRITE_ZEROES}),
        "flush_to_os": frozenset({IoType.FLUSH}),
        "flush_to_disk": frozenset({IoType.FLUSH}),
        "pdiscard": frozenset({IoType.DISCARD}),
        "block_status": frozenset({IoType.BLOCK_STATUS}),
    }
)


@dataclass(frozen=True, slots=True)
class Injection:
    """A rule that makes requests fail.

    Attributes:
        event: One of EVENTS.
        iotype: Only requests of this type; None: all types of the event, but block-status only
            where the event is that.
        errno: What they fail with.
        offset: Only requests that touch [offset, offset + length); None: all.
        length: See `offset`; a sector.
        state: Only while the driver is in this state; 0: always.
        once: Applies to one request only.
        immediately: Fail within the call; else in the next turn of the event loop.
    """

    event: str
    iotype: IoType | None = None
    errno: int = errno.EIO
    offset: int | None = None
    length: int = 512
    state: int = 0
    once: bool = False
    immediately: bool = False

    def concerns(self, iotype: IoType, offset: int, length: int, state: int) -> bool:
        """Tell whether the rule makes this request fail."""
        if iotype not in EVENTS[self.event] or self.state not in (0, state):
            return False
        if self.iotype is not None:
            if iotype is not self.iotype:
                return False
        elif iotype is IoType.BLOCK_STATUS and self.event != "block_status":
            return False
        # A flush has no range, and so touches none.
        return self.offset is None or (
            self.offset < offset + length and offset < self.offset + self.length
        )


@dataclass(frozen=True, slots=True)
class StateChange:
    """In `state` (0: in any), a request of `event` moves the driver to `new_state`."""

    event: str
    state: int
    new_state: int


class Hold:
    """Requests of one type wait here until they are released; made by BlkdebugDriver.hold.

    Attributes:
        waiting: How many requests wait now.
    """

    def __init__(self, iotype: IoType, offset: int, length: int | None, *, after: bool) -> None:
        self.iotype: Final = iotype
        self.after: Final = after
        self.released = False
        self._offset = offset
        self._length = length
        self._held: list[asyncio.Future[int]] = []
        self._watchers: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> int:
        """How many requests wait now."""
        return len(self._held)

    def concerns(self, iotype: IoType, offset: int, length: int) -> bool:
        """Tell whether a request has to wait here."""
        if self.released or iotype is not self.iotype:
            return False
        end = None if self._length is None else self._offset + self._length
        return (end is None or offset < end) and self._offset < max(offset + length, offset + 1)

    async def wait(self) -> int:
        """Wait, as a request; return the errno to fail with, or 0.

        Cancel: not cancelled.
        """
        held: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._held.append(held)
        for count, watcher in self._watchers:
            if len(self._held) >= count and not watcher.done():
                watcher.set_result(None)
        return await held

    async def reached(self, count: int = 1) -> None:
        """Return when `count` requests wait here.

        Cancel: safe.
        """
        if len(self._held) < count:
            watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watchers.append((count, watcher))
            await watcher

    def release_one(self, *, errno: int = 0) -> None:
        """Let the request go that has waited longest; with `errno`, to its failure."""
        self._held.pop(0).set_result(errno)

    def release(self, *, errno: int = 0) -> None:
        """Let all go, in order of arrival, and hold nothing any more."""
        self.released = True
        while self._held:
            self.release_one(errno=errno)


class BlkdebugDriver(Driver):
    """Child `image` with roles FILTERED and PRIMARY.

    Args:
        inject_errors: Rules; the first that concerns a request decides.
        set_states: Changes of state; looked at behind the rules.
        take_child_perms: Permissions that the node takes on its child besides its parents'.
        unshare_child_perms: Permissions that it does not share there.

    Attributes:
        seen: How many requests of each type have come.
        state: See StateChange; 1 at first.
    """

    name: ClassVar[str] = "blkdebug"
    is_filter: ClassVar[bool] = True

    def __init__(
        self,
        *,
        inject_errors: Iterable[Injection] = (),
        set_states: Iterable[StateChange] = (),
        take_child_perms: int = perms.NONE,
        unshare_child_perms: int = perms.NONE,
    ) -> None:
        self.seen: Counter[IoType] = Counter()
        self.state = 1
        self._injections = list(inject_errors)
        self._changes = list(set_states)
        self._holds: list[Hold] = []
        self._take = take_child_perms
        self._unshare = unshare_child_perms

    # --- for tests -------------------------------------------------------------------------

    def inject(self, injection: Injection) -> None:
        """Add a rule behind the others."""
        self._injections.append(injection)

    def heal(self) -> None:
        """Forget all rules."""
        self._injections.clear()

    def fail_next(self, iotype: IoType, *, errno: int = errno.EIO, count: int = 1) -> None:
        """Make the next `count` requests of a type fail, before all other rules."""
        rule = Injection("none", iotype=iotype, errno=errno, once=True, immediately=True)
        self._injections[:0] = [rule] * count

    def hold(
        self, iotype: IoType, *, offset: int = 0, length: int | None = None, after: bool = False
    ) -> Hold:
        """Make requests of a type wait until the returned hold is released.

        Args:
            iotype: Which.
            offset: Only those that touch the range from here.
            length: Bytes of the range; None: to the end.
            after: Hold them behind the node below has done them, else before.
        """
        self._holds = [hold for hold in self._holds if not hold.released]
        self._holds.append(Hold(iotype, offset, length, after=after))
        return self._holds[-1]

    # --- life and permissions ----------------------------------------------------------------

    async def open(self) -> int:
        """Check the rules; see Driver.open."""
        events = [rule.event for rule in self._injections]
        for event in events + [change.event for change in self._changes]:
            if event not in EVENTS:
                raise CommandError(f"Parameter 'event' does not accept value '{event}'")
        return self._below().size

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Pass through, with what the options add and take away."""
        return perm | self._take, shared & ~self._unshare

    # --- I/O -------------------------------------------------------------------------------

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Forward while there is nothing that could concern a read."""
        if self._injections or self._changes or not all(hold.released for hold in self._holds):
            return False
        if not self._below().read_now(offset, view):
            return False
        self.seen[IoType.READ] += 1
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        """Forward; see Driver.read."""
        await self._before(IoType.READ, offset, len(view))
        await self._below().read(offset, view)
        await self._after(IoType.READ, offset, len(view))

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Forward; see Driver.write."""
        await self._before(IoType.WRITE, offset, len(data))
        await self._below().write(offset, data, fua=fua)
        await self._after(IoType.WRITE, offset, len(data))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Forward; see Driver.write_zeroes."""
        await self._before(IoType.WRITE_ZEROES, offset, length)
        await self._below().write_zeroes(
            offset, length, fua=fua, may_unmap=may_unmap, no_fallback=no_fallback
        )
        await self._after(IoType.WRITE_ZEROES, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """Forward; see Driver.discard."""
        await self._before(IoType.DISCARD, offset, length)
        await self._below().discard(offset, length)
        await self._after(IoType.DISCARD, offset, length)

    async def flush(self) -> None:
        """Forward; see Driver.flush."""
        await self._before(IoType.FLUSH, 0, 0)
        await self._below().flush()
        await self._after(IoType.FLUSH, 0, 0)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Forward; see Driver.block_status."""
        await self._before(IoType.BLOCK_STATUS, offset, length)
        extents = await self._below().block_status(offset, length)
        await self._after(IoType.BLOCK_STATUS, offset, length)
        return extents

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """Forward, as a block status; see Driver.allocation_depth."""
        await self._before(IoType.BLOCK_STATUS, offset, length)
        extents = await self._below().allocation_depth(offset, length)
        await self._after(IoType.BLOCK_STATUS, offset, length)
        return extents

    # --- facts -----------------------------------------------------------------------------

    def cluster_size(self) -> int:
        """Return the child's."""
        return self._below().driver.cluster_size()

    def reads_zero_when_new(self) -> bool:
        """Tell what the child tells."""
        return self._below().driver.reads_zero_when_new()

    async def allocated_size(self) -> int | None:
        """Return the child's."""
        return await self._below().driver.allocated_size()

    # --- private ---------------------------------------------------------------------------

    async def _before(self, iotype: IoType, offset: int, length: int) -> None:
        self.seen[iotype] += 1
        await self._wait_at_holds(iotype, offset, length, after=False)
        rule = self._find_injection(iotype, offset, length)
        self._change_state(iotype)
        if rule is None:
            return
        if not rule.immediately:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(turn.set_result, None)
            await turn
        self._fail(rule.errno, iotype, offset, length)

    async def _after(self, iotype: IoType, offset: int, length: int) -> None:
        await self._wait_at_holds(iotype, offset, length, after=True)

    async def _wait_at_holds(
        self, iotype: IoType, offset: int, length: int, *, after: bool
    ) -> None:
        # A test releases each hold; no request does, so none waits for another here.
        for hold in list(self._holds):
            if hold.after is after and hold.concerns(iotype, offset, length):
                number = await hold.wait()
                if number:
                    self._fail(number, iotype, offset, length)

    def _find_injection(self, iotype: IoType, offset: int, length: int) -> Injection | None:
        for index, rule in enumerate(self._injections):
            if rule.concerns(iotype, offset, length, self.state):
                if rule.once:
                    del self._injections[index]
                return rule
        return None

    def _change_state(self, iotype: IoType) -> None:
        state = self.state
        for change in self._changes:
            if iotype in EVENTS[change.event] and change.state in (0, state):
                self.state = change.new_state

    def _fail(self, number: int, iotype: IoType, offset: int, length: int) -> None:
        raise IoError(number, self._where(f"{iotype.value} (injected error)", offset, length))

    def _below(self) -> Node:
        edge = self.node.file
        assert edge is not None, "blkdebug has an image child"
        return edge.node
