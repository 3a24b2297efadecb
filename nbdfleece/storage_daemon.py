"""`nbdfleece storage-daemon`: a daemon put together by qemu-storage-daemon's own options.

Options are carried out in the order in which they stand; the first that fails ends it all. Then the
monitors begin to answer. There is no state folder, so disks and snapshots of `fleece-...` commands
are not to be had here; nodes and exports are.

The end, within DRAIN_TIMEOUT_S, by TERM, INT, HUP or `quit`: no new connections, requests that have
begun are finished, exports and nodes go.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from nbdfleece.base import keyval
from nbdfleece.base.errors import CommandError, ConfigError, IoError, NbdfleeceError, NotFound
from nbdfleece.base.limits import DRAIN_TIMEOUT_S
from nbdfleece.block.drain import started
from nbdfleece.block.graph import Graph
from nbdfleece.block.registry import add_from_options
from nbdfleece.control.command import Context
from nbdfleece.control.commands import COMMANDS
from nbdfleece.control.events import Events
from nbdfleece.control.objects import Objects
from nbdfleece.control.socket import Control
from nbdfleece.datapath.memory import keep_freed_memory
from nbdfleece.datapath.poller import new_event_loop
from nbdfleece.fleece.backup import Backups
from nbdfleece.fleece.fleece import Fleece
from nbdfleece.fleece.io_limits import watch_limits
from nbdfleece.fleece.store import StateFolder
from nbdfleece.jobs.manager import JobManager
from nbdfleece.lifetime import Lifetime
from nbdfleece.protocol.qmp.keyval import typed
from nbdfleece.protocol.qmp.schema import Arguments, Boolean, String, Struct
from nbdfleece.server.exports import Exports
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.server import Server
from nbdfleece.server.service import NbdService
from nbdfleece.server.tokens import Tokens, clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.block.node import Node
    from nbdfleece.protocol.qmp.values import Json
    from nbdfleece.server.export import Export

_log = logging.getLogger(__name__)

_DAEMON_UMASK: Final = 0o027

EXIT_DONE: Final = 0
EXIT_FORCED: Final = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the program was asked for.

    Attributes:
        options: (name, value) of those that make something, in order: `--blockdev`, `--object`,
            `--nbd-server`, `--export`, `--chardev`, `--monitor`.
        pid_file: Where our process id goes, or None.
        daemonize: Go into the background when all of it is there.
    """

    options: tuple[tuple[str, str], ...]
    pid_file: Path | None
    daemonize: bool


def serve(settings: Settings) -> int:
    """Run until told to stop; return the exit code.

    Raises:
        NbdfleeceError: It cannot start. The text names the option.
    """
    ready: Callable[[], None] = _nothing
    if settings.daemonize:
        ready_fd = _fork()
        if ready_fd is None:
            return EXIT_DONE

        def ready() -> None:
            _leave_terminal(ready_fd)

    daemon = StorageDaemon(settings, ready)
    keep_freed_memory()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        code = runner.run(daemon.run())
    if daemon.failure is not None:
        raise daemon.failure
    return code


class StorageDaemon:
    """One run.

    Args:
        settings: What was asked for.
        ready: Called when all of it is there.

    Attributes:
        failure: Why it could not start, or None.
    """

    def __init__(self, settings: Settings, ready: Callable[[], None]) -> None:
        self.failure: NbdfleeceError | None = None
        self._settings = settings
        self._ready = ready
        self._graph = Graph()
        self._exports = Exports(self._graph)
        self._lifetime = Lifetime(DRAIN_TIMEOUT_S, self._end_by_force)
        self._chardevs: dict[str, Control] = {}
        self._monitors: dict[str, Control] = {}  # those of _chardevs that are to answer
        self._pid_file: Path | None = None

    async def run(self) -> int:
        """Do what the options say, serve, stop; return the exit code.

        Cancel: not cancelled.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._lifetime.stop)
        server = Server(self._exports, ServerOptions())
        async with asyncio.TaskGroup() as tasks, server:
            jobs = JobManager(tasks)
            context = self._context(server, jobs)
            watch_limits(self._graph, self._exports, tasks)
            try:
                is_complete = await self._lifetime.start(self._carry_all_out(context, tasks))
                if is_complete:
                    self._write_pid_file()
            except NbdfleeceError as error:
                self.failure = error
                is_complete = False
            if is_complete:
                for control in self._monitors.values():
                    control.start(context)
                self._ready()
                await self._lifetime.stopping.wait()
            return await self._stop(server, jobs)

    def _context(self, server: Server, jobs: JobManager) -> Context:
        events = Events()
        server.news.subscribe(events.client_news)
        self._exports.removed.subscribe(events.export_removed)
        jobs.news.subscribe(events.job_news)
        # Never opened: whatever needs it is refused.
        fleece = Fleece(self._graph, self._exports, StateFolder(Path("/"), None), Tokens(clock))
        return Context(
            self._graph,
            self._exports,
            fleece,
            server,
            events,
            self._lifetime.stopping.set,
            datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z"),
            NbdService(server, self._exports, is_permanent=False),
            Objects(),
            jobs,
            Backups(fleece, self._graph, jobs),
        )

    # --- options ---------------------------------------------------------------------------------

    async def _carry_all_out(self, context: Context, tasks: asyncio.TaskGroup) -> None:
        """Do what the options say.

        Raises:
            CommandError: One cannot be carried out.
        """
        for name, value in self._settings.options:
            await self._carry_out(context, tasks, name, value)

    async def _carry_out(
        self, context: Context, tasks: asyncio.TaskGroup, name: str, value: str
    ) -> None:
        """Do what one option says.

        Raises:
            CommandError: It cannot be done; the text begins with the option.
        """
        try:
            if name == "--blockdev":
                options = context.objects.resolved(_members(value, "driver"))
                assert isinstance(options, Mapping), "it was"
                await add_from_options(self._graph, options)
            elif name == "--chardev":
                await self._add_chardev(tasks, value)
            elif name == "--monitor":
                self._add_monitor(value)
            else:
                await _run(context, name, value)
        except NbdfleeceError as error:
            raise CommandError(f"{name} {value}: {error}") from error

    async def _add_chardev(self, tasks: asyncio.TaskGroup, value: str) -> None:
        """Listen on a unix socket.

        Raises:
            NbdfleeceError: It is something else, or cannot be.
        """
        given = _chardev_options(value)
        kind, chardev = given.pop("backend", ""), given.pop("id", "")
        path = given.pop("path", "")
        is_server = keyval.Spelled(given.pop("server", "off")).boolean("server")
        waits = keyval.Spelled(given.pop("wait", "on")).boolean("wait")
        if kind != "socket":
            raise CommandError(f"'{kind}' is not a character device of this program; 'socket' is")
        if not chardev:
            raise CommandError("Parameter 'id' is missing")
        if given:
            raise CommandError(f"Invalid parameter '{next(iter(given))}'")
        if not path or not is_server:
            raise CommandError("only unix sockets with server=on and a path can be listened on")
        if chardev in self._chardevs:
            raise CommandError(f"Duplicate ID '{chardev}' for chardev")
        control = Control(path, tasks)
        await control.listen()
        self._chardevs[chardev] = control
        if waits:
            _log.warning("waiting for connection on: unix:%s", path)
            await control.wait_for_client()

    def _add_monitor(self, value: str) -> None:
        """Let a character device answer as a monitor.

        Raises:
            CommandError: It is not there, or has a monitor, or another kind is asked for.
        """
        members = typed(_MONITOR, _members(value, "chardev"))
        assert isinstance(members, Mapping), "an object stays one"
        _MONITOR.check(members, "")
        if members.get("mode", "control") != "control":
            raise CommandError("only mode=control is there")
        chardev = str(members["chardev"])
        control = self._chardevs.get(chardev)
        if control is None:
            raise CommandError(f'chardev "{chardev}" not found')
        if chardev in self._monitors:
            raise CommandError(f"Device '{chardev}' is in use")
        self._monitors[chardev] = control

    def _write_pid_file(self) -> None:
        """Write the file, and keep it locked, as others tell by the lock whether we live.

        Raises:
            ConfigError: It cannot be written, or another program has it.
        """
        path = self._settings.pid_file
        if path is None:
            return
        try:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            # Held open, and so locked, until the process ends.
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise ConfigError(
                f"cannot create PID file: Could not create '{path}': {error.strerror}"
            ) from error
        self._pid_file = path.absolute()

    # --- the end ---------------------------------------------------------------------------------

    async def _stop(self, server: Server, jobs: JobManager) -> int:
        """End everything in order; return the exit code."""
        with self._lifetime.end() as ending:
            is_clean = await server.shutdown(timeout_s=ending.left())
            for control in self._chardevs.values():
                is_clean &= await control.stop(timeout_s=ending.left())
            for close in (jobs.close, self._close_nodes):  # a job that is stuck keeps no node open
                is_clean &= await ending.close(close)
        if not is_clean:
            self._end_by_force(self._lifetime.late)
        self._remove_pid_file()
        return EXIT_DONE

    def _end_by_force(self, why: str) -> NoReturn:
        self._remove_pid_file()
        _log.error("stopped by force: %s", why)
        # Threads that are stuck in the kernel must not keep the program from ending.
        os._exit(EXIT_FORCED)

    def _remove_pid_file(self) -> None:
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)

    async def _close_nodes(self) -> bool:
        """Remove the exports, flush the nodes, and remove those, parents first.

        All at a time: one that does not answer keeps no other from being closed.

        Returns:
            Whether all went well; what did not is logged.

        Cancel: the rest stays open.
        """
        served = [(export, export.node) for export in self._exports]
        for export, _ in served:
            self._exports.cut_off(export.options.id)
        begun: set[Node] = set()
        async with asyncio.TaskGroup() as tasks:
            closing = [
                tasks.create_task(self._can_close(node, begun))
                for node in self._graph
                if not node.parents
            ]
            closing += [
                tasks.create_task(self._can_close_behind(export, node, begun))
                for export, node in served
            ]
        is_clean = all(task.result() for task in closing)
        # What stood below a filter of I/O limits that has gone by itself (`watch_limits`).
        while left := [node for node in self._graph if not node.parents and node not in begun]:
            for node in left:
                is_clean &= await self._can_close(node, begun)
        return is_clean

    async def _can_close_behind(self, export: Export, node: Node, begun: set[Node]) -> bool:
        """Close a node when its export is not used any more; or say why not."""
        await export.wait_unused()
        if node.parents or node in begun:
            return True
        return await self._can_close(node, begun)

    async def _can_close(self, node: Node, begun: set[Node]) -> bool:
        """Close a node, and then those of its children that nobody else uses; or say why not."""
        begun.add(node)
        is_clean = True
        below = [edge.node for edge in node.children]
        try:
            if not node.read_only and self._graph.get(node.name) is node:  # else it has gone
                await started(node.flush())
        except IoError as error:
            _log.error("node '%s': last flush failed: %s", node.name, error)
            is_clean = False
        try:
            with contextlib.suppress(NotFound):
                await self._graph.remove(node)
        except CommandError as error:
            _log.error("node '%s': %s", node.name, error)
            return False
        for child in below:
            if self._graph.get(child.name) is child and not child.parents and child not in begun:
                is_clean &= await self._can_close(child, begun)
        return is_clean


async def _run(context: Context, name: str, value: str) -> None:
    """Carry out an option that is a command of QMP.

    Raises:
        CommandError: It cannot be done.
    """
    command, implied = _COMMANDS[name]
    members = _members(value, implied)
    kind = COMMANDS[command].arguments
    if name == "--nbd-server":
        members = _with_legacy_address(members)
    spelled = typed(kind, members)
    assert isinstance(spelled, Mapping), "an object stays one"
    await COMMANDS[command].run(context, Arguments(kind, spelled))


def _with_legacy_address(members: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the options of a server with the address as the command has it: within `data`."""
    address = members.get("addr")
    if not isinstance(address, Mapping) or "type" not in address:
        return members
    data = {name: value for name, value in address.items() if name != "type"}
    return {**members, "addr": {"type": address["type"], "data": data}}


# `pretty` is about line breaks in the answers, which no parser sees.
_MONITOR: Final = Struct(
    {"chardev": String()}, {"mode": String(), "id": String(), "pretty": Boolean()}
)
_COMMANDS: Final = {
    "--object": ("object-add", "qom-type"),
    "--nbd-server": ("nbd-server-start", None),
    "--export": ("block-export-add", "type"),
}


def _members(text: str, implied: str | None) -> Mapping[str, Json]:
    """Return the object that an option's value stands for, be it JSON or key=value.

    Raises:
        CommandError: It stands for none.
    """
    if not text.startswith("{"):
        return keyval.parse(text, implied)
    try:
        found: Json = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"JSON parse error, {error}") from error
    assert isinstance(found, Mapping), "it begins like an object"
    return found


def _chardev_options(text: str) -> dict[str, str]:
    """Return the options of a character device; `server` is server=on, and `nowait` wait=off."""
    found: dict[str, str] = {}
    for number, (key, value) in enumerate(keyval.split(text)):
        if value is not None:
            found[key] = value
        elif not number:
            found["backend"] = key
        elif key.startswith("no"):
            found[key.removeprefix("no")] = "off"
        else:
            found[key] = "on"
    return found


# --- the background ------------------------------------------------------------------------------


def _nothing() -> None:
    """Stay where we are."""


def _fork() -> int | None:
    """Go on in a child process, without a terminal.

    Returns:
        In the child, where to tell the parent that all is well; in the parent None, once it is.

    Raises:
        CommandError: In the parent: the child has failed, and said why.
    """
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        with open(told, "rb") as pipe:
            if pipe.read(1):
                return None
        os._exit(EXIT_FORCED)  # the child has said why
    os.close(told)
    os.setsid()
    if os.fork():
        os._exit(EXIT_DONE)
    os.umask(_DAEMON_UMASK)
    return tell


def _leave_terminal(ready_fd: int) -> None:
    """Let go of terminal and folder, and let the parent end."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.write(ready_fd, b"\0")
    os.close(ready_fd)
