"""Client side of transmission: from received bytes to complete replies.

A client tells the parser of each request that it sends, and feeds it what comes back. Nothing a
server sends is believed.

Invariants
  R1  A chunk is looked at before its content is taken: content goes into a request's own bytes
      only, and into each of them once. So a server can neither write elsewhere (CVE-2019-14842) nor
      change what it has said before.
  R2  How much a reply may bring follows from its request; texts, extents and the pieces of a READ
      have bounds of their own. A reply without progress has an end.
  R3  After a violation the parser is of no further use, and no view is written to any more.

Data of a READ goes straight into the view of whoever asked: `wanted` tells where the next received
bytes belong, when that is known.

Spec: NBD proto.md "Simple reply message", "Structured reply chunk message", "Extended reply chunk
message", "Structured reply types".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import (
    MAX_ERROR_CHUNKS,
    MAX_META_QUERIES,
    MAX_READ_PIECES,
    MAX_SIZE,
    MAX_STATUS_EXTENTS,
    MAX_STATUS_PAYLOAD,
    MAX_STRING,
)
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_READ,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)
from nbdfleece.protocol.nbd.names import chunk_name, command_name

_MAGIC_SIZE: Final = wire.U32.size
_MAX_ERROR: Final = wire.CHUNK_ERROR.size + MAX_STRING + wire.CHUNK_OFFSET.size

_Parse: TypeAlias = Generator["int | memoryview", bytes, None]
"""Yields a number (give me so many bytes) or a view (fill it; what is sent in is empty)."""


@dataclass(slots=True)
class Reply:
    """The reply to one request, complete once the parser hands it out.

    Attributes:
        cookie: Of the request.
        command: Of the request.
        offset: Of the request.
        length: Of the request.
        error: NBD error; 0 for success.
        text: What the server says about the error, cut to MAX_STRING bytes.
        error_offset: Where it failed, if told.
        data: Bytes of a READ, in the view of whoever asked; whole only without error.
        chunks: (kind, offset, length) of the content chunks of a structured READ, as they came; the
            first MAX_READ_PIECES of them.
        status: Context id -> (length, flags) descriptors of a BLOCK_STATUS, the first
            MAX_STATUS_EXTENTS of each.
        is_structured: Came in chunks.
        begins: Where the pieces of content begin that have come, neighbours joined; sorted.
        ends: Where each of them ends.
        errors: Error chunks that have come.
    """

    cookie: int
    command: int
    offset: int
    length: int
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: bytearray | memoryview = field(default_factory=bytearray)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    is_structured: bool = False
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    errors: int = 0

    def take_range(self, begin: int, end: int) -> None:
        """Note that content for these bytes of the request has come (R1).

        Raises:
            PeerViolation: Some of it had come before, or it comes in too many pieces.
        """
        begins, ends = self.begins, self.ends
        at = bisect_right(begins, begin)
        if (at and ends[at - 1] > begin) or (at < len(begins) and begins[at] < end):
            raise PeerViolation(f"content at {self.offset + begin} repeats what had come before")
        follows, precedes = at > 0 and ends[at - 1] == begin, at < len(begins) and begins[at] == end
        if follows and precedes:
            ends[at - 1] = ends.pop(at)
            del begins[at]
        elif follows:
            ends[at - 1] = end
        elif precedes:
            begins[at] = begin
        elif len(begins) >= MAX_READ_PIECES:
            raise PeerViolation(f"NBD_CMD_READ answered in more than {MAX_READ_PIECES} pieces")
        else:
            begins.insert(at, begin)
            ends.insert(at, end)

    def is_whole(self) -> bool:
        """Tell whether every byte of a READ has come."""
        return self.begins == [0] and self.ends == [self.length] if self.length else True


class ReplyParser:
    """Parses one connection's replies.

    Args:
        structured: Structured replies were negotiated.
        extended: Extended headers were; `structured` does not matter then.
        contexts: Ids of the selected metadata contexts, all of which a successful BLOCK_STATUS
            tells of; None: any.

    Attributes:
        pending: Replies that are awaited, by cookie.
    """

    def __init__(
        self,
        *,
        structured: bool,
        extended: bool = False,
        contexts: Collection[int] | None = None,
    ) -> None:
        self.pending: dict[int, Reply] = {}
        self._structured = structured or extended
        self._extended = extended
        self._contexts = contexts
        self._complete: list[Reply] = []
        self._gathered = bytearray()  # for a wish of so many bytes
        self._parse = self._receive()
        self._wish: int | memoryview = next(self._parse)

    def expect(
        self, cookie: int, command: int, *, offset: int, length: int, view: memoryview | None = None
    ) -> None:
        """Await the reply to a request.

        Args:
            cookie: Not pending now.
            command: NBD_CMD_*.
            offset: Bytes.
            length: Bytes.
            view: Where the `length` bytes of a READ go; None: the reply gets its own memory. It is
                written to until the reply is handed out or the parser is given up.
        """
        assert cookie not in self.pending, "the cookie is in use"
        reply = Reply(cookie, command, offset, length)
        if command == NBD_CMD_READ:
            assert view is None or len(view) == length, "the view does not fit the request"
            reply.data = bytearray(length) if view is None else view
        self.pending[cookie] = reply

    @property
    def wanted(self) -> memoryview | None:
        """Where the next received bytes belong, or None: they go to `feed`.

        Who has put some there says so with `filled`.
        """
        return self._wish if isinstance(self._wish, memoryview) else None

    def filled(self, count: int) -> list[Reply]:
        """Note that the first `count` bytes of `wanted` are there; as `feed`."""
        assert isinstance(self._wish, memoryview), "nothing was wanted"
        if count < len(self._wish):
            self._wish = self._wish[count:]
        else:
            self._wish = self._parse.send(b"")
        return self._handed_out()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Reply]:
        """Take received bytes; return the replies that are complete now.

        Raises:
            PeerViolation: The server broke the protocol; the parser is of no further use (R3).
        """
        left = memoryview(data)
        while left:
            wish = self._wish
            if isinstance(wish, memoryview):
                count = min(len(wish), len(left))
                wish[:count] = left[:count]
                self._wish = wish[count:] if count < len(wish) else self._parse.send(b"")
            else:
                count = min(wish - len(self._gathered), len(left))
                self._gathered += left[:count]
                if len(self._gathered) == wish:
                    gathered = bytes(self._gathered)
                    self._gathered.clear()
                    self._wish = self._parse.send(gathered)
            left = left[count:]
        return self._handed_out()

    def _handed_out(self) -> list[Reply]:
        complete, self._complete = self._complete, []
        return complete

    # --- parsing -------------------------------------------------------------------------------

    def _receive(self) -> _Parse:
        """Receive replies for ever. No wish is ever empty."""
        while True:
            magic_bytes = yield _MAGIC_SIZE
            (magic,) = wire.U32.unpack(magic_bytes)
            if magic == NBD_SIMPLE_REPLY_MAGIC and not self._extended:
                yield from self._receive_simple(magic_bytes)
            elif magic == NBD_STRUCTURED_REPLY_MAGIC and self._structured and not self._extended:
                header = magic_bytes + (yield wire.CHUNK_HEADER.size - _MAGIC_SIZE)
                _, flags, kind, cookie, length = wire.CHUNK_HEADER.unpack(header)
                yield from self._receive_chunk(self._find(cookie), flags, kind, length)
            elif magic == NBD_EXTENDED_REPLY_MAGIC and self._extended:
                header = magic_bytes + (yield wire.EXTENDED_CHUNK_HEADER.size - _MAGIC_SIZE)
                _, flags, kind, cookie, offset, length = wire.EXTENDED_CHUNK_HEADER.unpack(header)
                reply = self._find(cookie)
                if offset != reply.offset:
                    raise PeerViolation(f"reply for {offset} to a request for {reply.offset}")
                yield from self._receive_chunk(reply, flags, kind, length)
            else:
                raise PeerViolation(f"bad reply magic {magic:#x}")

    def _receive_simple(self, magic: bytes) -> _Parse:
        header = magic + (yield wire.SIMPLE_REPLY.size - _MAGIC_SIZE)
        _, error, cookie = wire.SIMPLE_REPLY.unpack(header)
        reply = self._find(cookie)
        if reply.is_structured:
            raise PeerViolation("a simple reply after structured chunks")
        if reply.command == NBD_CMD_BLOCK_STATUS and not error:
            raise PeerViolation("a simple reply to a successful NBD_CMD_BLOCK_STATUS")
        reply.error = error
        if reply.command == NBD_CMD_READ:
            if self._structured:
                raise PeerViolation("a simple reply to NBD_CMD_READ with structured replies on")
            if not error and reply.length:
                yield memoryview(reply.data)
        self._finish(reply)

    def _receive_chunk(self, reply: Reply, flags: int, kind: int, length: int) -> _Parse:
        """Take the payload of a chunk, and the reply when it is the last."""
        reply.is_structured = True
        is_done = bool(flags & NBD_REPLY_FLAG_DONE)
        if kind == NBD_REPLY_TYPE_OFFSET_DATA:
            yield from _receive_data(reply, length)
        elif kind == NBD_REPLY_TYPE_NONE and is_done and not length:
            pass
        else:
            if not 0 < length <= self._longest(kind):
                raise PeerViolation(f"{chunk_name(kind)} of {length} bytes")
            self._take(reply, kind, (yield length))
        if is_done:
            self._check_complete(reply)
            self._finish(reply)

    def _longest(self, kind: int) -> int:
        """Return how long the payload of a chunk may be, 0 where it may not be at all."""
        if kind & NBD_REPLY_TYPE_FLAG_ERROR:
            return _MAX_ERROR
        if kind == NBD_REPLY_TYPE_OFFSET_HOLE:
            return wire.CHUNK_HOLE.size
        wide = NBD_REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else NBD_REPLY_TYPE_BLOCK_STATUS
        return MAX_STATUS_PAYLOAD if kind == wide else 0

    def _take(self, reply: Reply, kind: int, payload: bytes) -> None:
        """Take the payload of a chunk other than OFFSET_DATA and NONE."""
        if kind & NBD_REPLY_TYPE_FLAG_ERROR:
            _take_error(reply, kind, payload)
        elif kind == NBD_REPLY_TYPE_OFFSET_HOLE:
            _take_hole(reply, payload)
        else:
            context, descriptors = _read_status(kind, payload)
            is_asked = self._contexts is None or context in self._contexts
            if reply.command != NBD_CMD_BLOCK_STATUS or not is_asked or context in reply.status:
                raise PeerViolation(f"block status of context {context} was not asked for")
            if len(reply.status) >= MAX_META_QUERIES:
                raise PeerViolation(f"block status of more than {MAX_META_QUERIES} contexts")
            _check_status(reply, descriptors)
            reply.status[context] = descriptors

    def _check_complete(self, reply: Reply) -> None:
        """Check that a reply without error has all that was asked for."""
        if reply.error:
            return
        is_whole = True
        if reply.command == NBD_CMD_READ:
            is_whole = reply.is_whole()
        elif reply.command == NBD_CMD_BLOCK_STATUS:
            is_whole = bool(reply.status) and len(reply.status) >= len(self._contexts or ())
        if not is_whole:
            raise PeerViolation(f"the reply to {command_name(reply.command)} is not whole")

    def _find(self, cookie: int) -> Reply:
        """Return the awaited reply with this cookie."""
        reply = self.pending.get(cookie)
        if reply is None:
            raise PeerViolation(f"reply to an unknown cookie {cookie:#x}")
        return reply

    def _finish(self, reply: Reply) -> None:
        """Hand the reply out at the end of this `feed`."""
        del self.pending[reply.cookie]
        self._complete.append(reply)


def _receive_data(reply: Reply, length: int) -> _Parse:
    """Take an OFFSET_DATA chunk: offset:8, then at least one byte of data."""
    if not 0 < length - wire.CHUNK_OFFSET.size <= reply.length:
        raise PeerViolation(f"NBD_REPLY_TYPE_OFFSET_DATA of {length} bytes")
    (offset,) = wire.CHUNK_OFFSET.unpack((yield wire.CHUNK_OFFSET.size))
    yield _claim(reply, NBD_REPLY_TYPE_OFFSET_DATA, offset, length - wire.CHUNK_OFFSET.size)


def _take_hole(reply: Reply, payload: bytes) -> None:
    """Take an OFFSET_HOLE chunk: offset:8 length:4 of zeroes."""
    if len(payload) != wire.CHUNK_HOLE.size:
        raise PeerViolation(f"NBD_REPLY_TYPE_OFFSET_HOLE of {len(payload)} bytes")
    offset, length = wire.CHUNK_HOLE.unpack(payload)
    view = _claim(reply, NBD_REPLY_TYPE_OFFSET_HOLE, offset, length)
    view[:] = bytes(length)


def _claim(reply: Reply, kind: int, offset: int, length: int) -> memoryview:
    """Return the bytes of a READ that a content chunk fills (R1)."""
    begin = offset - reply.offset
    is_inside = begin >= 0 and begin + length <= reply.length
    if reply.command != NBD_CMD_READ or not length or not is_inside:
        raise PeerViolation(f"{chunk_name(kind)} of {length} bytes at {offset} was not asked for")
    reply.take_range(begin, begin + length)
    if len(reply.chunks) < MAX_READ_PIECES:
        reply.chunks.append((kind, offset, length))
    return memoryview(reply.data)[begin : begin + length]


def _take_error(reply: Reply, kind: int, payload: bytes) -> None:
    """Take an error chunk: error:4 text length:2 text, and for ERROR_OFFSET offset:8.

    ERROR_OFFSET may come several times; what counts is the first error.
    """
    header = wire.CHUNK_ERROR
    if len(payload) < header.size:
        raise PeerViolation(f"{chunk_name(kind)} of {len(payload)} bytes")
    error, text_length = header.unpack_from(payload)
    rest = payload[header.size :]
    if not error or text_length > min(len(rest), MAX_STRING):
        raise PeerViolation(f"{chunk_name(kind)} with error {error} and a bad text")
    where: int | None = None
    if kind == NBD_REPLY_TYPE_ERROR_OFFSET:
        if len(rest) - text_length != wire.CHUNK_OFFSET.size:
            raise PeerViolation(f"{chunk_name(kind)} without an offset")
        (where,) = wire.CHUNK_OFFSET.unpack(rest[text_length:])
        if not 0 <= where - reply.offset <= reply.length:
            raise PeerViolation(f"{chunk_name(kind)} at {where} is outside the request")
    reply.errors += 1
    if reply.errors > MAX_ERROR_CHUNKS:
        raise PeerViolation(f"more than {MAX_ERROR_CHUNKS} errors for one request")
    if not reply.error:
        reply.error, reply.error_offset = error, where
        reply.text = rest[:text_length].decode(errors="replace")


def _read_status(kind: int, payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Return context id and descriptors of a status chunk, at most MAX_STATUS_EXTENTS of them."""
    if kind == NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
        header, descriptor = wire.STATUS_EXT_HEADER, wire.STATUS_EXT_DESCRIPTOR
    else:
        header, descriptor = wire.U32, wire.STATUS_DESCRIPTOR
    count, odd = divmod(len(payload) - header.size, descriptor.size)
    if count < 1 or odd:
        raise PeerViolation(f"{chunk_name(kind)} of {len(payload)} bytes")
    context, *told = header.unpack_from(payload)
    if told not in ([], [count]):
        raise PeerViolation(f"{chunk_name(kind)} of {count} extents says that it has {told[0]}")
    end = header.size + min(count, MAX_STATUS_EXTENTS) * descriptor.size
    return context, list(descriptor.iter_unpack(memoryview(payload)[header.size : end]))


def _check_status(reply: Reply, descriptors: list[tuple[int, int]]) -> None:
    """Check that each extent makes progress and that only the last leaves the request."""
    covered = 0
    for length, _ in descriptors:
        if not 0 < length <= MAX_SIZE or covered >= reply.length:
            raise PeerViolation(f"block status with an extent of {length} bytes behind {covered}")
        covered += length
