"""Refcount blocks of a qcow2 image: how often each host cluster is used.

A block is held as an array with one number per cluster, whatever the width on disk; widths below a
byte are spread out to bytes.
"""

from __future__ import annotations

import sys
from array import array
from typing import Final

Counts = array

_TYPES: Final = ("B", "B", "B", "B", "H", "I", "Q")  # by refcount order

assert [array(code).itemsize for code in "BHIQ"] == [1, 2, 4, 8]


def block_bits(cluster_bits: int, order: int) -> int:
    """Return the bits of how many clusters a block tells of."""
    return cluster_bits + 3 - order


def new_block(cluster_bits: int, order: int) -> Counts[int]:
    """Return the counts of a block of zeroes."""
    return zeroes(1 << block_bits(cluster_bits, order), order)


def zeroes(count: int, order: int) -> Counts[int]:
    """Return so many counts of zero."""
    kind = _TYPES[order]
    return array(kind, bytes(count * array(kind).itemsize))


def ones(count: int, order: int) -> Counts[int]:
    """Return so many counts of one."""
    return array(_TYPES[order], (1,)) * count


def from_numbers(numbers: list[int], count: int, order: int) -> Counts[int]:
    """Return `count` counts, of which the first are given and the rest are zero."""
    return array(_TYPES[order], numbers) + zeroes(count - len(numbers), order)


def load_counts(data: bytes | bytearray | memoryview, order: int) -> Counts[int]:
    """Return the counts of a block, or of a piece of it, as it is stored."""
    if order < 3:
        bits, per_byte = 1 << order, 8 >> order
        # The value in each byte that every `per_byte`th count has, all bytes in one big number.
        mask = int.from_bytes(bytes((((1 << bits) - 1),)) * len(data), "little")
        packed = int.from_bytes(data, "little")
        spread = bytearray(len(data) * per_byte)
        for place in range(per_byte):
            spread[place::per_byte] = (packed >> (place * bits) & mask).to_bytes(
                len(data), "little"
            )
        return array("B", bytes(spread))
    counts = array(_TYPES[order])
    counts.frombytes(data)
    if sys.byteorder == "little":
        counts.byteswap()
    return counts


def dump_counts(counts: Counts[int], order: int) -> bytes:
    """Return the bytes of a block, or of a slice of it that fills whole bytes."""
    if order < 3:
        bits, per_byte = 1 << order, 8 >> order
        spread = counts.tobytes()
        length = len(spread) // per_byte
        packed = 0
        for place in range(per_byte):
            packed |= int.from_bytes(spread[place::per_byte], "little") << (place * bits)
        return packed.to_bytes(length, "little")
    if sys.byteorder == "little":
        counts = counts[:]
        counts.byteswap()
    return counts.tobytes()


def free_run(counts: Counts[int], start: int, most: int) -> tuple[int, int]:
    """Return (first, length) of the first free clusters from `start` on; length 0: there are none.

    Args:
        counts: Of a block.
        start: Index to begin at.
        most: Longest run that is wanted.
    """
    try:
        first = counts.index(0, start)
    except ValueError:
        return len(counts), 0
    length = 1
    while length < most and first + length < len(counts) and not counts[first + length]:
        length += 1
    return first, length
