"""Persistent bitmaps in qcow2 images: loaded, stored, in use; interchangeable with QEMU's."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block.bitmap import DirtyBitmap, new_bitmap
from nbdfleece.block.drivers.qcow2.bitmaps import StoredBitmaps
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from nbdfleece.formats.qcow2 import header as h
from tests.support.driver_kit import remove_all
from tests.support.qcow2_history import KiB, MiB, check, open_image, qemu_io, random_step, run
from tests.support.qcow2_image import Image

pytestmark = pytest.mark.interop("qemu-img", "qemu-io", "qemu-storage-daemon")

Program = Callable[[str], str]
SIZE = 4 * MiB


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


@pytest.fixture
def image(tmp_path: Path, program: Program) -> Path:
    path = tmp_path / "image"
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, SIZE)
    return path


def content(image: Path) -> bytes:
    return image.read_bytes()


def put(image: Path, data: bytes | bytearray) -> None:
    image.write_bytes(data)


async def add(
    node: Node, name: str, granularity: int = 65536, *, enabled: bool = True
) -> DirtyBitmap:
    bitmap = new_bitmap(node, name, granularity, enabled=enabled)
    assert node.bitmap_keeper is not None
    await node.bitmap_keeper.keep(bitmap)
    node.bitmaps[name] = bitmap
    return bitmap


async def remove(node: Node, name: str) -> None:
    bitmap = node.bitmaps.pop(name)
    assert node.bitmap_keeper is not None
    await node.bitmap_keeper.forget(bitmap)


async def write(node: Node, offset: int, length: int) -> None:
    await node.write(offset, memoryview(b"x" * length), fua=False)


def info(program: Program, image: Path) -> dict[str, list[str]]:
    """Names and flags of the bitmaps, as qemu-img sees them."""
    about = json.loads(run(program("qemu-img"), "info", "-U", "--output=json", image))
    found = about["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: sorted(each["flags"]) for each in found}


def dirty(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    return list(bitmap.dirty_ranges())


def qemu_dirty(program: Program, image: Path, name: str) -> list[tuple[int, int]]:
    """The dirty ranges, read by qemu-img over qemu-nbd's metadata context."""
    socket = image.parent / "s"
    command = [program("qemu-nbd"), "-r", "-f", "qcow2", "-B", name, "-k", str(socket), str(image)]
    options = f"driver=nbd,server.type=unix,server.path={socket},"
    options += f"reconnect-delay=0,x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    with subprocess.Popen(command) as server:
        while not socket.exists():
            assert server.poll() is None
            time.sleep(0.01)
        said = run(program("qemu-img"), "map", "--output=json", "--image-opts", options)
        assert server.wait(30) == 0
    socket.unlink(missing_ok=True)
    ranges: list[tuple[int, int]] = []
    for each in json.loads(said):
        if not each["data"]:  # x-dirty-bitmap shows what is dirty as a hole
            if ranges and sum(ranges[-1]) == each["start"]:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + each["length"])
            else:
                ranges.append((each["start"], each["length"]))
    return ranges


@pytest.mark.parametrize("granularity", [512, 65536, 1 << 21])
async def test_bitmaps_go_to_qemu_and_come_back(
    image: Path, program: Program, rng: random.Random, granularity: int
) -> None:
    expected: list[tuple[int, int]] = []
    for turn in range(4):
        graph = Graph()
        try:
            node = await open_image(graph, image)
            if turn == 0:
                await add(node, "b", granularity)
                await add(node, "still", enabled=False)
            bitmap = node.bitmaps["b"]
            assert dirty(bitmap) == expected
            assert bitmap.enabled
            assert not node.bitmaps["still"].enabled
            for _ in range(10):
                step = random_step(rng, SIZE, 4096, verbs=["write", "zeroes", "discard"], most=SIZE)
                await step.apply(node)
            expected = dirty(bitmap)
        finally:
            await remove_all(graph)
        check(program, image)
        assert info(program, image) == {"b": ["auto"], "still": []}
        assert qemu_dirty(program, image, "b") == expected
        step = random_step(rng, SIZE, 4096, verbs=["write"], most=SIZE)
        qemu_io(program, image, [step])
        check(program, image)
        twin = DirtyBitmap("", size=SIZE, granularity=granularity, enabled=True)
        for offset, length in [*expected, (step.offset, step.length)]:
            twin.set(offset, length)
        expected = dirty(twin)


async def test_a_bitmap_is_in_use_while_the_image_is_open(
    image: Path, program: Program, graph: Graph
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    node = await open_image(graph, image)
    assert info(program, image) == {"b": ["auto", "in-use"]}
    await write(node, 0, 512)
    await remove_all(graph)
    assert info(program, image) == {"b": ["auto"]}


async def test_a_crash_leaves_it_inconsistent_and_only_removal_helps(
    image: Path, program: Program, graph: Graph, tmp_path: Path
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    node = await open_image(graph, image)
    await write(node, 0, 512)
    await node.flush()
    crashed = tmp_path / "crashed"
    shutil.copy(image, crashed)
    await remove_all(graph)
    node = await open_image(graph, crashed)
    bitmap = node.bitmaps["b"]
    assert bitmap.inconsistent
    assert not bitmap.recording
    assert bitmap.count() == 0
    with pytest.raises(CommandError, match="inconsistent"):
        bitmap.check_usable(to_change=False)
    await remove_all(graph)
    assert info(program, crashed) == {"b": ["auto", "in-use"]}  # it stays so
    node = await open_image(graph, crashed)
    await remove(node, "b")
    await add(node, "b")
    await write(node, 0, 512)
    await remove_all(graph)
    check(program, crashed)
    assert qemu_dirty(program, crashed, "b") == [(0, 65536)]


async def test_removed_bitmaps_are_gone_at_once(
    image: Path, program: Program, graph: Graph
) -> None:
    for name in ("a", "b"):
        run(program("qemu-img"), "bitmap", "--add", "-g", 512, image, name)
    qemu_io(program, image, [random_step(random.Random(1), SIZE, 4096, verbs=["write"], most=SIZE)])
    node = await open_image(graph, image)
    await remove(node, "a")
    assert list(info(program, image)) == ["b"]
    await remove(node, "b")
    assert info(program, image) == {}
    await remove_all(graph)
    check(program, image)


async def test_a_read_only_node_shows_them_and_changes_nothing(
    image: Path, program: Program, graph: Graph
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    before = content(image)
    node = await open_image(graph, image, **{"read-only": True})
    assert node.bitmaps["b"].readonly
    with pytest.raises(CommandError, match="readonly"):
        node.bitmaps["b"].check_removable()
    await remove_all(graph)
    assert content(image) == before


async def test_reopening_stores_them_and_takes_them_into_use_again(
    image: Path, program: Program, graph: Graph
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    node = await open_image(graph, image)
    await write(node, 0, 512)

    async def to(read_only: bool) -> None:
        options = {"driver": "qcow2", "node-name": "disk", "discard": "unmap"}
        options |= {"file": node.file.node.name if node.file else "", "read-only": read_only}
        await reopen(graph, [options])

    await to(read_only=True)
    assert info(program, image) == {"b": ["auto"]}
    assert node.bitmaps["b"].readonly
    await to(read_only=False)
    assert info(program, image) == {"b": ["auto", "in-use"]}
    assert not node.bitmaps["b"].readonly
    await write(node, 1 * MiB, 512)
    await remove_all(graph)
    assert qemu_dirty(program, image, "b") == [(0, 65536), (1 * MiB, 65536)]


async def test_a_bitmap_behind_an_overlay_goes_when_its_image_may_be_written(
    image: Path, program: Program, graph: Graph, tmp_path: Path
) -> None:
    """T-B24."""
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    backing = {"driver": "file", "node-name": "below", "filename": str(image)}
    await add_from_options(graph, backing)
    base = {"driver": "qcow2", "node-name": "base", "file": "below", "backing": None}
    node = await add_from_options(graph, {**base, "read-only": True})
    over = tmp_path / "over"
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", over, SIZE)
    top = {"driver": "qcow2", "node-name": "top", "backing": "base"}
    await add_from_options(graph, {**top, "file": {"driver": "file", "filename": str(over)}})
    with pytest.raises(CommandError, match="readonly"):
        node.bitmaps["b"].check_removable()
    assert info(program, image) == {"b": ["auto"]}
    await reopen(graph, [{**base, "read-only": False}])
    node.bitmaps["b"].check_removable()
    await remove(node, "b")
    await reopen(graph, [{**base, "read-only": True}])
    assert info(program, image) == {}
    await remove_all(graph)
    check(program, image)


@pytest.mark.parametrize("granularity", [512, 65536, 1 << 24])
async def test_bitmaps_follow_a_resize(
    image: Path, program: Program, graph: Graph, granularity: int
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", granularity, image, "b")
    for size in (SIZE * 3, 64 * KiB, SIZE + 4 * KiB):
        node = await open_image(graph, image)
        await write(node, 0, 512)
        await graph.resize(node, size)
        await write(node, size - 512, 512)
        expected = dirty(node.bitmaps["b"])
        await remove_all(graph)
        check(program, image)
        node = await open_image(graph, image)
        assert dirty(node.bitmaps["b"]) == expected
        await remove_all(graph)


async def test_a_disk_does_not_get_larger_than_its_bitmaps_can_be(
    image: Path, program: Program, graph: Graph
) -> None:
    """The image could not be opened again."""
    node = await open_image(graph, image)
    await add(node, "b", 512)
    assert node.size == SIZE
    with pytest.raises(CommandError, match="'b'"):
        await graph.resize(node, 3 << 40)
    await graph.resize(node, 1 << 40)
    await remove_all(graph)
    node = await open_image(graph, image)
    assert node.bitmaps["b"].size == node.size == 1 << 40


async def test_a_header_without_room_for_bitmaps_refuses_them_at_once(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    path, name = tmp_path / "image", "n" * 360
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, SIZE)
    run(program("qemu-img"), "rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path)
    node = await open_image(graph, path, backing=None)
    with pytest.raises(CommandError, match="exceed a cluster"):
        await add(node, "b")
    await write(node, 0, 512)
    await remove_all(graph)
    assert Image(content(path)).content()[:512] == b"x" * 512


async def test_who_does_not_know_bitmaps_makes_them_void(
    image: Path, program: Program, graph: Graph
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    data = bytearray(content(image))
    data[95] &= ~1  # the autoclear bit
    put(image, data)
    node = await open_image(graph, image)
    assert not node.bitmaps
    await write(node, 0, 512)


@pytest.mark.parametrize("at", [12, 16, 17])
async def test_a_damaged_directory_refuses_the_image(
    image: Path, program: Program, graph: Graph, at: int
) -> None:
    run(program("qemu-img"), "bitmap", "--add", "-g", 65536, image, "b")
    data = bytearray(content(image))
    name = data.rindex(b"b\0\0\0\0\0\0\0")
    data[name - 24 + at] ^= 0xFF
    put(image, data)
    with pytest.raises(CommandError, match="itmap"):
        await open_image(graph, image)


async def test_an_old_image_keeps_none(tmp_path: Path, program: Program, graph: Graph) -> None:
    path = tmp_path / "v2"
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, SIZE)
    node = await open_image(graph, path)
    assert node.bitmap_keeper is None


async def test_snapshots_and_bitmaps_get_along(image: Path, program: Program, graph: Graph) -> None:
    node = await open_image(graph, image)
    await add(node, "b", 512)
    await write(node, 0, MiB)
    snapshots = node.driver.internal_snapshots()
    assert snapshots is not None
    await snapshots.create("one", 0, 0)
    await write(node, MiB, 512)
    await remove_all(graph)
    found = Image(content(image)).check()
    assert (found.corruptions, found.leaks) == ([], 0)
    assert qemu_dirty(program, image, "b") == [(0, MiB + 512)]


async def test_bits_that_were_cut_off_are_not_taken_for_clean(
    image: Path, program: Program, graph: Graph
) -> None:
    node = await open_image(graph, image)
    await add(node, "b", 512)
    await write(node, 0, SIZE)
    await remove_all(graph)
    data = bytearray(content(image))
    extension = h.parse_header(data).extension(h.EXT_BITMAPS)
    assert extension is not None
    directory = int.from_bytes(extension[16:24], "big")
    table = int.from_bytes(data[directory : directory + 8], "big")
    bits = len(data) // 4096 * 4096 + 4096
    data[table : table + 8] = bits.to_bytes(8, "big")
    put(image, data.ljust(bits, b"\0") + b"\xff" * 100)
    with pytest.raises(CommandError, match="not in the image's file"):
        await open_image(graph, image)


async def test_closing_writes_the_disk_out_when_a_bitmap_cannot_be_stored(
    image: Path, graph: Graph, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await open_image(graph, image)
    await add(node, "b")
    await write(node, 0, 65536)

    async def full(_store: StoredBitmaps, _bitmap: DirtyBitmap) -> None:
        raise IoError(errno.ENOSPC, "full")

    monkeypatch.setattr(StoredBitmaps, "_write", full)
    await remove_all(graph)
    check(program, image)
    assert Image(content(image)).content() == b"x" * 65536 + bytes(SIZE - 65536)
