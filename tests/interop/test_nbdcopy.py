"""nbdcopy: out of live exports and snapshots, and into live exports."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import (
    KiB,
    MiB,
    blocks,
    client,
    listed,
    program_run,
    run,
    scribble,
    serving,
    snapshot,
)

pytestmark = pytest.mark.interop("nbdcopy")

Program = Callable[[str], str]
WAYS = {
    "default": (),
    "one connection, 2 MiB": ("--connections=1", "--requests=16", "--request-size=2097152"),
    "synchronous": ("--synchronous",),
    "many requests": ("--requests=128",),
    "allocated": ("--allocated",),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
async def test_a_snapshot_is_copied_while_the_guest_writes(
    short_tmp: Path, program: Program, rng: random.Random, way: tuple[str, ...]
) -> None:
    size = 24 * MiB + 1536
    disk = short_tmp / "vda.raw"
    old = bytearray(blocks(size, 16 * KiB))
    old[5 * MiB : 9 * MiB] = bytes(4 * MiB)
    disk.write_bytes(old)
    copies = [short_tmp / f"copy{number}" for number in range(2)]
    stop = asyncio.Event()
    written = 0

    with serving(short_tmp, disk) as daemon:
        async with client(daemon, "vda") as one, client(daemon, "vda") as two:
            await snapshot(daemon, "vda", name="one")

            async def write(guest) -> None:
                nonlocal written
                while not stop.is_set():
                    await scribble(guest, rng)
                    written += 1

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write(one))
                tasks.create_task(write(two))
                for copy in copies:
                    await program_run(program("nbdcopy"), *way, daemon.uri("vda@one"), copy)
                stop.set()
        assert (await listed(daemon))["vda@one"]["state"] == "ok"
    assert written
    for copy in copies:
        assert copy.read_bytes() == old


async def test_to_a_pipe(short_tmp: Path, program: Program) -> None:
    size = 6 * MiB + 1
    disk = short_tmp / "vda.raw"
    old = blocks(2 * MiB, 4 * KiB) + bytes(2 * MiB) + blocks(2 * MiB + 1, 4 * KiB)
    disk.write_bytes(old)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        async with client(daemon, "vda") as guest:
            await guest.write(MiB - 5, b"\xee" * 2 * MiB)
        pipe = await asyncio.create_subprocess_exec(
            *(program("nbdcopy"), daemon.uri("vda@one"), "-"), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await pipe.communicate()
        assert pipe.returncode == 0
        assert len(out) == size
        assert out == old


@pytest.mark.parametrize(
    ("size", "way"),
    [
        (12 * MiB, ()),
        (12 * MiB + 1, ()),
        (12 * MiB + 1536, ("--connections=1", "--flush")),
        (12 * MiB + 511, ("--synchronous",)),
    ],
    ids=str,
)
def test_into_a_live_export(
    short_tmp: Path, program: Program, size: int, way: tuple[str, ...]
) -> None:
    """Data, long zeroes, and holes: nbdcopy sends WRITE, and WRITE_ZEROES of many megabytes."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\xff" * size)
    source = short_tmp / "source.raw"
    content = bytearray(size)
    content[MiB : 2 * MiB] = blocks(MiB, 4 * KiB)
    content[11 * MiB :] = blocks(size - 11 * MiB, 1000)
    with source.open("wb") as file:  # sparse between them
        for start, end in ((MiB, 3 * MiB), (11 * MiB, size)):
            file.seek(start)
            file.write(content[start:end])
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        run(program("nbdcopy"), *way, source, daemon.uri("vda"))
        back = short_tmp / "back"
        run(program("nbdcopy"), daemon.uri("vda"), back)
        assert back.read_bytes() == content
        before = short_tmp / "before"
        run(program("nbdcopy"), daemon.uri("vda@one"), before)
        assert before.read_bytes() == b"\xff" * size
        assert daemon.stop() == 0
    assert disk.read_bytes() == content


def test_from_a_snapshot_into_its_own_live_disk(short_tmp: Path, program: Program) -> None:
    """Rolling back by copying: each write of the copy saves what the snapshot is still to read."""
    disk = short_tmp / "vda.raw"
    old = blocks(8 * MiB, 64 * KiB)
    disk.write_bytes(old)
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        other = short_tmp / "other.raw"
        other.write_bytes(blocks(8 * MiB, 4 * KiB, first=77))
        run(program("nbdcopy"), other, daemon.uri("vda"))
        run(program("nbdcopy"), daemon.uri("vda@one"), daemon.uri("vda"))
        assert daemon.stop() == 0
    assert disk.read_bytes() == old


async def test_two_copies_of_two_snapshots_at_a_time(short_tmp: Path, program: Program) -> None:
    disk = short_tmp / "vda.raw"
    old = blocks(16 * MiB, 64 * KiB)
    disk.write_bytes(old)
    with serving(short_tmp, disk) as daemon:
        async with client(daemon, "vda") as guest:
            await snapshot(daemon, "vda", name="one")
            await guest.write(3 * MiB, b"\xaa" * 5 * MiB)
            await snapshot(daemon, "vda", name="two")
            await guest.write(MiB, b"\xbb" * 9 * MiB)
        copies = [short_tmp / "one", short_tmp / "two"]
        async with asyncio.TaskGroup() as tasks:
            for copy in copies:
                uri = daemon.uri(f"vda@{copy.name}")
                tasks.create_task(program_run(program("nbdcopy"), uri, copy))
    assert copies[0].read_bytes() == old
    assert copies[1].read_bytes() == old[: 3 * MiB] + b"\xaa" * 5 * MiB + old[8 * MiB :]
