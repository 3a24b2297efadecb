"""A qcow2 image over its life: crashes, other sizes, sharing, points in time."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import HOLE, ZERO
from nbdfleece.block import internal_snapshots
from nbdfleece.block.bitmap import new_bitmap
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.qcow2.driver import Qcow2Driver, Qcow2Options
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from nbdfleece.datapath.step import background
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.create import NewImage
from nbdfleece.formats.qcow2.writer import ImageWriter
from tests.block.test_qcow2_driver import qcow2_node
from tests.support import qcow2_image
from tests.support.driver_kit import fails, file_node, random_change, read, remove_all
from tests.support.early import Told
from tests.support.fleecing import add_access, add_filter, read_all
from tests.support.power_cut import RecordingDriver
from tests.support.qcow2 import check_qcow2, make_qcow2
from tests.support.waiting import until

pytestmark = pytest.mark.interop("qemu-img")

MiB = 1 << 20
SIZE = 2 * MiB
IMAGES = {
    "plain": NewImage(size=SIZE),
    "small": NewImage(size=SIZE, cluster_size=512, refcount_bits=32),
    "subclusters": NewImage(size=SIZE, extended_l2=True),
    "version 2": NewImage(size=SIZE, version=2, cluster_size=4096),
    "lazy": NewImage(size=SIZE, lazy_refcounts=True, cluster_size=4096, refcount_bits=8),
}


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


def features(path: Path) -> h.Header:
    with path.open("rb") as file:
        return h.parse_header(file.read(1 << 21))


def qemu_img(arguments: list[str | Path]) -> None:
    subprocess.run(["qemu-img", *arguments], check=True)


async def change(node: Node, model: bytearray, rng: random.Random, times: int) -> None:
    for _ in range(times):
        await random_change(node, model, rng)


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
async def test_what_was_flushed_survives_a_kill_at_any_moment(
    graph: Graph, tmp_path: Path, rng: random.Random, image: NewImage
) -> None:
    path, crashed = make_qcow2(tmp_path / "x.qcow2", image), tmp_path / "crashed.qcow2"
    node = await qcow2_node(graph, path)
    model = bytearray(SIZE)
    for _ in range(5):
        await change(node, model, rng, 10)
        await node.flush()
        shutil.copy(path, crashed)  # as the file is when the process is killed now
        if image.lazy_refcounts:
            assert features(crashed).incompatible & h.DIRTY
        else:
            check_qcow2(crashed, leaks=True)
        again = Graph()
        assert await read_all(await qcow2_node(again, crashed)) == model
        await remove_all(again)
        check_qcow2(crashed, leaks=not image.lazy_refcounts)  # counting anew finds leaks too
    await graph.remove(node)
    assert not features(path).incompatible & h.DIRTY
    check_qcow2(path)


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
async def test_other_sizes_keep_what_there_is_and_add_zeroes(
    graph: Graph, tmp_path: Path, rng: random.Random, image: NewImage
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", image)
    node = await qcow2_node(graph, path)
    model = bytearray(SIZE)
    for size in (SIZE + 512, 300_032, 300_032 + 7 * 512, 80 * MiB, MiB, 5 * MiB):
        await change(node, model, rng, 5)
        await node.write(len(model) - 100, memoryview(b"\xff" * 100), fua=False)
        model[-100:] = b"\xff" * 100
        await graph.resize(node, size)
        assert node.size == size
        model = model[:size] + bytes(max(0, size - len(model)))
        assert await read_all(node) == model
    await graph.remove(node)
    check_qcow2(path)
    raw = tmp_path / "raw"
    qemu_img(["convert", "-O", "raw", path, raw])
    assert raw.read_bytes() == model


@pytest.mark.parametrize("image", [IMAGES["plain"], IMAGES["version 2"], IMAGES["subclusters"]])
async def test_what_is_added_does_not_show_a_longer_backing(
    graph: Graph, tmp_path: Path, image: NewImage
) -> None:
    (tmp_path / "base").write_bytes(os.urandom(2 * SIZE))
    backing = await file_node(graph, tmp_path / "base", 0, read_only=True)
    path = make_qcow2(tmp_path / "x.qcow2", replace(image, size=SIZE - 1000))
    node = await qcow2_node(graph, path, backing=backing)
    expected = (tmp_path / "base").read_bytes()[: SIZE - 1000]
    await graph.resize(node, 3 * SIZE)
    assert await read_all(node) == expected + bytes(2 * SIZE + 1000)
    await graph.remove(node)
    check_qcow2(path)


async def test_what_lies_behind_the_end_of_the_disk_does_not_come_into_it(
    graph: Graph, tmp_path: Path
) -> None:
    """QEMU keeps the state of a virtual machine there."""
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=4 * MiB, cluster_size=4096))
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"s" * 4 * MiB), fua=False)
    await graph.remove(node)
    with path.open("r+b") as file:
        file.seek(h.SIZE_AT)
        file.write(h.SIZE_FIELD.pack(MiB + 512))
    node = await qcow2_node(graph, path)
    await graph.resize(node, 3 * MiB + 512)
    await graph.resize(node, 4 * MiB)
    assert await read_all(node) == b"s" * (MiB + 512) + bytes(3 * MiB - 512)
    await graph.remove(node)
    check_qcow2(path)


async def test_an_image_cannot_be_larger_than_its_tables_can_tell(
    graph: Graph, tmp_path: Path
) -> None:
    node = await qcow2_node(graph, make_qcow2(tmp_path / "x.qcow2", IMAGES["small"]))
    with pytest.raises(CommandError):
        await graph.resize(node, 1 << 50)
    assert node.size == SIZE


@pytest.mark.parametrize("image", [IMAGES["plain"], IMAGES["subclusters"], IMAGES["small"]])
async def test_clusters_that_a_snapshot_shares_are_copied_before_they_change(
    graph: Graph, tmp_path: Path, rng: random.Random, image: NewImage
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", image)
    model = bytearray(SIZE)
    snapshots: dict[str, bytes] = {}
    for name in ("one", "two", "three"):
        node = await qcow2_node(graph, path)
        await change(node, model, rng, 15)
        await graph.remove(node)
        qemu_img(["snapshot", "-c", name, path])
        snapshots[name] = bytes(model)
    node = await qcow2_node(graph, path)
    await change(node, model, rng, 15)
    await graph.remove(node)
    check_qcow2(path)
    for name, content in (*snapshots.items(), ("", bytes(model))):
        source = ["-l", name, path] if name else [path]
        qemu_img(["convert", "-O", "raw", *source, tmp_path / "raw"])
        assert (tmp_path / "raw").read_bytes() == content, name


async def test_l2_tables_that_one_disk_has_in_several_places_are_read_and_copied(
    graph: Graph, tmp_path: Path
) -> None:
    """An increment of a backup has such, where much was zeroed."""
    size, span = 1 * MiB, 32 << 10
    (tmp_path / "base").write_bytes(b"b" * size)
    backing = await file_node(graph, tmp_path / "base", 0, read_only=True)
    path = tmp_path / "x.qcow2"
    writer = ImageWriter(size, cluster_bits=9, backing=("base", "raw"))
    with path.open("wb") as file:
        for offset, piece in (*writer.zeroes(0, size), *writer.finish()):
            file.seek(offset)
            file.write(piece)
    node = await qcow2_node(graph, path, backing=backing)
    assert await read_all(node) == bytes(size)
    model = bytearray(size)
    for number in (0, 3, 4):
        await node.write(number * span + 100, memoryview(b"n" * 300), fua=False)
        model[number * span + 100 : number * span + 400] = b"n" * 300
    await node.discard(7 * span, span)
    assert await read_all(node) == model
    await graph.remove(node)
    check_qcow2(path)
    assert await read_all(await qcow2_node(graph, path, backing=backing)) == model


async def test_a_compressed_image_is_read_and_overwritten(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    content = bytearray(b"".join(bytes([n % 251]) * 1000 for n in range(SIZE // 1000 + 1))[:SIZE])
    (tmp_path / "raw").write_bytes(content)
    path = tmp_path / "x.qcow2"
    qemu_img(["convert", "-c", "-O", "qcow2", tmp_path / "raw", path])
    node = await qcow2_node(graph, path)
    assert await read_all(node) == content
    await change(node, content, rng, 30)
    assert await read_all(node) == content
    await graph.remove(node)
    check_qcow2(path)


async def test_features_that_are_unknown_are_cleared_by_the_first_change_only(
    graph: Graph, tmp_path: Path
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["plain"])
    data = bytearray(path.read_bytes())
    data[88:96] = (1 << 40).to_bytes(8, "big")
    path.write_bytes(data)
    node = await qcow2_node(graph, path)
    await read(node, 0, 100)
    await graph.remove(node)
    assert features(path).autoclear == 1 << 40
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"x"), fua=True)
    assert features(path).autoclear == 0


async def test_a_corrupt_image_is_for_reading(graph: Graph, tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["plain"])
    data = bytearray(path.read_bytes())
    data[79] |= h.CORRUPT
    path.write_bytes(data)
    with pytest.raises(CommandError, match="corrupt"):
        await qcow2_node(graph, path)
    await remove_all(graph)
    node = await qcow2_node(graph, path, read_only=True)
    assert await read(node, 0, 10) == bytes(10)


async def test_space_is_given_back(graph: Graph, tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["plain"])
    node = await qcow2_node(graph, path, options=Qcow2Options(pass_discard_request=True))
    await node.write(0, memoryview(os.urandom(SIZE)), fua=True)
    full = await node.driver.allocated_size()
    await node.discard(0, SIZE)
    await node.flush()
    freed = await node.driver.allocated_size()
    assert full is not None
    assert freed is not None
    assert freed <= full - SIZE * 3 // 4
    assert (await node.block_status(0, SIZE))[0].flags == HOLE | ZERO


async def test_a_point_in_time_stands_while_images_grow(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    active = await qcow2_node(graph, make_qcow2(tmp_path / "vda.qcow2", IMAGES["plain"]))
    model = bytearray(SIZE)
    await change(active, model, rng, 20)
    temp = await qcow2_node(graph, make_qcow2(tmp_path / "temp.qcow2", IMAGES["subclusters"]))
    driver = CopyBeforeWrite(
        on_cbw_error=OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout_s=None,
        min_cluster_size=0,
        bitmap=None,
        temp_limit=None,
    )
    cbw = await add_filter(graph, active, temp, driver)
    access = await add_access(graph, cbw)
    instant = bytes(model)
    for _ in range(6):
        await change(cbw, model, rng, 5)
        assert await read_all(access) == instant
        assert await read_all(cbw) == model
    assert isinstance(active.driver, Qcow2Driver)
    await remove_all(graph)
    check_qcow2(tmp_path / "vda.qcow2")
    check_qcow2(tmp_path / "temp.qcow2")


async def test_a_data_file_grows_under_many_writes(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    (tmp_path / "data").write_bytes(b"")
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE, data_file="data"))
    file = {"driver": "file", "filename": str(path)}
    node = await add_from_options(graph, {"driver": "qcow2", "node-name": "q", "file": file})
    model = bytearray(rng.randbytes(SIZE))
    offsets = [index * 20_000 for index in range(SIZE // 20_000)]
    rng.shuffle(offsets)
    whole = memoryview(model)
    running = [background(node.write(at, whole[at : at + 20_000], fua=False)) for at in offsets]
    for each in running:
        await each
    end = len(offsets) * 20_000
    model[end:] = bytes(SIZE - end)
    assert await read_all(node) == model


async def test_a_dirty_image_is_mended_only_when_it_is_opened(graph: Graph, tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["lazy"])
    data = bytearray(path.read_bytes())
    data[79] |= h.DIRTY
    path.write_bytes(data)
    options: dict[str, object] = {
        "driver": "qcow2",
        "node-name": "q",
        "read-only": True,
        "file": {"driver": "file", "filename": str(path)},
    }
    node = await add_from_options(graph, options)
    with pytest.raises(CommandError, match="dirty"):
        await reopen(graph, [options | {"read-only": False}])
    await graph.remove(node)
    await add_from_options(graph, options | {"read-only": False})
    assert not features(path).incompatible & h.DIRTY


async def test_options_change_while_requests_run(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["small"])
    options: dict[str, object] = {
        "driver": "qcow2",
        "node-name": "q",
        "file": {"driver": "file", "filename": str(path)},
    }
    node = await add_from_options(graph, options)
    model = bytearray(SIZE)
    for more in (
        {"lazy-refcounts": True},
        {"l2-cache-size": 4096, "pass-discard-other": True},
        {"read-only": True},
        {"cache-size": 1 << 20},
    ):
        await change(node, model, rng, 8)
        await reopen(graph, [options | more])
        assert await read_all(node) == model
        if node.read_only:
            await reopen(graph, [options])
    await graph.remove(node)
    check_qcow2(path)


async def write_replying(node: Node, offset: int, data: bytes) -> list[str]:
    """Write, and return whether that was answered early."""
    replied: list[str] = []
    await node.write_replying(offset, memoryview(data), Told(lambda: replied.append("early")))
    return replied


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
async def test_a_write_is_answered_early_only_where_no_table_changes(
    graph: Graph, tmp_path: Path, image: NewImage
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", image)
    node = await qcow2_node(graph, path)
    cluster = node.driver.cluster_size()
    assert not await write_replying(node, 2 * cluster, b"a" * cluster)
    assert await write_replying(node, 2 * cluster + 7, b"b" * 100)
    assert not await write_replying(node, 3 * cluster - 7, b"c" * 100)  # half of it is new
    await node.write_zeroes(2 * cluster, cluster, fua=False, may_unmap=False, no_fallback=False)
    early = await write_replying(node, 2 * cluster, b"d" * 100)
    assert bool(early) == (image.version == 2)  # where zeroes are data
    content = b"d" * 100 + bytes(cluster - 100) + b"c" * 93
    assert await read(node, 2 * cluster, cluster + 93) == content
    await graph.remove(node)
    check_qcow2(path)


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
async def test_a_first_write_that_fails_leaves_nothing_behind(
    graph: Graph, tmp_path: Path, image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", image)
    node = await qcow2_node(graph, path)
    cluster = node.driver.cluster_size()
    await node.write(0, memoryview(b"a"), fua=False)  # now there are tables
    assert node.file is not None
    file = node.file.node

    async def torn(offset: int, data: memoryview, *, fua: bool) -> None:
        await whole(offset, data[: len(data) // 2], fua=fua)
        raise IoError(errno.ENOSPC, "full")

    whole = file.driver.write
    with monkeypatch.context() as patch:
        patch.setattr(file.driver, "write", torn)
        for offset in (2 * cluster + 10, 3 * cluster):
            with pytest.raises(IoError):
                await node.write(offset, memoryview(b"x" * 200), fua=False)
    assert await read(node, 2 * cluster, 2 * cluster) == bytes(2 * cluster)
    # Others get the clusters; of what was torn they must not show anything.
    for number in range(5, 10):
        await node.write(number * cluster + 100, memoryview(b"b"), fua=False)
    for number in range(5, 10):
        content = bytes(100) + b"b" + bytes(cluster - 101)
        assert await read(node, number * cluster, cluster) == content
    await graph.remove(node)
    check_qcow2(path)


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
async def test_first_writes_to_one_cluster_at_a_time_all_arrive(
    graph: Graph, tmp_path: Path, rng: random.Random, image: NewImage
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", image)
    node = await qcow2_node(graph, path)
    expected = bytearray(SIZE)
    running = []
    for place in rng.sample(range(SIZE // 256), 1000):
        data = bytes((rng.randrange(1, 256),)) * 256
        expected[place * 256 : place * 256 + 256] = data
        running.append(background(node.write(place * 256, memoryview(data), fua=False)))
        if len(running) == 50:
            for each in running:
                await each
            running.clear()
    for each in running:
        await each
    assert await read_all(node) == expected
    await graph.remove(node)
    check_qcow2(path)


async def test_an_unknown_feature_is_cleared_before_refcounts_are_counted_anew(
    graph: Graph, tmp_path: Path
) -> None:
    """What it refers to is not counted, so it has to be void then."""
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE, lazy_refcounts=True))
    with path.open("r+b") as file:
        file.seek(h.FEATURES_AT)
        file.write(h.FEATURES_FIELDS.pack(h.DIRTY, h.LAZY_REFCOUNTS, 1 << 60))
    node = await qcow2_node(graph, path)
    assert not features(path).incompatible & h.DIRTY
    assert not features(path).autoclear
    await graph.remove(node)


@pytest.mark.parametrize("what", ["data", "table"])
async def test_a_write_does_not_follow_an_entry_behind_the_end_of_the_file(
    graph: Graph,
    tmp_path: Path,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The file would get as long as the entry says; and the log, whatever a client reads."""
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE))
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"x" * 65536), fua=False)
    await graph.remove(node)
    data = bytearray(path.read_bytes())
    l1 = features(path).l1_table_offset
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ~(1 << 63)
    at = l2 if what == "data" else l1
    data[at : at + 8] = (1 << 63 | 1 << 50).to_bytes(8, "big")
    path.write_bytes(data)
    node = await qcow2_node(graph, path)
    for _ in range(50):
        assert await fails(node.write(0, memoryview(b"y" * 512), fua=False)) == errno.EIO
    assert path.stat().st_size < 1 << 30
    told = [each for each in caplog.records if "behind the end of the file" in each.message]
    assert len(told) == 16
    assert "more damage is not logged" in caplog.text


async def test_the_name_of_a_backing_file_stays_where_it_is_when_the_header_grows(
    graph: Graph, tmp_path: Path
) -> None:
    """A header write may be torn between two sectors: half a new name is another file."""
    make_qcow2(tmp_path / "base", NewImage(size=SIZE))
    path = tmp_path / "x.qcow2"
    qemu_img(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", tmp_path / "base", path])
    places = [features(path).backing_offset]
    for name in ("one", "two", "three"):
        node = await qcow2_node(graph, path)
        bitmap = new_bitmap(node, name, 65536, enabled=True)
        assert node.bitmap_keeper is not None
        await node.bitmap_keeper.keep(bitmap)
        node.bitmaps[name] = bitmap
        await graph.remove(node)
        header = features(path)
        places.append(header.backing_offset)
        assert header.backing_file == str(tmp_path / "base")
        assert path.read_bytes()[header.backing_offset :].startswith(bytes(tmp_path / "base"))
        check_qcow2(path)
    assert places[0] < places[1] == places[2] == places[3]


class _Peer:
    """Several commands of several monitors, each in a drained section of its own."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph = graph
        self.node = node

    async def snapshots(self) -> None:
        for name in ("one", "two", "three"):
            await internal_snapshots.create(self.node, name)
            if name != "three":
                await internal_snapshots.delete(self.node, None, name)

    async def sizes(self) -> None:
        for size in (SIZE + 512, 3 * SIZE, 2 * SIZE):
            await self.graph.resize(self.node, size)

    async def bitmaps(self) -> None:
        assert self.node.bitmap_keeper is not None
        async with asyncio.TaskGroup() as group:
            for name in ("a", "b", "c"):
                group.create_task(self.node.bitmap_keeper.forget(self.node.bitmaps.pop(name)))

    async def names(self) -> None:
        for number in range(3):
            await self.node.driver.change_backing_file(f"name-{number}", "raw")

    async def writes(self) -> None:
        for offset in range(0, SIZE, 2048):
            await until(lambda: not self.node.is_drained)  # as an export does
            await self.node.write(offset, memoryview(b"w" * 2048), fua=False)


@pytest.mark.parametrize("lazy", [False, True])
async def test_changes_by_several_commands_at_a_time_do_not_mix(
    graph: Graph, tmp_path: Path, rng: random.Random, *, lazy: bool
) -> None:
    """Refcount table, snapshots, bitmaps, size: each is told of by the one header."""
    image = NewImage(size=SIZE, cluster_size=512, refcount_bits=64, lazy_refcounts=lazy)
    path = make_qcow2(tmp_path / "x.qcow2", image)
    (tmp_path / "name-2").touch()
    qemu_img(["rebase", "-u", "-b", "name", "-F", "raw", path])
    for name in ("a", "b", "c"):
        qemu_img(["bitmap", "--add", "-g", "512", path, name])
    file = RecordingDriver(path.read_bytes(), rng)
    await graph.add("file", file, {}, read_only=False, discard_enabled=True)
    options = {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": None}
    node = await add_from_options(graph, options)
    peer = _Peer(graph, node)
    async with asyncio.TaskGroup() as group:
        for run in (peer.writes, peer.snapshots, peer.sizes, peer.bitmaps, peer.names):
            group.create_task(run())
    assert await read_all(node) == b"w" * SIZE + bytes(SIZE)
    await graph.remove(node)
    path.write_bytes(file.content)
    check_qcow2(path)
    header = features(path)
    assert (header.size, header.nb_snapshots, header.backing_file) == (2 * SIZE, 1, "name-2")
    assert header.extension(h.EXT_BITMAPS) is None


class _Doubtful(RecordingDriver):
    """A file whose header is written, and then cannot be brought to stable storage."""

    def __init__(self, content: bytes, rng: random.Random) -> None:
        super().__init__(content, rng)
        self.failures = 0  # that are left, from the next change of the header on
        self.watched = slice(0, 512)
        self.good = content
        self.is_ill = False

    async def flush(self) -> None:
        self.is_ill |= self.failures > 0 and (self.content[self.watched] != self.good[self.watched])
        if self.is_ill and self.failures:
            self.failures -= 1
            raise IoError(errno.EIO, "the disk is ill")
        await super().flush()


async def _doubtful(graph: Graph, content: bytes, rng: random.Random) -> tuple[_Doubtful, Node]:
    file = _Doubtful(content, rng)
    await graph.add("file", file, {}, read_only=False, discard_enabled=True)
    options = {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": None}
    node = await add_from_options(graph, options)
    await node.write(0, memoryview(b"a" * 512), fua=True)
    file.good = bytes(file.content)
    return file, node


@pytest.mark.parametrize("failures", [1, 1000])
async def test_a_header_in_doubt_does_not_lose_what_is_flushed_later(
    graph: Graph, tmp_path: Path, rng: random.Random, failures: int
) -> None:
    """The file would be found with another L1 table, which nobody has written since."""
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["small"])
    file, node = await _doubtful(graph, path.read_bytes(), rng)
    file.failures = failures
    with pytest.raises(IoError):
        await graph.resize(node, 4 * SIZE)
    file.failures = 0
    write = node.write(SIZE // 2, memoryview(b"b" * 512), fua=False)
    if failures > 1:  # the header of before could not be had back
        assert await fails(write) == await fails(node.flush()) == errno.EIO
        return
    await write
    await node.flush()
    found = qcow2_image.Image(bytes(file.content)).content()
    assert found[SIZE // 2 :][:512] == b"b" * 512


async def test_a_bitmap_that_may_have_been_stored_is_not_taken_for_complete(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["plain"])
    qemu_img(["bitmap", "--add", path, "b"])
    file, node = await _doubtful(graph, path.read_bytes(), rng)
    file.failures, file.watched = 1, slice(512, 1024)
    old = h.parse_header(bytes(file.content)).extension(h.EXT_BITMAPS)
    again = {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": None}
    with pytest.raises(CommandError, match="the disk is ill"):
        await reopen(graph, [again | {"read-only": True}])
    await node.write(SIZE // 2, memoryview(b"b" * 512), fua=True)
    assert h.parse_header(bytes(file.content)).extension(h.EXT_BITMAPS) == old  # it is in use


async def test_the_dirty_bit_is_set_again_when_it_may_have_been_cleared(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", IMAGES["lazy"])
    file, node = await _doubtful(graph, path.read_bytes(), rng)
    file.failures = 1
    again = {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": None}
    with pytest.raises(CommandError, match="the disk is ill"):
        await reopen(graph, [again])
    await node.write(SIZE // 2, memoryview(b"b" * 512), fua=True)
    assert h.parse_header(bytes(file.content)).incompatible & h.DIRTY


@pytest.mark.deadline(10)
async def test_closing_is_given_up_when_the_disk_is_stuck(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that has to end does not wait for ever."""
    graph, path = Graph(), make_qcow2(tmp_path / "x.qcow2", IMAGES["plain"])
    file, node = await _doubtful(graph, path.read_bytes(), rng)
    stuck = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(file, "flush", lambda: stuck)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await graph.remove(node)
