"""Route: what the transmission phase may do with one export.

The server makes a Route from the root node of an export, so that the pump knows neither nodes nor
exports. It is replaced only while the export is drained: a running request never sees it change.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Protocol

from nbdfleece.base.extent import Extent


class EarlyReply(Protocol):
    """Answers a WRITE, from a worker thread.

    Sent at most once, when the data is written and nothing is left to be done but what no client
    can see.
    """

    def send_with(self, others: Sequence[EarlyReply], /) -> list[EarlyReply]:
        """Send it, and those of `others` with it that go the same way; return the rest of them.

        Never raises.
        """


StatusFunction = Callable[[int, int], Awaitable[list[Extent]]]
"""(offset, length) -> extents from offset on, at least one; `flags` are those of the context."""


WriteReplying = Callable[[int, memoryview, EarlyReply | None], Coroutine[object, None, None]]
"""(offset, data, reply): writes; may have sent `reply` when it returns without an error."""


class IoVerbs(Protocol):
    """The I/O verbs of a node, as block.node defines them."""

    def read_now(self, offset: int, view: memoryview, /) -> bool:
        """Fill `view` without waiting, or return False."""

    def read(self, offset: int, view: memoryview, /) -> Coroutine[object, None, None]:
        """Fill `view`."""

    def write(
        self, offset: int, data: memoryview, /, *, fua: bool
    ) -> Coroutine[object, None, None]:
        """Write `data`."""

    def write_zeroes(
        self, offset: int, length: int, /, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> Coroutine[object, None, None]:
        """Make the range read as zeroes."""

    def discard(self, offset: int, length: int, /) -> Coroutine[object, None, None]:
        """Note that the range is not needed."""

    def flush(self) -> Coroutine[object, None, None]:
        """Make earlier writes durable."""

    def block_status(self, offset: int, length: int, /) -> Coroutine[object, None, list[Extent]]:
        """Return extents from `offset` on, at least one."""


class Route:
    """The verbs and limits of one export.

    Attributes:
        size: Bytes.
        flags: Transmission flags as advertised, DF left out (it is the connection's).
        io: The verbs of the node behind the export.
        read_now: `io.read_now`, or a driver's own when nothing lies between.
        write_replying: As `io.write` without FUA, with an EarlyReply for it or None; None where
            something is left to do behind each write.
        refused: Told the command of a request that is refused unseen, where somebody counts those.
    """

    __slots__ = ("flags", "io", "read_now", "refused", "size", "write_replying")

    def __init__(self, io: IoVerbs, *, size: int, flags: int) -> None:
        self.io = io
        self.size = size
        self.flags = flags
        self.read_now = io.read_now
        self.write_replying: WriteReplying | None = None
        self.refused: Callable[[int], None] | None = None
