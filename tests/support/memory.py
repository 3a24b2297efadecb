"""A node in memory whose requests take their time, so that a seed decides how they interleave.

Every request suspends a random number of loop turns, and a write lands in two halves with a
suspension between: a reader that looks too early or too late sees torn data.
"""

from __future__ import annotations

import asyncio
import errno
import random
from typing import ClassVar

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.block.driver import Driver


class MemoryDriver(Driver):
    """Driver of tests: `data` is the disk; `rng` None makes everything immediate.

    Attributes:
        fail: Verbs ("read", "write", ...) that fail with EIO now.
        held: When set, requests of the verbs in `hold` wait for it.
        hold: See `held`.
        writes: How many writes have landed.
    """

    name: ClassVar[str] = "memory"

    def __init__(
        self,
        data: bytearray,
        rng: random.Random | None = None,
        *,
        new: bool = False,
        now_share: float = 0.0,
    ) -> None:
        self.data = data
        self.fail: dict[str, int] = {}
        self.hold: set[str] = set()
        self.held = asyncio.Event()
        self.waiting: dict[str, int] = {}
        self.writes = 0
        self.copied = 0
        self.cluster = 1
        self._rng = rng
        self._new = new
        self._now_share = now_share

    async def open(self) -> int:
        return len(self.data)

    async def _dawdle(self, verb: str) -> None:
        if verb in self.hold:
            self.waiting[verb] = self.waiting.get(verb, 0) + 1
            await self.held.wait()
        if self._rng is not None:
            for _ in range(self._rng.randrange(4)):
                await asyncio.sleep(0)
        if verb in self.fail:
            raise IoError(self.fail[verb], f"node '{self.node.name}': {verb}")

    def read_now(self, offset: int, view: memoryview) -> bool:
        if "read" in self.fail or "read" in self.hold:
            return False
        if self._rng is None or self._rng.random() >= self._now_share:
            return False
        view[:] = self.data[offset : offset + len(view)]
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        half = len(view) // 2
        view[:half] = self.data[offset : offset + half]
        await self._dawdle("read")
        view[half:] = self.data[offset + half : offset + len(view)]
        await self._dawdle("read")

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await self._dawdle("write")
        half = len(data) // 2
        self.data[offset : offset + half] = data[:half]
        await self._dawdle("write")
        self.data[offset + half : offset + len(data)] = data[half:]
        self.writes += 1
        self.copied += len(data)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        await self.write(offset, memoryview(bytes(length)), fua=fua)
        self.copied -= length

    async def discard(self, offset: int, length: int) -> None:
        """Scribble zeroes: what a discard leaves is anybody's guess."""
        await self._dawdle("discard")
        self.data[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        await self._dawdle("flush")

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._dawdle("block_status")
        if "block_status" in self.fail:
            raise IoError(errno.EIO, "block status")
        extents = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // 4096 + 1) * 4096)
            zero = not any(self.data[offset:stop])
            extents.append(Extent(offset, stop - offset, HOLE | ZERO if zero else DATA))
            offset = stop
        return extents

    def cluster_size(self) -> int:
        return self.cluster

    def reads_zero_when_new(self) -> bool:
        return self._new
