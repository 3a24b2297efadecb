"""Accounting of requests: counts, bytes, times, latencies in intervals and in histograms.

Nothing is counted until somebody asks for it. Then `CountedVerbs` is put in the way of the
requests of a node or of an export; until then the data path knows nothing of it.

Invariants
  A1  A request is counted once, when it ends: as done, or as failed.
  A2  A failed request counts in the times and intervals only with `account_failed`; it is in the
      histogram either way.
  A3  A zero write that is refused with ENOTSUP is not counted: whoever asked for it writes zeroes
      instead, or has merely asked whether there is a better way.

Follows: QEMU block/accounting.c, util/timed-average.c, qapi/block-core.json (BlockDeviceStats).
"""

from __future__ import annotations

import enum
import errno
import time
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.limits import MAX_HISTOGRAM_BINS, MAX_STATS_INTERVALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbdfleece.base.extent import Extent
    from nbdfleece.datapath.route import IoVerbs

_SECOND: Final = 10**9

Stats = dict[str, object]
"""Members of a QMP structure."""


class Kind(enum.Enum):
    """What a request counts as; the value is QEMU's short name. Zero writes are writes."""

    READ = "rd"
    WRITE = "wr"
    FLUSH = "flush"
    UNMAP = "unmap"


class Histogram:
    """How many requests took how long.

    Args:
        boundaries: Nanoseconds, checked by `check_boundaries`.

    Attributes:
        boundaries: As given.
        bins: Requests below the first boundary, from each one up to the next, and from the last.
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self.boundaries = list(boundaries)
        self.bins = [0] * (len(self.boundaries) + 1)

    def account(self, latency_ns: int) -> None:
        """Count one request: in the bin whose lower boundary it has reached."""
        self.bins[bisect_right(self.boundaries, latency_ns)] += 1


def check_boundaries(boundaries: Sequence[int]) -> bool:
    """Tell whether boundaries make a histogram: at least one, positive, strictly increasing."""
    pairs = zip([0, *boundaries], boundaries, strict=False)
    is_rising = all(before < after for before, after in pairs)
    return 0 < len(boundaries) < MAX_HISTOGRAM_BINS and is_rising


class _Window:
    """Latencies of one stretch of time."""

    __slots__ = ("count", "end_ns", "longest", "shortest", "total")

    def __init__(self, end_ns: int) -> None:
        self.end_ns = end_ns
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.count = self.total = self.shortest = self.longest = 0

    def account(self, value: int) -> None:
        """Take one latency in."""
        self.shortest = min(self.shortest, value) if self.count else value
        self.longest = max(self.longest, value)
        self.total += value
        self.count += 1


class TimedAverage:
    """Latencies of about the last `period_ns`.

    Two windows of that length, half a length apart; the older one is told of, so that what is told
    always covers between half a period and a whole one.

    Args:
        period_ns: Length of a window.
        now_ns: The time.
    """

    def __init__(self, period_ns: int, now_ns: int) -> None:
        self.period_ns = period_ns
        self._windows = [_Window(now_ns + period_ns // 2), _Window(now_ns + period_ns)]

    def account(self, latency_ns: int, now_ns: int) -> None:
        """Take one latency in."""
        self.window(now_ns)
        for window in self._windows:
            window.account(latency_ns)

    def window(self, now_ns: int) -> _Window:
        """Return the older window, after those that are over have begun anew."""
        for window in self._windows:
            if window.end_ns <= now_ns:
                window.reset()
                window.end_ns = now_ns + self.period_ns - (now_ns - window.end_ns) % self.period_ns
        return min(self._windows, key=lambda window: window.end_ns)

    def queue_depth(self, now_ns: int) -> float:
        """Return how many requests were in flight on average."""
        window = self.window(now_ns)
        elapsed_ns = self.period_ns - (window.end_ns - now_ns)
        return window.total / elapsed_ns if elapsed_ns > 0 else 0.0


class _Counts:
    """Totals of one kind of request."""

    __slots__ = ("bytes", "failed", "invalid", "operations", "total_ns")

    def __init__(self) -> None:
        self.bytes = self.operations = self.failed = self.invalid = self.total_ns = 0


class Accounting:
    """What was counted for one node or export.

    Args:
        clock_ns: Returns the time in nanoseconds.

    Attributes:
        account_invalid: Requests that were refused unseen count as use, for the idle time.
        account_failed: Failed requests count in times and intervals.
        histograms: Latencies, of the kinds for which that was asked.
        highest_offset: Where the highest write so far has ended.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock_ns = clock_ns
        self.account_invalid = True
        self.account_failed = True
        self.histograms: dict[Kind, Histogram] = {}
        self.highest_offset = 0
        self._counts = {kind: _Counts() for kind in Kind}
        self._intervals: dict[int, dict[Kind, TimedAverage]] = {}
        self._last_ns: int | None = None

    # --- what is counted -----------------------------------------------------------------------

    def done(self, kind: Kind, length: int, begun_ns: int) -> None:
        """Count a request that has succeeded."""
        counts = self._counts[kind]
        counts.operations += 1
        counts.bytes += length
        self._time(kind, counts, begun_ns, is_failure=False)

    def failed(self, kind: Kind, begun_ns: int) -> None:
        """Count a request that has failed."""
        counts = self._counts[kind]
        counts.failed += 1
        self._time(kind, counts, begun_ns, is_failure=True)

    def invalid(self, kind: Kind) -> None:
        """Count a request that was refused before it began."""
        self._counts[kind].invalid += 1
        if self.account_invalid:
            self._last_ns = self.clock_ns()

    def _time(self, kind: Kind, counts: _Counts, begun_ns: int, *, is_failure: bool) -> None:
        now_ns = self.clock_ns()
        latency_ns = now_ns - begun_ns
        histogram = self.histograms.get(kind)
        if histogram is not None:
            histogram.account(latency_ns)
        if is_failure and not self.account_failed:
            return
        counts.total_ns += latency_ns
        self._last_ns = now_ns
        for averages in self._intervals.values():
            if kind in averages:
                averages[kind].account(latency_ns, now_ns)

    # --- what is asked for ---------------------------------------------------------------------

    def set_intervals(self, lengths_s: Sequence[int]) -> None:
        """Keep latencies of the last so many seconds, of each length given; they begin anew.

        Raises:
            CommandError: A length is not positive, or there are too many. Nothing has changed.
        """
        if any(length <= 0 for length in lengths_s):
            raise CommandError("interval length must be greater than zero")
        if len(set(lengths_s)) > MAX_STATS_INTERVALS:
            raise CommandError(f"there can be {MAX_STATS_INTERVALS} intervals at most")
        now_ns = self.clock_ns()
        self._intervals = {
            length: {
                kind: TimedAverage(length * _SECOND, now_ns)
                for kind in (Kind.READ, Kind.WRITE, Kind.FLUSH)
            }
            for length in sorted(set(lengths_s))
        }

    def set_histograms(self, boundaries: Mapping[Kind, Sequence[int]]) -> None:
        """Begin histograms of some kinds of requests anew; the others go on.

        Args:
            boundaries: Nanoseconds, by kind; each set passes `check_boundaries`.
        """
        self.histograms |= {kind: Histogram(given) for kind, given in boundaries.items()}

    # --- what is told --------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the members of QMP's BlockDeviceStats."""
        now_ns = self.clock_ns()
        found: Stats = {"wr_highest_offset": self.highest_offset}
        for kind, counts in self._counts.items():
            name = kind.value
            found |= {
                f"{name}_operations": counts.operations,
                f"failed_{name}_operations": counts.failed,
                f"invalid_{name}_operations": counts.invalid,
                f"{name}_total_time_ns": counts.total_ns,
            }
            if kind is not Kind.FLUSH:
                found |= {f"{name}_bytes": counts.bytes, f"{name}_merged": 0}
        found |= {
            "account_invalid": self.account_invalid,
            "account_failed": self.account_failed,
            "timed_stats": [
                _timed_stats(length, averages, now_ns)
                for length, averages in self._intervals.items()
            ],
        }
        if self._last_ns is not None:
            found["idle_time_ns"] = now_ns - self._last_ns
        for kind, histogram in self.histograms.items():
            found[f"{kind.value}_latency_histogram"] = {
                "boundaries": list(histogram.boundaries),
                "bins": list(histogram.bins),
            }
        return found


def stats_of(accounting: Accounting | None) -> Stats:
    """Return the members of QMP's BlockDeviceStats of what may not be accounted: then all zero."""
    if accounting is not None:
        return accounting.stats()
    return Accounting().stats() | {"account_invalid": False, "account_failed": False}


def _timed_stats(length_s: int, averages: Mapping[Kind, TimedAverage], now_ns: int) -> Stats:
    found: Stats = {"interval_length": length_s}
    for kind, average in averages.items():
        window = average.window(now_ns)
        found |= {
            f"min_{kind.value}_latency_ns": window.shortest,
            f"max_{kind.value}_latency_ns": window.longest,
            f"avg_{kind.value}_latency_ns": window.total // window.count if window.count else 0,
        }
        if kind is not Kind.FLUSH:
            found[f"avg_{kind.value}_queue_depth"] = average.queue_depth(now_ns)
    return found


class CountedVerbs:
    """The I/O verbs of a node or driver (datapath.route.IoVerbs), counted.

    Args:
        io: Who does it.
        accounting: Where it is counted.
    """

    def __init__(self, io: IoVerbs, accounting: Accounting) -> None:
        self._io = io
        self._accounting = accounting
        self._clock_ns = accounting.clock_ns

    def read_now(self, offset: int, view: memoryview) -> bool:
        """As IoVerbs.read_now; what is not done is not counted."""
        begun_ns = self._clock_ns()
        if not self._io.read_now(offset, view):
            return False
        self._accounting.done(Kind.READ, len(view), begun_ns)
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        """As IoVerbs.read."""
        begun_ns = self._clock_ns()
        try:
            await self._io.read(offset, view)
        except IoError:
            self._accounting.failed(Kind.READ, begun_ns)
            raise
        self._accounting.done(Kind.READ, len(view), begun_ns)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """As IoVerbs.write."""
        begun_ns = self._clock_ns()
        try:
            await self._io.write(offset, data, fua=fua)
        except IoError:
            self._accounting.failed(Kind.WRITE, begun_ns)
            raise
        self._wrote(offset, len(data), begun_ns)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """As IoVerbs.write_zeroes (A3)."""
        begun_ns = self._clock_ns()
        try:
            await self._io.write_zeroes(
                offset, length, fua=fua, may_unmap=may_unmap, no_fallback=no_fallback
            )
        except IoError as error:
            if error.errno != errno.ENOTSUP:
                self._accounting.failed(Kind.WRITE, begun_ns)
            raise
        self._wrote(offset, length, begun_ns)

    async def discard(self, offset: int, length: int) -> None:
        """As IoVerbs.discard."""
        begun_ns = self._clock_ns()
        try:
            await self._io.discard(offset, length)
        except IoError:
            self._accounting.failed(Kind.UNMAP, begun_ns)
            raise
        self._accounting.done(Kind.UNMAP, length, begun_ns)

    async def flush(self) -> None:
        """As IoVerbs.flush."""
        begun_ns = self._clock_ns()
        try:
            await self._io.flush()
        except IoError:
            self._accounting.failed(Kind.FLUSH, begun_ns)
            raise
        self._accounting.done(Kind.FLUSH, 0, begun_ns)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """As IoVerbs.block_status; not counted."""
        return await self._io.block_status(offset, length)

    def _wrote(self, offset: int, length: int, begun_ns: int) -> None:
        accounting = self._accounting
        accounting.highest_offset = max(accounting.highest_offset, offset + length)
        accounting.done(Kind.WRITE, length, begun_ns)
