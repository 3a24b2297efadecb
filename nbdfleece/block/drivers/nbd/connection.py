"""One connection in transmission: many requests in flight, replies by cookie.

Invariants
  - Every submitted request gets its reply, or Lost, exactly once.
  - A request whose payload has not been sent to its end gets no reply: who submitted it may use the
    memory again as soon as it has one. A server that answers early breaks the protocol.
  - After `abort` no memory of a request is read or written any more.

It uses callbacks of the loop, no task, and works over a plain socket and over TLS alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import NbdfleeceError, PeerViolation
from nbdfleece.base.units import KiB, MiB
from nbdfleece.datapath.stream import WantsRead, WantsWrite
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.client_replies import Reply, ReplyParser
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_DISC,
    NBD_CMD_FLAG_PAYLOAD_LEN,
)

if TYPE_CHECKING:
    from nbdfleece.block.drivers.nbd.dial import Dialled

_STAGING: Final = 64 * KiB  # received at once where it is not known where it belongs
_TURN_BYTES: Final = 2 * MiB  # received before others get their turn
_JOINED_PAYLOAD: Final = 16 * KiB  # copied behind the header, so that both go out in one call


class Lost(NbdfleeceError):
    """The connection is gone; the request may have been carried out, in part, or not at all.

    Attributes:
        by_violation: The server broke the protocol.
    """

    def __init__(self, text: str, *, by_violation: bool) -> None:
        super().__init__(text)
        self.by_violation = by_violation


class Connection:
    """A connection that takes requests.

    Args:
        dialled: Owned by the connection from now on.

    Attributes:
        connected: What the handshake has reached.
        pending: Requests without a reply.
        lost: Done when the connection is over; never before its last request has been told.
    """

    def __init__(self, dialled: Dialled) -> None:
        self.connected = dialled.connected
        self.pending = 0
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Lost] = self._loop.create_future()
        self._stream = dialled.stream
        self._is_tls = isinstance(self._stream, TlsStream)
        self._fd = self._stream.fileno()
        self._parser = ReplyParser(
            structured=self.connected.structured,
            extended=self.connected.extended,
            contexts=self.connected.contexts.values(),
        )
        self._staging = memoryview(bytearray(_STAGING))
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._cookie = 0
        self._queue: deque[tuple[memoryview, int | None]] = deque()  # to send; cookie at its end
        self._unsent: set[int] = set()
        self._is_writing = False
        self._loop.add_reader(self._fd, self._on_readable)
        if dialled.leftover:
            self._loop.call_soon(self._on_leftover, dialled.leftover)
        self._look_again()

    # --- requests ------------------------------------------------------------------------------

    def submit(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: memoryview | None = None,
        view: memoryview | None = None,
    ) -> asyncio.Future[Reply]:
        """Send a request.

        Args:
            command: NBD_CMD_*.
            offset: Bytes.
            length: Bytes.
            flags: NBD_CMD_FLAG_*.
            data: Payload of a WRITE; unchanged until the future is done.
            view: Where the bytes of a READ go; undefined until the future is done.

        Returns:
            A future of the reply, or of Lost; of the latter at once when the connection is gone.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self.lost.done():
            future.set_exception(self.lost.result())
            return future
        self._cookie += 1
        cookie = self._cookie
        self._parser.expect(cookie, command, offset=offset, length=length, view=view)
        self._waiting[cookie] = future
        self.pending += 1
        make = wire.extended_request if self.connected.extended else wire.request
        if data is not None and self.connected.extended:
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN
        header = make(command, flags=flags, cookie=cookie, offset=offset, length=length)
        self._unsent.add(cookie)
        if data is None:
            self._queue.append((memoryview(header), cookie))
        elif len(data) <= _JOINED_PAYLOAD:
            self._queue.append((memoryview(header + data), cookie))
        else:
            self._queue.append((memoryview(header), None))
            self._queue.append((data, cookie))
        if not self._is_writing:
            self._send_queue()
        return future

    def disconnect(self) -> None:
        """Take leave and close; nothing is pending, or it is lost."""
        if not self.lost.done() and not self._queue:
            make = wire.extended_request if self.connected.extended else wire.request
            header = make(NBD_CMD_DISC, flags=0, cookie=0, offset=0, length=0)
            self._queue.append((memoryview(header), None))
            self._send_queue()
            if not self._queue:
                with contextlib.suppress(OSError):
                    self._stream.shutdown(socket.SHUT_WR)
        self.abort(Lost("closed", by_violation=False))

    def abort(self, reason: Lost) -> None:
        """Close now; what is pending is lost."""
        if self.lost.done():
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._stream.close()
        self._queue.clear()
        self.pending = 0
        waiting, self._waiting = self._waiting, {}
        self.lost.set_result(reason)
        for future in waiting.values():
            if not future.done():
                future.set_exception(reason)
                future.exception()  # looked at: a submitter that is gone is no noise

    # --- sending -------------------------------------------------------------------------------

    def _send_queue(self) -> None:
        """Send what the stream takes; the rest when it takes more."""
        try:
            while self._queue:
                view, cookie = self._queue[0]
                count = self._stream.send(view)
                if count < len(view):
                    self._queue[0] = view[count:], cookie
                    continue
                self._queue.popleft()
                if cookie is not None:
                    self._unsent.discard(cookie)
        except WantsRead:
            self._watch_writer(on=False)  # `_on_readable` goes on
        except (BlockingIOError, InterruptedError):
            self._watch_writer(on=True)
        except OSError as error:
            self._lose(f"sending failed: {error.strerror or error}")
        else:
            self._watch_writer(on=False)

    def _on_writable(self) -> None:
        """Go on sending; and receiving, where TLS first had to send something of its own."""
        if not self._queue:
            with contextlib.suppress(OSError):  # receiving meets it again
                self._stream.send(memoryview(b""))
        self._send_queue()
        if self._is_tls and not self.lost.done():
            self._on_readable()

    def _watch_writer(self, *, on: bool) -> None:
        if on and not self._is_writing:
            self._loop.add_writer(self._fd, self._on_writable)
        elif self._is_writing and not on:
            self._loop.remove_writer(self._fd)
        self._is_writing = on

    # --- receiving -----------------------------------------------------------------------------

    def _on_leftover(self, leftover: bytes) -> None:
        if self.lost.done():
            return
        try:
            self._hand_out(self._parser.feed(leftover))
        except PeerViolation as error:
            self._break(error)

    def _on_readable(self) -> None:
        """Take what has come, for a while; content of a READ goes straight to its place."""
        left = _TURN_BYTES
        try:
            while left > 0 and not self.lost.done():
                wanted = self._parser.wanted
                into = self._staging if wanted is None else wanted
                count = self._stream.recv_into(into)
                if count == 0:
                    self._lose("the server closed the connection")
                    return
                if wanted is None:
                    self._hand_out(self._parser.feed(self._staging[:count]))
                else:
                    self._hand_out(self._parser.filled(count))
                left -= count
                if count < len(into) and not self._is_tls:
                    return
        except WantsWrite:
            self._watch_writer(on=True)
            return
        except (BlockingIOError, InterruptedError):
            if self._queue and not self._is_writing:
                self._send_queue()
        except PeerViolation as error:
            self._break(error)
            return
        except OSError as error:
            self._lose(f"receiving failed: {error.strerror or error}")
            return
        self._look_again()

    def _look_again(self) -> None:
        """See to what is decrypted already, which wakes nobody."""
        if isinstance(self._stream, TlsStream) and not self.lost.done() and self._stream.pending():
            self._loop.call_soon(self._on_more)

    def _on_more(self) -> None:
        if not self.lost.done():
            self._on_readable()

    def _hand_out(self, replies: list[Reply]) -> None:
        for reply in replies:
            if reply.cookie in self._unsent:
                raise PeerViolation("a reply to a request that was not sent to its end")
            self.pending -= 1
            future = self._waiting.pop(reply.cookie)
            if not future.done():
                future.set_result(reply)

    def _lose(self, text: str) -> None:
        self.abort(Lost(text, by_violation=False))

    def _break(self, error: PeerViolation) -> None:
        self.abort(Lost(f"the server broke the protocol: {error}", by_violation=True))
