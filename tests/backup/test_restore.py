import asyncio
import os
import random
import resource
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdfleece.backup.errors import BackupError, Damaged, NoBackup, WouldOverwrite
from nbdfleece.backup.folder import DiskFolder
from nbdfleece.backup.manifest import Point
from nbdfleece.backup.prune import prune
from nbdfleece.backup.restore import Source, parse_source, restore
from nbdfleece.backup.retention import Retention
from nbdfleece.base.errors import CommandError, ConfigError
from tests.support.backups import CLUSTER, add_point, changed, some_disk
from tests.support.loop_device import loop_device
from tests.support.nbd_server import serving

MIB = 1 << 20
SIZE = 3 * MIB + 512


class Backups:
    """Two points of a disk `vda`."""

    def __init__(self, path: Path, rng: random.Random, size: int = SIZE) -> None:
        self.path = path
        self.disks = [some_disk(rng, size)]
        self.disks.append(changed(rng, self.disks[0]))
        with DiskFolder(path / "vda", for_change=True) as folder:
            self.points: list[Point] = [add_point(folder, self.disks[0])]
            self.points.append(add_point(folder, self.disks[1], before=self.disks[0]))

    async def restore(
        self, destination: str | Path, which: int = 1, *, force: bool = False, check: bool = True
    ) -> list[tuple[int, int]]:
        told: list[tuple[int, int]] = []
        point = await restore(
            Source(self.path / "vda", self.points[which].name),
            str(destination),
            force=force,
            check=check,
            tell=lambda *progress: told.append(progress),
        )
        assert point == self.points[which]
        return told


@pytest.fixture
def backups(tmp_path: Path, rng: random.Random) -> Backups:
    return Backups(tmp_path / "backups", rng)


@pytest.mark.parametrize("check", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("which", [0, 1])
async def test_a_point_comes_back_as_a_file(
    backups: Backups, tmp_path: Path, which: int, check: bool
) -> None:
    told = await backups.restore(tmp_path / "raw", which, check=check)

    assert (tmp_path / "raw").read_bytes() == backups.disks[which]
    assert told[-1] == (SIZE, SIZE)
    assert told == sorted(told)
    assert sorted(os.listdir(tmp_path)) == ["backups", "raw"]


@pytest.mark.parametrize("size", [1, 511, 4097, MIB, MIB + 1])
async def test_disks_of_any_size_come_back(tmp_path: Path, rng: random.Random, size: int) -> None:
    backups = Backups(tmp_path / "backups", rng, size)

    await backups.restore(tmp_path / "raw")

    assert (tmp_path / "raw").read_bytes() == backups.disks[1]


async def test_zeroes_come_back_as_holes(tmp_path: Path, rng: random.Random) -> None:
    disk = bytes(10 * MIB) + rng.randbytes(CLUSTER) + bytes(10 * MIB)
    with DiskFolder(tmp_path / "vda", for_change=True) as folder:
        add_point(folder, disk)

    source = parse_source(str(tmp_path))
    await restore(source, str(tmp_path / "raw"), force=False, check=True, tell=lambda *_: None)

    assert (tmp_path / "raw").read_bytes() == disk
    assert os.stat(tmp_path / "raw").st_blocks * 512 <= 2 * CLUSTER


async def test_what_is_there_is_overwritten_by_force_only(backups: Backups, tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"mine")
    path.chmod(0o640)

    with pytest.raises(WouldOverwrite, match="raw' exists; --force"):
        await backups.restore(path)
    assert path.read_bytes() == b"mine"

    await backups.restore(path, force=True)
    assert path.read_bytes() == backups.disks[1]
    assert path.stat().st_mode & 0o777 == 0o640


async def test_a_link_stays_a_link(backups: Backups, tmp_path: Path) -> None:
    path, real = tmp_path / "link", tmp_path / "elsewhere" / "disk.raw"
    real.parent.mkdir()
    real.write_bytes(b"old")
    path.symlink_to(real)

    await backups.restore(path, force=True)

    assert path.is_symlink()
    assert real.read_bytes() == backups.disks[1]


async def test_a_damaged_file_never_becomes_a_disk(backups: Backups, tmp_path: Path) -> None:
    file = backups.path / "vda" / backups.points[0].file
    data = bytearray(file.read_bytes())
    data[CLUSTER + 5] ^= 1
    file.write_bytes(data)

    with pytest.raises(Damaged, match="not those that were written"):
        await backups.restore(tmp_path / "raw")
    assert os.listdir(tmp_path) == ["backups"]


async def test_a_missing_file_is_named(backups: Backups, tmp_path: Path) -> None:
    (backups.path / "vda" / backups.points[0].file).unlink()

    with pytest.raises(BackupError, match=f"{backups.points[0].file}': No such file"):
        await backups.restore(tmp_path / "raw")
    assert os.listdir(tmp_path) == ["backups"]


async def test_a_device_is_overwritten_by_force_only(backups: Backups, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"\xff" * (SIZE + MIB))
    with loop_device(image) as device:
        with pytest.raises(WouldOverwrite, match="block device; --force"):
            await backups.restore(device)
        await backups.restore(device, force=True)
        found = device.read_bytes()

    assert found[:SIZE] == backups.disks[1]
    assert found[SIZE:] == b"\xff" * MIB  # what is behind the disk is left alone


async def test_a_point_comes_back_into_an_export(backups: Backups, short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        await served.add("empty", bytes(SIZE))
        await served.add("used", b"\xff" * SIZE)

        await backups.restore(f"nbd+unix:///empty?socket={served.path}")
        with pytest.raises(WouldOverwrite, match="not empty; --force"):
            await backups.restore(f"nbd+unix:///used?socket={served.path}")
        await backups.restore(f"nbd+unix:///used?socket={served.path}", force=True)

        assert bytes(served.drivers["empty"].data) == backups.disks[1]
        assert bytes(served.drivers["used"].data) == backups.disks[1]
        with pytest.raises(BackupError, match="has 1048576 bytes, and the disk needs"):
            await backups.restore(f"nbd+unix:///disk?socket={served.path}", force=True)


async def test_servers_and_folders_that_are_not_there_say_so(
    backups: Backups, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match="No such file"):
        await backups.restore(f"nbd+unix:///x?socket={tmp_path}/none", force=True)
    with pytest.raises(BackupError, match="No such file"):
        await backups.restore(tmp_path / "no" / "raw")
    with pytest.raises(ConfigError, match="neither a file nor a block device"):
        await backups.restore(tmp_path)


def test_sources_name_a_folder_a_disk_and_an_instant(backups: Backups) -> None:
    path = backups.path
    assert parse_source(f"{path}") == Source(path / "vda", "")
    assert parse_source(f"{path}/vda") == Source(path / "vda", "")
    assert parse_source(f"{path}/vda@2026-11-27") == Source(path / "vda", "20261127T")
    assert parse_source(f"{path}@20261127T03") == Source(path / "vda", "20261127T03")


def test_a_source_that_is_not_there_or_not_clear_is_refused(
    backups: Backups, rng: random.Random
) -> None:
    with pytest.raises(NoBackup, match="No such file"):
        parse_source(f"{backups.path}/vdb")
    with pytest.raises(ConfigError, match="no instant"):
        parse_source(f"{backups.path}/vda@yesterday")
    with DiskFolder(backups.path / "vdb", for_change=True) as folder:
        add_point(folder, some_disk(rng, CLUSTER))
    with pytest.raises(ConfigError, match=r"several disks .vda, vdb.: say"):
        parse_source(str(backups.path))


async def test_an_instant_must_mean_one_point(backups: Backups, tmp_path: Path) -> None:
    folder = backups.path / "vda"
    for instant, complaint in (("2025", "no point 2025"), ("2026", "2 points that begin")):
        with pytest.raises(NoBackup, match=complaint):
            await restore(
                Source(folder, instant),
                str(tmp_path / "raw"),
                force=False,
                check=False,
                tell=lambda *_: None,
            )


async def test_two_restores_to_one_file_do_not_spoil_each_other(
    backups: Backups, tmp_path: Path
) -> None:
    """The second one empties nothing, and removes nothing, that the first is writing."""
    source, target = Source(backups.path / "vda", ""), tmp_path / "target"
    seconds: list[Future[Point]] = []

    def again() -> Point:
        nothing = lambda *_: None  # noqa: E731
        return asyncio.run(restore(source, str(target), force=True, check=True, tell=nothing))

    def tell(_done: int, _size: int) -> None:  # some has been written
        if not seconds:
            with ThreadPoolExecutor() as threads:
                seconds.append(threads.submit(again))

    await restore(source, str(target), force=False, check=True, tell=tell)
    assert target.read_bytes() == backups.disks[1]
    with pytest.raises(CommandError):
        seconds[0].result()
    assert sorted(os.listdir(tmp_path)) == ["backups", "target"]


async def test_a_chain_longer_than_the_limit_of_open_files_comes_back_and_is_merged(
    tmp_path: Path, rng: random.Random
) -> None:
    """The limit is 1024 mostly: a point an hour for six weeks, and then the disk dies."""
    disk = some_disk(rng, 4 * CLUSTER)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) + 20
    with DiskFolder(tmp_path / "vda", for_change=True) as folder:
        add_point(folder, disk)
        for _ in range(60):
            before, disk = disk, changed(rng, disk, count=1)
            add_point(folder, disk, before=before)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used, limits[1]))
            source, target = Source(tmp_path / "vda", ""), tmp_path / "target"
            folder.close()
            nothing = lambda *_: None  # noqa: E731
            await restore(source, str(target), force=False, check=True, tell=nothing)
            resource.setrlimit(resource.RLIMIT_NOFILE, (used, limits[1]))
            with DiskFolder(tmp_path / "vda", for_change=True) as again:
                prune(again, Retention({"last": 1}))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert target.read_bytes() == disk
