"""From an address to a connection in transmission: socket, TLS, handshake.

Invariants
  - Where TLS is asked for nothing about the export is said or heard in plaintext, and a server that
    has no TLS is refused.
  - Every attempt has its time, and leaves nothing open when it fails.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from nbdfleece.base.errors import CommandError, OptionRefused, PeerViolation
from nbdfleece.base.limits import NBD_KEEPALIVE_S
from nbdfleece.base.units import KiB
from nbdfleece.block.drivers.nbd.target import Target, UnixServer
from nbdfleece.datapath.stream import receive, send_all
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.protocol.nbd import client
from nbdfleece.protocol.nbd.constants import (
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_UNKNOWN,
)
from nbdfleece.protocol.nbd.names import option_reply_name
from nbdfleece.protocol.nbd.strings import shown
from nbdfleece.protocol.nbd.talk import Conversation

if TYPE_CHECKING:
    from nbdfleece.datapath.stream import Stream
    from nbdfleece.protocol.nbd.client import Connected
    from nbdfleece.protocol.nbd.talk import Talk

T = TypeVar("T")

_RECEIVE: Final = 64 * KiB


class DialError(CommandError):
    """No connection could be made.

    Attributes:
        is_passing: It may be otherwise in a moment: nobody listens, or the export is not there.
    """

    def __init__(self, text: str, *, is_passing: bool) -> None:
        super().__init__(text)
        self.is_passing = is_passing


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection in transmission.

    Attributes:
        stream: Non-blocking; whoever has this owns it.
        connected: What the handshake has reached.
        leftover: Received behind the handshake.
    """

    stream: Stream
    connected: Connected
    leftover: bytes


async def dial(target: Target, *, limit_s: float) -> Dialled:
    """Connect to a server and enter transmission with the export, within `limit_s` seconds.

    Raises:
        DialError: It could not be.

    Cancel: safe.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await _dial(target)
    except TimeoutError as error:
        text = f"no answer within {limit_s:g} seconds"
        raise DialError(f"{target}: {text}", is_passing=True) from error
    except EOFError as error:
        raise DialError(f"{target}: the server closed the connection", is_passing=True) from error
    except PeerViolation as error:
        raise DialError(f"{target}: {error}", is_passing=False) from error
    except OptionRefused as error:
        raise _refused(target, error) from error
    except OSError as error:
        raise DialError(f"{target}: {_why(error)}", is_passing=True) from error
    except ValueError as error:  # a host name that is none
        raise DialError(f"{target}: {error}", is_passing=False) from error


def _why(error: OSError) -> str:
    """Return the reason in the system's words, which asyncio replaces by its own."""
    text = error.strerror or str(error)
    if error.errno and text.startswith("Connect call failed"):
        return os.strerror(error.errno)
    return text


async def _dial(target: Target) -> Dialled:
    # Before connecting, and each time: certificates get renewed while a node is open.
    context = None if target.tls is None else target.tls.context()
    sock = await _connect(target)
    stream: Stream = sock
    try:
        if context is None or target.tls is None:
            conversation = await _run(stream, _talk_in_plaintext(target))
        else:
            greeted = await _run(stream, client.begin_tls(no_zeroes=True))
            client.check_tls_may_begin(greeted)
            secure = TlsStream(
                sock, context, server_side=False, server_hostname=target.tls.hostname
            )
            stream = secure
            await secure.handshake()
            conversation = await _run(stream, _haggle(target, no_zeroes=greeted.result is True))
        connected = conversation.result
        assert connected is not None, "the talk is over"
        _check(target, connected)
    except BaseException:
        stream.close()
        raise
    return Dialled(stream, connected, conversation.leftover)


def _talk_in_plaintext(target: Target) -> Talk[Connected]:
    no_zeroes = yield from client.greet(no_zeroes=True)
    return (yield from _haggle(target, no_zeroes=no_zeroes))


def _haggle(target: Target, *, no_zeroes: bool) -> Talk[Connected]:
    return client.haggle(
        target.export,
        no_zeroes=no_zeroes,
        structured=True,
        contexts=[target.context],
        extended=True,
    )


def _check(target: Target, connected: Connected) -> None:
    """Check that the export can be used.

    Raises:
        DialError: It cannot.
    """
    minimum = connected.export.minimum_block
    if minimum > 1:
        raise DialError(f"{target}: it serves blocks of {minimum} bytes only", is_passing=False)
    if target.dirty_bitmap is not None and target.dirty_bitmap not in connected.contexts:
        name = shown(target.dirty_bitmap)
        raise DialError(f"{target}: requested x-dirty-bitmap {name} not found", is_passing=False)


# --- the socket -----------------------------------------------------------------------------------


async def _connect(target: Target) -> socket.socket:
    """Return a connected socket: of a name's addresses, the first that answers."""
    server = target.server
    if isinstance(server, UnixServer):
        return await _open(socket.AF_UNIX, server.path)
    try:
        ipaddress.ip_address(server.host)
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM
        )
    else:
        # An address needs no resolver, which may hang.
        flags = socket.AI_NUMERICHOST
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=flags)
    last = OSError(f"'{server.host}' has no address")
    for family, _, _, _, address in found:
        try:
            return await _open(socket.AddressFamily(family), address)
        except OSError as error:
            last = error
    raise last


async def _open(family: socket.AddressFamily, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]
        sock.getpeername()  # a unix socket with a full queue looks connected, and is not
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, NBD_KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, NBD_KEEPALIVE_S // 4)
    except BaseException:
        sock.close()
        raise
    return sock


async def _run(stream: Stream, talk: Talk[T]) -> Conversation[T]:
    """Run a talk to its end.

    Raises:
        EOFError: The server closed the connection.
        OSError: It is broken.
        OptionRefused, PeerViolation: As the talk.
    """
    conversation = Conversation(talk)
    received = b""
    while True:
        for outgoing in conversation.feed(received):
            await send_all(stream, outgoing)
        if conversation.is_over:
            return conversation
        received = await receive(stream, _RECEIVE)
        if not received:
            raise EOFError


# --- words --------------------------------------------------------------------------------------


def _refused(target: Target, error: OptionRefused) -> DialError:
    is_passing = error.reply in (NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_SHUTDOWN)
    text = f"{target}: refused with {option_reply_name(error.reply)}"
    if error.reply == NBD_REP_ERR_TLS_REQD:
        text = f"{target}: the server requires TLS"
    if error.text:
        text += f": {shown(error.text)}"
    return DialError(text, is_passing=is_passing)
