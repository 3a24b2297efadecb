"""Replies of transmission, good and bad."""

from __future__ import annotations

import pytest

from nbdfleece.base.errors import PeerViolation
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.client_replies import Reply, ReplyParser
from tests.support.nbd_machines import pieces

READ, WRITE, STATUS = c.NBD_CMD_READ, c.NBD_CMD_WRITE, c.NBD_CMD_BLOCK_STATUS
DONE = c.NBD_REPLY_FLAG_DONE
PIECES = pytest.mark.parametrize("piece", [0, 1, 2, 7])


def parse(
    data: bytes, *, command: int = READ, structured: bool = True, piece: int = 0
) -> list[Reply]:
    """Parse the replies to one request of 8 bytes at 0x100 with cookie 7."""
    parser = ReplyParser(structured=structured)
    parser.expect(7, command, offset=0x100, length=8)
    return [reply for part in pieces(data, piece) for reply in parser.feed(part)]


def data(offset: int, content: bytes, flags: int = 0) -> bytes:
    header = wire.data_chunk_header(7, flags=flags, offset=offset, length=len(content))
    return header + content


def hole(offset: int, length: int, flags: int = 0) -> bytes:
    return wire.hole_chunk(7, flags=flags, offset=offset, length=length)


def status(context: int, descriptors: list[tuple[int, int]], flags: int = 0) -> bytes:
    return wire.status_chunk(7, flags=flags, context=context, descriptors=descriptors)


NONE = wire.none_chunk(7, flags=DONE)


@PIECES
def test_simple_read(piece: int) -> None:
    (reply,) = parse(wire.simple_reply(0, 7) + b"abcdefgh", structured=False, piece=piece)

    assert reply.data == b"abcdefgh"
    assert not reply.is_structured


@PIECES
def test_simple_error_has_no_data(piece: int) -> None:
    (reply,) = parse(wire.simple_reply(c.NBD_EIO, 7), structured=False, piece=piece)

    assert reply.error == c.NBD_EIO


@PIECES
@pytest.mark.parametrize("structured", [True, False])
def test_simple_reply_to_a_write(piece: int, structured: bool) -> None:
    (reply,) = parse(wire.simple_reply(0, 7), command=WRITE, structured=structured, piece=piece)

    assert reply.error == 0


@PIECES
def test_structured_read_in_chunks_out_of_order(piece: int) -> None:
    (reply,) = parse(data(0x106, b"gh") + hole(0x103, 3) + data(0x100, b"abc") + NONE, piece=piece)

    assert reply.data == b"abc\0\0\0gh"
    assert reply.chunks == [(1, 0x106, 2), (2, 0x103, 3), (1, 0x100, 3)]


def test_done_may_stand_on_the_last_content() -> None:
    (reply,) = parse(hole(0x100, 8, DONE))

    assert reply.data == bytes(8)


def test_error_after_some_content() -> None:
    error = wire.error_offset_chunk(7, flags=0, error=c.NBD_EIO, text=b"bad", offset=0x104)

    (reply,) = parse(data(0x100, b"abcd") + error + NONE)

    assert (reply.error, reply.text, reply.error_offset) == (c.NBD_EIO, "bad", 0x104)


@PIECES
def test_block_status_of_two_contexts(piece: int) -> None:
    chunks = status(0, [(4, 3), (4, 0)]) + status(9, [(8, 1)], DONE)

    (reply,) = parse(chunks, command=STATUS, piece=piece)

    assert reply.status == {0: [(4, 3), (4, 0)], 9: [(8, 1)]}


def test_replies_are_found_by_cookie_in_any_order() -> None:
    parser = ReplyParser(structured=False)
    for cookie in (1, 2, 3):
        parser.expect(cookie, WRITE, offset=0, length=1)

    replies = parser.feed(b"".join(wire.simple_reply(0, cookie) for cookie in (3, 1, 2)))

    assert [reply.cookie for reply in replies] == [3, 1, 2]
    assert not parser.pending


def test_chunks_of_different_requests_may_interleave() -> None:
    parser = ReplyParser(structured=True)
    for cookie in (1, 2):
        parser.expect(cookie, READ, offset=0, length=2)
    part = {
        (cookie, offset): wire.data_chunk_header(cookie, flags=offset, offset=offset, length=1)
        + b"%d" % cookie
        for cookie in (1, 2)
        for offset in (0, 1)
    }

    replies = parser.feed(part[1, 0] + part[2, 0] + part[2, 1] + part[1, 1])

    assert [(reply.cookie, bytes(reply.data)) for reply in replies] == [(2, b"22"), (1, b"11")]


def chunk(kind: int, payload: bytes, *, flags: int = DONE, cookie: int = 7) -> bytes:
    return wire.chunk_header(kind, flags=flags, cookie=cookie, length=len(payload)) + payload


BAD_READ = {
    "noise": bytes(16),
    "unknown cookie": wire.none_chunk(8, flags=DONE),
    "simple reply": wire.simple_reply(0, 7) + bytes(8),
    "simple error": wire.simple_reply(c.NBD_EIO, 7),
    "before the request": data(0xFF, b"ab"),
    "behind the request": data(0x107, b"ab"),
    "far away (CVE-2019-14842)": data((1 << 64) - 1, b"ab"),
    "empty data": data(0x100, b""),
    "data without offset": chunk(1, bytes(7)),
    "empty hole": hole(0x100, 0),
    "short hole": chunk(2, bytes(11)),
    "long hole": chunk(2, bytes(13)),
    "twice": data(0x100, b"abcdefgh") + data(0x104, b"x"),
    "overlap": data(0x100, b"abcd") + data(0x102, b"abcd") + NONE,
    "gap": data(0x100, b"abcd") + NONE,
    "nothing": NONE,
    "block status": status(0, [(8, 0)]),
    "none without done": wire.none_chunk(7, flags=0),
    "none with payload": chunk(0, b"x"),
    "unknown content": chunk(77, b"x"),
    "error zero": wire.error_chunk(7, flags=DONE, error=0, text=b""),
    "short error": chunk(c.NBD_REPLY_TYPE_ERROR, bytes(5)),
    "error with long text": chunk(c.NBD_REPLY_TYPE_ERROR, wire.CHUNK_ERROR.pack(5, 3) + b"ab"),
    "error without offset": chunk(c.NBD_REPLY_TYPE_ERROR_OFFSET, wire.CHUNK_ERROR.pack(5, 0)),
    "huge chunk": wire.chunk_header(1, flags=0, cookie=7, length=0xFFFFFFFF),
    "extended reply": b"\x6e\x8a\x27\x8c" + bytes(28),
}


@pytest.mark.parametrize("answer", BAD_READ.values(), ids=BAD_READ.keys())
def test_bad_reply_to_a_structured_read_is_a_violation(answer: bytes) -> None:
    with pytest.raises(PeerViolation):
        parse(answer)


BAD_STATUS = {
    "none": NONE,
    "simple": wire.simple_reply(0, 7),
    "no descriptor": status(0, []),
    "empty extent": status(0, [(4, 0), (0, 0), (4, 0)]),
    "half a descriptor": chunk(5, bytes(8)),
    "context twice": status(0, [(8, 0)]) + status(0, [(8, 0)]),
    "data": data(0x100, b"abcdefgh"),
}


@pytest.mark.parametrize("answer", BAD_STATUS.values(), ids=BAD_STATUS.keys())
def test_bad_reply_to_block_status_is_a_violation(answer: bytes) -> None:
    with pytest.raises(PeerViolation):
        parse(answer, command=STATUS)


def test_structured_chunks_unasked_for_are_a_violation() -> None:
    with pytest.raises(PeerViolation):
        parse(data(0x100, b"abcdefgh", DONE), structured=False)


def test_simple_reply_after_chunks_is_a_violation() -> None:
    error = wire.error_chunk(7, flags=0, error=c.NBD_EIO, text=b"")

    with pytest.raises(PeerViolation):
        parse(error + wire.simple_reply(0, 7), command=WRITE)


def test_unknown_error_chunks_are_errors() -> None:
    (reply,) = parse(chunk(0x8077, wire.CHUNK_ERROR.pack(5, 0)))

    assert reply.error == c.NBD_EIO
