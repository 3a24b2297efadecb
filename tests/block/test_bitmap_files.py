"""Bitmaps that outlive the process: a file is never less than what is dirty."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import bitmap_files
from nbdfleece.block.bitmap import DirtyBitmap, abdicate, freeze, new_bitmap, reclaim
from nbdfleece.block.bitmap_files import BitmapFile, DiskBitmaps, identity_of
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.formats.bitmap_file import HEADER_SIZE, unpack
from tests.support.fleecing import add_plain
from tests.support.memory import MemoryDriver
from tests.support.waiting import turns, until

GRANULE = 512
GRANULES = 20_000  # more than a page of states, and less than two
SIZE = GRANULE * GRANULES
DISK = bytes(32)


class Bench:
    """A node with one persistent bitmap; `restart` is a process that finds the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bitmaps"

    async def open(self) -> None:
        self.node = await add_plain(Graph(), MemoryDriver(bytearray(SIZE)))
        self.kept = DiskBitmaps(self.folder, self.node, DISK)

    async def add(self, name: str = "b", granularity: int = GRANULE) -> DirtyBitmap:
        bitmap = new_bitmap(self.node, name, granularity, enabled=True)
        await self.kept.keep(bitmap)
        self.node.bitmaps[name] = bitmap
        return bitmap

    async def other(self, *, size: int = SIZE, read_only: bool = False) -> Node:
        node = await add_plain(Graph(), MemoryDriver(bytearray(size)))
        node.read_only = read_only
        return node

    async def peek(self, mtime_ns: int = 0) -> list[DirtyBitmap]:
        """What a process would find that only looks."""
        return DiskBitmaps(self.folder, await self.other(read_only=True), DISK).load(mtime_ns)

    async def restart(
        self, *, size: int = SIZE, identity: bytes = DISK, mtime_ns: int = 0
    ) -> list[DirtyBitmap]:
        self.close()
        self.node = await self.other(size=size)
        self.kept = DiskBitmaps(self.folder, self.node, identity)
        self.node.bitmaps = {found.name: found for found in self.kept.load(mtime_ns)}
        return list(self.node.bitmaps.values())

    def close(self) -> None:
        for store in {each.store for each in self.node.bitmaps.values()}:
            if isinstance(store, BitmapFile):
                store.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.open()
    yield bench
    bench.close()


def dirty(bitmap: DirtyBitmap) -> set[int]:
    return {index for first, last in bitmap.runs() for index in range(first, last)}


async def write(node: Node, offset: int, length: int) -> None:
    await node.write(offset, memoryview(bytes(length)), fua=False)


# --- what a file holds ---------------------------------------------------------------------------


async def test_at_every_moment_the_file_holds_what_is_dirty(
    bench: Bench, rng: random.Random
) -> None:
    """A random history of a bitmap; somebody looks at the file after every step (K2)."""
    await bench.add()
    model, frozen = set[int](), set[int]()
    for _ in range(300):
        bitmap = bench.node.bitmaps["b"]
        action = rng.randrange(12)
        if action == 0 and bitmap.successor is None:
            freeze(bench.node.bitmaps, bitmap)
            frozen, model = model, set()
        elif action == 1 and bitmap.successor is not None:
            abdicate(bench.node.bitmaps, bitmap)
            frozen = set()
        elif action == 2 and bitmap.successor is not None:
            reclaim(bench.node.bitmaps, bitmap)
            model, frozen = model | frozen, set()
        elif action == 3 and bitmap.successor is None:
            taken = bitmap.take()
            (found,) = await bench.peek()
            assert dirty(found) >= model, "what can be put back"
            if rng.random() < 0.3:
                bitmap.put_back(taken)
            else:
                bitmap.settle()
                model = set()
        elif action == 4 and bitmap.successor is None and rng.random() < 0.3:
            bitmap.set(0, SIZE)
            model = set(range(GRANULES))
        else:
            length = rng.choice((1, 512, 100_000))
            offset = rng.randrange(SIZE - length + 1)
            await write(bench.node, offset, length)
            model |= set(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
        (found,) = await bench.peek()
        assert dirty(found) == model | frozen
        assert found.enabled
    (found,) = await bench.restart()
    assert dirty(found) == model | frozen


async def test_while_it_is_settled_little_by_little_the_file_is_never_less(
    bench: Bench, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K2 at every turn of the loop; at rest the file is exactly what is dirty."""
    monkeypatch.setattr(bitmap_files, "_SETTLE_PAGES", 1)
    count = 5 * 16384 + 77
    bench.node = await bench.other(size=count * GRANULE)
    bench.kept = DiskBitmaps(bench.folder, bench.node, DISK)

    async def look(wanted: set[int], *, at_rest: bool) -> None:
        one = await bench.other(size=count * GRANULE, read_only=True)
        (found,) = DiskBitmaps(bench.folder, one, DISK).load(0)
        assert dirty(found) == wanted if at_rest else dirty(found) >= wanted

    await bench.add()
    model, frozen = set[int](), set[int]()
    for _ in range(120):
        bitmap = bench.node.bitmaps["b"]
        action = rng.randrange(10)
        if action == 0 and bitmap.successor is None:
            freeze(bench.node.bitmaps, bitmap)
            frozen, model = model, set()
        elif action == 1 and bitmap.successor is not None:
            abdicate(bench.node.bitmaps, bitmap)
            frozen = set()
        elif action == 2 and bitmap.successor is not None:
            reclaim(bench.node.bitmaps, bitmap)
            model, frozen = model | frozen, set()
        elif action == 3 and bitmap.successor is None:
            taken = bitmap.take()
            await turns(rng.randrange(8))
            await look(model, at_rest=False)
            if rng.random() < 0.5:
                bitmap.put_back(taken)
            else:
                bitmap.settle()
                model = set()
        elif action == 4 and bitmap.successor is None:
            bitmap.set(0, bitmap.size)
            model = set(range(count))
        else:
            length = rng.choice((1, 512, 10_000_000))
            offset = rng.randrange(bitmap.size - length + 1)
            await write(bench.node, offset, length)
            model |= set(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
        await turns(rng.choice((0, 1, 2)))
        await look(model | frozen, at_rest=False)
    bench.node.bitmaps["b"].settle()
    await turns(10)
    await look(model | frozen, at_rest=True)


async def test_a_clean_end_settles_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmap_files, "_SETTLE_PAGES", 1)
    bitmap = await bench.add()
    bitmap.set(0, SIZE - GRANULE)
    bitmap.take()
    bitmap.set(0, GRANULE)
    bitmap.settle()

    bench.kept.finish(1)

    bench.node.bitmaps.clear()
    (found,) = await bench.peek(1)
    assert dirty(found) == {0}


async def test_content_that_is_put_back_is_in_the_file_whatever_was_settled_meanwhile(
    bench: Bench,
) -> None:
    bitmap = await bench.add()
    bitmap.set(GRANULE, GRANULE)
    taken = bitmap.take()
    bitmap.settle()

    bitmap.put_back(taken)

    (found,) = await bench.peek()
    assert dirty(found) == {1}


async def test_whether_it_records_is_kept(bench: Bench) -> None:
    bitmap = await bench.add()
    for enabled in (False, True):
        bitmap.enabled = enabled
        bitmap.settle()
        (found,) = await bench.peek()
        assert found.enabled is enabled


async def test_one_that_is_all_dirty_is_so_without_a_byte_for_each_granule(bench: Bench) -> None:
    bitmap = new_bitmap(bench.node, "b", GRANULE, enabled=True)
    bitmap.set(0, SIZE)
    await bench.kept.keep(bitmap)
    bench.node.bitmaps["b"] = bitmap
    (path,) = bench.folder.iterdir()
    assert path.stat().st_blocks * 512 <= HEADER_SIZE
    (found,) = await bench.peek()
    assert found.count() == SIZE
    freeze(bench.node.bitmaps, bitmap)
    await write(bench.node, 0, 1)
    abdicate(bench.node.bitmaps, bitmap)
    (found,) = await bench.peek()
    assert dirty(found) == {0}


async def test_a_resize_is_followed(bench: Bench) -> None:
    bitmap = await bench.add()
    await write(bench.node, 0, SIZE)
    for size in (SIZE // 2, 2 * SIZE):
        bitmap.resize(size)
    bench.node.bitmaps = {"b": bitmap}
    (found,) = await bench.restart(size=2 * SIZE)
    assert not found.inconsistent
    assert dirty(found) == set(range(GRANULES // 2))


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_full", [False, True])
async def test_the_file_of_a_bitmap_in_the_making_cannot_be_trusted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, is_full: bool
) -> None:
    """Whoever made it was killed, or gave up because the folder hangs; guests go on."""
    make, released = bitmap_files._make, threading.Event()

    def slow(*args: Any) -> BitmapFile:
        store = make(*args)
        released.wait()
        return store

    monkeypatch.setattr(bitmap_files, "_make", slow)
    bitmap = new_bitmap(bench.node, "b", GRANULE, enabled=True)
    bitmap.set(0, SIZE if is_full else GRANULE)
    keeping = asyncio.create_task(bench.kept.keep(bitmap))
    await until(lambda: bench.folder.is_dir() and list(bench.folder.iterdir()))
    await asyncio.sleep(0.05)
    keeping.cancel()
    await asyncio.wait([keeping])
    released.set()
    (found,) = await bench.restart(mtime_ns=1)
    assert (found.inconsistent, found.reason) == (True, "it was not finished")


async def test_a_bitmap_that_cannot_be_written_is_not_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitmap = new_bitmap(bench.node, "b", GRANULE, enabled=True)
    bitmap.set(0, GRANULE)
    with monkeypatch.context() as patch:
        fail_writes(patch, headers=False)
        with pytest.raises(CommandError, match="No space left"):
            await bench.kept.keep(bitmap)
    assert list(bench.folder.iterdir()) == []
    assert (bitmap.persistent, bitmap.store) == (False, None)
    await bench.kept.keep(bitmap)
    bench.node.bitmaps["b"] = bitmap
    (found,) = await bench.peek()
    assert dirty(found) == {0}


@pytest.mark.parametrize("length", [1, SIZE])
@pytest.mark.parametrize("headers", [False, True])
async def test_marks_that_cannot_be_written_make_the_file_untrusted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, length: int, *, headers: bool
) -> None:
    """Also where not even the header can be, as on a full file system that copies on write."""
    await bench.add()
    with monkeypatch.context() as patch:
        fail_writes(patch, headers=headers)
        await write(bench.node, 0, length)
        if length == SIZE and not headers:  # that takes a header only
            await write(bench.node, 0, length)
    assert dirty(bench.node.bitmaps["b"]) >= {0}
    await write(bench.node, 5 * GRANULE, 1)
    (found,) = await bench.restart(mtime_ns=1)
    assert found.inconsistent or dirty(found) == set(range(GRANULES))


def fail_writes(patch: pytest.MonkeyPatch, *, headers: bool) -> None:
    """Let there be no space for marks, or not for headers either."""
    real = bitmap_files._write

    def fail(fd: int, data: bytes, offset: int) -> None:
        if headers or offset:
            raise OSError(errno.ENOSPC, "full")
        real(fd, data, offset)

    patch.setattr(bitmap_files, "_write", fail)


# --- restarts ------------------------------------------------------------------------------------


async def test_a_clean_end_keeps_it_over_a_restart_of_the_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.add()
    await write(bench.node, 5 * GRANULE, 1)
    bench.kept.finish(123)
    bench.node.bitmaps = {}
    monkeypatch.setattr(bitmap_files, "_boot_id", lambda: b"y" * 16)
    (found,) = await bench.restart(mtime_ns=123)
    assert (dirty(found), found.inconsistent, found.persistent) == ({5}, False, True)
    assert found.recording
    await write(bench.node, 6 * GRANULE, 1)
    (found,) = await bench.restart(mtime_ns=123)
    assert dirty(found) == {5, 6}, "and it is in use again"
    monkeypatch.setattr(bitmap_files, "_boot_id", lambda: b"z" * 16)
    (found,) = await bench.restart(mtime_ns=123)
    assert found.reason == "the machine stopped while it was in use"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mtime_ns": 124}, "the disk was changed while it was not served"),
        ({"identity": b"x" * 32}, "the disk is not the one that it was made for"),
        ({"size": SIZE + 512}, f"the disk has {SIZE + 512} bytes, and had {SIZE}"),
    ],
)
async def test_what_cannot_be_trusted_stays_so(
    bench: Bench, change: dict[str, object], reason: str
) -> None:
    """K3: also when all looks right again, since nothing was recorded meanwhile."""
    await bench.add()
    bench.kept.finish(123)
    bench.node.bitmaps = {}
    for after in (change, {}):
        (found,) = await bench.restart(**{"mtime_ns": 123, **after})  # type: ignore[arg-type]
        assert (found.inconsistent, found.recording, found.count()) == (True, False, 0)
        assert (found.reason, found.persistent, found.busy) == (reason, True, False)
    bitmap = bench.node.bitmaps.pop("b")
    await bench.kept.forget(bitmap)
    await bench.add()
    (found,) = await bench.restart()
    assert not found.inconsistent


async def test_a_change_after_the_process_died_is_seen(bench: Bench, tmp_path: Path) -> None:
    """K4: of a file in use the header says how late our own last write can have been."""
    await bench.add()
    await write(bench.node, 0, 1)
    probe = tmp_path / "probe"
    probe.touch()
    written = probe.stat().st_mtime_ns
    (found,) = await bench.restart(mtime_ns=written)
    assert not found.inconsistent
    (found,) = await bench.restart(mtime_ns=written + 10_000_000_000)
    assert found.reason == "the disk was changed while it was not served"


@pytest.mark.parametrize("at", [0, 20, 100, HEADER_SIZE + 5])
async def test_a_damaged_file_is_an_inconsistent_bitmap(bench: Bench, at: int) -> None:
    await bench.add("a b/c")
    bench.kept.finish(0)
    bench.node.bitmaps = {}
    (path,) = bench.folder.iterdir()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes((byte[0] ^ 1,)))
    (found,) = await bench.restart()
    assert (found.name, found.reason) == ("a b/c", "its file is damaged")
    assert found.inconsistent
    await bench.kept.forget(found)
    assert not list(bench.folder.iterdir())


async def test_a_file_of_another_version_is_refused_by_name(bench: Bench) -> None:
    await bench.add()
    (path,) = bench.folder.iterdir()
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\7")
    before = path.read_bytes()
    with pytest.raises(CommandError, match=f"'{path}' is of version 7"):
        await bench.restart()
    bench.node.bitmaps = {}
    assert path.read_bytes() == before


async def test_a_read_only_disk_leaves_its_files_alone(bench: Bench) -> None:
    await bench.add()
    await write(bench.node, 0, 1)
    bench.kept.finish(9)
    bench.node.bitmaps = {}
    (path,) = bench.folder.iterdir()
    before = path.read_bytes()
    (found,) = await bench.peek(9)
    assert (found.readonly, found.store, dirty(found)) == (True, None, {0})
    (found,) = await bench.peek(10)
    assert found.inconsistent
    assert path.read_bytes() == before
    node = await bench.other(read_only=True)
    with pytest.raises(CommandError, match="read-only"):
        await DiskBitmaps(bench.folder, node, DISK).keep(found)


# --- names, errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "..", ".", "é", "x" * 1023, "%2E", "a\nb"])
async def test_any_name_of_a_bitmap_finds_its_file_again(bench: Bench, name: str) -> None:
    await bench.add(name)
    (path,) = bench.folder.iterdir()
    assert path.parent == bench.folder
    header = unpack(path.read_bytes()[:HEADER_SIZE])
    assert header is not None
    (found,) = await bench.restart()
    assert found.name == header.name == name
    await bench.kept.forget(bench.node.bitmaps.pop(name))
    assert not list(bench.folder.iterdir())


async def test_one_that_cannot_be_written_is_lost_after_a_restart_and_good_until_then(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitmap = await bench.add()
    await write(bench.node, 0, 1)
    plain = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset >= HEADER_SIZE:
            raise OSError(28, "No space left on device")
        return plain(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    await write(bench.node, 7 * GRANULE, 1)
    monkeypatch.undo()
    assert dirty(bitmap) == {0, 7}
    bitmap.check_usable(to_change=True)
    bitmap.settle()
    (found,) = await bench.restart()
    assert found.reason == "it could not be written: No space left on device"


async def test_a_removed_bitmap_whose_file_stays_is_not_found_as_good(bench: Bench) -> None:
    bitmap = await bench.add()
    assert bitmap.store is not None
    bitmap.store.abandon("it was removed")
    (found,) = await bench.restart()
    assert (found.inconsistent, found.reason) == (True, "it was removed")


async def test_two_of_one_name_are_refused(bench: Bench) -> None:
    await bench.add()
    twin = DirtyBitmap("b", size=SIZE, granularity=GRANULE, enabled=True)
    with pytest.raises(CommandError, match="File exists"):
        await bench.kept.keep(twin)
    assert not twin.persistent


def test_a_file_is_known_by_its_inode_and_all_else_by_its_name() -> None:
    facts = {"location": "/a", "inode": 7, "device": 1}
    assert identity_of(facts, is_file=True) == identity_of(
        {**facts, "location": "/b", "device": 2}, is_file=True
    )
    assert identity_of(facts, is_file=True) != identity_of({**facts, "inode": 8}, is_file=True)
    assert identity_of(facts, is_file=False) == identity_of({**facts, "inode": 8}, is_file=False)
    assert identity_of(facts, is_file=False) != identity_of(
        {**facts, "location": "/b"}, is_file=False
    )
