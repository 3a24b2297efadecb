"""qcow2 images that QEMU's programs make, served by ours, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import KiB, MiB, blocks, run, serving
from tests.support.qcow2 import check_qcow2

pytestmark = pytest.mark.interop("qemu-img", "qemu-io")

Program = Callable[[str], str]
SIZE = 8 * MiB
FORMS = {
    "plain": (),
    "version-2": ("-o", "compat=0.10"),
    "subclusters": ("-o", "extended_l2=on"),
    "compressed": ("-c",),
    "lazy": ("-o", "lazy_refcounts=on,cluster_size=4k"),
    "small": ("-o", "cluster_size=512,refcount_bits=64"),
    "large": ("-o", "cluster_size=2M,refcount_bits=1"),
}


@pytest.fixture
def content(short_tmp: Path) -> Path:
    """Data, 2 MiB of hole, data."""
    path = short_tmp / "content.raw"
    with path.open("wb") as file:
        file.write(blocks(2 * MiB, 4 * KiB))
        file.seek(4 * MiB)
        file.write(blocks(SIZE - 4 * MiB, 4 * KiB, first=99))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_snapshot_of_an_image_is_its_instant_and_the_image_stays_whole(
    short_tmp: Path, content: Path, program: Program, form: str
) -> None:
    image = short_tmp / "vda.qcow2"
    run(program("qemu-img"), "convert", "-O", "qcow2", *FORMS[form], content, image)
    with serving(short_tmp, f"vda={image},format=qcow2") as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        commands = ("write -P 0xfe 1M 2M", "write -z 4M 1M", "discard 6M 1M", "write -P 1 3000K 9K")
        options = [part for command in commands for part in ("-c", command)]
        run(program("qemu-io"), "-f", "raw", *options, daemon.uri("vda"))
        instant, now = short_tmp / "instant.raw", short_tmp / "now.raw"
        run(program("qemu-img"), "convert", "-O", "raw", daemon.uri("vda@one"), instant)
        run(program("qemu-img"), "convert", "-O", "raw", daemon.uri("vda"), now)
        status = run(program("qemu-img"), "map", "--output=json", daemon.uri("vda")).stdout
        # In clusters of 2 MiB all of the disk is data.
        assert any(extent["zero"] for extent in json.loads(status)) == (form != "large")
        assert daemon.stop() == 0
    assert instant.read_bytes() == content.read_bytes()
    run(program("qemu-img"), "compare", "-f", "qcow2", "-F", "raw", image, now)
    check_qcow2(image)


def test_an_overlay_of_qemu_img_is_served_with_its_backing(
    short_tmp: Path, content: Path, program: Program
) -> None:
    middle, top = short_tmp / "middle.qcow2", short_tmp / "vda.qcow2"
    run(program("qemu-img"), "create", "-f", "qcow2", "-b", content, "-F", "raw", middle)
    run(program("qemu-io"), "-f", "qcow2", "-c", "write -P 7 100k 300k", middle)
    run(program("qemu-img"), "create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    with serving(short_tmp, f"vda={top},format=qcow2") as daemon:
        run(program("qemu-io"), "-f", "raw", "-c", "write -P 9 200k 5000", daemon.uri("vda"))
        assert daemon.stop() == 0
    run(program("qemu-io"), "-f", "qcow2", "-c", "read -P 9 200k 5000", top)
    run(program("qemu-io"), "-f", "qcow2", "-c", "read -P 7 100k 100k", top)
    check_qcow2(top)
    before = blocks(2 * MiB, 4 * KiB)
    assert content.read_bytes()[: 2 * MiB] == before
