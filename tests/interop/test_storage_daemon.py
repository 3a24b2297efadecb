"""The reference command line of qemu-storage-daemon with the name swapped, and what it serves.

The snapshot is compared as a whole with the disk as it was, again and again, by several readers,
while a guest writes, zeroes and trims (T-F6, T-F8); here that is right where QEMU 7.2 is wrong.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support.live import KiB, MiB, blocks, program_run, read_whole, run, scribble, soon
from tests.support.nbd_client import BASE, NbdClient, connected
from tests.support.storage_daemon import StorageDaemon

Program = Callable[[str], str]

SIZE = 8 * MiB + 1536
OLD = blocks(SIZE, 4096)
DEPTH = "qemu:allocation-depth"


@pytest.fixture
def fleecing(short_tmp: Path) -> Iterator[StorageDaemon]:
    """The command line of QEMU's documents, word for word."""
    (short_tmp / "ACTIVE").write_bytes(OLD)
    with (short_tmp / "TEMP").open("xb") as temp:
        temp.truncate(SIZE)
    options = """
      --blockdev driver=file,node-name=active,filename=ACTIVE,discard=unmap
      --blockdev driver=file,node-name=temp,filename=TEMP,discard=unmap
      --blockdev driver=copy-before-write,node-name=cbw,file=active,target=temp
      --blockdev driver=snapshot-access,node-name=access,file=cbw
      --nbd-server addr.type=unix,addr.path=nbd.sock,max-connections=0
      --export type=nbd,id=live,node-name=cbw,name=live,writable=on
      --export type=nbd,id=snap,node-name=access,name=snap
    """
    with StorageDaemon(short_tmp, *options.split()) as running:
        yield running


def client(daemon: StorageDaemon, export: str, *, structured: bool = True):
    return connected(str(daemon.folder / "nbd.sock"), export, structured=structured)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_whole_views_stay_what_they_were_while_a_guest_writes(
    fleecing: StorageDaemon, rng: random.Random, structured: bool
) -> None:
    """T-F6, T-F8."""
    stop = asyncio.Event()
    wrote_enough = asyncio.Event()

    async def guest() -> None:
        writes = 0
        async with client(fleecing, "live") as one:
            while not stop.is_set():
                await scribble(one, rng)
                writes += 1
                if writes == 300:
                    wrote_enough.set()

    async def reader(count: int) -> None:
        async with client(fleecing, "snap", structured=structured) as one:
            for _ in range(count):
                assert await read_whole(one) == OLD

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(guest())
        async with asyncio.TaskGroup() as readers:
            for _ in range(3):
                readers.create_task(reader(4))
        await wrote_enough.wait()
        stop.set()
    async with client(fleecing, "snap", structured=structured) as one:
        assert await read_whole(one) == OLD
    async with client(fleecing, "live") as one:
        assert await read_whole(one) != OLD
    assert fleecing.stop() == 0


async def test_real_clients_copy_the_snapshot(
    fleecing: StorageDaemon, program: Program, rng: random.Random
) -> None:
    """nbdcopy, with several connections, and qemu-img, each while a guest writes."""
    stop = asyncio.Event()

    async def guest() -> None:
        async with client(fleecing, "live") as one:
            while not stop.is_set():
                await scribble(one, rng)

    copies = [fleecing.folder / "one.raw", fleecing.folder / "two.raw"]
    uri = fleecing.uri("snap")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(guest())
        await program_run(program("nbdcopy"), "--connections=4", uri, copies[0])
        convert = (program("qemu-img"), "convert", "-f", "raw", "-O", "raw")
        await program_run(*convert, uri, copies[1])
        stop.set()
    # qemu-img sees sectors: the last one may be filled up.
    assert [copy.read_bytes()[:SIZE] == OLD for copy in copies] == [True, True]


async def test_trimming_a_part_of_a_cluster_of_the_snapshot(fleecing: StorageDaemon) -> None:
    """T-N12: 7.2 aborts."""
    node = {"driver": "snapshot-access", "node-name": "w", "file": "cbw", "discard": "unmap"}
    fleecing.ask("blockdev-add", node)
    export = {"type": "nbd", "id": "w", "node-name": "w", "writable": True}
    fleecing.ask("block-export-add", export)
    async with client(fleecing, "w") as one:
        await one.trim(100, 200)
        await one.trim(64 * KiB + 512, 512)
        await one.trim(SIZE - 700, 700)
        assert await one.read(0, 512) == OLD[:512]
        assert await one.read(64 * KiB, 4 * KiB) == OLD[64 * KiB : 68 * KiB]
        await one.trim(0, 64 * KiB)
        assert await one.error_of(c.NBD_CMD_READ, 0, 512) != 0
    assert fleecing.ask("query-block-exports")[0]["id"] == "w"


async def test_two_contexts_one_of_which_fails_give_one_error(short_tmp: Path) -> None:
    """T-N11: 7.2 goes on behind the error, and clients give up on it."""
    (short_tmp / "disk").write_bytes(OLD)
    rule = "inject-error.0.event=block_status,inject-error.0.iotype=block-status"
    options = (
        *("--blockdev", "driver=file,node-name=disk,filename=disk"),
        *("--blockdev", f"blkdebug,node-name=bad,image=disk,{rule},inject-error.0.once=on"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=bad,node-name=bad,allocation-depth=on"),
    )
    with StorageDaemon(short_tmp, *options) as daemon:
        one = await NbdClient.open(str(short_tmp / "nbd.sock"))
        try:
            await one.connect("bad", contexts=(BASE, DEPTH))
            assert set(one.contexts) == {BASE, DEPTH}
            assert await one.error_of(c.NBD_CMD_BLOCK_STATUS, 0, MiB) == c.NBD_EIO
            depth = await one.status(0, MiB, context=DEPTH)
            assert depth == [(MiB, 1)]
        finally:
            await one.close()
        assert daemon.stop() == 0


def test_a_job_that_is_still_there_does_not_hold_up_the_end(short_tmp: Path) -> None:
    """T-N9."""
    (short_tmp / "a").write_bytes(OLD)
    (short_tmp / "b").write_bytes(bytes(SIZE))
    options = (
        *("--blockdev", "file,node-name=a,filename=a"),
        *("--blockdev", "file,node-name=b,filename=b"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=a,node-name=a,writable=on"),
    )
    with StorageDaemon(short_tmp, *options) as daemon:
        job = {"job-id": "j", "device": "a", "target": "b", "sync": "none"}
        daemon.ask("blockdev-backup", job)
        assert [row["id"] for row in daemon.ask("query-jobs")] == ["j"]
        assert daemon.stop() == 0
    assert (short_tmp / "a").read_bytes() == OLD


async def test_a_stopped_server_starts_again_elsewhere(fleecing: StorageDaemon) -> None:
    async with client(fleecing, "snap") as one:
        fleecing.ask("nbd-server-stop")
        assert {fleecing.event("BLOCK_EXPORT_DELETED")["id"] for _ in range(2)} == {"live", "snap"}
        await soon(one.wait_closed())
    unix = {"type": "unix", "data": {"path": "other.sock"}}
    fleecing.ask("nbd-server-start", {"addr": unix})
    fleecing.ask("block-export-add", {"type": "nbd", "id": "snap", "node-name": "access"})
    async with connected(str(fleecing.folder / "other.sock"), "access") as one:
        assert await read_whole(one) == OLD


def test_the_size_of_an_export_is_that_of_its_node(
    fleecing: StorageDaemon, program: Program
) -> None:
    for name in ("live", "snap"):
        assert run(program("nbdinfo"), "--size", fleecing.uri(name)).stdout == f"{SIZE}\n"
