"""One connection to the control socket: requests in, answers and events out.

Invariants
  M1  Requests are carried out one after another; the next is read when the answer of the last is
      queued and there is room for more.
  M2  Answers are never dropped. Events wait in the same queue, at most MAX_QMP_QUEUE of them; the
      oldest go first, and the monitor is told how many.
  M3  Nobody waits for a monitor but itself: queuing is synchronous.
  M4  A command that runs when its monitor goes away, or is told to stop, runs to its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import MAX_QMP_QUEUE
from nbdfleece.control.dispatch import Dispatcher
from nbdfleece.protocol.qmp import messages
from nbdfleece.protocol.qmp.framing import BadMessage, Framer, TooMuch
from nbdfleece.protocol.qmp.values import encode_shown

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.values import Json

_log = logging.getLogger(__name__)

_READ: Final = 64 * 1024
_LINGER_S: Final = 5.0  # for the client to take the last answers
_MAX_ANSWERS: Final = 64  # waiting to be sent; then no more requests are read


class Monitor:
    """A monitor from greeting to close.

    Args:
        sock: Connected and non-blocking; owned by the monitor.
        context: What its commands work on.
        version: As `query-version` gives it, for the greeting.
    """

    def __init__(self, sock: socket.socket, context: Context, version: Json) -> None:
        self._sock = sock
        self._context = context
        self._version = version
        self._dispatcher = Dispatcher(context)
        self._queue: deque[tuple[bool, bytes]] = deque()  # (is an event, the message)
        self._events = 0  # in the queue
        self._lost = 0
        self._changed = asyncio.Event()  # the queue is, or was, not what a waiter wants it to be
        self._ending = False  # nothing more is queued; send what is there
        self._busy = False  # a command is running
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until the client leaves, or `stop`.

        Cancel: drops the connection, and abandons a running command.
        """
        unsubscribe = self._context.events.published.subscribe(self._event)
        self._put(encode_shown(messages.greeting(self._version)))
        try:
            async with asyncio.TaskGroup() as tasks:
                self._reader = tasks.create_task(self._read())
                self._writer = tasks.create_task(self._write())
        finally:
            unsubscribe()
            self._sock.close()

    def stop(self) -> None:
        """Begin no further request; end when the running one is answered."""
        self._ending = True
        self._changed.set()
        if not self._busy and self._reader is not None:
            self._reader.cancel()

    # --- in ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            await self._read_requests()
        except TooMuch as error:
            self._put(encode_shown(_refusal(str(error))))
        except OSError as error:
            _log.debug("monitor: %s", error)
        finally:
            self._ending = True
            self._changed.set()
            if self._writer is not None:
                loop = asyncio.get_running_loop()
                loop.call_later(_LINGER_S, self._writer.cancel)

    async def _read_requests(self) -> None:
        loop = asyncio.get_running_loop()
        framer = Framer()
        while not self._ending:
            data = await loop.sock_recv(self._sock, _READ)
            if not data:
                return
            for message in framer.feed(data):
                await self._handle(message)
                if self._is_ending():
                    return

    async def _handle(self, message: Mapping[str, Json] | BadMessage) -> None:
        if isinstance(message, BadMessage):
            self._put(encode_shown(_refusal(message.text)))
        else:
            self._busy = True
            try:
                self._put(encode_shown(await self._dispatcher.answer(message)))
            finally:
                self._busy = False
        # Only the writer can end this wait, and it waits for the client alone.
        while len(self._queue) - self._events > _MAX_ANSWERS and not self._ending:
            self._changed.clear()
            await self._changed.wait()

    # --- out ---------------------------------------------------------------------------------

    def _is_ending(self) -> bool:
        return self._ending

    def _put(self, message: bytes) -> None:
        self._queue.append((False, message))
        self._changed.set()

    def _event(self, event: Json) -> None:
        if self._ending or self._dispatcher.negotiating:
            return
        if self._events >= MAX_QMP_QUEUE:
            self._drop_oldest_event()
        self._queue.append((True, encode_shown(event)))
        self._events += 1
        self._changed.set()

    def _drop_oldest_event(self) -> None:
        for index, (is_event, _) in enumerate(self._queue):
            if is_event:
                del self._queue[index]
                break
        self._events -= 1
        self._lost += 1

    async def _write(self) -> None:
        try:
            await self._write_queue()
        except OSError as error:
            _log.debug("monitor: %s", error)
            self.stop()

    async def _write_queue(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                if self._ending:
                    return
                self._changed.clear()
                await self._changed.wait()
            if self._lost:
                _log.warning("monitor: too slow, %d events were dropped", self._lost)
                self._lost = 0
            is_event, message = self._queue.popleft()
            self._events -= is_event
            await loop.sock_sendall(self._sock, message)
            self._changed.set()


def _refusal(text: str) -> Json:
    return messages.failure(CommandError.qmp_class, text, messages.ABSENT)
