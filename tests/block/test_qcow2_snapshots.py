"""Internal snapshots of qcow2 nodes: made, read under a writing guest, deleted, gone back to."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, InUse, IoError, NotFound
from nbdfleece.base.extent import ZERO
from nbdfleece.block import internal_snapshots
from nbdfleece.block.drain import quiet
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from tests.support.driver_kit import remove_all
from tests.support.power_cut import RecordingDriver
from tests.support.qcow2_history import (
    KiB,
    MiB,
    check,
    open_image,
    random_step,
    raw_content,
    read_all,
    run,
)
from tests.support.qcow2_image import Image
from tests.support.waiting import turns

pytestmark = pytest.mark.interop("qemu-img", "qemu-io")

Program = Callable[[str], str]
SIZE = 2 * MiB
VERBS = ["write", "write", "write", "zeroes", "unmap", "discard", "flush"]

KINDS = {
    "plain": "cluster_size=64k",
    "4k": "cluster_size=4k",
    "512": "cluster_size=512",
    "extended": "cluster_size=16k,extended_l2=on",
    "lazy": "cluster_size=4k,lazy_refcounts=on",
    "4 bits": "cluster_size=4k,refcount_bits=4",
}


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


def create(
    program: Program, path: Path, options: str = "cluster_size=4k", size: int = SIZE
) -> Path:
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


async def write(node: Node, offset: int, data: bytes) -> None:
    await node.write(offset, memoryview(data), fua=False)


async def access(graph: Graph, snapshot: str, name: str = "access") -> Node:
    options = {"driver": "snapshot-access", "node-name": name, "file": "disk"}
    return await add_from_options(graph, options | {"snapshot": snapshot, "read-only": True})


async def apply(node: Node, name: str) -> None:
    found = internal_snapshots.find(node, None, name)
    assert found is not None
    async with quiet(node):
        await internal_snapshots.snapshots_of(node).apply(found.id)


async def history(node: Node, disk: bytearray, rng: random.Random, steps: int) -> None:
    cluster = 4 * KiB
    for _ in range(steps):
        step = random_step(rng, len(disk), cluster, verbs=VERBS, most=len(disk))
        await step.apply(node)
        if step.verb == "discard":
            await node.read(step.offset, memoryview(disk)[step.offset :][: step.length])
        else:
            step.model(disk, cluster)


@pytest.mark.slow
@pytest.mark.deadline(600)
@pytest.mark.parametrize("kind", KINDS)
async def test_random_histories_with_snapshots_equal_qemu(
    tmp_path: Path, program: Program, rng: random.Random, kind: str, *, long_run: bool
) -> None:
    path = create(program, tmp_path / "image", KINDS[kind])
    disk = bytearray(SIZE)
    saved: dict[str, bytes] = {}
    for batch in range(12 if long_run else 3):
        graph = Graph()
        try:
            node = await open_image(graph, path)
            assert {each.name for each in internal_snapshots.snapshots_of(node).all()} == set(saved)
            for step in range(4):
                await history(node, disk, rng, 8)
                verb = rng.choice(["create", "create", "delete", "apply"])
                if verb == "create":
                    name = f"s{batch}.{step}"
                    await internal_snapshots.create(node, name)
                    saved[name] = bytes(disk)
                elif saved:
                    name = rng.choice(list(saved))
                    if verb == "delete":
                        await internal_snapshots.delete(node, None, name)
                        del saved[name]
                    else:
                        await apply(node, name)
                        disk[:] = saved[name]
                assert await read_all(node) == disk
            await history(node, disk, rng, 8)
        finally:
            await remove_all(graph)
        check(program, path)
        assert raw_content(program, path) == disk
        for name, content in saved.items():
            assert raw_content(program, path, "-l", name) == content
        if saved and rng.random() < 0.7:
            name = rng.choice(list(saved))
            if rng.random() < 0.5:
                run(program("qemu-img"), "snapshot", "-a", name, path)
                disk[:] = saved[name]
            else:
                run(program("qemu-img"), "snapshot", "-d", name, path)
                del saved[name]


async def test_snapshots_of_version_2_are_read_and_not_changed(
    tmp_path: Path, program: Program, graph: Graph, rng: random.Random
) -> None:
    """A crash in between would be damage to qemu-img check: there is no dirty bit."""
    path = create(program, tmp_path / "image", "cluster_size=4k,compat=0.10")
    run(program("qemu-io"), "-f", "qcow2", "-c", "write -P 5 0 200k", path)
    run(program("qemu-img"), "snapshot", "-c", "one", path)
    node = await open_image(graph, path)
    for change in (
        internal_snapshots.create(node, "two"),
        internal_snapshots.delete(node, None, "one"),
        apply(node, "one"),
    ):
        with pytest.raises(CommandError, match="could damage an image of version 2"):
            await change
    before = path.read_bytes()
    reader = await access(graph, "one")
    assert path.read_bytes() == before
    disk = bytearray(SIZE)
    disk[: 200 * KiB] = b"\x05" * (200 * KiB)
    await write(node, 0, rng.randbytes(SIZE))
    assert await read_all(reader) == disk
    await remove_all(graph)
    check(program, path)
    assert raw_content(program, path, "-l", "one") == disk


async def test_a_snapshot_is_read_while_the_guest_overwrites_everything(
    tmp_path: Path, program: Program, graph: Graph, rng: random.Random
) -> None:
    node = await open_image(graph, create(program, tmp_path / "image"))
    disk = bytearray(SIZE)
    await history(node, disk, rng, 60)
    await internal_snapshots.create(node, "one")
    instant = bytes(disk)
    reader = await access(graph, "one")

    async def overwrite() -> None:
        for offset in range(0, SIZE, 12 * KiB):
            await write(node, offset, (b"new!" * (3 * KiB))[: SIZE - offset])
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(overwrite())
        for _ in range(3):
            assert await read_all(reader, 50_001) == instant
    assert await read_all(reader) == instant
    assert await read_all(node) == (b"new!" * (SIZE // 4))
    offset = 0
    while offset < SIZE:
        for at, length, flags in await reader.block_status(offset, SIZE - offset):
            if flags & ZERO:
                assert not any(instant[at : at + length])
            offset = at + length


async def test_a_snapshot_has_its_own_size(tmp_path: Path, program: Program, graph: Graph) -> None:
    node = await open_image(graph, create(program, tmp_path / "image"))
    await write(node, SIZE - 512, b"e" * 512)
    await internal_snapshots.create(node, "long")
    await graph.resize(node, 64 * KiB)
    await internal_snapshots.create(node, "short")
    await graph.resize(node, 3 * MiB)
    long, short = await access(graph, "long", "l"), await access(graph, "short", "s")
    assert (long.size, short.size, node.size) == (SIZE, 64 * KiB, 3 * MiB)
    assert (await read_all(long))[-512:] == b"e" * 512
    assert not any(await read_all(short))
    with pytest.raises(IoError):
        await short.read(64 * KiB, memoryview(bytearray(1)))


async def test_an_access_node_refuses_to_change_anything(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    node = await open_image(graph, create(program, tmp_path / "image"))
    await internal_snapshots.create(node, "one")
    reader = await access(graph, "1")
    for refused in (
        write(reader, 0, b"x"),
        reader.discard(0, 512),
        reader.write_zeroes(0, 512, fua=False, may_unmap=False, no_fallback=False),
    ):
        with pytest.raises(IoError):
            await refused


async def test_a_snapshot_in_use_is_not_deleted(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    node = await open_image(graph, create(program, tmp_path / "image"))
    await internal_snapshots.create(node, "one")
    reader, other = await access(graph, "one"), await access(graph, "1", "other")
    for each in (reader, other):
        with pytest.raises(InUse):
            await internal_snapshots.delete(node, None, "one")
        await graph.remove(each)
    gone = await internal_snapshots.delete(node, "1", "one")
    assert (gone.id, gone.name) == ("1", "one")
    with pytest.raises(NotFound):
        await access(graph, "one")


async def test_a_snapshot_that_is_being_deleted_is_not_opened(
    tmp_path: Path,
    program: Program,
    graph: Graph,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its clusters would become somebody else's while it is read."""
    first = create(program, tmp_path / "image", size=256 * KiB).read_bytes()
    opened = 0
    monkeypatch.setattr("nbdfleece.block.drivers.qcow2.image.QCOW2_GROW", 64 * KiB)
    for delay in range(40):
        await graph.add("file", RecordingDriver(first, rng), read_only=False, discard_enabled=True)
        node = await add_from_options(
            graph, {"driver": "qcow2", "node-name": "disk", "file": "file"}
        )
        await write(node, 0, b"x" * 64 * KiB)
        await internal_snapshots.create(node, "one")
        async with asyncio.TaskGroup() as group:
            deleting = group.create_task(_result(internal_snapshots.delete(node, None, "one")))
            await turns(delay)
            opening = group.create_task(_result(access(graph, "one")))
        if isinstance(opening.result(), Node):
            opened += 1
            assert isinstance(deleting.result(), InUse)
            assert internal_snapshots.find(node, None, "one")
        await remove_all(graph)
    assert opened < 40


async def test_a_command_that_is_given_up_leaves_no_change_half_done(
    tmp_path: Path,
    program: Program,
    graph: Graph,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is in memory would not be what is on disk, and the rest of it be written there."""
    path = create(program, tmp_path / "image", size=256 * KiB)
    monkeypatch.setattr("nbdfleece.block.drivers.qcow2.image.QCOW2_GROW", 64 * KiB)
    for change in ("delete", "create", "resize"):
        for delay in range(0, 30, 3):
            file = RecordingDriver(path.read_bytes(), rng)
            await graph.add("file", file, read_only=False, discard_enabled=True)
            options = {"driver": "qcow2", "node-name": "disk", "file": "file"}
            node = await add_from_options(graph, options)
            await write(node, 0, b"x" * 64 * KiB)
            await internal_snapshots.create(node, "one")
            running = asyncio.create_task(_change(graph, node, change))
            await turns(delay)
            running.cancel()
            await asyncio.wait([running])
            await write(node, 128 * KiB, b"y" * 64 * KiB)
            expected = await read_all(node) if node.size < MiB else None
            await remove_all(graph)
            found = Image(bytes(file.content))
            assert (found.check().corruptions, found.check().leaks) == ([], 0)
            assert expected is None or found.content() == expected


async def _change(graph: Graph, node: Node, change: str) -> None:
    if change == "delete":
        await internal_snapshots.delete(node, None, "one")
    elif change == "create":
        await internal_snapshots.create(node, "two")
    else:
        await graph.resize(node, 512 * MiB)


async def _result(request: Awaitable[object]) -> object:
    try:
        return await request
    except CommandError as error:
        return error


async def test_what_cannot_be_is_refused(tmp_path: Path, program: Program, graph: Graph) -> None:
    node = await open_image(graph, create(program, tmp_path / "image"))
    await internal_snapshots.create(node, "one")
    with pytest.raises(CommandError, match="already exists"):
        await internal_snapshots.create(node, "one")
    with pytest.raises(CommandError, match="Name is empty"):
        await internal_snapshots.create(node, "")
    with pytest.raises(NotFound):
        await internal_snapshots.delete(node, None, "two")
    with pytest.raises(NotFound):
        await internal_snapshots.delete(node, "2", "one")
    with pytest.raises(CommandError, match="Name or id"):
        await internal_snapshots.delete(node, None, None)


async def test_a_refcount_too_narrow_refuses_the_snapshot_and_changes_nothing(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    path = create(program, tmp_path / "image", "cluster_size=4k,refcount_bits=1")
    node = await open_image(graph, path)
    await write(node, 0, b"x" * MiB)
    with pytest.raises(CommandError, match="refcount"):
        await internal_snapshots.create(node, "one")
    await write(node, 4096, b"y" * 4096)
    await remove_all(graph)
    found = Image(path.read_bytes()).check()
    assert (found.corruptions, found.leaks, found.dirty) == ([], 0, False)
    check(program, path)


async def test_an_image_with_a_data_file_has_no_snapshots(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    path = create(program, tmp_path / "image", f"data_file={tmp_path}/data")
    node = await open_image(graph, path)
    with pytest.raises(CommandError, match="external data file"):
        await internal_snapshots.create(node, "one")


async def test_snapshots_whose_data_is_in_another_file_are_not_touched(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    """Nobody makes them; the refcounts of what they seem to refer to are of something else."""
    path = create(program, tmp_path / "image")
    node = await open_image(graph, path)
    await write(node, 0, b"x" * MiB)
    await internal_snapshots.create(node, "one")
    await remove_all(graph)
    (tmp_path / "data").write_bytes(bytes(SIZE))
    data = bytearray(path.read_bytes())
    data[79] |= 4
    path.write_bytes(data)
    other = {"driver": "file", "filename": str(tmp_path / "data")}
    node = await open_image(graph, path, **{"data-file": other})
    with pytest.raises(CommandError, match="external data file"):
        await internal_snapshots.delete(node, None, "one")
    with pytest.raises(CommandError, match="external data file"):
        await apply(node, "one")
    with pytest.raises(CommandError, match="external data file"):
        await access(graph, "one")


async def test_a_snapshot_whose_l1_table_takes_more_than_one_refcount_block(
    tmp_path: Path, program: Program, graph: Graph
) -> None:
    """Blocks that come with it must not stand in its way, for ever."""
    path = tmp_path / "image"
    options = "cluster_size=512,refcount_bits=64"
    run(program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", options, path, "1G")
    node = await open_image(graph, path)
    await write(node, 1000 * MiB, b"x" * 512)
    await internal_snapshots.create(node, "one")
    await write(node, 1000 * MiB, b"y" * 512)
    await graph.resize(node, 2048 * MiB)
    view = bytearray(512)
    await (await access(graph, "one")).read(1000 * MiB, memoryview(view))
    assert view == b"x" * 512
    await remove_all(graph)
    check(program, path)


@pytest.mark.parametrize("refuse", ["read-only", "raw"])
async def test_nodes_without_snapshots_say_so(
    tmp_path: Path, program: Program, graph: Graph, refuse: str
) -> None:
    path = create(program, tmp_path / "image")
    if refuse == "raw":
        options = {"driver": "file", "filename": str(path), "node-name": "disk"}
        node = await add_from_options(graph, options)
        complaint = "does not support internal snapshots"
    else:
        node = await open_image(graph, path, **{"read-only": True})
        complaint = "read only"
    with pytest.raises(CommandError, match=complaint):
        await internal_snapshots.create(node, "one")


async def test_snapshots_of_compressed_clusters_share_and_free_them(
    tmp_path: Path, program: Program, rng: random.Random
) -> None:
    source, path = tmp_path / "source", tmp_path / "image"
    data = b"".join(rng.randbytes(2048) + bytes(2048) for _ in range(256))
    source.write_bytes(data)
    convert = (program("qemu-img"), "convert", "-c", "-f", "raw", "-O", "qcow2")
    run(*convert, "-o", "cluster_size=4k", source, path)
    graph = Graph()
    try:
        node = await open_image(graph, path)
        await internal_snapshots.create(node, "one")
        await write(node, 0, b"n" * (512 * KiB))
        reader = await access(graph, "one")
        assert await read_all(reader) == data
        await graph.remove(reader)
        await apply(node, "one")
        assert await read_all(node) == data
        await internal_snapshots.delete(node, None, "one")
        assert await read_all(node) == data
    finally:
        await remove_all(graph)
    check(program, path)
    assert raw_content(program, path) == data


def test_qemu_img_lists_what_we_made(tmp_path: Path, program: Program) -> None:
    path = create(program, tmp_path / "image")

    async def make() -> None:
        graph = Graph()
        try:
            node = await open_image(graph, path)
            await internal_snapshots.create(node, "one")
            await internal_snapshots.create(node, "zwei ö")
        finally:
            await remove_all(graph)

    asyncio.run(make())
    listed = subprocess.run(
        [program("qemu-img"), "snapshot", "-l", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "one" in listed
    assert "zwei ö" in listed
