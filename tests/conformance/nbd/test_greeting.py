"""Greeting and client flags, over a raw socket."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.nbd_server import pattern, serving
from tests.support.raw_nbd import (
    ABORT,
    ACK,
    EXPORT_NAME,
    FIXED,
    LIST,
    NO_ZEROES,
    UNSUP,
    RawClient,
    haggling,
    option,
    request,
)


@pytest.mark.spec("handshake-flags")
async def test_greeting_is_newstyle_with_two_flags_and_no_more(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert client.greeting == b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)


@pytest.mark.spec("client-flags")
@pytest.mark.parametrize("bit", range(2, 32))
async def test_unknown_client_flag_closes(short_tmp: Path, bit: int) -> None:
    async with (
        serving(short_tmp) as served,
        haggling(served.path, client_flags=FIXED | NO_ZEROES | 1 << bit) as client,
    ):
        assert await client.receive_to_end() == b""


@pytest.mark.spec("no-zeroes")
@pytest.mark.parametrize("flags", [0, FIXED, NO_ZEROES, FIXED | NO_ZEROES])
async def test_export_name_with_any_client_flags(short_tmp: Path, flags: int) -> None:
    async with serving(short_tmp) as served, haggling(served.path, client_flags=flags) as client:
        await client.send(option(EXPORT_NAME, b"disk") + request(0, 4, 4))
        size, _ = struct.unpack(">QH", await client.receive(10))
        assert size == 1 << 20
        if not flags & NO_ZEROES:
            assert await client.receive(124) == bytes(124)
        assert await client.simple(4) == (0, 7, pattern(8)[4:])


@pytest.mark.spec("notls-without-fixed-newstyle")
@pytest.mark.parametrize("number", [ABORT, LIST, 5, 7, 8, 77])
async def test_other_options_need_fixed_newstyle(short_tmp: Path, number: int) -> None:
    async with (
        serving(short_tmp) as served,
        haggling(served.path, client_flags=NO_ZEROES) as client,
    ):
        await client.send(option(number))
        assert await client.receive_to_end() == b""


async def test_bad_option_magic_closes(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.send(b"NBDMAGIC" + bytes(8))
        assert await client.receive_to_end() == b""


async def test_options_in_one_segment_with_the_client_flags(short_tmp: Path) -> None:
    """H8: clients may not send ahead; a server must not break when one does."""
    async with serving(short_tmp) as served:
        client = await RawClient.open(served.path, client_flags=None)
        flags = struct.pack(">I", FIXED | NO_ZEROES)
        await client.send(flags + option(77, b"x") + option(LIST) + option(ABORT))
        assert (await client.replies(77))[-1][0] == UNSUP
        assert (await client.replies(LIST))[-1][0] == ACK
        assert await client.replies(ABORT) == [(ACK, b"")]
        assert await client.receive_to_end() == b""
        await client.line.close()
