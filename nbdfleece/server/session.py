"""One client connection, from the greeting to its end.

Invariants
  S1  Until transmission begins, a client costs one task, one socket and one buffered option, for no
      longer than the handshake may take.
  S2  The export is held before the client hears that it may use it, and until the last request has
      ended or the session was given up at shutdown.
  S3  Whatever a client does ends its own session and no other.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import TYPE_CHECKING, Final

from nbdfleece.base.limits import SHUTDOWN_HANDSHAKE_S
from nbdfleece.base.units import KiB
from nbdfleece.protocol.nbd.handshake import Closed, Handshake, Transmission
from nbdfleece.protocol.nbd.strings import shown

if TYPE_CHECKING:
    from nbdfleece.datapath.pump import Pump
    from nbdfleece.protocol.nbd.handshake import Outcome
    from nbdfleece.server.export import Export
    from nbdfleece.server.exports import Exports

_log = logging.getLogger(__name__)

_RECEIVE: Final = 64 * KiB  # at most so much of transmission arrives with the last option
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Session:
    """One client.

    Attributes:
        id: Number of the session, never used again.
        peer: Who it is, for people.
        export: What it has chosen; None during the handshake.
        pump: Its requests; None during the handshake.
    """

    def __init__(
        self,
        session_id: int,
        sock: socket.socket,
        exports: Exports,
        *,
        handshake_timeout_s: float | None,
    ) -> None:
        self.id = session_id
        self.peer = describe_peer(sock)
        self.export: Export | None = None
        self.pump: Pump | None = None
        self._sock = sock
        self._exports = exports
        self._handshake = Handshake(exports)
        self._handshake_timeout_s = handshake_timeout_s
        self._handshake_limit: asyncio.Timeout | None = None

    async def run(self) -> None:
        """Serve the client until the connection ends.

        Cancel: closes the connection; requests that have begun run to their end without it.
        """
        try:
            outcome = await self._shake_hands()
            if isinstance(outcome, Transmission):
                await self._transmit(outcome)
            else:
                level = logging.DEBUG if outcome.quiet else logging.WARNING
                _log.log(level, "client %d (%s): %s", self.id, self.peer, outcome.reason)
        except Exception:  # noqa: BLE001 - our own fault: this session dies, and no other (S3)
            _log.exception("client %d (%s): session failed", self.id, self.peer)
        finally:
            if self.pump is None:
                self._sock.close()
            else:
                self.pump.abort("the session is given up")  # no-op after a proper end
            if self.export is not None:
                self.export.release()

    def begin_shutdown(self) -> None:
        """Begin no more requests, finish those that have begun, and end."""
        if self.pump is not None:
            self.pump.finish()
            return
        self._handshake.is_shutting_down = True
        self._limit_handshake(SHUTDOWN_HANDSHAKE_S)

    def abort(self, reason: str) -> None:
        """Close the connection now. Requests that have begun run to their end."""
        if self.pump is not None:
            self.pump.abort(reason)
        else:
            self._limit_handshake(0)

    # --- handshake -----------------------------------------------------------------------------

    async def _shake_hands(self) -> Outcome:
        """Haggle under the time limit."""
        try:
            async with asyncio.timeout(self._handshake_timeout_s) as self._handshake_limit:
                return await self._haggle()
        except TimeoutError:
            # A client that says nothing is as good as a port probe.
            return Closed("the handshake took too long", quiet=True)
        except OSError as error:
            return Closed(f"connection lost during the handshake: {error.strerror}", quiet=True)
        finally:
            self._handshake_limit = None

    async def _haggle(self) -> Outcome:
        """Move bytes between the socket and the handshake machine until that is done."""
        loop = asyncio.get_running_loop()
        machine = self._handshake
        received = b""
        while True:
            for reply in machine.feed(received):
                if isinstance(machine.outcome, Transmission) and self.export is None:
                    self.export = self._exports.chosen(machine.outcome.export)
                    self.export.hold()
                await loop.sock_sendall(self._sock, reply)
            if machine.outcome is not None:
                return machine.outcome
            received = await loop.sock_recv(self._sock, _RECEIVE)
            if not received:
                return machine.end_of_stream()

    def _limit_handshake(self, seconds: float) -> None:
        """Let the handshake take no longer than `seconds` from now."""
        limit = self._handshake_limit
        if limit is None:  # not begun yet, or over
            self._handshake_timeout_s = seconds
            return
        when = asyncio.get_running_loop().time() + seconds
        present = limit.when()
        if not limit.expired() and (present is None or when < present):
            limit.reschedule(when)

    # --- transmission --------------------------------------------------------------------------

    async def _transmit(self, chosen: Transmission) -> None:
        """Serve requests until the connection has ended and all of them have."""
        export = self.export
        assert export is not None, "transmission without an export"
        if export.is_closing or self._handshake.is_shutting_down:
            return  # since the client was told that it may begin
        name = shown(export.options.name)
        _log.info("client %d (%s): opens export %s", self.id, self.peer, name)
        self.pump = export.open_pump(self._sock, chosen)
        # Not the future itself: cancelling this session must not cancel it for the others.
        ended = asyncio.Event()
        self.pump.closed.add_done_callback(lambda _: ended.set())
        self.pump.start()
        await ended.wait()
        reason = self.pump.closed.result() or "disconnects"
        _log.info("client %d (%s): closes export %s: %s", self.id, self.peer, name, reason)


def describe_peer(sock: socket.socket) -> str:
    """Return who is at the other end, for logs and the control plane."""
    try:
        if sock.family == socket.AF_UNIX:
            size = _PEER_CREDENTIALS.size
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            pid, uid, _ = _PEER_CREDENTIALS.unpack(packed)
            return f"unix, uid {uid}, pid {pid}"
        name = sock.getpeername()
    except OSError:
        return "already gone"
    return f"{name[0]}, port {name[1]}"
