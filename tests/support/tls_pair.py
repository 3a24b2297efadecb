"""Two ends of a connection with TLS between them, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from nbdfleece.datapath.stream import Stream
from nbdfleece.datapath.tls import TlsStream
from tests.support.pki import Pki

# Of a record that is not the peer's; the second is what OpenSSL says from 3.2 on.
FORGED = "TLS: (decryption failed or bad record mac|record layer failure)"


def server_context(folder: Path, *, verify: bool = True) -> ssl.SSLContext:
    """For a server with the folder of a server (tests/support/pki.py)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    if verify:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(folder / "ca-cert.pem")
    return context


def client_context(folder: Path) -> ssl.SSLContext:
    """For a client with the folder of a client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca-cert.pem")
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


def socket_pair(*, tcp: bool = False) -> tuple[socket.socket, socket.socket]:
    """Two connected, non-blocking sockets."""
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
    else:
        ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    return ours, theirs


async def shake_hands(server: TlsStream, client: TlsStream) -> None:
    """Do both sides of the handshake."""
    async with asyncio.TaskGroup() as group:
        group.create_task(server.handshake())
        group.create_task(client.handshake())


async def tls_pair(
    pki: Pki, pair: tuple[socket.socket, socket.socket] | None = None
) -> tuple[TlsStream, TlsStream]:
    """A server's stream and a client's, over `pair` or over a socket pair of their own."""
    ours, theirs = pair or socket_pair()
    server = TlsStream(ours, server_context(pki.server))
    client = TlsStream(
        theirs, client_context(pki.client()), server_side=False, server_hostname="localhost"
    )
    await shake_hands(server, client)
    return server, client


@contextlib.contextmanager
def closing(*streams: Stream):
    """Close all of them at the end."""
    try:
        yield
    finally:
        for stream in streams:
            stream.close()


class InTheMiddle:
    """An engine in the middle of a message of the peer: it cannot send before the rest is here."""

    def __init__(self, engine: ssl.SSLObject, needs: Callable[[], bool]) -> None:
        self._engine = engine
        self._needs = needs

    def write(self, data: memoryview) -> int:
        if self._needs():
            raise ssl.SSLWantReadError
        return self._engine.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


async def relay(one: socket.socket, other: socket.socket, piece: int) -> None:
    """Pass on what comes from `one`, `piece` bytes at a time, and its end."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(one, 1 << 16):
        for start in range(0, len(data), piece):
            await loop.sock_sendall(other, data[start : start + piece])
            await asyncio.sleep(0)  # the receiver sees this piece alone
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def cut_in_pieces(piece: int) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Two ends between which everything travels in pieces of `piece` bytes; both the caller's."""
    ours, near = socket_pair()
    theirs, far = socket_pair()
    with near, far:
        tasks = [
            asyncio.get_running_loop().create_task(relay(near, far, piece)),
            asyncio.get_running_loop().create_task(relay(far, near, piece)),
        ]
        try:
            yield ours, theirs
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
