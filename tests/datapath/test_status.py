"""The extents of a BLOCK_STATUS reply."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdfleece.base.extent import Extent
from nbdfleece.base.limits import MAX_STATUS_EXTENTS
from nbdfleece.datapath.replies import StructuredReplies
from nbdfleece.datapath.route import StatusFunction
from nbdfleece.datapath.status import block_status, memory_needed
from nbdfleece.datapath.step import background
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client_replies import ReplyParser

GIB = 1 << 30


def every(cut: int, flags: int = 2) -> StatusFunction:
    """Extents of `cut` bytes, of `flags` kinds in turn, one per call."""

    async def status(offset: int, length: int) -> list[Extent]:
        return [Extent(offset, min(length, cut - offset % cut), offset // cut % flags)]

    return status


async def ask(
    functions: list[StatusFunction], offset: int, length: int, *, one: bool = False
) -> list[list[tuple[int, int]]]:
    """Return the (length, flags) of each context, as a client reads them."""
    request = (c.NBD_CMD_FLAG_REQ_ONE if one else 0, c.NBD_CMD_BLOCK_STATUS, 5, offset, length)
    contexts = list(enumerate(functions))
    reply = await background(block_status(StructuredReplies(), request, contexts, length))
    parser = ReplyParser(structured=True, contexts=range(len(functions)))
    parser.expect(5, c.NBD_CMD_BLOCK_STATUS, offset=offset, length=length)
    (parsed,) = parser.feed(reply)
    return [parsed.status[context] for context, _ in contexts]


async def test_neighbours_of_one_kind_are_one_extent() -> None:
    assert await ask([every(4096, 1)], 100, 1_000_000) == [[(1_000_000, 0)]]
    assert await ask([every(4096)], 100, 8192) == [[(3996, 0), (4096, 1), (100, 0)]]


async def test_one_extent_is_as_long_as_it_can_be() -> None:
    async def status(offset: int, length: int) -> list[Extent]:
        return [Extent(offset, min(length, 1000), 0 if offset < 50_000 else 1)]

    assert await ask([status], 0, 100_000, one=True) == [[(50_000, 0)]]


async def test_who_asks_for_one_extent_does_not_pay_for_those_behind_it() -> None:
    looked: list[int] = []

    async def status(offset: int, length: int) -> list[Extent]:
        looked.append(length)
        return [
            Extent(at, min(4096, offset + length - at), at // 4096 % 2)
            for at in range(offset, offset + length, 4096)
        ]

    assert await ask([status], 0, GIB, one=True) == [[(4096, 0)]]
    assert sum(looked) <= 64 << 10
    looked.clear()

    async def uniform(offset: int, length: int) -> list[Extent]:
        looked.append(length)
        return [Extent(offset, length, 0)]

    assert await ask([uniform], 0, GIB, one=True) == [[(GIB, 0)]]
    assert len(looked) <= 6


async def test_an_extent_that_leaves_the_request_is_cut() -> None:
    async def status(offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length + 5000, 1)]

    assert await ask([status], 10, 20) == [[(20, 1)]]


async def test_all_contexts_tell_of_the_same_range(rng: random.Random) -> None:
    for _ in range(50):
        functions = [every(rng.randrange(1, 5000)) for _ in range(3)]
        offset, length = rng.randrange(10_000), rng.randrange(1, 100_000)
        one = rng.random() < 0.5
        replies = await ask(functions, offset, length, one=one)
        told = {sum(extent for extent, _ in extents) for extents in replies}
        assert len(told) == 1
        assert one or told == {length}
        assert not one or {len(extents) for extents in replies} == {1}
        assert all(extent for extents in replies for extent, _ in extents)


@pytest.mark.parametrize("kinds", [1, 2], ids=["all alike", "alternating"])
@pytest.mark.parametrize("one", [False, True])
async def test_the_work_for_one_request_is_bounded_and_lets_others_go_on(
    kinds: int, one: bool
) -> None:
    """However finely the disk is cut: what is left out, the client asks for again."""
    calls = 0

    async def status(offset: int, length: int) -> list[Extent]:
        nonlocal calls
        calls += 1
        return [Extent(offset, 1, offset % kinds)]

    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(turn)

    turn()
    (extents,) = await ask([status], 0, GIB, one=one)
    assert calls <= MAX_STATUS_EXTENTS + 1
    assert 0 < sum(extent for extent, _ in extents) <= MAX_STATUS_EXTENTS
    assert len(extents) == (1 if one or kinds == 1 else MAX_STATUS_EXTENTS)
    assert turns > 20 or (one and kinds == 2)


def test_memory_is_reckoned_by_what_a_request_may_ask_for() -> None:
    assert memory_needed(2**63, 1, one=True) < 1000
    assert memory_needed(4096, 1, one=False) < 10_000
    most = memory_needed(2**63, 1, one=False)
    assert most == memory_needed(GIB, 1, one=False) < 32 << 20
    assert memory_needed(GIB, 3, one=False) == 3 * most
