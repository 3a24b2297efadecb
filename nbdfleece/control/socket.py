"""The control socket: listens, accepts monitors, ends them.

One daemon per socket: the listener refuses a path at which somebody listens, and replaces what a
dead daemon has left. Only the owner may connect (mode 0600, from the first moment).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING

from nbdfleece.base.errors import ConfigError, InUse
from nbdfleece.base.limits import MAX_QMP_MONITORS
from nbdfleece.control.commands.general import version
from nbdfleece.control.monitor import Monitor
from nbdfleece.server.addresses import UnixAddress
from nbdfleece.server.listener import Listener, open_listener

if TYPE_CHECKING:
    from nbdfleece.control.command import Context

_log = logging.getLogger(__name__)


class Control:
    """The control socket at `path`; tasks run in the owner's TaskGroup.

    Args:
        path: Where.
        tasks: Holds a task for each monitor.
    """

    def __init__(self, path: str, tasks: asyncio.TaskGroup) -> None:
        self._path = path
        self._tasks = tasks
        self._listener: Listener | None = None
        self._monitors: dict[Monitor, asyncio.Task[None]] = {}

    async def listen(self) -> None:
        """Take the path; clients wait in the queue until `start`.

        Raises:
            InUse: A daemon listens there.
            ConfigError: It cannot be.
        """
        try:
            self._listener = await open_listener(UnixAddress(self._path))
        except ConfigError as error:
            if _answers(self._path):
                raise InUse(
                    f"control socket '{self._path}': another daemon is listening there"
                ) from error
            raise ConfigError(f"control socket: {error}") from error

    async def wait_for_client(self) -> None:
        """Return when a client waits to be accepted.

        Cancel: safe.
        """
        assert self._listener is not None, "listen first"
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        for sock in self._listener.sockets:
            loop.add_reader(sock, came.set)
        try:
            await came.wait()
        finally:
            for sock in self._listener.sockets:
                loop.remove_reader(sock)

    def start(self, context: Context) -> None:
        """Accept monitors."""
        assert self._listener is not None, "listen first"
        self._listener.start(partial(self._take, context))

    def close(self) -> None:
        """Accept no more, and give the path back. Idempotent."""
        if self._listener is not None:
            self._listener.close()

    async def stop(self, *, timeout_s: float) -> bool:
        """Accept no more, let running commands end, close all monitors.

        Args:
            timeout_s: How long commands may take; then they are abandoned.

        Returns:
            Whether all had ended by then.
        """
        self.close()
        for monitor in self._monitors:
            monitor.stop()
        running = list(self._monitors.values())
        if not running:
            return True
        _, late = await asyncio.wait(running, timeout=timeout_s)
        for task in late:
            task.cancel()
        return not late

    def _take(self, context: Context, sock: socket.socket) -> None:
        """Begin a monitor, or turn the client away."""
        if len(self._monitors) >= MAX_QMP_MONITORS:
            _log.warning("control socket: %d monitors, no more", len(self._monitors))
            sock.close()
            return
        monitor = Monitor(sock, context, version())
        task = self._tasks.create_task(monitor.run())
        self._monitors[monitor] = task
        task.add_done_callback(partial(self._forget, monitor))

    def _forget(self, monitor: Monitor, _task: asyncio.Task[None]) -> None:
        del self._monitors[monitor]


def _answers(path: str) -> bool:
    """Tell whether somebody listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
    return True
