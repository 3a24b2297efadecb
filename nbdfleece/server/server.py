"""The NBD server: listeners, and the sessions of the clients that they accept.

Every session is a task, all in one TaskGroup; none lets an exception out (session S3).

A server that is full greets a further client and closes: the client sees an end of stream instead
of a refused connection, and we spend nothing on it. It is told no reason, since that would take
a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from nbdfleece.base.limits import ABORT_TIMEOUT_S, HANDSHAKE_TIMEOUT_S, MAX_CONNECTIONS
from nbdfleece.protocol.nbd.handshake import GREETING
from nbdfleece.server.listener import Listener, open_listener
from nbdfleece.server.session import Session

if TYPE_CHECKING:
    from types import TracebackType

    from nbdfleece.server.addresses import Address
    from nbdfleece.server.exports import Exports

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits of one server.

    Attributes:
        max_connections: Clients at a time, over all listeners; 0 for no limit.
        handshake_timeout_s: From the greeting to transmission; 0 for no limit.
    """

    max_connections: int = MAX_CONNECTIONS
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S


class Server:
    """Serves the exports on any number of addresses.

    Used as `async with Server(...) as server`; leaving the block closes what `shutdown` has not
    closed before.

    Attributes:
        listeners: What is listened on.
        sessions: The clients, by number.
    """

    def __init__(self, exports: Exports, options: ServerOptions) -> None:
        self.listeners: list[Listener] = []
        self.sessions: dict[int, Session] = {}
        self._exports = exports
        self._options = options
        self._tasks = asyncio.TaskGroup()
        self._session_tasks: dict[int, asyncio.Task[None]] = {}
        self._ids = itertools.count(1)
        self._was_full = False
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

    async def listen(self, address: Address) -> Listener:
        """Listen on one more address.

        Raises:
            ConfigError: That cannot be; nothing has changed.

        Cancel: safe.
        """
        listener = await open_listener(address)
        self.listeners.append(listener)
        listener.start(self._take)
        _log.info("listening on %s", listener.address.describe())
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
        for session in self.sessions.values():
            session.begin_shutdown()
        if await self._sessions_end(timeout_s):
            return True
        for session in list(self.sessions.values()):
            session.abort("the server shuts down")
        # Cut off clients end at once; a session that waits for a stuck disk never does.
        if not await self._sessions_end(ABORT_TIMEOUT_S):
            for task in list(self._session_tasks.values()):
                task.cancel()
        return False

    # --- private -------------------------------------------------------------------------------

    def _take(self, sock: socket.socket) -> None:
        """Begin a session with a new client, or turn it away."""
        limit = self._options.max_connections
        if limit and len(self.sessions) >= limit:
            if not self._was_full:
                _log.warning("%d clients are connected: turning others away", limit)
            self._was_full = True
            _turn_away(sock)
            return
        self._was_full = False
        _tune(sock)
        session = Session(
            next(self._ids),
            sock,
            self._exports,
            handshake_timeout_s=self._options.handshake_timeout_s or None,
        )
        self.sessions[session.id] = session
        self._no_sessions.clear()
        task = self._tasks.create_task(session.run(), name=f"session {session.id}")
        self._session_tasks[session.id] = task
        task.add_done_callback(lambda _: self._session_ended(session.id))

    def _session_ended(self, session_id: int) -> None:
        del self.sessions[session_id]
        del self._session_tasks[session_id]
        if not self.sessions:
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


def _turn_away(sock: socket.socket) -> None:
    """Greet and close."""
    with sock, contextlib.suppress(OSError):
        sock.send(GREETING)
