"""Child processes of the benchmark: short commands, and servers that are always torn down.

Invariants
  Every command has a deadline. A server leads its own process group, and that group is killed
  before the leader is reaped, so its number cannot have been reused by then.
  Whatever goes wrong is a BenchError of one line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.005


class BenchError(Exception):
    """The benchmark, or one run of it, cannot go on; the text says why in one line."""


def find_program(name: str) -> str:
    """Return the path of the program `name` (a name on PATH, or a path).

    Raises:
        BenchError: There is no such program.
    """
    path = shutil.which(name)
    if path is None:
        raise BenchError(f"{name} is not installed (looked for on PATH)")
    return path


def run_command(argv: list[str], *, timeout_s: float, env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it wrote to stdout.

    Args:
        argv: The command; its first word is found on PATH.
        timeout_s: Seconds until it is killed.
        env: Its environment; None for ours.

    Raises:
        BenchError: It is missing, did not end in time, or failed; with the last line it wrote.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{argv[0]}: not done after {timeout_s:.0f} s") from None
    except OSError as error:
        raise BenchError(f"{argv[0]}: {error.strerror}") from error
    if done.returncode != 0:
        why = _last_line(done.stderr) or _last_line(done.stdout)
        raise BenchError(f"{' '.join(argv[:5])}: exit code {done.returncode}: {why}")
    return done.stdout


class Server:
    """A running server process and its children.

    Fields:
        log: What it writes to stdout and stderr; read only to explain a failure.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.log = log
        self._process = process

    @classmethod
    def start(
        cls,
        argv: list[str],
        *,
        log: Path,
        sockets: list[Path | int],
        env: dict[str, str] | None = None,
    ) -> Server:
        """Start a server and wait until each of its sockets accepts a connection.

        Args:
            argv: The command.
            log: File for its output; overwritten.
            sockets: Paths of Unix sockets, and ports of the loopback, that the server will listen
                at. Left-over paths are removed first.
            env: Its environment; None for ours.

        Raises:
            BenchError: It ended, or is not ready in time; nothing of it is left running.
        """
        for path in sockets:
            if isinstance(path, Path):
                path.unlink(missing_ok=True)
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=env,
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchError(f"{argv[0]}: {error.strerror}") from error
        server = cls(process, log)
        try:
            server._wait_ready(sockets)
        except BaseException:
            server.stop()
            raise
        return server

    def cpu_seconds(self) -> float:
        """Return the processor time that the leader has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> int:
        """Return the bytes of peak resident memory (VmHWM), summed over the process tree."""
        return sum(_peak_resident(pid) for pid in _process_tree(self._process.pid))

    def stop(self) -> None:
        """End the server and everything in its process group; does nothing the second time."""
        if self._process.returncode is not None:
            return
        self._signal_leader(signal.SIGTERM)
        if not self._ends_within(STOP_TIMEOUT_S):
            self._signal_leader(signal.SIGKILL)
            self._ends_within(STOP_TIMEOUT_S)
        # The leader is a zombie now, which keeps the group's number ours.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)

    def _wait_ready(self, sockets: list[Path | int]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        for place in sockets:
            while not _accepts(place):
                if self._has_ended():
                    why = _last_line(self.log.read_text(errors="replace"))
                    raise BenchError(f"{_command_name(self._process)} ended at start: {why}")
                if time.monotonic() > deadline:
                    raise BenchError(f"{_command_name(self._process)}: no socket {place}")
                time.sleep(POLL_S)

    def _has_ended(self) -> bool:
        """Tell whether the leader has ended, without reaping it."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _ends_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._has_ended():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _signal_leader(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)


def _command_name(process: subprocess.Popen[bytes]) -> str:
    argv = process.args
    assert isinstance(argv, list)
    return " ".join(Path(str(word)).name for word in argv[:4])


def free_port() -> int:
    """Return a port of the loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(place: Path | int) -> bool:
    is_port = isinstance(place, int)
    with socket.socket(socket.AF_INET if is_port else socket.AF_UNIX) as probe:
        try:
            probe.connect(("127.0.0.1", place) if is_port else str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _process_tree(root: int) -> list[int]:
    """Return `root` and the processes below it, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            parent = _status_number(int(entry.name), "PPid")
            children.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for pid in tree:  # Grows while it is walked: breadth first.
        tree.extend(children.get(pid, []))
    return tree


def _peak_resident(pid: int) -> int:
    return _status_number(pid, "VmHWM") * 1024


def _status_number(pid: int, field: str) -> int:
    """Return the number of a line of /proc/PID/status, 0 when the process or the line is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    return 0


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
