"""Requests and their errors, over a raw socket."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path

import pytest

from nbdfleece.base.limits import MAX_REQUESTS_IN_FLIGHT
from nbdfleece.base.units import KiB, MiB
from tests.support.nbd_server import Served, pattern, serving
from tests.support.raw_nbd import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    NONE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    RESIZE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    request,
    transmitting,
)
from tests.support.waiting import until

STRUCTURED = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
END = MiB


async def read_back(
    client: RawClient, structured: bool, offset: int = 0, length: int = 16
) -> bytes:
    """Return bytes of a READ that must succeed: the stream is in step and the export alive."""
    await client.send(request(READ, offset, length, cookie=99))
    if not structured:
        error, cookie, data = await client.simple(length)
        assert (error, cookie) == (0, 99)
        return data
    (chunk,) = await client.chunks()
    assert (chunk.kind, chunk.cookie) == (1, 99)
    return chunk.payload[8:]


# What each request deserves: on a writable export of 1 MiB.
ERRORS: dict[str, tuple[int, int, int, int, bytes, int]] = {
    "READ past the end": (READ, END, 1, 0, b"", EINVAL),
    "READ across the end": (READ, END - 1, 2, 0, b"", EINVAL),
    "READ that wraps": (READ, (1 << 64) - 1, 2, 0, b"", EINVAL),
    "READ from beyond all": (READ, 1 << 63, 1, 0, b"", EINVAL),
    "WRITE past the end": (WRITE, END, 1, 0, b"x", ENOSPC),
    "WRITE across the end": (WRITE, END - 1, 2, 0, b"xy", ENOSPC),
    "WRITE that wraps": (WRITE, (1 << 64) - 1, 2, 0, b"xy", ENOSPC),
    "WRITE_ZEROES across the end": (WRITE_ZEROES, 0, END + 1, 0, b"", ENOSPC),
    "TRIM across the end": (TRIM, 1, END, 0, b"", EINVAL),
    "CACHE across the end": (CACHE, 1, END, 0, b"", EINVAL),
    "READ with NO_HOLE": (READ, 0, 1, NO_HOLE, b"", EINVAL),
    "READ with REQ_ONE": (READ, 0, 1, REQ_ONE, b"", EINVAL),
    "READ with PAYLOAD_LEN": (READ, 0, 1, PAYLOAD_LEN, b"", EINVAL),
    "WRITE with DF": (WRITE, 0, 1, DF, b"x", EINVAL),
    "WRITE with PAYLOAD_LEN": (WRITE, 0, 1, PAYLOAD_LEN, b"x", EINVAL),
    "FLUSH with NO_HOLE": (FLUSH, 0, 0, NO_HOLE, b"", EINVAL),
    "TRIM with NO_HOLE": (TRIM, 0, 1, NO_HOLE, b"", EINVAL),
    "CACHE with DF": (CACHE, 0, 1, DF, b"", EINVAL),
    "CACHE with an unknown flag": (CACHE, 0, 1, 1 << 9, b"", EINVAL),
    "WRITE_ZEROES with REQ_ONE": (WRITE_ZEROES, 0, 1, REQ_ONE, b"", EINVAL),
    "RESIZE": (RESIZE, END, 0, 0, b"", EINVAL),
    "unknown command": (9, 0, 0, 0, b"", EINVAL),
    "unknown command, high": (0xFFFF, 0, 4, 0xFFFF, b"", EINVAL),
    "READ of nothing": (READ, 0, 0, 0, b"", 0),
    "READ of nothing at the end": (READ, END, 0, 0, b"", 0),
    "WRITE of nothing": (WRITE, END, 0, 0, b"", 0),
    "TRIM of nothing": (TRIM, 0, 0, 0, b"", 0),
    "CACHE of nothing": (CACHE, 0, 0, 0, b"", 0),
    "WRITE_ZEROES of nothing": (WRITE_ZEROES, END, 0, 0, b"", 0),
    "FLUSH with offset and length": (FLUSH, END, 77, 0, b"", 0),
    "FLUSH with FUA": (FLUSH, 0, 0, FUA, b"", 0),
    "CACHE": (CACHE, 0, END, 0, b"", 0),
    "CACHE with FUA": (CACHE, 0, 4, FUA, b"", 0),
    "TRIM with FUA": (TRIM, END - 4, 4, FUA, b"", 0),
    "WRITE_ZEROES with all its flags": (
        WRITE_ZEROES, END - 8 * KiB, 4 * KiB, FUA | NO_HOLE, b"", 0,
    ),
    "WRITE with FUA": (WRITE, END - 4, 4, FUA, b"abcd", 0),
}  # fmt: skip


@STRUCTURED
@pytest.mark.parametrize("row", ERRORS)
async def test_request_gets_its_one_right_answer(
    short_tmp: Path, row: str, structured: bool
) -> None:
    command, offset, length, flags, data, expected = ERRORS[row]
    async with (
        serving(short_tmp) as served,
        transmitting(served.path, structured=structured) as client,
    ):
        before = bytes(served.disk.data)
        assert await client.error_of(command, offset, length, flags=flags, data=data) == expected
        if expected:
            assert served.disk.data == before
        assert await read_back(client, structured) == pattern(16)


@STRUCTURED
async def test_read_only_export_refuses_every_write(short_tmp: Path, structured: bool) -> None:
    async with (
        serving(short_tmp) as served,
        transmitting(served.path, b"frozen", structured=structured) as client,
    ):
        for command, data in ((WRITE, b"evil"), (TRIM, b""), (WRITE_ZEROES, b"")):
            for flags in (0, FUA):
                assert await client.error_of(command, 0, 4, flags=flags, data=data) == EPERM
        assert await client.error_of(WRITE, END, 4, data=b"evil") == EPERM
        assert await client.error_of(FLUSH) == 0
        assert await client.error_of(CACHE, 0, 4) == 0
        assert await read_back(client, structured) == pattern(16)
        assert served.drivers["frozen"].data == pattern(MiB)


async def test_df_needs_structured_replies(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, transmitting(served.path, structured=False) as client:
        assert await client.error_of(READ, 0, 4, flags=DF) == EINVAL
        assert await read_back(client, structured=False) == pattern(16)


@pytest.mark.parametrize("contexts", [0, 1])
async def test_block_status_needs_contexts_and_a_length(short_tmp: Path, contexts: int) -> None:
    async with serving(short_tmp) as served, transmitting(served.path, contexts=contexts) as client:
        assert await client.error_of(BLOCK_STATUS, 0, 0) == EINVAL
        assert await client.error_of(BLOCK_STATUS, END - 1, 2) == EINVAL
        assert await client.error_of(BLOCK_STATUS, 0, 4, flags=DF) == EINVAL
        if not contexts:
            assert await client.error_of(BLOCK_STATUS, 0, 4) == EINVAL
        assert await read_back(client, structured=True) == pattern(16)


async def test_fast_zero_is_refused_at_once_or_done(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        error = await client.error_of(WRITE_ZEROES, 0, 4 * KiB, flags=FAST_ZERO)
        zeroes = bytes(4 * KiB)
        assert served.disk.data[: 4 * KiB] == (pattern(4 * KiB) if error else zeroes)
        assert await client.error_of(WRITE_ZEROES, 0, 4 * KiB) == 0
        assert served.disk.data[: 4 * KiB] == zeroes


async def test_fast_zero_that_is_not_advertised_is_invalid(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, transmitting(served.path, b"frozen") as client:
        assert await client.error_of(WRITE_ZEROES, 0, 4, flags=FAST_ZERO) == EINVAL


@STRUCTURED
@pytest.mark.slow
@pytest.mark.parametrize("length", [33 * MiB, 64 * MiB])
async def test_write_above_the_payload_cap_is_drained_and_refused(
    short_tmp: Path, structured: bool, length: int
) -> None:
    async with serving(short_tmp) as served:
        await served.add("big", bytes(length))
        async with transmitting(served.path, b"big", structured=structured) as client:
            assert await client.error_of(WRITE, 0, length, data=b"x" * length) == EINVAL
            assert await client.error_of(FLUSH) == 0
        assert not any(served.drivers["big"].data)


@pytest.mark.parametrize("length", [64 * MiB + 1, 0xFFFFFFFF])
async def test_write_beyond_what_is_drained_closes(short_tmp: Path, length: int) -> None:
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        await client.send(request(WRITE, 0, length))
        assert await client.receive_to_end() == b""


async def test_read_above_the_payload_cap(short_tmp: Path) -> None:
    """Served in chunks where they are on; refused, and not closed, where not or not in one."""
    size = 33 * MiB
    async with serving(short_tmp) as served:
        await served.add("big", b"x" * size)
        async with transmitting(served.path, b"big", structured=False) as client:
            assert await client.error_of(READ, 0, size) == EINVAL
            assert await client.error_of(FLUSH) == 0
        async with transmitting(served.path, b"big") as client:
            assert await client.error_of(READ, 0, size, flags=DF) == EOVERFLOW
            await client.send(request(READ, 0, size))
            chunks = await client.chunks()
            assert sum(len(chunk.payload) - 8 for chunk in chunks) == size
            assert max(len(chunk.payload) for chunk in chunks) <= 32 * MiB + 8


@pytest.mark.parametrize("magic", [0, 0x12560953, 0x25609514, 0x67446698, 0x21E41C71])
async def test_bad_request_magic_closes(short_tmp: Path, magic: int) -> None:
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        await client.send(struct.pack(">IHHQQI", magic, 0, READ, 7, 0, 4) + bytes(64))
        assert await client.receive_to_end() == b""


@STRUCTURED
async def test_cookie_is_echoed_whatever_it_is(short_tmp: Path, structured: bool) -> None:
    async with (
        serving(short_tmp) as served,
        transmitting(served.path, structured=structured) as client,
    ):
        for cookie in (0, 1, 1 << 63, (1 << 64) - 1, 0x6744669825609513):
            await client.send(request(READ, 0, 4, cookie=cookie))
            if structured:
                assert (await client.chunks())[0].cookie == cookie
            else:
                assert await client.simple(4) == (0, cookie, pattern(4))


async def test_requests_with_one_cookie_are_each_answered(short_tmp: Path) -> None:
    """E10: the cookie means nothing to a server."""
    async with serving(short_tmp) as served, transmitting(served.path, structured=False) as client:
        await client.send(request(READ, 0, 4, cookie=5) * 50)
        for _ in range(50):
            assert await client.simple(4) == (0, 5, pattern(4))


@STRUCTURED
async def test_disc_is_not_answered_and_closes(short_tmp: Path, structured: bool) -> None:
    async with serving(short_tmp) as served:
        for flags, offset, length in ((0, 0, 0), (0xFFFF, 1 << 63, 0xFFFFFFFF)):
            async with transmitting(served.path, structured=structured) as client:
                await client.send(request(DISC, offset, length, flags=flags))
                await client.send(request(READ, 0, 4))  # what follows is not heard
                assert await client.receive_to_end() == b""


@pytest.mark.parametrize("ending", ["DISC", "half-close"])
async def test_requests_before_the_end_are_carried_out_and_answered(
    short_tmp: Path, ending: str
) -> None:
    """E12: also those that have not begun when the end is heard of."""
    async with serving(short_tmp) as served, transmitting(served.path, structured=False) as client:
        served.disk.hold = {"write"}
        for number in range(200):
            await client.send(request(WRITE, 4 * number, 4, cookie=number) + b"done")
        if ending == "DISC":
            await client.send(request(DISC))
        else:
            client.line.half_close()
        await until(lambda: served.disk.waiting)
        served.disk.held.set()
        heard = await client.receive_to_end()
        cookies = {cookie for _, error, cookie in struct.iter_unpack(">IIQ", heard) if not error}
        assert cookies == set(range(200))
        assert served.disk.data[:800] == b"done" * 200


async def test_flush_waits_for_what_was_acknowledged(short_tmp: Path) -> None:
    """And not for a write that was not; with several connections as with one."""
    async with (
        serving(short_tmp) as served,
        transmitting(served.path, structured=False) as writer,
        transmitting(served.path, structured=False) as flusher,
    ):
        log: list[str] = []
        flush, write = served.disk.flush, served.disk.write

        async def logged_flush() -> None:
            log.append("flush begins")
            await flush()

        async def logged_write(offset: int, data: memoryview, *, fua: bool) -> None:
            await write(offset, data, fua=fua)
            log.append("write landed")

        served.disk.flush = logged_flush  # type: ignore[method-assign]
        served.disk.write = logged_write  # type: ignore[method-assign]
        assert await writer.error_of(WRITE, 0, 4, data=b"abcd") == 0
        assert await flusher.error_of(FLUSH) == 0
        assert log == ["write landed", "flush begins"]


async def test_fua_reaches_the_disk_with_its_write(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        seen: list[tuple[str, bool]] = []
        write = served.disk.write

        async def logged_write(offset: int, data: memoryview, *, fua: bool) -> None:
            seen.append(("write", fua))
            await write(offset, data, fua=fua)

        async def logged_zero(
            offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
        ) -> None:
            seen.append(("zero", fua))
            served.disk.data[offset : offset + length] = bytes(length)

        served.disk.write = logged_write  # type: ignore[method-assign]
        served.disk.write_zeroes = logged_zero  # type: ignore[method-assign]
        for flags in (0, FUA):
            assert await client.error_of(WRITE, 0, 4, flags=flags, data=b"abcd") == 0
            assert await client.error_of(WRITE_ZEROES, 0, 4, flags=flags) == 0
        assert seen == [("write", False), ("zero", False), ("write", True), ("zero", True)]


@STRUCTURED
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EIO, EIO), (errno.EROFS, EPERM), (errno.EDQUOT, ENOSPC), (errno.EFBIG, ENOSPC),
        (errno.ENOSPC, ENOSPC), (errno.EOPNOTSUPP, EINVAL), (errno.EACCES, EINVAL),
        (errno.ETIMEDOUT, EINVAL),
    ],
)  # fmt: skip
async def test_only_errors_of_the_spec_are_told(
    short_tmp: Path, structured: bool, number: int, expected: int
) -> None:
    async with (
        serving(short_tmp) as served,
        transmitting(served.path, structured=structured) as client,
    ):
        served.disk.fail = {"read": number, "write": number, "flush": number}
        for command, data in ((READ, b""), (WRITE, b"abcd"), (FLUSH, b"")):
            assert await client.error_of(command, 0, 4, data=data) == expected
        served.disk.fail = {}
        assert await read_back(client, structured) == pattern(16)


async def test_empty_structured_read_has_no_data_chunk(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        await client.send(request(READ, 0, 0))
        assert [chunk.kind for chunk in await client.chunks()] == [NONE]


async def test_write_cut_short_writes_nothing_and_is_quiet(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_tmp) as served:
        async with transmitting(served.path) as client:
            await client.send(request(WRITE, 0, 4096) + b"x" * 4095)
            client.line.half_close()
            assert await client.receive_to_end() == b""
        assert served.disk.data == pattern(MiB)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def bounded_reads(served: Served) -> None:
    """Check that the server takes no more requests than it may hold, and refuses none."""
    served.disk.hold = {"read"}
    async with transmitting(served.path, structured=False) as client:
        await client.send(request(READ, 0, 16) * 1000)
        await until(lambda: served.disk.waiting.get("read", 0) >= MAX_REQUESTS_IN_FLIGHT)
        for _ in range(50):
            await asyncio.sleep(0)
        assert served.disk.waiting["read"] == MAX_REQUESTS_IN_FLIGHT
        served.disk.held.set()
        for _ in range(1000):
            assert (await client.simple(16))[0] == 0


async def test_requests_in_flight_are_bounded_by_not_reading(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        async with asyncio.timeout(20):
            await bounded_reads(served)
