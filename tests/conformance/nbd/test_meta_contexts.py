"""Metadata contexts, over a raw socket."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbdfleece.base.units import MiB
from tests.support.nbd_server import serving
from tests.support.raw_nbd import (
    ACK,
    BLOCK_STATUS,
    EINVAL,
    INVALID,
    LIST_META,
    META,
    SET_META,
    STATUS,
    STRUCTURED,
    TOO_BIG,
    UNKNOWN,
    RawClient,
    descriptors,
    haggling,
    meta,
    request,
)

BASE = b"base:allocation"
BOTH = pytest.mark.parametrize("number", [LIST_META, SET_META])


async def names(client: RawClient, number: int, *queries: bytes) -> list[bytes]:
    """Return the names that are listed or selected, after checking their ids."""
    replies = await client.option(number, meta(b"disk", *queries))
    assert replies[-1] == (ACK, b"")
    assert all(kind == META for kind, _ in replies[:-1])
    ids = [struct.unpack_from(">I", data)[0] for _, data in replies[:-1]]
    assert not any(ids) if number == LIST_META else len(set(ids)) == len(ids)
    return [data[4:] for _, data in replies[:-1]]


@pytest.mark.parametrize(
    "queries",
    [
        (b"base:",), (BASE,), (BASE, BASE), (b"x-unknown:", BASE, b"base:nothing", b"base:"),
        (b"base:allocation", b"no-colon", b"", b":", "ü:ü".encode()),
    ],
)  # fmt: skip
async def test_list_finds_each_context_once(short_tmp: Path, queries: tuple[bytes, ...]) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await names(client, LIST_META, *queries) == [BASE]


async def test_list_without_queries_finds_all_that_can_be_set(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        listed = await names(client, LIST_META)
        assert BASE in listed
        await client.option(STRUCTURED)
        assert sorted(await names(client, SET_META, *listed)) == sorted(listed)


@pytest.mark.parametrize(
    "query", [b"x-unknown:", b"qemu:dirty-bitmap:nothing", b"base:nothing", b"nocolon"]
)
async def test_query_that_finds_nothing_is_no_error(short_tmp: Path, query: bytes) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        assert await names(client, LIST_META, query) == []
        assert await names(client, SET_META, query) == []


@pytest.mark.parametrize("queries", [(), (b"base:",), (b"qemu:", b"qemu:dirty-bitmap:")])
async def test_set_takes_no_wildcards(short_tmp: Path, queries: tuple[bytes, ...]) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        assert await names(client, SET_META, *queries) == []
        await client.go()
        assert await client.error_of(BLOCK_STATUS, 0, 4096) == EINVAL


async def test_set_selects_each_context_once(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        replies = await client.option(SET_META, meta(b"disk", BASE, BASE, b"base:"))
        assert [kind for kind, _ in replies] == [META, ACK]
        context = replies[0][1][:4]
        await client.go()
        await client.send(request(BLOCK_STATUS, 0, MiB))
        chunks = await client.chunks()
        assert [chunk.kind for chunk in chunks] == [STATUS]
        assert chunks[0].payload[:4] == context
        assert sum(length for length, _ in descriptors(chunks[0])) == MiB


@pytest.mark.parametrize(
    ("second", "reply"),
    [
        (meta(b"disk"), ACK),
        (meta(b"disk", b"base:"), ACK),
        (meta(b"nowhere", BASE), UNKNOWN),
        (meta(b"disk", BASE) + b"x", INVALID),
        (meta(b"frozen", BASE), ACK),
    ],
    ids=["none", "wildcard", "unknown export", "malformed", "another export"],
)
async def test_each_set_replaces_the_one_before(short_tmp: Path, second: bytes, reply: int) -> None:
    async with serving(short_tmp) as served:
        await served.add("second", b"x")
        async with haggling(served.path) as client:
            await client.option(STRUCTURED)
            assert await names(client, SET_META, BASE) == [BASE]
            assert await client.outcome(SET_META, second) == reply
            await client.go()
            assert await client.error_of(BLOCK_STATUS, 0, 4096) == EINVAL


async def test_list_does_not_touch_what_is_set(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        await names(client, SET_META, BASE)
        await client.option(LIST_META, meta(b"nowhere", b"x:"))
        await client.option(LIST_META, b"malformed")
        await client.go()
        await client.send(request(BLOCK_STATUS, 0, 4096))
        assert len(await client.chunks()) == 1


MALFORMED = {
    "empty": b"",
    "name length of 4 GiB": b"\xff" * 4 + b"disk",
    "no count": struct.pack(">I", 4) + b"disk",
    "query missing": meta(b"disk")[:-4] + struct.pack(">I", 1),
    "query longer than the option": meta(b"disk", BASE)[:-1],
    "query length of 4 GiB": meta(b"disk")[:-4] + struct.pack(">II", 1, 0xFFFFFFFF),
    "bytes behind the last query": meta(b"disk", BASE) + b"x",
    "query of 5000 bytes": meta(b"disk", b"x:" + b"y" * 4998),
    "NUL": meta(b"disk", b"base:\0"),
    "not UTF-8": meta(b"disk", b"\xff:"),
}


@BOTH
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_request_is_invalid_and_the_next_parses(
    short_tmp: Path, number: int, data: bytes
) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        assert [kind for kind, _ in await client.option(number, data)] == [INVALID]
        assert await names(client, number, BASE) == [BASE]


@BOTH
async def test_unknown_export_is_unknown(short_tmp: Path, number: int) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        assert await client.outcome(number, meta(b"nowhere", BASE)) == UNKNOWN
        assert await client.is_haggling()


@BOTH
async def test_too_many_queries_are_too_big(short_tmp: Path, number: int) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.option(STRUCTURED)
        assert await client.outcome(number, meta(b"disk", *[BASE] * 1025)) == TOO_BIG
        assert await client.outcome(number, meta(b"disk", *[BASE] * 1024)) == ACK


async def test_list_is_answered_without_structured_replies(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await names(client, LIST_META, b"base:") == [BASE]
        assert await client.outcome(SET_META, meta(b"disk", BASE)) == INVALID
