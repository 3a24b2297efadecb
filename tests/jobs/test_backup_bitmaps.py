"""Backups by bitmap: what is copied, and what the bitmap holds afterwards (T-B1 to T-B18)."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import Extent
from nbdfleece.block.bitmap import DirtyBitmap, new_bitmap
from nbdfleece.block.drain import drained
from nbdfleece.block.node import Node
from nbdfleece.jobs.backup import BackupOptions, BitmapMode, Sync, prepare_backup
from nbdfleece.jobs.job import JobOptions, Status
from tests.jobs.test_backup import Bench, Guest
from tests.support.memory import MemoryDriver
from tests.support.waiting import until

CLUSTER = 64 * 1024
CLUSTERS = 12
SIZE = CLUSTERS * CLUSTER

ON_SUCCESS, ALWAYS, NEVER = BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS, BitmapMode.NEVER


class Source(MemoryDriver):
    """A disk, every third cluster of which its top layer does not hold."""

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        index = offset // CLUSTER
        end = min(SIZE, (index + 1) * CLUSTER)
        return [Extent(offset, end - offset, 2 if index % 3 == 2 else 1)]


class Target(MemoryDriver):
    """Remembers which clusters it got, and fails with the write after `good` others."""

    good = 1 << 30

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        if self.writes >= self.good:
            raise IoError(errno.EIO, "target")
        await super().write(offset, data, fua=fua)
        self.got |= clusters(offset, len(data))

    got: set[int]


def clusters(offset: int, length: int) -> set[int]:
    return set(range(offset // CLUSTER, -(-(offset + length) // CLUSTER)))


class Disk:
    """A source with a bitmap, a guest, and what the bitmap should hold, in granules."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self.bench = bench
        self.rng = rng
        self.granularity = rng.choice((4096, CLUSTER, 2 * CLUSTER))
        self.driver = Source(bytearray(rng.randbytes(SIZE)))
        self.target = Target(bytearray(SIZE))
        self.model: set[int] = set()

    async def open(self) -> None:
        self.node = await self.bench.add("a", self.driver)
        self.target_node = await self.bench.add("b", self.target)
        self.node.bitmaps["m"] = new_bitmap(self.node, "m", self.granularity, enabled=True)
        self.guest = Guest(self.bench.graph, self.node)

    @property
    def bitmap(self) -> DirtyBitmap:
        return self.node.bitmaps["m"]

    async def write(self) -> set[int]:
        """Write something as the guest, return what it makes dirty."""
        length = self.rng.choice((1, 4096, CLUSTER, 3 * CLUSTER))
        offset = self.rng.randrange(SIZE - length + 1)
        data = memoryview(self.rng.randbytes(length))
        await self.guest.node.write(offset, data, fua=False)
        return granules(offset, length, self.granularity)

    def check(self) -> None:
        assert dirty(self.bitmap) == self.model
        assert self.bitmap.count() == len(self.model) * self.granularity
        assert not self.bitmap.busy
        assert self.bitmap.enabled
        assert list(self.node.bitmaps) == ["m"]

    async def close(self) -> None:
        self.bench.graph.detach_root(self.guest.edge)
        await self.bench.graph.remove(self.node)
        await self.bench.graph.remove(self.target_node)


def granules(offset: int, length: int, granularity: int) -> set[int]:
    return set(range(offset // granularity, -(-(offset + length) // granularity)))


def dirty(bitmap: DirtyBitmap) -> set[int]:
    return {index for first, last in bitmap.runs() for index in range(first, last)}


def in_clusters(indexes: set[int], granularity: int) -> set[int]:
    found = set[int]()
    for index in indexes:
        found |= clusters(
            index * granularity, min(granularity, max(0, SIZE - index * granularity)) or 1
        )
    return found & set(range(CLUSTERS))


def in_granules(indexes: set[int], granularity: int) -> set[int]:
    found = set[int]()
    for index in indexes:
        found |= granules(index * CLUSTER, CLUSTER, granularity)
    return found


def legal(sync: Sync, mode: BitmapMode) -> bool:
    return not (mode is NEVER and sync is not Sync.BITMAP)


MATRIX = [
    (sync, mode, end)
    for sync in (Sync.BITMAP, Sync.FULL, Sync.TOP, Sync.INCREMENTAL)
    for mode in BitmapMode
    for end in ("well", "cancelled while pending", "an I/O error")
    if legal(sync, mode) and (sync is not Sync.INCREMENTAL or mode is ON_SUCCESS)
]


async def one_backup(disk: Disk, sync: Sync, mode: BitmapMode, end: str) -> None:
    """Run a backup with guest writes before, during and after; check model and bitmap."""
    rng = disk.rng
    for _ in range(rng.randrange(4)):
        disk.model |= await disk.write()
    disk.check()
    disk.target.got, disk.target.writes = set(), 0
    instant = bytes(disk.driver.data)
    wanted = {
        Sync.FULL: set(range(CLUSTERS)),
        Sync.TOP: {index for index in range(CLUSTERS) if index % 3 != 2},
    }.get(sync, in_clusters(disk.model, disk.granularity))
    may_fail = end == "an I/O error" and bool(wanted)
    disk.target.good = rng.randrange(len(wanted)) if may_fail else 1 << 30

    old, new = disk.model, set[int]()
    job = await disk.bench.backup(
        sync=sync,
        bitmap="m",
        bitmap_mode=None if sync is Sync.INCREMENTAL and rng.random() < 0.5 else mode,
        job=JobOptions("j", auto_finalize=False, speed=rng.choice((0, 1))),
        max_workers=rng.choice((1, 3)),
        max_chunk=CLUSTER,
    )
    frozen = disk.bitmap
    for _ in range(rng.randrange(4)):
        try:
            new |= await disk.write()
        except IoError:  # of the copy: the guest's write has not reached the disk
            assert may_fail
    if job.status not in (Status.CONCLUDED, Status.NULL):
        assert dirty(frozen) == old
        assert (frozen.busy, frozen.recording, frozen.enabled) == (True, True, False)
        job.set_speed(0)
    await until(lambda: job.status in (Status.PENDING, Status.CONCLUDED, Status.NULL))
    has_failed = job.status is not Status.PENDING
    if not has_failed:
        new |= await disk.write()
        assert dirty(frozen) == old, "constant while pending"
        if end == "cancelled while pending":
            job.cancel()
            has_failed = True
        else:
            await job.finalize()
    await job.wait_concluded()
    got = disk.target.got
    for index in got if has_failed else wanted:
        first, last = index * CLUSTER, (index + 1) * CLUSTER
        assert disk.target.data[first:last] == instant[first:last]
    if not has_failed:
        # What the lower layers hold is copied too, where the guest writes before it is skipped.
        assert wanted == got or (sync is Sync.TOP and wanted < got)
    if mode is NEVER:
        disk.model = old | new
    elif not has_failed:
        disk.model = new
    elif mode is ALWAYS:
        disk.model = new | in_granules(wanted - got, disk.granularity)
    else:
        disk.model = old | new
    disk.check()


@pytest.mark.parametrize(("sync", "mode", "end"), MATRIX)
async def test_the_bitmap_holds_what_its_mode_and_the_end_say(
    rng: random.Random, sync: Sync, mode: BitmapMode, end: str
) -> None:
    """T-B6 to T-B17."""
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            disk = Disk(Bench(tasks), rng)
            await disk.open()
            await one_backup(disk, sync, mode, end)
            await disk.close()


async def test_random_backups_one_after_another_keep_count(
    rng: random.Random, long_run: bool
) -> None:
    async with asyncio.TaskGroup() as tasks:
        disk = Disk(Bench(tasks), rng)
        await disk.open()
        for _ in range(500 if long_run else 50):
            await one_backup(disk, *rng.choice(MATRIX))
        await disk.close()


async def test_increments_over_a_full_backup_give_the_disk_of_each_instant(
    rng: random.Random,
) -> None:
    """T-B1, T-B5: also after increments that have failed, and with none that is empty."""
    async with asyncio.TaskGroup() as tasks:
        disk = Disk(Bench(tasks), rng)
        await disk.open()
        disk.target.got = set()
        job = await disk.bench.backup(bitmap="m", bitmap_mode=ON_SUCCESS)
        await job.wait_concluded()
        assert disk.target.data == disk.driver.data
        for number in range(20):
            for _ in range(rng.randrange(4)):
                await disk.write()
            disk.target.writes = 0
            disk.target.good = rng.randrange(2) if number % 3 == 1 else 1 << 30
            instant = bytes(disk.driver.data)
            job = await disk.bench.backup(
                sync=Sync.INCREMENTAL, bitmap="m", job=JobOptions(f"j{number}", speed=1)
            )
            if disk.target.good > 1:
                for _ in range(rng.randrange(3)):
                    await disk.write()
            if job.status not in (Status.CONCLUDED, Status.NULL):
                job.set_speed(0)
            await job.wait_concluded()
            if job.error is None:
                assert bytes(disk.target.data) == instant
        await disk.close()


async def test_illegal_arguments_give_an_error_and_no_job() -> None:
    """T-B18, T-B4."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tasks)
        await bench.add_null("a", "b")
        node = bench.graph.find("a")
        node.bitmaps["m"] = new_bitmap(node, "m", None, enabled=True)
        for sync in Sync:
            for name in (None, "m", "nope"):
                for mode in (None, *BitmapMode):
                    is_legal = {
                        Sync.INCREMENTAL: mode in (None, ON_SUCCESS),
                        Sync.BITMAP: mode is not None,
                        Sync.NONE: False,
                    }.get(sync, mode in (ON_SUCCESS, ALWAYS))
                    if (name == "m" and is_legal) or (
                        name is None
                        and mode is None
                        and sync not in (Sync.INCREMENTAL, Sync.BITMAP)
                    ):
                        continue
                    with pytest.raises(CommandError):
                        await bench.backup(sync=sync, bitmap=name, bitmap_mode=mode)
        assert not list(bench.jobs)
        assert not node.bitmaps["m"].busy
        for change in ("busy", "inconsistent", "readonly"):
            setattr(node.bitmaps["m"], change, True)
            with pytest.raises(CommandError):
                await bench.backup(sync=Sync.INCREMENTAL, bitmap="m")
            setattr(node.bitmaps["m"], change, False)
        node.bitmaps["m"].readonly = True
        job = await bench.backup(sync=Sync.BITMAP, bitmap="m", bitmap_mode=NEVER)
        await job.wait_concluded()
        for name in ("a", "b"):
            await bench.graph.remove(bench.graph.find(name))


@pytest.mark.parametrize("mode", [ON_SUCCESS, ALWAYS, NEVER])
async def test_a_job_that_never_started_leaves_the_bitmap_as_it_was(mode: BitmapMode) -> None:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tasks)
        await bench.add_null("a", "b")
        node: Node = bench.graph.find("a")
        bitmap = node.bitmaps["m"] = new_bitmap(node, "m", CLUSTER, enabled=True)
        bitmap.set(CLUSTER, 1)
        options = BackupOptions("a", "b", Sync.BITMAP, "m", mode)
        async with drained(node, bench.graph.find("b")):
            job = await prepare_backup(bench.graph, bench.jobs, options, JobOptions("j"))
            assert bitmap.busy
            await job.abandon()
        assert node.bitmaps == {"m": bitmap}
        assert (bitmap.busy, bitmap.enabled, dirty(bitmap)) == (False, True, {1})
        for name in ("a", "b"):
            await bench.graph.remove(bench.graph.find(name))
