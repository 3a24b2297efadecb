"""Backups as jobs: which bitmaps there are when, and what is left behind by what goes wrong."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.backup.folder import DiskFolder
from nbdfleece.base.errors import CommandError, InUse, IoError, NotFound
from nbdfleece.block import bitmap_files
from nbdfleece.block.bitmap import new_bitmap
from nbdfleece.block.bitmap_files import DiskBitmaps
from nbdfleece.block.create import find_creator
from nbdfleece.block.drain import drained
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.fleece.backup import BackupOptions, BackupRun, Backups
from nbdfleece.fleece.disk import Disk, last_change
from nbdfleece.fleece.location import make_location
from nbdfleece.fleece.snapshot import SnapshotOptions
from nbdfleece.jobs.job import JobOptions, Status
from nbdfleece.jobs.manager import JobManager
from tests.fleece.test_bitmaps import SIZE, write
from tests.fleece.test_bitmaps import Bench as Disks
from tests.support.backups import add_point, content, some_disk
from tests.support.fleecing import read_all
from tests.support.live import eventually

_ids = itertools.count(1)


class Bench(Disks):
    """Two disks, and a folder for their backups."""

    def __init__(self, folder: Path, tasks: asyncio.TaskGroup) -> None:
        super().__init__(folder)
        self.jobs = JobManager(tasks)
        self.backups = Backups(self.fleece, self.graph, self.jobs)
        self.to = folder / "backup"

    async def start(self, *disks: str, speed: int = 0, **options) -> BackupRun:
        options.setdefault("folder", self.to)
        job = JobOptions(f"b{next(_ids)}", speed)
        return await self.backups.start(BackupOptions(disks or ("vda",), **options), job)

    async def backup(self, *disks: str, **options) -> BackupRun:
        run = await self.start(*disks, **options)
        await run.job.wait_concluded()
        return run

    def points(self, disk: str = "vda", to: Path | None = None) -> list[bytes]:
        """What each point of a disk restores to."""
        with DiskFolder((to or self.to) / disk, for_change=False) as folder:
            return [content(folder, point) for point in folder.manifest.points]

    def bitmaps(self, disk: str = "vda") -> list[str]:
        return list(self.fleece.disk(disk).node.bitmaps)

    def disk(self, disk: str = "vda") -> bytes:
        return (self.folder / f"{disk}.raw").read_bytes()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        found = Bench(tmp_path, tasks)
        for name in ("vda", "vdb"):
            await found.add(name)
        yield found
        await found.jobs.close()
    assert await found.fleece.close()
    found.state.close()


@pytest.fixture
def vda(bench: Bench) -> Disk:
    return bench.fleece.disk("vda")


def kinds(run: BackupRun) -> list[str]:
    return [part.point.kind.value for part in run.parts if part.point is not None]


async def test_after_each_backup_there_is_one_bitmap_named_in_the_manifest(
    bench: Bench, vda: Disk, rng: random.Random
) -> None:
    for number in range(4):
        await write(vda, rng.randrange(SIZE - 100), rng.randbytes(100))
        run = await bench.backup("vda", "vdb")
        assert run.state == "done"
        assert kinds(run) == (["full"] * 2 if number == 0 else ["inc"] * 2)
        assert bench.bitmaps() == [run.parts[0].bitmap]
        assert os.listdir(bench.folder / "state" / "vda" / "bitmaps") == bench.bitmaps()
        assert bench.points()[-1] == bench.disk()
        assert vda.snapshots == {}


async def test_what_was_written_during_a_backup_is_in_the_next_one(bench: Bench, vda: Disk) -> None:
    run = await bench.start(speed=SIZE * 4)
    before = bench.disk()
    await write(vda, 5 * 65536, b"during")
    await run.job.wait_concluded()
    assert bench.points() == [before]

    run = await bench.backup()
    assert kinds(run) == ["inc"]
    assert run.parts[0].data_bytes == 65536
    assert bench.points()[-1] == bench.disk()


async def test_a_cancelled_backup_leaves_the_old_bitmap(bench: Bench, vda: Disk) -> None:
    await write(vda, 0, b"x" * SIZE)
    await bench.backup()
    old = bench.bitmaps()
    await write(vda, 0, b"y" * SIZE)

    run = await bench.start(speed=1000)
    assert len(bench.bitmaps()) == 2
    run.job.cancel()
    await run.job.wait_concluded()

    assert run.state == "cancelled"
    assert bench.bitmaps() == old
    assert vda.snapshots == {}
    assert not [name for name in os.listdir(bench.to / "vda") if "partial" in name]
    assert kinds(await bench.backup()) == ["inc"]
    assert bench.points()[-1] == bench.disk()


async def test_a_point_is_finished_only_when_its_disk_is_flushed(
    bench: Bench, vda: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.backup()
    old = bench.bitmaps()

    async def fail() -> None:
        raise IoError(errno.EIO, "flush")

    with monkeypatch.context() as patch:
        patch.setattr(vda.node.driver, "flush", fail)
        run = await bench.backup()

    assert run.state == "failed"
    assert bench.bitmaps() == old
    assert len(bench.points()) == 1


async def test_a_disk_that_fails_keeps_no_other_from_its_point(
    bench: Bench, vda: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(vda, 0, b"x")

    async def fail(*_: object) -> None:
        raise IoError(errno.EIO, "block status")

    monkeypatch.setattr(vda.node.driver, "block_status", fail)
    run = await bench.backup("vda", "vdb")

    assert run.state == "failed"
    assert [part.is_finished for part in run.parts] == [False, True]
    assert bench.bitmaps("vda") == []
    assert bench.bitmaps("vdb") == [run.parts[1].bitmap]
    assert run.job.error_text is not None
    assert run.job.error_text.startswith("vda: ")


async def test_two_folders_in_turn_have_a_bitmap_each(bench: Bench, vda: Disk) -> None:
    other = bench.folder / "other"
    for number in range(3):
        for folder in (bench.to, other):
            await write(vda, number * 65536, bytes([number + 1]))
            run = await bench.backup(folder=folder)
            assert kinds(run) == ["inc" if number else "full"]
            assert bench.points(to=folder)[-1] == bench.disk()
    assert len(bench.bitmaps()) == 2


async def test_bitmaps_that_a_crash_has_left_go_with_the_next_backup(
    bench: Bench, vda: Disk
) -> None:
    run = await bench.backup()
    prefix = run.parts[0].bitmap.rpartition("-")[0]
    for name in (f"{prefix}-0123", "mine"):
        vda.node.bitmaps[name] = new_bitmap(vda.node, name, None, enabled=True)

    run = await bench.backup()

    assert kinds(run) == ["inc"]
    assert set(bench.bitmaps()) == {run.parts[0].bitmap, "mine"}


async def test_a_rolled_back_folder_gets_a_full_backup(bench: Bench, vda: Disk) -> None:
    await bench.backup()
    manifest = bench.to / "vda" / "manifest.json"
    old = manifest.read_bytes()
    await write(vda, 0, b"x")
    await bench.backup()
    manifest.write_bytes(old)  # somebody has put back a copy
    await write(vda, 65536, b"y")

    run = await bench.backup()

    assert kinds(run) == ["full"]
    assert run.parts[0].point is not None
    assert "has no bitmap" in run.parts[0].point.reason
    assert bench.points()[-1] == bench.disk()
    assert len(list((bench.to / "vda").glob("*.qcow2"))) == 3  # what is unknown is left alone


async def test_a_clock_that_was_put_back_is_noticed(bench: Bench, rng: random.Random) -> None:
    with DiskFolder(_made(bench.to) / "vda", for_change=True) as folder:
        add_point(folder, some_disk(rng, SIZE), instant=datetime.now(UTC) + timedelta(hours=1))

    with pytest.raises(CommandError, match="is before the newest point"):
        await bench.start()
    assert bench.bitmaps() == []
    assert bench.fleece.disk("vda").snapshots == {}


async def test_a_drained_section_pauses_a_backup_and_waits_for_no_file(
    bench: Bench, vda: Disk
) -> None:
    await write(vda, 0, b"x" * SIZE)
    run = await bench.start(speed=SIZE)
    async with drained(vda.top):
        await eventually(lambda: run.job.status is Status.PAUSED)
    run.job.set_speed(0)
    await run.job.wait_concluded()

    assert run.state == "done"
    assert bench.points() == [bench.disk()]


async def test_a_snapshot_of_a_running_backup_stays(bench: Bench, vda: Disk) -> None:
    await write(vda, 0, b"x" * SIZE)
    run = await bench.start(speed=1000)
    name = run.parts[0].snapshot.name

    with pytest.raises(CommandError):
        await bench.fleece.delete_snapshot("vda", name, force=True)
    with pytest.raises(InUse):
        await bench.start()
    run.job.cancel()
    await run.job.wait_concluded()
    assert vda.snapshots == {}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"disks": ()}, "no disk is named"),
        ({"disks": ("vda", "vda")}, "named twice"),
        ({"folder": None}, "either to a folder or to a stream"),
        ({"stream": Path("/x")}, "either to a folder or to a stream"),
        ({"folder": Path("backup")}, "no absolute path"),
        ({"folder": None, "stream": Path("/x"), "disks": ("vda", "vdb")}, "only one disk"),
    ],
)
async def test_options_that_make_no_sense_are_refused(
    bench: Bench, options: dict, complaint: str
) -> None:
    wanted = BackupOptions(**({"disks": ("vda",), "folder": bench.to} | options))
    with pytest.raises(CommandError, match=complaint):
        await bench.backups.start(wanted, JobOptions("b"))
    assert not bench.to.exists()


async def test_a_disk_or_reader_that_is_not_there_is_named(bench: Bench) -> None:
    with pytest.raises(NotFound, match="no disk 'nope'"):
        await bench.start("nope")
    run = await bench.backup(folder=None, stream=bench.folder / "none")
    assert run.state == "failed"
    assert "No such file" in str(run.parts[0].error)


async def test_a_backup_that_finds_no_space_says_where(
    bench: Bench, vda: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if ".qcow2" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    await write(vda, 0, b"x" * SIZE)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        run = await bench.backup()
    assert run.state == "failed"
    assert run.parts[0].error == f"'{bench.to / 'vda'}': No space left on device"


async def test_the_log_says_what_a_backup_goes_to_and_why_it_is_full(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await bench.backup()
    await bench.backup()
    said = [text for text in caplog.messages if "backup to" in text]
    assert said[0].endswith(".full.qcow2' begins (full: it is the first backup)")
    assert said[1].endswith(".inc.qcow2' begins")


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_folder_that_hangs_at_the_end_of_a_backup_holds_up_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, is_cancelled: bool
) -> None:
    """The file is closed, and removed when it was not finished, by threads."""
    loop_thread = threading.get_ident()
    close, unlink = os.close, Path.unlink
    by_loop: list[str] = []

    def note(what: str) -> None:
        if threading.get_ident() == loop_thread and what.startswith(str(bench.to)):
            by_loop.append(what)

    def close_noted(fd: int) -> None:
        note(os.readlink(f"/proc/self/fd/{fd}"))
        close(fd)

    def unlink_noted(path: Path, missing_ok: bool = False) -> None:
        note(str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "close", close_noted)
    monkeypatch.setattr(Path, "unlink", unlink_noted)
    run = await bench.start(speed=1000 if is_cancelled else 0)
    if is_cancelled:
        run.job.cancel()
    await run.job.wait_concluded()
    assert run.state == ("cancelled" if is_cancelled else "done")
    assert by_loop == []
    assert not list((bench.to / "vda").glob("*.partial"))


# --- restarts ------------------------------------------------------------------------------------


async def test_an_image_that_was_closed_is_not_taken_for_changed_by_others(tmp_path: Path) -> None:
    """Closing a qcow2 image writes to its file, behind the last write of a guest."""
    for number in range(3):
        async with asyncio.TaskGroup() as tasks:
            bench = Bench(tmp_path, tasks)
            if number == 0:
                await make_qcow2(bench, "vda.qcow2")
            location = make_location("vda", str(tmp_path / "vda.qcow2"), {"format": "qcow2"})
            disk = await bench.fleece.add_disk(location)
            await write(disk, number * 65536, b"before")
            assert kinds(await bench.backup()) == ["inc" if number else "full"]
            await write(disk, (number + 5) * 65536, b"behind")
            await bench.jobs.close()
        assert await bench.fleece.close()
        bench.state.close()


async def test_a_flush_of_an_image_is_not_taken_for_a_change_by_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes metadata, perhaps long behind the last write; then the daemon is killed."""
    monkeypatch.setattr(bitmap_files, "_AHEAD_NS", 100_000_000)
    monkeypatch.setattr(bitmap_files, "_RENEW_S", 0.01)
    path = await make_qcow2(bench, "vdc.qcow2")
    disk = await bench.fleece.add_disk(make_location("vdc", path, {"format": "qcow2"}))
    await bench.backup("vdc")
    await write(disk, 0, b"x" * SIZE)
    await asyncio.sleep(0.2)
    await disk.export.node.flush()

    other = await another_drive(bench)
    other.read_only = True
    kept = DiskBitmaps(bench.state.bitmap_folder("vdc"), other, disk.kept._identity)
    (found,) = kept.load(last_change(disk.location))
    assert (found.inconsistent, found.count()) == (False, SIZE)


# --- another drive -------------------------------------------------------------------------------


async def another_drive(bench: Bench, below: Node | None = None) -> Node:
    """A node of the user's, of the size of a disk: an image, or an overlay of a disk."""
    path = bench.folder / "other.img"
    path.write_bytes(b"o" * SIZE)
    file = {"driver": "file", "filename": str(path)}
    options: dict[str, object] = {**file, "node-name": "other"}
    if below is not None:
        file["filename"] = await make_qcow2(bench, "other.qcow2")
        options = {"driver": "qcow2", "node-name": "other", "file": file, "backing": below.name}
    return await add_from_options(bench.graph, options, needs_name=True)


async def make_qcow2(bench: Disks, name: str) -> str:
    path = bench.folder / name
    path.write_bytes(b"")
    file = {"driver": "file", "filename": str(path)}
    await find_creator("qcow2")(bench.graph, {"file": file, "size": SIZE})
    return str(path)


@pytest.mark.parametrize("is_overlay", [False, True])
async def test_no_increment_is_made_of_what_the_bitmap_does_not_know_of(
    bench: Bench, vda: Disk, *, is_overlay: bool
) -> None:
    """qom-set or blockdev-snapshot have put another node under the export."""
    await write(vda, 0, b"x" * SIZE)
    await bench.backup("vda", "vdb")
    other = await another_drive(bench, vda.node if is_overlay else None)
    await bench.fleece.set_drive(vda.export, other)
    await write(vda, 65536, b"of the other")
    there = await read_all(other)

    run = await bench.backup("vda", "vdb")
    assert kinds(run) == ["full", "inc"]
    assert run.parts[0].point is not None
    assert "goes past node 'vda'" in run.parts[0].point.reason
    assert bench.points()[-1] == there
    assert bench.bitmaps() == []
    assert os.listdir(bench.folder / "state" / "vda" / "bitmaps") == []
    assert bench.bitmaps("vdb") == [run.parts[1].bitmap]

    await bench.fleece.set_drive(vda.export, vda.node)
    for kind in ("full", "inc"):
        await write(vda, 0, kind.encode())
        assert kinds(await bench.backup("vda", "vdb")) == [kind, "inc"]
        assert bench.points()[-1] == bench.disk()


async def test_a_bitmap_goes_on_where_the_disk_came_back_unchanged(bench: Bench, vda: Disk) -> None:
    await write(vda, 0, b"x" * SIZE)
    await bench.backup()
    await write(vda, 65536, b"before")
    await bench.fleece.set_drive(vda.export, await another_drive(bench))
    await write(vda, 0, b"of the other")
    await bench.fleece.set_drive(vda.export, vda.node)
    assert kinds(await bench.backup()) == ["inc"]
    assert bench.points()[-1] == bench.disk()


@pytest.mark.parametrize("options", [{"bitmap": "b"}, {"internal": True}], ids=str)
async def test_a_snapshot_that_needs_the_disk_itself_is_refused(
    bench: Bench, options: dict[str, Any]
) -> None:
    path = await make_qcow2(bench, "vdc.qcow2")
    disk = await bench.fleece.add_disk(make_location("vdc", path, {"format": "qcow2"}))
    await bench.fleece.set_drive(disk.export, await another_drive(bench))
    wanted = SnapshotOptions(**options)
    with pytest.raises(CommandError, match="goes to node 'other', of which"):
        await bench.fleece.create_snapshots(["vdc"], "s", wanted, token_s=None)
    assert disk.node.bitmaps == {}
    assert disk.snapshots == {}

    await bench.fleece.set_drive(disk.export, disk.node)
    await bench.fleece.create_snapshots(["vdc"], "s", wanted, token_s=None)
