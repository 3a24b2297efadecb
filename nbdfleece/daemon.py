"""The daemon: builds the rooms, owns the top TaskGroup, and ends everything in order.

The end, within --drain-timeout: no new connections; requests that have begun are finished; running
commands too; snapshots are given up, disks flushed, nodes removed; files of ours removed. What does
not end by then is abandoned, and the exit code says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.base.errors import ConfigError, NbdfleeceError
from nbdfleece.block.graph import Graph
from nbdfleece.control.command import Context, addresses, uris
from nbdfleece.control.events import Events
from nbdfleece.control.socket import Control
from nbdfleece.datapath.poller import new_event_loop
from nbdfleece.fleece.fleece import Fleece
from nbdfleece.fleece.location import Location, is_block_device, parse_location
from nbdfleece.fleece.store import StateFolder
from nbdfleece.server.addresses import Address, TcpAddress, UnixAddress, inherited, parse_listen
from nbdfleece.server.exports import Exports
from nbdfleece.server.server import Server, ServerOptions

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_LOOPBACK: Final = ("127.", "::1", "::ffff:127.")
_CLOSE_S: Final = 2.0  # for closing the disks, even when requests took all the time there was

EXIT_DONE: Final = 0
EXIT_FORCED: Final = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What `serve` was asked for.

    Attributes:
        disks: Disk arguments.
        listen: Addresses to listen on, beside those handed over by a service manager.
        default_listen: Where to listen when there is neither.
        control: Path of the control socket.
        state_dir: The state folder.
        temp_dir: Where temporary images go; None: in the state folder.
        pid_file: Where to write our process id, or None.
        print_uri: Say nothing but URIs when ready.
        allow_insecure: Listen without TLS on addresses that are not loopback.
        max_connections: NBD clients at a time; 0 for no limit.
        handshake_timeout_s: Seconds for a client to get to transmission; 0 for no limit.
        drain_timeout_s: Seconds for requests to end at shutdown.
    """

    disks: tuple[str, ...]
    listen: tuple[str, ...]
    default_listen: str
    control: str
    state_dir: Path
    temp_dir: Path | None
    pid_file: Path | None
    print_uri: bool
    allow_insecure: bool
    max_connections: int
    handshake_timeout_s: float
    drain_timeout_s: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """Settings that have been understood."""

    locations: list[Location]
    addresses: list[Address]


def check_disk(text: str) -> None:
    """Check a disk argument, and what it leads to, without opening it.

    Raises:
        NbdfleeceError: What is wrong.
    """
    is_block_device(parse_location(text))


def check_listen(text: str) -> None:
    """Check an address to listen on.

    Raises:
        ConfigError: What is wrong.
    """
    parse_listen(text)


def check(settings: Settings) -> None:
    """Check what all settings together say.

    Raises:
        ConfigError: What is wrong.
    """
    _plan(settings)


def serve(settings: Settings) -> int:
    """Run the daemon until it is told to stop; return the exit code.

    Raises:
        NbdfleeceError: It cannot start, or has nothing to serve.
    """
    _raise_descriptor_limit()
    plan = _plan(settings)
    daemon = Daemon(settings)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        code = runner.run(daemon.run(plan))
    if daemon.failure is not None:
        raise daemon.failure
    return code


class Daemon:
    """One run of the daemon.

    Attributes:
        failure: Why it could not start, or None.
    """

    def __init__(self, settings: Settings) -> None:
        self.failure: NbdfleeceError | None = None
        self._settings = settings
        self._graph = Graph()
        self._exports = Exports(self._graph)
        self._state = StateFolder(settings.state_dir, settings.temp_dir)
        self._stopping = asyncio.Event()
        self._forget: list[Callable[[], None]] = []  # removes files of ours, when cut short

    async def run(self, plan: _Plan) -> int:
        """Start, serve, stop; return the exit code.

        Cancel: not cancelled.
        """
        options = ServerOptions(
            max_connections=self._settings.max_connections,
            handshake_timeout_s=self._settings.handshake_timeout_s,
        )
        code = EXIT_DONE
        async with asyncio.TaskGroup() as tasks, Server(self._exports, options) as server:
            control = Control(self._settings.control, tasks)
            try:
                fleece = await self._start(plan, server, control)
            except NbdfleeceError as error:
                self.failure = error
                await control.stop(timeout_s=0)
            else:
                self._watch_signals()
                self._ready(server)
                await self._stopping.wait()
                code = await self._stop(server, control, fleece)
        self._state.close()
        self._remove_files()
        return code

    async def _start(self, plan: _Plan, server: Server, control: Control) -> Fleece:
        """Take what may be ours alone, open the disks, then let clients in.

        Raises:
            NbdfleeceError: Something is not to be had.
        """
        await asyncio.to_thread(self._state.open)
        _make_folder_of(self._settings.control)
        await control.listen()
        self._forget.append(control.close)
        for warning in await asyncio.to_thread(self._state.clear_leftovers):
            _log.warning("%s", warning)
        fleece = Fleece(self._graph, self._exports, self._state)
        events = Events()
        fleece.news.subscribe(events.fleece_news)
        for location in plan.locations:
            await fleece.add_disk(location)
        if len(plan.locations) == 1:
            self._exports.default_name = plan.locations[0].disk
        await self._listen(server, plan.addresses)
        self._write_pid_file()
        started = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
        control.start(Context(fleece, server, events, self._stopping.set, started))
        return fleece

    async def _listen(self, server: Server, wanted: list[Address]) -> None:
        for address in wanted:
            if isinstance(address, UnixAddress) and address.path == self._settings.default_listen:
                _make_folder_of(address.path)
            listener = await server.listen(address)
            self._forget.append(listener.close)
            if not self._settings.allow_insecure:
                for found in addresses(listener):
                    _check_is_local(found)

    # --- signals, readiness ----------------------------------------------------------------------

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _asked_to_stop(self, number: int) -> None:
        if self._stopping.is_set():
            _log.error("%s again: stopping at once", signal.Signals(number).name)
            self._remove_files()
            os._exit(EXIT_FORCED)
        _log.info("%s: stopping", signal.Signals(number).name)
        self._stopping.set()

    def _reload(self) -> None:
        _notify(f"RELOADING=1\nMONOTONIC_USEC={_monotonic_us()}")
        _log.info("SIGHUP: there is nothing to read again")
        _notify("READY=1")

    def _ready(self, server: Server) -> None:
        for disk in self._exports:
            name = disk.options.name
            uri = next(iter(uris(server, name)), "")
            sys.stdout.write(f"{uri}\n" if self._settings.print_uri else f"{name} {uri}\n")
        with contextlib.suppress(OSError):  # nobody reads: no reason not to serve
            sys.stdout.flush()
        _notify(f"READY=1\nSTATUS=serving {len(list(self._exports))} disks")
        _log.info("nbdfleece %s is ready", __version__)

    # --- the end ---------------------------------------------------------------------------------

    async def _stop(self, server: Server, control: Control, fleece: Fleece) -> int:
        """End everything in order; return the exit code."""
        _notify("STOPPING=1")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.drain_timeout_s

        def left() -> float:
            return max(deadline - loop.time(), 0.0)

        is_clean = await server.shutdown(timeout_s=left())
        is_clean &= await control.stop(timeout_s=max(left(), _CLOSE_S))
        try:
            async with asyncio.timeout(max(left(), _CLOSE_S)):
                is_clean &= await fleece.close()
        except TimeoutError:
            is_clean = False
        if is_clean:
            _log.info("stopped")
            return EXIT_DONE
        _log.error(
            "stopped by force: requests had not ended after %g seconds",
            self._settings.drain_timeout_s,
        )
        self._remove_files()
        # Threads that are stuck in the kernel must not keep the program from ending.
        os._exit(EXIT_FORCED)

    def _write_pid_file(self) -> None:
        path = self._settings.pid_file
        if path is None:
            return
        try:
            path.write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise ConfigError(f"pid file '{path}': {error.strerror}") from error
        self._forget.append(lambda: path.unlink(missing_ok=True))

    def _remove_files(self) -> None:
        while self._forget:
            with contextlib.suppress(OSError):
                self._forget.pop()()


def _plan(settings: Settings) -> _Plan:
    """Understand what was asked for.

    Raises:
        ConfigError: Something makes no sense.
    """
    if not settings.disks:
        raise ConfigError("no disk is given")
    locations = [parse_location(disk) for disk in settings.disks]
    names = [location.disk for location in locations]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two disks are called '{name}'; give them names as NAME=LOCATION")
    wanted = inherited(os.environ, os.getpid())
    wanted += [parse_listen(text) for text in settings.listen]
    if not wanted:
        wanted = [parse_listen(f"unix:{settings.default_listen}")]
    return _Plan(locations, wanted)


def _check_is_local(address: Address) -> None:
    """Check that an address without TLS is not open to other machines.

    Raises:
        ConfigError: It is.
    """
    if isinstance(address, TcpAddress) and not address.host.startswith(_LOOPBACK):
        raise ConfigError(
            f"cannot listen on {address.describe()}: without TLS anybody on the network could read "
            "and write the disks; listen on 127.0.0.1 or a unix socket, or say --allow-insecure"
        )


def _make_folder_of(path: str) -> None:
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder '{folder}': {error.strerror}") from error


def _raise_descriptor_limit() -> None:
    """Allow ourselves as many descriptors as we may have: connections and disks take them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify(state: str) -> None:
    """Tell the service manager, where there is one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())


def _monotonic_us() -> int:
    return int(asyncio.get_running_loop().time() * 1_000_000)
