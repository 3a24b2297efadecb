"""Other people's NBD servers as child processes, and one that follows a script."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from nbdfleece.block.drivers.nbd.driver import NbdDriver
from nbdfleece.block.drivers.nbd.target import ClientTls, InetServer, Target, UnixServer
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node

OPEN_S = 20.0  # a server that has just been started is tried for so long


class Peer:
    """A server process; `kill` is a crash, `stop` the end."""

    def __init__(self, *command: str | Path) -> None:
        self.command = [str(part) for part in command]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """As `kill -9`, of the processes too that it has made for its clients."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
            self.process = None

    stop = kill


def qemu_nbd(program: str, image: Path, path: Path, *options: str) -> Peer:
    return Peer(
        *(program, "--persistent", "--format=raw", "--shared=8", f"--socket={path}"),
        *("--discard=unmap", *options, image),
    )


def nbdkit(program: str, image: Path, path: Path, *options: str, plugin: str = "file") -> Peer:
    path.unlink(missing_ok=True)  # it does not replace the socket of one that was killed
    filters = [option for option in options if option.startswith("--")]
    parameters = [option for option in options if not option.startswith("--")]
    return Peer(program, "-f", "-U", path, *filters, plugin, image, *parameters)


class NbdServer(Peer):
    """nbd-server goes into the background, unless it is to serve one client only."""

    def __init__(self, pid_file: Path, *command: str | Path) -> None:
        self.pid_file = pid_file
        super().__init__(*command, "-p", pid_file)

    def start(self) -> None:
        self.pid_file.unlink(missing_ok=True)
        super().start()
        assert self.process is not None
        assert self.process.wait(20) == 0
        self.process = None

    def kill(self) -> None:
        if self.pid_file.exists():
            os.killpg(int(self.pid_file.read_text()), signal.SIGKILL)
            self.pid_file.unlink()

    stop = kill


def nbd_server(program: str, image: Path, path: Path) -> Peer:
    config = path.with_suffix(".conf")
    # It listens on TCP too, come what may.
    config.write_text(
        f"[generic]\nunixsock = {path}\nlistenaddr = 127.0.0.1\nport = {free_port()}\n"
        f"[x]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    return NbdServer(path.with_suffix(".pid"), program, "-C", config)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def upstream(
    path: Path | str,
    export: str = "x",
    *,
    reconnect_s: float = 0.0,
    open_s: float = OPEN_S,
    bitmap: str | None = None,
    tls: ClientTls | None = None,
) -> NbdDriver:
    """The driver for an export on a unix socket."""
    target = Target(UnixServer(str(path)), export, tls, bitmap)
    return NbdDriver(target, reconnect_delay_s=reconnect_s, open_timeout_s=open_s)


def upstream_tcp(
    port: int, export: str, tls: ClientTls | None, *, host: str = "127.0.0.1"
) -> NbdDriver:
    target = Target(InetServer(host, port), export, tls)
    return NbdDriver(target, reconnect_delay_s=0.0, open_timeout_s=OPEN_S)


async def add(graph: Graph, driver: NbdDriver, *, read_only: bool = False) -> Node:
    return await graph.add(None, driver, read_only=read_only, discard_enabled=True)


# --- a server that follows a script --------------------------------------------------------------

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(path: Path, script: Script) -> AsyncIterator[None]:
    """Run `script` for each connection; at the end all are cut off."""
    writers: list[asyncio.StreamWriter] = []
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        writers.append(writer)
        try:
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # also when cut off: asyncio's streams report a cancelled one as a failure
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            if not writer.transport.is_closing():  # of a closed TLS one Python 3.11.2 fails
                writer.transport.abort()
        for task in list(running):
            task.cancel()
        if running:
            await asyncio.wait(running)
