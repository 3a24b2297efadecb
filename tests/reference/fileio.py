"""Plain twin of nbdfleece.datapath.fileio: every call in a thread, one piece after another."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent, merge
from nbdfleece.datapath.writes import SaveStates


class FileIo:
    """I/O on one open file."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Never: whoever wants to read has to wait."""
        return False

    async def read(self, offset: int, view: memoryview) -> None:
        data = await asyncio.to_thread(os.pread, self.fd, len(view), offset)
        if len(data) < len(view):
            raise IoError(errno.EIO, f"'{self.name}': read of {len(view)} bytes at {offset}")
        view[:] = data

    async def write(
        self,
        offset: int,
        data: memoryview,
        *,
        fua: bool,
        reply: Callable[[], None] | None = None,
    ) -> None:
        await asyncio.to_thread(os.pwrite, self.fd, data, offset)
        if fua:
            await self.sync()

    async def save_then_write(
        self,
        target: FileIo,
        saves: list[tuple[int, bytearray | int, bytearray, int, int]],
        states: SaveStates,
        offset: int,
        data: memoryview,
        reply: Callable[[], None] | None = None,
    ) -> None:
        for at, old, page, first, last in saves:
            saved = os.pread(self.fd, old, at) if isinstance(old, int) else old
            for index in range(first, last):
                start = (index - first) * states.cluster
                cluster = saved[start : start + states.cluster]
                if states.zero is not None and not any(cluster):
                    page[index] = states.zero
                else:
                    await target.write(at + start, memoryview(cluster), fua=False)
                    page[index] = states.done
        await self.write(offset, data, fua=False)

    async def sync(self) -> None:
        await asyncio.to_thread(os.fsync, self.fd)

    async def punch_hole(self, offset: int, length: int) -> None:
        await self.write(offset, memoryview(bytes(length)), fua=False)

    async def zero_range(self, offset: int, length: int) -> None:
        await self.write(offset, memoryview(bytes(length)), fua=False)

    async def status(self, offset: int, length: int) -> list[Extent]:
        """Look at every byte: only what reads as zero may be said to read as zero."""
        data = await asyncio.to_thread(os.pread, self.fd, length, offset)
        return merge(
            Extent(offset + index, 1, DATA if byte else HOLE | ZERO)
            for index, byte in enumerate(data)
        )
