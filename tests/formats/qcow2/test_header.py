"""The header of a qcow2 image."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2 import header as h

V3 = h.Header(
    version=3,
    cluster_bits=16,
    size=1 << 30,
    l1_size=2,
    l1_table_offset=3 << 16,
    refcount_table_offset=1 << 16,
    refcount_table_clusters=1,
)


def image(header: h.Header) -> bytes:
    return h.encode_header(header).ljust(header.cluster_size, b"\0")


@pytest.mark.parametrize(
    "header",
    [
        V3,
        replace(V3, version=2, header_length=h.LENGTH_V2),
        replace(V3, header_length=h.LENGTH_V3),
        replace(V3, header_length=h.LENGTH_NOW + 8, more=b"8 bytes."),
        replace(V3, backing_file="base.img").with_extension(h.EXT_BACKING_FORMAT, b"raw"),
        replace(V3, nb_snapshots=3, snapshots_offset=9 << 16),
        replace(V3, refcount_order=6, compatible=h.LAZY_REFCOUNTS, autoclear=1 << 40),
        replace(V3, incompatible=h.COMPRESSION | h.EXTENDED_L2, compression_type=h.ZSTD, l1_size=4),
        V3.with_extension(0x12345678, b"unknown, 15 byt").with_extension(1, b""),
    ],
)
def test_a_header_survives_encoding_and_parsing(header: h.Header) -> None:
    assert h.header_area(image(header)[: h.FIRST_READ]) == header.cluster_size
    assert h.parse_header(image(header)) == h.placed(header)
    assert h.encode_header(h.parse_header(image(header))) == h.encode_header(header)


def test_an_extension_is_replaced_in_its_place_added_and_removed() -> None:
    header = V3.with_extension(7, b"a").with_extension(8, b"b").with_extension(7, b"c")
    assert [extension.data for extension in header.extensions] == [b"c", b"b"]
    assert header.with_extension(7, None).extension(7) is None
    assert header.with_extension(7, None).extension(8) == b"b"


def test_an_unknown_incompatible_feature_is_refused_by_its_name() -> None:
    names = h.encode_feature_names((*h.FEATURE_NAMES, h.FeatureName(0, 9, "time travel")))
    header = replace(V3, incompatible=1 << 9).with_extension(h.EXT_FEATURE_NAMES, names)
    with pytest.raises(ImageError, match=r"time travel"):
        h.parse_header(image(header))
    with pytest.raises(ImageError, match=r"Unknown incompatible feature: 200"):
        h.parse_header(image(replace(V3, incompatible=1 << 9)))


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS"), (77, "method 77")])
def test_encryption_is_refused_by_name(method: int, name: str) -> None:
    data = bytearray(image(V3))
    struct.pack_into(">I", data, 32, method)
    with pytest.raises(ImageError, match=name):
        h.parse_header(bytes(data))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (replace(V3, l1_size=1), "L1 table is too small"),
        (replace(V3, l1_size=1 << 30), "Active L1 table too large"),
        (replace(V3, l1_table_offset=5), "Active L1 table offset"),
        (replace(V3, l1_table_offset=0), "Active L1 table offset"),
        (replace(V3, refcount_table_offset=1 << 63), "Reference count table offset"),
        (replace(V3, l1_table_offset=2 << 16, refcount_table_clusters=2), "L1 table overlaps"),
        (replace(V3, refcount_table_offset=3 << 16), "overlaps"),
        (replace(V3, nb_snapshots=1, snapshots_offset=1 << 16), "overlaps"),
        (replace(V3, refcount_table_clusters=0), "reference count table"),
        (replace(V3, refcount_table_clusters=1 << 20), "too large"),
        (replace(V3, nb_snapshots=65537), "Too many snapshots"),
        (replace(V3, size=1 << 63), "too large"),
        (replace(V3, refcount_order=7), "width too large"),
        (replace(V3, autoclear=h.DATA_FILE_RAW), "without an external data file"),
        (replace(V3, compression_type=1), "contradict"),
        (replace(V3, incompatible=h.COMPRESSION), "contradict"),
        (replace(V3, incompatible=h.COMPRESSION, compression_type=9), "unknown compression"),
        (replace(V3, cluster_bits=13, incompatible=h.EXTENDED_L2, l1_size=4096), "16 KiB"),
    ],
)
def test_what_is_out_of_bounds_is_refused(header: h.Header, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        h.parse_header(image(header))


def test_what_does_not_fit_into_the_first_cluster_is_refused() -> None:
    with pytest.raises(ImageError, match="exceed a cluster"):
        h.encode_header(replace(V3, cluster_bits=9).with_extension(5, bytes(500)))
    with pytest.raises(ImageError, match="longer than 1023"):
        h.encode_header(replace(V3, backing_file="x" * 1024))


def test_other_files_are_no_qcow2_image() -> None:
    for data in (b"", b"QFI\xfb", b"QED\0" + bytes(200), bytes(512)):
        with pytest.raises(ImageError, match="not in qcow2 format"):
            h.header_area(data)


def test_mutated_headers_parse_or_are_refused(rng: random.Random) -> None:
    good = image(
        replace(V3, backing_file="base", cluster_bits=9, l1_size=1 << 15)
        .with_extension(h.EXT_BACKING_FORMAT, b"raw")
        .with_extension(h.EXT_FEATURE_NAMES, h.encode_feature_names(h.FEATURE_NAMES[:3]))
    )
    parsed = 0
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header = h.parse_header(bytes(data[: rng.choice([512, 512, rng.randrange(512)])]))
        except ImageError:
            continue
        parsed += 1
        try:
            assert h.parse_header(h.encode_header(header)) == h.placed(header)
        except ImageError as error:
            assert "exceed" in str(error)  # noqa: PT017 - names may overlap fields before
    assert parsed


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "compat=1.1,lazy_refcounts=on", "extended_l2=on", "compression_type=zstd"],
)
def test_headers_of_qemu_img_are_parsed_and_written_back_as_they_were(
    options: str, tmp_path: Path
) -> None:
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    path = tmp_path / "x.qcow2"
    backing = ["-b", "base", "-F", "raw"]
    run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, "1G"], check=True
    )
    first = path.read_bytes()[:65536]
    header = h.parse_header(first)

    assert header.backing_file == "base"
    assert header.backing_format == "raw"
    again = h.encode_header(header)
    assert h.parse_header(again) == header
    path.write_bytes(again.ljust(65536, b"\0") + path.read_bytes()[65536:])
    run(["qemu-img", "check", "-q", path], check=True)
