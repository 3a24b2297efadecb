"""Around a live daemon: guests and readers, real programs, and waiting that has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from nbdfleece.cli.client import Client
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client_replies import Reply
from tests.support.daemon_process import Daemon, Result, environment
from tests.support.nbd_client import NbdClient, connected

T = TypeVar("T")

KiB = 1 << 10
MiB = 1 << 20

SOON_S = 8.0  # what nothing holds up takes far less, also on a busy machine
LONG_S = 25.0
PIECE = 1 * MiB


# --- waiting -------------------------------------------------------------------------------------


async def soon(work: Awaitable[T], seconds: float = SOON_S) -> T:
    """Return the result of what must not be held up by anything."""
    async with asyncio.timeout(seconds):
        return await work


async def eventually(condition: Callable[[], object], seconds: float = LONG_S) -> object:
    """Return what the condition (or coroutine function) gives as soon as that is true."""
    last: object = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                last = condition()
                if inspect.isawaitable(last):
                    last = await last
                if last:
                    return last
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never came true; last: {last!r}") from None


# --- the daemon ----------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, *args: str | Path, disks: int = 1) -> Iterator[Daemon]:
    """A daemon that is ready, and of which no traceback is expected."""
    with Daemon(folder, *args) as daemon:
        daemon.ready(disks)
        yield daemon
        assert "Traceback" not in daemon.errors(), daemon.errors()


async def cli(daemon: Daemon, *args: str | Path) -> Result:
    """Run a command of ours while the test's own clients go on."""
    return await asyncio.to_thread(daemon.run, *args)


async def ask(daemon: Daemon, command: str, arguments: dict | None = None):
    """Run a command of the control socket: the same as with the command line, and faster."""

    def work():
        with Client(str(daemon.control)) as monitor:
            return monitor.execute(command, arguments)

    return await asyncio.to_thread(work)


async def snapshot(daemon: Daemon, *disks: str, name: str, **options: str | int | float) -> None:
    """Take a snapshot; options as in QMP, with underscores."""
    more = {option.replace("_", "-"): value for option, value in options.items()}
    await ask(daemon, "fleece-snapshot-create", {"disks": list(disks), "name": name, **more})


async def listed(daemon: Daemon) -> dict[str, dict]:
    """Return what is known of the snapshots, by the names of their exports."""
    return {row["export"]: row for row in await ask(daemon, "query-fleece-snapshots")}


async def clients(daemon: Daemon) -> list[dict]:
    """Return the clients that the daemon knows, with what each has done."""
    return await ask(daemon, "query-fleece-clients")


async def in_flight(daemon: Daemon) -> int:
    """Return how many requests have begun and not ended."""
    return sum(row.get("in-flight", 0) for row in await soon(clients(daemon)))


async def has_in_flight(daemon: Daemon, count: int) -> bool:
    """Tell whether so many requests have begun and not ended."""
    return await in_flight(daemon) >= count


def descriptors(daemon: Daemon) -> list[str]:
    """Return what the daemon has open; sockets without their numbers."""
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    found = []
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry).split(":[")[0])
    return sorted(found)


# --- raw clients ---------------------------------------------------------------------------------


@asynccontextmanager
async def client(
    daemon: Daemon, export: str, *, structured: bool = True
) -> AsyncIterator[NbdClient]:
    """A connection to an export."""
    async with connected(str(daemon.socket), export, structured=structured) as one:
        yield one


async def read_export(daemon: Daemon, export: str, *, structured: bool = True) -> bytes:
    """Return the whole content of an export."""
    async with client(daemon, export, structured=structured) as one:
        return await read_whole(one)


async def read_whole(one: NbdClient) -> bytes:
    """Return the whole content of a connection's export."""
    assert one.export is not None
    size = one.export.size
    parts = [
        await one.submit(c.NBD_CMD_READ, offset, min(PIECE, size - offset))
        for offset in range(0, size, PIECE)
    ]
    replies: list[Reply] = [await part for part in parts]
    assert [reply.error for reply in replies] == [0] * len(replies)
    return b"".join(bytes(reply.data) for reply in replies)


def blocks(size: int, block: int, *, first: int = 1) -> bytes:
    """Blocks, each full of a byte of its own (never 0), counted from `first`."""
    count = -(-size // block)
    return b"".join(bytes(((first + i) % 255 + 1,)) * block for i in range(count))[:size]


async def scribble(one: NbdClient, rng: random.Random, *, largest: int = 300 * KiB) -> None:
    """Write, zero or trim a random range, as a guest does."""
    assert one.export is not None
    size = one.export.size
    offset = rng.randrange(size)
    length = min(rng.choice((1, 511, 4 * KiB, 64 * KiB, rng.randrange(largest) + 1)), size - offset)
    kind = rng.randrange(8)
    if kind < 5:
        await one.write(offset, rng.randbytes(length))
    elif kind == 5:
        await one.zero(offset, length, flags=rng.choice((0, c.NBD_CMD_FLAG_NO_HOLE)))
    elif kind == 6:
        await one.zero(offset, min(4 * MiB, size - offset))
    else:
        await one.trim(offset, length)


# --- real programs -------------------------------------------------------------------------------


def run(
    *command: str | Path, code: int | None = 0, seconds: float = 50.0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `code` None for any exit code."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        env=environment(),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if code is not None:
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


async def program_run(
    *command: str | Path, code: int | None = 0, seconds: float = 50.0
) -> subprocess.CompletedProcess[str]:
    """As `run`, while the test's own clients go on."""
    return await asyncio.to_thread(run, *command, code=code, seconds=seconds)


@contextmanager
def started(*command: str | Path, **options) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, killed at the end if it still runs then."""
    none = subprocess.DEVNULL
    options = {"stdin": none, "stdout": none, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen([str(part) for part in command], env=environment(), **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def qemu_io(
    program: Callable[[str], str], target: str | Path, *commands: str, code: int = 0
) -> str:
    """Run commands of qemu-io on a raw image or URI, a snapshot read-only; return what it said."""
    options = ["-r"] if "@" in str(target) else []
    options += [part for command in commands for part in ("-c", command)]
    done = run(program("qemu-io"), "-f", "raw", *options, target, code=code)
    if code == 0:
        assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr
