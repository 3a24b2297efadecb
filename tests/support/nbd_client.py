"""A client for tests of the server: asyncio on a raw socket, able to behave badly.

`NbdClient.open` only connects. Then either `await client.run(talk)` with the talks of
protocol.nbd.client, or `await client.connect(...)` for the whole handshake, and any number of
requests at a time; or raw bytes with `send` and `receive`.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self, TypeVar

from nbdfleece.base.errors import PeerViolation
from nbdfleece.datapath.stream import receive, send_all
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.protocol.nbd import client, wire
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client import Connected, RemoteExport
from nbdfleece.protocol.nbd.client_replies import Reply, ReplyParser
from nbdfleece.protocol.nbd.talk import Conversation, Talk

T = TypeVar("T")

Address = str | tuple[str, int]
BASE = c.NBD_META_BASE_ALLOCATION


class RequestFailed(Exception):
    """The server answered a request with an error."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"error {reply.error}: {reply.text}")
        self.error = reply.error
        self.reply = reply


class NbdClient:
    """One connection.

    Attributes:
        sock: The socket, non-blocking.
        export: After `connect`: what the server told.
        contexts: After `connect`: metadata context name -> id.
        lost: After transmission ended: why.
        extended: In transmission: headers are extended.
        tls: After `start_tls`: the stream.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.export: RemoteExport | None = None
        self.contexts: dict[str, int] = {}
        self.lost: BaseException | None = None
        self.extended = False
        self.tls: TlsStream | None = None
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._parser: ReplyParser | None = None
        self._cookies = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()

    @classmethod
    async def open(cls, address: Address) -> Self:
        """Connect the socket, to a path or to (host, port)."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if isinstance(address, tuple) and ":" in address[0]:
            family = socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    # --- raw bytes ---------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        if self.tls is None:
            await self._loop.sock_sendall(self.sock, data)
        else:
            await send_all(self.tls, data)

    async def _recv(self, most: int) -> bytes:
        if self.tls is None:
            return await self._loop.sock_recv(self.sock, most)
        return await receive(self.tls, most)

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Begin TLS, which the server has agreed to.

        Raises:
            PeerViolation, OSError: It could not be.
        """
        assert not self._received, "plain text behind the acknowledgement"
        stream = TlsStream(self.sock, context, server_side=False, server_hostname="localhost")
        await stream.handshake()
        self.tls = stream

    async def receive(self, count: int) -> bytes:
        """Return exactly `count` bytes.

        Raises:
            EOFError: The server closed before.
        """
        while len(self._received) < count:
            part = await self._recv(1 << 16)
            if not part:
                raise EOFError(self._received)
            self._received += part
        taken, self._received = self._received[:count], self._received[count:]
        return taken

    async def receive_to_end(self) -> bytes:
        """Return all that the server sends until it closes; a reset counts as a close."""
        received, self._received = self._received, b""
        while True:
            try:
                part = await self._recv(1 << 16)
            except ConnectionError:
                return received
            if not part:
                return received
            received += part

    def half_close(self) -> None:
        """Send an end of stream; go on reading."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Vanish: on TCP with a RST."""
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close_socket()

    async def close(self) -> None:
        """Close without a word."""
        if self._reader is not None:
            # First: it unregisters a descriptor that would be somebody else's by then.
            self._reader.cancel()
            await asyncio.wait([self._reader])
        self._close_socket()

    def _close_socket(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self.sock.close()

    # --- handshake ---------------------------------------------------------------------------

    async def run(self, talk: Talk[T]) -> T:
        """Run a talk to its end.

        Raises:
            EOFError: The server closed in the middle.
            OptionRefused, PeerViolation: As the talk.
        """
        conversation = Conversation(talk)
        received, self._received = self._received, b""
        while True:
            for outgoing in conversation.feed(received):
                await self.send(outgoing)
            if conversation.is_over:
                self._received = conversation.leftover
                return conversation.result  # type: ignore[return-value]
            received = await self._recv(1 << 16)
            if not received:
                raise EOFError

    async def connect(
        self, name: str = "disk", *, structured: bool = True, contexts: Sequence[str] = (BASE,)
    ) -> Connected:
        """Do the usual handshake and begin transmission."""
        connected = await self.run(client.connect(name, structured=structured, contexts=contexts))
        self.contexts = connected.contexts
        self.begin_transmission(connected.export, structured=connected.structured)
        return connected

    def begin_transmission(
        self, export: RemoteExport, *, structured: bool, extended: bool = False
    ) -> None:
        """Read replies from now on."""
        self.export = export
        self.extended = extended
        self._parser = ReplyParser(structured=structured, extended=extended)
        self._reader = self._loop.create_task(self._read_replies())

    # --- transmission --------------------------------------------------------------------------

    async def submit(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> asyncio.Future[Reply]:
        """Send a request; return the future of its reply, whatever that is."""
        assert self._parser is not None, "not in transmission"
        if self.lost is not None:
            raise self.lost
        cookie = next(self._cookies)
        is_filter = self.extended and command == c.NBD_CMD_BLOCK_STATUS and len(data) >= 8
        concerned = wire.STATUS_FILTER.unpack_from(data)[0] if is_filter else length
        self._parser.expect(cookie, command, offset=offset, length=concerned)
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting[cookie] = future
        if self.extended:
            make = wire.extended_request
            flags |= c.NBD_CMD_FLAG_PAYLOAD_LEN if command == c.NBD_CMD_WRITE else 0
        else:
            make = wire.request
        header = make(command, flags=flags, cookie=cookie, offset=offset, length=length)
        async with self._sending:
            await self.send(header + data)
        return future

    async def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Reply:
        """Send a request and return its reply, whatever that is."""
        return await (await self.submit(command, offset, length, flags=flags, data=data))

    async def error_of(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> int:
        """Send a request and return the NBD error of its reply."""
        return (await self.ask(command, offset, length, flags=flags, data=data)).error

    async def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """Return `length` bytes; RequestFailed if the server could not."""
        return bytes((await self._must(c.NBD_CMD_READ, offset, length, flags)).data)

    async def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        """Write; RequestFailed if the server could not."""
        await self._must(c.NBD_CMD_WRITE, offset, len(data), flags, data)

    async def flush(self) -> None:
        await self._must(c.NBD_CMD_FLUSH, 0, 0, 0)

    async def trim(self, offset: int, length: int, *, flags: int = 0) -> None:
        await self._must(c.NBD_CMD_TRIM, offset, length, flags)

    async def zero(self, offset: int, length: int, *, flags: int = 0) -> None:
        await self._must(c.NBD_CMD_WRITE_ZEROES, offset, length, flags)

    async def status(
        self, offset: int, length: int, *, flags: int = 0, context: str = BASE
    ) -> list[tuple[int, int]]:
        """Return (length, flags) descriptors of one context."""
        return (await self.statuses(offset, length, flags=flags))[context]

    async def statuses(
        self, offset: int, length: int, *, flags: int = 0
    ) -> dict[str, list[tuple[int, int]]]:
        """Return (length, flags) descriptors by context."""
        reply = await self._must(c.NBD_CMD_BLOCK_STATUS, offset, length, flags)
        return {name: reply.status[number] for name, number in self.contexts.items()}

    async def disconnect(self) -> None:
        """Send NBD_CMD_DISC, read what still comes, and close."""
        make = wire.extended_request if self.extended else wire.request
        header = make(c.NBD_CMD_DISC, flags=0, cookie=0, offset=0, length=0)
        await self.send(header)
        await self.wait_closed()
        self.sock.close()

    async def wait_closed(self) -> BaseException | None:
        """Wait until the server closes; return None for a clean end of stream, or what it was."""
        assert self._reader is not None, "not in transmission"
        await asyncio.wait([self._reader])
        return None if isinstance(self.lost, EOFError) else self.lost

    async def _must(
        self, command: int, offset: int, length: int, flags: int, data: bytes = b""
    ) -> Reply:
        reply = await self.ask(command, offset, length, flags=flags, data=data)
        if reply.error:
            raise RequestFailed(reply)
        return reply

    async def _read_replies(self) -> None:
        """Hand out replies until the connection ends; then fail all that wait."""
        assert self._parser is not None
        received, self._received = self._received, b""
        try:
            while True:
                for reply in self._parser.feed(received):
                    future = self._waiting.pop(reply.cookie)
                    if not future.done():
                        future.set_result(reply)
                received = await self._recv(1 << 18)
                if not received:
                    self.lost = EOFError("the server closed the connection")
                    break
        except (OSError, EOFError, PeerViolation) as error:
            self.lost = error
        except asyncio.CancelledError:
            self.lost = EOFError("closed by ourselves")
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self.lost)
                future.exception()  # looked at: not everybody waits for every reply


@asynccontextmanager
async def connected(
    address: Address, name: str = "disk", *, structured: bool = True
) -> AsyncIterator[NbdClient]:
    """A client in transmission; closed at the end."""
    one = await NbdClient.open(address)
    try:
        await one.connect(name, structured=structured)
        yield one
    finally:
        await one.close()
