"""Random histories of guests and readers against the simplest model: a frozen copy of the disk.

The disk and the temporary image dawdle as a seed tells them, so every history is another
interleaving of copies, guest writes and snapshot reads. Whatever a reader gets must be the disk as
it was, or an error where an error is allowed.
"""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import ZERO
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.node import Node
from tests.support.fleecing import (
    Fleecing,
    file_driver,
    read_all,
    start_fleecing,
    temp_driver,
)
from tests.support.memory import MemoryDriver

KIB = 1024


class Guest:
    """Writes at random for ever, and knows what the disk must hold afterwards.

    Requests of one guest never overlap in time, those of several guests do; each keeps to its
    stripes of the disk (`slot` of `slots`, odd-sized), so that the final content is known.
    """

    def __init__(self, node: Node, rng: random.Random, slot: int, slots: int) -> None:
        self.node = node
        self.rng = rng
        self.slot = slot
        self.slots = slots
        self.expected: dict[int, int] = {}
        self.failures = 0

    async def run(self, steps: int, model: bytearray) -> None:
        for _ in range(steps):
            await self.step(model)

    async def step(self, model: bytearray) -> None:
        rng = self.rng
        offset, length = self.choose(len(model))
        kind = rng.choice(["write", "write", "write", "zero", "trim", "read"])
        try:
            if kind == "write":
                data = rng.randbytes(length)
                await self.node.write(offset, memoryview(data), fua=rng.random() < 0.1)
                model[offset : offset + length] = data
            elif kind == "zero":
                unmap = rng.random() < 0.5
                await self.node.write_zeroes(
                    offset, length, fua=False, may_unmap=unmap, no_fallback=False
                )
                model[offset : offset + length] = bytes(length)
            elif kind == "trim":
                await self.node.discard(offset, length)
                self.forget(model, offset, length)
            else:
                view = memoryview(bytearray(length))
                if not self.node.read_now(offset, view):
                    await self.node.read(offset, view)
                self.check(model, offset, view)
        except IoError:
            self.failures += 1
            self.forget(model, offset, length)

    def choose(self, size: int) -> tuple[int, int]:
        """Return a range inside one of this guest's stripes."""
        stripe = 300 * KIB + 77
        count = -(-size // stripe)
        own = [index for index in range(count) if index % self.slots == self.slot]
        index = self.rng.choice(own)
        start, end = index * stripe, min(size, (index + 1) * stripe)
        offset = self.rng.randrange(start, end)
        longest = end - offset
        length = 1 + int((longest - 1) * self.rng.random() ** 4)
        if self.rng.random() < 0.3:
            offset, length = offset // 4096 * 4096, 4096
            offset = max(offset, start)
            length = min(length, end - offset)
        return offset, max(1, length)

    def forget(self, model: bytearray, offset: int, length: int) -> None:
        """What a failed write or a trim leaves may be anything; take what is there at the end."""
        self.expected[offset] = max(length, self.expected.get(offset, 0))

    def check(self, model: bytearray, offset: int, view: memoryview) -> None:
        unknown = any(
            start < offset + len(view) and offset < start + length
            for start, length in self.expected.items()
        )
        assert unknown or bytes(view) == model[offset : offset + len(view)], "live read is wrong"


async def read_at_random(
    fleecing: Fleecing,
    frozen: bytes,
    rng: random.Random,
    stop: asyncio.Event,
    errors: list[IoError],
) -> None:
    """Read ranges of the snapshot and compare, until told to stop."""
    node = fleecing.access
    while not stop.is_set():
        offset = rng.randrange(len(frozen))
        length = 1 + int((min(len(frozen) - offset, 1 << 20) - 1) * rng.random() ** 3)
        view = memoryview(bytearray(length))
        try:
            if rng.random() < 0.2:
                await check_status(node, frozen, offset, length)
            elif not (rng.random() < 0.5 and node.read_now(offset, view)):
                await node.read(offset, view)
                assert bytes(view) == frozen[offset : offset + length], f"{offset}+{length}"
            else:
                assert bytes(view) == frozen[offset : offset + length], f"now {offset}+{length}"
        except IoError as error:
            errors.append(error)
        await asyncio.sleep(0)


async def check_status(node: Node, frozen: bytes, offset: int, length: int) -> None:
    """Whatever is said to read as zeroes must have been zeroes."""
    extents = await node.block_status(offset, length)
    position = offset
    for extent in extents:
        assert extent.offset == position
        assert extent.length > 0
        position = extent.end
        if extent.flags & ZERO:
            end = min(extent.end, offset + length)
            assert not any(frozen[extent.offset : end]), f"{extent} claims zeroes"


def make_disk(rng: random.Random, size: int) -> bytearray:
    """Return content with data, whole zero clusters, and clusters that are zero in part."""
    disk = bytearray(rng.randbytes(size))
    for _ in range(size // (64 * KIB)):
        offset = rng.randrange(size)
        length = rng.choice([1, 4096, 4096 * rng.randrange(1, 40), rng.randrange(1, 100 * KIB)])
        disk[offset : offset + length] = bytes(len(disk[offset : offset + length]))
    return disk


async def run_history(
    fleecing: Fleecing, disk: bytes, rng: random.Random, *, steps: int, guests: int = 3
) -> tuple[list[IoError], bytearray, list[Guest]]:
    frozen, model = bytes(disk), bytearray(disk)
    stop = asyncio.Event()
    errors: list[IoError] = []
    crew = [Guest(fleecing.cbw, random.Random(rng.random()), n, guests) for n in range(guests)]

    async def all_guests() -> None:
        async with asyncio.TaskGroup() as group:
            for guest in crew:
                group.create_task(guest.run(steps, model))
        stop.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(all_guests())
        for _ in range(3):
            reader = random.Random(rng.random())
            group.create_task(read_at_random(fleecing, frozen, reader, stop, errors))
    return errors, model, crew


async def assert_live(fleecing: Fleecing, model: bytearray, crew: list[Guest]) -> None:
    """The live disk holds every acknowledged write (trimmed and failed ranges left out)."""
    content = bytearray(await read_all(fleecing.cbw))
    for guest in crew:
        for offset, length in guest.expected.items():
            content[offset : offset + length] = model[offset : offset + length]
    assert content == model


SIZES = [1 << 20, 3 * (1 << 20) + 1536, 777_777]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("new", [True, False], ids=["our-temp", "any-temp"])
@pytest.mark.parametrize("cluster", [0, 65536])
async def test_readers_see_the_point_in_time_through_any_interleaving(
    rng: random.Random, size: int, new: bool, cluster: int, long_run: bool
) -> None:
    for _ in range(20 if long_run else 2):
        disk = make_disk(rng, size)
        temp = bytearray(size) if new else bytearray(rng.randbytes(size))
        fleecing = await start_fleecing(
            MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=0.5),
            MemoryDriver(temp, random.Random(rng.random()), new=new, now_share=0.5),
            CopyBeforeWrite(min_cluster_size=cluster),
        )
        errors, model, crew = await run_history(fleecing, disk, rng, steps=60)
        assert errors == []
        assert sum(guest.failures for guest in crew) == 0
        assert await read_all(fleecing.access) == disk
        await assert_live(fleecing, model, crew)
        await fleecing.close()


@pytest.mark.parametrize("size", SIZES)
async def test_readers_see_the_point_in_time_on_plain_files(
    rng: random.Random, size: int, tmp_path: Path, long_run: bool
) -> None:
    """As above on files, where first writes take the one-hop way through a worker thread."""
    for turn in range(20 if long_run else 2):
        disk = make_disk(rng, size)
        active, temp = tmp_path / f"active{turn}", tmp_path / f"temp{turn}"
        active.write_bytes(disk)
        fleecing = await start_fleecing(
            file_driver(active), temp_driver(temp, size), CopyBeforeWrite()
        )
        errors, model, crew = await run_history(fleecing, disk, rng, steps=250)
        assert errors == []
        assert sum(guest.failures for guest in crew) == 0
        assert await read_all(fleecing.access) == disk
        await assert_live(fleecing, model, crew)
        await fleecing.close()


@pytest.mark.parametrize("policy", list(OnCbwError))
@pytest.mark.parametrize("timeout_s", [None, 0.002])
async def test_failing_copies_give_errors_and_never_wrong_bytes(
    rng: random.Random, policy: OnCbwError, timeout_s: float | None, long_run: bool
) -> None:
    """The temporary image fails at times: readers get old data or an error, guests keep theirs."""
    for _ in range(20 if long_run else 3):
        disk = make_disk(rng, 1 << 20)
        temp = MemoryDriver(bytearray(1 << 20), random.Random(rng.random()), new=True)
        fleecing = await start_fleecing(
            MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=0.3),
            temp,
            CopyBeforeWrite(on_cbw_error=policy, cbw_timeout_s=timeout_s),
        )
        done = asyncio.Event()
        chance = random.Random(rng.random())

        async def fail_sometimes(
            temp: MemoryDriver = temp,
            done: asyncio.Event = done,
            chance: random.Random = chance,
        ) -> None:
            while not done.is_set():
                for _ in range(chance.randrange(400)):
                    await asyncio.sleep(0)
                temp.fail["write"] = errno.EIO
                for _ in range(chance.randrange(20)):
                    await asyncio.sleep(0)
                temp.fail.clear()

        async with asyncio.TaskGroup() as group:
            group.create_task(fail_sometimes())
            errors, model, crew = await run_history(fleecing, disk, rng, steps=60)
            done.set()
        temp.fail.clear()
        if policy is OnCbwError.BREAK_SNAPSHOT:
            assert sum(guest.failures for guest in crew) == 0
            assert {error.errno for error in errors} <= {errno.EACCES}
            if fleecing.filter.error is not None:
                with pytest.raises(IoError):
                    await read_all(fleecing.access)
        else:
            assert errors == []
            assert await read_all(fleecing.access) == disk
        await assert_live(fleecing, model, crew)
        await fleecing.close()


async def test_discarded_ranges_fail_and_the_rest_stays_right(
    rng: random.Random, long_run: bool
) -> None:
    """A reader discards what it has read: those clusters are gone, no other byte changes."""
    for _ in range(20 if long_run else 3):
        size = (1 << 20) + 333
        disk = make_disk(rng, size)
        fleecing = await start_fleecing(
            MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=0.3),
            MemoryDriver(bytearray(size), random.Random(rng.random()), new=True),
            CopyBeforeWrite(),
        )
        gone = bytearray(-(-size // 4096))
        stop = asyncio.Event()

        async def guests(
            fleecing: Fleecing = fleecing, disk: bytearray = disk, stop: asyncio.Event = stop
        ) -> None:
            guest = Guest(fleecing.cbw, random.Random(rng.random()), 0, 1)
            await guest.run(100, bytearray(disk))
            stop.set()

        async def reader(
            fleecing: Fleecing = fleecing,
            disk: bytearray = disk,
            stop: asyncio.Event = stop,
            gone: bytearray = gone,
            size: int = size,
        ) -> None:
            choice = random.Random(rng.random())
            while not stop.is_set():
                offset = choice.randrange(size)
                length = choice.randrange(1, min(50_000, size - offset) + 1)
                if choice.random() < 0.3:
                    await fleecing.access.discard(offset, length)
                    first = -(-offset // 4096)
                    last = len(gone) if offset + length == size else (offset + length) // 4096
                    for index in range(first, last):
                        gone[index] = 1
                    continue
                touched = any(gone[offset // 4096 : -(-(offset + length) // 4096)])
                view = memoryview(bytearray(length))
                if touched:
                    with pytest.raises(IoError) as refused:
                        await fleecing.access.read(offset, view)
                    assert refused.value.errno == errno.EACCES
                else:
                    await fleecing.access.read(offset, view)
                    assert bytes(view) == disk[offset : offset + length]

        async with asyncio.TaskGroup() as group:
            group.create_task(guests())
            group.create_task(reader())
        await fleecing.close()
