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
  P7  A WRITE may be answered by the thread that made it (Outbox.send_from_thread); it is in flight
      until the event loop has seen its end.
  P8  Once retired, nothing of the export is touched again but by requests in flight.

Over TLS the same holds; what TLS has received and decrypts later is looked for in turns of the
loop, since no poll of the socket announces it.

Spec: NBD proto.md "Transmission phase", "Structured reply chunk types"; for extended headers, the
same on the branch extension-ext-header.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import IoError, PeerViolation
from nbdfleece.base.limits import (
    IDLE_TIMEOUT_S,
    MAX_BYTES_IN_FLIGHT,
    MAX_REQUESTS_IN_FLIGHT,
    READ_PIECE,
    WRITE_STALL_S,
)
from nbdfleece.base.units import KiB, MiB
from nbdfleece.datapath.idle import IdleWatch
from nbdfleece.datapath.inbox import Inbox
from nbdfleece.datapath.outbox import Outbox
from nbdfleece.datapath.replies import is_hole, replies_of
from nbdfleece.datapath.status import block_status, memory_needed
from nbdfleece.datapath.step import Step, let_others_run
from nbdfleece.datapath.stream import WantsWrite
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.datapath.verbs import carry_out
from nbdfleece.datapath.workers import completions
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_EINVAL,
    NBD_EIO,
    NBD_ESHUTDOWN,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_FLAG_READ_ONLY,
    NBD_REQUEST_MAGIC,
)
from nbdfleece.protocol.nbd.errno_map import to_nbd_error
from nbdfleece.protocol.nbd.request import (
    check,
    max_status_filter,
    parse_status_filter,
    payload_length,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from nbdfleece.datapath.replies import Request
    from nbdfleece.datapath.route import EarlySender, Route
    from nbdfleece.datapath.status import Context
    from nbdfleece.datapath.stream import Stream

_log = logging.getLogger(__name__)

_INLINE_PAYLOAD: Final = 64 * KiB  # larger WRITE payloads are received into their own buffer
_TURN_BYTES: Final = 2 * MiB  # read for one client before others get their turn
_UNIX_SEND_BUFFER: Final = 1 * MiB
_PIECE_OVERHEAD: Final = 64


@dataclass(frozen=True, slots=True)
class PumpLimits:
    """What one client may do in transmission.

    Attributes:
        requests: In flight; then its socket is not read.
        bytes_in_flight: Payloads and buffers of those; likewise.
        stall_s: It is dropped when it takes no byte of a reply for so long.
        idle_s: It is dropped when it asks for nothing for so long; None or 0: never.
    """

    requests: int = MAX_REQUESTS_IN_FLIGHT
    bytes_in_flight: int = MAX_BYTES_IN_FLIGHT
    stall_s: float = WRITE_STALL_S
    idle_s: float | None = IDLE_TIMEOUT_S


_DEFAULT_LIMITS: Final = PumpLimits()


class _Write:
    """A WRITE in flight, and the reply to it (route.EarlyReply).

    Args:
        request: As parsed.
        way: The outbox of the connection.
        data: The reply.

    Attributes:
        sent: See route.EarlyReply.
    """

    __slots__ = ("data", "request", "sent", "way")

    def __init__(self, request: Request, way: EarlySender, data: bytes) -> None:
        self.request = request
        self.way = way
        self.data = data
        self.sent = False


class Pump:
    """Carries out the requests of one connection.

    Args:
        stream: Connected, non-blocking, behind the handshake. Owned by the pump from now on.
        route: The export; may be replaced while the pump is paused.
        structured: Structured replies were negotiated.
        extended: Extended headers were; `structured` does not matter then.
        contexts: Negotiated metadata contexts: (id, status function), in order of negotiation.
        leftover: Bytes received behind the handshake.
        limits: What the client may do.

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
        stream: Stream,
        route: Route,
        *,
        structured: bool,
        contexts: list[Context],
        leftover: bytes,
        extended: bool = False,
        limits: PumpLimits = _DEFAULT_LIMITS,
    ) -> None:
        self.route = route
        self.contexts = contexts
        self.in_flight = 0
        self.requests = self.bytes_read = self.bytes_written = 0
        self._stream = stream
        self._tls = stream if isinstance(stream, TlsStream) else None
        self._max_requests, self._max_bytes = limits.requests, limits.bytes_in_flight
        self._structured, self._extended = structured or extended, extended
        self._replies = replies_of(structured=structured, extended=extended)
        self._layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        self._completions = completions()
        self._loop = self._completions.loop
        self.closed: asyncio.Future[str | None] = self._loop.create_future()
        self._out = Outbox(stream, self._plan_turn, self.abort, limits.stall_s)
        self._in = Inbox(leftover)
        self._incoming: tuple[Request, int] | None = None  # WRITE not all here, and its error
        self._longs: deque[tuple[Request, int]] = deque()  # READs half sent, and how far
        self._bytes_in_flight = self._pauses = 0
        self._reading = self._working = False  # the socket is watched; inside _work
        self._flush_planned = self._turn_planned = self._look_planned = False
        self._hungry = False  # nothing more can be begun with the bytes we have
        self._retired = self._finishing = self._gone = False  # _finishing: close when replied to
        self._reason: str | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._idle = IdleWatch(self._loop, limits.idle_s, self._progress, self.abort)
        if stream.family == socket.AF_UNIX:
            # Big enough that a 256 KiB reply goes out in one call. TCP sizes its own.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        self._replies_early = self._tls is None and stream.family == socket.AF_UNIX

    # --- life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self._idle.start()
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

    def retire(self) -> None:
        """Answer all further requests with NBD_ESHUTDOWN; the client stays until it leaves (P8)."""
        self._retired = True

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

    def _progress(self) -> tuple[int, int] | None:
        """Return what changes when the client asks for something or sends it; None: it waits."""
        if self.in_flight or self._longs or self._pauses or self._out.blocked:
            return None
        return self.requests, self._in.progress

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
            if not self._in.is_full() and self._in.receive(self._stream) == 0:
                self._received_eof()
        except WantsWrite:
            self._out.wait_for_room()
            self._update_reader()
            return False
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
            or self.in_flight >= self._max_requests
            or self._bytes_in_flight >= self._max_bytes
        )

    def _begin_requests(self) -> None:
        """Parse and begin the complete requests of the inbox, until something is in the way.

        # FAST: cached reads are served in this loop without a coroutine: 6 microseconds per 4 KiB
        # read at depth 16 as a client sees it, in all; plain form in tests/reference/pump.py
        """
        unpack, header = self._layout.unpack_from, self._layout.size
        inbox, out = self._in, self._out
        max_requests, max_bytes = self._max_requests, self._max_bytes
        right_magic = NBD_EXTENDED_REQUEST_MAGIC if self._extended else NBD_REQUEST_MAGIC
        write_flags = NBD_CMD_FLAG_PAYLOAD_LEN if self._extended else 0
        route = self.route  # is not replaced while we are in here, as that needs a pause
        size = -1 if self._retired else route.size
        put_read, read_now = self._replies.put_read, route.read_now
        budget = _TURN_BYTES
        self._hungry = False
        while not (  # as `_may_begin`
            out.blocked
            or self._pauses
            or self._gone
            or self.in_flight >= max_requests
            or self._bytes_in_flight >= max_bytes
        ):
            if self._longs:
                budget -= self._continue_long()
            elif self._incoming is not None:
                if not self._take_incoming():
                    self._hungry = True
                    return
            else:
                head = inbox.head
                if inbox.tail - head < header:
                    self._hungry = True
                    return
                magic, flags, command, cookie, offset, length = unpack(inbox.view, head)
                if magic != right_magic:
                    self.abort(f"bad request magic {magic:#010x}")
                    return
                if (
                    command == NBD_CMD_READ
                    and not flags
                    and 0 < length <= READ_PIECE
                    and offset + length <= size
                ):
                    # The usual request; everything about it is known to be right.
                    if not out.has_room(length + _PIECE_OVERHEAD):
                        return
                    inbox.head = head + header
                    self.requests += 1
                    if put_read(out, read_now, cookie, offset, offset, length, True):
                        self.bytes_read += length
                    else:
                        self._begin_slow_read((flags, command, cookie, offset, length), 0, length)
                    budget -= length
                elif (
                    command == NBD_CMD_WRITE
                    and not flags & ~write_flags
                    and 0 < length <= inbox.tail - head - header
                    and offset + length <= size
                    and not route.flags & NBD_FLAG_READ_ONLY
                ):
                    # The usual short WRITE, all here. Its payload is copied: the inbox is used
                    # again before the write is over.
                    start = head + header
                    inbox.head = start + length
                    self.requests += 1
                    data = memoryview(bytearray(inbox.view[start : start + length]))
                    self._begin_write((flags, command, cookie, offset, length), data)
                    budget -= 4 * KiB
                elif not out.has_room(_PIECE_OVERHEAD):  # what waits to be sent is bounded
                    return
                elif not self._begin_other((flags, command, cookie, offset, length)):
                    self._hungry = True
                    return
                else:
                    budget -= min(length, READ_PIECE) if command == NBD_CMD_READ else 4 * KiB
            if budget < 0:
                self._plan_turn()
                return

    def _begin_other(self, request: Request) -> bool:
        """Begin any other request; False when its payload is not here yet, or it is the last."""
        flags, command, _, _, length = request
        if command == NBD_CMD_DISC:
            self._in.clear()
            self._finishing = True
            return False
        try:
            payload = payload_length(command, flags, length, extended=self._extended)
        except PeerViolation as violation:
            self.abort(str(violation))
            return False
        if command == NBD_CMD_BLOCK_STATUS and 0 < payload <= max_status_filter(len(self.contexts)):
            return self._take_status_filter(request, payload)
        error = self._error_of(request)
        if payload:
            if command != NBD_CMD_WRITE:
                error = error or NBD_EINVAL
            return self._take_payload(request, error)
        self._in.head += self._layout.size
        self.requests += 1
        self._carry_out(request, error, self.contexts)
        return True

    def _error_of(self, request: Request) -> int:
        """Return the NBD error that a request deserves now, or 0."""
        if self._retired:
            return NBD_ESHUTDOWN
        flags, command, _, offset, length = request
        route = self.route
        return check(
            command, flags, offset, length, route.size, route.flags, self._structured,
            bool(self.contexts), self._extended,
        )  # fmt: skip

    def _carry_out(self, request: Request, error: int, contexts: list[Context]) -> None:
        """Begin a request that has no payload (any more), or refuse it."""
        _, command, _, _, length = request
        if error:
            self._refuse(request, error)
        elif command == NBD_CMD_READ:
            self._begin_read(request)
        elif command == NBD_CMD_BLOCK_STATUS:
            self._begin_status(request, contexts)
        elif length == 0 and command != NBD_CMD_FLUSH:
            self._emit(self._replies.success(request))
        else:
            self._begin(request, carry_out(self.route.io, request, self._nobody_waits))

    def _take_status_filter(self, request: Request, payload: int) -> bool:
        """Begin, or refuse, a BLOCK_STATUS about some contexts only; False: not all here yet."""
        flags, command, cookie, offset, _ = request
        inbox = self._in
        start = inbox.head + self._layout.size
        if not self._is_here(start, payload):
            return False
        data = bytes(inbox.view[start : start + payload])
        inbox.head = start + payload
        self.requests += 1
        found = parse_status_filter(data, [context for context, _ in self.contexts])
        if found is None:
            self._refuse(request, NBD_ESHUTDOWN if self._retired else NBD_EINVAL)
            return True
        length, chosen = found
        request = (flags, command, cookie, offset, length)
        contexts = [context for context in self.contexts if context[0] in chosen]
        self._carry_out(request, self._error_of(request), contexts)
        return True

    def _is_here(self, start: int, length: int) -> bool:
        """Tell whether a payload that begins at `start` is all in the inbox."""
        return self._in.tail - start >= length

    def _take_payload(self, request: Request, error: int) -> bool:
        """Begin a WRITE, or receive its payload first; what is refused is read and dropped."""
        inbox, length = self._in, request[4]
        start = inbox.head + self._layout.size
        if not error and self._is_here(start, length):  # with flags; others do not come here
            data = memoryview(bytearray(inbox.view[start : start + length]))
            inbox.head = start + length
            self.requests += 1
            self._begin_write(request, data)
            return True
        if not error and length <= _INLINE_PAYLOAD:
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
        """Begin, or refuse, the request whose payload was awaited; False: it is not here yet."""
        assert self._incoming is not None
        request, error = self._incoming
        if error:
            if not self._in.skip(0):
                return False
            self._incoming = None
            self._refuse(request, error)
        else:
            payload = self._in.take_payload()
            if payload is None:
                return False
            self._incoming = None
            if self._retired:
                self._refuse(request, NBD_ESHUTDOWN)
            else:
                self._begin_write(request, payload)
        return True

    # --- reading ---------------------------------------------------------------------------

    def _begin_read(self, request: Request) -> None:
        """Begin a READ that is long, or has flags, or is empty."""
        flags, _, _, _, length = request
        if length == 0:
            self._emit(self._replies.empty_read(request))
        elif self._structured and not flags & NBD_CMD_FLAG_DF:
            self._longs.append((request, 0))
        else:
            self._begin_slow_read(request, 0, length)

    def _continue_long(self) -> int:
        """Send one piece of the first long READ; return its length."""
        request, sent = self._longs[0]
        _, _, cookie, offset, length = request
        left = length - sent
        piece = min(left, READ_PIECE)
        if not self._out.has_room(piece + _PIECE_OVERHEAD):
            return 0
        self._longs.popleft()
        if self._retired:
            self._refuse(request, NBD_ESHUTDOWN)
            return piece
        done = piece == left
        read_now = self.route.read_now
        if self._replies.put_read(self._out, read_now, cookie, offset, offset + sent, piece, done):
            self.bytes_read += piece
            if not done:
                self._longs.appendleft((request, sent + piece))
        else:
            self._begin_slow_read(request, sent, piece)
        return piece

    def _begin_slow_read(self, request: Request, sent: int, piece: int) -> None:
        self._begin(request, self._read_slowly(request, sent, piece), piece)

    async def _read_slowly(self, request: Request, sent: int, piece: int) -> None:
        """Read what is not cached: `piece` bytes behind the `sent` ones. The rest becomes long.

        So that a request waits in a coroutine for disks only, never for the client: a drain does
        not depend on clients that do not read.
        """
        offset = request[3] + sent
        done = sent + piece == request[4]
        replies = self._replies
        head = replies.data_head
        buffer = bytearray(head + piece)
        view = memoryview(buffer)[head:]
        for start in range(0, piece, READ_PIECE):
            part = view[start : start + READ_PIECE]
            if piece == len(part) or not self.route.read_now(offset + start, part):
                await self.route.io.read(offset + start, part)
            elif start % _TURN_BYTES == 0:
                await let_others_run()
        self.bytes_read += piece
        if self._structured and is_hole(buffer, head, piece):
            self._emit(replies.hole(request, offset, piece, done=done))
        else:
            replies.put_data_head(buffer, 0, request, offset, piece, done=done)
            self._emit(buffer)
        if not done:
            self._longs.append((request, sent + piece))

    # --- everything else -----------------------------------------------------------------------

    def _begin_write(self, request: Request, data: memoryview) -> None:
        """Begin a WRITE whose payload is here.

        # FAST: one that is a single system call is begun and ended without a coroutine, by plain
        # calls that make as few objects as they can. With what `workers` and `writes` do for it, it
        # takes 900 steps of the interpreter and not 1,240, and a seventh less processor time at
        # depth 16; plain form in tests/reference/pump.py
        """
        flags, _, _, offset, length = request
        self.bytes_written += length
        route = self.route
        begin_write, write_replying = route.begin_write, route.write_replying
        if flags & NBD_CMD_FLAG_FUA or write_replying is None:
            fua = bool(flags & NBD_CMD_FLAG_FUA)
            self._begin(request, route.io.write(offset, data, fua=fua), length)
            return
        write = _Write(request, self._out, self._replies.success(request))
        reply = write if self._replies_early else None
        ended = partial(self._write_ended, write)
        if begin_write is not None and begin_write(offset, data, reply, ended):
            self.in_flight += 1
            self._bytes_in_flight += length
        else:
            self._begin(request, write_replying(offset, data, reply), length, reply)

    def _write_ended(self, write: _Write, error: BaseException | None) -> None:
        """Reply to a WRITE that has run, if nobody has."""
        length = write.request[4]
        is_usual = error is None and write.sent and self._reading and not self._longs
        if is_usual and self.in_flight > 1:  # nobody waits for its end
            self.in_flight -= 1
            self._bytes_in_flight -= length
        else:
            self._ended(write.request, length, write, None, error)

    def _nobody_waits(self) -> bool:
        """Tell whether requests in flight may take their time."""
        return not self._pauses and not self._gone

    def _begin_status(self, request: Request, contexts: list[Context]) -> None:
        flags, _, _, _, length = request
        length = min(length, self._replies.longest_status)
        one = bool(flags & NBD_CMD_FLAG_REQ_ONE)
        held = memory_needed(length, len(contexts), one=one)
        self._begin(request, block_status(self._replies, request, contexts, length), held)

    def _begin(
        self,
        request: Request,
        coroutine: Coroutine[object, None, bytes | None],
        held: int = 0,
        early: _Write | None = None,
    ) -> None:
        """Run a request that may wait; `held` bytes of memory are its own until it ends.

        `early`, if given, may have answered it by then.
        """
        self.in_flight += 1
        self._bytes_in_flight += held

        def ended(reply: bytes | None, error: BaseException | None) -> None:
            self._ended(request, held, early, reply, error)

        Step(coroutine, ended).resume()

    def _ended(
        self,
        request: Request,
        held: int,
        early: _Write | None,
        reply: bytes | None,
        error: BaseException | None,
    ) -> None:
        """Reply to a request that has run, if nobody has; arguments as of `_begin`."""
        self.in_flight -= 1
        self._bytes_in_flight -= held
        if early is not None and early.sent:
            if error is not None:
                _log.error("request %r failed behind its reply", request, exc_info=error)
                self.abort("internal error")
        elif error is not None:
            self._reply_failure(request, error)
        elif reply is not None:
            self._emit(reply)
        elif request[1] != NBD_CMD_READ:
            self._emit(self._replies.success(request))
        if not self._working:
            self._after_request()

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

    def _refuse(self, request: Request, number: int) -> None:
        """Reply with an error to a request that was not begun, or is not to go on."""
        if self.route.refused is not None:
            self.route.refused(request[1])
        text = "the export is being removed" if number == NBD_ESHUTDOWN else ""
        self._emit(self._replies.error(request, number, text))

    def _reply_failure(self, request: Request, error: BaseException) -> None:
        """The request border: whatever a request raised becomes an NBD error."""
        flags, command, _, _, _ = request
        if isinstance(error, IoError):
            number = to_nbd_error(error.wire_errno, command=command, flags=flags)
            self._emit(self._replies.error(request, number, error.public))
        else:
            _log.error("request %r failed", request, exc_info=error)
            self._emit(self._replies.error(request, NBD_EIO, "internal error"))

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
                self._loop.add_reader(self._stream.fileno(), self._on_readable)
            elif not self._gone:
                self._loop.remove_reader(self._stream.fileno())
        if wanted and self._tls is not None and not self._look_planned and self._tls.pending():
            self._look_planned = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Take what TLS has left, which no poll announces; others have had their turn."""
        self._look_planned = False
        if self._reading:
            self._on_readable()

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
        self._loop.remove_reader(self._stream.fileno())
        self._out.close()
        if self._reason is None:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_WR)
        self._stream.close()
        self._longs.clear()
        self._idle.stop()
        self._close_when_done()
