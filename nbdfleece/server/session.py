"""One client connection, from the greeting to its end.

Invariants
  S1  Until transmission begins, a client costs one task, one socket and one buffered option, for no
      longer than the handshake may take, TLS included.
  S2  The export is held before the client hears that it may use it, and until the last request has
      ended or the session was given up at shutdown.
  S3  Whatever a client does ends its own session and no other.
  S4  What a client is allowed is looked up by what the kernel and TLS say of it, TLS only when its
      handshake is over. Bytes received before TLS are never looked at after it began: they would
      have to lie behind STARTTLS, and the machine refuses to go on then.
  S5  Each connection writes one line into the log when it is over (server.audit); those that said
      nothing at all, as port probes do, on the debug level.
  S6  Others get their turn, and the time limit is looked at, between any two options, and between
      any two pieces of one, however fast the client is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import SHUTDOWN_HANDSHAKE_S, TURN_AWAY_S
from nbdfleece.base.units import KiB
from nbdfleece.datapath.stream import receive, send_all
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import Closed, Handshake, Transmission
from nbdfleece.server.audit import Audit, Complaints, quoted
from nbdfleece.server.directory import ClientDirectory
from nbdfleece.server.peer import counted_address, describe_peer, identify, identity_name, proved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdfleece.base.notify import Notifier
    from nbdfleece.datapath.pump import Pump
    from nbdfleece.datapath.stream import Stream
    from nbdfleece.protocol.nbd.handshake import Outcome
    from nbdfleece.server.audit import ClientNews
    from nbdfleece.server.authz import Authz
    from nbdfleece.server.directory import Gate
    from nbdfleece.server.export import Export
    from nbdfleece.server.options import ServerOptions
    from nbdfleece.server.tls import TlsCredentials

_log = logging.getLogger(__name__)

_RECEIVE: Final = 64 * KiB  # at most so much of transmission arrives with the last option


@dataclass(slots=True)
class Terms:
    """What all sessions of a server have in common.

    Attributes:
        gate: Who may see what.
        options: Limits.
        credentials: For TLS; None: there is none.
        authz: Who may go on when TLS has said who it is; None: everybody.
        news: Of clients that open exports, and leave.
        sessions: All that count, by number.
        complaints: About limits that were reached.
    """

    gate: Gate
    options: ServerOptions
    credentials: TlsCredentials | None
    news: Notifier[ClientNews]
    sessions: Mapping[int, Session]
    authz: Authz | None = None
    complaints: Complaints = field(default_factory=Complaints)


class Session:
    """One client.

    Args:
        session_id: Its number.
        sock: Connected, non-blocking; owned by the session.
        terms: See there.
        tls: What the listener says of TLS.

    Attributes:
        id: Number of the session, never used again.
        identity: Who it has been proved to be.
        address: Where it is, for counting; "" on this machine.
        export: What it has chosen; None during the handshake.
        pump: Its requests; None during the handshake.
    """

    def __init__(
        self,
        session_id: int,
        sock: socket.socket,
        terms: Terms,
        *,
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self.id = session_id
        self.identity = identify(sock)
        self.address = counted_address(sock)
        self.export: Export | None = None
        self.pump: Pump | None = None
        self._stream: Stream = sock
        self._sock = sock
        self._terms = terms
        self._audit = Audit(session_id, describe_peer(sock), identity_name(self.identity))
        self._started = asyncio.get_running_loop().time()
        self._has_spoken = False
        self._ending = self._refusal = ""  # why it is ended from outside; why it is turned away
        may_start_tls = tls is not TlsMode.OFF
        self._directory = ClientDirectory(terms.gate, self.identity, may_start_tls=may_start_tls)
        self._handshake = Handshake(self._directory, tls, terms.options.extended_headers)
        self._handshake_timeout_s = terms.options.handshake_timeout_s or None
        self._handshake_limit: asyncio.Timeout | None = None

    @property
    def peer(self) -> str:
        """Where the client is, for people."""
        return self._audit.peer

    @property
    def tls(self) -> str:
        """The version of TLS, or "" for none."""
        return self._audit.tls

    @property
    def identity_name(self) -> str:
        """As whom the client acts; "" for one that has shown nothing, or is being turned away."""
        return "" if self._refusal else self._audit.identity

    @property
    def age_s(self) -> float:
        """Seconds since the connection was accepted."""
        return asyncio.get_running_loop().time() - self._started

    async def run(self) -> None:
        """Serve the client until the connection ends.

        Cancel: closes the connection; requests that have begun run to their end without it.
        """
        reason, level = "given up at shutdown", logging.WARNING
        try:
            self._check_identity_limit()
            outcome = await self._shake_hands()
            if isinstance(outcome, Transmission):
                reason, level = await self._transmit(outcome), logging.INFO
            else:
                reason, level = self._ending_of(outcome)
                if outcome.quiet:
                    with contextlib.suppress(OSError):  # the client is gone already
                        self._stream.shutdown(socket.SHUT_WR)
        except Exception:  # noqa: BLE001 - our own fault: this session dies, and no other (S3)
            reason, level = "internal error", logging.ERROR
            _log.exception("client %d (%s): session failed", self.id, self.peer)
        finally:
            if self.pump is None:
                self._stream.close()
            else:
                self.pump.abort("the session is given up")  # no-op after a proper end
            if self.export is not None:
                self.export.release()
            self._close_audit(reason, level)

    def begin_shutdown(self) -> None:
        """Begin no more requests, finish those that have begun, and end."""
        self._ending = self._ending or "the server shuts down"
        if self.pump is not None:
            self.pump.finish()
            return
        self._handshake.is_shutting_down = True
        self._limit_handshake(SHUTDOWN_HANDSHAKE_S)

    def abort(self, reason: str) -> None:
        """Close the connection now. Requests that have begun run to their end."""
        self._ending = self._ending or reason
        if self.pump is not None:
            self.pump.abort(reason)
        else:
            self._limit_handshake(0)

    def refuse(self, text: str) -> None:
        """Tell the client, for a moment, that it is not served; see Server."""
        self._refusal = text
        self._handshake.is_shutting_down = True
        self._handshake.shutdown_text = text
        self._limit_handshake(TURN_AWAY_S)

    # --- handshake -----------------------------------------------------------------------------

    async def _shake_hands(self) -> Outcome:
        """Haggle under the time limit."""
        try:
            async with asyncio.timeout(self._handshake_timeout_s) as self._handshake_limit:
                return await self._haggle()
        except TimeoutError:
            # A client that says nothing is as good as a port probe.
            return Closed(self._ending or "the handshake took too long", quiet=True)
        except PeerViolation as violation:
            return Closed(str(violation), quiet=False)
        except OSError as error:
            return Closed(f"connection lost during the handshake: {error.strerror}", quiet=True)
        finally:
            self._handshake_limit = None

    async def _haggle(self) -> Outcome:
        """Move bytes between the socket and the handshake machine until that is done.

        Raises:
            PeerViolation: TLS has failed.
            OSError: The connection is lost.
        """
        machine = self._handshake
        received = b""
        while True:
            for reply in machine.feed(received):
                if isinstance(machine.outcome, Transmission) and self.export is None:
                    self.export = self._directory.chosen(machine.outcome.export)
                    self.export.hold()
                await send_all(self._stream, reply)
                await asyncio.sleep(0)  # thousands may have come at once, and none need wait (S6)
            if machine.outcome is not None:
                return machine.outcome
            if machine.wants_tls:
                await self._begin_tls()
            received = await receive(self._stream, _RECEIVE)
            if not received:
                return machine.end_of_stream()
            self._has_spoken = True
            await asyncio.sleep(0)  # nor need there have been a wait (S6)

    async def _begin_tls(self) -> None:
        """Do the TLS handshake, and go on as whom it has proved the client to be.

        Raises:
            PeerViolation: It has failed, or this client may not use the server.
            OSError: The connection is lost.
        """
        terms = self._terms
        assert terms.credentials is not None, "TLS was offered without credentials"
        offer = terms.credentials.offer()
        stream = TlsStream(self._sock, offer.context)
        self._stream = stream
        try:
            await stream.handshake()
        except OSError as error:  # so do clients that do not trust our certificate
            raise PeerViolation(
                f"TLS handshake broken off by the client: {error.strerror}"
            ) from error
        self._audit.tls = stream.version()
        self.identity = proved(self.identity, stream.peer_certificate(), offer.psk)
        self._audit.identity = identity_name(self.identity)
        if terms.authz is not None and not terms.authz.is_allowed(self.identity):
            raise PeerViolation("the authorization object does not allow this client")
        self._check_identity_limit()
        self._directory = ClientDirectory(terms.gate, self.identity, may_start_tls=False)
        self._handshake.tls_begun(self._directory)

    def _check_identity_limit(self) -> None:
        """Turn the client away if there are too many of its identity."""
        most, name = self._terms.options.max_per_identity, self.identity_name
        if not most or not name:
            return
        others = sum(
            other.identity_name == name
            for other in self._terms.sessions.values()
            if other is not self
        )
        complaints = self._terms.complaints
        if others < most:
            complaints.end(name)
        else:
            complaints.say(name, f"{others} clients, no more (--max-connections-per-identity)")
            self.refuse(f"you have {others} connections: no more")

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

    async def _transmit(self, chosen: Transmission) -> str:
        """Serve requests until the connection has ended and all of them have; return why it did."""
        export = self.export
        assert export is not None, "transmission without an export"
        if export.is_cut_off:
            return "the export is removed"
        if self._ending:
            return self._ending
        self._audit.export = export.options.name
        pump = export.open_pump(self._stream, chosen, self._terms.options.transmission)
        self.pump = pump
        _log.info("client %d (%s): opens export %s", self.id, self.peer, quoted(self._audit.export))
        self._terms.news.publish(self._audit.connected())
        # Not the future itself: cancelling this session must not cancel it for the others.
        ended = asyncio.Event()
        pump.closed.add_done_callback(lambda _: ended.set())
        pump.start()
        await ended.wait()
        return pump.closed.result() or self._proper_end()

    # --- the end -------------------------------------------------------------------------------

    def _proper_end(self) -> str:
        return self._ending or "disconnects"

    def _ending_of(self, outcome: Closed) -> tuple[str, int]:
        """Return how a connection ended that chose no export, and the level of its line."""
        if self._refusal:
            return f"turned away: {self._refusal}", logging.DEBUG
        if not outcome.quiet:
            return outcome.reason, logging.WARNING
        return outcome.reason, logging.INFO if self._has_spoken else logging.DEBUG

    def _close_audit(self, reason: str, level: int) -> None:
        audit, pump = self._audit, self.pump
        audit.duration_s = self.age_s
        audit.refused = self._directory.refused
        if pump is not None:
            audit.bytes_read, audit.bytes_written = pump.bytes_read, pump.bytes_written
            audit.requests = pump.requests
        audit.write(reason, level)
        if pump is not None:
            self._terms.news.publish(audit.disconnected(reason))
