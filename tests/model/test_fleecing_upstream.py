"""Points in time where the active disk, the temporary image, or both are on another NBD server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from tests.model.test_fleecing import assert_live, make_disk, run_history
from tests.support import nbd_peers
from tests.support.fleecing import file_driver, read_all, start_fleecing, temp_driver
from tests.support.nbd_peers import OPEN_S, Peer, upstream

Programs = Callable[[str], str]

SIZE = (1 << 20) + 512  # qemu-nbd would round up any other
SERVERS = ("qemu-nbd", "nbdkit", "nbd-server")


class Servers:
    """Starts servers, each over an image of its own."""

    def __init__(self, program: Programs, folder: Path, sockets: Path) -> None:
        self.program = program
        self.folder = folder
        self.sockets = sockets
        self.peers: list[Peer] = []

    def start(self, name: str, content: bytes, *, reconnect_s: float = 0.0) -> Driver:
        """Return the driver for a new export with this content."""
        number = len(self.peers)
        image, path = self.folder / f"image{number}", self.sockets / str(number)
        image.write_bytes(content)
        program = self.program(name)
        if name == "qemu-nbd":
            peer = nbd_peers.qemu_nbd(program, image, path, "--export-name=x")
        elif name == "nbdkit":
            peer = nbd_peers.nbdkit(program, image, path)
        else:
            peer = nbd_peers.nbd_server(program, image, path)
        self.peers.append(peer)
        return upstream(path, reconnect_s=reconnect_s)


@pytest.fixture
def servers(program: Programs, tmp_path: Path, short_tmp: Path) -> Iterator[Servers]:
    made = Servers(program, tmp_path, short_tmp)
    yield made
    for peer in made.peers:
        peer.stop()


@pytest.mark.parametrize("where", ["active", "temp", "both"])
@pytest.mark.parametrize("server", SERVERS)
async def test_readers_see_the_point_in_time(
    servers: Servers, tmp_path: Path, rng: random.Random, server: str, where: str, long_run: bool
) -> None:
    for turn in range(5 if long_run else 1):
        size = SIZE - SIZE % 1024 if server == "nbd-server" else SIZE
        disk = make_disk(rng, size)
        if where == "temp":
            (tmp_path / f"disk{turn}").write_bytes(disk)
            active: Driver = file_driver(tmp_path / f"disk{turn}")
        else:
            active = servers.start(server, disk)
        if where == "active":
            temp: Driver = temp_driver(tmp_path / f"temp{turn}", size)
        else:
            temp = servers.start(server, rng.randbytes(size))  # rubbish of others
        fleecing = await start_fleecing(active, temp, CopyBeforeWrite())

        errors, model, crew = await run_history(fleecing, disk, rng, steps=60)

        assert errors == []
        assert sum(guest.failures for guest in crew) == 0
        assert await read_all(fleecing.access) == disk
        await assert_live(fleecing, model, crew)
        await fleecing.close()


async def test_the_point_in_time_survives_crashes_of_both_servers(
    servers: Servers, rng: random.Random
) -> None:
    disk = make_disk(rng, SIZE)
    fleecing = await start_fleecing(
        servers.start("qemu-nbd", disk, reconnect_s=OPEN_S),
        servers.start("qemu-nbd", rng.randbytes(SIZE), reconnect_s=OPEN_S),
        CopyBeforeWrite(),
    )
    over = asyncio.Event()

    async def crash() -> None:
        while not over.is_set():
            peer = rng.choice(servers.peers)
            peer.kill()
            peer.start()
            await asyncio.sleep(0.3)  # a life between two crashes, not a wait

    async with asyncio.TaskGroup() as group:
        group.create_task(crash())
        errors, model, crew = await run_history(fleecing, disk, rng, steps=150)
        over.set()

    assert errors == []
    assert sum(guest.failures for guest in crew) == 0
    assert await read_all(fleecing.access) == disk
    await assert_live(fleecing, model, crew)
    await fleecing.close()
