"""Structured replies, over a raw socket: the rules for each chunk."""

from __future__ import annotations

import errno
import random
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.base.units import KiB, MiB
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.server.export import ExportOptions
from tests.support.nbd_server import pattern, serving
from tests.support.raw_nbd import (
    BLOCK_STATUS,
    DATA,
    DF,
    DONE,
    EINVAL,
    EIO,
    ERROR,
    FLUSH,
    HOLE,
    READ,
    REQ_ONE,
    STATUS,
    WRITE,
    Chunk,
    descriptors,
    request,
    transmitting,
)

SPARSE = pattern(64 * KiB) + bytes(192 * KiB) + pattern(100) + bytes(4000) + pattern(64 * KiB)


def assemble(chunks: list[Chunk], offset: int, length: int) -> bytes:
    """Return the data of a READ, checking what the spec says about its chunks."""
    data: dict[int, bytes] = {}
    for chunk in chunks:
        assert bool(chunk.flags & DONE) is (chunk is chunks[-1])
        if chunk.kind == DATA:
            assert len(chunk.payload) >= 9
            data[struct.unpack_from(">Q", chunk.payload)[0]] = chunk.payload[8:]
        elif chunk.kind == HOLE:
            assert len(chunk.payload) == 12
            begin, size = struct.unpack(">QI", chunk.payload)
            assert size > 0
            data[begin] = bytes(size)
        else:
            assert chunk.kind == 0
            assert chunk.flags & DONE
    end = offset
    for begin in sorted(data):
        assert begin == end, "chunks overlap or leave a gap"
        end += len(data[begin])
    assert end == offset + length
    return b"".join(data[begin] for begin in sorted(data))


async def test_chunks_cover_the_request_once(short_tmp: Path, rng: random.Random) -> None:
    async with serving(short_tmp) as served:
        await served.add("sparse", SPARSE)
        async with transmitting(served.path, b"sparse") as client:
            for _ in range(100):
                offset = rng.randrange(len(SPARSE))
                length = rng.randrange(1, len(SPARSE) - offset + 1)
                await client.send(request(READ, offset, length))
                data = assemble(await client.chunks(), offset, length)
                assert data == SPARSE[offset : offset + length]


async def test_holes_go_out_as_holes_and_not_in_crumbs(short_tmp: Path) -> None:
    """C6: a reply is not cut into many small chunks for the sake of holes."""
    crumbs = (b"x" * 4 * KiB + bytes(4 * KiB)) * 128
    async with serving(short_tmp) as served:
        await served.add("sparse", SPARSE)
        await served.add("crumbs", crumbs)
        async with transmitting(served.path, b"sparse") as client:
            await client.send(request(READ, 64 * KiB, 192 * KiB))
            assert {chunk.kind for chunk in await client.chunks()} == {HOLE}
        async with transmitting(served.path, b"crumbs") as client:
            await client.send(request(READ, 0, MiB))
            assert len(await client.chunks()) <= 8


@pytest.mark.parametrize("length", [1, 4 * KiB, 64 * KiB, 256 * KiB, len(SPARSE)])
async def test_df_means_one_content_chunk(short_tmp: Path, length: int) -> None:
    async with serving(short_tmp) as served:
        await served.add("sparse", SPARSE)
        async with transmitting(served.path, b"sparse") as client:
            await client.send(request(READ, 0, length, flags=DF))
            chunks = await client.chunks()
            content = [chunk for chunk in chunks if chunk.kind in (DATA, HOLE)]
            assert len(content) == 1
            assert content[0].kind == DATA
            assert assemble(chunks, 0, length) == SPARSE[:length]


@pytest.mark.parametrize(
    ("offset", "length", "flags"),
    [(MiB, 1, 0), (0, 4, 1 << 14), (0, 4, REQ_ONE), (1 << 63, 4, DF)],
)
async def test_failed_read_is_never_answered_simply(
    short_tmp: Path, offset: int, length: int, flags: int
) -> None:
    """C1: also an early error."""
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        await client.send(request(READ, offset, length, flags=flags))
        (chunk,) = await client.chunks()
        assert chunk.kind & 0x8000
        assert chunk.error == EINVAL


async def test_error_behind_content_comes_before_the_end(short_tmp: Path) -> None:
    """E8: content first, then one error; no chunk that could still fail ends the reply."""
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        read = served.disk.read

        async def fail_late(offset: int, view: memoryview) -> None:
            if offset >= 512 * KiB:
                raise IoError(errno.EIO, "late")
            await read(offset, view)

        served.disk.read = fail_late  # type: ignore[method-assign]
        await client.send(request(READ, 0, MiB))
        chunks = await client.chunks()
        *content, last = chunks
        assert last.kind & 0x8000
        assert last.error == EIO
        told = b"".join(chunk.payload[8:] for chunk in content if chunk.kind == DATA)
        assert told == pattern(MiB)[: len(told)]
        assert len(told) <= 512 * KiB
        assert not any(chunk.flags & DONE for chunk in content)
        assert await client.error_of(FLUSH) == 0


@pytest.mark.parametrize(("command", "data"), [(READ, b""), (WRITE, b"abcd"), (BLOCK_STATUS, b"")])
async def test_error_chunks_are_short_and_well_formed(
    short_tmp: Path, command: int, data: bytes
) -> None:
    """E9: QEMU's client drops the connection for more than 1000 bytes."""
    async with serving(short_tmp) as served, transmitting(served.path) as client:
        long = IoError(errno.EIO, "w" * 5000, public="ü" * 5000)

        async def fail(*_args: object, **_more: object) -> None:
            raise long

        for verb in ("read", "write", "block_status"):
            setattr(served.disk, verb, fail)
        await client.send(request(command, 0, 4) + data)
        (chunk,) = await client.chunks()
        assert chunk.kind == ERROR
        assert chunk.error == EIO
        assert chunk.text
        assert 6 < len(chunk.payload) <= 1000


# --- block status ----------------------------------------------------------------------------


async def test_status_is_one_chunk_for_each_context_and_merged(short_tmp: Path) -> None:
    content = pattern(8 * KiB) + bytes(8 * KiB)
    async with serving(short_tmp) as served:
        await served.add("sparse", content)
        async with transmitting(served.path, b"sparse") as client:
            await client.send(request(BLOCK_STATUS, 0, 16 * KiB))
            (chunk,) = await client.chunks()
            assert chunk.kind == STATUS
            assert chunk.flags == DONE
            assert descriptors(chunk) == [(8 * KiB, 0), (8 * KiB, 3)]


async def test_status_with_req_one_is_one_extent_within_the_request(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        await served.add("sparse", SPARSE)
        async with transmitting(served.path, b"sparse") as client:
            for offset, length in ((0, 1), (0, 100 * KiB), (70 * KiB, 1000), (1, len(SPARSE) - 1)):
                await client.send(request(BLOCK_STATUS, offset, length, flags=REQ_ONE))
                (chunk,) = await client.chunks()
                ((told, _),) = descriptors(chunk)
                assert 0 < told <= length


async def test_status_makes_progress_and_tells_no_lies(short_tmp: Path, rng: random.Random) -> None:
    async with serving(short_tmp) as served:
        await served.add("sparse", SPARSE)
        async with transmitting(served.path, b"sparse") as client:
            for _ in range(100):
                offset = rng.randrange(len(SPARSE))
                length = rng.randrange(1, len(SPARSE) - offset + 1)
                await client.send(request(BLOCK_STATUS, offset, length))
                (chunk,) = await client.chunks()
                extents = descriptors(chunk)
                assert sum(told for told, _ in extents[:-1]) < length
                assert all(one[1] != two[1] for one, two in pairwise(extents))
                for told, flags in extents:
                    assert told > 0
                    assert not flags & ~3
                    if flags & 2:
                        assert not any(SPARSE[offset : offset + told])
                    offset += told


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0xFFFFFFFF), (1, 0xFFFFFFFF), (511, 0xFFFFFFFE), (1 << 33, 0xFFFFFFFF), (0, 0xFFFF0001)],
)
async def test_cve_2025_47711_status_of_nearly_4_gib(
    short_tmp: Path, offset: int, length: int
) -> None:
    """Nbdkit < 1.42.3: an extent beyond 32 bits; and 47712, rounding an unaligned request."""
    async with serving(short_tmp) as served:
        driver = NullDriver(size=1 << 40, read_zeroes=True, latency_ns=0)
        node = await served.add_node(driver, read_only=True)
        served.exports.add(node, ExportOptions("huge", "huge", writable=False, description=""))
        async with transmitting(served.path, b"huge") as client:
            for flags in (0, REQ_ONE):
                await client.send(request(BLOCK_STATUS, offset, length, flags=flags))
                (chunk,) = await client.chunks()
                extents = descriptors(chunk)
                assert extents
                assert all(0 < told <= 0xFFFFFFFF for told, _ in extents)
                if flags:
                    assert extents[0][0] <= length
