"""The connections to one export of a server: requests go over any of them, lost ones are made anew.

::

    up        some connection is there
    waiting   none is; requests wait for one, until `reconnect_delay_s` is over
    failing   none is, and the time is over: requests fail with EIO at once; still trying
    dead      not trying any more: requests fail with EIO for ever

    up -> waiting -> failing      any of them -> dead: the server broke the protocol, or `yank`
    ^--------'----------'         up -> dead: the last connection is lost and the delay is 0

Invariants
  K1  Several connections are used only while the server says CAN_MULTI_CONN: then what has been
      replied to on one is seen, and flushed, on all.
  K2  Whatever connection joins later is to the same export as the first: of the same size, as
      writable, offering no less. A server that comes back otherwise is refused.
  K3  A request without a reply is sent again on another connection, when `reconnect_delay_s` allows
      that. All requests are such that doing them twice is doing them once.
  K4  What was replied to and not flushed is repeated on a server that comes back, before anything
      else is asked of it, and flushed there (module `unflushed`). A connection joins others only
      if those are known to be to the same run of the server.
  K5  One task, the keeper, makes connections; the node's close ends it and waits for it.

What sending again cannot know, here as in QEMU: whether the server is still at the request on the
lost connection. Were it to carry out a write only after the repetition has been replied to, and
after another write to the same place, it would undo that one. A delay is for servers whose
connections are lost when they are stopped.

Follows: QEMU block/nbd.c (reconnect-delay, open-timeout).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.limits import NBD_CONNECTIONS, NBD_DIAL_TIMEOUT_S, NBD_REQUESTS, NBD_RETRY_S
from nbdfleece.block.drivers.nbd.connection import Connection, Lost
from nbdfleece.block.drivers.nbd.dial import DialError, dial
from nbdfleece.block.drivers.nbd.unflushed import Unflushed
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)

if TYPE_CHECKING:
    from nbdfleece.block.drivers.nbd.dial import Dialled
    from nbdfleece.block.drivers.nbd.target import Target
    from nbdfleece.protocol.nbd.client import Connected
    from nbdfleece.protocol.nbd.client_replies import Reply

_log = logging.getLogger(__name__)

_ABILITIES: Final = (
    NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
)


class Links:
    """The connections of one node.

    Args:
        target: Where they lead.
        reconnect_delay_s: Seconds that requests wait for a lost server; 0: they fail, for ever.
        open_timeout_s: Seconds that `open` tries; 0: once.
    """

    def __init__(self, target: Target, *, reconnect_delay_s: float, open_timeout_s: float) -> None:
        self.target = target
        self._reconnect_delay_s = reconnect_delay_s
        self._open_timeout_s = open_timeout_s
        self._first: Connected | None = None
        self._unflushed: Unflushed | None = None  # None: nothing is ever repeated
        self._flush_has_failed = False  # one of our own, of which the next FLUSH is to tell
        self._up: list[Connection] = []
        self._wanted = 1  # connections that the keeper tries for
        self._in_vain = 0  # how often all were lost in a row, soon and without an answer
        self._up_since = 0.0  # by the loop's clock
        self._dead: str | None = None  # why
        self._patience: asyncio.TimerHandle | None = None  # runs while waiting
        self._is_failing = False
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._changed = asyncio.Event()  # wakes the keeper
        self._keeper: asyncio.Task[None] | None = None

    @property
    def first(self) -> Connected:
        """What the first connection found; holds for all (K2)."""
        assert self._first is not None, "not open"
        return self._first

    # --- life ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the first connection; more may join later.

        Raises:
            CommandError: There is none. Nothing is left open.

        Cancel: safe.
        """
        dialled = await self._dial_first()
        self._first = dialled.connected
        flags = dialled.connected.export.flags
        if self._reconnect_delay_s and flags & NBD_FLAG_SEND_FLUSH:
            self._unflushed = Unflushed()
        self._join(Connection(dialled))
        self._wanted = self._most(dialled.connected)
        # The owner of this task is the node: `close` ends it and waits for its end (K5).
        loop = asyncio.get_running_loop()
        self._keeper = loop.create_task(self._keep(), name=f"keeper of {self.target}")
        self._keeper.add_done_callback(self._keeper_ended)

    async def close(self) -> None:
        """Take leave of the server; whatever is still pending fails."""
        self._die("closed")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        error = None if keeper.cancelled() else keeper.exception()
        if error is not None:  # our bug: no further server, but no request that waits for ever
            _log.critical("%s: internal error", self.target, exc_info=error)
            self._die("internal error")

    def yank(self) -> bool:
        """Give up the server: all requests fail with EIO, now and later.

        Returns:
            Whether there was something to give up.
        """
        was_alive = self._dead is None
        self._die("given up")
        return was_alive

    async def _dial_first(self) -> Dialled:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._open_timeout_s
        attempt = 0
        while True:
            limit_s = NBD_DIAL_TIMEOUT_S
            if self._open_timeout_s:
                limit_s = min(limit_s, max(end - loop.time(), NBD_RETRY_S[0]))
            try:
                return await dial(self.target, limit_s=limit_s)
            except DialError as error:
                pause = _pause(attempt)
                if not error.is_passing or loop.time() + pause >= end:
                    raise
                _log.info("%s; trying again", error)
            attempt += 1
            await asyncio.sleep(pause)

    # --- requests ------------------------------------------------------------------------------

    async def request(
        self,
        where: str,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: memoryview | None = None,
        view: memoryview | None = None,
    ) -> tuple[Reply, Connected]:
        """Have the server carry out a request, as often as it takes.

        Args:
            where: What is attempted, for errors.
            command: NBD_CMD_*; further arguments as in Connection.submit.
            offset: Bytes.
            length: Bytes.
            flags: NBD_CMD_FLAG_*.
            data: Payload of a WRITE; unchanged until this returns.
            view: Where the bytes of a READ go.

        Returns:
            The reply, whatever it says, and the connection that it came from.

        Raises:
            IoError: EIO: there is no server to ask any more, or the flush that makes room for what
                this has changed has failed.

        Cancel: not cancelled.
        """
        unflushed = self._unflushed
        while True:
            self._check_alive(where)
            connection = self._free_connection()
            if connection is None:
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                await waiter
                continue
            newest = 0 if unflushed is None else unflushed.newest
            try:
                reply = await connection.submit(
                    command, offset, length, flags=flags, data=data, view=view
                )
            except Lost as error:
                if not self._reconnect_delay_s:
                    raise IoError(errno.EIO, f"{where}: {error}") from error
                continue
            self._in_vain = 0
            self._wake(1)
            if unflushed is not None and not reply.error:
                if command == NBD_CMD_FLUSH:
                    unflushed.forget(newest)
                elif unflushed.note(command, offset, length, flags, data):
                    await self._make_room(where)
            return reply, connection.connected

    def check_flushes(self, where: str) -> None:
        """Tell, once, of a flush of our own that has failed: it was about everybody's writes.

        Raises:
            IoError: EIO: one has.
        """
        if self._flush_has_failed:
            self._flush_has_failed = False
            raise IoError(errno.EIO, f"{where}: {self.target}: an earlier flush has failed")

    async def _make_room(self, where: str) -> None:
        """Have the server flush, so that nothing need be kept.

        Raises:
            IoError: It could not. `check_flushes` will tell, as writes of others are at stake.
        """
        reply, _ = await self.request(where, NBD_CMD_FLUSH, 0, 0)
        if reply.error:
            self._flush_has_failed = True
            raise IoError(errno.EIO, f"{where}: {self.target}: the flush behind it has failed")

    def _check_alive(self, where: str) -> None:
        """Refuse a request that nobody will carry out.

        Raises:
            IoError: EIO.
        """
        if self._dead is not None:
            raise IoError(errno.EIO, f"{where}: {self.target}: {self._dead}")
        if self._is_failing and not self._up:
            raise IoError(errno.EIO, f"{where}: {self.target}: the connection is lost")

    def _free_connection(self) -> Connection | None:
        """Return the connection with the least to do, or None: all are full, or none is there."""
        best: Connection | None = None
        for connection in self._up:
            if connection.lost.done():  # `_leave` is about to be called
                continue
            if connection.pending < (NBD_REQUESTS if best is None else best.pending):
                best = connection
        return best

    def _wake(self, count: int) -> None:
        """Let so many waiting requests look again."""
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    # --- connections that come and go ------------------------------------------------------------

    async def _keep(self) -> None:
        """Make connections while there are fewer than wanted."""
        attempt = 0
        while not self._is_dead():
            if len(self._up) >= self._wanted:
                self._changed.clear()
                await self._changed.wait()
                continue
            if self._in_vain > 1:  # a server may take connections and drop them for ever
                await asyncio.sleep(_pause(self._in_vain - 2))
            try:
                dialled = await dial(self.target, limit_s=NBD_DIAL_TIMEOUT_S)
                if self._is_dead():  # given up meanwhile
                    dialled.stream.close()
                    return
                self._check_same(dialled)
                connection = await self._begin(dialled)
            except CommandError as error:
                if self._up:
                    # It may allow no more, which the handshake cannot say.
                    _log.debug("%s: no further connection: %s", self.target, error)
                    self._wanted = len(self._up)
                    continue
                _log.log(logging.DEBUG if attempt else logging.WARNING, "%s", error)
                await asyncio.sleep(_pause(attempt))
                attempt += 1
                continue
            if connection is None:
                continue
            if not self._up:
                self._wanted = self._most(dialled.connected)
                _log.info("%s: connected again", self.target)
            attempt = 0
            self._join(connection)

    async def _begin(self, dialled: Dialled) -> Connection | None:
        """Make a connection one that may join (K4); None: it may not, or not any more.

        Raises:
            DialError: The server does not take what has to be repeated, or is gone again.
        """
        connection = Connection(dialled)
        may_join = False
        try:
            if not self._unflushed:
                may_join = True
            elif self._up:
                # It answers, so it has not ended before the new connection was there.
                other = self._up[0]
                if not other.lost.done():
                    view = memoryview(bytearray(1))  # the export is not empty: it was changed
                    await other.submit(NBD_CMD_READ, 0, 1, view=view)
                    may_join = bool(self._up)
            else:
                await self._repeat(connection)
                may_join = True
            may_join = may_join and not self._is_dead() and not connection.lost.done()
        except Lost as error:
            if not self._up:
                raise DialError(f"{self.target}: {error}", is_passing=True) from error
        finally:
            if not may_join:
                connection.disconnect()
        return connection if may_join else None

    async def _repeat(self, connection: Connection) -> None:
        """Repeat what the server may have lost, and have it flushed.

        Raises:
            DialError: The server does not take it.
            Lost: The connection is gone.
        """
        assert self._unflushed is not None
        newest = self._unflushed.newest
        for change in list(self._unflushed):
            data = None if change.data is None else memoryview(change.data)
            reply = await connection.submit(
                change.command, change.offset, change.length, flags=change.flags, data=data
            )
            self._check_repeated(reply)
        self._check_repeated(await connection.submit(NBD_CMD_FLUSH, 0, 0))
        self._unflushed.forget(newest)

    def _check_repeated(self, reply: Reply) -> None:
        """Check that what was repeated has been done.

        Raises:
            DialError: It has not.
        """
        if reply.error:
            text = "the server does not take again what it had taken before"
            raise DialError(f"{self.target}: {text}: error {reply.error}", is_passing=True)

    def _is_dead(self) -> bool:
        return self._dead is not None

    def _check_same(self, dialled: Dialled) -> None:
        """Check that this is the export that the node was opened with (K2); close it if not.

        Raises:
            DialError: It is not.
        """
        was, now = self.first.export, dialled.connected.export
        lacks: str | None = None
        if now.size != was.size:
            lacks = f"its size is {now.size} and was {was.size}"
        elif (now.flags ^ was.flags) & NBD_FLAG_READ_ONLY:
            lacks = "it is read-only, or not, and was the other"
        elif was.flags & ~now.flags & _ABILITIES or now.maximum_block < was.maximum_block:
            lacks = "it offers less than it did"
        elif self.first.extended and not dialled.connected.extended:
            lacks = "its headers are not extended any more"
        elif self._up and not now.flags & NBD_FLAG_CAN_MULTI_CONN:
            lacks = "it allows one connection only"
        elif self.first.contexts.keys() - dialled.connected.contexts.keys():
            lacks = "it tells no block status any more"
        if lacks is not None:
            dialled.stream.close()
            raise DialError(f"{self.target}: not the same export: {lacks}", is_passing=True)

    @staticmethod
    def _most(connected: Connected) -> int:
        """Return how many connections may be used (K1)."""
        return NBD_CONNECTIONS if connected.export.flags & NBD_FLAG_CAN_MULTI_CONN else 1

    def _join(self, connection: Connection) -> None:
        if not self._up:
            self._up_since = asyncio.get_running_loop().time()
        self._up.append(connection)
        connection.lost.add_done_callback(lambda future: self._leave(connection, future))
        self._is_failing = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self._wake(NBD_REQUESTS)

    def _leave(self, connection: Connection, future: asyncio.Future[Lost]) -> None:
        """Do without a connection from now on, or without the server."""
        if connection not in self._up:  # we have closed it ourselves
            return
        self._up.remove(connection)
        if not self._up:
            is_soon = asyncio.get_running_loop().time() - self._up_since < NBD_RETRY_S[-1]
            self._in_vain = self._in_vain + 1 if is_soon else 1
        reason = future.result()
        _log.warning("%s: %s", self.target, reason)
        if reason.by_violation:
            self._die(str(reason))
        elif not self._reconnect_delay_s:
            self._wanted = len(self._up)
            if not self._up:
                self._die(str(reason))
        elif not self._up:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self._reconnect_delay_s, self._lose_patience)
        self._changed.set()
        if self._up:
            self._wake(len(self._waiters))

    def _lose_patience(self) -> None:
        """Let the waiting requests fail."""
        self._patience = None
        self._is_failing = True
        _log.error(
            "%s: not back within %g seconds, requests fail", self.target, self._reconnect_delay_s
        )
        self._wake(len(self._waiters))

    def _die(self, reason: str) -> None:
        """Be dead from now on; the first reason stays."""
        if self._dead is None:
            self._dead = reason
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        up, self._up = self._up, []
        for connection in up:
            connection.disconnect()
        self._changed.set()
        self._wake(len(self._waiters))


def _pause(attempt: int) -> float:
    """Return the seconds to wait behind the attempt with this number, from 0."""
    return NBD_RETRY_S[min(attempt, len(NBD_RETRY_S) - 1)]
