"""`snapshot delete --force` under busy readers: they hear of it, and the guest does not."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    clients,
    eventually,
    listed,
    read_export,
    serving,
    snapshot,
    soon,
    started,
)
from tests.support.nbd_client import NbdClient, RequestFailed

Program = Callable[[str], str]

SIZE = 8 * MiB
OLD = blocks(SIZE, 64 * KiB)


@pytest.mark.interop("nbdcopy")
async def test_readers_get_right_bytes_or_an_end(
    short_tmp: Path, program: Program, rng: random.Random
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(OLD)
    stop = asyncio.Event()
    counts: dict[str, int] = {"reads": 0, "writes": 0}

    async def read(*, structured: bool) -> None:
        async with client(daemon, "vda@one", structured=structured) as one:
            try:
                while True:
                    offset = rng.randrange(SIZE - MiB)
                    length = rng.randrange(MiB) + 1
                    got = await one.read(offset, length)
                    assert got == OLD[offset : offset + length]
                    counts["reads"] += 1
            except (OSError, EOFError, RequestFailed):
                return

    async def write(guest: NbdClient, lane: int) -> None:
        for number in itertools.count():
            data = bytes([number % 256]) * 8192
            await guest.write(lane * 200_000 + number * 8192 % 180_000, data)
            counts["writes"] += 1
            if stop.is_set():
                return

    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="keep")
        await snapshot(daemon, "vda", name="one")
        copy = (program("nbdcopy"), daemon.uri("vda@one"), "-")
        async with client(daemon, "vda") as guest, asyncio.TaskGroup() as guests:
            for lane in range(16):
                guests.create_task(write(guest, lane))
            with started(*copy, stdout=subprocess.PIPE) as process:
                async with asyncio.TaskGroup() as readers:
                    for number in range(6):
                        readers.create_task(read(structured=number % 2 == 0))
                    await eventually(lambda: counts["reads"] > 50)
                    await eventually(lambda: are_connected(daemon, 8))
                    done = await soon(cli(daemon, "snapshot", "delete", "vda@one"))
                    assert done.code == 4
                    assert "vda@one" in await listed(daemon)
                    done = await soon(cli(daemon, "snapshot", "delete", "--force", "vda@one"))
                    assert (done.code, done.err) == (0, "")
                _, said = await asyncio.to_thread(process.communicate)
                assert process.returncode != 0
                assert said
            seen = counts["writes"]
            await eventually(lambda: counts["writes"] > seen + 100)
            assert list(await listed(daemon)) == ["vda@keep"]
            stop.set()
        assert guest.lost is not None  # by ourselves, at the end
        assert not list(daemon.state.glob("vda/snapshots/one"))
        with pytest.raises(Exception, match="vda@one"):
            await read_export(daemon, "vda@one")
        assert await read_export(daemon, "vda@keep") == OLD


async def are_connected(daemon, count: int) -> bool:
    return len(await clients(daemon)) >= count


async def test_again_and_again_under_the_same_name(short_tmp: Path) -> None:
    """A reader never sees another instant than that of the snapshot that it opened."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(SIZE))
    with serving(short_tmp, disk) as daemon:
        async with client(daemon, "vda") as guest:
            for number in range(1, 9):
                await guest.write(0, bytes([number]) * MiB)
                await snapshot(daemon, "vda", name="one")
                async with client(daemon, "vda@one") as reader:
                    waiting = [await reader.submit(0, 0, MiB) for _ in range(20)]
                    await guest.write(0, b"\xff" * MiB)
                    done = await soon(cli(daemon, "snapshot", "delete", "--force", "vda@one"))
                    assert done.code == 0
                    for each in waiting:
                        try:
                            reply = await soon(each)
                        except (OSError, EOFError):
                            continue
                        assert reply.error or set(reply.data) == {number}
