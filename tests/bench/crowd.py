"""A thousand connections at once: what they leave to a client that works.

    idle        open the export and then say nothing
    half-open   greet the server and stop in the middle of an option; when the server drops one,
                another comes
    slow        ask for 1 MiB again and again and take 1 KiB at a time
    busy        read 4 KiB a few times a second, each

All of them are one process of their own, with one thread. The working client is measured alone and
in the crowd, in turn; the value is the ratio of the two, so 1 means that it loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import statistics
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from compare import warm
from loads import Done, Load, Task, copy_to_null, random_io
from processes import BenchError
from sides import DISK, SNAPSHOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sides import Fleece

IDLE: Final = 400
HALF_OPEN: Final = 300
SLOW: Final = 200
BUSY: Final = 100
COUNT: Final = IDLE + HALF_OPEN + SLOW + BUSY
TARGET: Final = 0.8

_COPIES: Final = 10
_TICK_S: Final = 0.05
_BUSY_EVERY: Final = 10  # ticks between two requests of a busy connection
_SLOW_EVERY: Final = 4  # ticks between two looks at a slow connection
_SLOW_BYTES: Final = 1024
_SETTLED_S: Final = 0.5  # the server has given everybody what they take, once it rests this long
_SLOW_LENGTH: Final = 1 << 20
_READY_TIMEOUT_S: Final = 60.0

_CLIENT_FLAGS: Final = struct.pack(">I", 3)
_OPTION: Final = struct.Struct(">QII")
_IHAVEOPT: Final = 0x49484156454F5054
_GO: Final = 7
_REQUEST: Final = struct.Struct(">IHHQQI")
_REQUEST_MAGIC: Final = 0x25609513


def _many_times(load: Load) -> Load:
    """Return a load that runs `load` some times in a row, as one copy is short; the median rate."""
    return lambda task: Done(statistics.median([load(task).rate for _ in range(_COPIES)]), _COPIES)


LOADS: Final[dict[str, Load]] = {
    "nbdcopy": _many_times(copy_to_null()),
    "read 4 KiB, depth 16": random_io("randread", "4k", 16),
}


@dataclass(frozen=True, slots=True)
class Crowd:
    """What came out.

    Fields:
        ratios: Name of the working client -> rate in the crowd / rate alone, one per pair.
        added_bytes: Peak memory of the server in the crowd, less the same without.
    """

    ratios: dict[str, list[float]]
    added_bytes: int

    def median(self, name: str) -> float:
        """Return the middle ratio of a working client."""
        return statistics.median(self.ratios[name])


def measure(side: Fleece, make_task: Callable[[int], Task], pairs: int) -> Crowd:
    """Measure the working clients alone and in the crowd, in turn.

    Args:
        side: Our server; started and stopped here.
        make_task: Returns the task of a pair, by its number.
        pairs: Runs of each on both sides.

    Raises:
        BenchError: The server or the crowd failed.
    """
    ratios: dict[str, list[float]] = {name: [] for name in LOADS}
    side.start()
    try:
        side.take_snapshot()
        for load in LOADS.values():
            load(make_task(0))
        alone_peak, crowd_peak = side.peak_memory(), 0
        for pair in range(pairs):
            for name, load in LOADS.items():
                warm(side.active)
                alone = load(make_task(pair)).rate
                with _crowd(side.socket_path()):
                    _wait_settled(side)
                    warm(side.active)  # the kernel may have dropped what rested meanwhile
                    crowded = load(make_task(pair)).rate
                    crowd_peak = max(crowd_peak, side.peak_memory())
                ratios[name].append(crowded / alone)
    finally:
        side.stop()
    return Crowd(ratios, crowd_peak - alone_peak)


def _wait_settled(side: Fleece) -> None:
    """Return when the server has filled the sockets of those that do not read."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    before = side.cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(_SETTLED_S)
        now = side.cpu_seconds()
        if now - before < _SETTLED_S / 5:
            return
        before = now
    raise BenchError("the server does not come to rest in the crowd")


@contextlib.contextmanager
def _crowd(path: Path) -> Iterator[None]:
    """Have the crowd at the server at `path` while the block runs; all are there when it begins."""
    ready, child_ready = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ready.close()
        code = 1
        with contextlib.suppress(BaseException):
            _Members(str(path)).run(child_ready)
            code = 0
        os._exit(code)
    child_ready.close()
    try:
        ready.settimeout(_READY_TIMEOUT_S)
        if ready.recv(1) != b"!":
            raise BenchError("the crowd could not connect")
        yield
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            pid = 0
            raise BenchError("the crowd broke up")
    except TimeoutError:
        raise BenchError("the crowd did not come together") from None
    finally:
        ready.close()
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class _Members:
    """The crowd, in a process of its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._export = f"{DISK}@{SNAPSHOT}".encode()
        self._selector = selectors.DefaultSelector()

    def run(self, ready: socket.socket) -> None:
        """Connect everybody, say so, and behave as described until killed."""
        idle = [self._open() for _ in range(IDLE)]
        slow = [self._open() for _ in range(SLOW)]
        busy = [self._open() for _ in range(BUSY)]
        half = [self._half_open() for _ in range(HALF_OPEN)]
        for sock in half:
            self._selector.register(sock, selectors.EVENT_READ)
        for sock in slow:
            sock.sendall(_request(0, _SLOW_LENGTH) * 4)
        ready.sendall(b"!")
        tick = 0
        while idle:
            began = time.monotonic()
            for sock in busy[tick % _BUSY_EVERY :: _BUSY_EVERY]:
                with contextlib.suppress(BlockingIOError):
                    sock.recv(1 << 16)
                sock.send(_request(4096 * (tick % 1000), 4096))
            for sock in slow[tick % _SLOW_EVERY :: _SLOW_EVERY]:
                with contextlib.suppress(BlockingIOError):
                    sock.recv(_SLOW_BYTES)
            for key, _ in self._selector.select(0):
                self._replace_if_closed(key.fileobj)
            tick += 1
            time.sleep(max(0.0, began + _TICK_S - time.monotonic()))

    def _replace_if_closed(self, sock: object) -> None:
        assert isinstance(sock, socket.socket)
        try:
            if sock.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._selector.unregister(sock)
        sock.close()
        self._selector.register(self._half_open(), selectors.EVENT_READ)

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        while True:
            try:
                sock.connect(self._path)
            except BlockingIOError:  # the backlog is full
                time.sleep(_TICK_S / 10)
            else:
                return sock

    def _half_open(self) -> socket.socket:
        sock = self._connect()
        sock.sendall(_CLIENT_FLAGS + _OPTION.pack(_IHAVEOPT, _GO, 100)[:11])
        sock.setblocking(False)
        return sock

    def _open(self) -> socket.socket:
        sock = self._connect()
        data = struct.pack(">I", len(self._export)) + self._export + b"\0\0"
        sock.sendall(_CLIENT_FLAGS + _OPTION.pack(_IHAVEOPT, _GO, len(data)) + data)
        stream = sock.makefile("rb")
        stream.read(18)
        while True:
            header = stream.read(20)
            if len(header) < 20:
                raise BenchError("the server turned a member of the crowd away")
            _, _, kind, length = struct.unpack(">QIII", header)
            stream.read(length)
            if kind == 1:
                sock.setblocking(False)
                return sock
            if kind >> 31:
                raise BenchError(f"option reply {kind:#x}")


def _request(offset: int, length: int) -> bytes:
    return _REQUEST.pack(_REQUEST_MAGIC, 0, 0, 1, offset, length)
