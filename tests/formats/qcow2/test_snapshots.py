"""The snapshot table: what qemu-img has written, what we write, and what is refused."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import MAX_QCOW2_SNAPSHOT_EXTRA, MAX_QCOW2_SNAPSHOTS
from nbdfleece.formats.qcow2.snapshots import (
    Snapshot,
    TableEndsError,
    encode_table,
    find,
    new_id,
    parse_table,
)

CLUSTER = 65536
PLAIN = Snapshot("1", "one", 3 * CLUSTER, 1, date_s=1_700_000_000, disk_size=1 << 30)


def table_of(image: Path) -> tuple[bytes, int]:
    """The bytes from the table on, and how many entries the header tells of."""
    data = image.read_bytes()
    count, offset = struct.unpack_from(">IQ", data, 60)
    return data[offset:], count


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.interop("qemu-img")
def test_a_table_made_by_qemu_img_is_understood_and_encoded_the_same(
    tmp_path: Path, program: Callable[[str], str], compat: str
) -> None:
    image = tmp_path / "image"

    def qemu_img(*arguments: object) -> None:
        subprocess.run([program("qemu-img"), *map(str, arguments)], check=True, stdout=-3)

    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", image, 5 << 20)
    names = ["first", "snö", "x" * 200]
    for name in names:
        qemu_img("snapshot", "-c", name, image)
    data, count = table_of(image)
    found = parse_table(data, count, CLUSTER)
    assert [snapshot.name for snapshot in found] == names
    assert [snapshot.id for snapshot in found] == ["1", "2", "3"]
    assert {snapshot.disk_size for snapshot in found} == {5 << 20}
    assert all(snapshot.l1_entries == 1 and snapshot.date_s > 1e9 for snapshot in found)
    encoded = encode_table(found)
    # The last entry's padding is behind the end of the file.
    assert encoded == (data + bytes(7))[: len(encoded)]


def test_what_was_encoded_is_parsed_the_same(rng: random.Random) -> None:
    for _ in range(200):
        snapshots = [random_snapshot(rng) for _ in range(rng.randrange(5))]
        data = encode_table(snapshots)
        assert parse_table(data + b"behind", len(snapshots), 512) == snapshots


def random_snapshot(rng: random.Random) -> Snapshot:
    extra = rng.choice([0, 8, 16, 24, rng.randrange(100)])
    known = min(extra // 8, 3)
    return Snapshot(
        id=str(rng.randrange(1000)),
        name=rng.choice(["", "a", "\udc80 no utf-8", "long" * 100]),
        l1_offset=rng.randrange(1000) * 512,
        l1_entries=rng.randrange(1000),
        date_s=rng.randrange(1 << 32),
        date_ns=rng.randrange(10**9),
        clock_ns=rng.randrange(1 << 64),
        state_size=rng.randrange(1 << (33 if known else 32)),
        disk_size=rng.randrange(1 << 63) if known >= 2 else None,
        instructions=rng.choice([None, 5]) if known == 3 else None,
        extra_length=extra,
        unknown=rng.randbytes(extra - known * 8),
    )


def test_a_table_that_ends_too_early_is_refused() -> None:
    data = encode_table([PLAIN])
    for length in range(len(data) - 8):
        with pytest.raises(TableEndsError, match="ends within entry 0"):
            parse_table(data[:length], 1, CLUSTER)


def test_more_than_the_bounds_is_refused() -> None:
    with pytest.raises(ImageError, match="too many snapshots"):
        parse_table(b"", MAX_QCOW2_SNAPSHOTS + 1, CLUSTER)
    extra = replace(
        PLAIN,
        extra_length=MAX_QCOW2_SNAPSHOT_EXTRA + 1,
        unknown=bytes(MAX_QCOW2_SNAPSHOT_EXTRA - 23),
    )
    with pytest.raises(ImageError, match="too much extra data"):
        parse_table(encode_table([extra]), 1, CLUSTER)
    with pytest.raises(ImageError, match="L1 table is too large"):
        parse_table(encode_table([replace(PLAIN, l1_entries=(4 << 20) + 1)]), 1, CLUSTER)
    with pytest.raises(ImageError, match="not aligned"):
        parse_table(encode_table([replace(PLAIN, l1_offset=CLUSTER + 512)]), 1, CLUSTER)
    long = [replace(PLAIN, name="x" * 65535)] * 1025
    with pytest.raises(ImageError, match="too long"):
        encode_table(long)
    with pytest.raises(ImageError, match="is too long"):
        encode_table([replace(PLAIN, name="x" * 65536)])


def test_a_table_of_rubbish_gives_snapshots_or_an_image_error(rng: random.Random) -> None:
    good = encode_table([random_snapshot(rng) for _ in range(3)])
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        try:
            found = parse_table(bytes(data), 3, 512)
        except ImageError:
            continue
        assert len(found) == 3


def test_an_id_goes_before_a_name() -> None:
    one, two = replace(PLAIN, id="1", name="2"), replace(PLAIN, id="2", name="b")
    assert find([one, two], "2") is two
    assert find([one, two], "b") is two
    assert find([one, two], "1") is one
    assert find([one, two], "c") is None


def test_a_new_id_is_above_all_numbers() -> None:
    assert new_id([]) == "1"
    assert new_id([PLAIN, replace(PLAIN, id="41"), replace(PLAIN, id="x99")]) == "42"
