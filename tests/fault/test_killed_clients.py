"""kill -9 of clients in the middle of anything: the daemon is as it was before."""

from __future__ import annotations

import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest

from nbdfleece.protocol.nbd import client as client_talk
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.talk import Conversation
from tests.support.daemon_process import Daemon
from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    clients,
    descriptors,
    eventually,
    listed,
    read_export,
    serving,
    snapshot,
    started,
)
from tests.support.nbd_client import NbdClient

Program = Callable[[str], str]

SIZE = 16 * MiB
OLD = blocks(SIZE, 64 * KiB)
SOCKETS: WeakKeyDictionary[Daemon, int] = WeakKeyDictionary()  # that a daemon without clients has


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(OLD)
    with serving(short_tmp, disk) as running:
        SOCKETS[running] = descriptors(running).count("socket")  # nobody has connected yet
        yield running


async def nobody(daemon: Daemon) -> bool:
    return not await clients(daemon)


@asynccontextmanager
async def nothing_leaks(daemon: Daemon) -> AsyncIterator[None]:
    """Look at descriptors, sessions and readers before and after."""
    await snapshot(daemon, "vda", name="one")
    for export in ("vda", "vda@one"):  # whatever is made at the first use
        await read_export(daemon, export)
    async with client(daemon, "vda") as guest:
        await guest.write(0, OLD[:MiB])
        await guest.flush()
    await eventually(lambda: nobody(daemon))
    before = files(daemon)
    yield
    await eventually(lambda: nobody(daemon))
    assert files(daemon) == before
    await eventually(lambda: descriptors(daemon).count("socket") == SOCKETS[daemon])
    rows = await listed(daemon)
    assert (rows["vda@one"]["state"], rows["vda@one"]["readers"]) == ("ok", 0)
    assert await read_export(daemon, "vda@one") == OLD
    async with client(daemon, "vda") as guest:
        await guest.write(0, b"\1" * MiB)
        await guest.flush()
        assert await guest.read(0, MiB) == b"\1" * MiB
    assert (await cli(daemon, "snapshot", "delete", "vda@one")).code == 0
    assert (await cli(daemon, "health")).code == 0


def files(daemon: Daemon) -> list[str]:
    """Return what is open and no socket: monitors come and go."""
    return [name for name in descriptors(daemon) if name != "socket"]


async def kill_when(daemon: Daemon, process: subprocess.Popen, counter: str, amount: int) -> None:
    """Kill the program as soon as one of its connections has done that much."""

    async def has_done() -> bool:
        assert process.poll() is None, "it has ended too soon to be killed"
        return any(row.get(counter, 0) >= amount for row in await clients(daemon))

    await eventually(has_done)
    process.kill()


@pytest.mark.interop("nbdcopy")
@pytest.mark.parametrize("way", [(), ("--connections=1", "--request-size=2097152")], ids=str)
async def test_a_reader_that_is_killed_while_it_copies(
    daemon: Daemon, program: Program, way: tuple[str, ...]
) -> None:
    """Its output is a pipe that nobody reads, so it is always in the middle."""
    async with nothing_leaks(daemon):
        for _ in range(3):
            command = (program("nbdcopy"), *way, daemon.uri("vda@one"), "-")
            with started(*command, stdout=subprocess.PIPE) as process:
                await kill_when(daemon, process, "bytes-read", 64 * KiB)


@pytest.mark.interop("nbdcopy")
async def test_a_copy_into_the_live_disk_that_is_killed(
    daemon: Daemon, program: Program, rng: random.Random
) -> None:
    """Its input is an endless pipe."""
    async with nothing_leaks(daemon):
        for _ in range(3):
            endless = ("tr", "\\0", "\\7")
            with (
                open("/dev/zero", "rb") as zeroes,  # noqa: ASYNC230 - never blocks
                started(*endless, stdin=zeroes, stdout=subprocess.PIPE) as pipe,
                started(program("nbdcopy"), "-", daemon.uri("vda"), stdin=pipe.stdout) as process,
            ):
                await kill_when(daemon, process, "bytes-written", rng.randrange(SIZE // 2))


@pytest.mark.interop("fio")
@pytest.mark.parametrize("how", ["randwrite", "randread", "randtrimwrite"])
async def test_a_fio_that_is_killed(
    daemon: Daemon, program: Program, short_tmp: Path, rng: random.Random, how: str
) -> None:
    export = "vda@one" if how == "randread" else "vda"
    async with nothing_leaks(daemon):
        for block in ("4k", "1m"):
            job = ("--name=j", "--ioengine=nbd", f"--uri={daemon.uri(export)}", f"--rw={how}")
            load = (f"--size={SIZE}", f"--bs={block}", "--iodepth=16", "--time_based")
            options = ("--runtime=60", "--thread=1", f"--aux-path={short_tmp}")
            with started(program("fio"), *job, *load, *options) as process:
                await kill_when(daemon, process, "requests", rng.randrange(20, 500))


@pytest.mark.interop("qemu-io")
async def test_a_qemu_io_that_is_killed(daemon: Daemon, program: Program) -> None:
    commands = []
    for number in range(4000):
        kind = ("aio_write -P 5", "aio_write -z", "aio_read", "discard")[number % 4]
        commands += ["-c", f"{kind} {number * 37 % 200 * 64}k {number % 7 + 1}M"]
    async with nothing_leaks(daemon):
        command = (program("qemu-io"), "-f", "raw", *commands, daemon.uri("vda"))
        with started(*command) as process:
            await kill_when(daemon, process, "requests", 30)


async def test_clients_that_vanish_at_every_point_of_the_handshake(
    daemon: Daemon, rng: random.Random
) -> None:
    """What a whole client says, cut off after every so many bytes."""
    read = wire.request(c.NBD_CMD_READ, flags=0, cookie=1, offset=0, length=MiB)
    write = wire.request(c.NBD_CMD_WRITE, flags=0, cookie=2, offset=MiB, length=MiB)
    async with nothing_leaks(daemon):
        for left in [*range(0, 200, 7), *(rng.randrange(200, MiB) for _ in range(10))]:
            one = await NbdClient.open(str(daemon.socket))
            await say(one, left, read + write + b"\xee" * MiB)
            await one.close()


async def say(one: NbdClient, left: int, afterwards: bytes) -> None:
    """Send the first `left` bytes of a handshake and of what comes then."""
    conversation = Conversation(client_talk.connect("vda", structured=True, contexts=("a:b",)))
    received = b""
    while not conversation.is_over:
        for part in conversation.feed(received):
            await one.send(part[:left])
            left -= len(part)
            if left <= 0:
                return
        if not conversation.is_over:
            received = await one.receive(1)
    await one.send(afterwards[:left])


@pytest.mark.interop("nbdcopy", "fio")
async def test_all_of_them_at_once(daemon: Daemon, program: Program, short_tmp: Path) -> None:
    async with nothing_leaks(daemon):
        copy = (program("nbdcopy"), daemon.uri("vda@one"), "-")
        fio = (program("fio"), "--name=j", "--ioengine=nbd", f"--uri={daemon.uri('vda')}")
        load = ("--rw=randwrite", f"--size={SIZE}", "--bs=64k", "--iodepth=16", "--time_based")
        options = ("--runtime=60", "--thread=1", f"--aux-path={short_tmp}")
        with (
            started(*copy, stdout=subprocess.PIPE) as first,
            started(*copy, stdout=subprocess.PIPE) as second,
            started(*fio, *load, *options) as third,
        ):
            processes = (first, second, third)

            async def all_are_busy() -> bool:
                assert all(process.poll() is None for process in processes)
                rows = [row for row in await clients(daemon) if row.get("requests", 0) > 1]
                return len(rows) >= 3

            await eventually(all_are_busy)
            for process in processes:
                process.kill()
