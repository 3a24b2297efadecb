"""The daemon: builds the rooms, owns the top TaskGroup, and ends everything in order.

The end, within --drain-timeout: no new connections; requests that have begun are finished; running
commands too; jobs are cancelled; snapshots are given up, disks flushed, nodes removed; files of
ours removed. What does not end by then is abandoned, and the exit code says so.

TLS of a listener, where `,tls=` does not say: without --tls-creds there is none. With them, TCP,
vsock and other sockets that strangers may reach must have it, and unix sockets may: the kernel says
who is at the other end of those, and nobody can listen in.
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
from typing import TYPE_CHECKING, Final, NoReturn

from nbdfleece import __version__
from nbdfleece.base.errors import ConfigError, NbdfleeceError
from nbdfleece.base.limits import MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, WRITE_STALL_S
from nbdfleece.block.graph import Graph
from nbdfleece.control.command import Context, addresses, uris
from nbdfleece.control.events import Events
from nbdfleece.control.objects import Objects
from nbdfleece.control.socket import Control
from nbdfleece.datapath.memory import keep_freed_memory
from nbdfleece.datapath.poller import new_event_loop
from nbdfleece.datapath.pump import PumpLimits
from nbdfleece.fleece.backup import Backups
from nbdfleece.fleece.fleece import Fleece
from nbdfleece.fleece.io_limits import watch_limits
from nbdfleece.fleece.location import Location, is_block_device, parse_location
from nbdfleece.fleece.store import StateFolder
from nbdfleece.jobs.manager import JobManager
from nbdfleece.lifetime import Lifetime
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.server.addresses import (
    VSOCK_LOCAL,
    Address,
    FdAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    inherited,
    parse_listen,
    split_tls,
)
from nbdfleece.server.exports import Exports
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.policy import Policy
from nbdfleece.server.server import Server
from nbdfleece.server.service import NbdService
from nbdfleece.server.tls import TlsCredentials
from nbdfleece.server.tokens import Tokens, clock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdfleece.server.listener import Listener

_log = logging.getLogger(__name__)

_LOOPBACK: Final = ("127.", "::1", "::ffff:127.")
_NOTIFY_S: Final = 1.0  # for a service manager that is busy to take what it is told

EXIT_DONE: Final = 0
EXIT_FORCED: Final = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What `serve` was asked for.

    Attributes:
        disks: Disk arguments.
        listen: Addresses to listen on, beside those handed over by a service manager (which may be
            among them, as `fd:N,tls=...`).
        default_listen: Where to listen when there is neither.
        control: Path of the control socket.
        state_dir: The state folder.
        temp_dir: Where temporary images go; None: in the state folder.
        pid_file: Where to write our process id, or None.
        print_uri: Say nothing but URIs when ready.
        allow_insecure: Listen without TLS on addresses that are not loopback.
        tls_creds: Folder of credentials, or None.
        tls_verify_peer: Clients must show a certificate.
        policy: File that says who may do what, or None: all may.
        extended_headers: Offer 64-bit requests.
        limits: Numbers that bound what clients may do, by the names of the options; 0 for no limit.
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
    tls_creds: Path | None
    tls_verify_peer: bool
    policy: Path | None
    extended_headers: bool
    limits: Mapping[str, float]
    drain_timeout_s: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """Settings that have been understood, and the files that they name."""

    locations: list[Location]
    listen: list[tuple[Address, TlsMode]]
    options: ServerOptions
    credentials: TlsCredentials | None
    policy: Policy | None


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
    address, _ = split_tls(text)
    parse_listen(address)


def check_credentials(settings: Settings) -> None:
    """Check the folder of TLS credentials.

    Raises:
        ConfigError: What is wrong.
    """
    _credentials(settings)


def check_policy(settings: Settings) -> None:
    """Check the policy file.

    Raises:
        ConfigError: What is wrong.
    """
    _policy(settings)


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
    keep_freed_memory()
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
        self._tokens = Tokens(clock)
        self._lifetime = Lifetime(settings.drain_timeout_s, self._end_by_force)
        self._reloading = asyncio.Lock()
        self._is_ready = False
        self._forget: list[Callable[[], None]] = []  # removes files of ours, when cut short

    async def run(self, plan: _Plan) -> int:
        """Start, serve, stop; return the exit code.

        Cancel: not cancelled.
        """
        code = EXIT_DONE
        server = Server(
            self._exports,
            plan.options,
            policy=plan.policy,
            credentials=plan.credentials,
            tokens=self._tokens,
        )
        async with asyncio.TaskGroup() as tasks, server:
            control = Control(self._settings.control, tasks)
            jobs = JobManager(tasks)
            watch_limits(self._graph, self._exports, tasks)
            fleece = Fleece(self._graph, self._exports, self._state, self._tokens)
            self._watch_signals(tasks, plan)
            try:
                if await self._lifetime.start(self._start(plan, server, control, jobs, fleece)):
                    self._ready(server)
                    await self._lifetime.stopping.wait()
                else:
                    _log.info("told to stop before it was ready")
            except NbdfleeceError as error:
                self.failure = error
            # Also after a failure: bitmaps in an image that was opened are to be written back.
            code = await self._stop(server, control, jobs, fleece)
        self._state.close()
        self._remove_files()
        return code

    async def _start(
        self, plan: _Plan, server: Server, control: Control, jobs: JobManager, fleece: Fleece
    ) -> None:
        """Take what may be ours alone, open the disks, then let clients in.

        Raises:
            NbdfleeceError: Something is not to be had. What was opened stays so until `_stop`.

        Cancel: as after an error.
        """
        await asyncio.to_thread(self._state.open)
        _make_folder_of(self._settings.control)
        await control.listen()
        self._forget.append(control.close)
        for warning in await asyncio.to_thread(self._state.clear_leftovers):
            _log.warning("%s", warning)
        events = Events()
        fleece.news.subscribe(events.fleece_news)
        server.news.subscribe(events.client_news)
        self._exports.removed.subscribe(events.export_removed)
        jobs.news.subscribe(events.job_news)
        for location in plan.locations:
            await fleece.add_disk(location)
        if len(plan.locations) == 1:
            self._exports.default_name = plan.locations[0].disk
        await self._listen(server, plan)
        self._write_pid_file()
        started = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
        control.start(
            Context(
                self._graph,
                self._exports,
                fleece,
                server,
                events,
                self._lifetime.stopping.set,
                started,
                NbdService(server, self._exports, is_permanent=True),
                Objects(),
                jobs,
                Backups(fleece, self._graph, jobs),
            )
        )

    async def _listen(self, server: Server, plan: _Plan) -> None:
        for address, tls in plan.listen:
            if isinstance(address, UnixAddress) and address.path == self._settings.default_listen:
                _make_folder_of(address.path)
            listener = await server.listen(address, tls)
            self._forget.append(listener.close)
            if not self._settings.allow_insecure:
                _check_is_safe(listener, has_policy=plan.policy is not None)
        if plan.policy is None:
            asks_nobody = plan.credentials is not None and not self._settings.tls_verify_peer
            level = logging.WARNING if asks_nobody else logging.INFO
            _log.log(level, "no --policy: whoever can connect may use every disk")
        _warn_of_expiry(plan.credentials)

    # --- signals, readiness ----------------------------------------------------------------------

    def _watch_signals(self, tasks: asyncio.TaskGroup, plan: _Plan) -> None:
        loop = asyncio.get_running_loop()

        def reload() -> None:
            if not self._lifetime.stopping.is_set():
                tasks.create_task(self._reload(plan), name="reload")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, reload)

    def _asked_to_stop(self, number: int) -> None:
        if self._lifetime.stopping.is_set():
            _log.error("%s again: stopping at once", signal.Signals(number).name)
            self._remove_files()
            os._exit(EXIT_FORCED)
        _log.info("%s: stopping", signal.Signals(number).name)
        self._lifetime.stop()

    async def _reload(self, plan: _Plan) -> None:
        """Read certificates and policy again; what is broken stays as it was. Clients stay too."""
        async with self._reloading:
            if self._is_ready:
                _notify(f"RELOADING=1\nMONOTONIC_USEC={_monotonic_us()}")
            if plan.credentials is not None:
                await _read_again("TLS credentials", plan.credentials.reload)
                _warn_of_expiry(plan.credentials)
            if plan.policy is not None:
                await _read_again("policy", plan.policy.reload)
            if plan.credentials is None and plan.policy is None:
                _log.info("SIGHUP: there is nothing to read again")
            if self._is_ready:
                self._tell_ready("READY=1")

    def _ready(self, server: Server) -> None:
        try:
            for disk in self._exports:
                name = disk.options.name
                uri = next(iter(uris(server, name)), "")
                sys.stdout.write(f"{uri}\n" if self._settings.print_uri else f"{name} {uri}\n")
            sys.stdout.flush()
        except OSError:  # nobody reads: no reason not to serve, nor to fail at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._is_ready = True
        self._tell_ready(f"READY=1\nSTATUS=serving {len(list(self._exports))} disks")
        interval_s = _watchdog_interval_s(os.environ, os.getpid())
        if interval_s is not None:
            _keep_alive(asyncio.get_running_loop(), interval_s)
        _log.info("nbdfleece %s is ready", __version__)

    def _tell_ready(self, state: str) -> None:
        """Tell the service manager as soon as it takes it: else the start has failed to it."""
        if not self._lifetime.stopping.is_set() and not _notify(state, wait_s=0):
            asyncio.get_running_loop().call_later(_NOTIFY_S, self._tell_ready, state)

    # --- the end ---------------------------------------------------------------------------------

    async def _stop(
        self, server: Server, control: Control, jobs: JobManager, fleece: Fleece
    ) -> int:
        """End everything in order; return the exit code."""
        _notify("STOPPING=1")
        with self._lifetime.end() as ending:
            is_in_time = await server.shutdown(timeout_s=ending.left(0.0))
            is_in_time &= await control.stop(timeout_s=ending.left())
            # A job that is stuck keeps no disk open.
            is_closed = [await ending.close(close) for close in (jobs.close, fleece.close)]
        if not is_in_time or ending.is_late:
            self._end_by_force(self._lifetime.late)
        if not all(is_closed):
            self._end_by_force("not all could be closed")
        if self.failure is None:
            _log.info("stopped")
        return EXIT_DONE

    def _end_by_force(self, why: str) -> NoReturn:
        _log.error("stopped by force: %s", why)
        self._remove_files()
        if self.failure is not None:
            _log.error("could not start: %s", self.failure)
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
    credentials = _credentials(settings)
    has_tls = credentials is not None
    said = [_listen_of(text, has_tls) for text in settings.listen]
    places = [address for address, _ in said]
    for address in places:
        if isinstance(address, FdAddress) and places.count(address) > 1:
            raise ConfigError(f"'{address.describe()}' is listened on twice")
    listen = [
        (found, _tls_of(found, has_tls))
        for found in inherited(os.environ, os.getpid())
        if found not in places  # else it was named, to say something of TLS
    ]
    listen += said
    if not listen:
        address = UnixAddress(settings.default_listen)
        listen = [(parse_listen(address.describe()), _tls_of(address, has_tls))]
    return _Plan(locations, listen, _server_options(settings), credentials, _policy(settings))


def _credentials(settings: Settings) -> TlsCredentials | None:
    if settings.tls_creds is None:
        return None
    return TlsCredentials(settings.tls_creds, verify_peer=settings.tls_verify_peer)


def _policy(settings: Settings) -> Policy | None:
    return None if settings.policy is None else Policy(settings.policy)


def _listen_of(text: str, has_tls: bool) -> tuple[Address, TlsMode]:
    """Return where to listen, and what to do about TLS there.

    Raises:
        ConfigError: It makes no sense.
    """
    place, mode = split_tls(text)
    address = parse_listen(place)
    if mode is None:
        return address, _tls_of(address, has_tls)
    if mode is not TlsMode.OFF and not has_tls:
        raise ConfigError(f"'{text}': there is no TLS without --tls-creds")
    return address, mode


def _tls_of(address: Address, has_tls: bool) -> TlsMode:
    """Return what is done about TLS where nobody says so; see the module's docstring."""
    if not has_tls:
        return TlsMode.OFF
    return TlsMode.ALLOW if _is_unix(address) else TlsMode.REQUIRE


def _is_unix(address: Address) -> bool:
    if not isinstance(address, FdAddress):
        return isinstance(address, UnixAddress)
    try:
        sock = socket.socket(fileno=address.fd)
    except OSError:  # nothing is there: listening will say so
        return False
    family = sock.family
    sock.detach()
    return family == socket.AF_UNIX


def _server_options(settings: Settings) -> ServerOptions:
    limits = settings.limits
    return ServerOptions(
        max_connections=int(limits["max-connections"]),
        max_per_export=int(limits["max-connections-per-export"]),
        max_per_identity=int(limits["max-connections-per-identity"]),
        max_per_address=int(limits["max-connections-per-address"]),
        handshake_timeout_s=limits["handshake-timeout"],
        extended_headers=settings.extended_headers,
        transmission=PumpLimits(
            # Nothing at all in flight would be no limit but a standstill.
            requests=int(limits["max-requests"]) or MAX_REQUESTS_IN_FLIGHT,
            bytes_in_flight=int(limits["max-request-bytes"]) or MAX_BYTES_IN_FLIGHT,
            stall_s=limits["write-stall-timeout"] or WRITE_STALL_S,
            idle_s=limits["idle-timeout"] or None,
        ),
    )


async def _read_again(what: str, read: Callable[[], None]) -> None:
    """Read files again, in a thread; say how that went."""
    try:
        await asyncio.to_thread(read)
    except ConfigError as error:
        _log.error("SIGHUP: %s; the old %s stay in use", error, what)
    else:
        _log.info("SIGHUP: %s read again", what)


def _warn_of_expiry(credentials: TlsCredentials | None) -> None:
    for warning in [] if credentials is None else credentials.warnings():
        _log.warning("%s", warning)


def _check_is_safe(listener: Listener, *, has_policy: bool) -> None:
    """Check that nobody on the network gets at the disks without TLS, nor any virtual machine.

    Nobody listens in on a vsock connection, and the kernel says which machine it comes from, so
    there a policy is as good as TLS.

    Raises:
        ConfigError: Somebody would.
    """
    if listener.tls is TlsMode.REQUIRE or (listener.tls is TlsMode.ALLOW and has_policy):
        return
    for address in addresses(listener):
        if isinstance(address, TcpAddress) and not address.host.startswith(_LOOPBACK):
            raise ConfigError(
                f"cannot listen on {address.describe()}: without TLS anybody on the network could "
                "read and write the disks; listen on 127.0.0.1 or a unix socket, give --tls-creds, "
                "or say --allow-insecure"
            )
        if isinstance(address, VsockAddress) and not has_policy and address.cid != VSOCK_LOCAL:
            raise ConfigError(
                f"cannot listen on {address.describe()}: any virtual machine of this host could "
                "read and write the disks; give a --policy or --tls-creds, or say --allow-insecure"
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


def _notify(state: str, wait_s: float = _NOTIFY_S) -> bool:
    """Tell the service manager, where there is one (sd_notify(3)); guests wait no longer for it.

    Returns:
        False when it has not taken it, and may later.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return True
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.settimeout(wait_s)
        try:
            sock.send(state.encode())
        except (BlockingIOError, TimeoutError):
            return False
    return True


def _watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Return how often the service manager is to hear that we live (sd_watchdog_enabled(3)).

    Half of the time that it waits for that; None: it does not.
    """
    limit = environ.get("WATCHDOG_USEC", "")
    if not limit.isdecimal() or int(limit) == 0:
        return None
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(limit) / 2_000_000


def _keep_alive(loop: asyncio.AbstractEventLoop, interval_s: float) -> None:
    """Tell the service manager, now and for as long as the loop turns, that it does.

    A disk that is stuck stops no loop: restarting the daemon would not mend it.
    """
    _notify("WATCHDOG=1", wait_s=0)  # where many wait already, one more says nothing
    loop.call_later(interval_s, _keep_alive, loop, interval_s)


def _monotonic_us() -> int:
    return int(asyncio.get_running_loop().time() * 1_000_000)
