"""A temporary image whose file system hangs: only what needs it waits."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client_replies import Reply
from tests.support.daemon_process import Daemon
from tests.support.file_system import FileSystem, file_system
from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    eventually,
    has_in_flight,
    in_flight,
    listed,
    read_export,
    serving,
    snapshot,
    soon,
)
from tests.support.nbd_client import NbdClient

SIZE = 16 * MiB
OLD = blocks(SIZE, 64 * KiB)

Waiting = list[asyncio.Future[Reply]]


@dataclass
class Scene:
    """Disks vda, vdb and vdc; the file system of the temporary images can be frozen."""

    daemon: Daemon
    temp: FileSystem


@pytest.fixture
def scene(short_tmp: Path) -> Iterator[Scene]:
    disks = [short_tmp / f"{name}.raw" for name in ("vda", "vdb", "vdc")]
    for disk in disks:
        disk.write_bytes(OLD)
    with file_system(short_tmp / "temp", 64 * MiB) as temp:
        options = ("--drain-timeout", "1", "--temp-dir", temp.path)
        with serving(short_tmp, *options, *disks, disks=3) as daemon:
            yield Scene(daemon, temp)


@asynccontextmanager
async def stuck(
    scene: Scene, guest: NbdClient, ranges: list[tuple[int, int]]
) -> AsyncIterator[Waiting]:
    """Freeze, and send writes that need a copy; returns when the daemon has them."""
    # A write may be answered a moment before the daemon sees that it is over.
    while await in_flight(scene.daemon):  # noqa: ASYNC110 - it is asked over a socket
        await asyncio.sleep(0)
    with scene.temp.frozen():
        waiting = [
            await guest.submit(c.NBD_CMD_WRITE, offset, length, data=b"\xee" * length)
            for offset, length in ranges
        ]
        # Where there is a timeout, a write may be over before it has been seen in flight.
        await eventually(
            lambda: (
                any(write.done() for write in waiting) or has_in_flight(scene.daemon, len(waiting))
            ),
            10,
        )
        yield waiting


KINDS = {
    "one small write": [(8 * MiB, 4 * KiB)],
    "many small writes": [(8 * MiB + number * 64 * KiB, 4 * KiB) for number in range(60)],
    "large writes": [(8 * MiB + number * 256 * KiB, 256 * KiB) for number in range(8)],
    "more large writes than threads": [
        (8 * MiB + number * 256 * KiB, 256 * KiB) for number in range(28)
    ],
}


def forget_cached(folder: Path) -> None:
    """Let the kernel drop what it has cached of the images."""
    for path in folder.rglob("*.raw"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("ranges", KINDS.values(), ids=KINDS.keys())
async def test_only_writes_that_need_a_copy_wait(
    scene: Scene, ranges: list[tuple[int, int]], *, cached: bool
) -> None:
    daemon = scene.daemon
    await snapshot(daemon, "vda", "vdb", name="one")
    async with (
        client(daemon, "vda") as guest,
        client(daemon, "vda") as same,
        client(daemon, "vda@one") as reader,
        client(daemon, "vdb") as other,
        client(daemon, "vdb@one") as other_reader,
        client(daemon, "vdc") as third,
    ):
        await guest.write(0, b"\xaa" * MiB)  # saved
        await other.write(0, b"\xaa" * MiB)
        if not cached:
            forget_cached(daemon.folder)
        async with stuck(scene, guest, ranges) as waiting:
            at = ranges[0][0]
            for one in (same, guest):  # also on the connection whose writes wait
                assert await soon(one.read(at, 64 * KiB)) == OLD[at : at + 64 * KiB]
                await soon(one.write(4096, b"\xbb" * 8192))
                await soon(one.write(100, b"\xcc" * 512 * KiB))
                await soon(one.zero(8192, 4096))
                await soon(one.flush())
                await soon(one.status(0, SIZE))
                await soon(one.write(20_000, b"\xdd" * 100, flags=c.NBD_CMD_FLAG_FUA))
            assert await soon(reader.read(0, MiB)) == OLD[:MiB]
            assert await soon(reader.read(at, MiB)) == OLD[at : at + MiB]
            assert await soon(reader.status(0, SIZE)) == [(SIZE, 0)]
            assert await soon(read_export(daemon, "vda@one")) == OLD
            assert await soon(read_export(daemon, "vda@one", structured=False)) == OLD

            # The other disks: one with a snapshot in the same place, one without.
            await soon(other.write(100, b"\xbb" * 70_000))
            await soon(other.flush())
            assert await soon(other_reader.read(0, 2 * MiB)) == OLD[: 2 * MiB]
            await soon(third.write(5 * MiB, b"\xbb" * MiB))
            await soon(third.trim(MiB, MiB))
            await soon(third.flush())
            assert await soon(read_export(daemon, "vdc"))

            for command in (("status",), ("snapshot", "list"), ("health",)):
                assert (await soon(cli(daemon, *command))).code == 0
            assert (await soon(listed(daemon)))["vda@one"]["state"] == "ok"
            assert not any(each.done() for each in waiting)

            scene.temp.thaw()
            for each in waiting:
                assert (await soon(each)).error == 0
        for offset, length in ranges:
            assert await guest.read(offset, length) == b"\xee" * length
        assert await read_export(daemon, "vda@one") == OLD
        assert await read_export(daemon, "vdb@one") == OLD
        assert (await listed(daemon))["vda@one"]["state"] == "ok"


async def test_a_second_write_to_the_same_place_waits_too_and_comes_out_right(
    scene: Scene,
) -> None:
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one")
    async with client(daemon, "vda") as one, client(daemon, "vda") as two:
        async with stuck(scene, one, [(8 * MiB, 4096)]):
            late = await two.submit(c.NBD_CMD_WRITE_ZEROES, 8 * MiB + 100, 1000)
            later = await two.submit(c.NBD_CMD_TRIM, 8 * MiB, 8 * KiB)
            assert await soon(two.read(8 * MiB, 8 * KiB)) == OLD[8 * MiB : 8 * MiB + 8 * KiB]
            assert not late.done()
            assert not later.done()
            scene.temp.thaw()
            assert (await soon(late)).error == 0
            assert (await soon(later)).error == 0
        assert await read_export(daemon, "vda@one") == OLD


@pytest.mark.parametrize("length", [4 * KiB, 256 * KiB, 2 * MiB])
@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
async def test_after_the_timeout_the_policy_decides(scene: Scene, policy: str, length: int) -> None:
    """T-C3, T-C4, T-C6: and what goes on in the background is no harm afterwards."""
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one", timeout=0.5, on_error=policy)
    async with client(daemon, "vda") as guest, client(daemon, "vda@one") as reader:
        await guest.write(0, b"\xaa" * MiB)
        at = 8 * MiB
        async with stuck(scene, guest, [(at, length)]) as waiting:
            reply = await soon(waiting[0])
            rows = await soon(listed(daemon))
            if policy == "break-snapshot":
                assert reply.error == 0
                assert await soon(guest.read(at, length)) == b"\xee" * length
                assert rows["vda@one"]["state"] == "broken"
                assert "timed out" in rows["vda@one"]["error"].lower()
                assert (await soon(cli(daemon, "snapshot", "show", "vda@one"))).code == 6
                await soon(guest.write(12 * MiB, b"\xdd" * MiB))  # at full speed from now on
                assert await soon(reader.error_of(c.NBD_CMD_READ, 0, 1)) == c.NBD_EIO
            else:
                assert reply.error == c.NBD_EINVAL  # ETIMEDOUT, as QEMU says it
                assert reply.text == "Connection timed out"
                assert await soon(guest.read(at, length)) == OLD[at : at + length]
                assert rows["vda@one"]["state"] == "ok"
                assert await soon(read_export(daemon, "vda@one")) == OLD
            await soon(guest.write(0, b"\xbb" * MiB))
            scene.temp.thaw()
        if policy == "break-guest-write":
            await soon(guest.write(at, b"\xee" * length))
            assert await read_export(daemon, "vda@one") == OLD
        else:
            assert await soon(reader.error_of(c.NBD_CMD_READ, 0, 1)) == c.NBD_EIO
    await eventually(lambda: has_no_readers(daemon))
    assert (await soon(cli(daemon, "snapshot", "delete", "vda@one"))).code == 0
    assert list(scene.temp.path.glob("*.raw")) == []


async def has_no_readers(daemon: Daemon) -> bool:
    return not any(row["readers"] for row in (await listed(daemon)).values())


async def test_guests_that_write_at_random_while_it_hangs_and_goes_on(
    scene: Scene, rng: random.Random
) -> None:
    """Frozen and thawed again and again, under several guests: nothing is lost or mixed up."""
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one")
    models = [bytearray(OLD[at : at + 4 * MiB]) for at in range(0, SIZE, 4 * MiB)]
    stop = asyncio.Event()

    async def guest(number: int) -> None:
        model = models[number]
        async with client(daemon, "vda") as one:
            while not stop.is_set():
                offset = rng.randrange(4 * MiB - MiB)
                length = rng.choice((1, 4 * KiB, 30_000, 200_000, MiB))
                data = rng.randbytes(64) * (length // 64 + 1)
                await one.write(number * 4 * MiB + offset, data[:length])
                model[offset : offset + length] = data[:length]

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(guest(number))
        for _ in range(5):
            with scene.temp.frozen():
                assert await soon(read_export(daemon, "vda@one")) == OLD
        stop.set()
    assert await read_export(daemon, "vda@one") == OLD
    assert await read_export(daemon, "vda") == b"".join(models)


async def test_a_stop_is_bounded(scene: Scene) -> None:
    """It ends by force; the thread in the kernel goes when the kernel lets it."""
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one")
    async with client(daemon, "vda") as guest, stuck(scene, guest, [(8 * MiB, 4096)]) as waiting:
        daemon.process.terminate()
        await eventually(lambda: "stopped by force" in daemon.errors(), 12)
        await eventually(lambda: not daemon.control.exists())
        scene.temp.thaw()
        assert await asyncio.to_thread(daemon.process.wait, 10) == 1
        with pytest.raises((OSError, EOFError)):
            await soon(waiting[0])


async def test_a_deletion_that_waits_for_a_stuck_copy_does_not_stop_the_guest(
    scene: Scene,
) -> None:
    """It ends, one way or the other; until then the guest goes on, but for moments."""
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one")
    async with client(daemon, "vda") as guest, client(daemon, "vda") as same:
        await same.write(0, b"\xaa" * 4096)
        async with stuck(scene, guest, [(8 * MiB, 4096)]) as waiting:
            delete = ("snapshot", "delete", "--force", "vda@one")
            running = asyncio.create_task(cli(daemon, *delete))
            while not running.done():
                await soon(same.read(8 * MiB, 4096), 3)
                await soon(same.write(0, b"\xbb" * 4096), 3)
            assert running.result().err.count("\n") <= 1
            scene.temp.thaw()
            assert (await soon(waiting[0])).error in (0, c.NBD_EIO)
        rows = await listed(daemon)
        if "vda@one" in rows:  # it could not be deleted: then it is good
            assert rows["vda@one"]["state"] == "ok"
            assert await read_export(daemon, "vda@one") == OLD


async def test_creating_a_snapshot_where_files_hang_is_refused_and_leaves_nothing(
    scene: Scene,
) -> None:
    """The files of a snapshot are made on a frozen file system: an error, in bounded time."""
    daemon = scene.daemon
    async with client(daemon, "vda") as guest:
        with scene.temp.frozen():
            done = await soon(cli(daemon, "snapshot", "create", "vda", "--name", "one"), 30)
            assert done.code == 1
            assert "no answer within" in done.err
            await soon(guest.write(0, b"\xcc" * 4096))
            scene.temp.thaw()
        await eventually(lambda: not list(daemon.state.glob("vda/snapshots/one")))
        assert await listed(daemon) == {}
        await soon(snapshot(daemon, "vda", name="one"))
        assert (await read_export(daemon, "vda@one"))[:4096] == b"\xcc" * 4096
