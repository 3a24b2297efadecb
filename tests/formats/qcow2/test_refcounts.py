"""Refcount blocks."""

from __future__ import annotations

import random

import pytest

from nbdfleece.formats.qcow2 import refcounts


@pytest.mark.parametrize("order", range(7))
def test_counts_survive_loading_and_dumping(order: int, rng: random.Random) -> None:
    data = rng.randbytes(512)
    counts = refcounts.load_counts(data, order)
    assert len(counts) == 512 * 8 >> order
    assert refcounts.dump_counts(counts, order) == data


@pytest.mark.parametrize("order", range(7))
def test_a_count_lies_where_the_document_says(order: int) -> None:
    bits = 1 << order
    counts = refcounts.new_block(9, order)
    counts[5] = (1 << bits) - 1
    data = refcounts.dump_counts(counts, order)
    if order >= 3:
        width = bits // 8
        assert data[5 * width : 6 * width] == b"\xff" * width
        assert data.count(0xFF) == width
    else:
        assert int.from_bytes(data, "little") == ((1 << bits) - 1) << (5 * bits)


def test_free_clusters_are_found() -> None:
    counts = refcounts.load_counts(bytes([1, 0, 0, 2, 0, 0, 0, 1]), 3)
    assert refcounts.free_run(counts, 0, 8) == (1, 2)
    assert refcounts.free_run(counts, 3, 2) == (4, 2)
    assert refcounts.free_run(counts, 5, 8) == (5, 2)
    assert refcounts.free_run(counts, 7, 1) == (8, 0)
