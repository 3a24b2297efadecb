"""The NBD server: listeners, and the sessions of the clients that they accept.

Every session is a task, all in one TaskGroup; none lets an exception out (session S3).

A server that is full says so: a further client is greeted, and everything that it asks for is
answered NBD_REP_ERR_SHUTDOWN with a text, for TURN_AWAY_S at most. MAX_TURNED_AWAY clients can hear
that at a time; others are greeted and closed at once, which costs next to nothing. The same for a
client whose address, or whose identity (server.session), has all the connections that it may have.
For an export that has, NBD_OPT_INFO and NBD_OPT_GO are answered NBD_REP_ERR_POLICY.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING, Self

from nbdfleece.base.limits import ABORT_TIMEOUT_S, MAX_TURNED_AWAY
from nbdfleece.base.notify import Notifier
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import GREETING
from nbdfleece.server.directory import Gate
from nbdfleece.server.listener import Listener, open_listener
from nbdfleece.server.peer import counted_address
from nbdfleece.server.session import Session, Terms

if TYPE_CHECKING:
    from types import TracebackType

    from nbdfleece.server.addresses import Address
    from nbdfleece.server.audit import ClientNews
    from nbdfleece.server.authz import Authz
    from nbdfleece.server.exports import Exports
    from nbdfleece.server.options import ServerOptions
    from nbdfleece.server.policy import Policy
    from nbdfleece.server.tls import TlsCredentials
    from nbdfleece.server.tokens import Tokens

_log = logging.getLogger(__name__)


class Server:
    """Serves the exports on any number of addresses.

    Used as `async with Server(...) as server`; leaving the block closes what `shutdown` has not
    closed before.

    Args:
        exports: What is served.
        options: Limits.
        policy: Who may do what; None: whoever can connect may do everything.
        credentials: For TLS; None: listeners are TlsMode.OFF.
        tokens: Names that open one export each, or None.

    Attributes:
        listeners: What is listened on.
        sessions: The clients, by number, without those that are being turned away.
        news: Of clients that open exports, and leave.
        credentials: As given last; reloading them is up to whoever gave them, and so with the
            policy.
    """

    def __init__(
        self,
        exports: Exports,
        options: ServerOptions,
        *,
        policy: Policy | None = None,
        credentials: TlsCredentials | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self.listeners: list[Listener] = []
        self.sessions: dict[int, Session] = {}
        self.news: Notifier[ClientNews] = Notifier()
        self.credentials = credentials
        self._exports = exports
        self._first_options = self._options = options
        self._gate = Gate(
            exports, policy, tokens, options.max_per_export, options.max_connections == 1
        )
        self._terms = Terms(self._gate, options, credentials, self.news, self.sessions)
        self._turned_away: dict[int, Session] = {}
        self._tasks = asyncio.TaskGroup()
        self._session_tasks: dict[int, asyncio.Task[None]] = {}
        self._ids = itertools.count(1)
        self._no_sessions = asyncio.Event()
        self._no_sessions.set()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.shutdown(timeout_s=0)
        except BaseException as interrupted:
            await self._tasks.__aexit__(type(interrupted), interrupted, interrupted.__traceback__)
            raise
        # The error of the block is none of the tasks'; it goes on as it is, not in a group.
        await self._tasks.__aexit__(None, None, None)

    def configure(
        self,
        *,
        max_connections: int | None,
        credentials: TlsCredentials | None,
        authz: Authz | None,
    ) -> None:
        """Set what holds for connections to come; nothing is listened on yet.

        Args:
            max_connections: Clients at a time, 0 for any number; None: as many as at the beginning.
            credentials: For TLS.
            authz: Who may go on when TLS has said who it is; None: everybody.
        """
        assert not self.listeners, "clients are being taken"
        options = self._first_options
        if max_connections is not None:
            # Whoever says how many means it, also of clients on one machine.
            options = dataclasses.replace(
                options, max_connections=max_connections, max_per_address=0
            )
        self._options = options
        self.credentials = credentials
        gate = dataclasses.replace(self._gate, is_for_one=options.max_connections == 1)
        self._terms = Terms(gate, options, credentials, self.news, self.sessions, authz)

    def disconnect_all(self, reason: str) -> None:
        """Close all connections now. Requests that have begun run to their end."""
        for session in self._all():
            session.abort(reason)

    async def listen(self, address: Address, tls: TlsMode = TlsMode.OFF) -> Listener:
        """Listen on one more address.

        Args:
            address: Where.
            tls: What connections there may do about TLS.

        Raises:
            ConfigError: That cannot be; nothing has changed.

        Cancel: safe.
        """
        assert tls is TlsMode.OFF or self.credentials is not None, "TLS without credentials"
        listener = await open_listener(address)
        listener.tls = tls
        self.listeners.append(listener)
        listener.start(partial(self._take, tls))
        _log.info("listening on %s", listener.describe())
        return listener

    def unlisten(self, listener: Listener) -> None:
        """Listen on this address no more; its clients stay."""
        self.listeners.remove(listener)
        listener.close()

    async def shutdown(self, *, timeout_s: float) -> bool:
        """Stop accepting, finish the requests that have begun, close all connections.

        Clients that still haggle hear NBD_REP_ERR_SHUTDOWN for a moment.

        Args:
            timeout_s: How long requests may take; 0 closes at once.

        Returns:
            Whether everything had ended by then. If not, connections were cut off, and requests may
            still be running in the graph.

        Cancel: what is left is closed when the server is left.
        """
        for listener in list(self.listeners):
            self.unlisten(listener)
        for session in self._all():
            session.begin_shutdown()
        # What was held has not begun, and does not any more; its connections can end.
        self._exports.let_guests_go()
        if await self._sessions_end(timeout_s):
            return True
        self.disconnect_all("the server shuts down")
        # Cut off clients end at once; a session that waits for a stuck disk never does.
        if not await self._sessions_end(ABORT_TIMEOUT_S):
            for task in list(self._session_tasks.values()):
                task.cancel()
        return False

    # --- private -------------------------------------------------------------------------------

    def _all(self) -> list[Session]:
        return [*self.sessions.values(), *self._turned_away.values()]

    def _take(self, tls: TlsMode, sock: socket.socket) -> None:
        """Begin a session with a new client, or turn it away."""
        refusal = self._too_many(sock)
        if refusal and len(self._turned_away) >= MAX_TURNED_AWAY:
            with sock, contextlib.suppress(OSError):
                sock.send(GREETING)
            return
        _tune(sock)
        session = Session(next(self._ids), sock, self._terms, tls=tls)
        if refusal:
            session.refuse(refusal)
        self._run(session, self._turned_away if refusal else self.sessions)

    def _too_many(self, sock: socket.socket) -> str:
        """Return why there is no room for one more session, or ""."""
        options, sessions, complaints = self._options, self.sessions, self._terms.complaints
        most = options.max_connections
        if most and len(sessions) >= most:
            complaints.say("the server", f"{most} clients, no more (--max-connections)")
            return f"the server is full: {most} clients are connected"
        complaints.end("the server")
        most, place = options.max_per_address, counted_address(sock)
        if not most or not place:
            return ""
        count = sum(session.address == place for session in sessions.values())
        if count < most:
            complaints.end(place)
            return ""
        complaints.say(place, f"{count} clients, no more (--max-connections-per-address)")
        return f"{count} clients of your address are connected: no more"

    def _run(self, session: Session, group: dict[int, Session]) -> None:
        group[session.id] = session
        self._no_sessions.clear()
        task = self._tasks.create_task(session.run(), name=f"session {session.id}")
        self._session_tasks[session.id] = task
        task.add_done_callback(lambda _: self._session_ended(session.id, group))

    def _session_ended(self, session_id: int, group: dict[int, Session]) -> None:
        del group[session_id]
        del self._session_tasks[session_id]
        if not self._session_tasks:
            self._no_sessions.set()

    async def _sessions_end(self, timeout_s: float) -> bool:
        """Wait until there are no sessions; tell whether that came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._no_sessions.wait()
        except TimeoutError:
            return False
        return True


def _tune(sock: socket.socket) -> None:
    """Set what a connection needs: no delay of small replies, and notice of peers that vanish."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # the client is gone already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
