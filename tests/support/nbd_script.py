"""A small NBD server, for tests that want to see, or to bend, what goes over the wire.

It keeps no data: reads give zeroes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_peers import scripted

BASE = c.NBD_META_BASE_ALLOCATION


@dataclass(frozen=True)
class Export:
    """What the server says of its one export."""

    size: int
    flags: int
    maximum: int


def export(size: int = 1 << 20, flags: int = 0x0D, maximum: int = 32 * MiB) -> Export:
    return Export(size, flags, maximum)


@dataclass
class Backend:
    """The server.

    Attributes:
        export: Its export, under any name.
        extended: It knows extended headers.
        contexts: The metadata contexts that it has, ids from 7 on.
        status: What it says to every BLOCK_STATUS.
        error: What it says to every other request.
        errors: What it says to those of a command.
        silent: Commands that it never answers.
        raw: Bytes that it sends in place of the first reply.
        requests: (command, flags, offset, length) of what it received.
        connections: Connections so far.
    """

    export: Export
    extended: bool = False
    contexts: Sequence[str] = (BASE,)
    status: Sequence[tuple[int, int]] = ((1 << 20, 0),)
    error: tuple[int, bytes] | None = None
    errors: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    raw: bytes | None = None
    requests: list[tuple[int, int, int, int]] = field(default_factory=list)
    connections: int = 0

    def serving(self, path: Path) -> AbstractAsyncContextManager[None]:
        return scripted(path, self.run)

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(wire.greeting(c.NBD_FLAG_FIXED_NEWSTYLE | c.NBD_FLAG_NO_ZEROES))
        await reader.readexactly(4)
        selected = await self.haggle(reader, writer)
        while True:
            await self.answer(reader, writer, selected)
            await writer.drain()

    async def haggle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> list[int]:
        """Answer options until GO; return the ids of the selected contexts."""
        selected: list[int] = []
        while True:
            _, number, length = wire.OPTION_HEADER.unpack(await reader.readexactly(16))
            data = await reader.readexactly(length)
            reply = c.NBD_REP_ACK
            if number == c.NBD_OPT_EXTENDED_HEADERS and not self.extended:
                reply = c.NBD_REP_ERR_UNSUP
            elif number == c.NBD_OPT_SET_META_CONTEXT:
                for context, name in enumerate(self.contexts, start=7):
                    if name.encode() in data:
                        selected.append(context)
                        writer.write(wire.meta_context_reply(number, context, name.encode()))
            elif number in (c.NBD_OPT_INFO, c.NBD_OPT_GO):
                size, flags, maximum = self.export.size, self.export.flags, self.export.maximum
                writer.write(wire.info_export_reply(number, size=size, flags=flags))
                block = wire.info_block_size_reply(
                    number, minimum=1, preferred=min(4096, maximum), maximum=maximum
                )
                writer.write(block)
            writer.write(wire.option_reply(number, reply))
            await writer.drain()
            if number == c.NBD_OPT_GO:
                return selected

    async def answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, selected: list[int]
    ) -> None:
        """Receive a request and answer it."""
        layout = wire.EXTENDED_REQUEST if self.extended else wire.REQUEST
        header = await reader.readexactly(layout.size)
        _, flags, command, cookie, offset, length = layout.unpack(header)
        self.requests.append((command, flags, offset, length))
        if command == c.NBD_CMD_WRITE:
            await reader.readexactly(length)
        if command == c.NBD_CMD_DISC:
            raise ConnectionError
        if command in self.silent:
            return
        if self.raw is not None:
            raw, self.raw = self.raw, None
            writer.write(raw.replace(b"COOKIE!!", cookie.to_bytes(8, "big")))
            return
        for kind, payload, is_done in self.chunks(command, offset, length, selected):
            flags = c.NBD_REPLY_FLAG_DONE if is_done else 0
            if self.extended:
                writer.write(
                    wire.extended_chunk(
                        kind, payload, flags=flags, cookie=cookie, request_offset=offset
                    )
                )
            else:
                writer.write(wire.chunk(kind, payload, flags=flags, cookie=cookie))

    def chunks(
        self, command: int, offset: int, length: int, selected: list[int]
    ) -> list[tuple[int, bytes, bool]]:
        if command == c.NBD_CMD_BLOCK_STATUS:
            kind, make = c.NBD_REPLY_TYPE_BLOCK_STATUS, wire.status_payload
            if self.extended:
                kind, make = c.NBD_REPLY_TYPE_BLOCK_STATUS_EXT, wire.status_ext_payload
            last = selected[-1]
            return [(kind, make(one, self.status), one == last) for one in selected]
        error = self.errors.get(command, self.error)
        if error is not None:
            return [(c.NBD_REPLY_TYPE_ERROR, wire.error_payload(*error), True)]
        if command == c.NBD_CMD_READ:
            return [(c.NBD_REPLY_TYPE_OFFSET_HOLE, wire.hole_payload(offset, length), True)]
        return [(c.NBD_REPLY_TYPE_NONE, b"", True)]
