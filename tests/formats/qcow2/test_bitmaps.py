"""Bitmaps in an image: what qemu-img has written, what we write, and what is refused."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2.bitmaps import (
    ALL_CLEAR,
    ALL_SET,
    Entry,
    Extension,
    bits_length,
    encode_directory,
    encode_extension,
    encode_table,
    parse_directory,
    parse_extension,
    parse_table,
    table_entries,
)
from nbdfleece.formats.qcow2.header import EXT_BITMAPS, parse_header

CLUSTER = 65536
SIZE = 1 << 30
PLAIN = Entry("b", 16, CLUSTER, 1)


def extension_of(image: bytes) -> bytes:
    """The data of the bitmaps extension in the header of an image."""
    data = parse_header(image[:CLUSTER]).extension(EXT_BITMAPS)
    assert data is not None
    return data


@pytest.mark.interop("qemu-img", "qemu-io")
def test_bitmaps_made_by_qemu_img_are_understood_and_encoded_the_same(
    tmp_path: Path, program: Callable[[str], str]
) -> None:
    path = tmp_path / "image"

    def qemu_img(*arguments: object) -> None:
        subprocess.run([program("qemu-img"), *map(str, arguments)], check=True, stdout=-3)

    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    qemu_img("bitmap", "--add", "-g", 512, path, "fine")
    qemu_img("bitmap", "--add", "--disable", path, "still")
    qemu_io = [program("qemu-io"), "-f", "qcow2", "-c", "write 3M 64k", str(path)]
    subprocess.run(qemu_io, check=True, stdout=-3)
    image = path.read_bytes()
    extension = parse_extension(extension_of(image), CLUSTER)
    assert encode_extension(extension) == extension_of(image)
    directory = image[extension.offset :][: extension.size]
    entries = parse_directory(directory, extension.count, CLUSTER, SIZE)
    by_name = {entry.name: entry for entry in entries}
    assert sorted(by_name) == ["fine", "still"]
    assert encode_directory(entries) == directory
    fine, still = by_name["fine"], by_name["still"]
    assert (fine.granularity_bits, fine.auto, fine.in_use) == (9, True, False)
    assert (still.granularity_bits, still.auto, still.in_use) == (16, False, False)
    assert fine.table_entries == table_entries(SIZE, 9, CLUSTER)
    raw = image[fine.table_offset :][: fine.table_entries * 8]
    table = parse_table(raw, CLUSTER)
    assert encode_table(table) == raw
    assert [entry > ALL_SET for entry in table] == [True, False, False, False]
    bits = int.from_bytes(image[table[0] :][:CLUSTER], "little")
    assert bits == ((1 << 128) - 1) << (3 << 20 >> 9)
    assert list(parse_table(image[still.table_offset :][:8], CLUSTER)) == [ALL_CLEAR]


def test_what_was_encoded_is_parsed_the_same(rng: random.Random) -> None:
    for _ in range(200):
        entries = [random_entry(rng, index) for index in range(rng.randrange(1, 6))]
        data = encode_directory(entries)
        assert parse_directory(data, len(entries), CLUSTER, SIZE) == entries
        extension = Extension(len(entries), len(data), rng.randrange(1, 99) * CLUSTER)
        assert parse_extension(encode_extension(extension), CLUSTER) == extension


def random_entry(rng: random.Random, index: int) -> Entry:
    bits = rng.randrange(9, 32)
    return Entry(
        name=f"{index}" + rng.choice(["", "ö", "\udc80", "long" * 200]),
        granularity_bits=bits,
        table_offset=rng.randrange(1, 1000) * CLUSTER,
        table_entries=table_entries(SIZE, bits, CLUSTER),
        in_use=rng.random() < 0.5,
        auto=rng.random() < 0.5,
        extra_compatible=rng.random() < 0.5,
        extra=rng.randbytes(rng.choice([0, 0, 5, 8])),
    )


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (replace(PLAIN, granularity_bits=8), "granularity"),
        (replace(PLAIN, granularity_bits=32), "granularity"),
        (replace(PLAIN, table_offset=0), "table at 0x0"),
        (replace(PLAIN, table_offset=CLUSTER + 8), "table at"),
        (replace(PLAIN, table_offset=1 << 63), "table at"),
        (replace(PLAIN, table_entries=0), "table of 0"),
        (replace(PLAIN, table_entries=8193), "table of 8193"),
        (replace(PLAIN, granularity_bits=9), "too small for the disk"),
    ],
)
def test_an_entry_out_of_bounds_is_refused(entry: Entry, complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        parse_directory(encode_directory([entry]), 1, CLUSTER, SIZE)


def test_a_table_of_before_a_resize_is_borne_while_the_bitmap_is_in_use() -> None:
    entry = replace(PLAIN, granularity_bits=9, in_use=True)
    assert parse_directory(encode_directory([entry]), 1, CLUSTER, SIZE) == [entry]


def test_unknown_flags_and_types_are_refused() -> None:
    data = bytearray(encode_directory([PLAIN]))
    data[15] |= 8
    with pytest.raises(ImageError, match=r"unknown flags \(0x8\)"):
        parse_directory(bytes(data), 1, CLUSTER, SIZE)
    data = bytearray(encode_directory([PLAIN]))
    data[16] = 2
    with pytest.raises(ImageError, match="unknown type 2"):
        parse_directory(bytes(data), 1, CLUSTER, SIZE)


def test_extra_data_makes_a_bitmap_unusable_unless_it_says_otherwise() -> None:
    assert PLAIN.usable
    assert not replace(PLAIN, extra=b"x").usable
    assert replace(PLAIN, extra=b"x", extra_compatible=True).usable


def test_a_directory_holds_what_the_extension_says() -> None:
    two = encode_directory([PLAIN, replace(PLAIN, name="c")])
    with pytest.raises(ImageError, match="more than the extension says"):
        parse_directory(two, 1, CLUSTER, SIZE)
    with pytest.raises(ImageError, match="holds 2 bitmaps instead of 3"):
        parse_directory(two, 3, CLUSTER, SIZE)
    with pytest.raises(ImageError, match="ends within"):
        parse_directory(two[:-1], 2, CLUSTER, SIZE)
    with pytest.raises(ImageError, match="same name"):
        parse_directory(encode_directory([PLAIN, PLAIN]), 2, CLUSTER, SIZE)
    with pytest.raises(ImageError, match="0 bytes"):
        encode_directory([replace(PLAIN, name="")])


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">IIQ", 1, 0, 32),
        struct.pack(">IIQQ", 0, 0, 32, CLUSTER),
        struct.pack(">IIQQ", 65536, 0, 65536 * 32, CLUSTER),
        struct.pack(">IIQQ", 1, 1, 32, CLUSTER),
        struct.pack(">IIQQ", 2, 0, 32, CLUSTER),
        struct.pack(">IIQQ", 1, 0, 1 << 40, CLUSTER),
        struct.pack(">IIQQ", 1, 0, 32, CLUSTER + 8),
        struct.pack(">IIQQ", 1, 0, 32, 0),
    ],
)
def test_an_extension_out_of_bounds_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="bitmaps_ext"):
        parse_extension(data, CLUSTER)


@pytest.mark.parametrize("entry", [2, 512, CLUSTER + 1, 1 << 56 | CLUSTER, 1 << 63, CLUSTER + 512])
def test_a_table_entry_that_is_no_cluster_is_refused(entry: int) -> None:
    assert list(parse_table(encode_table([0, 1, CLUSTER]), CLUSTER)) == [0, 1, CLUSTER]
    with pytest.raises(ImageError, match="'x' has a table"):
        parse_table(encode_table([0, entry]), CLUSTER, "x")


def test_a_directory_of_rubbish_gives_entries_or_an_image_error(rng: random.Random) -> None:
    good = encode_directory([random_entry(rng, index) for index in range(3)])
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        try:
            found = parse_directory(bytes(data), 3, CLUSTER, SIZE)
        except ImageError:
            continue
        assert len(found) == 3


def test_bits_are_counted_up_to_whole_bytes() -> None:
    assert bits_length(1, 9) == 1
    assert bits_length(512 * 8 + 1, 9) == 2
    assert table_entries(0, 9, 512) == 1
    assert table_entries(512 * 8 * 512, 9, 512) == 1
    assert table_entries(512 * 8 * 512 + 1, 9, 512) == 2
