"""`nbdfleece storage-daemon` as a child process, with a monitor that keeps its events."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support.daemon_process import START_S, environment


class StorageDaemon:
    """A storage daemon with a monitor; paths in options are relative to `folder`.

    Leaving the `with` block kills it, if it has not ended before.
    """

    def __init__(self, folder: Path, *options: str, program: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.events: list[dict] = []
        self.log = folder / "log"
        ours = (sys.executable, "-m", "nbdfleece", "storage-daemon")
        monitor = ("--chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*(program or ours), *options, *monitor, "--monitor", "chardev=qmp"],
                stdout=log,
                stderr=log,
                cwd=folder,
                env=environment(),
            )
        try:
            self._connect()
        except BaseException:
            self.process.kill()
            self.process.wait(START_S)
            raise

    def _connect(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, f"the daemon did not start: {self.errors()}"
            self._sock = socket.socket(socket.AF_UNIX)
            try:
                self._sock.connect(str(self.folder / "qmp.sock"))
                break
            except OSError:
                self._sock.close()
            assert time.monotonic() < deadline, f"the daemon does not start: {self.errors()}"
            time.sleep(0.005)
        self._sock.settimeout(START_S)
        self._file = self._sock.makefile("rb")
        self.greeting = self._receive()
        assert self.ask("qmp_capabilities") == {}

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(START_S)
        assert "Traceback" not in self.errors(), self.errors()

    def _receive(self) -> dict:
        line = self._file.readline()
        assert line, f"the monitor is closed: {self.errors()}"
        return json.loads(line)

    def answer(self, command: str, arguments: dict | None = None) -> dict:
        """Run a command; return its whole answer."""
        message = {"execute": command, "arguments": arguments or {}}
        self._sock.sendall(json.dumps(message).encode() + b"\n")
        while "event" in (found := self._receive()):
            self.events.append(found)
        return found

    def ask(self, command: str, arguments: dict | None = None):
        """Run a command; return its result."""
        found = self.answer(command, arguments)
        assert "return" in found, found
        return found["return"]

    def error(self, command: str, arguments: dict | None = None) -> str:
        """Run a command; return why it failed."""
        return self.answer(command, arguments)["error"]["desc"]

    def event(self, name: str) -> dict:
        """Return the data of the next event of that name, and forget those before it."""
        while True:
            found = self.events.pop(0) if self.events else self._receive()
            if found["event"] == name:
                return found["data"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)

    def errors(self) -> str:
        return self.log.read_text()

    def uri(self, export: str, path: str = "nbd.sock") -> str:
        return f"nbd+unix:///{export}?socket={self.folder / path}"
