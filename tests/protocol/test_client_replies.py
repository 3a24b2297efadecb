"""Replies of transmission, good and bad."""

from __future__ import annotations

import itertools
import random

import pytest

from nbdfleece.base.errors import PeerViolation
from nbdfleece.protocol.nbd import client_replies, wire
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client_replies import Reply, ReplyParser
from tests.protocol.test_client import mutated
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


# --- straight into the memory of whoever asked -------------------------------------------------


@PIECES
def test_content_goes_into_the_view_and_nowhere_else(piece: int) -> None:
    memory = bytearray(b"\xa5" * 24)
    parser = ReplyParser(structured=True)
    parser.expect(7, READ, offset=0x100, length=8, view=memoryview(memory)[8:16])
    stream = data(0x104, b"efgh") + hole(0x100, 4, DONE)

    replies = [reply for part in pieces(stream, piece) for reply in parser.feed(part)]

    assert len(replies) == 1
    assert memory == b"\xa5" * 8 + b"\0\0\0\0efgh" + b"\xa5" * 8


def test_wanted_takes_content_without_a_copy() -> None:
    memory = bytearray(8)
    parser = ReplyParser(structured=False)
    parser.expect(7, READ, offset=0, length=8, view=memoryview(memory))
    assert parser.wanted is None
    assert parser.feed(wire.simple_reply(0, 7) + b"ab") == []

    assert parser.wanted is not None
    parser.wanted[:3] = b"cde"
    assert parser.filled(3) == []
    assert parser.wanted is not None
    assert len(parser.wanted) == 3
    parser.wanted[:] = b"fgh"
    (reply,) = parser.filled(3)

    assert reply.error == 0
    assert memory == b"abcdefgh"
    assert parser.wanted is None


# --- extended headers ----------------------------------------------------------------------------

STATUS_EXT = c.NBD_REPLY_TYPE_BLOCK_STATUS_EXT


def wide(kind: int, payload: bytes, flags: int = 0, offset: int = 0x100, cookie: int = 7) -> bytes:
    return wire.extended_chunk(kind, payload, flags=flags, cookie=cookie, request_offset=offset)


def parse_wide(stream: bytes, command: int = READ, length: int = 8, piece: int = 0) -> list[Reply]:
    parser = ReplyParser(structured=False, extended=True, contexts=[0, 9])
    parser.expect(7, command, offset=0x100, length=length)
    return [reply for part in pieces(stream, piece) for reply in parser.feed(part)]


@PIECES
def test_extended_read(piece: int) -> None:
    stream = wide(1, wire.CHUNK_OFFSET.pack(0x103) + b"defgh") + wide(
        2, wire.hole_payload(0x100, 3), DONE
    )

    (reply,) = parse_wide(stream, piece=piece)

    assert reply.data == b"\0\0\0defgh"


@PIECES
def test_extended_status_beyond_32_bits(piece: int) -> None:
    big = 1 << 40
    stream = wide(STATUS_EXT, wire.status_ext_payload(9, [(big, 1 << 33), (8, 0)])) + wide(
        STATUS_EXT, wire.status_ext_payload(0, [(2 * big, 3)]), DONE
    )

    (reply,) = parse_wide(stream, STATUS, 2 * big, piece)

    assert reply.status == {9: [(big, 1 << 33), (8, 0)], 0: [(2 * big, 3)]}


def test_extended_error_to_a_write() -> None:
    (reply,) = parse_wide(
        wide(c.NBD_REPLY_TYPE_ERROR, wire.error_payload(28, b"full"), DONE), WRITE
    )

    assert (reply.error, reply.text) == (28, "full")


def ext_status(*descriptors: tuple[int, int], context: int = 0) -> bytes:
    return wide(STATUS_EXT, wire.status_ext_payload(context, descriptors), DONE)


BAD_WIDE = {
    "simple": (WRITE, wire.simple_reply(0, 7)),
    "structured": (WRITE, NONE),
    "other offset": (WRITE, wide(0, b"", DONE, offset=0x101)),
    "unknown cookie": (WRITE, wide(0, b"", DONE, cookie=8)),
    "huge": (
        READ,
        wire.extended_chunk_header(1, flags=0, cookie=7, request_offset=256, length=1 << 63),
    ),
    "status of 32 bits": (STATUS, wide(5, wire.status_payload(0, [(8, 0)]), DONE)),
    "status of one context": (STATUS, ext_status((8, 0))),
    "status of a strange context": (STATUS, ext_status((8, 0), context=5)),
    "extent of 2^63": (STATUS, ext_status((1 << 63, 0))),
    "empty extent": (STATUS, ext_status((0, 0))),
    "wrong count": (
        STATUS,
        wide(STATUS_EXT, wire.STATUS_EXT_HEADER.pack(0, 2) + bytes(15) + b"\1", DONE),
    ),
    "no count": (STATUS, wide(STATUS_EXT, bytes(8), DONE)),
}


@pytest.mark.parametrize(("command", "stream"), BAD_WIDE.values(), ids=BAD_WIDE.keys())
def test_bad_extended_reply_is_a_violation(command: int, stream: bytes) -> None:
    with pytest.raises(PeerViolation):
        parse_wide(stream, command)


def test_extended_reply_unasked_for_is_a_violation() -> None:
    with pytest.raises(PeerViolation):
        parse(wide(0, b"", DONE), command=WRITE)


# --- what a server could wear us out with --------------------------------------------------------


def test_read_in_very_many_pieces_that_lie_apart_is_a_violation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_replies, "MAX_READ_PIECES", 3)
    parse(b"".join(data(0x100 + at, b"x") for at in range(8)) + NONE)  # in order: one piece

    with pytest.raises(PeerViolation, match="more than 3 pieces"):
        parse(b"".join(data(0x100 + at, b"x") for at in (0, 2, 4, 6)))


def test_pieces_in_any_order_make_a_whole(rng: random.Random) -> None:
    for _ in range(200):
        size = rng.randrange(1, 40)
        borders = sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(8)))})
        parts = list(itertools.pairwise(borders))
        rng.shuffle(parts)
        content = rng.randbytes(size)
        parser = ReplyParser(structured=True)
        parser.expect(7, READ, offset=1000, length=size)
        stream = b"".join(data(1000 + first, content[first:last]) for first, last in parts)
        assert parser.feed(stream) == []
        assert len(parser.pending[7].begins) == 1

        (reply,) = parser.feed(NONE)
        assert reply.data == content


def test_endless_errors_are_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_replies, "MAX_ERROR_CHUNKS", 3)
    error = wire.error_offset_chunk(7, flags=0, error=5, text=b"", offset=0x100)
    (reply,) = parse(error * 3 + NONE)
    assert reply.error == c.NBD_EIO

    with pytest.raises(PeerViolation, match="more than 3 errors"):
        parse(error * 4)


def test_first_of_several_errors_counts() -> None:
    first = wire.error_offset_chunk(7, flags=0, error=c.NBD_ENOSPC, text=b"one", offset=0x102)
    second = wire.error_chunk(7, flags=DONE, error=c.NBD_EIO, text=b"two")

    (reply,) = parse(first + second, command=WRITE)

    assert (reply.error, reply.text, reply.error_offset) == (c.NBD_ENOSPC, "one", 0x102)


def test_more_extents_than_we_keep_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_replies, "MAX_STATUS_EXTENTS", 2)

    (reply,) = parse(status(0, [(1, 0), (1, 1), (1, 0)], DONE), command=STATUS)

    assert reply.status == {0: [(1, 0), (1, 1)]}


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
    "error elsewhere": wire.error_offset_chunk(7, flags=0, error=5, text=b"", offset=0x109),
    "error with a text of 4097 bytes": wire.error_chunk(7, flags=0, error=5, text=b"x" * 4097),
    "data before it is looked at": wire.data_chunk_header(7, flags=0, offset=0x1000, length=8),
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
    "extent behind the request": status(0, [(8, 0), (1, 1)]),
    "64-bit extents": wire.chunk(6, wire.status_ext_payload(0, [(8, 0)]), flags=0, cookie=7),
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


# --- mutations -----------------------------------------------------------------------------------


def mixed_stream(
    *, extended: bool, filler: bytes = b"\xa5"
) -> tuple[ReplyParser, dict[int, memoryview], bytes]:
    """A parser that awaits five replies, the views of its READs, and good answers."""
    parser = ReplyParser(structured=True, extended=extended, contexts=[0])
    views = {cookie: memoryview(bytearray(filler * 48)) for cookie in (1, 2)}
    for cookie in views:
        view = views[cookie][16:32]
        parser.expect(cookie, READ, offset=0x100, length=16, view=view)
    parser.expect(3, WRITE, offset=0x100, length=5)
    parser.expect(4, STATUS, offset=0x100, length=64)
    parser.expect(5, c.NBD_CMD_FLUSH, offset=0x100, length=0)

    def one(kind: int, payload: bytes, cookie: int, flags: int = 0) -> bytes:
        if extended:
            return wire.extended_chunk(
                kind, payload, flags=flags, cookie=cookie, request_offset=0x100
            )
        return wire.chunk(kind, payload, flags=flags, cookie=cookie)

    kind = STATUS_EXT if extended else c.NBD_REPLY_TYPE_BLOCK_STATUS
    make = wire.status_ext_payload if extended else wire.status_payload
    parts = [
        one(1, wire.CHUNK_OFFSET.pack(0x100) + b"0123456789", 1),
        one(1, wire.CHUNK_OFFSET.pack(0x108) + b"89abcdef", 2),
        one(0x8001, wire.error_payload(5, b"no"), 3, DONE),
        one(2, wire.hole_payload(0x10A, 6), 1, DONE),
        one(kind, make(0, [(32, 3), (32, 0)]), 4, DONE),
        one(2, wire.hole_payload(0x100, 8), 2),
        one(0, b"", 2, DONE),
        one(0, b"", 5, DONE),
    ]
    return parser, views, b"".join(parts)


@PIECES
@pytest.mark.parametrize("extended", [False, True])
def test_replies_of_many_kinds_in_pieces(piece: int, extended: bool) -> None:
    parser, views, stream = mixed_stream(extended=extended)

    replies = [reply for part in pieces(stream, piece) for reply in parser.feed(part)]

    assert [reply.cookie for reply in replies] == [3, 1, 4, 2, 5]
    assert bytes(views[1][16:32]) == b"0123456789" + bytes(6)
    assert bytes(views[2][16:32]) == bytes(8) + b"89abcdef"


@pytest.mark.parametrize("extended", [False, True])
def test_mutated_replies_end_in_a_violation_or_wait_and_write_nowhere_else(
    rng: random.Random, extended: bool, *, long_run: bool
) -> None:
    """Parsed over two kinds of rubbish: what is called whole must not depend on it."""
    for _ in range(50_000 if long_run else 2000):
        stream = mutated(mixed_stream(extended=extended)[2], rng)
        piece = rng.choice([0, 1, 2, 7])
        outcomes = []
        for filler in (b"\xa5", b"\x5a"):
            parser, views, _ = mixed_stream(extended=extended, filler=filler)
            replies: list[Reply] = []
            try:
                for part in pieces(stream, piece):
                    replies += parser.feed(part)
            except PeerViolation:
                pass
            for view in views.values():
                assert bytes(view[:16]) == bytes(view[32:]) == filler * 16
            assert all(len(reply.text.encode()) < 5000 for reply in replies)
            outcomes.append(
                [(reply.cookie, reply.error, reply.error or bytes(reply.data)) for reply in replies]
            )
        assert outcomes[0] == outcomes[1]
