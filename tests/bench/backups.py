"""Backups: a full one beside `qemu-img convert`, an incremental one, and what a bitmap costs.

full         `fleece-backup` into a new folder, in turn with `qemu-img convert -O qcow2` of the
             reference's snapshot export; both to stable storage. The ratio is convert's time
             by ours, so more is better.
incremental  a guest has written 1 % of a sparse disk of 8 GiB, in clusters of 64 KiB at random
             places
bitmap       a guest writes 4 KiB at random places, with a recording bitmap that is kept over a
             crash and without, the order alternating; the ratio is that of the rates, so 1 means
             no cost
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from loads import CLUSTER, MIB, Task, random_io, write_clusters
from processes import BenchError, find_program, run_command
from sides import DISK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sides import Fleece, Reference

FULL_TARGET: Final = 1.5
BITMAP_TARGET: Final = 0.95
DEPTHS: Final = (1, 16)
BIG_DISK: Final = 8 << 30  # bytes; for incremental backups
CHANGED: Final = 0.01  # of that disk, before an incremental backup

_BIG: Final = "big"
_BITMAP: Final = "bench"
_TIMEOUT_S: Final = 600.0


@dataclass(slots=True)
class Backups:
    """What backups took.

    Fields:
        full_rate: MiB/s of full backups.
        convert_rate: MiB/s of qemu-img convert, in turn with those.
        incremental_s: Seconds of incremental backups.
        incremental_bytes: Bytes that these have read.
        changed_bytes: Bytes that the guest had written before each, at most.
        bitmap: Depth -> ratios of the guest's rates, with a bitmap by without.
    """

    full_rate: list[float] = field(default_factory=list)
    convert_rate: list[float] = field(default_factory=list)
    incremental_s: list[float] = field(default_factory=list)
    incremental_bytes: list[int] = field(default_factory=list)
    changed_bytes: int = 0
    bitmap: dict[int, list[float]] = field(default_factory=dict)

    def full_ratios(self) -> list[float]:
        """Return how many times as fast as convert each full backup was."""
        return [
            ours / theirs for ours, theirs in zip(self.full_rate, self.convert_rate, strict=True)
        ]


def measure(
    ours: Fleece,
    reference: Reference,
    make_task: Callable[[int, str], Task],
    pairs: int,
    folder: Path,
) -> Backups:
    """Measure everything, `pairs` times; the sides are not running before or after.

    Args:
        ours: Our server.
        reference: What gives `qemu-img convert` its snapshot.
        make_task: Returns the task of a run, by its number, for an export.
        pairs: Runs of each.
        folder: Where backups go; removed again.

    Raises:
        BenchError: A server or client failed.
    """
    found = Backups()
    folder.mkdir()
    try:
        reference.start()
        reference.take_snapshot()
        ours.start()
        for pair in range(pairs):
            task = make_task(pair, ours.live_uri())
            place = folder / f"full-{pair}"
            seconds, _ = _backup(ours, DISK, place)
            found.full_rate.append(task.size / MIB / seconds)
            seconds = _convert(reference.snapshot_uri(), folder / "convert.qcow2")
            found.convert_rate.append(task.size / MIB / seconds)
            for name in _bitmaps(ours):  # that of this folder, which is not used again
                _ask(ours, "fleece-bitmap-remove", {"disk": DISK, "bitmap": name})
            shutil.rmtree(place)
        _measure_incremental(found, ours, make_task, pairs, folder)
        for depth in DEPTHS:
            load = random_io("randwrite", "4k", depth)
            found.bitmap[depth] = []
            for pair in range(pairs):
                rates = {}
                for has_bitmap in (False, True) if pair % 2 == 0 else (True, False):
                    if has_bitmap:
                        _ask(ours, "fleece-bitmap-add", {"disk": DISK, "bitmap": _BITMAP})
                    rates[has_bitmap] = load(make_task(pair, ours.live_uri())).rate
                    if has_bitmap:
                        _ask(ours, "fleece-bitmap-remove", {"disk": DISK, "bitmap": _BITMAP})
                found.bitmap[depth].append(rates[True] / rates[False])
    finally:
        ours.stop()
        reference.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _measure_incremental(
    found: Backups,
    ours: Fleece,
    make_task: Callable[[int, str], Task],
    pairs: int,
    folder: Path,
) -> None:
    """Back a big disk up, and again behind each of `pairs` times that a guest wrote to it."""
    file, place = folder / "big.raw", folder / "big"
    with file.open("wb") as empty:
        empty.truncate(BIG_DISK)
    _ask(ours, "fleece-disk-add", {"location": str(file), "disk": _BIG})
    _backup(ours, _BIG, place)
    count = round(BIG_DISK * CHANGED) // CLUSTER
    found.changed_bytes = count * CLUSTER
    for pair in range(pairs):
        task = replace(make_task(pair, ours.disk_uri(_BIG)), size=BIG_DISK)
        write_clusters(count)(task)
        seconds, data = _backup(ours, _BIG, place)
        found.incremental_s.append(seconds)
        found.incremental_bytes.append(data)
    _ask(ours, "fleece-disk-remove", {"disk": _BIG})


def _backup(ours: Fleece, disk: str, place: Path) -> tuple[float, int]:
    """Back a disk up; return seconds, from the request to the synced file, and bytes of data."""
    with _Control(ours) as control:
        start = time.perf_counter()
        run = control.ask("fleece-backup", {"disks": [disk], "dir": str(place)})
        control.wait_concluded(run["job-id"])
        seconds = time.perf_counter() - start
        runs = control.ask("query-fleece-backups", {})
    found = next(one for one in runs if one["job-id"] == run["job-id"])
    if found["state"] != "done":
        raise BenchError(f"backup: {found}")
    return seconds, found["disks"][0]["data-bytes"]


def _bitmaps(ours: Fleece) -> list[str]:
    return [row["bitmap"] for row in _ask(ours, "query-fleece-bitmaps", {"disk": DISK})]


def _convert(uri: str, target: Path) -> float:
    """Copy a snapshot with qemu-img; return seconds, to the synced file."""
    target.unlink(missing_ok=True)
    words = ["convert", "-t", "writeback", "-f", "raw", "-O", "qcow2", uri, str(target)]
    start = time.perf_counter()
    run_command([find_program("qemu-img"), *words], timeout_s=_TIMEOUT_S)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _ask(ours: Fleece, command: str, arguments: dict):
    """Run a command of the control socket."""
    with _Control(ours) as control:
        return control.ask(command, arguments)


class _Control:
    """A connection to the control socket."""

    def __init__(self, ours: Fleece) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(_TIMEOUT_S)
        self._sock.connect(str(ours.control_path()))
        self._file = self._sock.makefile("rwb")
        self._events: list[dict] = []
        self._file.readline()
        self.ask("qmp_capabilities", {})

    def __enter__(self) -> _Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._sock.close()

    def ask(self, command: str, arguments: dict):
        """Run a command; events that come meanwhile are kept."""
        request = {"execute": command, "arguments": arguments}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline())):
            self._events.append(answer)
        if "return" not in answer:
            raise BenchError(f"{command}: {answer}")
        return answer["return"]

    def wait_concluded(self, job: str) -> None:
        """Return when a job is over: asking again and again would slow it down."""
        wanted = {"id": job, "status": "concluded"}
        while True:
            event = self._events.pop(0) if self._events else json.loads(self._file.readline())
            if event["event"] == "JOB_STATUS_CHANGE" and event["data"] == wanted:
                return
