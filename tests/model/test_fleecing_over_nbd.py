"""Histories over NBD: a daemon, guests on several connections, readers of every snapshot.

Each guest writes, zeroes and trims (1 byte to 300 KiB, unaligned) in stripes of its own, one
request after the other. So a snapshot must hold, in the stripes of each guest, exactly the first k
of its changes, for some k between those acknowledged before the snapshot was asked for and those
begun before it was there: no change torn, none skipped. A trim leaves old bytes or zeroes; guests
write zeroes behind it before they go on.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon
from tests.support.nbd_client import NbdClient
from tests.support.waiting import until

KIB, MIB = 1024, 1 << 20
STRIPE = 400 * KIB + 123


@dataclass
class Change:
    """A request that changes the disk."""

    offset: int
    new: bytes
    is_trim: bool = False


class Guest:
    """One connection that changes its own stripes of the disk."""

    def __init__(
        self, client: NbdClient, disk: bytearray, slot: int, slots: int, seed: float
    ) -> None:
        self.client = client
        self.disk = disk  # shared by all guests: what has been acknowledged
        self.rng = random.Random(seed)
        count = -(-len(disk) // STRIPE)
        self.stripes = [index for index in range(count) if index % slots == slot]
        self.in_flight: Change | None = None
        self.noted: list[Change] | None = None  # while a snapshot is taken: what begins
        self.stop = False
        self.requests = 0

    async def run(self) -> None:
        while not self.stop:
            await self.change()
            self.requests += 1

    async def change(self) -> None:
        rng = self.rng
        start = rng.choice(self.stripes) * STRIPE
        end = min(len(self.disk), start + STRIPE)
        offset = rng.randrange(start, end)
        length = min(1 + int(300 * KIB * rng.random() ** 3), end - offset)
        kind = rng.choice(["write"] * 5 + ["zero", "zero", "trim"])
        if kind == "write":
            await self.write(offset, rng.randbytes(length))
        elif kind == "zero":
            self.begin(Change(offset, bytes(length)))
            await self.client.zero(offset, length, flags=rng.choice([0, 2]))
            self.acknowledge()
        else:
            self.begin(Change(offset, bytes(length), is_trim=True))
            await self.client.trim(offset, length)
            await self.client.zero(offset, length)
            self.acknowledge()

    async def write(self, offset: int, data: bytes) -> None:
        self.begin(Change(offset, data))
        await self.client.write(offset, data, flags=self.rng.choice([0, 0, 0, 1]))
        self.acknowledge()

    def begin(self, change: Change) -> None:
        self.in_flight = change
        if self.noted is not None:
            self.noted.append(change)

    def acknowledge(self) -> None:
        assert self.in_flight is not None
        change = self.in_flight
        self.disk[change.offset : change.offset + len(change.new)] = change.new
        self.in_flight = None


@dataclass
class Snapshot:
    """A snapshot, and what is known of the disk when it was taken."""

    name: str
    before: bytes  # what was acknowledged when it was asked for
    guests: list[
        tuple[list[int], list[Change]]
    ]  # stripes, and what was in flight until it was there
    image: bytes | None = None  # its content as first read

    def check(self, image: bytes) -> None:
        """Compare a whole view with the model; later views must equal the first."""
        if self.image is not None:
            assert image == self.image, f"{self.name} has changed"
            return
        self.image = image
        for number, (stripes, changes) in enumerate(self.guests):
            assert self.is_prefix(stripes, changes), f"{self.name}: guest {number}"

    def is_prefix(self, stripes: list[int], changes: list[Change]) -> bool:
        """Tell whether the stripes hold the first k of the changes, for some k."""
        assert self.image is not None
        state = bytearray(self.before)
        if same_stripes(state, self.image, stripes):
            return True
        for change in changes:
            where = slice(change.offset, change.offset + len(change.new))
            if change.is_trim:
                seen, old = self.image[where], state[where]
                if all(byte in (0, was) for byte, was in zip(seen, old, strict=True)):
                    trimmed = state.copy()
                    trimmed[where] = seen
                    if same_stripes(trimmed, self.image, stripes):
                        return True
            state[where] = change.new
            if same_stripes(state, self.image, stripes):
                return True
        return False


def same_stripes(one: bytes | bytearray, other: bytes, stripes: list[int]) -> bool:
    ranges = (slice(index * STRIPE, (index + 1) * STRIPE) for index in stripes)
    return all(one[where] == other[where] for where in ranges)


async def run_cli(daemon: Daemon, *args: str) -> None:
    result = await asyncio.to_thread(daemon.run, *args)
    assert result.code == 0, result


async def read_whole(client: NbdClient, size: int, rng: random.Random) -> bytes:
    """Read an export in pieces of random size, several at a time, in random order."""
    edges = sorted({0, size, *(rng.randrange(size) for _ in range(60))})
    pieces = list(pairwise(edges))
    rng.shuffle(pieces)
    image = bytearray(size)

    async def read(offset: int, end: int) -> None:
        image[offset:end] = await client.read(offset, end - offset)

    for batch in range(0, len(pieces), 8):
        async with asyncio.TaskGroup() as group:
            for offset, end in pieces[batch : batch + 8]:
                group.create_task(read(offset, end))
    return bytes(image)


async def check_map(client: NbdClient, image: bytes) -> None:
    """What is said to be zero is zero."""
    offset = 0
    while offset < len(image):
        for length, flags in await client.status(offset, len(image) - offset):
            if flags & 2:
                assert not any(image[offset : offset + length]), f"not zero: {offset}+{length}"
            offset += length


@pytest.mark.deadline(300)
@pytest.mark.parametrize("size", [4 * MIB, 6 * MIB + 1536, 5_000_001])
async def test_every_snapshot_is_its_instant_while_guests_go_on(
    short_tmp: Path, rng: random.Random, size: int, long_run: bool
) -> None:
    disk = bytearray(rng.randbytes(size))
    disk[MIB : 2 * MIB] = bytes(MIB)
    path = short_tmp / "disk.raw"
    path.write_bytes(disk)
    with Daemon(short_tmp, f"vda={path}") as daemon:
        daemon.ready()
        for _ in range(40 if long_run else 3):
            await one_history(daemon, disk, rng)
        content = bytearray(path.read_bytes())
        assert content == disk


async def one_history(daemon: Daemon, disk: bytearray, rng: random.Random) -> None:
    guests = []
    for slot in range(4):
        client = await NbdClient.open(str(daemon.socket))
        await client.connect("vda", structured=rng.random() < 0.5)
        guests.append(Guest(client, disk, slot, 4, rng.random()))
    snapshots: list[Snapshot] = []
    async with asyncio.TaskGroup() as group:
        for guest in guests:
            group.create_task(guest.run())
        for number in range(3):
            target = sum(guest.requests for guest in guests) + rng.randrange(40)
            await until(lambda target=target: sum(guest.requests for guest in guests) >= target)
            snapshots.append(await take_snapshot(daemon, disk, guests, f"s{number}"))
            await read_all(daemon, snapshots, rng)
        await read_all(daemon, snapshots, rng)
        doomed = snapshots.pop(rng.randrange(3))
        await run_cli(daemon, "snapshot", "delete", f"vda@{doomed.name}")
        await read_all(daemon, snapshots, rng)
        for guest in guests:
            guest.stop = True
    for snapshot in snapshots:
        await run_cli(daemon, "snapshot", "delete", f"vda@{snapshot.name}")
    live = guests[0].client
    assert await read_whole(live, len(disk), rng) == disk
    for guest in guests:
        await guest.client.disconnect()


async def take_snapshot(
    daemon: Daemon, disk: bytearray, guests: list[Guest], name: str
) -> Snapshot:
    before = bytes(disk)
    for guest in guests:
        guest.noted = [guest.in_flight] if guest.in_flight is not None else []
    await run_cli(daemon, "snapshot", "create", "vda", "--name", name)
    snapshot = Snapshot(name, before, [(guest.stripes, guest.noted or []) for guest in guests])
    for guest in guests:
        guest.noted = None
    return snapshot


async def read_all(daemon: Daemon, snapshots: list[Snapshot], rng: random.Random) -> None:
    """Read every snapshot as a whole, with structured and with simple replies, at the same time."""

    async def read(snapshot: Snapshot, *, structured: bool) -> None:
        client = await NbdClient.open(str(daemon.socket))
        await client.connect(f"vda@{snapshot.name}", structured=structured)
        image = await read_whole(client, len(snapshot.before), rng)
        snapshot.check(image)
        if structured:
            await check_map(client, image)
        await client.disconnect()

    async with asyncio.TaskGroup() as group:
        for snapshot in snapshots:
            group.create_task(read(snapshot, structured=True))
            group.create_task(read(snapshot, structured=False))
