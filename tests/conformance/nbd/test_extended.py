"""Extended headers, over a raw socket: requests and replies of 32 bytes, lengths of 64 bits."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base.units import GiB, KiB, MiB
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.server.export import ExportOptions
from tests.support.nbd_server import Served, pattern, serving
from tests.support.raw_nbd import (
    ACK,
    BLOCK_STATUS,
    CACHE,
    DATA,
    DF,
    DISC,
    DONE,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    EXPORT_NAME,
    EXT,
    EXTENDED,
    FLUSH,
    FUA,
    HOLE,
    INVALID,
    NONE,
    OPT_INFO,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    SET_META,
    STATUS_EXT,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Chunk,
    RawClient,
    export_info,
    extended_request,
    haggling,
    info,
    meta,
    option,
    request,
)

BASE = b"base:allocation"
HUGE = 1 << 40


@asynccontextmanager
async def extended(
    served: Served, name: bytes = b"disk", *, contexts: bool = True
) -> AsyncIterator[tuple[RawClient, int]]:
    """A client in transmission with extended headers, and the id of base:allocation (or -1)."""
    async with haggling(served.path) as client:
        context = -1
        assert await client.option(EXTENDED) == [(ACK, b"")]
        if contexts:
            (_, told), _ = await client.option(SET_META, meta(name, BASE))
            (context,) = struct.unpack_from(">I", told)
        await client.go(name)
        yield client, context


async def add_huge(served: Served) -> None:
    driver = NullDriver(size=HUGE, read_zeroes=True, latency_ns=0)
    node = await served.add_node(driver)
    served.exports.add(node, ExportOptions("huge", "huge", writable=True, description=""))


def status_ext(chunk: Chunk) -> list[tuple[int, int]]:
    """Return (length, flags) of a status chunk with 64 bits each."""
    assert chunk.kind == STATUS_EXT
    _, count = struct.unpack_from(">II", chunk.payload)
    rest = chunk.payload[8:]
    assert rest
    assert len(rest) % 16 == 0
    assert count in (0, len(rest) // 16)
    return list(struct.iter_unpack(">QQ", rest))


async def test_extended_headers_are_agreed_on_once(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await client.outcome(EXTENDED, b"x") == INVALID
        assert await client.outcome(STRUCTURED) == ACK
        assert await client.outcome(EXTENDED) == ACK
        assert await client.outcome(EXTENDED) == INVALID
        assert await client.outcome(STRUCTURED) == EXT
        await client.send(option(EXPORT_NAME, b"disk"))
        assert await client.receive_to_end() == b""


async def test_flags_in_extended_mode(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(EXTENDED)
        _, without = export_info(await client.option(OPT_INFO, info(b"disk")))
        await client.option(SET_META, meta(b"disk", BASE))
        _, selected = export_info(await client.option(OPT_INFO, info(b"disk")))
        assert without & (1 << 7 | 1 << 12) == 1 << 7
        assert selected == without | 1 << 12
        assert (await client.go())[1] == selected


async def test_read_in_extended_chunks(short_tmp: Path, rng: random.Random) -> None:
    content = pattern(64 * KiB) + bytes(192 * KiB) + pattern(100)
    async with serving(short_tmp) as served:
        await served.add("sparse", content)
        async with extended(served, b"sparse") as (client, _):
            for number in range(100):
                offset = rng.randrange(len(content))
                length = rng.randrange(1, len(content) - offset + 1)
                flags = rng.choice([0, 0, DF, FUA])
                await client.send(
                    extended_request(READ, offset, length, flags=flags, cookie=number)
                )
                chunks = await client.extended_chunks()
                assert {(chunk.cookie, chunk.offset) for chunk in chunks} == {(number, offset)}
                assert content_of(chunks, offset, length) == content[offset : offset + length]
                if flags == DF:
                    assert len(chunks) == 1
                    assert chunks[0].kind == DATA or not any(content[offset : offset + length])


def content_of(chunks: list[Chunk], offset: int, length: int) -> bytes:
    data = bytearray(length)
    covered = 0
    for chunk in chunks:
        if chunk.kind == NONE:
            assert chunk.flags & DONE
            continue
        begin = struct.unpack_from(">Q", chunk.payload)[0] - offset
        if chunk.kind == HOLE:
            part = bytes(struct.unpack(">QI", chunk.payload)[1])
        else:
            assert chunk.kind == DATA
            part = chunk.payload[8:]
        assert part
        assert 0 <= begin <= begin + len(part) <= length
        data[begin : begin + len(part)] = part
        covered += len(part)
    assert covered == length
    return bytes(data)


REQUESTS: dict[str, tuple[int, int, int, int, bytes, int]] = {
    "WRITE": (WRITE, 0, 4, PAYLOAD_LEN, b"abcd", 0),
    "WRITE with FUA": (WRITE, 0, 4, PAYLOAD_LEN | FUA, b"abcd", 0),
    "WRITE of nothing": (WRITE, 0, 0, PAYLOAD_LEN, b"", 0),
    "WRITE of nothing without the flag": (WRITE, 0, 0, 0, b"", 0),
    "WRITE past the end": (WRITE, MiB, 4, PAYLOAD_LEN, b"abcd", ENOSPC),
    "READ past the end": (READ, MiB, 1, 0, b"", EINVAL),
    "READ of nothing": (READ, 0, 0, 0, b"", 0),
    "READ of 2^64 - 1": (READ, 0, (1 << 64) - 1, 0, b"", EINVAL),
    "FLUSH": (FLUSH, 0, 0, 0, b"", 0),
    "TRIM": (TRIM, 0, 4, 0, b"", 0),
    "TRIM that wraps": (TRIM, (1 << 64) - 1, (1 << 64) - 1, 0, b"", EINVAL),
    "CACHE": (CACHE, 0, 4, 0, b"", 0),
    "WRITE_ZEROES": (WRITE_ZEROES, 0, 4, 0, b"", 0),
    "WRITE_ZEROES beyond 32 bits": (WRITE_ZEROES, 0, 1 << 33, 0, b"", ENOSPC),
    "BLOCK_STATUS of nothing": (BLOCK_STATUS, 0, 0, 0, b"", EINVAL),
    "BLOCK_STATUS past the end": (BLOCK_STATUS, 0, 1 << 40, 0, b"", EINVAL),
    "unknown command": (77, 0, 1 << 40, 0, b"", EINVAL),
}


@pytest.mark.parametrize("row", REQUESTS)
async def test_no_reply_is_simple(short_tmp: Path, row: str) -> None:
    command, offset, length, flags, data, expected = REQUESTS[row]
    async with serving(short_tmp) as served, extended(served) as (client, _):
        await client.send(extended_request(command, offset, length, flags=flags) + data)
        (chunk,) = await client.extended_chunks()
        assert chunk.offset == offset
        assert (chunk.error if chunk.kind & 0x8000 else 0) == expected
        if not expected:
            assert chunk.kind == NONE
        await client.send(extended_request(READ, 8, 4))
        assert content_of(await client.extended_chunks(), 8, 4) == pattern(12)[8:]


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 77])
@pytest.mark.parametrize("length", [1, 28, 100_000])
async def test_payload_that_is_not_taken_is_consumed(
    short_tmp: Path, command: int, length: int
) -> None:
    payload = (request(DISC) * (length // 28 + 1))[:length]  # heard as requests, it would show
    async with serving(short_tmp) as served, extended(served) as (client, _):
        await client.send(extended_request(command, 0, length, flags=PAYLOAD_LEN) + payload)
        assert await client.reply() == EINVAL
        await client.send(extended_request(READ, 0, 4))
        assert content_of(await client.extended_chunks(), 0, 4) == pattern(4)


@pytest.mark.parametrize("command", [WRITE, READ, BLOCK_STATUS, 77])
@pytest.mark.parametrize("length", [32 * MiB + 1, 1 << 32, (1 << 64) - 1])
async def test_payload_above_the_maximum_closes(short_tmp: Path, command: int, length: int) -> None:
    async with serving(short_tmp) as served, extended(served) as (client, _):
        await client.send(extended_request(command, 0, length, flags=PAYLOAD_LEN))
        assert await client.receive_to_end() == b""


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("length", [4, 100_000])
async def test_write_without_the_flag_has_a_payload_all_the_same(
    short_tmp: Path, flags: int, length: int
) -> None:
    """QEMU's client, which has extended headers since 8.2, never sets it."""
    async with serving(short_tmp) as served, extended(served) as (client, _):
        await client.send(extended_request(WRITE, 0, length, flags=flags) + b"w" * length)
        assert await client.reply() == 0
        assert served.disk.data[: length + 4] == b"w" * length + pattern(length + 4)[length:]
        await client.send(extended_request(WRITE, MiB, 28, flags=flags) + request(DISC))
        assert await client.reply() == ENOSPC
        await client.send(extended_request(READ, 0, 4))
        assert content_of(await client.extended_chunks(), 0, 4) == b"wwww"


async def test_compact_request_closes(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, extended(served) as (client, _):
        await client.send(request(READ, 0, 4) + bytes(32))
        assert await client.receive_to_end() == b""


async def test_extended_request_without_agreement_closes(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.go()
        await client.send(extended_request(READ, 0, 4))
        assert await client.receive_to_end() == b""


async def test_status_has_64_bits(short_tmp: Path) -> None:
    """1.10: a terabyte of hole is one extent."""
    async with serving(short_tmp) as served:
        await add_huge(served)
        async with extended(served, b"huge") as (client, context):
            for flags in (0, REQ_ONE):
                await client.send(extended_request(BLOCK_STATUS, 0, HUGE, flags=flags))
                (chunk,) = await client.extended_chunks()
                assert struct.unpack_from(">I", chunk.payload) == (context,)
                assert status_ext(chunk) == [(HUGE, 3)]
            await client.send(extended_request(BLOCK_STATUS, 5, 5 * GiB, flags=REQ_ONE))
            ((length, flags),) = status_ext((await client.extended_chunks())[0])
            assert 0 < length <= 5 * GiB
            assert flags >> 32 == 0


async def test_requests_beyond_32_bits(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        await add_huge(served)
        async with extended(served, b"huge") as (client, _):
            for command in (WRITE_ZEROES, TRIM):
                await client.send(extended_request(command, 1 << 33, 1 << 34))
                assert await client.reply() == 0
            await client.send(extended_request(READ, 0, 5 * GiB))
            assert await client.reply() == EOVERFLOW


async def test_status_filter_limits_the_contexts(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, extended(served) as (client, context):
        payload = struct.pack(">QI", MiB, context)
        head = extended_request(BLOCK_STATUS, 0, len(payload), flags=PAYLOAD_LEN)
        await client.send(head + payload)
        (chunk,) = await client.extended_chunks()
        assert struct.unpack_from(">I", chunk.payload) == (context,)
        assert sum(length for length, _ in status_ext(chunk)) == MiB


@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"",
        lambda _: bytes(7),
        lambda _: struct.pack(">Q", MiB),
        lambda context: struct.pack(">QI", MiB, context) + b"x",
        lambda context: struct.pack(">QI", MiB, context + 1000),
        lambda context: struct.pack(">QII", MiB, context, context),
        lambda context: struct.pack(">QI", MiB + 1, context),
        lambda context: struct.pack(">QI", 0, context),
        lambda context: struct.pack(">QI", MiB, context) * 10_000,
    ],
    ids=[
        "empty", "half a length", "no id", "torn id", "unknown id", "id twice", "past the end",
        "no length", "long",
    ],
)  # fmt: skip
async def test_bad_status_filter_is_consumed_and_refused(short_tmp: Path, make) -> None:
    async with serving(short_tmp) as served, extended(served) as (client, context):
        payload = make(context)
        head = extended_request(BLOCK_STATUS, 0, len(payload), flags=PAYLOAD_LEN)
        await client.send(head + payload)
        assert await client.reply() == EINVAL
        await client.send(extended_request(READ, 0, 4))
        assert content_of(await client.extended_chunks(), 0, 4) == pattern(4)


async def test_status_filter_without_contexts_is_consumed_and_refused(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, extended(served, contexts=False) as (client, _):
        payload = struct.pack(">QI", MiB, 0)
        head = extended_request(BLOCK_STATUS, 0, len(payload), flags=PAYLOAD_LEN)
        await client.send(head + payload)
        assert await client.reply() == EINVAL
        await client.send(extended_request(FLUSH))
        assert await client.reply() == 0


async def test_read_only_export_takes_the_payload_and_refuses(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, extended(served, b"frozen") as (client, _):
        for length in (4, 100_000):
            sent = extended_request(WRITE, 0, length, flags=PAYLOAD_LEN) + b"e" * length
            await client.send(sent)
            assert await client.reply() == EPERM
        assert served.drivers["frozen"].data == pattern(MiB)


async def test_disc_ends_extended_mode_too(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, extended(served) as (client, _):
        await client.send(extended_request(READ, 0, 4) + extended_request(DISC))
        assert content_of(await client.extended_chunks(), 0, 4) == pattern(4)
        assert await client.receive_to_end() == b""
