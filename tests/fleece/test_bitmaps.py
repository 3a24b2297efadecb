"""Bitmaps tied to snapshots: each write is in the snapshot or in the next increment."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block import drain
from nbdfleece.block.bitmap import DirtyBitmap, new_bitmap
from nbdfleece.block.drivers._posix import OpenImage
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.fleece.disk import Disk
from nbdfleece.fleece.disk import _OwnFile as OwnFile
from nbdfleece.fleece.fleece import Fleece
from nbdfleece.fleece.location import make_location
from nbdfleece.fleece.snapshot import Snapshot, SnapshotOptions
from nbdfleece.fleece.store import StateFolder
from nbdfleece.fleece.taking import Taking
from nbdfleece.server.exports import Exports
from nbdfleece.server.tokens import Tokens
from tests.jobs.test_backup import Guest
from tests.support.fleecing import add_filter, add_plain, read_all
from tests.support.live import soon
from tests.support.memory import MemoryDriver
from tests.support.waiting import turns, until

GRANULE = 4096
GRANULES = 256
SIZE = GRANULE * GRANULES


class Bench:
    """Fleece with two raw disks."""

    def __init__(self, folder: Path) -> None:
        self.graph = Graph()
        self.exports = Exports(self.graph)
        self.state = StateFolder(folder / "state", None)
        self.state.open()
        self.fleece = Fleece(self.graph, self.exports, self.state, Tokens(time.monotonic))
        self.folder = folder

    async def add(self, name: str) -> Disk:
        path = self.folder / f"{name}.raw"
        path.write_bytes(bytes(SIZE))
        return await self.fleece.add_disk(make_location(name, str(path), {}))

    async def take(self, *disks: str, bitmap: str | None = "b", name: str = "s") -> list[Snapshot]:
        options = SnapshotOptions(bitmap=bitmap)
        taken = await self.fleece.create_snapshots(disks, name, options, token_s=None)
        return [each.snapshot for each in taken]

    async def delete(self, disk: str, *, succeeded: bool, name: str = "s") -> None:
        await self.fleece.delete_snapshot(disk, name, force=True, succeeded=succeeded)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    assert await bench.fleece.close()
    bench.state.close()


def fine(node: Node) -> DirtyBitmap:
    """Give the node a bitmap with small granules."""
    bitmap = node.bitmaps["b"] = new_bitmap(node, "b", GRANULE, enabled=True)
    return bitmap


def dirty(bitmap: DirtyBitmap) -> set[int]:
    return {index for first, last in bitmap.runs() for index in range(first, last)}


def differing(one: bytes, other: bytes) -> set[int]:
    return {
        index
        for index in range(GRANULES)
        if one[index * GRANULE : (index + 1) * GRANULE]
        != other[index * GRANULE : (index + 1) * GRANULE]
    }


async def point_in_time(bench: Bench, snapshot: Snapshot) -> bytes:
    return await read_all(bench.graph.find(snapshot.node_name))


async def write(disk: Disk, offset: int, data: bytes) -> None:
    await disk.export.node.write(offset, memoryview(data), fua=False)


# --- at the instant ------------------------------------------------------------------------------


class Writer:
    """A guest that writes on and on, except in drained sections."""

    def __init__(self, bench: Bench, disk: Disk, rng: random.Random) -> None:
        self.guest = Guest(bench.graph, disk.top)
        self.rng = rng
        self.is_over = False
        self.written: set[int] = set()

    async def run(self) -> None:
        rng = self.rng
        while not self.is_over:
            await self.guest.may_go.wait()
            length = rng.choice((1, 512, GRANULE, 3 * GRANULE))
            offset = rng.randrange(SIZE - length)
            self.guest.running += 1
            try:
                node = self.guest.node
                if rng.random() < 0.9:
                    data = memoryview(rng.randbytes(length))
                    await node.write(offset, data, fua=rng.random() < 0.1)
                else:
                    await node.write_zeroes(
                        offset, length, fua=False, may_unmap=True, no_fallback=False
                    )
            finally:
                self.guest.running -= 1
            self.written |= set(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
            await turns(rng.randrange(3))


async def test_each_write_is_in_the_snapshot_or_in_the_next_increment(
    bench: Bench, rng: random.Random, long_run: bool
) -> None:
    """Also after backups that failed, for both disks of a group, with writes all the time."""
    disks = [await bench.add(name) for name in ("vda", "vdb")]
    bases = [bytes(SIZE)] * 2
    for disk in disks:
        fine(disk.node)
    async with asyncio.TaskGroup() as tasks:
        writers = [Writer(bench, disk, rng) for disk in disks for _ in range(2)]
        for writer in writers:
            tasks.create_task(writer.run())
        for _ in range(3000 if long_run else 60):
            await turns(rng.randrange(20))
            snapshots = await bench.take("vda", "vdb")
            for index, (disk, snapshot) in enumerate(zip(disks, snapshots, strict=True)):
                frozen = disk.node.bitmaps["b"]
                before = dirty(frozen)
                content = await point_in_time(bench, snapshot)
                assert differing(content, bases[index]) <= before, "a write is in neither"
                assert dirty(frozen) == before, "it stands still"
                succeeded = rng.random() < 0.7
                await bench.delete(disk.name, succeeded=succeeded)
                if succeeded:
                    bases[index] = content
        for writer in writers:
            writer.is_over = True
    for writer in writers:
        bench.graph.detach_root(writer.guest.edge)
    for disk, base in zip(disks, bases, strict=True):
        live = await read_all(disk.node)
        assert differing(live, base) <= dirty(disk.node.bitmaps["b"])


async def test_a_bitmap_holds_no_more_than_what_was_written(bench: Bench) -> None:
    disk = await bench.add("vda")
    fine(disk.node)
    await write(disk, 0, b"a")
    (snapshot,) = await bench.take("vda")
    await write(disk, 0, b"b")  # what the fused way does, and the plain one
    await write(disk, GRANULE, b"b" * GRANULE)
    assert dirty(disk.node.bitmaps["b"]) == {0}
    assert await point_in_time(bench, snapshot) == b"a" + bytes(SIZE - 1)
    await bench.delete("vda", succeeded=True)
    assert dirty(disk.node.bitmaps["b"]) == {0, 1}


# --- life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("succeeded", "left"), [(True, {9}), (False, {3, 9})])
async def test_the_end_of_the_snapshot_settles_the_bitmap(
    bench: Bench, succeeded: bool, left: set[int]
) -> None:
    disk = await bench.add("vda")
    bitmap = fine(disk.node)
    await write(disk, 3 * GRANULE, b"x")
    (snapshot,) = await bench.take("vda")
    assert (bitmap.busy, bitmap.recording, bitmap.enabled) == (True, True, False)
    await write(disk, 9 * GRANULE, b"x")
    export = bench.exports.get("vda@s").describe()
    assert [name for name in export.contexts if "dirty" in name] == ["qemu:dirty-bitmap:b"]
    assert (await snapshot.facts()).bitmap == "b"
    await bench.delete("vda", succeeded=succeeded)
    found = disk.node.bitmaps["b"]
    assert list(disk.node.bitmaps) == ["b"]
    assert (found.busy, found.enabled, dirty(found)) == (False, True, left)


@pytest.mark.parametrize("succeeded", [True, False])
async def test_a_bitmap_that_is_not_there_begins_at_the_instant_with_everything_dirty(
    bench: Bench, succeeded: bool
) -> None:
    disk = await bench.add("vda")
    await write(disk, 0, b"x")
    await bench.take("vda")
    assert disk.node.bitmaps["b"].count() == SIZE
    await write(disk, SIZE - 1, b"x")
    await bench.delete("vda", succeeded=succeeded)
    found = disk.node.bitmaps["b"]
    assert found.recording
    assert found.count() == (64 * 1024 if succeeded else SIZE)


async def test_a_snapshot_that_cannot_be_leaves_the_bitmaps_as_they_were(bench: Bench) -> None:
    vda, vdb = await bench.add("vda"), await bench.add("vdb")
    bitmap = fine(vda.node)
    await write(vda, 0, b"x")
    other = fine(vdb.node)
    for change, text in (
        ("busy", "currently in use"),
        ("inconsistent", "inconsistent"),
        ("readonly", "readonly"),
    ):
        setattr(other, change, True)
        with pytest.raises(CommandError, match=text):
            await bench.take("vda", "vdb")
        setattr(other, change, False)
        assert vda.node.bitmaps == {"b": bitmap}
        assert (bitmap.busy, bitmap.enabled, dirty(bitmap)) == (False, True, {0})
    other.enabled = False
    with pytest.raises(CommandError, match="is disabled"):
        await bench.take("vda", "vdb")
    other.enabled = True
    with pytest.raises(CommandError, match="Bitmap name too long"):
        await bench.take("vda", bitmap="x" * 1024)
    assert not bench.fleece.snapshots()


async def test_what_fails_at_the_instant_thaws_all_bitmaps_of_the_group(bench: Bench) -> None:
    vda, vdb = await bench.add("vda"), await bench.add("vdb")
    bitmap = fine(vda.node)
    async with bench.fleece.changing:
        taking = bench.fleece.take(["vda", "vdb"], "s", SnapshotOptions(bitmap="b"))
        await taking.prepare()
        fine(vdb.node)  # somebody was faster
        with pytest.raises(CommandError, match="Bitmap already exists: b"):
            await taking.engage()
        await taking.discard()
    assert vda.node.bitmaps == {"b": bitmap}
    assert (bitmap.busy, bitmap.enabled) == (False, True)
    await bench.take("vda", "vdb")


async def test_two_snapshots_cannot_have_one_bitmap(bench: Bench) -> None:
    disk = await bench.add("vda")
    fine(disk.node)
    await bench.take("vda")
    with pytest.raises(CommandError, match="currently in use by another operation"):
        await bench.take("vda", name="t")
    await bench.take("vda", name="t", bitmap="c")
    assert disk.node.bitmaps["c"].busy
    await bench.delete("vda", succeeded=False)
    await bench.take("vda", name="u")


async def test_a_snapshot_without_a_bitmap_leaves_all_recording(bench: Bench) -> None:
    disk = await bench.add("vda")
    bitmap = fine(disk.node)
    await bench.take("vda", bitmap=None)
    await write(disk, 0, b"x")
    assert dirty(bitmap) == {0}
    contexts = bench.exports.get("vda@s").describe().contexts
    assert not [name for name in contexts if "dirty" in name]
    await bench.delete("vda", succeeded=True)
    assert dirty(bitmap) == {0}


async def test_success_settles_nothing_before_the_disk_is_flushed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash could take back what is in the copy, and in no bitmap any more."""
    disk = await bench.add("vda")
    bitmap = fine(disk.node)
    await write(disk, 0, b"x")
    await bench.take("vda")

    async def fail() -> None:
        raise IoError(errno.EIO, "flush")

    with monkeypatch.context() as patch:
        patch.setattr(disk.node.driver, "flush", fail)
        with pytest.raises(CommandError, match="cannot be flushed"):
            await bench.delete("vda", succeeded=True)
    assert "s" in disk.snapshots
    assert dirty(bitmap) == {0}

    await bench.delete("vda", succeeded=True)
    assert dirty(disk.node.bitmaps["b"]) == set()


async def test_the_instant_is_that_of_the_top_whatever_leaves_while_guests_are_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter of a backup job that ends goes without asking Fleece."""
    disk = await bench.add("vda")
    target = await add_plain(bench.graph, MemoryDriver(bytearray(SIZE)))
    job_filter = await add_filter(bench.graph, disk.node, target, CopyBeforeWrite())
    bench.graph.insert_filter(job_filter)
    tops, engage, drained = Taking.tops, Taking.engage, []

    def tops_before_the_job_ends(taking: Taking) -> list[Node]:
        found = tops(taking)
        if job_filter.parents:
            bench.graph.remove_filter(job_filter)
        return found

    async def look(taking: Taking) -> None:
        drained.extend((top.name, top.is_drained) for top in tops(taking))
        await engage(taking)

    monkeypatch.setattr(Taking, "tops", tops_before_the_job_ends)
    monkeypatch.setattr(Taking, "engage", look)
    await bench.take("vda")
    assert drained == [("vda", True)]
    await bench.graph.remove(job_filter)
    await bench.graph.remove(target)


# --- a disk that hangs ---------------------------------------------------------------------------


class Hanging:
    """System calls of one kind that do not end before `release`."""

    def __init__(self) -> None:
        self.is_reached = False
        self._released = threading.Event()

    def __call__(self, *_args: object) -> None:
        self.is_reached = True
        self._released.wait(20)

    def release(self) -> None:
        self._released.set()


@pytest.mark.parametrize("verb", ["delete a snapshot", "remove", "remove by force"])
async def test_a_flush_that_hangs_keeps_no_other_disk_from_changing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    await bench.add("vda")
    await bench.add("vdb")
    await bench.take("vdb")
    hanging = Hanging()
    monkeypatch.setattr(os, "fdatasync", hanging)
    if verb == "delete a snapshot":
        await bench.take("vda")
        change = bench.delete("vda", succeeded=True)
    else:
        change = bench.fleece.remove_disk("vda", force="force" in verb)
    changing = asyncio.create_task(change)
    await until(lambda: hanging.is_reached)
    async with asyncio.timeout(5):
        await bench.take("vdb", name="t", bitmap=None)
        await bench.fleece.delete_snapshot("vdb", "s", force=False)
    assert not changing.done()
    hanging.release()
    await changing
    assert not bench.fleece.snapshots("vda") if "delete" in verb else len(bench.fleece.disks()) == 1


async def test_a_flush_that_hangs_keeps_no_daemon_from_its_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.add("vda")
    hanging = Hanging()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", hanging)
        async with asyncio.timeout(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(bench.fleece.close(), 0.2)
    assert hanging.is_reached
    hanging.release()


async def test_at_the_end_a_flush_that_hangs_keeps_no_other_disk_from_being_closed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image has its bitmaps written back when it is closed, and none that is left open."""
    await bench.add("vda")
    await bench.add("vdb")
    hanging, real = Hanging(), os.fdatasync

    def sync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("vda.raw"):
            hanging()
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", sync)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(bench.fleece.close(), 0.5)
    assert [disk.name for disk in bench.fleece.disks()] == ["vda"]
    hanging.release()


async def test_at_the_end_a_node_of_a_user_that_hangs_keeps_no_disk_from_being_closed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.add("vda")
    (bench.folder / "hung.raw").write_bytes(bytes(SIZE))
    options = {"driver": "file", "node-name": "hung", "filename": str(bench.folder / "hung.raw")}
    await add_from_options(bench.graph, options)
    hanging, real = Hanging(), os.fdatasync

    def sync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("hung.raw"):
            hanging()
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", sync)
        patch.setattr(drain, "QUIET_TIMEOUT_S", 0.1)
        assert await soon(bench.fleece.close())
        assert not bench.fleece.disks()
        hanging.release()


async def test_a_disk_that_does_not_open_keeps_no_other_disk_from_changing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.add("vdb")
    hanging, real = Hanging(), OwnFile._open

    def open_late(driver: FileDriver, **how: Any) -> OpenImage:
        hanging()
        return real(driver, **how)

    monkeypatch.setattr(OwnFile, "_open", open_late)
    adding = asyncio.create_task(bench.add("vda"))
    await until(lambda: hanging.is_reached)
    async with asyncio.timeout(5):
        await bench.take("vdb")
    hanging.release()
    assert (await adding).name == "vda"
    with pytest.raises(CommandError, match="there is a disk 'vda' already"):
        await bench.add("vda")


async def test_a_snapshot_goes_whatever_the_close_of_its_temporary_image_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells there that there was no space for what it had taken."""
    disk = await bench.add("vda")
    await bench.take("vda")
    await write(disk, 0, b"x" * 65536)
    close = os.close

    def full(fd: int) -> None:
        is_temp = os.readlink(f"/proc/self/fd/{fd}").endswith("/temp.raw")
        close(fd)
        if is_temp:
            raise OSError(errno.EDQUOT, "over the quota")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", full)
        await bench.delete("vda", succeeded=False)
    assert disk.snapshots == {}
    assert not list((bench.folder / "state" / "vda" / "snapshots").iterdir())
    await bench.take("vda")
