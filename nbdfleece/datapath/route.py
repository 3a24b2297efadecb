"""Route: what the transmission phase may do with one export.

The server makes a Route from the root node of an export, so that the pump knows neither nodes nor
exports. It is replaced only while the export is drained: a running request never sees it change.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Protocol

from nbdfleece.base.extent import Extent


class EarlySender(Protocol):
    """Sends replies from a worker thread."""

    def send_early(self, replies: Sequence[EarlyReply], /) -> None:
        """Send replies whose `way` it is, or none of them. Never raises."""


class EarlyReply(Protocol):
    """The reply to a WRITE, for a worker thread to send.

    When the data is written and nothing is left to be done but what no client can see.

    Attributes:
        way: Who sends it.
        data: The whole reply.
        sent: That has been done; it is not done again.
    """

    way: EarlySender
    data: bytes
    sent: bool


StatusFunction = Callable[[int, int], Awaitable[list[Extent]]]
"""(offset, length) -> extents from offset on, at least one; `flags` are those of the context."""


WriteReplying = Callable[[int, memoryview, EarlyReply | None], Coroutine[object, None, None]]
"""(offset, data, reply): writes; may have sent `reply` when it returns without an error."""


BeginWrite = Callable[
    [int, memoryview, EarlyReply | None, Callable[[BaseException | None], None]], bool
]
"""(offset, data, reply, ended): begins a write that is one system call and nothing else.

False: it is another kind of write, and nothing has been begun. `ended` is called later, once, with
the error if there is one, an IoError; `reply` may have been sent then if there is none.
"""


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
        begin_write: See BeginWrite; None where there are no such writes.
        write_replying: As `io.write` without FUA, with an EarlyReply for it or None; None where
            something is left to do behind each write.
        refused: Told the command of a request that is refused unseen, where somebody counts those.
    """

    __slots__ = ("begin_write", "flags", "io", "read_now", "refused", "size", "write_replying")

    def __init__(self, io: IoVerbs, *, size: int, flags: int) -> None:
        self.io = io
        self.size = size
        self.flags = flags
        self.read_now = io.read_now
        self.write_replying: WriteReplying | None = None
        self.begin_write: BeginWrite | None = None
        self.refused: Callable[[int], None] | None = None
