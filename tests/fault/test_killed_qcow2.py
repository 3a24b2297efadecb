"""kill -9 of daemons that serve a qcow2 image, spread over the histories of their guests.

What is in memory alone is gone then: entries, refcounts. Afterwards qemu-img finds no corruption in
the image, and each slot of the disk holds what was flushed of it, or something sent since.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support.daemon_process import Daemon
from tests.support.live import KiB, MiB, eventually, run, serving, snapshot
from tests.support.nbd_client import NbdClient, connected
from tests.support.storage_daemon import StorageDaemon

pytestmark = [pytest.mark.interop("qemu-img"), pytest.mark.slow]

Program = Callable[[str], str]
SIZE = 24 * MiB
SLOT = 24 * KiB
LANES = 8
SLOTS = SIZE // SLOT // LANES
SECTOR = 512
KINDS = {
    "plain": "",
    "small": "cluster_size=4k",
    "tiny": "cluster_size=512",
    "v2": "compat=0.10",
    "lazy": "lazy_refcounts=on",
    "subclusters": "extended_l2=on,cluster_size=16k",
}


@dataclass
class Ledger:
    """Per slot: the number of what was sent, answered and flushed last; which were zeroes."""

    sent: dict[int, int] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    flushed: dict[int, int] = field(default_factory=dict)
    zeroes: dict[int, set[int]] = field(default_factory=dict)
    total: int = 0

    def check(self, content: bytes) -> None:
        """Each sector of a slot holds what was flushed, or something sent later."""
        for slot, sent in self.sent.items():
            flushed = self.flushed.get(slot, 0)
            zeroes = {n for n in self.zeroes.get(slot, ()) if flushed <= n <= sent}
            for at in range(slot * SLOT, (slot + 1) * SLOT, SECTOR):
                number = int.from_bytes(content[at : at + 8], "big")
                assert content[at : at + SECTOR] == number.to_bytes(8, "big") * (SECTOR // 8)
                if number == 0:
                    assert zeroes or not flushed, f"slot {slot}: {flushed} is lost"
                else:
                    assert flushed <= number <= sent, f"slot {slot}: {number}, not {flushed}"


async def write(one: NbdClient, ledger: Ledger, lane: int, rng: random.Random, start: int) -> None:
    """Write, zero and flush in slots of our own, until the connection ends."""
    number = start
    with contextlib.suppress(OSError, EOFError):
        while True:
            number += 1
            slot = lane * SLOTS + rng.randrange(SLOTS)
            fua = c.NBD_CMD_FLAG_FUA if number % 16 == 0 else 0
            ledger.sent[slot] = number
            if rng.random() < 0.15:
                ledger.zeroes.setdefault(slot, set()).add(number)
                await one.zero(slot * SLOT, SLOT, flags=fua)
            else:
                data = number.to_bytes(8, "big") * (SLOT // 8)
                await one.write(slot * SLOT, data, flags=fua)
            ledger.answered[slot] = number
            if fua:
                ledger.flushed[slot] = number
            ledger.total += 1
            if number % 20 == 0:
                before = dict(ledger.answered)
                await one.flush()
                for at, done in before.items():
                    ledger.flushed[at] = max(done, ledger.flushed.get(at, 0))


@contextlib.asynccontextmanager
async def guests(
    path: Path, export: str, ledger: Ledger, rng: random.Random
) -> AsyncIterator[None]:
    start = max(ledger.sent.values(), default=0)
    async with contextlib.AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(connected(str(path), export)) for _ in range(2)]
        async with asyncio.TaskGroup() as tasks:
            for lane in range(LANES):
                more = random.Random(rng.random())
                tasks.create_task(write(ends[lane % 2], ledger, lane, more, start))
            yield


def look(program: Program, disk: Path, ledger: Ledger) -> None:
    """Check what a kill has left."""
    tool = program("qemu-img")
    found = run(tool, "check", "-f", "qcow2", disk, code=None)
    if found.returncode not in (0, 3):  # a dirty image is to be repaired by whoever opens it
        assert "lazy" in disk.name, found.stdout + found.stderr
        copy = disk.with_suffix(".copy")
        copy.write_bytes(disk.read_bytes())
        run(tool, "check", "-r", "all", "-f", "qcow2", copy)
        run(tool, "check", "-f", "qcow2", copy)
    flat = disk.with_suffix(".flat")
    run(tool, "convert", "-f", "qcow2", "-O", "raw", disk, flat)
    ledger.check(flat.read_bytes())


def create(program: Program, folder: Path, kind: str) -> Path:
    options = ("-o", KINDS[kind]) if KINDS[kind] else ()
    disk = folder / f"{kind}.qcow2"
    run(program("qemu-img"), "create", "-f", "qcow2", *options, disk, str(SIZE))
    return disk


def settle(ledger: Ledger, disk: Path) -> None:
    """What is there now is what counts: the kill has thrown the rest away, for good."""
    content = disk.with_suffix(".flat").read_bytes()
    for slot in ledger.sent:
        numbers = {
            int.from_bytes(content[at : at + 8], "big")
            for at in range(slot * SLOT, (slot + 1) * SLOT, SECTOR)
        }
        ledger.flushed[slot] = ledger.answered[slot] = min(numbers)


@pytest.mark.deadline(900)
@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_flushed_survives_kills_of_the_daemon(
    short_tmp: Path, program: Program, rng: random.Random, kind: str, *, long_run: bool
) -> None:
    disk = create(program, short_tmp, kind)
    ledger = Ledger()
    for _ in range(60 if long_run else 5):
        with serving(short_tmp, f"{disk},format=qcow2") as daemon:
            if rng.random() < 0.3:
                await snapshot(daemon, kind, name="one")
            await killed(daemon, kind, ledger, rng)
        await asyncio.to_thread(look, program, disk, ledger)
        settle(ledger, disk)
    with serving(short_tmp, f"{disk},format=qcow2") as daemon:
        assert daemon.stop() == 0
    await asyncio.to_thread(look, program, disk, ledger)


async def killed(daemon: Daemon, export: str, ledger: Ledger, rng: random.Random) -> None:
    enough = ledger.total + int(10 ** rng.uniform(0, 3))
    async with guests(daemon.socket, export, ledger, rng):
        await eventually(lambda: ledger.total >= enough)
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.deadline(900)
async def test_what_was_flushed_survives_kills_of_the_storage_daemon(
    short_tmp: Path, program: Program, rng: random.Random, *, long_run: bool
) -> None:
    """With an overlay over the disk as the view of a backup, which dies with the daemon."""
    disk = create(program, short_tmp, "plain")
    ledger = Ledger()
    node = f"qcow2,node-name=disk,file.driver=file,file.filename={disk},discard=unmap"
    options = ("--blockdev", node, "--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    export = ("--export", "nbd,id=live,node-name=disk,name=live,writable=on")
    for _ in range(30 if long_run else 3):
        temp = short_tmp / "temp"
        run(program("qemu-img"), "create", "-f", "qcow2", temp, str(SIZE))
        with StorageDaemon(short_tmp, *options, *export) as daemon:
            file = {"driver": "file", "filename": str(temp)}
            over = {"driver": "qcow2", "node-name": "temp", "file": file, "backing": "disk"}
            daemon.ask("blockdev-add", over)
            backup = {"job-id": "j", "device": "disk", "target": "temp", "sync": "none"}
            daemon.ask("blockdev-backup", backup)
            enough = ledger.total + int(10 ** rng.uniform(0, 3))
            async with guests(short_tmp / "nbd.sock", "live", ledger, rng):
                await eventually(lambda enough=enough: ledger.total >= enough)
                assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.to_thread(look, program, disk, ledger)
        settle(ledger, disk)
        found = run(program("qemu-img"), "check", "-f", "qcow2", temp, code=None)
        assert found.returncode in (0, 3), found.stdout + found.stderr
