"""What the data path asks of a connection, and waiting on one in a coroutine.

A `Stream` is a plain non-blocking socket, or `datapath.tls.TlsStream`, which behaves like one.
`receive` and `send_all` are for handshakes and clients; our own transmission is no coroutine.

Invariants
  V1  `receive` and `send_all` leave nothing registered with the event loop, however they end.
  V2  One task may be in `receive` and another in `send_all`: each watches its own direction only.
      Where TLS wants the other one, which is rare and soon over, they look again and again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

RETRY_S: Final = 0.02  # between looks in vain while the peer is in the middle of a message of TLS


class WantsWrite(BlockingIOError):
    """Receiving goes on when the stream can be written to: it has something of its own to send."""


class WantsRead(BlockingIOError):
    """Sending goes on when the peer has sent more: it is in the middle of a message of TLS."""


class Stream(Protocol):
    """A connected, non-blocking stream of bytes.

    A `send` that raised BlockingIOError, or took less than it was given, is to be repeated with
    the same bytes in front: TLS has encrypted some of them already.
    """

    @property
    def family(self) -> int:
        """The address family of the socket."""

    def fileno(self) -> int:
        """Return the descriptor to wait on, -1 after `close`."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Fill `buffer` with what there is, at least a byte; 0 at the end of the stream.

        Raises:
            BlockingIOError: There is nothing now.
            OSError: The connection failed.
        """

    def send(self, data: memoryview, /) -> int:
        """Send what can be sent of `data` now and return how much that was.

        Raises:
            BlockingIOError: Nothing can be sent now.
            OSError: The connection failed.
        """

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option of the socket."""

    def shutdown(self, how: int, /) -> None:
        """End the stream in good order; `how` is socket.SHUT_WR."""

    def close(self) -> None:
        """Close the socket, whatever state the stream is in."""


async def receive(stream: Stream, limit: int) -> bytes:
    """Return what arrives next, at most `limit` (> 0) bytes; b"" at the end of the stream.

    Raises:
        OSError: The connection failed.

    Cancel: safe, nothing is lost.
    """
    buffer = bytearray(limit)
    with memoryview(buffer) as view:
        while True:
            try:
                return bytes(view[: stream.recv_into(view)])
            except WantsWrite:
                await asyncio.sleep(RETRY_S)
            except (BlockingIOError, InterruptedError):
                await _readable(stream)


async def send_all(stream: Stream, data: bytes) -> None:
    """Send all of `data`.

    Raises:
        OSError: The connection failed.

    Cancel: part of `data` may have gone out; the stream is of no further use.
    """
    with memoryview(data) as view:
        sent = 0
        while sent < len(view):
            try:
                sent += stream.send(view[sent:])
            except WantsRead:
                await asyncio.sleep(RETRY_S)
            except (BlockingIOError, InterruptedError):
                await _writable(stream)


async def _readable(stream: Stream) -> None:
    loop = asyncio.get_running_loop()
    await _ready(stream, loop.add_reader, loop.remove_reader)


async def _writable(stream: Stream) -> None:
    loop = asyncio.get_running_loop()
    await _ready(stream, loop.add_writer, loop.remove_writer)


async def _ready(
    stream: Stream,
    add: Callable[[int, Callable[[], None]], None],
    remove: Callable[[int], bool],
) -> None:
    """Wait for what `add` watches for. Cancel: safe."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    descriptor = stream.fileno()
    add(descriptor, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(descriptor)
