"""Backups while client, backup and daemon are killed, and guests write to a raw and a qcow2 disk.

Every write of a guest is one step from one state of its disk to the next. A point that is restored
must be one of these states, no older than the point before it, and, if its backup was not
disturbed, one of the moment when it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.backup.folder import DiskFolder
from nbdfleece.cli.client import CommandFailed, NoDaemon
from tests.support.backups import content
from tests.support.daemon_process import Daemon, environment, nbdfleece
from tests.support.live import KiB, MiB, ask, client, program_run, read_whole, run, serving
from tests.support.nbd_client import NbdClient

SIZE = 4 * MiB
SLOT = 16 * KiB
SLOTS = SIZE // SLOT
DISKS = ("vda", "vdb")
GOOD = 10  # increments that nobody disturbs


class Guest:
    """A disk with its history: which states it has been in, by number."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.rng = rng
        self.state = bytearray(SIZE)
        self.number = 0
        self.seen: defaultdict[bytes, list[int]] = defaultdict(list)
        self.files: dict[str, tuple[int, bytes]] = {}  # by point: number of its state, and content
        self._digests = [b""] * SLOTS

    def arrived(self, data: bytes, offset: int = 0) -> None:
        """Count one more state: `data` is there now."""
        self.state[offset : offset + len(data)] = data
        for slot in range(offset // SLOT, -(-(offset + len(data)) // SLOT)):
            piece = self.state[slot * SLOT : (slot + 1) * SLOT]
            self._digests[slot] = hashlib.sha256(piece).digest()
        self.number += 1
        self.seen[b"".join(self._digests)].append(self.number)

    def numbers_of(self, data: bytes) -> list[int]:
        """The numbers of the states that are `data`."""
        return self.seen.get(
            b"".join(hashlib.sha256(data[at : at + SLOT]).digest() for at in range(0, SIZE, SLOT)),
            [],
        )

    async def write(self, one: NbdClient) -> None:
        """Write until the connection ends; one write at a time, so that they have an order."""
        while True:
            slot = self.rng.randrange(SLOTS)
            length = self.rng.choice((1, 2, 8)) * SLOT
            offset = min(slot * SLOT, SIZE - length)
            data = bytes(length)
            if self.rng.random() < 0.8:
                data = self.rng.randbytes(64) * (length // 64)
            try:
                if any(data):
                    await one.write(offset, data)
                else:
                    await one.zero(offset, length)
            except (OSError, EOFError):
                return
            self.arrived(data, offset)
            await asyncio.sleep(0.001)


class World:
    """The daemon, its guests, and their backups."""

    def __init__(self, folder: Path, rng: random.Random, qemu_img: str) -> None:
        self.folder = folder
        self.to = folder / "backup"
        self.rng = rng
        self.guests = [Guest(name, rng) for name in DISKS]
        (folder / "vda.raw").write_bytes(bytes(SIZE))
        run(qemu_img, "create", "-q", "-f", "qcow2", folder / "vdb.qcow2", str(SIZE))
        self.disks = [f"vda={folder}/vda.raw", f"vdb={folder}/vdb.qcow2,format=qcow2"]
        self.kinds: list[str] = []

    async def run(self) -> None:
        """Start daemons, one after the other, until there are enough good increments."""
        while self.kinds.count("inc") < GOOD * len(DISKS):
            with serving(self.folder, *self.disks, disks=len(DISKS)) as daemon:
                async with contextlib.AsyncExitStack() as stack:
                    ends = []
                    for guest in self.guests:
                        end = await stack.enter_async_context(client(daemon, guest.name))
                        guest.arrived(await read_whole(end))  # what a killed daemon has left
                        ends.append(end)
                    async with asyncio.TaskGroup() as tasks:
                        for guest, end in zip(self.guests, ends, strict=True):
                            tasks.create_task(guest.write(end))
                        await self._until_killed(daemon)

    async def _until_killed(self, daemon: Daemon) -> None:
        for _ in range(self.rng.randrange(2, 5)):
            await self.good(daemon)
            if self.rng.random() < 0.7:
                await self.rng.choice((self.cancelled, self.client_killed))(daemon)
        if self.kinds.count("inc") < GOOD * len(DISKS):
            with contextlib.suppress(NoDaemon):
                await self.start(daemon, slow=True)
        else:
            await self.good(daemon)  # which removes what those before it have left unfinished
        await asyncio.sleep(self.rng.random() * 0.3)
        daemon.process.kill()
        await asyncio.to_thread(daemon.process.wait)

    async def start(self, daemon: Daemon, *, slow: bool = False) -> dict:
        more = {"speed": self.rng.randrange(1, 20) * MiB} if slow else {}
        arguments = {"disks": list(DISKS), "dir": str(self.to), **more}
        while True:
            try:
                return await ask(daemon, "fleece-backup", arguments)
            except CommandFailed as error:
                # What a killed command has asked for may only just be beginning.
                if error.reason != "in-use":
                    raise
                await self.idle(daemon)

    async def ended(self, daemon: Daemon, run: dict) -> dict:
        while True:
            runs = await ask(daemon, "query-fleece-backups")
            found = next(one for one in runs if one["job-id"] == run["job-id"])
            if found["state"] != "running":
                return found
            await asyncio.sleep(0.02)

    async def good(self, daemon: Daemon) -> None:
        """A backup that nobody disturbs is of the moment when it was made."""
        await self.idle(daemon)
        before = [guest.number for guest in self.guests]
        run = await self.start(daemon)
        after = [guest.number + 1 for guest in self.guests]
        done = await self.ended(daemon, run)
        assert done["state"] == "done", done
        self.kinds += [part["kind"] for part in done["disks"]]
        print([part["reason"] for part in done["disks"]])  # shown when the test fails
        for guest, low, high in zip(self.guests, before, after, strict=True):
            newest = await asyncio.to_thread(self.look, guest)
            assert low <= newest <= high

    async def cancelled(self, daemon: Daemon) -> None:
        """The job is cancelled, somewhere."""
        await self.idle(daemon)
        run = await self.start(daemon, slow=True)
        await asyncio.sleep(self.rng.random() * 0.2)
        with contextlib.suppress(Exception):  # it may have ended
            await ask(daemon, "job-cancel", {"id": run["job-id"]})
        await self.ended(daemon, run)

    async def client_killed(self, daemon: Daemon) -> None:
        """The command is killed, somewhere; or interrupted."""
        number = self.rng.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        process = started(daemon, "backup", "create", *DISKS, "--to", self.to, "--rate", "10M")
        await asyncio.sleep(0.4 + self.rng.random())
        process.send_signal(number)
        await asyncio.to_thread(process.wait)

    async def idle(self, daemon: Daemon) -> None:
        """Wait for what a killed command has started."""
        for one in await ask(daemon, "query-fleece-backups"):
            await self.ended(daemon, one)

    def look(self, guest: Guest) -> int:
        """Check every point that is new; return the number of the newest's state."""
        last = 0
        with DiskFolder(self.to / guest.name, for_change=False) as folder:
            for point in folder.manifest.points:
                if point.name not in guest.files:
                    found = content(folder, point)
                    numbers = [number for number in guest.numbers_of(found) if number >= last]
                    assert numbers, f"{guest.name}@{point.name} is no state of the disk"
                    guest.files[point.name] = numbers[-1], found
                last = guest.files[point.name][0]
        return last


def started(daemon: Daemon, *command: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "nbdfleece", *map(str, command)],
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.deadline(240)
@pytest.mark.interop("qemu-img")
async def test_every_point_is_a_state_of_its_disk_whoever_is_killed(
    short_tmp: Path, rng: random.Random, program: Callable[[str], str]
) -> None:
    world = World(short_tmp, rng, program("qemu-img"))
    await world.run()

    assert world.kinds[: len(DISKS)] == ["full"] * len(DISKS)
    # After a kill -9 the bitmaps are complete, so nothing was copied whole again.
    assert set(world.kinds[len(DISKS) :]) == {"inc"}
    await check(world, program)
    done = await asyncio.to_thread(nbdfleece, "backup", "prune", world.to, "--keep-last", "4")
    assert done.code == 0, done.err
    await check(world, program)
    done = await asyncio.to_thread(nbdfleece, "backup", "verify", world.to, "--data", "--json")
    assert done.code == 0, done.err
    assert len(done.json) == 4 * len(DISKS)


async def check(world: World, program: Callable[[str], str]) -> None:
    """Compare every point, by ourselves and by qemu-img, with the disk at that instant."""
    for guest in world.guests:
        await asyncio.to_thread(world.look, guest)
        with DiskFolder(world.to / guest.name, for_change=False) as folder:
            assert folder.strangers() == []
            for point in folder.manifest.points:
                expected = guest.files[point.name][1]
                assert content(folder, point) == expected
                raw = world.folder / "expected.raw"
                raw.write_bytes(expected)
                compare = (program("qemu-img"), "compare", "-f", "qcow2", "-F", "raw")
                await program_run(*compare, folder.file(point), raw)
        assert not [name for name in os.listdir(world.to / guest.name) if "partial" in name]
