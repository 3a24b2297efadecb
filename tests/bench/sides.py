"""The servers that are compared: nbdfleece, a reference build of QEMU, nbdkit.

Each side serves its own file, under its own socket, and is driven through the same four verbs:

    start()            the live export, no snapshot
    take_snapshot()    the snapshot of this instant, with empty temporary space
    drop_snapshot()    the live export alone again
    stop()             nothing is left running

nbdfleece takes a snapshot while it runs. The reference is restarted with the copy-before-write
filter and a new empty temporary image, which is its own way of making a point in time. nbdkit has
no snapshots: its file plugin serves the plain file, as the rate of a server that only reads.

A side whose `tls` is set serves over TLS, on a port of the loopback, with the server's certificate
of that folder, and demands one of the client; else over a Unix socket.

Follows: docs on fleecing, "The reference set-up, for side-by-side benchmarks".
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import quote

from processes import BenchError, Server, find_program, free_port, run_command

if TYPE_CHECKING:
    from pathlib import Path

COMMAND_TIMEOUT_S: Final = 60.0
SOCKET_FOLDER_LIMIT: Final = 107 - len("/control.sock")
DISK: Final = "vda"
SNAPSHOT: Final = "bench"
MAX_CONNECTIONS: Final = 2000  # of our server, for the crowd


@dataclass(frozen=True, slots=True)
class TlsFolders:
    """Certificates, in folders as QEMU and libnbd take them."""

    server: Path
    client: Path


class Side(Protocol):
    """One server under test; `label` names it in tables, `active` is the file it serves."""

    label: str
    active: Path
    tls: TlsFolders | None

    def start(self) -> None:
        """Serve the live export; BenchError when the server does not come up."""

    def serve_new(self, size: int) -> None:
        """Serve a new and empty qcow2 image of `size` bytes; the server does not run."""

    def take_snapshot(self) -> None:
        """Make a snapshot of this instant; there is none yet."""

    def drop_snapshot(self) -> None:
        """Delete the snapshot and its temporary space."""

    def stop(self) -> None:
        """End the server; does nothing when it does not run."""

    def live_uri(self) -> str:
        """Return the URI of the export a guest uses."""

    def snapshot_uri(self) -> str:
        """Return the URI of the export a backup client reads."""

    def temp_bytes(self) -> int:
        """Return the bytes allocated in the temporary image of the snapshot."""

    def peak_memory(self) -> int:
        """Return the bytes of peak resident memory since the server was (re)started."""

    def cpu_seconds(self) -> float:
        """Return the processor time that the server has used."""


class _Base:
    """What the sides share: a folder for sockets and logs, and at most one server."""

    def __init__(self, label: str, active: Path, folder: Path) -> None:
        """Name the side; `folder` is its own and is created."""
        folder.mkdir()
        self._is_qcow2 = active.suffix == ".qcow2"
        if len(os.fsencode(folder)) > SOCKET_FOLDER_LIMIT:
            raise BenchError(f"{folder}: too long a path for a Unix socket; choose another --dir")
        self.label = label
        self.active = active
        self.tls: TlsFolders | None = None
        self._folder = folder
        self._socket = folder / "nbd.sock"
        self._port = 0
        self._server: Server | None = None

    def peak_memory(self) -> int:
        return self._server.peak_memory() if self._server is not None else 0

    def cpu_seconds(self) -> float:
        assert self._server is not None
        return self._server.cpu_seconds()

    def _end(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _launch(
        self, argv: list[str], sockets: list[Path | int], env: dict[str, str] | None = None
    ) -> None:
        assert self._server is None
        log = self._folder / "log"
        self._server = Server.start(argv, log=log, sockets=sockets, env=env)

    def _place(self) -> Path | int:
        """Choose where to listen this time: the Unix socket, or a free port for TLS."""
        self._port = free_port() if self.tls is not None else 0
        return self._port or self._socket

    def _uri(self, export: str) -> str:
        if self.tls is not None:
            folder = quote(str(self.tls.client))
            name = quote(export, safe="")
            return f"nbds://localhost:{self._port}/{name}?tls-certificates={folder}"
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(self._socket))}"


class Fleece(_Base):
    """nbdfleece, through its command line only."""

    def __init__(
        self, label: str, active: Path, folder: Path, *, command: list[str], root: Path
    ) -> None:
        """Name the side.

        Args:
            label: Name in tables.
            active: File to serve.
            folder: The side's own folder; created.
            command: What comes before `serve`, such as python -m nbdfleece.
            root: Folder the package is imported from.
        """
        super().__init__(label, active, folder)
        self._command = command
        self._control = folder / "control.sock"
        self._state = folder / "state"
        path = os.environ.get("PYTHONPATH")
        self._env = dict(os.environ)
        self._env["PYTHONPATH"] = str(root) if not path else f"{root}{os.pathsep}{path}"

    def start(self) -> None:
        self._state.mkdir()
        place = self._place()
        argv = [*self._command, "serve"]
        if self.tls is None:
            argv += ["--listen", f"unix:{place}"]
        else:
            argv += ["--listen", f"tcp:127.0.0.1:{place},tls=require"]
            argv += ["--tls-creds", str(self.tls.server)]
        argv += ["--max-connections", str(MAX_CONNECTIONS)]
        argv += ["--control", str(self._control), "--state-dir", str(self._state)]
        kind = ",format=qcow2" if self._is_qcow2 else ""
        argv.append(f"{DISK}={_escape(self.active)}{kind}")
        self._launch(argv, [self._control, place], self._env)

    def serve_new(self, size: int) -> None:
        create_qcow2(self.active, size)
        self.start()

    def take_snapshot(self) -> None:
        self._ask("snapshot", "create", DISK, "--name", SNAPSHOT)

    def drop_snapshot(self) -> None:
        self._ask("snapshot", "delete", f"{DISK}@{SNAPSHOT}", "--force")

    def stop(self) -> None:
        self._end()
        shutil.rmtree(self._state, ignore_errors=True)

    def live_uri(self) -> str:
        return self.disk_uri(DISK)

    def disk_uri(self, disk: str) -> str:
        """Return the URI of the live export of a disk."""
        return self._uri(disk)

    def snapshot_uri(self) -> str:
        return self._uri(f"{DISK}@{SNAPSHOT}")

    def control_path(self) -> Path:
        """Return the control socket."""
        return self._control

    def socket_path(self) -> Path:
        """Return the Unix socket of the exports."""
        return self._socket

    def temp_bytes(self) -> int:
        return _allocated(self._state / DISK / "snapshots" / SNAPSHOT / "temp.raw")

    def _ask(self, *words: str) -> None:
        argv = [*self._command, *words, "--control", str(self._control)]
        run_command(argv, timeout_s=COMMAND_TIMEOUT_S, env=self._env)


class Reference(_Base):
    """A build of qemu-storage-daemon."""

    def __init__(
        self, label: str, active: Path, folder: Path, *, program: str, size: int = 0
    ) -> None:
        """Name the side; `program` is the daemon's path, `size` the disk's, the rest as in Fleece.

        The size of a raw disk is that of its file.
        """
        super().__init__(label, active, folder)
        self._size = size
        self._program = program
        self._temp = folder / "temp.raw"

    def start(self) -> None:
        self._serve([], ["type=nbd,id=live,node-name=active,name=live,writable=on"])

    def serve_new(self, size: int) -> None:
        create_qcow2(self.active, size)
        self.start()

    def take_snapshot(self) -> None:
        self._end()
        with self._temp.open("wb") as temp:
            temp.truncate(self._size or self.active.stat().st_size)
        nodes = [
            f"driver=file,node-name=temp,filename={_escape(self._temp)},discard=unmap",
            "driver=copy-before-write,node-name=cbw,file=active,target=temp",
            "driver=snapshot-access,node-name=access,file=cbw",
        ]
        exports = [
            "type=nbd,id=live,node-name=cbw,name=live,writable=on",
            "type=nbd,id=snap,node-name=access,name=snap",
        ]
        self._serve(nodes, exports)

    def drop_snapshot(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self._end()
        self._temp.unlink(missing_ok=True)

    def live_uri(self) -> str:
        return self._uri("live")

    def snapshot_uri(self) -> str:
        return self._uri("snap")

    def temp_bytes(self) -> int:
        return _allocated(self._temp)

    def _serve(self, nodes: list[str], exports: list[str]) -> None:
        active = f"driver=file,node-name=active,filename={_escape(self.active)},discard=unmap"
        if self._is_qcow2:
            active = "driver=qcow2,node-name=active,discard=unmap,file.driver=file"
            active += f",file.discard=unmap,file.filename={_escape(self.active)}"
        argv = [self._program]
        for node in [active, *nodes]:
            argv += ["--blockdev", node]
        place = self._place()
        if self.tls is None:
            server = f"addr.type=unix,addr.path={_escape(self._socket)},max-connections=0"
        else:
            folder = _escape(self.tls.server)
            argv += ["--object", f"tls-creds-x509,id=tls0,dir={folder},endpoint=server"]
            server = f"addr.type=inet,addr.host=127.0.0.1,addr.port={place},tls-creds=tls0"
            server += ",max-connections=0"
        argv += ["--nbd-server", server]
        for export in exports:
            argv += ["--export", export]
        self._launch(argv, [place])


class Nbdkit(_Base):
    """nbdkit's file plugin; measured for reading only."""

    def start(self) -> None:
        argv = ["nbdkit", "--foreground", "--exit-with-parent", "--readonly"]
        place = self._place()
        if self.tls is None:
            argv += ["--unix", str(place)]
        else:
            argv += ["--ipaddr", "127.0.0.1", "--port", str(place), "--tls", "require"]
            argv += ["--tls-certificates", str(self.tls.server), "--tls-verify-peer"]
        argv += ["file", f"file={self.active}"]
        self._launch(argv, [place])

    def serve_new(self, size: int) -> None:
        raise BenchError("does not write")

    def take_snapshot(self) -> None:
        """Do nothing: the plain file stands for its own snapshot, as nobody writes to it."""

    def drop_snapshot(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        self._end()

    def live_uri(self) -> str:
        return self._uri("")

    def snapshot_uri(self) -> str:
        return self._uri("")

    def temp_bytes(self) -> int:
        return 0


def create_qcow2(path: Path, size: int) -> None:
    """Have qemu-img make an empty image, as it does by default."""
    path.unlink(missing_ok=True)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)]
    run_command(argv, timeout_s=COMMAND_TIMEOUT_S)


def convert_to_qcow2(raw: Path, path: Path) -> None:
    """Have qemu-img make an image with the content of a raw file."""
    argv = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    run_command(argv, timeout_s=COMMAND_TIMEOUT_S)


def reference_label(program: str) -> str:
    """Return a name for tables from what the program says its version is: `QEMU 7.2.22`."""
    text = run_command([program, "--version"], timeout_s=COMMAND_TIMEOUT_S)
    found = re.search(r"qemu-storage-daemon version ([0-9.]+)", text)
    if found is None:
        raise BenchError(f"{program}: not a qemu-storage-daemon")
    return f"QEMU {found[1]}"


def reference_program(name: str) -> str:
    """Return the path of a qemu-storage-daemon; BenchError when it is not there."""
    return find_program(name)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        raise BenchError(f"no temporary image {path.name} of the snapshot") from None


def _escape(path: Path) -> str:
    """Double the commas, as QEMU's option parser wants them."""
    return str(path).replace(",", ",,")
