"""Client side of transmission: from received bytes to complete replies.

A client tells the parser of each request that it sends, and feeds it what comes back. Nothing a
server sends is believed: a chunk outside its request, twice, or of the wrong kind is a violation.

Spec: NBD proto.md "Simple reply message", "Structured reply message".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import MAX_STATUS_EXTENTS, MAX_STRUCTURED_READ
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_READ,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)
from nbdfleece.protocol.nbd.names import chunk_name, command_name
from nbdfleece.protocol.nbd.talk import Conversation

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.talk import Talk

_MAGIC_SIZE: Final = wire.U32.size
_MAX_CHUNK: Final = max(MAX_STRUCTURED_READ, MAX_STATUS_EXTENTS * wire.STATUS_DESCRIPTOR.size) + 8


@dataclass(slots=True)
class Reply:
    """The reply to one request, complete once the parser hands it out.

    Attributes:
        cookie: Of the request.
        command: Of the request.
        offset: Of the request.
        length: Of the request.
        error: NBD error; 0 for success.
        text: What the server says about the error.
        error_offset: Where it failed, if told.
        data: Bytes of a READ; whole only without error.
        chunks: (kind, offset, length) of the content chunks of a structured READ, as they came.
        status: Context id -> (length, flags) descriptors of a BLOCK_STATUS.
        is_structured: Came in chunks.
        covered: Bytes of all content chunks.
    """

    cookie: int
    command: int
    offset: int
    length: int
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: bytearray = field(default_factory=bytearray)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    is_structured: bool = False
    covered: int = 0


class ReplyParser:
    """Parses one connection's replies.

    Attributes:
        pending: Replies that are awaited, by cookie.
    """

    def __init__(self, *, structured: bool) -> None:
        self.pending: dict[int, Reply] = {}
        self._structured = structured
        self._complete: list[Reply] = []
        self._conversation = Conversation(self._receive())

    def expect(self, cookie: int, command: int, *, offset: int, length: int) -> None:
        """Await the reply to a request; its cookie must not be pending."""
        assert cookie not in self.pending, "the cookie is in use"
        reply = Reply(cookie, command, offset, length)
        if command == NBD_CMD_READ:
            reply.data = bytearray(length)
        self.pending[cookie] = reply

    def feed(self, data: bytes) -> list[Reply]:
        """Take received bytes; return the replies that are complete now.

        Raises:
            PeerViolation: The server broke the protocol; the parser is of no further use.
        """
        for _ in self._conversation.feed(data):
            raise AssertionError("the parser sends nothing")
        complete, self._complete = self._complete, []
        return complete

    def _receive(self) -> Talk[None]:
        """Receive replies for ever."""
        while True:
            magic_bytes = yield _MAGIC_SIZE
            (magic,) = wire.U32.unpack(magic_bytes)
            if magic == NBD_SIMPLE_REPLY_MAGIC:
                yield from self._receive_simple(magic_bytes)
            elif magic == NBD_STRUCTURED_REPLY_MAGIC and self._structured:
                yield from self._receive_chunk(magic_bytes)
            else:
                raise PeerViolation(f"bad reply magic {magic:#x}")

    def _receive_simple(self, magic: bytes) -> Talk[None]:
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
            if not error:
                reply.data = bytearray((yield reply.length))
        self._finish(reply)

    def _receive_chunk(self, magic: bytes) -> Talk[None]:
        header = magic + (yield wire.CHUNK_HEADER.size - _MAGIC_SIZE)
        _, flags, kind, cookie, length = wire.CHUNK_HEADER.unpack(header)
        reply = self._find(cookie)
        if length > _MAX_CHUNK:
            raise PeerViolation(f"{chunk_name(kind)} of {length} bytes")
        payload = yield length
        reply.is_structured = True
        is_done = bool(flags & NBD_REPLY_FLAG_DONE)
        if kind & NBD_REPLY_TYPE_FLAG_ERROR:
            _take_error(reply, kind, payload)
        elif kind == NBD_REPLY_TYPE_NONE and is_done and not payload:
            pass
        elif kind in (NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE):
            _take_content(reply, kind, payload)
        elif kind == NBD_REPLY_TYPE_BLOCK_STATUS:
            _take_status(reply, payload)
        else:
            raise PeerViolation(f"bad {chunk_name(kind)} chunk")
        if is_done:
            _check_complete(reply)
            self._finish(reply)

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


def _take_error(reply: Reply, kind: int, payload: bytes) -> None:
    """Take an error chunk: error:4 text length:2 text, and for ERROR_OFFSET offset:8."""
    header = wire.CHUNK_ERROR
    if len(payload) < header.size:
        raise PeerViolation(f"{chunk_name(kind)} of {len(payload)} bytes")
    error, text_length = header.unpack_from(payload)
    rest = payload[header.size :]
    if not error or text_length > len(rest):
        raise PeerViolation(f"{chunk_name(kind)} with error {error} and a bad text")
    reply.error = error
    reply.text = rest[:text_length].decode(errors="replace")
    if kind == NBD_REPLY_TYPE_ERROR_OFFSET:
        if len(rest) - text_length != wire.CHUNK_OFFSET.size:
            raise PeerViolation(f"{chunk_name(kind)} without an offset")
        (reply.error_offset,) = wire.CHUNK_OFFSET.unpack(rest[text_length:])


def _take_content(reply: Reply, kind: int, payload: bytes) -> None:
    """Take a part of a READ, data or a hole."""
    if kind == NBD_REPLY_TYPE_OFFSET_HOLE:
        if len(payload) != wire.CHUNK_HOLE.size:
            raise PeerViolation(f"{chunk_name(kind)} of {len(payload)} bytes")
        offset, length = wire.CHUNK_HOLE.unpack(payload)
        data = bytes(0)
    else:
        if len(payload) <= wire.CHUNK_OFFSET.size:
            raise PeerViolation(f"{chunk_name(kind)} without data")
        (offset,) = wire.CHUNK_OFFSET.unpack_from(payload)
        data = payload[wire.CHUNK_OFFSET.size :]
        length = len(data)
    begin = offset - reply.offset
    is_inside = begin >= 0 and begin + length <= reply.length
    if reply.command != NBD_CMD_READ or not length or not is_inside:
        raise PeerViolation(f"{chunk_name(kind)} of {length} bytes at {offset} was not asked for")
    reply.covered += length
    if reply.covered > reply.length:
        raise PeerViolation(f"{chunk_name(kind)} at {offset} repeats what had come before")
    if data:
        reply.data[begin : begin + length] = data
    reply.chunks.append((kind, offset, length))


def _take_status(reply: Reply, payload: bytes) -> None:
    """Take the descriptors of one metadata context."""
    size = wire.STATUS_DESCRIPTOR.size
    if len(payload) < wire.U32.size + size or (len(payload) - wire.U32.size) % size:
        raise PeerViolation(f"NBD_REPLY_TYPE_BLOCK_STATUS of {len(payload)} bytes")
    (context,) = wire.U32.unpack_from(payload)
    descriptors = list(wire.STATUS_DESCRIPTOR.iter_unpack(payload[wire.U32.size :]))
    if reply.command != NBD_CMD_BLOCK_STATUS or context in reply.status:
        raise PeerViolation(f"block status of context {context} was not asked for")
    if not all(length for length, _ in descriptors):
        raise PeerViolation(f"block status of context {context} has an empty extent")
    reply.status[context] = descriptors


def _check_complete(reply: Reply) -> None:
    """Check that a reply without error has all that was asked for."""
    if reply.error:
        return
    is_whole = True
    if reply.command == NBD_CMD_READ:
        end = reply.offset
        for _, offset, length in sorted(reply.chunks, key=itemgetter(1)):
            is_whole = is_whole and offset == end
            end += length
        is_whole = is_whole and reply.covered == reply.length
    elif reply.command == NBD_CMD_BLOCK_STATUS:
        is_whole = bool(reply.status)
    if not is_whole:
        raise PeerViolation(f"the reply to {command_name(reply.command)} is not whole")
