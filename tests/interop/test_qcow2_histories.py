"""Random histories on our qcow2 driver and on qemu-io: the same disk, and clean images.

Both begin with the same image. After each batch of steps the images are compared by qemu-img, and
may change hands: what our driver has written goes on in qemu-io, and the other way round.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.base.extent import ZERO
from nbdfleece.block.graph import Graph
from tests.support.driver_kit import remove_all
from tests.support.qcow2_history import (
    KiB,
    MiB,
    check,
    open_image,
    qemu_io,
    qemu_map,
    random_step,
    raw_content,
    read_all,
    run,
)

pytestmark = [pytest.mark.interop("qemu-img", "qemu-io"), pytest.mark.slow]

Program = Callable[[str], str]
VERBS = ["write", "write", "write", "write", "zeroes", "unmap", "discard", "flush"]

# name -> (options of qemu-img create, size, verbs besides VERBS)
KINDS = {
    "plain": ("cluster_size=65536", 8 * MiB, ["resize"]),
    "v2": ("compat=0.10", 4 * MiB, ["resize"]),
    "512": ("cluster_size=512", 512 * KiB, ["resize"]),
    "2M": ("cluster_size=2M", 40 * MiB + 512, []),
    "4k-1": ("cluster_size=4096,refcount_bits=1", 2 * MiB, []),
    "4k-2": ("cluster_size=4096,refcount_bits=2", 2 * MiB, []),
    "4k-64": ("cluster_size=4096,refcount_bits=64", 2 * MiB, ["resize"]),
    "extended": ("extended_l2=on,cluster_size=64k", 4 * MiB, ["resize"]),
    "extended-16k": ("extended_l2=on,cluster_size=16k", 1 * MiB + 512, []),
    "lazy": ("lazy_refcounts=on,cluster_size=4096", 2 * MiB, []),
    "data-file": ("data_file={folder}/data,cluster_size=4096", 2 * MiB, []),
    "data-file-raw": ("data_file={folder}/data,data_file_raw=on,cluster_size=4096", 2 * MiB, []),
    "preallocated": ("preallocation=metadata,cluster_size=4096", 2 * MiB, []),
}


def sector_noise(rng: random.Random, size: int) -> bytes:
    """Data, holes and runs: something to be behind an overlay."""
    parts = []
    while size > 0:
        length = min(rng.choice([512, 4096, 100 * KiB]), size)
        parts.append(rng.choice([bytes(length), rng.randbytes(length), b"B" * length]))
        size -= length
    return b"".join(parts)


class Twins:
    """Two images with one history: `ours` by our driver, `theirs` by qemu-io."""

    def __init__(
        self, program: Program, folder: Path, rng: random.Random, size: int, cluster: int
    ) -> None:
        self.program = program
        self.folder = folder
        self.rng = rng
        self.cluster = cluster
        self.ours, self.theirs = folder / "ours.qcow2", folder / "theirs.qcow2"
        self.disk = bytearray(size)
        self.most = size * 2

    async def batch(self, count: int, verbs: list[str]) -> None:
        """Do some steps to both and compare."""
        steps = []
        size = len(self.disk)
        for _ in range(count):
            step = random_step(self.rng, size, self.cluster, verbs=verbs, most=self.most)
            size = step.offset if step.verb == "resize" else size
            steps.append(step)
        graph = Graph()
        try:
            node = await open_image(graph, self.ours)
            for step in steps:
                await step.apply(node)
                step.model(self.disk, self.cluster)
            assert await read_all(node) == self.disk
        finally:
            await remove_all(graph)
        qemu_io(self.program, self.theirs, steps)

    def compare(self) -> None:
        """Insist that the images are clean, and hold the same in the same way."""
        check(self.program, self.ours)
        assert raw_content(self.program, self.theirs) == self.disk
        assert raw_content(self.program, self.ours) == self.disk

    def change_hands(self) -> None:
        """Let each go on with the image of the other."""
        other = self.folder / "other"
        self.ours.rename(other)
        self.theirs.rename(self.ours)
        other.rename(self.theirs)

    async def status(self) -> None:
        """Insist that our driver calls zero what qemu-img does, but for holes in the file."""
        graph = Graph()
        try:
            node = await open_image(graph, self.ours, **{"read-only": True})
            extents = []
            offset = 0
            while offset < node.size:
                found = await node.block_status(offset, node.size - offset)
                extents += found
                offset = found[-1].end
        finally:
            await remove_all(graph)
        marks = bytearray(len(self.disk))
        for at, length, flags in extents:
            if flags & ZERO:
                end = min(at + length, len(marks))
                marks[at:end] = b"\1" * (end - at)
        for start, length, zero, data, _ in qemu_map(self.program, self.ours):
            if not zero:
                assert 1 not in marks[start : start + length]
            elif not data:
                assert 0 not in marks[start : start + length]


@pytest.mark.deadline(600)
@pytest.mark.parametrize("kind", KINDS)
async def test_history_of_one_image(
    tmp_path: Path, program: Program, rng: random.Random, kind: str, *, long_run: bool
) -> None:
    options, size, more = KINDS[kind]
    options = options.format(folder=tmp_path)
    cluster = cluster_of(options)
    twins = Twins(program, tmp_path, rng, size, cluster)
    has_data_file = "data_file" in options
    for image in (twins.theirs, twins.ours):
        own = options.replace(f"{tmp_path}/data", f"{tmp_path}/{image.stem}.data")
        run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", own, image, size)
    for _ in range(30 if long_run else 3):
        await twins.batch(25, VERBS + more)
        twins.compare()
        if not has_data_file:
            await twins.status()
        if rng.random() < 0.5:
            twins.change_hands()


@pytest.mark.deadline(600)
@pytest.mark.parametrize("kind", ["plain", "512", "v2", "extended", "compressed"])
async def test_history_of_an_overlay(
    tmp_path: Path, program: Program, rng: random.Random, kind: str, *, long_run: bool
) -> None:
    """Over a backing file that is shorter or longer than the overlay, itself an overlay."""
    options, size, _ = KINDS.get(kind, ("cluster_size=4096", 1 * MiB, []))
    cluster = cluster_of(options)
    size = min(size, 2 * MiB)
    base, middle = tmp_path / "base.raw", tmp_path / "middle.qcow2"
    base.write_bytes(sector_noise(rng, rng.choice([size, size // 2 // 512 * 512, size + MiB])))
    create = (program("qemu-img"), "create", "-q", "-f", "qcow2")
    if kind == "compressed":
        convert = (program("qemu-img"), "convert", "-c", "-f", "raw", "-O", "qcow2")
        run(*convert, "-o", options, base, middle)
    else:
        run(*create, "-o", options, "-b", "base.raw", "-F", "raw", middle)
    twins = Twins(program, tmp_path, rng, size, cluster)
    below = base.read_bytes()[:size]
    twins.disk[: len(below)] = below
    for image in (twins.theirs, twins.ours):
        run(*create, "-o", options, "-b", "middle.qcow2", "-F", "qcow2", image, size)
    for _ in range(30 if long_run else 3):
        # A version 2 image cannot say that an unmapped cluster over a backing file reads as zero.
        verbs = [verb for verb in VERBS if kind != "v2" or verb != "discard"]
        await twins.batch(25, verbs)
        twins.compare()
        await twins.status()
        if rng.random() < 0.5:
            twins.change_hands()


@pytest.mark.deadline(600)
async def test_history_of_a_compressed_image(
    tmp_path: Path, program: Program, rng: random.Random, *, long_run: bool
) -> None:
    size = 2 * MiB
    source = tmp_path / "source.raw"
    for options in ("cluster_size=65536", "cluster_size=4096", "extended_l2=on,cluster_size=64k"):
        source.write_bytes(sector_noise(rng, size))
        twins = Twins(program, tmp_path, rng, size, cluster_of(options))
        twins.disk[:] = source.read_bytes()
        convert = (program("qemu-img"), "convert", "-c", "-f", "raw", "-O", "qcow2")
        run(*convert, "-o", options, source, twins.ours)
        shutil.copy(twins.ours, twins.theirs)
        for _ in range(20 if long_run else 2):
            await twins.batch(25, VERBS)
            twins.compare()
            await twins.status()
            if rng.random() < 0.5:
                twins.change_hands()


def cluster_of(options: str) -> int:
    """The cluster size that the options of qemu-img create ask for."""
    for option in options.split(","):
        if option.startswith("cluster_size="):
            text = option.partition("=")[2]
            unit = {"k": KiB, "M": MiB}.get(text[-1], 1)
            return int(text.rstrip("kM")) * unit
    return 64 * KiB
