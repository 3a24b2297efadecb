"""The transmission phase of one connection: requests in, replies out.

::

    socket -> inbox -> parse -> READ, cached    -> made in the outbox -> socket, once per wake-up
                         |----> WRITE payload   -> a buffer of its own
                         `----> all that waits  -> a stepped coroutine; its reply joins the outbox

Invariants
  P1  Only whole chunks are put into the outbox, so those of different requests interleave whole.
  P2  While replies wait for the socket, no request is begun: a client that does not read is not
      read from. What has begun runs to its end.
  P3  `in_flight` counts requests that wait for disks. Their payloads and buffers are bounded by
      MAX_BYTES_IN_FLIGHT; at a bound the socket is not read, no request is refused.
  P4  A request that was received whole is carried out, whatever becomes of the connection (after a
      half-close or DISC its reply is delivered too). A WRITE whose payload is cut short is dropped.
  P5  A simple READ reply is sent only when all its data is there; in a structured one, an error
      chunk follows what was sent.
  P6  A drain waits for disks and never for the client: a long READ is sent in pieces, and between
      two pieces it is not in flight.

Spec: NBD proto.md "Transmission phase", "Structured reply chunk types".
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from struct import Struct
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import Extent, clip, merge
from nbdfleece.base.limits import (
    MAX_BYTES_IN_FLIGHT,
    MAX_DRAINED_PAYLOAD,
    MAX_ERROR_TEXT,
    MAX_EXTENT_LENGTH,
    MAX_REQUESTS_IN_FLIGHT,
    MAX_STATUS_EXTENTS,
    READ_PIECE,
)
from nbdfleece.base.units import KiB, MiB
from nbdfleece.datapath.inbox import CAPACITY as INBOX_CAPACITY
from nbdfleece.datapath.inbox import Inbox
from nbdfleece.datapath.outbox import SEND_AT, Outbox
from nbdfleece.datapath.step import Step, let_others_run
from nbdfleece.datapath.workers import completions
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EIO,
    NBD_FLAG_READ_ONLY,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)
from nbdfleece.protocol.nbd.errno_map import to_nbd_error
from nbdfleece.protocol.nbd.request import check

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from nbdfleece.datapath.route import Route, StatusFunction

_log = logging.getLogger(__name__)

_HEADER: Final = wire.REQUEST.size
_INLINE_PAYLOAD: Final = 64 * KiB  # larger WRITE payloads are received into their own buffer
_TURN_BYTES: Final = 2 * MiB  # read for one client before others get their turn
_UNIX_SEND_BUFFER: Final = 1 * MiB
_MIN_HOLE: Final = 4 * KiB
_PIECE_OVERHEAD: Final = 64

# One whole header each, for pack_into: OFFSET_DATA chunk up to its data, and simple reply.
_DATA_CHUNK: Final = Struct(wire.CHUNK_HEADER.format + wire.CHUNK_OFFSET.format[1:])
_DATA_CHUNK_SIZE: Final = _DATA_CHUNK.size
_SIMPLE_SIZE: Final = wire.SIMPLE_REPLY.size
_ZEROES: Final = bytes(READ_PIECE)

Request = tuple[int, int, int, int, int]
"""(flags, command, cookie, offset, length) of one request."""


class Pump:
    """Carries out the requests of one connection.

    Args:
        sock: Connected, non-blocking, behind the handshake. Owned by the pump from now on.
        route: The export; may be replaced while the pump is paused.
        structured: Structured replies were negotiated.
        contexts: Negotiated metadata contexts: (id, status function), in order of negotiation.
        leftover: Bytes received behind the handshake.

    Attributes:
        contexts: As given.
        in_flight: See P3.
        closed: Done when the connection is closed and every request has run; its result says why,
            or is None for a proper end.
        bytes_read: Bytes of data sent to the client.
        bytes_written: Bytes of data received from the client.
        requests: Requests begun.
    """

    def __init__(
        self,
        sock: socket.socket,
        route: Route,
        *,
        structured: bool,
        contexts: list[tuple[int, StatusFunction]],
        leftover: bytes,
    ) -> None:
        self.route = route
        self.contexts = contexts
        self.in_flight = 0
        self.requests = self.bytes_read = self.bytes_written = 0
        self._sock = sock
        self._structured = structured
        self._completions = completions()
        self._loop = self._completions.loop
        self.closed: asyncio.Future[str | None] = self._loop.create_future()
        self._out = Outbox(sock, self._plan_turn, self.abort)
        self._in = Inbox(leftover)
        self._incoming: tuple[Request, int] | None = None  # WRITE not all here, and its error
        self._longs: deque[tuple[int, int, int]] = deque()  # READs half sent: cookie, offset, left
        self._bytes_in_flight = self._pauses = 0
        self._reading = self._working = False  # the socket is watched; inside _work
        self._flush_planned = self._turn_planned = False
        self._hungry = False  # nothing more can be begun with the bytes we have
        self._finishing = self._gone = False  # close when all is replied to; socket closed
        self._reason: str | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        if sock.family == socket.AF_UNIX:
            # Big enough that a 256 KiB reply goes out in one call. TCP sizes its own.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)

    # --- life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self._work()

    def pause(self) -> None:
        """Begin no more requests until as many calls of `resume`. Data waits in the socket."""
        self._pauses += 1

    def resume(self) -> None:
        """Undo one `pause`."""
        self._pauses -= 1
        if self._pauses == 0:
            self._plan_turn()

    def is_idle(self) -> bool:
        """Tell whether no request is running."""
        return self.in_flight == 0

    async def wait_idle(self) -> None:
        """Return when no request is running. Cancel: safe."""
        while self.in_flight:
            waiter = self._loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def finish(self) -> None:
        """Begin no more requests; close when those in flight have been replied to."""
        self._finishing = True
        self._in.clear()
        self._incoming = None
        self._work()

    def abort(self, reason: str) -> None:
        """Close now. Requests in flight run to their end; their replies are lost."""
        if self._reason is None:
            self._reason = reason
        self._hang_up()

    # --- receiving ---------------------------------------------------------------------------

    def _on_readable(self) -> None:
        """Take what the socket has and carry out what is complete.

        # FAST: clients send header and payload of a WRITE in two calls; without a second look there
        # were 2.3 wake-ups per write at depth 1, not 2. The gain in time is within the noise of the
        # machine; plain form in tests/reference/pump.py
        """
        if self._receive():
            self._work()
            if self._hungry and not self._in.is_empty() and not self._finishing and self._receive():
                self._work()

    def _receive(self) -> bool:
        """Receive once; tell whether there is anything new to work on."""
        try:
            if not self._in.is_full() and self._in.receive(self._sock) == 0:
                self._received_eof()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.abort(f"receive failed: {error.strerror}")
            return False
        return True

    def _received_eof(self) -> None:
        """Carry out what was received whole, then close the socket (P4)."""
        self._finishing = True

    # --- parsing ---------------------------------------------------------------------------

    def _work(self) -> None:
        """Begin what can be begun, send what is ready, and see to it that we are called again."""
        if self._gone:
            return
        self._working = True
        self._completions.begin_turn()
        self._begin_requests()
        self._completions.end_turn()
        self._working = False
        if not self._out.is_empty():
            self._out.flush()
        self._update_reader()
        if self._finishing:
            self._close_when_done()

    def _turn(self) -> None:
        self._turn_planned = False
        self._work()

    def _plan_turn(self) -> None:
        if not self._turn_planned:
            self._turn_planned = True
            self._loop.call_soon(self._turn)

    def _may_begin(self) -> bool:
        return not (
            self._out.blocked
            or self._pauses
            or self._gone
            or self.in_flight >= MAX_REQUESTS_IN_FLIGHT
            or self._bytes_in_flight >= MAX_BYTES_IN_FLIGHT
        )

    def _begin_requests(self) -> None:
        """Parse and begin the complete requests of the inbox, until something is in the way.

        # FAST: cached reads are served in this loop without a coroutine: 6 microseconds per 4 KiB
        # read at depth 16 as a client sees it, in all; plain form in tests/reference/pump.py
        """
        unpack, inbox = wire.REQUEST.unpack_from, self._in
        budget = _TURN_BYTES
        self._hungry = False
        while self._may_begin():
            if self._longs:
                budget -= self._continue_long()
            elif self._incoming is not None:
                if not self._take_incoming():
                    self._hungry = True
                    return
            else:
                head = inbox.head
                if inbox.tail - head < _HEADER:
                    self._hungry = True
                    return
                magic, flags, command, cookie, offset, length = unpack(inbox.view, head)
                if magic != NBD_REQUEST_MAGIC:
                    self.abort(f"bad request magic {magic:#010x}")
                    return
                route = self.route
                if (
                    command == NBD_CMD_READ
                    and not flags
                    and 0 < length <= READ_PIECE
                    and offset + length <= route.size
                ):
                    # The usual request; everything about it is known to be right.
                    if not self._out.has_room(length + _PIECE_OVERHEAD):
                        return
                    inbox.head = head + _HEADER
                    self.requests += 1
                    self._read_piece(cookie, offset, length, done=True)
                    budget -= length
                elif (
                    command == NBD_CMD_WRITE
                    and not flags
                    and 0 < length <= inbox.tail - head - _HEADER
                    and offset + length <= route.size
                    and not route.flags & NBD_FLAG_READ_ONLY
                ):
                    # The usual short WRITE, all here. Its payload is copied: the inbox is used
                    # again before the write is over.
                    start = head + _HEADER
                    inbox.head = start + length
                    self.requests += 1
                    data = memoryview(bytes(inbox.view[start : start + length]))
                    self._begin_write((flags, command, cookie, offset, length), data)
                    budget -= 4 * KiB
                elif not self._out.has_room(_PIECE_OVERHEAD):  # what waits to be sent is bounded
                    return
                elif not self._begin_other((flags, command, cookie, offset, length)):
                    self._hungry = True
                    return
                else:
                    budget -= length if command == NBD_CMD_READ else 4 * KiB
            if budget < 0:
                self._plan_turn()
                return

    def _begin_other(self, request: Request) -> bool:
        """Begin any other request; False when its payload is not here yet, or it is the last."""
        flags, command, cookie, offset, length = request
        route = self.route
        if command == NBD_CMD_DISC:
            self._in.clear()
            self._finishing = True
            return False
        error = check(
            command, flags, offset, length, route.size, route.flags, self._structured,
            bool(self.contexts),
        )  # fmt: skip
        if command == NBD_CMD_WRITE and length:
            return self._take_payload(request, error)
        self._in.head += _HEADER
        self.requests += 1
        if error:
            self._reply_error(request, error, "")
        elif command == NBD_CMD_READ:
            self._begin_read(request)
        elif command == NBD_CMD_BLOCK_STATUS:
            self._begin(request, self._block_status(request))
        elif length == 0 and command != NBD_CMD_FLUSH:
            self._reply_success(cookie)
        else:
            self._begin(request, self._run_plain(request))
        return True

    def _take_payload(self, request: Request, error: int) -> bool:
        """Begin a WRITE, or receive its payload first; a refused one is read and dropped."""
        inbox, length = self._in, request[4]
        if length > MAX_DRAINED_PAYLOAD:
            self.abort(f"write of {length} bytes")
            return False
        start = inbox.head + _HEADER
        if not error and inbox.tail - start >= length:  # with flags; others do not come here
            data = memoryview(bytes(inbox.view[start : start + length]))
            inbox.head = start + length
            self.requests += 1
            self._begin_write(request, data)
            return True
        if not error and length <= _INLINE_PAYLOAD:
            if start + length > INBOX_CAPACITY:
                inbox.make_room()
            return False
        inbox.head = start
        self.requests += 1
        self._incoming = (request, error)
        if error:
            inbox.skip(length)
        else:
            inbox.await_payload(length)
        return True

    def _take_incoming(self) -> bool:
        """Begin, or refuse, the WRITE whose payload was awaited; False when it is not here yet."""
        assert self._incoming is not None
        request, error = self._incoming
        if error:
            if not self._in.skip(0):
                return False
            self._incoming = None
            self._reply_error(request, error, "")
        else:
            payload = self._in.take_payload()
            if payload is None:
                return False
            self._incoming = None
            self._begin_write(request, payload)
        return True

    # --- reading ---------------------------------------------------------------------------

    def _read_piece(self, cookie: int, offset: int, length: int, *, done: bool) -> bool:
        """Put a READ, or a piece of one, into the outbox, which has room for it.

        Returns:
            False when the data is not at hand; then a coroutine has taken over all that is left
            of a short read.
        """
        out = self._out
        at = out.filled
        if self._structured:
            start = at + _DATA_CHUNK_SIZE
            end = start + length
            if self.route.read_now(offset, out.view[start:end]):
                self.bytes_read += length
                if (
                    not out.buffer[start]
                    and length >= _MIN_HOLE
                    and out.buffer[start:end] == _ZEROES[:length]
                ):
                    out.put(wire.hole_chunk(cookie, flags=done, offset=offset, length=length))
                    return True
                _DATA_CHUNK.pack_into(
                    out.buffer, at, NBD_STRUCTURED_REPLY_MAGIC, done,
                    NBD_REPLY_TYPE_OFFSET_DATA, cookie, length + 8, offset,
                )  # fmt: skip
                out.filled = end
                if end >= SEND_AT:
                    out.flush()
                return True
        else:
            start = at + _SIMPLE_SIZE
            end = start + length
            if self.route.read_now(offset, out.view[start:end]):
                self.bytes_read += length
                wire.SIMPLE_REPLY.pack_into(out.buffer, at, NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
                out.filled = end
                if end >= SEND_AT:
                    out.flush()
                return True
        if done:
            self._begin_slow_read((0, NBD_CMD_READ, cookie, offset, length), length)
        return False

    def _begin_read(self, request: Request) -> None:
        """Begin a READ that is long, or has flags, or is empty."""
        flags, _, cookie, offset, length = request
        if length == 0:
            if self._structured:
                self._emit(wire.none_chunk(cookie, flags=NBD_REPLY_FLAG_DONE))
            else:
                self._reply_success(cookie)
        elif self._structured and not flags & NBD_CMD_FLAG_DF:
            self._longs.append((cookie, offset, length))
        else:
            self._begin_slow_read(request, length)

    def _continue_long(self) -> int:
        """Send one piece of the first long READ; return its length."""
        cookie, offset, left = self._longs[0]
        piece = min(left, READ_PIECE)
        if not self._out.has_room(piece + _PIECE_OVERHEAD):
            return 0
        self._longs.popleft()
        if self._read_piece(cookie, offset, piece, done=left == piece):
            if left > piece:
                self._longs.appendleft((cookie, offset + piece, left - piece))
        elif left > piece:
            self._begin_slow_read((0, NBD_CMD_READ, cookie, offset, left), piece)
        return piece

    def _begin_slow_read(self, request: Request, piece: int) -> None:
        self._begin(request, self._read_slowly(request, piece), piece)

    async def _read_slowly(self, request: Request, piece: int) -> None:
        """Read what is not cached: `piece` bytes of the request. The rest becomes a long READ.

        So that a request waits in a coroutine for disks only, never for the client: a drain does
        not depend on clients that do not read.
        """
        _, _, cookie, offset, length = request
        done = piece == length
        structured = self._structured
        header = _DATA_CHUNK_SIZE if structured else _SIMPLE_SIZE
        buffer = bytearray(header + piece)
        view = memoryview(buffer)[header:]
        for start in range(0, piece, READ_PIECE):
            part = view[start : start + READ_PIECE]
            if piece == len(part) or not self.route.read_now(offset + start, part):
                await self.route.io.read(offset + start, part)
            elif start % _TURN_BYTES == 0:
                await let_others_run()
        self.bytes_read += piece
        if not structured:
            wire.SIMPLE_REPLY.pack_into(buffer, 0, NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
        elif (
            _MIN_HOLE <= piece <= READ_PIECE
            and not buffer[header]
            and (buffer[header:] == _ZEROES[:piece])
        ):
            buffer = bytearray(wire.hole_chunk(cookie, flags=done, offset=offset, length=piece))
        else:
            _DATA_CHUNK.pack_into(
                buffer, 0, NBD_STRUCTURED_REPLY_MAGIC, done, NBD_REPLY_TYPE_OFFSET_DATA,
                cookie, piece + 8, offset,
            )  # fmt: skip
        self._emit(buffer)
        if not done:
            self._longs.append((cookie, offset + piece, length - piece))

    # --- everything else -----------------------------------------------------------------------

    def _begin_write(self, request: Request, data: memoryview) -> None:
        flags, _, _, offset, length = request
        self.bytes_written += length
        fua = bool(flags & NBD_CMD_FLAG_FUA)
        self._begin(request, self.route.io.write(offset, data, fua=fua), length)

    async def _run_plain(self, request: Request) -> None:
        """Carry out a request that has neither payload nor data in its reply."""
        flags, command, _, offset, length = request
        io, fua = self.route.io, bool(flags & NBD_CMD_FLAG_FUA)
        if command == NBD_CMD_FLUSH:
            await io.flush()
        elif command == NBD_CMD_TRIM:
            await io.discard(offset, length)
            if fua:
                await io.flush()
        elif command == NBD_CMD_WRITE_ZEROES:
            await io.write_zeroes(
                offset,
                length,
                fua=fua,
                may_unmap=not flags & NBD_CMD_FLAG_NO_HOLE,
                no_fallback=bool(flags & NBD_CMD_FLAG_FAST_ZERO),
            )
        else:
            assert command == NBD_CMD_CACHE
            await self._fill_cache(offset, length)

    async def _fill_cache(self, offset: int, length: int) -> None:
        """Read the range, which leaves it in the page cache, or fails where a READ would."""
        view = memoryview(bytearray(min(length, READ_PIECE)))
        while length:
            piece = view[: min(length, READ_PIECE)]
            await self.route.io.read(offset, piece)
            offset += len(piece)
            length -= len(piece)

    async def _block_status(self, request: Request) -> bytes:
        """Return the chunks of a BLOCK_STATUS reply: one per context, all over the same range."""
        flags, _, cookie, offset, length = request
        one = bool(flags & NBD_CMD_FLAG_REQ_ONE)
        length = min(length, MAX_EXTENT_LENGTH) if one else length
        found = []
        for context, status in self.contexts:
            found.append((context, await _collect_extents(status, offset, length, one=one)))
        end = min(extents[-1].end for _, extents in found)
        chunks: list[bytes] = []
        for context, extents in found:
            descriptors = [(extent.length, extent.flags)
                           for extent in clip(extents, offset, end - offset)]  # fmt: skip
            done = len(chunks) == len(found) - 1
            chunks.append(
                wire.status_chunk(cookie, flags=done, context=context, descriptors=descriptors)
            )
        return b"".join(chunks)

    def _begin(
        self,
        request: Request,
        coroutine: Coroutine[object, None, bytes | None],
        held: int = 0,
    ) -> None:
        """Run a request that may wait; `held` bytes of memory are its own until it ends."""
        self.in_flight += 1
        self._bytes_in_flight += held

        def ended(reply: bytes | None, error: BaseException | None) -> None:
            self.in_flight -= 1
            self._bytes_in_flight -= held
            if error is not None:
                self._reply_failure(request, error)
            elif reply is not None:
                self._emit(reply)
            elif request[1] != NBD_CMD_READ:
                self._reply_success(request[2])
            if not self._working:
                self._after_request()

        Step(coroutine, ended).resume()

    def _after_request(self) -> None:
        """See what the end of a request makes possible."""
        if self.in_flight == 0 and self._idle_waiters:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self._gone:
            self._close_when_done()
        elif self._longs or self._finishing or not self._reading:
            self._plan_turn()

    # --- replies ---------------------------------------------------------------------------

    def _reply_success(self, cookie: int) -> None:
        self._emit(wire.simple_reply(0, cookie))

    def _reply_failure(self, request: Request, error: BaseException) -> None:
        """The request border: whatever a request raised becomes an NBD error."""
        flags, command, _, _, _ = request
        if isinstance(error, IoError):
            number = to_nbd_error(error.wire_errno, command=command, flags=flags)
            self._reply_error(request, number, error.public)
        else:
            _log.error("request %r failed", request, exc_info=error)
            self._reply_error(request, NBD_EIO, "internal error")

    def _reply_error(self, request: Request, number: int, text: str) -> None:
        cookie = request[2]
        if self._structured:
            message = text.encode()[:MAX_ERROR_TEXT]
            self._emit(
                wire.error_chunk(cookie, flags=NBD_REPLY_FLAG_DONE, error=number, text=message)
            )
        else:
            self._emit(wire.simple_reply(number, cookie))

    def _emit(self, reply: bytes | bytearray) -> None:
        """Queue a whole reply, or whole chunks of one, to go out with others of this turn."""
        if self._gone:
            return
        self._out.put(reply)
        if not (self._working or self._flush_planned or self._out.blocked):
            self._flush_planned = True
            self._completions.at_end(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_planned = False
        self._out.flush()

    # --- the socket ----------------------------------------------------------------------------

    def _update_reader(self) -> None:
        wanted = not self._finishing and self._may_begin()
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._sock, self._on_readable)
            elif not self._gone:
                self._loop.remove_reader(self._sock)

    def _close_when_done(self) -> None:
        """Close the socket when nothing is left to reply; then say so when nothing runs."""
        if not self._gone:
            if self.in_flight or self._longs or not self._hungry or not self._out.is_empty():
                return
            if not self._in.is_empty():
                self._reason = "the client went away inside a request"
            self._hang_up()
        elif self.in_flight == 0 and not self.closed.done():
            self.closed.set_result(self._reason)

    def _hang_up(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._reading = False
        self._loop.remove_reader(self._sock)
        self._out.close()
        self._sock.close()
        self._longs.clear()
        self._close_when_done()


async def _collect_extents(
    status: StatusFunction, offset: int, length: int, *, one: bool
) -> list[Extent]:
    """Ask for status until the range is covered, or there are enough extents."""
    end = offset + length
    extents: list[Extent] = []
    while offset < end and len(extents) < MAX_STATUS_EXTENTS:
        found = clip(await status(offset, end - offset), offset, end - offset)
        assert found, "status makes no progress"
        extents = merge(extents + found) if extents else merge(found)
        offset = extents[-1].end
        if one and len(extents) > 1:
            break
    return extents[:1] if one else extents[:MAX_STATUS_EXTENTS]
