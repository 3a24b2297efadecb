"""New images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2.create import NewImage, image_length, image_pieces
from nbdfleece.formats.qcow2.header import parse_header

SIZE = 100 * 1024 * 1024 + 512


def write(path: Path, image: NewImage) -> Path:
    with path.open("wb") as file:
        file.truncate(image_length(image))
        for offset, data in image_pieces(image):
            file.seek(offset)
            file.write(data)
    assert path.stat().st_size == image_length(image)
    return path


IMAGES = [
    NewImage(size=0),
    NewImage(size=SIZE),
    NewImage(size=1 << 50),
    NewImage(size=SIZE, version=2),
    NewImage(size=SIZE, cluster_size=512, lazy_refcounts=True),
    NewImage(size=SIZE, cluster_size=512, refcount_bits=64, preallocate=True),
    NewImage(size=SIZE, cluster_size=1 << 21, refcount_bits=1),
    NewImage(size=SIZE, extended_l2=True, refcount_bits=2, preallocate=True),
    NewImage(size=SIZE, cluster_size=4096, refcount_bits=4, preallocate=True),
    NewImage(size=SIZE, cluster_size=4096, refcount_bits=8, backing_file="b", backing_format="raw"),
]


@pytest.mark.parametrize("image", IMAGES)
def test_the_header_says_what_was_asked_for(image: NewImage) -> None:
    header = parse_header(next(image_pieces(image))[1].ljust(image.cluster_size, b"\0"))
    assert (header.size, header.version) == (image.size, image.version)
    assert (header.cluster_size, header.refcount_bits) == (image.cluster_size, image.refcount_bits)
    assert header.has_extended_l2 == image.extended_l2
    assert (header.backing_file, header.backing_format) == (
        image.backing_file,
        image.backing_format,
    )


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("image", IMAGES)
def test_qemu_img_finds_nothing_wrong(image: NewImage, tmp_path: Path) -> None:
    with (tmp_path / "b").open("wb") as base:
        base.truncate(SIZE)
    path = write(tmp_path / "x.qcow2", image)
    run(["qemu-img", "check", "-q", path], check=True)
    said = run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True)
    info = json.loads(said.stdout)
    assert info["virtual-size"] == image.size // 512 * 512
    assert info["cluster-size"] == image.cluster_size
    if image.size == SIZE:
        mapped = run(["qemu-img", "map", "--output=json", path], check=True, capture_output=True)
        assert all(extent["present"] for extent in json.loads(mapped.stdout)) or (
            not image.preallocate
        )
        assert all(extent["zero"] for extent in json.loads(mapped.stdout) if not extent["present"])


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("raw", [False, True])
def test_an_external_data_file_is_named(raw: bool, tmp_path: Path) -> None:
    image = NewImage(
        size=SIZE, data_file=str(tmp_path / "x.raw"), data_file_raw=raw, preallocate=raw
    )
    with (tmp_path / "x.raw").open("wb") as data:
        data.truncate(SIZE)
    path = write(tmp_path / "x.qcow2", image)
    run(["qemu-img", "check", "-q", path], check=True)
    said = run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True)
    data = json.loads(said.stdout)["format-specific"]["data"]
    assert (data["data-file"], data["data-file-raw"]) == (str(tmp_path / "x.raw"), raw)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (NewImage(size=-1), "impossible"),
        (NewImage(size=1, cluster_size=1000), "power of two"),
        (NewImage(size=1, cluster_size=1 << 22), "power of two"),
        (NewImage(size=1, refcount_bits=3), "Refcount width"),
        (NewImage(size=1, version=2, refcount_bits=8), "v3"),
        (NewImage(size=1, version=2, extended_l2=True), "v3"),
        (NewImage(size=1, extended_l2=True, cluster_size=8192), "16384"),
        (NewImage(size=1, data_file_raw=True), "requires data-file"),
        (NewImage(size=1, backing_file="b"), "format"),
        (NewImage(size=1 << 40, cluster_size=512), "too large"),
        (
            replace(IMAGES[-1], preallocate=True),
            "at the same time",
        ),
    ],
)
def test_impossible_images_are_refused(image: NewImage, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        image_length(image)
