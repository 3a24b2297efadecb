"""A client of the conformance tests: every byte is packed and taken apart here, with struct alone.

It shares no layout and no constant with nbdfleece, so that a wrong one shows. What it hears it
gives as plain tuples; what is not of the protocol's form fails the test.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from tests.support.nbd_client import Address, NbdClient

FIXED, NO_ZEROES = 1, 2
ACK, SERVER, INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT = (
    (1 << 31) + number for number in range(1, 11)
)
(
    EXPORT_NAME,
    ABORT,
    LIST,
    PEEK,
    STARTTLS,
    OPT_INFO,
    GO,
    STRUCTURED,
    LIST_META,
    SET_META,
    EXTENDED,
) = range(1, 12)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
DONE = 1


@dataclass(frozen=True)
class Chunk:
    """One chunk of a structured or extended reply."""

    flags: int
    kind: int
    cookie: int
    payload: bytes
    offset: int | None = None  # of an extended header

    @property
    def error(self) -> int:
        assert self.kind & 0x8000
        return struct.unpack_from(">I", self.payload)[0]

    @property
    def text(self) -> str:
        (length,) = struct.unpack_from(">H", self.payload, 4)
        assert length <= len(self.payload) - 6
        return self.payload[6 : 6 + length].decode()


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info(name: bytes, *wanted: int) -> bytes:
    return (
        struct.pack(">I", len(name)) + name + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    )


def meta(name: bytes, *queries: bytes) -> bytes:
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return data + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def extended_request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7
) -> bytes:
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)


def descriptors(chunk: Chunk) -> list[tuple[int, int]]:
    """Return (length, flags) of a status chunk with 32 bits each."""
    assert chunk.kind == STATUS
    rest = chunk.payload[4:]
    assert rest
    assert len(rest) % 8 == 0
    return list(struct.iter_unpack(">II", rest))


class TlsLine:
    """TLS over a raw connection, with the methods of NbdClient that are used here.

    Attributes:
        ended_properly: After the end: the server said that this is the end.
    """

    def __init__(self, line: NbdClient, context: ssl.SSLContext) -> None:
        self._line = line
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._received = b""
        self.ended_properly = False

    async def handshake(self) -> None:
        """Do the handshake, as far as the client knows; EOFError: the server is gone."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            else:
                await self._flush()
                return

    async def send(self, data: bytes) -> None:
        self._tls.write(data)
        await self._flush()

    async def receive(self, count: int) -> bytes:
        while len(self._received) < count:
            if not await self._read_some():
                raise EOFError(self._received)
        taken, self._received = self._received[:count], self._received[count:]
        return taken

    async def receive_to_end(self) -> bytes:
        while await self._read_some():
            pass
        taken, self._received = self._received, b""
        return taken

    async def send_plain(self, data: bytes) -> None:
        """Send bytes past TLS."""
        await self._line.send(data)

    def half_close(self) -> None:
        self._line.half_close()

    def reset(self) -> None:
        self._line.reset()

    async def close(self) -> None:
        await self._line.close()

    async def _read_some(self) -> bool:
        """Decrypt some more; False at the end."""
        while True:
            try:
                part = self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                try:
                    await self._fill()
                except (EOFError, ConnectionError):
                    return False
                continue
            except ssl.SSLZeroReturnError:
                part = b""
            except ssl.SSLError:  # an alert: the server gives up
                return False
            self._received += part
            self.ended_properly = not part
            return bool(part)

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._line.send(data)

    async def _fill(self) -> None:
        """Hear something more from the server."""
        data = await asyncio.get_running_loop().sock_recv(self._line.sock, 1 << 16)
        if not data:
            raise EOFError
        self._incoming.write(data)


class RawClient:
    """One connection.

    Attributes:
        line: What is underneath, for `half_close`, `reset`, `close`.
        greeting: The server's first 18 bytes.
    """

    def __init__(self, line: NbdClient) -> None:
        self.line: NbdClient | TlsLine = line
        self.greeting = b""
        self._peeked = b""

    @classmethod
    async def open(cls, address: Address, *, client_flags: int | None = FIXED | NO_ZEROES) -> Self:
        """Connect and hear the greeting; None: do not answer it."""
        client = cls(await NbdClient.open(address))
        client.greeting = await client.receive(18)
        if client_flags is not None:
            await client.send(struct.pack(">I", client_flags))
        return client

    async def send(self, data: bytes) -> None:
        await self.line.send(data)

    async def receive(self, count: int) -> bytes:
        taken, self._peeked = self._peeked[:count], self._peeked[count:]
        return taken + await self.line.receive(count - len(taken))

    async def receive_to_end(self) -> bytes:
        return await self.line.receive_to_end()

    async def start_tls(self, context: ssl.SSLContext) -> TlsLine:
        """Ask for TLS and do the handshake; all that follows goes over it."""
        assert await self.option(STARTTLS) == [(ACK, b"")]
        assert isinstance(self.line, NbdClient)
        line = TlsLine(self.line, context)
        self.line = line
        await line.handshake()
        return line

    # --- options -----------------------------------------------------------------------------

    async def replies(self, number: int) -> list[tuple[int, bytes]]:
        """Return (type, data) of the replies to one option, up to the final one."""
        heard: list[tuple[int, bytes]] = []
        while not heard or not (heard[-1][0] == ACK or heard[-1][0] >> 31):
            magic, echoed, kind, length = struct.unpack(">QIII", await self.receive(20))
            assert magic == 0x0003E889045565A9
            assert echoed == number
            assert length <= 8192 + 8
            heard.append((kind, await self.receive(length)))
        if heard[-1][0] == ACK:
            assert heard[-1][1] == b"", "an ACK has no data"
        else:
            assert len(heard[-1][1]) <= 4096
            heard[-1][1].decode()
        return heard

    async def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return (type, data) of its replies."""
        await self.send(option(number, data))
        return await self.replies(number)

    async def outcome(self, number: int, data: bytes = b"") -> int:
        """Send an option; return the type of its final reply."""
        return (await self.option(number, data))[-1][0]

    async def go(self, name: bytes = b"disk", *wanted: int) -> tuple[int, int]:
        """Enter transmission; return size and transmission flags."""
        replies = await self.option(GO, info(name, *wanted))
        assert replies[-1][0] == ACK, replies
        return export_info(replies)

    async def is_haggling(self) -> bool:
        """Tell whether the next option parses, by aborting."""
        try:
            return await self.option(ABORT) == [(ACK, b"")]
        except (EOFError, ConnectionError):
            return False

    # --- transmission ------------------------------------------------------------------------

    async def simple(self, length: int = 0) -> tuple[int, int, bytes]:
        """Return (error, cookie, data) of a simple reply; data only without error."""
        magic, error, cookie = struct.unpack(">IIQ", await self.receive(16))
        assert magic == 0x67446698, hex(magic)
        return error, cookie, await self.receive(length) if not error else b""

    async def chunks(self) -> list[Chunk]:
        """Return the chunks of one structured reply, which nothing may interleave."""
        heard: list[Chunk] = []
        while not heard or not heard[-1].flags & DONE:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self.receive(20))
            assert magic == 0x668E33EF, hex(magic)
            assert not flags & ~DONE
            assert not heard or cookie == heard[0].cookie
            heard.append(Chunk(flags, kind, cookie, await self.receive(length)))
        return heard

    async def extended_chunks(self) -> list[Chunk]:
        """Return the chunks of one extended reply, which nothing may interleave."""
        heard: list[Chunk] = []
        while not heard or not heard[-1].flags & DONE:
            magic, flags, kind, cookie, offset, length = struct.unpack(
                ">IHHQQQ", await self.receive(32)
            )
            assert magic == 0x6E8A278C, hex(magic)
            assert not flags & ~DONE
            assert not heard or (cookie, offset) == (heard[0].cookie, heard[0].offset)
            heard.append(Chunk(flags, kind, cookie, await self.receive(length), offset))
        return heard

    async def reply(self) -> int:
        """Return the error of a reply without data, simple or structured; 0 for success."""
        magic = struct.unpack(">I", peeked := await self.receive(4))[0]
        self._peeked = peeked
        if magic == 0x67446698:
            return (await self.simple())[0]
        chunks = await (self.extended_chunks() if magic == 0x6E8A278C else self.chunks())
        errors = [chunk.error for chunk in chunks if chunk.kind & 0x8000]
        assert len(errors) <= 1, "at most one error chunk"
        assert errors or [chunk.kind for chunk in chunks] == [NONE]
        return errors[0] if errors else 0

    async def error_of(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: bytes = b"",
        cookie: int = 7,
    ) -> int:
        """Send a compact request whose reply has no data; return its error."""
        sent = request(command, offset, length, flags=flags, cookie=cookie)
        await self.send(sent + data)
        return await self.reply()


def export_info(replies: Sequence[tuple[int, bytes]]) -> tuple[int, int]:
    """Return size and flags of the one NBD_INFO_EXPORT."""
    found = [data for kind, data in replies if kind == INFO and data[:2] == b"\0\0"]
    assert len(found) == 1
    assert len(found[0]) == 12
    _, size, flags = struct.unpack(">HQH", found[0])
    return size, flags


@asynccontextmanager
async def haggling(
    address: Address, *, client_flags: int = FIXED | NO_ZEROES
) -> AsyncIterator[RawClient]:
    """A client behind its flags; closed at the end."""
    client = await RawClient.open(address, client_flags=client_flags)
    try:
        yield client
    finally:
        await client.line.close()


@asynccontextmanager
async def transmitting(
    address: Address, name: bytes = b"disk", *, structured: bool = True, contexts: int = 1
) -> AsyncIterator[RawClient]:
    """A client in transmission, with base:allocation where replies are structured."""
    async with haggling(address) as client:
        if structured:
            assert await client.outcome(STRUCTURED) == ACK
            if contexts:
                assert await client.outcome(SET_META, meta(name, b"base:allocation")) == ACK
        await client.go(name)
        yield client
