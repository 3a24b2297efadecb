"""A list of byte ranges that others may have to wait for (QEMU calls it reqlist).

Ranges are half-open, so touching ranges do not conflict. Waiters have no order among themselves.
"""

from __future__ import annotations

import asyncio


class RangeList:
    """Ranges in use. False when empty."""

    def __init__(self) -> None:
        self._ranges: dict[int, tuple[int, int]] = {}
        self._next = 0
        self._waiters: list[asyncio.Future[None]] = []

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def add(self, offset: int, length: int) -> int:
        """List a range; the returned key removes it."""
        self._next += 1
        self._ranges[self._next] = (offset, offset + length)
        return self._next

    def remove(self, key: int) -> None:
        """Take a range off the list and wake all waiters."""
        del self._ranges[key]
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def overlaps(self, offset: int, length: int) -> bool:
        """Tell whether any listed range shares a byte with this one."""
        end = offset + length
        for first, last in self._ranges.values():  # noqa: SIM110 - faster; each first write asks
            if first < end and offset < last:
                return True
        return False

    async def wait_clear(self, offset: int, length: int) -> None:
        """Return when no listed range overlaps. Cancel: safe."""
        while self.overlaps(offset, length):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
