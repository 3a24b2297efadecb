"""What replies look like, byte by byte."""

from __future__ import annotations

from nbdfleece.datapath.replies import (
    ExtendedReplies,
    SimpleReplies,
    StructuredReplies,
    is_hole,
    replies_of,
)
from nbdfleece.protocol.nbd import constants as c

REQUEST = (0, c.NBD_CMD_READ, 0x1122334455667788, 0x1000, 0x3000)
COOKIE = bytes.fromhex("1122334455667788")
OFFSET = bytes.fromhex("0000000000001000")
SIMPLE = bytes.fromhex("67446698")
STRUCTURED = bytes.fromhex("668e33ef")
EXTENDED = bytes.fromhex("6e8a278c")


def head(replies: SimpleReplies, *, done: bool) -> bytes:
    """What goes in front of 0x200 bytes from 0x2000 on."""
    buffer = bytearray(b"?" * (replies.data_head + 6))
    replies.put_data_head(buffer, 3, REQUEST, 0x2000, 0x200, done=done)
    assert buffer[:3] + buffer[-3:] == b"??????"
    return bytes(buffer[3:-3])


def test_which_replies_a_connection_has() -> None:
    assert type(replies_of(structured=False, extended=False)) is SimpleReplies
    assert type(replies_of(structured=True, extended=False)) is StructuredReplies
    for structured in (False, True):
        assert type(replies_of(structured=structured, extended=True)) is ExtendedReplies


def test_simple_replies() -> None:
    replies = SimpleReplies()
    assert replies.success(REQUEST) == SIMPLE + bytes(4) + COOKIE
    assert replies.empty_read(REQUEST) == SIMPLE + bytes(4) + COOKIE
    assert replies.error(REQUEST, 22, "why") == SIMPLE + bytes((0, 0, 0, 22)) + COOKIE
    assert head(replies, done=True) == SIMPLE + bytes(4) + COOKIE


def test_structured_replies() -> None:
    replies = StructuredReplies()

    def chunk(flags: int, kind: int, payload: bytes) -> bytes:
        return STRUCTURED + bytes((0, flags)) + kind.to_bytes(2) + COOKIE + payload

    assert replies.success(REQUEST) == SIMPLE + bytes(4) + COOKIE
    assert replies.empty_read(REQUEST) == chunk(1, 0, bytes(4))
    error = bytes.fromhex("00000009 00000016 0003") + b"why"
    assert replies.error(REQUEST, 22, "why") == chunk(1, 0x8001, error)
    data = bytes.fromhex("00000208 0000000000002000")
    assert head(replies, done=True) == chunk(1, 1, data)
    assert head(replies, done=False) == chunk(0, 1, data)
    hole = bytes.fromhex("0000000c 0000000000002000 00000200")
    assert replies.hole(REQUEST, 0x2000, 0x200, done=False) == chunk(0, 2, hole)
    status = bytes.fromhex("00000014 00000007 00001000 00000000 00002000 00000003")
    extents = [(0x1000, 0), (0x2000, 3)]
    assert replies.status(REQUEST, 7, extents, done=True) == chunk(1, 5, status)


def test_extended_replies_are_chunks_with_the_offset_of_the_request() -> None:
    replies = ExtendedReplies()

    def chunk(flags: int, kind: int, payload: bytes) -> bytes:
        length = len(payload).to_bytes(8)
        begin = EXTENDED + bytes((0, flags)) + kind.to_bytes(2) + COOKIE + OFFSET
        return begin + length + payload

    assert replies.success(REQUEST) == chunk(1, 0, b"")
    assert replies.empty_read(REQUEST) == chunk(1, 0, b"")
    error = bytes.fromhex("00000016 0003") + b"why"
    assert replies.error(REQUEST, 22, "why") == chunk(1, 0x8001, error)
    begin = EXTENDED + bytes((0, 0, 0, 1)) + COOKIE + OFFSET
    assert head(replies, done=False) == begin + bytes.fromhex("0000000000000208 0000000000002000")
    hole = bytes.fromhex("0000000000002000 00000200")
    assert replies.hole(REQUEST, 0x2000, 0x200, done=True) == chunk(1, 2, hole)
    status = bytes.fromhex("00000007 00000001 0000010000000000 0000000000000003")
    assert replies.status(REQUEST, 7, [(1 << 40, 3)], done=False) == chunk(0, 6, status)


def test_an_error_text_is_short_enough_for_qemu() -> None:
    for replies in (StructuredReplies(), ExtendedReplies()):
        assert len(replies.error(REQUEST, 5, "x" * 5000)) < 1000


def test_what_a_hole_is() -> None:
    buffer = bytearray(b"x" + bytes(1 << 20))
    assert is_hole(buffer, 1, 4096)
    assert not is_hole(buffer, 0, 4096)
    assert not is_hole(buffer, 1, 4095)  # not worth a chunk of its own
    buffer[4000] = 1
    assert not is_hole(buffer, 1, 4096)
