"""The real daemon as a child process, and the real command line against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 20.0


@dataclass
class Result:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def environment(**extra: str) -> dict[str, str]:
    """The test's own environment, without anything that would change what nbdfleece does."""
    strip = ("LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "JOURNAL_STREAM", "NBDFLEECE_CONTROL")
    kept = {name: value for name, value in os.environ.items() if name not in strip}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **extra}


def nbdfleece(*args: str | Path, **extra: str) -> Result:
    """Run a command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "nbdfleece", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**extra),
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Daemon:
    """A daemon whose sockets and state are in `folder`, which has a short path.

    Leaving the `with` block kills it, if it has not ended before.
    """

    def __init__(
        self,
        folder: Path,
        *args: str | Path,
        state: Path | None = None,
        python: str = sys.executable,
        pass_fds: Sequence[int] = (),
        stdout: str = "",
    ) -> None:
        self.folder = folder
        self.socket = folder / "nbd.sock"
        self.control = folder / "control.sock"
        self.state = state or folder / "state"
        self.log = folder / "log"
        command = [python, "-m", "nbdfleece", "serve"]
        command += ["--listen", f"unix:{self.socket}", "--control", str(self.control)]
        command += ["--state-dir", str(self.state), *map(str, args)]
        if stdout:  # as a shell redirects it
            command = ["sh", "-c", f'exec "$@" {stdout}', "sh", *command]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                pass_fds=pass_fds,
            )

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(START_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def ready(self, disks: int = 1) -> list[str]:
        """Wait for the readiness lines of that many disks."""
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().rstrip() for _ in range(disks)]
        assert all(lines), f"the daemon did not start: {self.errors()}"
        return lines

    def run(self, *args: str | Path) -> Result:
        """Run a command against this daemon."""
        return nbdfleece(*args, NBDFLEECE_CONTROL=str(self.control))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)

    def errors(self) -> str:
        """What the daemon has said on stderr."""
        return self.log.read_text()

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"


def make_disk(path: Path, size: int, fill: bytes = b"\1") -> Path:
    """A file full of `fill`."""
    path.write_bytes((fill * size)[:size])
    return path
