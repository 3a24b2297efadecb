"""The rows of the comparison: what is measured, in which scene, and what we aim at."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from loads import (
    Load,
    copy_to_file,
    copy_to_null,
    fresh_writes,
    new_cluster_writes,
    random_io,
    sequential_write,
)


class Scene(enum.Enum):
    """What a row's load meets."""

    SNAPSHOT = "the snapshot is read; nothing was overwritten since it was taken"
    FRESH = "a guest writes; each run has a snapshot of its own, taken just before"
    PLAIN = "a guest reads or writes; there is no snapshot"


class Disk(enum.Enum):
    """What the disk is kept in."""

    RAW = "a raw file"
    QCOW2 = "a qcow2 image that has all of it"
    NEW = "a qcow2 image that qemu-img has made just before the run, and that is empty"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table.

    Fields:
        key: Name on the command line and in JSON.
        title: Name in tables.
        unit: Of the measured value.
        target: Ratio ours / reference to reach; None for a row without one.
        is_lower_better: The ratio should be at most the target; otherwise at least.
    """

    key: str
    title: str
    unit: str
    target: float | None
    is_lower_better: bool = False


@dataclass(frozen=True, slots=True)
class Experiment:
    """A load with its scene, and the rows it fills.

    Fields:
        row: Gets what the load returns.
        scene: What is set up for it.
        load: Runs it once.
        is_read: It only reads, so that a server without snapshots or writes may take part.
        disk: What it is done to.
        times: The disk is so many times as large as the settings say.
        space: Gets the temporary bytes per guest write; None outside Scene.FRESH.
        cpu: Gets the server's processor time per request, or per MiB of a copy; None: is not told.
        is_tls: The client comes over TCP and TLS, with a certificate; else over a Unix socket.
    """

    row: Row
    scene: Scene
    load: Load
    is_read: bool
    disk: Disk = Disk.RAW
    times: int = 1
    space: Row | None = None
    cpu: Row | None = None
    is_tls: bool = False

    def rows(self) -> list[Row]:
        """Return the rows this experiment fills, in the order of the table."""
        return [row for row in (self.row, self.space, self.cpu) if row is not None]


def _snapshot_read(key: str, title: str, unit: str, target: float | None, load: Load) -> Experiment:
    return Experiment(Row(key, title, unit, target), Scene.SNAPSHOT, load, is_read=True)


def _tls_read(key: str, title: str, target: float, load: Load) -> Experiment:
    row = Row(key, title, "MiB/s", target)
    return Experiment(row, Scene.SNAPSHOT, load, is_read=True, is_tls=True)


def _fresh(depth: int) -> Experiment:
    row = Row(f"fresh-write-d{depth}", f"write 4 KiB, depth {depth}, fresh snapshot", "IOPS", 2.0)
    title = f"temporary space per write, depth {depth}"
    space = Row(f"temp-space-d{depth}", title, "B", 0.1, is_lower_better=True)
    return Experiment(row, Scene.FRESH, fresh_writes(depth), is_read=False, space=space)


def _plain(verb: str, depth: int) -> Experiment:
    row = Row(f"guest-{verb}-d{depth}", f"guest {verb} 4 KiB, depth {depth}", "IOPS", 1.0)
    load = random_io(f"rand{verb}", "4k", depth)
    return Experiment(row, Scene.PLAIN, load, is_read=verb == "read")


def _qcow2(
    key: str,
    title: str,
    unit: str,
    target: float,
    load: Load,
    scene: Scene = Scene.PLAIN,
    disk: Disk = Disk.QCOW2,
    times: int = 1,
) -> Experiment:
    row = Row(f"qcow2-{key}", f"qcow2: {title}", unit, target)
    what = "MiB" if unit == "MiB/s" else "request"
    cpu = Row(f"{row.key}-cpu", f"server's CPU per {what}", "ns", None, is_lower_better=True)
    is_read = "read" in key or "copy" in key
    return Experiment(row, scene, load, is_read, disk=disk, times=times, cpu=cpu)


ONE_CONNECTION: Final = ("--connections=1", "--request-size=2097152")

EXPERIMENTS: Final[tuple[Experiment, ...]] = (
    _snapshot_read("nbdcopy", "nbdcopy to null", "MiB/s", 2.0, copy_to_null()),
    _snapshot_read(
        "nbdcopy-one", "nbdcopy, one connection", "MiB/s", 3.0, copy_to_null(*ONE_CONNECTION)
    ),
    _snapshot_read("nbdcopy-file", "nbdcopy to a file", "MiB/s", None, copy_to_file()),
    _snapshot_read(
        "read-4k-d1", "read 4 KiB, depth 1", "IOPS", 1.2, random_io("randread", "4k", 1)
    ),
    _snapshot_read(
        "read-4k-d16", "read 4 KiB, depth 16", "IOPS", 3.0, random_io("randread", "4k", 16)
    ),
    _snapshot_read(
        "read-64k-d16", "read 64 KiB, depth 16", "IOPS", 1.5, random_io("randread", "64k", 16)
    ),
    _snapshot_read(
        "read-1m-d4", "read 1 MiB, depth 4", "IOPS", 1.2, random_io("randread", "1m", 4)
    ),
    _fresh(1),
    _fresh(16),
    _plain("read", 1),
    _plain("read", 16),
    _plain("write", 1),
    _plain("write", 16),
    _tls_read("nbdcopy-tls", "nbdcopy over TLS", 1.2, copy_to_null()),
    _tls_read(
        "nbdcopy-tls-one", "nbdcopy over TLS, one connection", 1.2, copy_to_null(*ONE_CONNECTION)
    ),
    _qcow2("nbdcopy", "nbdcopy to null", "MiB/s", 1.5, copy_to_null(), Scene.SNAPSHOT),
    _qcow2(
        "read-4k-d16",
        "read 4 KiB, depth 16",
        "IOPS",
        1.5,
        random_io("randread", "4k", 16),
        Scene.SNAPSHOT,
    ),
    _qcow2(
        "guest-read-d16",
        "guest read 4 KiB, depth 16",
        "IOPS",
        1.5,
        random_io("randread", "4k", 16),
    ),
    _qcow2(
        "guest-write-d16",
        "guest write 4 KiB, depth 16",
        "IOPS",
        1.0,
        random_io("randwrite", "4k", 16),
    ),
    _qcow2(
        "new-write-d16",
        "write 4 KiB, depth 16, new clusters",
        "IOPS",
        1.0,
        new_cluster_writes(16),
        disk=Disk.NEW,
        times=8,
    ),
    _qcow2(
        "sequential-1m",
        "write all of a new image, 1 MiB, depth 4",
        "IOPS",
        1.0,
        sequential_write("1m", 4),
        disk=Disk.NEW,
        times=2,
    ),
    _qcow2(
        "sequential-256k",
        "write all of a new image, 256 KiB, depth 4",
        "IOPS",
        1.0,
        sequential_write("256k", 4),
        disk=Disk.NEW,
        times=2,
    ),
)

SOCKET_COPY: Final = "socket-copy"
MEMORY: Final = "memory"
HUGE_DISK: Final = "huge-disk"
CROWD: Final = "crowd"
BACKUPS: Final = "backups"
EXTRAS: Final = (SOCKET_COPY, MEMORY, HUGE_DISK, CROWD, BACKUPS)


def keys() -> list[str]:
    """Return every name that `--only` can match."""
    return [row.key for experiment in EXPERIMENTS for row in experiment.rows()] + list(EXTRAS)


def matches(pattern: str, key: str) -> bool:
    """Tell whether `key` is meant by `pattern`: a whole name, else a glob or a part of a name."""
    if pattern in keys():
        return key == pattern
    return pattern in key or fnmatchcase(key, pattern)


def chosen(pattern: str) -> list[Experiment]:
    """Return the experiments of which at least one row is meant by `pattern`."""
    return [
        experiment
        for experiment in EXPERIMENTS
        if any(matches(pattern, row.key) for row in experiment.rows())
    ]
