"""Driver `null-co`: takes everything, keeps nothing. For measuring, and for tests.

It always reads as zeroes: the buffers of requests are used again, and what is in them may belong to
another client. `read-zeroes` only says whether block status admits it.

Follows: QEMU block/null.c.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from nbdfleece.base.errors import CommandError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.base.limits import MAX_SIZE
from nbdfleece.block.driver import Driver

if TYPE_CHECKING:
    from nbdfleece.block.child import Child


class NullDriver(Driver):
    """A disk of nothing.

    Args:
        size: Bytes.
        read_zeroes: Block status says that everything is a hole that reads as zeroes.
        latency_ns: Nanoseconds that every read, write, zero write, discard and flush takes.
    """

    name: ClassVar[str] = "null-co"

    def __init__(self, *, size: int, read_zeroes: bool, latency_ns: int) -> None:
        self._size = size
        self._read_zeroes = read_zeroes
        self._latency_s = latency_ns / 1e9

    async def open(self) -> int:
        """Return the size; see Driver.open."""
        if self._size > MAX_SIZE:
            raise CommandError(f"A size of {self._size} bytes is too large")
        return self._size

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Fail: there are no children."""
        raise AssertionError("null-co has no children")

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Read zeroes, unless that is to take time."""
        if self._latency_s:
            return False
        view[:] = bytes(len(view))
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        """Read zeroes."""
        await self._take_time()
        view[:] = bytes(len(view))

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Drop `data`."""
        await self._take_time()

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Do nothing, fast."""
        await self._take_time()

    async def discard(self, offset: int, length: int) -> None:
        """Do nothing."""
        await self._take_time()

    async def flush(self) -> None:
        """Do nothing."""
        await self._take_time()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `read_zeroes`."""
        return [Extent(offset, length, HOLE | ZERO if self._read_zeroes else DATA)]

    def reads_zero_when_new(self) -> bool:
        """Say yes: and it stays so."""
        return True

    async def allocated_size(self) -> int | None:
        """Return 0."""
        return 0

    def image_name(self) -> str:
        """Return a name by which QEMU knows a null disk with nothing special about it."""
        if self.node.spec is None or not self.node.spec.given:
            return f"{self.name}://"
        return super().image_name()

    async def _take_time(self) -> None:
        if not self._latency_s:
            return
        # Not asyncio.sleep, so that a coroutine stepped by hand may wait here too.
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        loop.call_later(self._latency_s, _finish, over)
        await over


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
