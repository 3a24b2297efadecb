"""Requests without payload and data, on a node that writes down what it is asked."""

from __future__ import annotations

import pytest

from nbdfleece.base.limits import MAX_CACHE, READ_PIECE
from nbdfleece.datapath.step import background
from nbdfleece.datapath.verbs import carry_out
from nbdfleece.protocol.nbd import constants as c


class Notes:
    """A node that does nothing."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def read(self, offset: int, view: memoryview) -> None:
        self.asked.append(("read", offset, len(view)))

    async def flush(self) -> None:
        self.asked.append("flush")

    async def discard(self, offset: int, length: int) -> None:
        self.asked.append(("discard", offset, length))

    async def write_zeroes(self, offset: int, length: int, **how: bool) -> None:
        self.asked.append(
            ("zeroes", offset, length, {name for name, value in how.items() if value})
        )


async def asked(
    command: int, flags: int = 0, length: int = 100, go_on=lambda: True
) -> list[object]:
    node = Notes()
    await background(carry_out(node, (flags, command, 1, 10, length), go_on))  # type: ignore
    return node.asked


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        (c.NBD_CMD_FLUSH, 0, ["flush"]),
        (c.NBD_CMD_TRIM, 0, [("discard", 10, 100)]),
        (c.NBD_CMD_TRIM, c.NBD_CMD_FLAG_FUA, [("discard", 10, 100), "flush"]),
        (c.NBD_CMD_WRITE_ZEROES, 0, [("zeroes", 10, 100, {"may_unmap"})]),
        (c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_FLAG_NO_HOLE, [("zeroes", 10, 100, set())]),
        (
            c.NBD_CMD_WRITE_ZEROES,
            c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_FAST_ZERO,
            [("zeroes", 10, 100, {"fua", "may_unmap", "no_fallback"})],
        ),
        (c.NBD_CMD_CACHE, 0, [("read", 10, 100)]),
    ],
)
async def test_each_command_is_its_verb(command: int, flags: int, expected: list[object]) -> None:
    assert await asked(command, flags) == expected


async def test_a_cache_reads_all_of_its_range_in_pieces() -> None:
    reads = await asked(c.NBD_CMD_CACHE, length=3 * READ_PIECE + 1)
    assert [length for _, _, length in reads] == [READ_PIECE] * 3 + [1]  # type: ignore[misc]


async def test_caches_in_flight_take_no_memory_each() -> None:
    class Held(Notes):
        async def read(self, offset: int, view: memoryview) -> None:
            self.asked.append(view.obj)

    node = Held()
    for cookie in range(128):
        request = (0, c.NBD_CMD_CACHE, cookie, 0, READ_PIECE)
        await background(carry_out(node, request, lambda: True))  # type: ignore[arg-type]
    assert len({id(memory) for memory in node.asked}) == 1


async def test_a_cache_of_a_whole_disk_reads_no_more_than_one_of_32_bits_could() -> None:
    reads = await asked(c.NBD_CMD_CACHE, length=2**60)
    assert sum(length for _, _, length in reads) == MAX_CACHE  # type: ignore[misc]


async def test_a_cache_ends_when_somebody_waits_for_it() -> None:
    """It may be as long as the disk, and a drain must not take hours."""
    answers = iter([True, True, False])
    reads = await asked(c.NBD_CMD_CACHE, length=2**60, go_on=lambda: next(answers))
    assert len(reads) == 2
