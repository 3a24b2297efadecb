"""A file that remembers every write and flush, and what is left of it when the power is cut.

`RecordingDriver` stands where an image's file would: in memory, each request taking a random number
of turns of the loop, so that requests overlap. Its log says when each began and ended. A power cut
at a moment `t` leaves what was on stable storage by then, and of all else that had begun whatever
the disk happened to write: any sectors, in any subset (`Crashes`).

`Acknowledged` is the other half: what a guest has written and flushed, as the guest saw it, and so
what each sector may hold after a cut.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from nbdfleece.base.errors import CommandError
from nbdfleece.block.driver import Driver

SECTOR = 512
NEVER = 1 << 62


class Clock:
    """Counts moments: each call is a later one."""

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now


@dataclass
class Operation:
    """A change of the file: `data` to `offset`, or, where there is none, a new size `offset`.

    Attributes:
        durable: From this moment on it is on stable storage; NEVER: not yet.
    """

    offset: int
    data: bytes | None
    start: int
    done: int = NEVER
    durable: int = NEVER


class RecordingDriver(Driver):
    """See the module.

    Args:
        content: What the file holds at first.
        rng: Decides how long requests take.
        clock: Shared with who records the guest.
        turns: Turns of the loop that a request takes at most.
    """

    name: ClassVar[str] = "recording"

    def __init__(
        self, content: bytes, rng: random.Random, clock: Clock | None = None, turns: int = 3
    ) -> None:
        self.first = content
        self.content = bytearray(content)
        self.log: list[Operation] = []
        self.largest = 256 << 20  # bytes that the file may get
        self.clock = clock or Clock()
        self._rng = rng
        self._turns = turns

    async def open(self) -> int:
        return len(self.content)

    async def truncate(self, size: int) -> None:
        if size > self.largest:
            raise CommandError("no space left in memory")
        operation = self._begin(size, None)
        self._end(operation)

    async def allocated_size(self) -> int | None:
        return len(self.content)

    async def read(self, offset: int, view: memoryview) -> None:
        await self._wait()
        view[:] = self.content[offset : offset + len(view)]

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        operation = self._begin(offset, bytes(data))
        await self._wait()
        self._end(operation)
        if fua:
            operation.durable = operation.done

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        await self.write(offset, memoryview(bytes(length)), fua=fua)

    async def discard(self, offset: int, length: int) -> None:
        if self._rng.random() < 0.5:
            await self.write(offset, memoryview(bytes(length)), fua=False)

    async def flush(self) -> None:
        start = self.clock.tick()
        await self._wait()
        done = self.clock.tick()
        for operation in self.log:
            if operation.done < start:
                operation.durable = min(operation.durable, done)

    def reads_zero_when_new(self) -> bool:
        return True

    def _begin(self, offset: int, data: bytes | None) -> Operation:
        operation = Operation(offset, data, self.clock.tick())
        self.log.append(operation)
        return operation

    def _end(self, operation: Operation) -> None:
        apply(self.content, operation)
        operation.done = self.clock.tick()

    async def _wait(self) -> None:
        for _ in range(self._rng.randrange(self._turns + 1)):
            turn = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(turn.set_result, None)
            await turn


def apply(content: bytearray, operation: Operation) -> None:
    if operation.data is None:
        size = operation.offset
        if size < len(content):
            del content[size:]
        else:
            content.extend(bytes(size - len(content)))
        return
    put(content, operation.offset, operation.data)


def put(content: bytearray, offset: int, data: bytes | memoryview) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class Crashes:
    """The files that a power cut may leave, of one recorded run.

    Args:
        driver: What has recorded it.
    """

    def __init__(self, driver: RecordingDriver) -> None:
        self._first = driver.first
        self._log = sorted(driver.log, key=lambda operation: operation.start)
        self._by_done = sorted(driver.log, key=lambda operation: (operation.done, operation.start))
        self._last = driver.clock.now

    def moments(self, rng: random.Random, most: int) -> list[int]:
        """Moments at which to cut: right behind each change of the log, `most` of them at most."""
        points = sorted({operation.start for operation in self._log} | {self._last})
        points += [operation.done for operation in self._log if operation.done != NEVER]
        points = sorted(set(points))
        return points if len(points) <= most else sorted(rng.sample(points, most))

    def at(self, moment: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
        """Yield (how, the file) for a cut at a moment."""
        pending = [
            operation
            for operation in self._by_done
            if operation.start <= moment < operation.durable
        ]
        ways = ["nothing"] if not pending else ["nothing", "all", "some", "some sectors"]
        for how in ways:
            content = bytearray(self._first)
            for operation in self._by_done:
                if operation.durable <= moment:
                    apply(content, operation)
                elif operation.start <= moment:
                    self._maybe(content, operation, how, rng)
            yield how, bytes(content)

    @staticmethod
    def _maybe(content: bytearray, operation: Operation, how: str, rng: random.Random) -> None:
        if how == "nothing":
            return
        if how == "all":
            apply(content, operation)
        elif operation.data is None or how == "some":
            if rng.random() < 0.5:
                apply(content, operation)
        else:
            data = memoryview(operation.data)
            at = operation.offset
            while data:
                length = min(SECTOR - at % SECTOR, len(data))
                if rng.random() < 0.5:
                    put(content, at, data[:length])
                at += length
                data = data[length:]


@dataclass
class _Change:
    values: frozenset[bytes]
    start: int
    done: int = NEVER
    covered: int = NEVER  # from this moment on it is promised


@dataclass
class Acknowledged:
    """What the guest has been told, sector by sector. Its writes in flight do not overlap.

    Attributes:
        clock: Of the file below.
        before: What the disk held at first.
    """

    clock: Clock
    before: bytes
    changes: dict[int, list[_Change]] = field(default_factory=dict)

    def begin(self, offset: int, data: bytes, *, maybe: bool = False) -> list[_Change]:
        """Note that a change of whole sectors begins; `maybe`: the old data may stay."""
        start = self.clock.tick()
        begun = []
        for at in range(0, len(data), SECTOR):
            sector = (offset + at) // SECTOR
            values = {data[at : at + SECTOR]}
            if maybe:
                values |= self.allowed(sector, self.clock.now)
            change = _Change(frozenset(values), start)
            self.changes.setdefault(sector, []).append(change)
            begun.append(change)
        return begun

    def end(self, begun: list[_Change], *, fua: bool = False) -> None:
        """Note that the change was acknowledged."""
        done = self.clock.tick()
        for change in begun:
            change.done = done
            if fua:
                change.covered = done

    def flushed(self, start: int) -> None:
        """Note that a flush which began at `start` has been acknowledged."""
        now = self.clock.tick()
        for changes in self.changes.values():
            for change in changes:
                if change.done < start:
                    change.covered = min(change.covered, now)

    def allowed(self, sector: int, moment: int) -> set[bytes]:
        """Return what a sector may hold when the power is cut at a moment."""
        base = frozenset([self.before[sector * SECTOR : (sector + 1) * SECTOR]])
        since = 0
        changes = self.changes.get(sector, [])
        for change in changes:
            if change.covered <= moment:
                base, since = change.values, change.start
        allowed = set(base)
        for change in changes:
            if change.start <= moment < change.covered and change.done > since:
                allowed |= change.values
        return allowed

    def wrong(self, disk: bytes, moment: int) -> list[int]:
        """Return the numbers of the sectors of a disk that hold what they may not."""
        changed = [
            sector
            for sector in self.changes
            if disk[sector * SECTOR : (sector + 1) * SECTOR] not in self.allowed(sector, moment)
        ]
        others = [
            sector
            for sector in range(len(self.before) // SECTOR)
            if sector not in self.changes
            and disk[sector * SECTOR : (sector + 1) * SECTOR]
            != self.before[sector * SECTOR : (sector + 1) * SECTOR]
        ]
        return sorted(changed + others)
