"""The file of a bitmap: bytes and what they mean."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace

import pytest

from nbdfleece.formats.bitmap_file import (
    HEADER_SIZE,
    VERSION,
    BodySum,
    Header,
    UnknownVersion,
    judge,
    unpack,
)

BOOT, OTHER_BOOT = b"b" * 16, b"B" * 16
DISK, OTHER_DISK = b"d" * 32, b"D" * 32

HEADER = Header(
    name="nightly",
    granularity=4096,
    size=10_000,
    identity=DISK,
    boot_id=BOOT,
    recording=True,
    mtime_ns=500,
)
CLEAN = replace(HEADER, clean=True)


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        replace(CLEAN, body_crc=0xFFFFFFFF, mtime_ns=2**63),
        replace(HEADER, recording=False, all_dirty=True, granularity=1 << 31, size=2**63),
        replace(HEADER, name="é/../" + "x" * 1000),
        HEADER.broke("the disk is not the one that it was made for"),
    ],
)
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_SIZE
    assert unpack(packed) == header


def test_the_bytes_of_a_header() -> None:
    packed = HEADER.pack()
    assert packed[:12] == b"NBDFLBMP" + struct.pack("<I", VERSION)
    unsummed = packed[:12] + bytes(4) + packed[16:]
    assert struct.unpack_from("<I", packed, 12) == (zlib.crc32(unsummed),)
    assert struct.unpack_from("<IIQ", packed, 16) == (2, 4096, 10_000)
    assert packed[32:80] == BOOT + DISK
    assert struct.unpack_from("<QIHH", packed, 80) == (500, 0, 7, 0)
    assert packed[96:103] == b"nightly"
    assert not any(packed[103:])


def test_any_damage_is_seen(rng: random.Random) -> None:
    packed = HEADER.pack()
    for at in [*range(120), *(rng.randrange(HEADER_SIZE) for _ in range(100))]:
        if 8 <= at < 12:
            continue  # the version
        damaged = bytearray(packed)
        damaged[at] ^= 1 << rng.randrange(8)
        assert unpack(bytes(damaged)) is None, at
    for cut in (0, 1, 100, HEADER_SIZE - 1):
        assert unpack(packed[:cut]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        replace(HEADER, granularity=256),
        replace(HEADER, granularity=5000),
        replace(HEADER, name=""),
        replace(HEADER, name="x" * 1024),
    ],
)
def test_a_whole_header_that_makes_no_sense_is_damaged(wrong: Header) -> None:
    assert unpack(wrong.pack()) is None


def test_another_version_is_not_touched() -> None:
    packed = bytearray(HEADER.pack())
    packed[8] = 7
    with pytest.raises(UnknownVersion, match="is of version 7, and only 1 is known"):
        unpack(bytes(packed))


@pytest.mark.parametrize(
    ("header", "now", "why"),
    [
        (HEADER, {}, None),
        (CLEAN, {}, None),
        (CLEAN, {"boot_id": OTHER_BOOT}, None),
        (HEADER, {"boot_id": OTHER_BOOT}, "the machine stopped while it was in use"),
        (CLEAN, {"mtime_ns": 499}, "the disk was changed while it was not served"),
        (CLEAN, {"mtime_ns": 501}, "the disk was changed while it was not served"),
        (HEADER, {"mtime_ns": 499}, None),
        (HEADER, {"mtime_ns": 501}, "the disk was changed while it was not served"),
        (HEADER, {"mtime_ns": 0}, None),
        (CLEAN, {"size": 9999}, "the disk has 9999 bytes, and had 10000"),
        (CLEAN, {"identity": OTHER_DISK}, "the disk is not the one that it was made for"),
        (HEADER.broke("why"), {}, "why"),
    ],
)
def test_what_cannot_be_trusted_says_why(
    header: Header, now: dict[str, object], why: str | None
) -> None:
    facts = {"size": 10_000, "identity": DISK, "boot_id": BOOT, "mtime_ns": 500, **now}
    assert judge(header, **facts) == why  # type: ignore[arg-type]


def test_a_sum_is_of_what_is_dirty_and_where() -> None:
    def total(*parts: tuple[int, bytes]) -> int:
        found = BodySum()
        for first, states in parts:
            found.add(first, states)
        return found.crc

    one = (0, b"\0\1")
    assert total(one) == total((5, bytes(100)), one, (9, bytes(3)))
    assert len({total(), total(one), total((16384, b"\0\1")), total((0, b"\1\0"))}) == 4
