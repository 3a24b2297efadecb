"""Damaged qcow2 images: a clear error when they are opened, or when they are read; no more.

Each field of the header, of extensions, L1 and L2 tables, refcount table and blocks, snapshot
table and bitmap directory is changed, one or a few at a time. Whatever is read without an error is
what the tables say, by the plain reader of tests/support.
"""

from __future__ import annotations

import random
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from tests.support.driver_kit import remove_all
from tests.support.power_cut import RecordingDriver
from tests.support.qcow2_image import Broken, Image

pytestmark = [pytest.mark.interop("qemu-img", "qemu-io"), pytest.mark.slow]

Program = Callable[[str], str]
KiB, MiB = 1 << 10, 1 << 20
SIZE = 1 * MiB
MOST_MEMORY = 100 * MiB  # the largest tables that an image may have, twice, and some

KINDS = {
    "plain": "cluster_size=4096",
    "v2": "compat=0.10,cluster_size=4096",
    "512": "cluster_size=512",
    "extended": "extended_l2=on,cluster_size=16k",
    "lazy": "lazy_refcounts=on,cluster_size=4096",
}


def make(program: Program, path: Path, options: str, rng: random.Random) -> bytes:
    def run(name: str, *arguments: object) -> None:
        command = [program(name), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    commands = [f"write -c -P {index} {index * 64}k 64k" for index in (3, 5)]
    commands += [f"write -P {rng.randrange(256)} {rng.randrange(2000) * 512} 3k" for _ in range(20)]
    commands += [f"write -z -u {rng.randrange(15) * 64}k 64k" for _ in range(2)]
    run("qemu-io", "-f", "qcow2", *(part for each in commands for part in ("-c", each)), path)
    run("qemu-img", "snapshot", "-c", "one", path)
    if "0.10" not in options:
        run("qemu-img", "bitmap", "--add", "-g", 512, path, "b")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 100k 300k", path)
    return path.read_bytes()


def targets(data: bytes) -> list[tuple[int, int]]:
    """The numbers in an image that mean something: (offset, bytes)."""
    image = Image(data)
    found = [(at, 4) for at in range(0, 112, 4)] + [(at, 8) for at in (8, 24, 40, 48, 64, 72, 80)]
    found += [(at, 4) for at in range(image.header_length, image.header_length + 64, 4)] * 2
    tables = list(image.words(image.l1_at, image.l1_size))
    found += [(image.l1_at + 8 * index, 8) for index in range(image.l1_size)] * 3
    for entry in tables:
        if entry:
            at = entry & 0xFFFFFFFFFFFE00
            found += [(at + 8 * index, 8) for index in range(image.cluster // 8)]
    found += [(image.table_at + 8 * index, 8) for index in range(4)] * 4
    block = image.words(image.table_at, 1)[0]
    found += [(block + 8 * index, 8) for index in range(32)]
    found += [(image.snapshots_at + 4 * index, 4) for index in range(16)]
    return found


def damage(data: bytes, places: list[tuple[int, int]], rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, length = rng.choice(places)
        kind = ">I" if length == 4 else ">Q"
        bits = length * 8
        value = struct.unpack_from(kind, changed, at)[0]
        value = rng.choice(
            [
                value ^ 1 << rng.randrange(bits),
                value + rng.choice([1, -1, 512, 4096, 65536]),
                0,
                (1 << bits) - 1,
                rng.getrandbits(bits),
                rng.randrange(len(data) // 512) * 512,
                struct.unpack_from(kind, data, rng.choice(places)[0])[0],
            ]
        )
        struct.pack_into(kind, changed, at, value & (1 << bits) - 1)
    if rng.random() < 0.05:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


async def open_damaged(graph: Graph, data: bytes, rng: random.Random, *, read_only: bool) -> Node:
    file = RecordingDriver(data, rng, turns=0)
    file.largest = 16 * MiB
    await graph.add("file", file, {}, read_only=read_only, discard_enabled=True)
    options = {"driver": "qcow2", "node-name": "disk", "file": "file", "read-only": read_only}
    return await add_from_options(graph, options | {"backing": None})


async def attempt(data: bytes, rng: random.Random) -> str:
    """Open, read, look at and write a damaged image, and say how far that went."""
    graph = Graph()
    read_only = rng.random() < 0.5
    try:
        try:
            node = await open_damaged(graph, data, rng, read_only=read_only)
        except CommandError:
            return "refused"
        # Taking bitmaps into use may have written where a damaged entry says that data is.
        file = graph.find("file").driver
        assert isinstance(file, RecordingDriver)
        outcome = await read(node, bytes(file.content))
        if not read_only:
            await write(node, rng)
        return outcome
    finally:
        await remove_all(graph)


async def read(node: Node, data: bytes) -> str:
    try:
        expected = Image(data).content() if node.size <= 4 * MiB else None
    except (Broken, struct.error):
        expected = None
    failed = 0
    piece = 32 * KiB
    for offset in range(0, min(node.size, 2 * MiB), piece):
        length = min(piece, node.size - offset)
        view = bytearray(length)
        try:
            await node.read(offset, memoryview(view))
        except IoError:
            failed += 1
        else:
            # Outside the assert: what differs is too long to be told.
            is_right = expected is None or view == expected[offset : offset + length]
            assert is_right, offset
        for status in (node.block_status, node.allocation_depth):
            try:
                found = await status(offset, length)
            except IoError:
                continue
            assert found[0].offset == offset
            assert all(extent.length > 0 for extent in found)
    if node.size > 4 * MiB:
        for offset in (node.size - 512, node.size // 2):
            try:
                await node.read(offset, memoryview(bytearray(512)))
            except IoError:
                failed += 1
    return "read" if not failed else "partly read"


async def write(node: Node, rng: random.Random) -> None:
    for _ in range(6):
        offset = rng.randrange(max(1, min(node.size, 2 * MiB)))
        length = min(rng.choice([1, 512, 5000, 100 * KiB]), node.size - offset)
        if length <= 0:
            return
        try:
            verb = rng.choice(["write", "zeroes", "discard", "flush"])
            if verb == "write":
                await node.write(offset, memoryview(b"w" * length), fua=False)
            elif verb == "zeroes":
                await node.write_zeroes(
                    offset, length, fua=False, may_unmap=True, no_fallback=False
                )
            elif verb == "discard":
                await node.discard(offset, length)
            else:
                await node.flush()
        except IoError:
            continue


@pytest.mark.deadline(3000)
@pytest.mark.parametrize("kind", KINDS)
async def test_damaged_images_are_refused_or_read_as_their_tables_say(
    tmp_path: Path, program: Program, rng: random.Random, kind: str, *, long_run: bool
) -> None:
    good = make(program, tmp_path / "image", KINDS[kind], rng)
    places = targets(good)
    outcomes = {"refused": 0, "read": 0, "partly read": 0}
    outcomes[await attempt(b"RAW" + good[3:], rng)] += 1  # no qcow2 at all
    for number in range(5000 if long_run else 40):
        state = rng.getstate()
        bad = damage(good, places, rng)
        try:
            outcomes[await attempt(bad, rng)] += 1
        except BaseException:
            (tmp_path / "bad.qcow2").write_bytes(bad)
            print(f"image number {number}, in {tmp_path}/bad.qcow2; {hash(state)}")
            raise
    print(outcomes)
    assert outcomes["refused"]
    assert outcomes["read"] + outcomes["partly read"]


@pytest.mark.deadline(600)
async def test_damaged_images_take_bounded_memory(
    tmp_path: Path, program: Program, rng: random.Random, *, long_run: bool
) -> None:
    good = make(program, tmp_path / "image", KINDS["plain"], rng)
    places = [place for place in targets(good) if place[0] < 200]
    tracemalloc.start()
    try:
        for _ in range(500 if long_run else 5):
            tracemalloc.reset_peak()
            await attempt(damage(good, places, rng), rng)
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
