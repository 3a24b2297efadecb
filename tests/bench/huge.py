"""A 16 TiB sparse disk: how long it takes to serve it and take its snapshot, and what it costs.

Memory is the difference to the same side serving a disk of 1 MiB, at the same moment, so that the
interpreter and the program text do not count.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from processes import BenchError
from sides import Side

SMALL: Final = 1 << 20
HUGE: Final = 16 << 40
MEMORY_FOLDER: Final = Path("/dev/shm")

MakeSide = Callable[[Path, Path], Side]
"""Returns a side for a file to serve and a folder of its own."""


@dataclass(frozen=True, slots=True)
class HugeDisk:
    """What the 16 TiB disk took.

    Fields:
        serve_s: Seconds from starting the server until it is ready.
        snapshot_s: Seconds of taking the snapshot; for the reference of its restart with one.
        added_bytes: Peak memory with the snapshot, less the same with a disk of 1 MiB.
    """

    serve_s: float
    snapshot_s: float
    added_bytes: int


def measure(make_side: MakeSide, folder: Path) -> HugeDisk:
    """Serve the huge disk and the small one in turn, in `folder`, which is removed again.

    Raises:
        BenchError: The server failed, or no file system here takes a file of that size.
    """
    folder = _roomy(folder)
    folder.mkdir()
    try:
        _, _, base = _serve(make_side, folder / "small", SMALL)
        serve_s, snapshot_s, peak = _serve(make_side, folder / "huge", HUGE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return HugeDisk(serve_s, snapshot_s, peak - base)


def _serve(make_side: MakeSide, folder: Path, size: int) -> tuple[float, float, int]:
    folder.mkdir()
    active = folder / "disk.raw"
    with active.open("wb") as file:
        file.truncate(size)
    side = make_side(active, folder / "side")
    try:
        start = time.perf_counter()
        side.start()
        ready = time.perf_counter()
        side.take_snapshot()
        return ready - start, time.perf_counter() - ready, side.peak_memory()
    finally:
        side.stop()


def _roomy(folder: Path) -> Path:
    """Return `folder`, or its like in memory when its file system has no files of that size."""
    for place in (folder, MEMORY_FOLDER / f"{folder.parent.name}-{folder.name}"):
        if _takes_huge_files(place.parent):
            return place
    raise BenchError("no file system here takes a file of 16 TiB")


def _takes_huge_files(folder: Path) -> bool:
    probe = folder / "nbdfleece-bench-probe"
    try:
        with probe.open("wb") as file:
            file.truncate(HUGE)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
