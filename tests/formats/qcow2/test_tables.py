"""L2 tables."""

from __future__ import annotations

import random
from array import array

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2 import tables as t

PLAIN = t.Geometry(12, is_extended=False, has_zero_flag=True, has_data_file=False)
EXTENDED = t.Geometry(14, is_extended=True, has_zero_flag=True, has_data_file=False)
C = PLAIN.cluster_size


def table(*entries: int) -> array[int]:
    return array("Q", [*entries, *([0] * ((1 << PLAIN.l2_bits) - len(entries)))])


def runs(entries: array[int], geometry: t.Geometry, length: int) -> list[tuple[int, int, int]]:
    found, offset = [], 0
    while offset < length:
        run = t.find_run(entries, geometry, offset, length - offset)
        assert run.length > 0
        found.append((run.kind, run.length, run.host))
        offset += run.length
    return found


def test_runs_are_of_one_kind_and_contiguous() -> None:
    entries = table(
        5 * C | t.COPIED,
        6 * C | t.COPIED,
        8 * C | t.COPIED,
        9 * C,
        1,
        1,
        0,
        20 * C | 1 | t.COPIED,
        t.COMPRESSED_FLAG | 12345,
    )
    assert runs(entries, PLAIN, 10 * C) == [
        (t.DATA, 2 * C, 5 * C),
        (t.DATA, C, 8 * C),
        (t.DATA, C, 9 * C),
        (t.ZERO_PLAIN, 2 * C, 0),
        (t.UNALLOCATED, C, 0),
        (t.ZERO_HOST, C, 20 * C),
        (t.COMPRESSED, C, t.COMPRESSED_FLAG | 12345),
        (t.UNALLOCATED, C, 0),
    ]
    assert t.find_run(entries, PLAIN, 100, 5000) == t.Run(t.DATA, 5000, 5 * C + 100, True)
    assert t.find_run(entries, PLAIN, 3 * C + 1, C) == t.Run(t.DATA, C - 1, 9 * C + 1, False)


def test_subclusters_are_told_apart(rng: random.Random) -> None:
    size = EXTENDED.cluster_size
    sub = size // 32
    for _ in range(200):
        entries, expected = array("Q"), []
        for cluster in range(4):
            has_host = rng.random() < 0.7
            host = (cluster + 2) * size if has_host else 0
            kinds = [
                rng.choice([t.UNALLOCATED, t.ZERO_PLAIN, t.DATA])
                if rng.random() < 0.3 or not unit
                else None
                for unit in range(32)
            ]
            bitmap = 0
            last = t.UNALLOCATED
            for unit, choice in enumerate(kinds):
                last = last if choice is None else choice
                if last == t.DATA and not has_host:
                    last = t.UNALLOCATED
                if last == t.DATA:
                    bitmap |= 1 << unit
                elif last == t.ZERO_PLAIN:
                    bitmap |= 1 << (unit + 32)
                kind = t.ZERO_HOST if last == t.ZERO_PLAIN and has_host else last
                expected.append((kind, host + unit * sub))
            entries.extend([host | t.COPIED if has_host else 0, bitmap])
        entries.extend([0] * (2 * (1 << EXTENDED.l2_bits) - len(entries)))
        offset = 0
        while offset < 4 * size:
            run = t.find_run(entries, EXTENDED, offset, 4 * size - offset)
            for at in range(offset, offset + run.length, sub):
                kind, host = expected[at // sub]
                assert run.kind == kind
                if kind in (t.DATA, t.ZERO_HOST):
                    assert run.host + at - offset == host
            offset += run.length


def test_the_usual_case_says_what_a_run_says() -> None:
    entries = table(5 * C | t.COPIED, 6 * C, 1, 7 * C | 1, t.COMPRESSED_FLAG | 12345, 513)
    for cluster in range(7):
        for inside, length in ((0, 1), (7, C - 7), (1, C)):
            host = t.plain_host(entries, PLAIN, cluster * C + inside, length)
            if host < 0:
                assert cluster > 1 or length + inside > C
            else:
                run = t.find_run(entries, PLAIN, cluster * C + inside, length)
                assert (run.kind, run.host, run.length) == (t.DATA, host, length)
    assert t.plain_host(array("Q", [5 * EXTENDED.cluster_size, 1]), EXTENDED, 0, 1) == -1


@pytest.mark.parametrize("entry", [513 | t.COPIED, 512])
def test_unaligned_clusters_are_an_error(entry: int) -> None:
    with pytest.raises(ImageError, match="unaligned"):
        t.find_run(table(entry), PLAIN, 0, 1)
    with pytest.raises(ImageError, match="unaligned"):
        t.table_offset(entry, 12)


def test_impossible_entries_are_errors() -> None:
    version_2 = t.Geometry(12, is_extended=False, has_zero_flag=False, has_data_file=False)
    with pytest.raises(ImageError, match="version 2"):
        t.find_run(table(1), version_2, 0, 1)
    with_data_file = t.Geometry(12, is_extended=False, has_zero_flag=True, has_data_file=True)
    assert t.find_run(table(t.COPIED), with_data_file, 0, 1).kind == t.DATA
    with pytest.raises(ImageError, match="external data file"):
        t.find_run(table(t.COMPRESSED_FLAG), with_data_file, 0, 1)
    for entry, bitmap in ((1 << 14, 1 << 32 | 1), (0, 1)):
        with pytest.raises(ImageError, match="bitmap"):
            t.find_run(array("Q", [entry, bitmap]), EXTENDED, 0, 1)


def test_a_compressed_cluster_tells_its_bytes() -> None:
    entry = t.COMPRESSED_FLAG | 2 << (62 - 8) | 0x1234
    assert t.compressed_range(entry, 16) == (0x1234, 3 * 512 - 0x1234 % 512)


def test_tables_are_stored_big_endian() -> None:
    assert t.dump_entries(array("Q", [1, 2 << 32])) == bytes(
        [*([0] * 7), 1, 0, 0, 0, 2, 0, 0, 0, 0]
    )
    assert t.load_entries(bytes([*([0] * 7), 1])) == array("Q", [1])
