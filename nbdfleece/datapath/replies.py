"""What replies look like on one connection: simple, structured or extended.

One object per connection, chosen once. A request is the tuple that the pump parses.

Invariants
  R1  Whatever a function here returns is a whole reply or whole chunks of one.
  R2  An extended chunk repeats the offset of its request, whatever the chunk is about.

What the spec leaves open: with structured replies, what has neither data nor an error is answered
with a simple reply, which is shorter, as QEMU does.

Spec: NBD proto.md "Simple reply message", "Structured reply chunk message", "Extended reply chunk
message".
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, ClassVar, Final

from nbdfleece.base.limits import MAX_ERROR_TEXT, MAX_EXTENT_LENGTH, MAX_SIZE, READ_PIECE
from nbdfleece.base.units import KiB
from nbdfleece.datapath.outbox import SEND_AT
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_READ,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.datapath.outbox import Outbox

Request = tuple[int, int, int, int, int]
"""(flags, command, cookie, offset, length) of one request."""

# One whole header each, for pack_into: a chunk OFFSET_DATA up to its data.
DATA_CHUNK: Final = Struct(wire.CHUNK_HEADER.format + wire.CHUNK_OFFSET.format[1:])
EXTENDED_DATA_CHUNK: Final = Struct(
    wire.EXTENDED_CHUNK_HEADER.format + wire.CHUNK_OFFSET.format[1:]
)
_SIMPLE_SIZE: Final = wire.SIMPLE_REPLY.size
_DATA_SIZE: Final = DATA_CHUNK.size
_EXTENDED_DATA_SIZE: Final = EXTENDED_DATA_CHUNK.size

_MIN_HOLE: Final = 4 * KiB
_ZEROES: Final = bytes(READ_PIECE)


def is_hole(buffer: bytearray, start: int, length: int) -> bool:
    """Tell whether these bytes are better told than sent: not too few, not too many, all zero."""
    return (
        _MIN_HOLE <= length <= READ_PIECE
        and not buffer[start]
        and buffer[start : start + length] == _ZEROES[:length]
    )


class SimpleReplies:
    """Replies of a connection that has negotiated nothing.

    Attributes:
        data_head: Bytes in front of the data of a READ, or of a part of one.
        longest_status: Bytes that one BLOCK_STATUS can tell of.
    """

    data_head: ClassVar[int] = wire.SIMPLE_REPLY.size
    longest_status: ClassVar[int] = 0

    def success(self, request: Request) -> bytes:
        """Return the reply to a request that has no data to send."""
        return wire.SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, 0, request[2])

    def error(self, request: Request, number: int, text: str) -> bytes:
        """Return the last words to a request that failed, in whole or from here on.

        Args:
            request: The request.
            number: NBD error.
            text: For people; without names that are not the client's to know.
        """
        return wire.simple_reply(number, request[2])

    def empty_read(self, request: Request) -> bytes:
        """Return the reply to a READ of no bytes."""
        return wire.simple_reply(0, request[2])

    def put_read(
        self,
        out: Outbox,
        read_now: Callable[[int, memoryview], bool],
        cookie: int,
        _begin: int,
        offset: int,
        length: int,
        _done: bool,
    ) -> bool:
        """Put a READ, or a piece of one, into the outbox, which has room for it.

        # FAST: the replies are made in place and called with what the loop has at hand, once for
        # each kind of reply: 0.15 microseconds of a cached read, against asking each time which
        # kind it is; plain form in tests/reference/pump.py

        Args:
            out: The outbox.
            read_now: Of the route.
            cookie: Of the request.
            _begin: Its offset.
            offset: Bytes from the start of the export, where the piece begins.
            length: Bytes, up to READ_PIECE.
            _done: Nothing more will come for this request.

        Returns:
            False when the data is not at hand; then nothing has changed.
        """
        at = out.filled
        start = at + _SIMPLE_SIZE
        end = start + length
        if not read_now(offset, out.view[start:end]):
            return False
        wire.SIMPLE_REPLY.pack_into(out.buffer, at, NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
        out.filled = end
        if end >= SEND_AT:
            out.flush()
        return True

    def put_data_head(
        self,
        buffer: bytearray,
        at: int,
        request: Request,
        offset: int,
        length: int,
        *,
        done: bool,
    ) -> None:
        """Write what goes in front of `length` bytes of data from `offset` of the export.

        Args:
            buffer: Where to.
            at: Index of its first byte; the data comes `data_head` bytes behind it.
            request: The READ.
            offset: Bytes from the start of the export; within the request.
            length: Bytes (> 0).
            done: Nothing more will come for this request.
        """
        wire.SIMPLE_REPLY.pack_into(buffer, at, NBD_SIMPLE_REPLY_MAGIC, 0, request[2])

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Return a chunk that says: zeroes; arguments as of `put_data_head`."""
        raise AssertionError("simple replies have no holes")

    def status(
        self, request: Request, context: int, extents: list[tuple[int, int]], *, done: bool
    ) -> bytes:
        """Return the chunk with (length, flags) of the extents of one metadata context."""
        raise AssertionError("simple replies have no block status")


class StructuredReplies(SimpleReplies):
    """Replies after NBD_OPT_STRUCTURED_REPLY."""

    data_head = DATA_CHUNK.size
    longest_status = MAX_EXTENT_LENGTH  # lengths have 32 bits, and what is told stays aligned

    def error(self, request: Request, number: int, text: str) -> bytes:
        """Return a chunk NBD_REPLY_TYPE_ERROR."""
        payload = wire.error_payload(number, text.encode()[:MAX_ERROR_TEXT])
        return self._chunk(NBD_REPLY_TYPE_ERROR, payload, request, NBD_REPLY_FLAG_DONE)

    def empty_read(self, request: Request) -> bytes:
        """Return a chunk NBD_REPLY_TYPE_NONE: one with data has at least a byte of it."""
        return self._chunk(NBD_REPLY_TYPE_NONE, b"", request, NBD_REPLY_FLAG_DONE)

    def put_read(
        self,
        out: Outbox,
        read_now: Callable[[int, memoryview], bool],
        cookie: int,
        _begin: int,
        offset: int,
        length: int,
        done: bool,
    ) -> bool:
        """Put a chunk NBD_REPLY_TYPE_OFFSET_DATA, or OFFSET_HOLE, into the outbox."""
        buffer, at = out.buffer, out.filled
        start = at + _DATA_SIZE
        end = start + length
        if not read_now(offset, out.view[start:end]):
            return False
        if not buffer[start] and length >= _MIN_HOLE and buffer[start:end] == _ZEROES[:length]:
            out.put(wire.hole_chunk(cookie, flags=done, offset=offset, length=length))
            return True
        DATA_CHUNK.pack_into(
            buffer, at, NBD_STRUCTURED_REPLY_MAGIC, done, NBD_REPLY_TYPE_OFFSET_DATA,
            cookie, length + 8, offset,
        )  # fmt: skip
        out.filled = end
        if end >= SEND_AT:
            out.flush()
        return True

    def put_data_head(
        self,
        buffer: bytearray,
        at: int,
        request: Request,
        offset: int,
        length: int,
        *,
        done: bool,
    ) -> None:
        """Write a chunk NBD_REPLY_TYPE_OFFSET_DATA up to its data."""
        DATA_CHUNK.pack_into(
            buffer, at, NBD_STRUCTURED_REPLY_MAGIC, done, NBD_REPLY_TYPE_OFFSET_DATA,
            request[2], wire.CHUNK_OFFSET.size + length, offset,
        )  # fmt: skip

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Return a chunk NBD_REPLY_TYPE_OFFSET_HOLE."""
        payload = wire.hole_payload(offset, length)
        return self._chunk(NBD_REPLY_TYPE_OFFSET_HOLE, payload, request, done)

    def status(
        self, request: Request, context: int, extents: list[tuple[int, int]], *, done: bool
    ) -> bytes:
        """Return a chunk NBD_REPLY_TYPE_BLOCK_STATUS."""
        payload = wire.status_payload(context, extents)
        return self._chunk(NBD_REPLY_TYPE_BLOCK_STATUS, payload, request, done)

    def _chunk(self, kind: int, payload: bytes, request: Request, flags: int) -> bytes:
        return wire.chunk(kind, payload, flags=flags, cookie=request[2])


class ExtendedReplies(StructuredReplies):
    """Replies after NBD_OPT_EXTENDED_HEADERS: chunks only."""

    data_head = EXTENDED_DATA_CHUNK.size
    longest_status = MAX_SIZE

    def success(self, request: Request) -> bytes:
        """Return a chunk NBD_REPLY_TYPE_NONE."""
        return wire.EXTENDED_CHUNK_HEADER.pack(
            NBD_EXTENDED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE,
            request[2], request[3], 0,
        )  # fmt: skip

    def put_read(
        self,
        out: Outbox,
        read_now: Callable[[int, memoryview], bool],
        cookie: int,
        begin: int,
        offset: int,
        length: int,
        done: bool,
    ) -> bool:
        """Put a chunk NBD_REPLY_TYPE_OFFSET_DATA, or OFFSET_HOLE, into the outbox."""
        buffer, at = out.buffer, out.filled
        start = at + _EXTENDED_DATA_SIZE
        end = start + length
        if not read_now(offset, out.view[start:end]):
            return False
        if not buffer[start] and length >= _MIN_HOLE and buffer[start:end] == _ZEROES[:length]:
            out.put(self.hole((0, NBD_CMD_READ, cookie, begin, 0), offset, length, done=done))
            return True
        EXTENDED_DATA_CHUNK.pack_into(
            buffer, at, NBD_EXTENDED_REPLY_MAGIC, done, NBD_REPLY_TYPE_OFFSET_DATA,
            cookie, begin, length + 8, offset,
        )  # fmt: skip
        out.filled = end
        if end >= SEND_AT:
            out.flush()
        return True

    def put_data_head(
        self,
        buffer: bytearray,
        at: int,
        request: Request,
        offset: int,
        length: int,
        *,
        done: bool,
    ) -> None:
        """Write a chunk NBD_REPLY_TYPE_OFFSET_DATA up to its data."""
        EXTENDED_DATA_CHUNK.pack_into(
            buffer, at, NBD_EXTENDED_REPLY_MAGIC, done, NBD_REPLY_TYPE_OFFSET_DATA,
            request[2], request[3], wire.CHUNK_OFFSET.size + length, offset,
        )  # fmt: skip

    def status(
        self, request: Request, context: int, extents: list[tuple[int, int]], *, done: bool
    ) -> bytes:
        """Return a chunk NBD_REPLY_TYPE_BLOCK_STATUS_EXT."""
        payload = wire.status_ext_payload(context, extents)
        return self._chunk(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, payload, request, done)

    def _chunk(self, kind: int, payload: bytes, request: Request, flags: int) -> bytes:
        return wire.extended_chunk(
            kind, payload, flags=flags, cookie=request[2], request_offset=request[3]
        )


def replies_of(*, structured: bool, extended: bool) -> SimpleReplies:
    """Return how to reply on a connection with what it has negotiated."""
    if extended:
        return ExtendedReplies()
    return StructuredReplies() if structured else SimpleReplies()
