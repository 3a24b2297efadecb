"""kill -9 of the daemon under a writing guest: no bitmap misses a block that changed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import ask, eventually, read_export, run, serving, snapshot
from tests.support.nbd_client import NbdClient

GRANULE = 4096
GRANULES = 1024
SIZE = GRANULE * GRANULES
LANES = 8
CONTEXT = "qemu:dirty-bitmap:b"


def differing(one: bytes, other: bytes) -> set[int]:
    return {
        index
        for index in range(GRANULES)
        if one[index * GRANULE : (index + 1) * GRANULE]
        != other[index * GRANULE : (index + 1) * GRANULE]
    }


class Guest:
    """Writes a few sectors here and there, on several lanes, until the connection ends."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.written = 0

    async def run(self, one: NbdClient) -> None:
        while True:
            length = self.rng.choice((512, 4096, 12288))
            offset = self.rng.randrange((SIZE - length) // 512) * 512
            try:
                await one.write(offset, self.rng.randbytes(length))
            except (OSError, EOFError):
                return
            self.written += 1


class Backups:
    """Increments all the time, some of which fail; `base` is the last one that was taken as good.

    From the moment in which `success` is sent it is: whoever sends it has the copy.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.base = bytes(SIZE)
        self.done = 0

    async def one(self, daemon: Daemon) -> None:
        await snapshot(daemon, "vda", name="s", bitmap="b")
        content = await read_export(daemon, "vda@s")
        missing = differing(content, self.base) - await dirty(daemon, "vda@s")
        assert not missing, f"granules {sorted(missing)} have changed and are not dirty"
        succeeded = self.rng.random() < 0.6
        if succeeded:
            self.base = content
        arguments = {"disk": "vda", "snapshot": "s", "force": True, "success": succeeded}
        await ask(daemon, "fleece-snapshot-delete", arguments)
        self.done += 1

    async def run(self, daemon: Daemon, going: list[bool]) -> None:
        while going[0]:
            try:
                await self.one(daemon)
            except AssertionError:
                raise
            except Exception:
                if going[0] and daemon.process.poll() is None:
                    raise
                return  # it was killed


async def dirty(daemon: Daemon, export: str) -> set[int]:
    one = await NbdClient.open(str(daemon.socket))
    try:
        await one.connect(export, contexts=[CONTEXT])
        found, offset = set[int](), 0
        while offset < SIZE:
            for length, flags in await one.status(offset, SIZE - offset, context=CONTEXT):
                if flags & 1:
                    found |= set(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
                offset += length
    finally:
        await one.close()
    return found


@pytest.mark.slow
@pytest.mark.deadline(7200 if os.environ.get("NBDFLEECE_LONG") == "1" else 300)
async def test_after_a_kill_at_any_moment_no_changed_block_is_missing(
    short_tmp: Path, rng: random.Random, long_run: bool
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(SIZE))
    backups = Backups(rng)
    for attempt in range(1000 if long_run else 24):
        (short_tmp / "log").unlink(missing_ok=True)
        with serving(short_tmp, disk) as daemon:
            if attempt == 0:
                arguments = {"disk": "vda", "bitmap": "b", "granularity": GRANULE}
                await ask(daemon, "fleece-bitmap-add", arguments)
            (row,) = await ask(daemon, "query-fleece-bitmaps")
            assert (row["recording"], row["busy"], row["persistent"]) == (True, False, True)
            assert "inconsistent" not in row, row
            await backups.one(daemon)
            guest, going = Guest(rng), [True]
            ends = [await NbdClient.open(str(daemon.socket)) for _ in range(2)]
            for one in ends:
                await one.connect("vda")
            with_backups = rng.random() < 0.7
            enough = rng.randrange(10, 1500)
            enough_backups = backups.done + (rng.randrange(3) if with_backups else 0)
            async with asyncio.TaskGroup() as tasks:
                for lane in range(LANES):
                    tasks.create_task(guest.run(ends[lane % 2]))
                if with_backups:
                    tasks.create_task(backups.run(daemon, going))
                await eventually(
                    lambda guest=guest, enough=enough, more=enough_backups: (
                        guest.written >= enough and backups.done >= more
                    )
                )
                going[0] = False
                assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
            for one in ends:
                await one.close()
    with serving(short_tmp, disk) as daemon:
        await backups.one(daemon)
        assert daemon.stop() == 0
    print(f"{backups.done} increments")


async def test_a_clean_end_and_a_crash_keep_the_bitmap_and_a_stranger_spoils_it(
    short_tmp: Path,
) -> None:
    disk = make_disk(short_tmp / "vda.raw", SIZE)

    async def only(daemon: Daemon) -> dict:
        (row,) = await ask(daemon, "query-fleece-bitmaps")
        return row

    async def write(daemon: Daemon, offset: int) -> None:
        one = await NbdClient.open(str(daemon.socket))
        await one.connect("vda")
        await one.write(offset, b"x" * 512)
        await one.disconnect()

    with serving(short_tmp, disk) as daemon:
        assert daemon.run("bitmap", "add", "vda", "b").code == 0
        await write(daemon, 0)
        assert daemon.stop() == 0
    with serving(short_tmp, disk) as daemon:
        assert (await only(daemon))["count"] == 65536
        await write(daemon, 1 << 20)
        await snapshot(daemon, "vda", name="s", bitmap="b")
        await write(daemon, 2 << 20)
        daemon.stop(signal.SIGKILL)
    with serving(short_tmp, disk) as daemon:
        row = await only(daemon)
        assert (row["count"], row["busy"], row["recording"]) == (3 * 65536, False, True)
        assert daemon.stop() == 0
    with disk.open("r+b") as file:
        file.write(b"y")
    with serving(short_tmp, disk) as daemon:
        row = await only(daemon)
        assert row["inconsistent"]
        assert row["reason"] == "the disk was changed while it was not served"
        assert "inconsistent: the disk was changed" in daemon.run("bitmap", "list").out
        assert "is inconsistent: the disk was changed while it was not served" in daemon.errors()
        refused = daemon.run("snapshot", "create", "vda", "--bitmap", "b")
        assert "Bitmap 'b' is inconsistent and cannot be used" in refused.err
        assert daemon.run("bitmap", "remove", "vda", "b").code == 0
        assert daemon.run("bitmap", "add", "vda", "b").code == 0
        assert daemon.stop() == 0
    other = make_disk(short_tmp / "new.raw", SIZE)
    other.replace(disk)
    with serving(short_tmp, disk) as daemon:
        assert (await only(daemon))["reason"] == "the disk is not the one that it was made for"


@pytest.mark.interop("qemu-img")
async def test_a_bitmap_in_the_image_and_one_beside_it_under_one_name_are_both_distrusted(
    short_tmp: Path, program: Callable[[str], str]
) -> None:
    """Each has missed what the other has recorded."""
    disk = short_tmp / "vda.qcow2"
    tool = program("qemu-img")
    run(tool, "create", "-f", "qcow2", "-o", "compat=0.10", disk, str(SIZE))
    with serving(short_tmp, f"{disk},format=qcow2") as daemon:
        for name in ("b", "beside"):
            assert daemon.run("bitmap", "add", "vda", name).code == 0
        assert daemon.stop() == 0
    with serving(short_tmp, f"{disk},format=qcow2") as daemon:
        rows = await ask(daemon, "query-fleece-bitmaps")
        assert [row["bitmap"] for row in rows if "inconsistent" not in row] == ["b", "beside"]
        assert daemon.stop() == 0
    run(tool, "amend", "-f", "qcow2", "-o", "compat=1.1", disk)
    run(tool, "bitmap", "--add", disk, "b")
    for _ in range(2):
        with serving(short_tmp, f"{disk},format=qcow2") as daemon:
            rows = await ask(daemon, "query-fleece-bitmaps")
            found = {row["bitmap"]: row for row in rows}
            assert found["b"]["inconsistent"]
            assert found["b"]["reason"] == "there is one in the image, and one beside it"
            assert "one in the image, and one beside it" in daemon.errors()
            refused = daemon.run("snapshot", "create", "vda", "--bitmap", "b")
            assert "Bitmap 'b' is inconsistent and cannot be used" in refused.err
            assert daemon.stop() == 0
    info = run(tool, "info", disk).stdout
    assert "in-use" in info, "others do not trust it, either"
    with serving(short_tmp, f"{disk},format=qcow2") as daemon:
        assert daemon.run("bitmap", "remove", "vda", "b").code == 0
        assert daemon.run("bitmap", "remove", "vda", "beside").code == 0
        assert not list(daemon.state.glob("**/bitmaps/*"))
        assert daemon.run("bitmap", "add", "vda", "b").code == 0
        assert daemon.stop() == 0
    with serving(short_tmp, f"{disk},format=qcow2") as daemon:
        (row,) = await ask(daemon, "query-fleece-bitmaps")
        assert "inconsistent" not in row
        assert daemon.stop() == 0
