"""The sending side of a connection: whole replies in, as few system calls as the socket allows.

::

    replies -> buffer [sent ... filled) -> backlog -> socket
               made in place              what did not fit, or came while the socket was full

Invariants
  O1  What is put in is a whole reply or whole chunks of one; it goes out unbroken, in order.
  O2  `blocked` holds exactly while the socket has taken less than there was; the pump begins
      nothing then, so what waits is bounded by the requests that had begun.
  O3  Whoever sends holds the gate, and finds no reply half sent: a worker thread may put a reply
      between two others, never into one, and never into a socket that has been closed.
  O4  A client that takes not one byte for `stall_s` is dropped.

# FAST: one send per wake-up instead of one per reply; by estimate half the cost of a 4 KiB read at
# depth 16 (not measured apart from the rest); plain form in tests/reference/pump.py

# FAST: the first reply does not begin with the buffer, which is a page. Data that the kernel copies
# from a page of its cache to 16 or 28 bytes behind the start of one comes at an eighth of the
# speed on some processors (256 KiB in 163 microseconds, not 22): nbdcopy from the page cache costs
# the server half as much; plain form in tests/reference/pump.py

# FAST: WRITEs are answered by the worker thread that made them, those of one batch in one call,
# without the way back through the event loop: 4 KiB writes at depth 1 gain 15 %, with a fresh
# snapshot as without; plain form in tests/reference/pump.py
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from nbdfleece.base.limits import READ_PIECE
from nbdfleece.base.units import KiB
from nbdfleece.datapath.stream import RETRY_S, WantsRead

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdfleece.datapath.route import EarlyReply
    from nbdfleece.datapath.stream import Stream

CAPACITY: Final = READ_PIECE + 64 * KiB
_START: Final = 64  # index of the first reply in an empty buffer
SEND_AT: Final = 96 * KiB  # so much waiting is worth a system call before the batch is over


class Outbox:
    """Queued replies of one connection.

    Args:
        stream: Stays the caller's.
        on_room: Called when a blocked socket has taken everything.
        on_dead: Called with a reason when the socket fails, or takes nothing for too long.
        stall_s: See O3.

    Attributes:
        buffer: Where replies are made: [sent, filled) is unsent, the rest is free.
        view: The same bytes, as a memoryview.
        filled: The end of what is in `buffer`; whoever makes a reply in place moves it.
        blocked: See O2.
    """

    def __init__(
        self,
        stream: Stream,
        on_room: Callable[[], None],
        on_dead: Callable[[str], None],
        stall_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._stall_s = stall_s
        self._on_room = on_room
        self._on_dead = on_dead
        # Anonymous memory costs nothing until it is used, unlike a bytearray.
        self.buffer = mmap.mmap(-1, CAPACITY)
        self.view = memoryview(self.buffer)
        self.filled = _START
        self.blocked = False
        self._sent = _START
        self._backlog: deque[memoryview] = deque()
        self._stall: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._closed = False
        self._gate = threading.Lock()  # O3; held for one turn of sending, never waited in

    def is_empty(self) -> bool:
        """Tell whether everything has been handed to the socket."""
        return self._sent == self.filled and not self._backlog

    def has_room(self, size: int) -> bool:
        """Tell whether a reply of `size` bytes may be made in place now; sends if that helps."""
        if self._backlog or self.filled + size > CAPACITY:  # the backlog goes out behind the buffer
            self.flush()
        return not (self.blocked or self._closed)  # that flush may have found the peer gone

    def put(self, reply: bytes | bytearray) -> None:
        """Queue a reply; the caller sees to a `flush` later."""
        end = self.filled + len(reply)
        if not self._backlog and end <= CAPACITY:
            self.buffer[self.filled : end] = reply
            self.filled = end
        elif not self._closed:
            self._backlog.append(memoryview(reply))

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        if self._closed:
            return
        with self._gate:
            reason = self._send_all()
        if reason is not None:
            self._on_dead(reason)
        elif self.blocked and self._sent == self.filled and not self._backlog:
            self._unblock()
            self._on_room()

    def _send_all(self) -> str | None:
        """Send as long as the socket takes it; return why it failed, if it did."""
        send = self._stream.send
        try:
            while self._sent < self.filled:
                self._sent += send(self.view[self._sent : self.filled])
            self._sent = self.filled = _START
            while self._backlog:
                first = self._backlog[0]
                count = send(first)
                if count == len(first):
                    self._backlog.popleft()
                else:
                    self._backlog[0] = first[count:]
        except (BlockingIOError, InterruptedError) as obstacle:
            self._wait(wants_read=isinstance(obstacle, WantsRead))
        except OSError as error:
            return f"send failed: {error.strerror}"
        return None

    def send_from_thread(self, replies: bytes) -> bool:
        """Send whole replies now; in a worker thread, on a unix socket without TLS.

        Args:
            replies: Of the requests of one connection that may be in flight, without data: a few
                KiB at most, which a unix socket takes whole or not at all.

        Returns:
            False when that cannot be: nothing has been sent, the event loop is to do it.
        """
        if not self._gate.acquire(blocking=False):
            return False
        try:
            if self.blocked or self._closed:
                return False
            if self._stream.send(memoryview(replies)) != len(replies):
                # Were it to take a part, nothing that is sent from here on could be understood.
                self._stream.shutdown(socket.SHUT_RDWR)
            return True
        except OSError:  # full, or the peer has gone: the event loop finds out what to do
            return False
        finally:
            self._gate.release()

    def send_early(self, replies: Sequence[EarlyReply]) -> None:
        """Send replies of this connection, if that can be; see route.EarlySender."""
        if self.send_from_thread(b"".join([reply.data for reply in replies])):
            for reply in replies:
                reply.sent = True

    def wait_for_room(self) -> None:
        """Be blocked until the socket takes something, which TLS has of its own to send."""
        self._wait(wants_read=False)

    def close(self) -> None:
        """Forget what is queued; nothing is sent any more. The socket is still open."""
        if not self._closed:
            with self._gate:
                self._closed = True
            self._unblock()
            self._sent = self.filled = _START
            self._backlog.clear()

    def _wait(self, *, wants_read: bool) -> None:
        """Be blocked; `flush` is called when it may help."""
        if not self.blocked:
            self._watch_stall(self._waiting())
        if wants_read:
            self._cancel_retry()
            # The reader of the socket is the pump's, and has it off while we are blocked. A writer
            # would be called all the time. So rare that looking again and again will do.
            self._loop.remove_writer(self._stream.fileno())
            self._retry = self._loop.call_later(RETRY_S, self.flush)
        elif not self.blocked or self._retry is not None:
            self._loop.add_writer(self._stream.fileno(), self.flush)
            self._cancel_retry()
        self.blocked = True

    def _unblock(self) -> None:
        self.blocked = False
        self._loop.remove_writer(self._stream.fileno())
        self._cancel_retry()
        if self._stall is not None:
            self._stall.cancel()

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _waiting(self) -> tuple[int, int, int]:
        """Return what changes whenever the socket takes anything."""
        first = len(self._backlog[0]) if self._backlog else 0
        return self.filled - self._sent, len(self._backlog), first

    def _watch_stall(self, before: tuple[int, int, int]) -> None:
        def look() -> None:
            now = self._waiting()
            if now == before:
                self._on_dead(f"the client takes no data for {self._stall_s:g} s")
            else:
                self._watch_stall(now)

        self._stall = self._loop.call_later(self._stall_s, look)
