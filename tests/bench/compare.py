"""The comparison: experiments run on the sides in turn, and ratios of neighbouring runs.

The machine is shared and noisy, so only ratios of runs that follow each other count. A pair is one
run on every side; the order turns round from pair to pair (A B, B A, A B ...), so that neither
side always goes first. Each side is started anew for each experiment, and its file is brought into
the page cache; one rehearsal that does not count comes before the pairs, except where every run
has a fresh snapshot anyway.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from loads import Task, fresh_write_count
from processes import BenchError
from rows import Disk, Experiment, Row, Scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sides import Side, TlsFolders

WARM_BUFFER: Final = 4 << 20
FIRST_SEED: Final = 1000
REHEARSAL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured: bytes of the disk, pairs per row, seconds per timed run."""

    size: int
    pairs: int
    runtime_s: float
    scratch: Path


@dataclass(slots=True)
class Measured:
    """The values of one row.

    Fields:
        samples: Side's label -> one value per pair, in order.
        error: Why the row is incomplete, in one line; empty when it is not.
    """

    row: Row
    samples: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    def add(self, label: str, value: float) -> None:
        """Append one value of a side."""
        self.samples.setdefault(label, []).append(value)

    def middle(self, label: str) -> float | None:
        """Return the median of a side, None when it was not measured."""
        values = self.samples.get(label)
        return statistics.median(values) if values else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over the reference: over the pairs, and whether the target holds (None: no target)."""

    pairs: list[float]
    median: float
    minimum: float
    maximum: float
    holds: bool | None


def ratio(measured: Measured, ours: str, reference: str) -> Ratio | None:
    """Return the ratio of two sides of a row; None when either is missing.

    The target holds when the median over the pairs reaches it.
    """
    mine = measured.samples.get(ours, [])
    theirs = measured.samples.get(reference, [])
    pairs = [a / b for a, b in zip(mine, theirs, strict=False) if b > 0]
    if not pairs or measured.error:
        return None
    median = statistics.median(pairs)
    target = measured.row.target
    holds = None
    if target is not None:
        holds = median <= target if measured.row.is_lower_better else median >= target
    return Ratio(pairs, median, min(pairs), max(pairs), holds)


class Comparison:
    """Runs experiments over the sides and keeps the peak memory each side reached.

    Fields:
        peak: Side's label -> most bytes of resident memory seen under any load.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        writers: Sequence[Side],
        readers: Sequence[Side],
        tls: TlsFolders | None,
    ) -> None:
        """Set up.

        Args:
            settings: How much to measure.
            writers: Sides that take part in everything, ours first.
            readers: Further sides for the experiments that only read.
            tls: Certificates for the experiments over TLS; None when there are none of those.
        """
        self._tls = tls
        self.peak: dict[str, int] = {}
        self._settings = settings
        self._writers = list(writers)
        self._readers = list(readers)

    def run(self, experiment: Experiment, progress: Callable[[str], None]) -> list[Measured]:
        """Run one experiment on every side, all its pairs.

        Returns:
            Its rows; with `error` set, and as far as it came, when a side failed. No server is
            left running either way.
        """
        sides = self._writers + self._readers if experiment.is_read else self._writers
        results = [Measured(row) for row in experiment.rows()]
        try:
            self._open(experiment, sides)
            for pair in range(self._settings.pairs):
                progress(f"{experiment.row.key}: pair {pair + 1} of {self._settings.pairs}")
                for side in sides if pair % 2 == 0 else sides[::-1]:
                    with _naming(side):
                        self._run_once(experiment, side, pair, results)
        except BenchError as error:
            for measured in results:
                measured.error = str(error)
        finally:
            for side in sides:
                side.stop()
        return results

    def _open(self, experiment: Experiment, sides: list[Side]) -> None:
        for side in sides:
            if experiment.disk is Disk.NEW:
                continue  # made and served run by run
            warm(side.active)
            side.tls = self._tls if experiment.is_tls else None
            with _naming(side):
                side.start()
                if experiment.scene is Scene.SNAPSHOT:
                    side.take_snapshot()
                if experiment.scene is not Scene.FRESH:
                    task = self._task(experiment, side, 0)
                    experiment.load(replace(task, runtime_s=REHEARSAL_S))

    def _run_once(
        self, experiment: Experiment, side: Side, pair: int, results: list[Measured]
    ) -> None:
        if experiment.disk is Disk.NEW:
            side.serve_new(self._settings.size * experiment.times)
        else:
            settle(side.active)
            warm(side.active, small_pages=not experiment.is_read)
        if experiment.scene is Scene.FRESH:
            side.take_snapshot()
        cpu_before = side.cpu_seconds()
        done = experiment.load(self._task(experiment, side, pair))
        results[0].add(side.label, done.rate)
        if experiment.cpu is not None:
            spent = side.cpu_seconds() - cpu_before
            results[-1].add(side.label, spent * 1e9 / done.count)
        self.peak[side.label] = max(self.peak.get(side.label, 0), side.peak_memory())
        if experiment.disk is Disk.NEW:
            side.stop()
            side.active.unlink()  # not written back during the next run
        if experiment.scene is Scene.FRESH:
            writes = fresh_write_count(self._settings.size)
            results[1].add(side.label, side.temp_bytes() / writes)
            side.drop_snapshot()

    def _task(self, experiment: Experiment, side: Side, pair: int) -> Task:
        is_snapshot = experiment.scene is Scene.SNAPSHOT
        return Task(
            uri=side.snapshot_uri() if is_snapshot else side.live_uri(),
            size=self._settings.size * experiment.times,
            seed=FIRST_SEED + pair,
            runtime_s=self._settings.runtime_s,
            scratch=self._settings.scratch,
        )


def memory_at_rest(side: Side) -> int:
    """Return the peak memory of a side that has started with one disk and done nothing."""
    try:
        side.start()
        return side.peak_memory()
    finally:
        side.stop()


def warm(path: Path, *, small_pages: bool = False) -> None:
    """Bring a file into the page cache by reading it.

    Args:
        path: The file; nothing of it is dirty.
        small_pages: Cache it anew in 4 KiB pages, as random access of a guest leaves it. Where the
            kernel caches in large folios, a 4 KiB write costs as its folio is large: 2 us or 30 us
            on the same ext4 file, whichever server makes the call. A comparison of servers must
            not depend on which file has been given which.
    """
    buffer = bytearray(WARM_BUFFER)
    with path.open("rb", buffering=0) as file:
        if small_pages:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while file.readinto(buffer):
            pass


def settle(path: Path) -> None:
    """Write back what earlier runs left dirty, so that it is not written back during the next."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _naming(side: Side) -> Iterator[None]:
    """Put the side's name before what went wrong with it."""
    try:
        yield
    except BenchError as error:
        raise BenchError(f"{side.label}: {error}") from error
