"""The plain reader and checker of tests/support agrees with qemu-img; else it proves nothing."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.qcow2_image import Image

Program = Callable[[str], str]
MiB = 1 << 20
SIZE = 4 * MiB

OPTIONS = {
    "plain": "cluster_size=4096",
    "v2": "compat=0.10,cluster_size=4096",
    "small": "cluster_size=512",
    "narrow": "cluster_size=4096,refcount_bits=1",
    "wide": "cluster_size=4096,refcount_bits=64",
    "extended": "extended_l2=on,cluster_size=16384",
}


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def make(program: Program, path: Path, options: str, rng: random.Random) -> None:
    """An image with data, zeroes, compressed clusters, a snapshot and a bitmap, where it can be."""
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    commands: list[str] = []
    for index in rng.sample(range(SIZE // 65536), 8):  # qemu-io compresses into nothing only
        commands += ["-c", f"write -c -P {index} {index * 65536} 64k"]
    run(program("qemu-io"), "-f", "qcow2", *commands, path)
    write(program, path, rng)
    if "refcount_bits=1" not in options:
        run(program("qemu-img"), "snapshot", "-c", "one", path)
    if "compat=0.10" not in options:
        run(program("qemu-img"), "bitmap", "--add", "-g", 512, path, "b")
    write(program, path, rng)


def write(program: Program, path: Path, rng: random.Random) -> None:
    commands: list[str] = []
    for _ in range(25):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice([512, 4096, 30000 // 512 * 512]), SIZE - offset)
        verb = rng.choice(["write -P 7", "write -P 9", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{verb} {offset} {length}"]
    run(program("qemu-io"), "-f", "qcow2", "-d", "unmap", *commands, path)


def qemu_check(program: Program, path: Path) -> tuple[bool, int]:
    """Whether qemu-img finds corruptions, and how many leaks."""
    done = subprocess.run(
        [program("qemu-img"), "check", "-f", "qcow2", "--output=json", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 2, 3) or not done.stdout:
        return True, 0
    result = json.loads(done.stdout)
    return bool(result.get("corruptions") or result["check-errors"]), result.get("leaks", 0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.interop("qemu-img", "qemu-io")
def test_a_good_image_is_found_good_and_read_as_qemu_reads_it(
    tmp_path: Path, program: Program, rng: random.Random, name: str
) -> None:
    path = tmp_path / "image"
    make(program, path, OPTIONS[name], rng)
    image = Image(path.read_bytes())
    found = image.check()
    assert (found.corruptions, found.leaks) == ([], 0)
    run(program("qemu-img"), "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
    assert image.content() == (tmp_path / "raw").read_bytes()
    if image.snapshot_count:
        convert = (program("qemu-img"), "convert", "-f", "qcow2", "-O", "raw", "-l", "one")
        run(*convert, path, tmp_path / "one.raw")
        assert image.content("one") == (tmp_path / "one.raw").read_bytes()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The image with one number of its tables changed."""
    image = Image(data)
    changed = bytearray(data)
    at_l1 = image.l1_at + 8 * rng.randrange(image.l1_size)
    tables = [entry & 0xFFFFFFFFFFFE00 for entry in image.words(image.l1_at, image.l1_size)]
    tables = [at for at in tables if at]
    at_l2 = rng.choice(tables) + image.entry_size * rng.randrange(image.per_l2)
    at_block = image.words(image.table_at, 1)[0] + rng.randrange(image.cluster // 8) * 8
    at = rng.choice([at_l1, at_l2, at_l2, at_block, at_block])
    value = struct.unpack_from(">Q", data, at)[0]
    value = rng.choice(
        [
            value ^ 1 << 63,
            value ^ 1 << rng.randrange(9, 24),
            value + image.cluster,
            0,
            value ^ 1 << rng.randrange(0, 56),
        ]
    )
    struct.pack_into(">Q", changed, at, value & (1 << 64) - 1)
    return bytes(changed)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.interop("qemu-img", "qemu-io")
def test_damage_is_found_where_qemu_finds_it(
    tmp_path: Path, program: Program, rng: random.Random, name: str, *, long_run: bool
) -> None:
    path = tmp_path / "image"
    make(program, path, OPTIONS[name], rng)
    data = path.read_bytes()
    for _ in range(300 if long_run else 12):
        bad = damaged(data, rng)
        path.write_bytes(bad)
        is_corrupt, leaks = qemu_check(program, path)
        found = Image(bad).check()
        assert bool(found.corruptions) == is_corrupt, found.corruptions
        assert is_corrupt or found.leaks == leaks
