"""Backups: the target is the disk as it was when the job began, whatever guests do meanwhile."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, InUse, IoError
from nbdfleece.base.extent import Extent
from nbdfleece.block import permissions as perms
from nbdfleece.block.bitmap import new_bitmap
from nbdfleece.block.drain import drained
from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.drivers.raw import RawDriver
from nbdfleece.block.drivers.snapshot_access import SnapshotAccess
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.jobs.backup import BackupOptions, BitmapMode, Sync, check_backup, prepare_backup
from nbdfleece.jobs.job import Job, JobEnded, JobIoError, JobNews, JobOptions, OnError, Status
from nbdfleece.jobs.manager import JobManager
from tests.support.fleecing import (
    add_access,
    add_filter,
    add_plain,
    file_driver,
    read_all,
    temp_driver,
)
from tests.support.memory import MemoryDriver
from tests.support.waiting import turns, until

KiB = 1024
MiB = 1024 * KiB
CLUSTER = 64 * KiB


class Guest:
    """What stands above the source for ever: an edge that follows whatever is put below it."""

    def __init__(self, graph: Graph, node: Node, *, perm: int = perms.WRITE) -> None:
        self.drains = 0
        self.running = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.edge = graph.attach_root("root", self, node, perm=perm, shared=perms.ALL)

    @property
    def node(self) -> Node:
        return self.edge.node

    def describe_parent(self) -> str:
        return "the guest"

    def child_attached(self, edge) -> None: ...

    def child_detached(self, edge) -> None: ...

    def drained_begin(self) -> None:
        self.drains += 1
        self.may_go.clear()

    def drained_end(self) -> None:
        self.drains -= 1
        if not self.drains:
            self.may_go.set()

    def is_idle(self) -> bool:
        return self.running == 0

    async def wait_idle(self) -> None:
        await until(lambda: not self.running)

    async def scribble(
        self, rng: random.Random, steps: int, model: bytearray, low: int, high: int
    ) -> None:
        """Write and zero at random in [low, high); `model` is the disk."""
        for _ in range(steps):
            await self.may_go.wait()
            length = min(high - low, rng.choice([1, 512, rng.randrange(1, 3 * CLUSTER), CLUSTER]))
            offset = rng.randrange(low, high - length + 1)
            self.running += 1
            try:
                if rng.random() < 0.7:
                    data = rng.randbytes(length)
                    await self.node.write(offset, memoryview(data), fua=False)
                else:
                    data = bytes(length)
                    await self.node.write_zeroes(
                        offset, length, fua=False, may_unmap=True, no_fallback=False
                    )
                model[offset : offset + length] = data
            finally:
                self.running -= 1
            await asyncio.sleep(0)


class Bench:
    """A graph, a manager, and everything that its jobs tell."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.graph = Graph()
        self.jobs = JobManager(tasks)
        self.news: list[JobNews] = []
        self.jobs.news.subscribe(self.news.append)

    async def add(self, name: str, driver: Driver) -> Node:
        node = await self.graph.add(name, driver, read_only=False, discard_enabled=True)
        node.owned_by_monitor = True
        return node

    async def add_null(self, *names: str, size: int = MiB) -> None:
        for name in names:
            await self.add(name, NullDriver(size=size, read_zeroes=True, latency_ns=0))

    async def backup(
        self,
        device: str = "a",
        target: str = "b",
        sync: Sync = Sync.FULL,
        *,
        job: JobOptions | None = None,
        **options: object,
    ) -> Job:
        given = BackupOptions(device, target, sync, **options)  # type: ignore[arg-type]
        async with drained(*check_backup(self.graph, self.jobs, given)):
            made = await prepare_backup(self.graph, self.jobs, given, job or JobOptions("j"))
            self.jobs.start(made)
        return made

    def ended(self) -> JobEnded:
        (ended,) = [news for news in self.news if isinstance(news, JobEnded)]
        return ended

    def shape(self) -> list[tuple[str, list[str], list[str]]]:
        return sorted(
            (
                node.name,
                [edge.node.name for edge in node.children],
                sorted(edge.parent.describe_parent() for edge in node.parents),
            )
            for node in self.graph
        )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tasks)
        yield bench
        await bench.jobs.close()
        left = list(bench.graph)
        while left:
            for node in [node for node in left if not node.parents]:
                await bench.graph.remove(node)
            assert len(list(bench.graph)) < len(left), bench.shape()
            left = list(bench.graph)


# --- the point in time ---------------------------------------------------------------------------


async def test_full_backup_while_guests_write_is_the_disk_at_the_start(
    seed: int, long_run: bool
) -> None:
    for history in range(400 if long_run else 40):
        await one_history(random.Random(f"{seed} {history}"))


async def one_history(rng: random.Random) -> None:
    size = rng.choice([4097, CLUSTER, 5 * CLUSTER, 12 * CLUSTER + rng.randrange(1, CLUSTER)])
    size = max(size, 3 * CLUSTER + 1) if rng.random() < 0.8 else size + 3 * CLUSTER
    model = bytearray(rng.randbytes(size))
    if rng.random() < 0.5:
        model[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    source = MemoryDriver(bytearray(model), rng, now_share=rng.choice([0.0, 0.5]))
    target = MemoryDriver(bytearray(rng.randbytes(size)), rng)
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tasks)
        node = await bench.add("a", source)
        await bench.add("b", target)
        before = bench.shape()
        middle = rng.randrange(1, size)
        stripes = ((0, middle), (middle, size))
        guests = [Guest(bench.graph, node) for _ in stripes]
        writing = [
            tasks.create_task(guest.scribble(rng, 40, model, *stripe))
            for guest, stripe in zip(guests, stripes, strict=True)
        ]
        await turns(rng.randrange(60))
        instant = await instant_of(node, guests, model)
        job = await bench.backup(
            max_workers=rng.choice([1, 2, 64]),
            max_chunk=rng.choice([0, CLUSTER, 3 * CLUSTER]),
            job=JobOptions("j", auto_finalize=rng.random() < 0.5),
        )
        assert all(guest.node is not node for guest in guests)
        pausing = tasks.create_task(pause_at_random(bench, job, rng))
        if not job.options.auto_finalize:
            await until(lambda: job.status is Status.PENDING)
            await job.finalize()
        await job.wait_concluded()
        await pausing
        assert bench.ended().error is None
        assert bytes(target.data) == instant
        await asyncio.wait(writing)
        assert source.data == model
        for guest in guests:
            assert guest.node is node
            bench.graph.detach_root(guest.edge)
        assert bench.shape() == before
        rounded = -(-size // CLUSTER) * CLUSTER
        assert (bench.ended().done, bench.ended().total) == (rounded, rounded)


async def instant_of(node: Node, guests: list[Guest], model: bytearray) -> bytes:
    """Stop the guests up to the turn in which the backup's own drained section begins."""
    async with drained(node):
        for guest in guests:
            guest.drained_begin()
    for guest in guests:
        asyncio.get_running_loop().call_soon(guest.drained_end)
    return bytes(model)


async def test_full_backup_of_a_file_to_a_file_while_a_guest_writes(
    bench: Bench, tmp_path: Path, seed: int, long_run: bool
) -> None:
    """The same where old data is saved and new data written in one step of a thread."""
    for history in range(30 if long_run else 5):
        rng = random.Random(f"{seed} {history}")
        size = 20 * CLUSTER + rng.randrange(CLUSTER)
        model = bytearray(rng.randbytes(size))
        model[CLUSTER : 5 * CLUSTER] = bytes(4 * CLUSTER)
        (tmp_path / "a").write_bytes(model)
        (tmp_path / "b").write_bytes(rng.randbytes(size))
        nodes = [await bench.add(name, file_driver(tmp_path / name)) for name in "ab"]
        guest = Guest(bench.graph, nodes[0])
        instant = bytes(model)
        job = await bench.backup(max_chunk=CLUSTER, max_workers=rng.choice([1, 4]))
        await guest.scribble(rng, 60, model, 0, size)
        await job.wait_concluded()
        assert bench.ended().error is None
        assert (tmp_path / "b").read_bytes() == instant
        assert (tmp_path / "a").read_bytes() == model
        bench.news.clear()
        bench.graph.detach_root(guest.edge)
        for node in nodes:
            await bench.graph.remove(node)


async def pause_at_random(bench: Bench, job: Job, rng: random.Random) -> None:
    for _ in range(rng.randrange(4)):
        await turns(rng.randrange(40))
        if job.status in (Status.RUNNING, Status.PAUSED) and not job.user_paused:
            job.pause()
            await turns(rng.randrange(20))
            job.resume()
        if rng.random() < 0.3:
            async with drained(bench.graph.find("a")):
                await asyncio.sleep(0)


async def test_files_of_odd_size(bench: Bench, tmp_path: Path) -> None:
    """T-J7, T-F7: 4097 bytes; sparse stays sparse."""
    for size in (4097, 3 * MiB + 1):
        source, target = tmp_path / f"a{size}", tmp_path / f"b{size}"
        source.write_bytes(random.Random(size).randbytes(4097))
        with source.open("r+b") as file:
            file.truncate(size)
        target.write_bytes(b"x" * size)
        await bench.add(f"a{size}", file_driver(source))
        await bench.add(f"b{size}", file_driver(target))
        await (await bench.backup(f"a{size}", f"b{size}")).wait_concluded()
        assert target.read_bytes() == source.read_bytes()
        assert target.stat().st_blocks * 512 <= 128 * KiB


async def test_sync_none_keeps_what_is_overwritten(bench: Bench) -> None:
    """T-J6, and T-J1: cancelling says so, and leaves the rest of the graph."""
    old = random.Random(1).randbytes(4 * CLUSTER)
    source, target = MemoryDriver(bytearray(old)), MemoryDriver(bytearray(4 * CLUSTER))
    node = await bench.add("a", source)
    await bench.add("b", target)
    guest = Guest(bench.graph, node)
    job = await bench.backup(sync=Sync.NONE, filter_node_name="flt")
    assert guest.node.name == "flt"
    await guest.node.write(CLUSTER + 5, memoryview(b"new"), fua=False)
    await turns(20)
    assert bytes(target.data) == bytes(CLUSTER) + old[CLUSTER : 2 * CLUSTER] + bytes(2 * CLUSTER)
    assert job.work.progress() == (CLUSTER, 4 * CLUSTER)
    job.cancel()
    await job.wait_concluded()
    assert bench.ended() == JobEnded(
        "j", "backup", CLUSTER, 4 * CLUSTER, 0, True, "Operation canceled"
    )
    assert guest.node is node
    bench.graph.detach_root(guest.edge)


class Layers(MemoryDriver):
    """Holds only some ranges itself."""

    def __init__(self, data: bytearray, own: list[tuple[int, int]]) -> None:
        super().__init__(data)
        self.own = own

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        for start, end in self.own:
            if start <= offset < end:
                return [Extent(offset, end - offset, 1)]
            if offset < start:
                return [Extent(offset, start - offset, 2)]
        return [Extent(offset, length, 0)]


async def test_sync_top_copies_what_the_top_layer_holds(bench: Bench) -> None:
    """T-J5: the rest stays what the target's own backing would show."""
    data = random.Random(2).randbytes(8 * CLUSTER)
    own = [(CLUSTER, 2 * CLUSTER), (4 * CLUSTER + 10, 5 * CLUSTER + 10)]
    target = MemoryDriver(bytearray(8 * CLUSTER))
    await bench.add("a", Layers(bytearray(data), own))
    await bench.add("b", target)
    await (await bench.backup(sync=Sync.TOP)).wait_concluded()
    copied = {1, 4, 5}
    for index in range(8):
        part = slice(index * CLUSTER, (index + 1) * CLUSTER)
        assert target.data[part] == (data[part] if index in copied else bytes(CLUSTER)), index
    assert bench.ended().done == bench.ended().total == 3 * CLUSTER


# --- refusals ------------------------------------------------------------------------------------


async def test_what_makes_no_sense_is_refused_and_nothing_is_left(bench: Bench) -> None:
    """T-J4; texts as those of qemu-storage-daemon 7.2."""
    await bench.add_null("a", "b")
    await bench.add_null("big", size=2 * MiB)
    before = bench.shape()

    async def refused(text: str, **changed: object) -> None:
        with pytest.raises(CommandError) as caught:
            await bench.backup(**changed)  # type: ignore[arg-type]
        assert str(caught.value) == text
        assert bench.shape() == before
        assert not bench.news
        assert not list(bench.jobs)

    for name in ("device", "target"):
        await refused("Cannot find device='x' nor node-name='x'", **{name: "x"})
    await refused("Source and target cannot be the same", target="a")
    await refused("Source and target image have different sizes", target="big")
    await refused("Compression is not supported for this drive", compress=True)
    await refused("Invalid job ID ''", job=JobOptions(""))
    await refused("Parameter 'speed' expects a non-negative value", job=JobOptions("j", speed=-1))
    await refused("Could not create node: Duplicate nodes with node-name='b'", filter_node_name="b")
    await refused("Could not create node: Invalid node-name: '1!'", filter_node_name="1!")
    for number in (0, -1, 1 << 31):
        await refused("max-workers must be between 1 and 2147483647", max_workers=number)
    await refused("max-chunk must be zero (which means no limit) or positive", max_chunk=-5)
    await refused("Required max-chunk (5) is less than backup cluster size (65536)", max_chunk=5)
    for sync in (Sync.INCREMENTAL, Sync.BITMAP):
        await refused(f"must provide a valid bitmap name for '{sync.value}' sync mode", sync=sync)
    await refused("Bitmap 'zz' could not be found", bitmap="zz")
    await refused(
        "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        sync=Sync.INCREMENTAL,
        bitmap="zz",
        bitmap_mode=BitmapMode.ALWAYS,
    )
    await refused("Cannot specify bitmap sync mode without a bitmap", bitmap_mode=BitmapMode.NEVER)
    await refused("discard-source needs a snapshot-access node for a source", discard_source=True)


async def test_a_bitmap_that_is_taken_while_the_filter_is_made_refuses_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an export, say: then there is no job, and nothing of it."""
    await bench.add_null("a", "b")
    source = bench.graph.find("a")
    bitmap = source.bitmaps["bm"] = new_bitmap(source, "bm", None, enabled=True)
    before = bench.shape()
    add = bench.graph.add

    async def slow(*args: object, **options: object) -> Node:
        made = await add(*args, **options)  # type: ignore[arg-type]
        bitmap.busy = True
        return made

    monkeypatch.setattr(bench.graph, "add", slow)
    with pytest.raises(InUse):
        await bench.backup(sync=Sync.INCREMENTAL, bitmap="bm")
    assert bench.shape() == before
    assert not list(bench.jobs)
    assert not bench.news
    assert bitmap.successor is None


async def test_nodes_of_a_job_are_busy_but_its_source_is_free_for_another(bench: Bench) -> None:
    """T-J8: nothing of a job's graph can be removed; afterwards all can."""
    await bench.add_null("a", "b", "d")
    job = await bench.backup(sync=Sync.NONE, filter_node_name="flt")
    for name in ("a", "b", "flt"):
        with pytest.raises(InUse):
            await bench.graph.remove(bench.graph.find(name))
    busy = "Node '{}' is busy: block device is in use by block job: backup"
    for device, target, name in (("a", "b", "b"), ("flt", "d", "flt"), ("b", "d", "b")):
        with pytest.raises(InUse) as caught:
            await bench.backup(device, target, job=JobOptions("k"))
        assert str(caught.value) == busy.format(name)
    other = await bench.backup("a", "d", Sync.NONE, job=JobOptions("k"))
    job.cancel()
    await job.wait_concluded()
    other.cancel()
    await other.wait_concluded()
    assert [node.name for node in bench.graph] == ["a", "b", "d"]
    for name in ("a", "b", "d"):
        await bench.graph.remove(bench.graph.find(name))


async def test_somebody_who_writes_below_the_source_is_a_conflict(bench: Bench) -> None:
    """T-J11."""
    base = await bench.add("base", NullDriver(size=MiB, read_zeroes=True, latency_ns=0))
    role = RawDriver.file_role(offset=None, size=None)
    await bench.graph.add(
        "a",
        RawDriver(offset=None, size=None),
        {"file": (base, role)},
        read_only=False,
        discard_enabled=True,
    )
    await bench.add_null("b")
    guest = Guest(bench.graph, base)
    before = bench.shape()
    with pytest.raises(CommandError, match="base"):
        await bench.backup()
    assert bench.shape() == before
    assert not bench.news
    bench.graph.detach_root(guest.edge)


async def test_a_snapshot_taken_during_the_job_goes_above_its_filter(bench: Bench) -> None:
    await bench.add_null("a", "b")
    guest = Guest(bench.graph, bench.graph.find("a"))
    job = await bench.backup(sync=Sync.NONE, filter_node_name="flt")
    flt = bench.graph.find("flt")
    temp = await add_plain(bench.graph, NullDriver(size=MiB, read_zeroes=True, latency_ns=0))
    cbw = await add_filter(bench.graph, flt, temp, CopyBeforeWrite())
    async with drained(flt, cbw):
        bench.graph.insert_filter(cbw)
    assert guest.node is cbw
    assert [edge.node for edge in job.edges] == [flt, bench.graph.find("b")]
    job.cancel()
    await job.wait_concluded()
    assert cbw.file is not None
    assert cbw.file.node.name == "a"
    bench.graph.detach_root(guest.edge)


async def test_no_access_node_fits_on_the_filter_of_a_job(bench: Bench) -> None:
    await bench.add_null("a", "b")
    await bench.backup(sync=Sync.NONE, filter_node_name="flt")
    with pytest.raises(CommandError, match="does not preserve a point in time"):
        await add_access(bench.graph, bench.graph.find("flt"))


async def test_a_backup_that_is_taken_back_leaves_nothing(bench: Bench) -> None:
    """T-J4 in a transaction: created, and never started."""
    await bench.add_null("a", "b")
    before = bench.shape()
    async with drained(bench.graph.find("a"), bench.graph.find("b")):
        job = await prepare_backup(
            bench.graph, bench.jobs, BackupOptions("a", "b", Sync.FULL), JobOptions("j")
        )
        await job.abandon()
    assert bench.shape() == before
    assert not list(bench.jobs)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.STOP, OnError.ENOSPC, OnError.IGNORE])
async def test_errors_of_source_and_target(bench: Bench, verb: str, policy: OnError) -> None:
    old = random.Random(3).randbytes(3 * CLUSTER)
    source, target = MemoryDriver(bytearray(old)), MemoryDriver(bytearray(len(old)))
    (source if verb == "read" else target).fail[verb] = errno.EIO
    await bench.add("a", source)
    await bench.add("b", target)
    name = "on_source_error" if verb == "read" else "on_target_error"
    job = await bench.backup(job=JobOptions("j"), max_workers=1, **{name: policy})
    await until(lambda: any(isinstance(news, JobIoError) for news in bench.news))
    found = next(news for news in bench.news if isinstance(news, JobIoError))
    assert found.is_read is (verb == "read")
    source.fail.clear()
    target.fail.clear()
    if policy is OnError.STOP:
        assert (found.action, job.io_status) == (OnError.STOP, "failed")
        await turns(20)
        assert job.status is Status.PAUSED
        job.resume()
    await job.wait_concluded()
    if policy in (OnError.REPORT, OnError.ENOSPC):
        assert bench.ended().error == "Input/output error"
    else:
        assert bench.ended().error is None
        assert bytes(target.data) == old


async def test_a_guests_write_fails_with_the_copy_and_the_job_goes_on(bench: Bench) -> None:
    old = random.Random(4).randbytes(3 * CLUSTER)
    source, target = MemoryDriver(bytearray(old)), MemoryDriver(bytearray(len(old)))
    node = await bench.add("a", source)
    await bench.add("b", target)
    guest = Guest(bench.graph, node)
    job = await bench.backup(job=JobOptions("j", speed=1), max_chunk=CLUSTER, max_workers=1)
    await turns(20)
    target.fail["write"] = errno.EIO
    with pytest.raises(IoError):
        await guest.node.write(2 * CLUSTER, memoryview(b"lost"), fua=False)
    target.fail.clear()
    job.set_speed(0)
    await job.wait_concluded()
    assert bench.ended().error is None
    assert bytes(target.data) == old == bytes(source.data)
    bench.graph.detach_root(guest.edge)


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.NONE])
async def test_break_snapshot_fails_the_job_in_place_of_the_write(bench: Bench, sync: Sync) -> None:
    source, target = MemoryDriver(bytearray(3 * CLUSTER)), MemoryDriver(bytearray(3 * CLUSTER))
    source.data[:] = b"o" * len(source.data)
    node = await bench.add("a", source)
    await bench.add("b", target)
    guest = Guest(bench.graph, node)
    job = await bench.backup(
        sync=sync,
        on_cbw_error="break-snapshot",
        job=JobOptions("j", speed=1),
        max_chunk=CLUSTER,
        max_workers=1,
    )
    await turns(20)
    target.fail["write"] = errno.ENOSPC
    await guest.node.write(2 * CLUSTER, memoryview(b"kept"), fua=False)
    await job.wait_concluded()
    assert bench.ended().error == "No space left on device"
    assert bytes(source.data[2 * CLUSTER :][:4]) == b"kept"
    bench.graph.detach_root(guest.edge)


async def test_a_failed_flush_of_the_target_fails_the_job(bench: Bench) -> None:
    target = MemoryDriver(bytearray(CLUSTER))
    target.fail["flush"] = errno.EIO
    await bench.add("a", MemoryDriver(bytearray(CLUSTER)))
    await bench.add("b", target)
    await (await bench.backup()).wait_concluded()
    assert bench.ended().error == "Input/output error"


# --- pausing, points in time as sources --------------------------------------------------------


async def test_pause_holds_the_offset(bench: Bench) -> None:
    """T-J2."""
    old = random.Random(5).randbytes(40 * CLUSTER)
    target = MemoryDriver(bytearray(len(old)), random.Random(5))
    await bench.add("a", MemoryDriver(bytearray(old), random.Random(6)))
    await bench.add("b", target)
    job = await bench.backup(max_chunk=CLUSTER, max_workers=2)
    await turns(10)
    job.pause()
    await until(lambda: job.status is Status.PAUSED)
    at = job.work.progress()
    assert at[0] < at[1]
    await turns(200)
    assert job.work.progress() == at
    job.resume()
    await job.wait_concluded()
    assert bytes(target.data) == old


async def point_in_time(bench: Bench, tmp_path: Path, size: int) -> tuple[Node, Node, bytes]:
    """Return (the guest's node, the access node "a", the point in time)."""
    old = random.Random(7).randbytes(size)
    (tmp_path / "disk").write_bytes(old)
    disk = await add_plain(bench.graph, file_driver(tmp_path / "disk"))
    temp = await add_plain(bench.graph, temp_driver(tmp_path / "temp", size))
    cbw = await add_filter(bench.graph, disk, temp, CopyBeforeWrite(min_cluster_size=CLUSTER))
    from_cbw = await bench.graph.add(
        "a",
        SnapshotAccess(),
        {"file": (cbw, cbw.file.role & ~cbw.file.role.FILTERED)},
        read_only=False,
        discard_enabled=True,
    )
    return cbw, from_cbw, old


async def test_push_from_an_access_node_while_the_guest_writes(
    bench: Bench, tmp_path: Path
) -> None:
    """T-F5."""
    cbw, _, old = await point_in_time(bench, tmp_path, 64 * CLUSTER)
    await bench.add("b", MemoryDriver(bytearray(len(old))))
    job = await bench.backup(job=JobOptions("j", speed=1), max_workers=1)
    await cbw.write(63 * CLUSTER, memoryview(b"n" * CLUSTER), fua=False)
    await cbw.write(CLUSTER // 2, memoryview(b"n" * CLUSTER), fua=False)
    assert job.status is Status.RUNNING
    job.set_speed(0)
    await job.wait_concluded()
    assert bench.ended().done == len(old)
    assert await read_all(bench.graph.find("b")) == old


async def test_discard_source_gives_up_what_has_been_copied(bench: Bench, tmp_path: Path) -> None:
    """T-D1, T-D2: reading fails afterwards, the temporary image is empty, writes cost nothing."""
    cbw, access, old = await point_in_time(bench, tmp_path, 16 * CLUSTER)
    await bench.add("b", MemoryDriver(bytearray(len(old))))
    await cbw.write(0, memoryview(b"n" * 8 * CLUSTER), fua=False)
    assert (tmp_path / "temp").stat().st_blocks > 0
    await (await bench.backup(discard_source=True)).wait_concluded()
    assert bench.ended().error is None
    assert await read_all(bench.graph.find("b")) == old
    with pytest.raises(IoError):
        await access.read(0, memoryview(bytearray(512)))
    assert (tmp_path / "temp").stat().st_blocks == 0
    await cbw.write(0, memoryview(b"m" * 16 * CLUSTER), fua=False)
    assert (tmp_path / "temp").stat().st_blocks == 0


async def test_a_bitmap_on_the_temp_tells_what_was_saved_and_nothing_after_a_discard(
    bench: Bench, tmp_path: Path
) -> None:
    """T-D1, T-D2, with the bitmap of the scenario."""
    cbw, _, old = await point_in_time(bench, tmp_path, 2 * MiB)
    temp = cbw.child("target").node
    bitmap = temp.bitmaps["m"] = new_bitmap(temp, "m", None, enabled=True)
    await bench.add("b", MemoryDriver(bytearray(len(old))))
    await cbw.write(0, memoryview(b"n" * MiB), fua=False)
    assert bitmap.count() == MiB
    await (await bench.backup(discard_source=True)).wait_concluded()
    assert await read_all(bench.graph.find("b")) == old
    bitmap.take()
    bitmap.settle()
    await cbw.write(MiB // 2, memoryview(b"m" * MiB), fua=False)
    assert bitmap.count() == 0


async def test_a_disk_of_4097_bytes_with_a_bitmap_of_4096(bench: Bench) -> None:
    """T-J7."""
    old = random.Random(3).randbytes(4097)
    node = await bench.add("a", MemoryDriver(bytearray(old)))
    await bench.add("b", MemoryDriver(bytearray(4097)))
    bitmap = node.bitmaps["m"] = new_bitmap(node, "m", 4096, enabled=True)
    bitmap.set(0, 4097)
    job = await bench.backup(bitmap="m", bitmap_mode=BitmapMode.ALWAYS)
    await job.wait_concluded()
    assert bench.ended().error is None
    assert await read_all(bench.graph.find("b")) == old
    assert node.bitmaps["m"].count() == 0


async def test_cancel_lets_go_of_a_target_that_never_answers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T-J10, the part without a server."""
    monkeypatch.setattr("nbdfleece.jobs.backup.JOB_CANCEL_GRACE_S", 0.01)

    class Stuck(MemoryDriver):
        def yank(self) -> bool:
            self.fail["write"] = errno.EIO
            self.held.set()
            return True

    target = Stuck(bytearray(CLUSTER))
    target.hold = {"write"}
    source = MemoryDriver(bytearray(b"x" * CLUSTER))
    await bench.add("a", source)
    await bench.add("b", target)
    job = await bench.backup()
    await until(lambda: bool(target.waiting))
    job.cancel()
    await job.wait_concluded()
    assert bench.ended().cancelled


async def stuck_read(bench: Bench, source: MemoryDriver, node: Node) -> asyncio.Task[None]:
    """A guest's read that does not end, below the filter."""
    source.hold = {"read"}
    reading = asyncio.create_task(node.read(0, memoryview(bytearray(512))))
    await until(lambda: bool(source.waiting))
    source.hold.clear()
    return reading


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_stuck_request_keeps_the_filter_and_stops_no_guest(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_cancelled: bool,
) -> None:
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_MOMENTS_S", (0.001, 0.002))
    source, target = (
        MemoryDriver(bytearray(b"x" * 4 * CLUSTER)),
        MemoryDriver(bytearray(4 * CLUSTER)),
    )
    guest = Guest(bench.graph, await bench.add("a", source))
    await bench.add("b", target)
    before = bench.shape()
    sync = Sync.NONE if is_cancelled else Sync.FULL
    job = await bench.backup(sync=sync, job=JobOptions("j", auto_finalize=False))
    if not is_cancelled:
        await until(lambda: job.status is Status.PENDING)
    reading = await stuck_read(bench, source, guest.node)
    if is_cancelled:
        job.cancel()
        finalizing = None
    else:
        finalizing = asyncio.create_task(job.finalize())
    await until(lambda: "its filter stays for now" in caplog.text)
    copied = target.writes

    for _ in range(3):  # of them one at least meets another attempt
        await guest.may_go.wait()
        await guest.node.write(CLUSTER, memoryview(b"n" * CLUSTER), fua=False)
        await asyncio.sleep(0.005)
    assert target.writes == copied, "nothing is saved for a job that is over"
    assert job.status is (Status.ABORTING if is_cancelled else Status.PENDING)

    source.held.set()
    await reading
    await job.wait_concluded()
    if finalizing is not None:
        await finalizing
    assert bench.shape() == before
    assert bench.ended().cancelled is is_cancelled
    assert caplog.text.count("its filter stays for now") == 1
    total = 4 * CLUSTER
    assert (bench.ended().done, bench.ended().total) == (0 if is_cancelled else total, total)
    bench.graph.detach_root(guest.edge)


async def test_copies_that_are_stuck_in_the_target_are_given_up_with_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T-J10: a guest's write waits in a target that never answers; the job is cancelled."""
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_MOMENTS_S", (0.001,))

    class Stuck(MemoryDriver):
        def yank(self) -> bool:
            self.fail["write"] = errno.EIO
            self.held.set()
            return True

    target = Stuck(bytearray(CLUSTER))
    target.hold = {"write"}
    node = await bench.add("a", MemoryDriver(bytearray(b"x" * CLUSTER)))
    await bench.add("b", target)
    guest = Guest(bench.graph, node)
    job = await bench.backup(sync=Sync.NONE)
    writing = asyncio.create_task(guest.node.write(0, memoryview(b"n" * CLUSTER), fua=False))
    await until(lambda: bool(target.waiting))
    job.cancel()
    await job.wait_concluded()
    with pytest.raises(IoError):
        await writing
    assert guest.node is node
    bench.graph.detach_root(guest.edge)


async def test_finalize_says_when_a_stuck_request_keeps_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_MOMENTS_S", (0.001,))
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_TIMEOUT_S", 0.02)
    source = MemoryDriver(bytearray(b"x" * CLUSTER))
    guest = Guest(bench.graph, await bench.add("a", source))
    await bench.add("b", MemoryDriver(bytearray(CLUSTER)))
    job = await bench.backup(job=JobOptions("j", auto_finalize=False))
    await until(lambda: job.status is Status.PENDING)
    reading = await stuck_read(bench, source, guest.node)
    with pytest.raises(CommandError, match="job 'j' concludes: no answer within"):
        await job.finalize()
    source.held.set()
    await reading
    await job.wait_concluded()
    bench.graph.detach_root(guest.edge)
