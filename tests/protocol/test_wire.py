"""Golden bytes: each message of the wire once, as the specification draws it."""

from __future__ import annotations

import pytest

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire


def h(text: str) -> bytes:
    return bytes.fromhex(text)


GOLDEN = {
    "greeting": (wire.greeting(3), h("4e42444d41474943 49484156454f5054 0003")),
    "client flags": (wire.CLIENT_FLAGS.pack(3), h("00000003")),
    "option": (wire.option(c.NBD_OPT_GO, b"ab"), h("49484156454f5054 00000007 00000002 6162")),
    "ack": (
        wire.option_reply(c.NBD_OPT_GO, c.NBD_REP_ACK),
        h("0003e889045565a9 00000007 00000001 00000000"),
    ),
    "option error": (
        wire.option_reply(c.NBD_OPT_LIST, c.NBD_REP_ERR_INVALID, b"no"),
        h("0003e889045565a9 00000003 80000003 00000002 6e6f"),
    ),
    "server": (
        wire.server_reply(c.NBD_OPT_LIST, b"ab", b"text"),
        h("0003e889045565a9 00000003 00000002 0000000a 00000002 6162 74657874"),
    ),
    "meta context": (
        wire.meta_context_reply(c.NBD_OPT_SET_META_CONTEXT, 5, b"a:b"),
        h("0003e889045565a9 0000000a 00000004 00000007 00000005 613a62"),
    ),
    "info export": (
        wire.info_export_reply(c.NBD_OPT_INFO, size=0x1234, flags=0x8D),
        h("0003e889045565a9 00000006 00000003 0000000c 0000 0000000000001234 008d"),
    ),
    "info name": (
        wire.info_text_reply(c.NBD_OPT_GO, c.NBD_INFO_NAME, b"x"),
        h("0003e889045565a9 00000007 00000003 00000003 0001 78"),
    ),
    "info block size": (
        wire.info_block_size_reply(c.NBD_OPT_GO, minimum=1, preferred=4096, maximum=1 << 25),
        h("0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000"),
    ),
    "info request": (wire.info_request(b"x", [3, 1]), h("00000001 78 0002 0003 0001")),
    "meta request": (
        wire.meta_request(b"x", [b"a:", b""]),
        h("00000001 78 00000002 00000002 613a 00000000"),
    ),
    "export name": (
        wire.export_name_reply(size=5, flags=1, no_zeroes=True),
        h("0000000000000005 0001"),
    ),
    "export name with zeroes": (
        wire.export_name_reply(size=5, flags=1, no_zeroes=False),
        h("0000000000000005 0001") + bytes(124),
    ),
    "request": (
        wire.request(c.NBD_CMD_WRITE, flags=1, cookie=0x1122, offset=0x10, length=0x20),
        h("25609513 0001 0001 0000000000001122 0000000000000010 00000020"),
    ),
    "simple reply": (
        wire.simple_reply(c.NBD_EIO, 0x1122),
        h("67446698 00000005 0000000000001122"),
    ),
    "none": (
        wire.none_chunk(7, flags=1),
        h("668e33ef 0001 0000 0000000000000007 00000000"),
    ),
    "data": (
        wire.data_chunk_header(7, flags=0, offset=0x200, length=2) + b"ab",
        h("668e33ef 0000 0001 0000000000000007 0000000a 0000000000000200 6162"),
    ),
    "hole": (
        wire.hole_chunk(7, flags=1, offset=0x200, length=0x1000),
        h("668e33ef 0001 0002 0000000000000007 0000000c 0000000000000200 00001000"),
    ),
    "block status": (
        wire.status_chunk(7, flags=1, context=9, descriptors=[(0x1000, 3), (0x200, 0)]),
        h(
            "668e33ef 0001 0005 0000000000000007 00000014"
            "00000009 00001000 00000003 00000200 00000000"
        ),
    ),
    "error": (
        wire.error_chunk(7, flags=1, error=c.NBD_EINVAL, text=b"no"),
        h("668e33ef 0001 8001 0000000000000007 00000008 00000016 0002 6e6f"),
    ),
    "error offset": (
        wire.error_offset_chunk(7, flags=1, error=c.NBD_EIO, text=b"no", offset=0x30),
        h("668e33ef 0001 8002 0000000000000007 00000010 00000005 0002 6e6f 0000000000000030"),
    ),
    "extended request": (
        wire.extended_request(
            c.NBD_CMD_TRIM, flags=1, cookie=0x1122, offset=0x10, length=0x5_0000_0000
        ),
        h("21e41c71 0001 0004 0000000000001122 0000000000000010 0000000500000000"),
    ),
    "status filter": (
        wire.extended_request(
            c.NBD_CMD_BLOCK_STATUS,
            flags=c.NBD_CMD_FLAG_PAYLOAD_LEN,
            cookie=7,
            offset=0x10,
            length=16,
        )
        + wire.status_filter(0x5_0000_0000, [2, 0]),
        h(
            "21e41c71 0020 0007 0000000000000007 0000000000000010 0000000000000010"
            "0000000500000000 00000002 00000000"
        ),
    ),
    "extended none": (
        wire.extended_chunk(c.NBD_REPLY_TYPE_NONE, b"", flags=1, cookie=7, request_offset=0x200),
        h("6e8a278c 0001 0000 0000000000000007 0000000000000200 0000000000000000"),
    ),
    "extended hole": (
        wire.extended_chunk(
            c.NBD_REPLY_TYPE_OFFSET_HOLE,
            wire.hole_payload(0x300, 0x1000),
            flags=0,
            cookie=7,
            request_offset=0x200,
        ),
        h(
            "6e8a278c 0000 0002 0000000000000007 0000000000000200 000000000000000c"
            "0000000000000300 00001000"
        ),
    ),
    "extended block status": (
        wire.extended_chunk(
            c.NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
            wire.status_ext_payload(9, [(0x5_0000_0000, 3), (0x200, 0)]),
            flags=1,
            cookie=7,
            request_offset=0x200,
        ),
        h(
            "6e8a278c 0001 0006 0000000000000007 0000000000000200 0000000000000028"
            "00000009 00000002 0000000500000000 0000000000000003 0000000000000200 0000000000000000"
        ),
    ),
    "extended error offset": (
        wire.extended_chunk(
            c.NBD_REPLY_TYPE_ERROR_OFFSET,
            wire.error_offset_payload(c.NBD_EIO, b"no", 0x30),
            flags=1,
            cookie=7,
            request_offset=0x10,
        ),
        h(
            "6e8a278c 0001 8002 0000000000000007 0000000000000010 0000000000000010"
            "00000005 0002 6e6f 0000000000000030"
        ),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_message_is_written_as_in_the_spec(name: str) -> None:
    written, golden = GOLDEN[name]

    assert written == golden


def test_extended_and_reserved_magics_are_told_apart() -> None:
    magics = [value for name, value in vars(c).items() if "MAGIC" in name]

    assert len(magics) == len(set(magics))


def test_headers_have_the_sizes_of_the_spec() -> None:
    assert wire.REQUEST.size == 28
    assert wire.SIMPLE_REPLY.size == 16
    assert wire.CHUNK_HEADER.size == 20
    assert wire.EXTENDED_REQUEST.size == wire.EXTENDED_CHUNK_HEADER.size == 32


def test_export_name_answer_without_no_zeroes_has_134_bytes() -> None:
    assert len(wire.export_name_reply(size=1, flags=1, no_zeroes=False)) == 134
