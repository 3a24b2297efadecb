"""The loads: nbdcopy, fio's nbd engine, and the machine's own socket rate.

A load is a function of a Task that runs once and returns what was done, and at which rate; bigger
is better. What makes a comparison fair is fixed here: fio gets the same seed on every side, its
writes carry plain non-zero data (no trim, no write-zeroes), and readers keep structured replies on,
which is the default of nbdcopy and fio. The copy-before-write of QEMU 7.2 gives wrong data
otherwise.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from processes import BenchError, find_program, run_command

if TYPE_CHECKING:
    from pathlib import Path

MIB: Final = 1 << 20
CLUSTER: Final = 64 << 10
TIMEOUT_MARGIN_S: Final = 120.0
SOCKET_BUFFER: Final = 1 << 20
FIO_BUFFERS_NONZERO: Final = ["--refill_buffers=0", "--scramble_buffers=1", "--zero_buffers=0"]


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a load.

    Fields:
        uri: The export.
        size: Bytes of the disk.
        seed: fio's; the same on every side of a pair.
        runtime_s: Seconds of the runs that are bounded by time.
        scratch: A file the load may write; removed by the load.
    """

    uri: str
    size: int
    seed: int
    runtime_s: float
    scratch: Path


@dataclass(frozen=True, slots=True)
class Done:
    """What a load did.

    Fields:
        rate: Of the row's unit.
        count: Requests, or MiB of a copy, in all.
    """

    rate: float
    count: float


Load = Callable[[Task], Done]


def check_tools() -> None:
    """Check that nbdcopy and fio with its nbd engine are there.

    Raises:
        BenchError: One is missing; says which.
    """
    find_program("nbdcopy")
    find_program("fio")
    engines = run_command(["fio", "--enghelp"], timeout_s=TIMEOUT_MARGIN_S).split()
    if "nbd" not in engines:
        raise BenchError("fio was built without its nbd engine")


def copy_to_null(*options: str) -> Load:
    """Return a load that reads the whole export with nbdcopy; in MiB/s."""

    def load(task: Task) -> Done:
        return _timed_copy(task, [*options, task.uri, "null:"])

    return load


def copy_to_file() -> Load:
    """Return a load that copies the whole export to a new file with nbdcopy; in MiB/s."""

    def load(task: Task) -> Done:
        task.scratch.unlink(missing_ok=True)
        try:
            return _timed_copy(task, [task.uri, str(task.scratch)])
        finally:
            task.scratch.unlink(missing_ok=True)

    return load


def random_io(kind: str, block: str, depth: int) -> Load:
    """Return a load of random requests for a fixed time; in requests per second.

    Args:
        kind: fio's `randread` or `randwrite`.
        block: Request size as fio writes it.
        depth: Requests in flight.
    """

    def load(task: Task) -> Done:
        limit = ["--time_based", f"--runtime={task.runtime_s * 1000:.0f}ms"]
        return _fio(task, kind, block, depth, limit)

    return load


def fresh_writes(depth: int) -> Load:
    """Return a load of as many random 4 KiB guest writes as `fresh_write_count` says."""

    def load(task: Task) -> Done:
        limit = [f"--number_ios={fresh_write_count(task.size)}"]
        return _fio(task, "randwrite", "4k", depth, limit)

    return load


def write_clusters(count: int) -> Load:
    """Return a load that writes so many clusters of 64 KiB at random places."""

    def load(task: Task) -> Done:
        return _fio(task, "randwrite", "64k", 1, [f"--number_ios={count}"])

    return load


def new_cluster_writes(depth: int) -> Load:
    """Return a load of random 4 KiB writes at the starts of clusters of an empty disk.

    A quarter as many as the disk has clusters of 64 KiB: then 88 % of them are the first there.
    """

    def load(task: Task) -> Done:
        limit = [f"--number_ios={max(1, task.size // CLUSTER // 4)}", f"--blockalign={CLUSTER}"]
        return _fio(task, "randwrite", "4k", depth, limit)

    return load


def sequential_write(block: str, depth: int) -> Load:
    """Return a load that writes the whole disk from its start, and then flushes; in requests."""

    def load(task: Task) -> Done:
        return _fio(task, "write", block, depth, ["--end_fsync=1"])

    return load


def fresh_write_count(size: int) -> int:
    """Return how many random writes to do under a fresh snapshot of a disk of `size` bytes.

    Half as many as the disk has clusters of 64 KiB: then 79 % of them (1 - e^-0.5 over 0.5) are
    the first in their cluster, also for a server that copies clusters as large as that.
    """
    return max(1, size // CLUSTER // 2)


def socket_copy_rate(seconds: float) -> float:
    """Return the MiB/s that one process can send another over a Unix socket, in big buffers.

    No NBD server on this machine can give one connection more than this without shared memory.
    """
    reader, writer = socket.socketpair()
    child = os.fork()
    if child == 0:
        reader.close()
        _send_until_closed(writer)
        os._exit(0)
    writer.close()
    try:
        return _receive_for(reader, seconds)
    finally:
        reader.close()
        os.waitpid(child, 0)


def _send_until_closed(writer: socket.socket) -> None:
    buffer = os.urandom(SOCKET_BUFFER)
    try:
        while True:
            writer.sendall(buffer)
    except (BrokenPipeError, ConnectionResetError):
        return


def _receive_for(reader: socket.socket, seconds: float) -> float:
    buffer = bytearray(SOCKET_BUFFER)
    reader.recv_into(buffer)
    received = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        received += reader.recv_into(buffer)
    return received / MIB / spent


def _timed_copy(task: Task, words: list[str]) -> Done:
    """Run nbdcopy and return MiB/s, its own start and connections included."""
    start = time.perf_counter()
    run_command(["nbdcopy", *words], timeout_s=TIMEOUT_MARGIN_S + task.size / (8 * MIB))
    return Done(task.size / MIB / (time.perf_counter() - start), task.size / MIB)


def _fio(task: Task, kind: str, block: str, depth: int, limit: list[str]) -> Done:
    argv = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={task.uri}", f"--rw={kind}"]
    argv += [f"--bs={block}", f"--iodepth={depth}", f"--size={task.size}"]
    argv += [f"--randseed={task.seed}", "--output-format=json", *FIO_BUFFERS_NONZERO, *limit]
    output = run_command(argv, timeout_s=TIMEOUT_MARGIN_S + task.runtime_s)
    # The engine says "connected to NBD server" before the JSON begins.
    report = json.loads(output[output.index("{") :])
    job = report["jobs"][0]
    direction = job["read" if kind == "randread" else "write"]
    if job["error"] or not direction["total_ios"]:
        raise BenchError(f"fio {kind} {block} depth {depth}: no request was answered")
    return Done(float(direction["iops"]), direction["total_ios"])
