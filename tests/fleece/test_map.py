"""Layers of extents put together."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.fleece.map import DIRTY, GONE, SAVED, map_node, overlay
from tests.support.fleecing import file_driver, start_fleecing, temp_driver


def test_extents_get_the_flags_of_all_layers() -> None:
    status = [Extent(10, 10, HOLE | ZERO), Extent(20, 30, 0)]
    held = [Extent(10, 15, 0), Extent(25, 25, SAVED)]
    bitmap = [Extent(10, 20, DIRTY), Extent(30, 20, 0)]
    assert overlay([status, held, bitmap]) == [
        Extent(10, 10, HOLE | ZERO | DIRTY),
        Extent(20, 5, DIRTY),
        Extent(25, 5, SAVED | DIRTY),
        Extent(30, 20, SAVED),
    ]


def test_the_shortest_layer_ends_it_and_equal_neighbours_are_joined() -> None:
    assert overlay([[Extent(0, 4, 0), Extent(4, 4, 0)], [Extent(0, 6, DIRTY)]]) == [
        Extent(0, 6, DIRTY)
    ]


def test_random_layers_agree_with_a_byte_for_byte_union(rng: random.Random) -> None:
    def layer(flag: int) -> list[Extent]:
        cuts = sorted({0, 200, *(rng.randrange(200) for _ in range(12))})
        return [
            Extent(start, stop - start, rng.choice((0, flag))) for start, stop in pairwise(cuts)
        ]

    for _ in range(100):
        layers = [layer(1), layer(4), layer(8)]
        plain = [0] * 200
        for extents in layers:
            for offset, length, flags in extents:
                for index in range(offset, offset + length):
                    plain[index] |= flags
        found = overlay(layers)
        assert [extent.flags for extent in found for _ in range(extent.length)] == plain
        assert all(one.flags != two.flags for one, two in pairwise(found))


async def test_a_snapshot_shows_what_is_saved_and_what_its_reader_has_given_up(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\1" * 65536)
    temp = temp_driver(tmp_path / "temp", 65536)
    fleecing = await start_fleecing(file_driver(disk), temp, CopyBeforeWrite())
    try:
        await fleecing.cbw.write(8192, memoryview(b"\2" * 4096), fua=False)
        await fleecing.access.discard(32768, 32768)
        found = await map_node(fleecing.access, fleecing.filter, None, 4096)
    finally:
        await fleecing.close()
    assert (found.size, found.end) == (65536, 65536)
    assert found.extents == [
        Extent(4096, 4096, DATA),
        Extent(8192, 4096, SAVED),
        Extent(12288, 20480, DATA),
        Extent(32768, 32768, GONE | HOLE),
    ]
