#!/usr/bin/env python3
"""Proves in a few seconds, on this machine, that a snapshot is one instant of a busy disk.

    python3 examples/quickstart.py

Needs Python 3.11 and nothing else. In a temporary folder it makes a 64 MiB disk, serves it, lets a
guest write numbered records over NBD without a pause, takes a snapshot from the command line,
copies the snapshot out while the guest goes on (with nbdcopy where it is installed, else with the
client below), and checks the copy against the guest's own record of what it wrote, and when.

Record number n always goes to the same place, and each round of numbers fills the whole disk. So
the disk after n writes holds exactly the last 16384 numbers, n and all the ones before it; a copy
that holds any other set of numbers is not a state that the disk has ever been in.

Expected output, with other numbers:

    serving nbd+unix:///demo?socket=...
    the guest writes without a pause: 4 KiB records, one after the other
    snapshot demo@first taken while the guest wrote
    copied out with nbdcopy; meanwhile the guest overwrote 9123 of the 16384 places
    PROVED: the copy is the disk exactly as it was after record 23456.
      - all 23450 records acknowledged before the snapshot was asked for are in it
      - none of the records sent after the snapshot was taken is in it
      - between first and last no record is missing, torn, or from another moment
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
RECORD = 4096
PLACES = 16384  # 64 MiB in all
STRIDE = 9973  # odd, so one round of numbers visits every place once
OVERWRITES_WANTED = 2000  # by the guest, between the snapshot and the end of the copy
PATIENCE_S = 60


class QuickstartError(Exception):
    """The example could not run, or proved the opposite; the text says what happened."""


# ------------------------------------------------------------------------------ the NBD client


class NbdClient:
    """The smallest NBD client that reads and writes: one request at a time, simple replies."""

    OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
    OPTION_REPLY_MAGIC = 0x3E889045565A9
    OPT_GO, REP_ACK, REP_INFO = 7, 1, 3
    INFO_EXPORT = 0
    REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
    CMD_READ, CMD_WRITE, CMD_DISC = 0, 1, 2

    def __init__(self, path: Path, export: str) -> None:
        self.size = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))
        self._handshake(export.encode())

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the export."""
        self._request(self.CMD_READ, offset, length)
        return self._receive(length)

    def write(self, offset: int, data: bytes) -> None:
        """Write, and return when the server has acknowledged it."""
        self._request(self.CMD_WRITE, offset, len(data), data)

    def close(self) -> None:
        """Say goodbye, as a polite client does."""
        goodbye = struct.pack(">IHHQQI", self.REQUEST_MAGIC, 0, self.CMD_DISC, 0, 0, 0)
        with self._socket:
            self._socket.sendall(goodbye)

    def _handshake(self, export: bytes) -> None:
        if self._receive(18)[:16] != b"NBDMAGICIHAVEOPT":
            raise QuickstartError("this is not an NBD server")
        choice = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._socket.sendall(
            struct.pack(">I", 3)  # fixed newstyle, no padding
            + struct.pack(">QII", self.OPTION_MAGIC, self.OPT_GO, len(choice))
            + choice
        )
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
            body = self._receive(length)
            if magic != self.OPTION_REPLY_MAGIC or kind not in (self.REP_ACK, self.REP_INFO):
                raise QuickstartError(f"the server refused {export!r}: {kind:#x} {body!r}")
            if kind == self.REP_ACK:
                return
            if body[:2] == struct.pack(">H", self.INFO_EXPORT):
                (self.size,) = struct.unpack_from(">Q", body, 2)

    def _request(self, command: int, offset: int, length: int, data: bytes = b"") -> None:
        header = struct.pack(">IHHQQI", self.REQUEST_MAGIC, 0, command, offset, offset, length)
        self._socket.sendall(header + data)
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        if magic != self.REPLY_MAGIC or cookie != offset:
            raise QuickstartError("the server's reply makes no sense")
        if error:
            raise QuickstartError(f"command {command} at {offset} failed with NBD error {error}")

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self._socket.recv(length - len(parts))
            if not part:
                raise QuickstartError("the server closed the connection")
            parts += part
        return bytes(parts)


# ----------------------------------------------------------------------- the guest and its records


def place(number: int) -> int:
    """Return where on the disk record `number` goes, counted in records."""
    return number * STRIDE % PLACES


def record(number: int) -> bytes:
    """Return the bytes of record `number`: its number, over and over."""
    return number.to_bytes(8, "big") * (RECORD // 8)


def make_disk(path: Path) -> None:
    """Make a disk that already holds the first round, records 0 to PLACES - 1."""
    with path.open("wb") as disk:
        disk.truncate(PLACES * RECORD)
        for number in range(PLACES):
            disk.seek(place(number) * RECORD)
            disk.write(record(number))


class Guest:
    """Writes records in order, each after the one before was acknowledged, until told to stop."""

    def __init__(self, client: NbdClient) -> None:
        self.sent = self.acknowledged = PLACES  # how many so far; the disk came with the first
        self.failure: Exception | None = None
        self._client = client
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_records, name="guest", daemon=True)

    def start(self) -> None:
        """Begin to write, in a thread of its own."""
        self._thread.start()

    def _write_records(self) -> None:
        try:
            while not self._stopping.is_set():
                number = self.sent
                self.sent = number + 1
                self._client.write(place(number) * RECORD, record(number))
                self.acknowledged = number + 1
            self._client.close()
        except (OSError, QuickstartError) as error:
            self.failure = error

    def wait_for(self, count: int) -> None:
        """Wait until `count` records are acknowledged."""
        deadline = time.monotonic() + PATIENCE_S
        while self.acknowledged < count:
            if self.failure:
                raise QuickstartError(f"the guest's write failed: {self.failure}")
            if time.monotonic() > deadline:
                raise QuickstartError("the guest's writes do not get through")
            time.sleep(0.005)

    def stop(self) -> None:
        """Finish the write in flight and no more."""
        self._stopping.set()
        self._thread.join(PATIENCE_S)


def last_record(copy: Path) -> int:
    """Return the number of the last record in a copy that is one instant of the disk."""
    numbers: list[int] = []
    with copy.open("rb") as disk:
        for index in range(PLACES):
            data = disk.read(RECORD)
            number = int.from_bytes(data[:8], "big")
            if data != record(number) or place(number) != index:
                raise QuickstartError(f"the copy is damaged at {index * RECORD}: {data[:16].hex()}")
            numbers.append(number)
        if disk.read(1):
            raise QuickstartError("the copy is longer than the disk")
    newest, oldest = max(numbers), min(numbers)
    if newest - oldest != PLACES - 1:
        raise QuickstartError(f"the copy mixes moments: it holds {newest} and still {oldest}")
    return newest


# ----------------------------------------------------------------------------------- the server


class Server:
    """`nbdfleece serve` as a child process, and `nbdfleece` commands sent to it."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "nbd.sock"
        control = folder / "control.sock"
        self._command, self._environment = find_nbdfleece(folder)
        self._environment["NBDFLEECE_CONTROL"] = str(control)  # for the commands
        self._log = folder / "server.log"
        disk, state = folder / "disk.img", folder / "state"
        make_disk(disk)
        arguments = ["--listen", f"unix:{self.socket}", "--control", str(control)]
        arguments += ["--state-dir", str(state), f"demo={disk}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, "serve", *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_until_ready(self) -> str:
        """Return the URI that the server prints for the disk when it is ready."""
        lines: SimpleQueue[str] = SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=relay, args=(self._process.stdout, lines), daemon=True).start()
        try:
            while line := lines.get(timeout=PATIENCE_S):
                if uri := next((word for word in line.split() if word.startswith("nbd")), ""):
                    return uri
            ended = "ended before it was ready"
        except Empty:
            ended = "did not become ready"
        raise QuickstartError(f"the server {ended}; it said:\n{self._log.read_text()}")

    def run(self, *arguments: str) -> str:
        """Run one nbdfleece command against the server and return what it printed."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        if done.returncode != 0:
            raise QuickstartError(f"nbdfleece {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> None:
        """End the server as a service manager would: TERM, and KILL if that is not enough."""
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def relay(stream: IO[str], lines: SimpleQueue[str]) -> None:
    """Pass the lines of a pipe on, then an empty one, so that they can be waited for."""
    for line in stream:
        lines.put(line)
    lines.put("")


def find_nbdfleece(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return command and environment that run nbdfleece straight from this checkout.

    Serving a disk needs the standard library alone. Should this Python lack something after all,
    an environment of its own is made in the temporary folder.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "nbdfleece"]
    tried = subprocess.run(
        [*command, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    if tried.returncode == 0:
        return command, environment
    if "No module named 'cryptography'" not in tried.stderr:
        raise QuickstartError(f"nbdfleece does not start: {tried.stderr.strip()}")
    print("this Python lacks the package cryptography: making an environment that has it ...")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "cryptography"], check=True)
    return [str(python), "-m", "nbdfleece"], environment


# ------------------------------------------------------------------------------------- the proof


def copy_out(server: Server, export: str, copy: Path) -> str:
    """Copy an export to a file; return the name of the program that did it."""
    if nbdcopy := shutil.which("nbdcopy"):
        uri = f"nbd+unix:///{export}?socket={server.socket}"
        subprocess.run([nbdcopy, uri, str(copy)], check=True, timeout=PATIENCE_S)
        return "nbdcopy"
    client = NbdClient(server.socket, export)
    chunk = 256 * 1024
    with copy.open("wb") as file:
        for offset in range(0, client.size, chunk):
            file.write(client.read(offset, min(chunk, client.size - offset)))
    client.close()
    return "this example's own client"


def prove(folder: Path, stack: ExitStack) -> None:
    """Serve, write, snapshot, copy and compare; raise QuickstartError unless all is as promised."""
    server = Server(folder)
    stack.callback(server.stop)
    print(f"serving {server.wait_until_ready()}")

    guest = Guest(NbdClient(server.socket, "demo"))
    guest.start()
    stack.callback(guest.stop)
    print("the guest writes without a pause: 4 KiB records, one after the other")
    guest.wait_for(PLACES + OVERWRITES_WANTED)

    before = guest.acknowledged
    server.run("snapshot", "create", "demo", "--name", "first")
    after = guest.sent
    print("snapshot demo@first taken while the guest wrote")

    # The guest first overwrites some of what the snapshot has to keep, and goes on meanwhile.
    guest.wait_for(after + OVERWRITES_WANTED)
    copy = folder / "copy.img"
    tool = copy_out(server, "demo@first", copy)
    overwritten = min(guest.acknowledged - after, PLACES)
    print(
        f"copied out with {tool}; meanwhile the guest overwrote {overwritten}"
        f" of the {PLACES} places"
    )
    if guest.failure:
        raise QuickstartError(f"the guest's write failed: {guest.failure}")

    newest = last_record(copy)
    if newest + 1 < before:
        raise QuickstartError(f"record {before - 1} was acknowledged before the snapshot: missing")
    if newest + 1 > after:
        raise QuickstartError(f"record {newest} was sent after the snapshot, and is in the copy")
    print(f"PROVED: the copy is the disk exactly as it was after record {newest}.")
    print(f"  - all {before} records acknowledged before the snapshot was asked for are in it")
    print("  - none of the records sent after the snapshot was taken is in it")
    print("  - between first and last no record is missing, torn, or from another moment")


def main() -> int:
    """Run the example; return 0 when everything was proved."""
    if sys.version_info < (3, 11):  # noqa: UP036 - an older one gets here too, and must be told
        print(f"quickstart: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
        return 1
    try:
        with ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="nbdfleece-", ignore_cleanup_errors=True)
            prove(Path(stack.enter_context(folder)), stack)
    except (QuickstartError, OSError, subprocess.SubprocessError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
