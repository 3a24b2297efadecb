"""The older scheme as programs of today use it: an overlay over the disk is the backup's view.

Follows: QEMU tests/qemu-iotests/222, tests/image-fleecing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.test_scenarios import FILL, OVERWRITE, REMAINS, SIZE, ZERO, reads, writes
from tests.support.live import MiB, eventually, qemu_io, read_whole, run, scribble
from tests.support.nbd_client import NbdClient, RequestFailed, connected
from tests.support.storage_daemon import StorageDaemon

pytestmark = pytest.mark.interop("qemu-io", "qemu-img")

Program = Callable[[str], str]
SERVER = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")


@pytest.fixture(params=["raw", "qcow2"])
def source(request: pytest.FixtureRequest) -> str:
    return request.param


def images(folder: Path, program: Program, source: str, size: int) -> None:
    """Make a disk, and an overlay over it whose header says so."""
    image = program("qemu-img")
    disk, temp = folder / "disk", folder / "temp"
    run(image, "create", "-f", source, disk, str(size))
    run(image, "create", "-f", "qcow2", "-F", source, "-b", disk, temp)


@pytest.fixture
def daemon(short_tmp: Path, program: Program, source: str) -> Iterator[StorageDaemon]:
    images(short_tmp, program, source, SIZE)
    with begun(short_tmp, source) as running:
        yield running


def begun(folder: Path, source: str) -> StorageDaemon:
    return StorageDaemon(
        folder,
        "--blockdev",
        f"{source},node-name=disk,file.driver=file,file.filename=disk,discard=unmap",
        *SERVER,
        "--export",
        "nbd,id=live,node-name=disk,name=live,writable=on",
    )


def add_temp(daemon: StorageDaemon, backing: object = "disk") -> dict:
    file = {"driver": "file", "filename": str(daemon.folder / "temp")}
    temp = {"driver": "qcow2", "node-name": "temp", "file": file, "backing": backing}
    daemon.ask("blockdev-add", temp)
    return temp


def export_temp(daemon: StorageDaemon) -> None:
    daemon.ask("block-export-add", {"type": "nbd", "id": "old", "name": "old", "node-name": "temp"})


def begin_job(daemon: StorageDaemon) -> None:
    backup = {"job-id": "fleece", "device": "disk", "target": "temp", "sync": "none"}
    daemon.ask("blockdev-backup", backup)


def begin_filter(daemon: StorageDaemon) -> None:
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp"}
    daemon.ask("blockdev-add", cbw)
    set_drive(daemon, "cbw")


def set_drive(daemon: StorageDaemon, node: str) -> None:
    path = daemon.ask("query-block")[0]["qdev"]
    daemon.ask("qom-set", {"path": path, "property": "drive", "value": node})


def end(daemon: StorageDaemon, scheme: str) -> None:
    if scheme == "job":
        daemon.ask("block-job-cancel", {"device": "fleece"})
        daemon.event("BLOCK_JOB_CANCELLED")
    else:
        set_drive(daemon, "disk")
        daemon.ask("blockdev-del", {"node-name": "cbw"})


def finish(daemon: StorageDaemon, program: Program, source: str) -> None:
    daemon.ask("nbd-server-stop")
    daemon.ask("blockdev-del", {"node-name": "temp"})
    daemon.ask("quit")
    assert daemon.process.wait(30) == 0
    run(program("qemu-img"), "check", "-f", "qcow2", daemon.folder / "temp")
    flat = daemon.folder / "flat"
    run(program("qemu-img"), "convert", "-f", source, "-O", "raw", daemon.folder / "disk", flat)
    qemu_io(program, flat, *reads(OVERWRITE), *reads(REMAINS))


def test_fleecing_by_a_job_into_an_overlay(
    daemon: StorageDaemon, program: Program, source: str
) -> None:
    """T-F1."""
    live, old = daemon.uri("live"), daemon.uri("old")
    qemu_io(program, live, *writes(FILL))
    add_temp(daemon)
    begin_job(daemon)
    export_temp(daemon)
    readonly(program, old, *reads(FILL), *reads(ZERO))
    qemu_io(program, live, *writes(OVERWRITE))
    readonly(program, old, *reads(FILL), *reads(ZERO))
    qemu_io(program, live, *reads(OVERWRITE), *reads(REMAINS))
    daemon.ask("block-job-cancel", {"device": "fleece"})
    assert daemon.event("BLOCK_JOB_CANCELLED") == {
        "device": "fleece",
        "len": SIZE,
        "offset": 393216,
        "speed": 0,
        "type": "backup",
    }
    finish(daemon, program, source)


def test_fleecing_by_a_filter_into_an_overlay(
    daemon: StorageDaemon, program: Program, source: str
) -> None:
    """T-F2."""
    live, old = daemon.uri("live"), daemon.uri("old")
    qemu_io(program, live, *writes(FILL))
    add_temp(daemon)
    begin_filter(daemon)
    export_temp(daemon)
    readonly(program, old, *reads(FILL), *reads(ZERO))
    qemu_io(program, live, *writes(OVERWRITE))
    readonly(program, old, *reads(FILL), *reads(ZERO))
    qemu_io(program, live, *reads(OVERWRITE), *reads(REMAINS))
    end(daemon, "filter")
    finish(daemon, program, source)


def test_a_transaction_that_is_aborted_leaves_the_overlay_as_it_was(
    daemon: StorageDaemon, source: str
) -> None:
    add_temp(daemon)
    backup = {"job-id": "fleece", "device": "disk", "target": "temp", "sync": "none"}
    actions = [{"type": "blockdev-backup", "data": backup}, {"type": "abort", "data": {}}]
    assert "borted" in daemon.error("transaction", {"actions": actions})
    begin_job(daemon)


def readonly(program: Program, uri: str, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    done = run(program("qemu-io"), "-r", "-f", "raw", *options, uri)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("scheme", ["job", "filter"])
async def test_the_overlay_stays_over_the_disk_while_it_is_preserved_and_fails_afterwards(
    daemon: StorageDaemon, program: Program, scheme: str
) -> None:
    """T-R11 of a backup, and what the reference gets wrong (fleecing.md 6.1, 10 and 11)."""
    qemu_io(program, daemon.uri("live"), *writes(FILL))
    temp = add_temp(daemon)
    if scheme == "job":
        begin_job(daemon)
    else:
        begin_filter(daemon)
    export_temp(daemon)
    path = str(daemon.folder / "nbd.sock")
    async with connected(path, "live") as guest, connected(path, "old") as reader:
        other = {"driver": "null-co", "node-name": "other", "size": SIZE}
        daemon.ask("blockdev-add", other)
        for backing in (None, "other"):
            text = daemon.error("blockdev-reopen", {"options": [{**temp, "backing": backing}]})
            assert "Cannot change frozen 'backing' link from node 'temp' to 'disk'" in text
        daemon.ask("blockdev-reopen", {"options": [temp]})  # no change of it
        assert "in use" in daemon.error("blockdev-del", {"node-name": "temp"})

        await guest.write(0, b"\xee" * 65536)
        assert await reader.read(0, 65536) == b"\x5d" * 65536
        assert await reader.read(MiB, 65536) == b"\xd5" * 65536
        end(daemon, scheme)
        await guest.write(MiB, b"\xee" * 65536)
        assert await reader.read(0, 65536) == b"\x5d" * 65536, "what was saved can still be read"
        with pytest.raises(RequestFailed) as failed:
            await reader.read(MiB, 65536)
        assert failed.value.error == 5
        assert "not a point in time any more" in daemon.errors()
        begin = {"job-id": "again", "device": "disk", "target": "temp", "sync": "none"}
        assert "has been, a point in time" in daemon.error("blockdev-backup", begin)

        daemon.ask("blockdev-reopen", {"options": [{**temp, "backing": "other"}]})
        assert await reader.read(MiB, 65536) == bytes(65536), "the user has said what is behind"


@pytest.mark.parametrize("scheme", ["job", "filter"])
async def test_the_whole_overlay_is_the_instant_while_the_guest_goes_on(
    short_tmp: Path, program: Program, source: str, scheme: str, rng: random.Random
) -> None:
    """Writes, trims and zeroes of the guest, another snapshot above and away, whole reads."""
    images(short_tmp, program, source, 8 * MiB)
    path = str(short_tmp / "nbd.sock")
    with begun(short_tmp, source) as daemon:
        async with connected(path, "live") as guest:
            for _ in range(60):
                await scribble(guest, rng)
            add_temp(daemon)
            if scheme == "job":
                begin_job(daemon)
            else:
                begin_filter(daemon)
            instant = await read_whole(guest)
            export_temp(daemon)
            async with connected(path, "old") as reader:
                await compare(guest, reader, instant, rng)
                second = {"driver": "null-co", "node-name": "full", "size": 8 * MiB}
                daemon.ask("blockdev-add", second)
                more = {"job-id": "more", "device": "disk", "target": "full", "sync": "none"}
                daemon.ask("blockdev-backup", more)
                await compare(guest, reader, instant, rng)
                daemon.ask("block-job-cancel", {"device": "more"})
                daemon.event("BLOCK_JOB_CANCELLED")
                await compare(guest, reader, instant, rng)
        daemon.ask("quit")
        assert daemon.process.wait(30) == 0
    run(program("qemu-img"), "check", "-f", "qcow2", short_tmp / "temp")


async def compare(guest: NbdClient, reader: NbdClient, instant: bytes, rng: random.Random) -> None:
    running = 0

    async def write() -> None:
        nonlocal running
        running += 1
        for _ in range(25):
            await scribble(guest, rng)
        running -= 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(write())
        await eventually(lambda: running)
        while running:
            assert await read_whole(reader) == instant
            offset = rng.randrange(len(instant))
            length = min(rng.randrange(1, 300_000), len(instant) - offset)
            assert await reader.read(offset, length) == instant[offset : offset + length]
    assert await read_whole(reader) == instant
