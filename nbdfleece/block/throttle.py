"""Throttling, the arithmetic: limits, their checks, and the leaky buckets that keep to them.

There are six limits: bytes and operations per second, for all requests or for reads and writes
apart. Each has a bucket. A request pours its bytes (or operations) in when it is let go, and the
bucket leaks at the limit's rate. A request is let go while the bucket is not over its size, so
that one request may overflow it, and the next one waits for that to leak away.

::

    avg only        size: avg / 10, so that not every other request waits
    avg and max     size: max * length, leaks at avg: the burst. With length > 1 a second bucket
                    of size max / 10, which leaks at max, keeps the burst to that rate

Nothing here looks at a clock: the time is passed in.

Follows: QEMU util/throttle.c, block/throttle-groups.c, qapi/block-core.json (ThrottleLimits).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_VALUE: Final = 10**15  # of a rate, and of rate * length of a burst; as QEMU's
_MAX_LENGTH: Final = (1 << 32) - 1
_SECOND: Final = 10**9


class Direction(enum.Enum):
    """What a request counts as: discards and zero writes are writes."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit.

    Attributes:
        avg: Units per second; 0: no limit.
        max: Units per second in a burst; 0: no bursts.
        length: Seconds that a burst may last.
    """

    avg: int = 0
    max: int = 0
    length: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """All limits of a group.

    Attributes:
        bps_total: Bytes of all requests.
        bps_read: Bytes of reads.
        bps_write: Bytes of writes.
        iops_total: All requests.
        iops_read: Reads.
        iops_write: Writes.
        iops_size: Bytes from which on a request counts as several; 0: never.
    """

    bps_total: Limit = Limit()
    bps_read: Limit = Limit()
    bps_write: Limit = Limit()
    iops_total: Limit = Limit()
    iops_read: Limit = Limit()
    iops_write: Limit = Limit()
    iops_size: int = 0

    def all(self) -> dict[str, Limit]:
        """Return the six limits by their QMP names."""
        return {
            "bps-total": self.bps_total,
            "bps-read": self.bps_read,
            "bps-write": self.bps_write,
            "iops-total": self.iops_total,
            "iops-read": self.iops_read,
            "iops-write": self.iops_write,
        }

    @property
    def are_set(self) -> bool:
        """Whether anything is limited."""
        return any(limit.avg for limit in self.all().values())

    def members(self) -> dict[str, int]:
        """Return every member of QMP's ThrottleLimits."""
        found: dict[str, int] = {}
        for name, limit in self.all().items():
            found |= {name: limit.avg, f"{name}-max": limit.max}
            found[f"{name}-max-length"] = limit.length
        return found | {"iops-size": self.iops_size}

    def with_members(self, members: Mapping[str, int]) -> Limits:
        """Return these limits with some members of ThrottleLimits changed, checked.

        Args:
            members: By QMP name; each is a member of ThrottleLimits.

        Raises:
            CommandError: In QEMU's words: the limits contradict each other.
        """
        limits = _from_members(self.members() | dict(members))
        limits.check()
        return limits

    def check(self) -> None:
        """Check that the limits go together.

        Raises:
            CommandError: In QEMU's words, and in the order of its checks.
        """
        for total, one, other in (
            (self.bps_total, self.bps_read, self.bps_write),
            (self.iops_total, self.iops_read, self.iops_write),
        ):
            if (total.avg and (one.avg or other.avg)) or (total.max and (one.max or other.max)):
                raise CommandError(
                    "bps/iops/max total values and read/write values "
                    "cannot be used at the same time"
                )
        if self.iops_size and not (
            self.iops_total.avg or self.iops_read.avg or self.iops_write.avg
        ):
            raise CommandError("iops size requires an iops value to be set")
        for limit in self.all().values():
            _check_limit(limit)


MEMBERS: Final = tuple(Limits().members())
"""Names of the members of QMP's ThrottleLimits."""


def check_length(name: str, length: int) -> None:
    """Check the range of the member `name`, seconds of a burst.

    Raises:
        CommandError: In QEMU's words.
    """
    if length > _MAX_LENGTH:
        raise CommandError(f"{name} value must be in the range [0, {_MAX_LENGTH}]")


def _check_limit(limit: Limit) -> None:
    if not (0 <= limit.avg <= MAX_VALUE and 0 <= limit.max <= MAX_VALUE):
        raise CommandError(f"bps/iops/max values must be within [0, {MAX_VALUE}]")
    if limit.length == 0:
        raise CommandError("the burst length cannot be 0")
    is_long = not 0 < limit.length <= 1  # a negative length is a huge one in QEMU
    if is_long and not limit.max:
        raise CommandError("burst length set without burst rate")
    if limit.max and not 0 < limit.length <= MAX_VALUE // limit.max:
        raise CommandError("burst length too high for this burst rate")
    if limit.max and not limit.avg:
        raise CommandError("bps_max/iops_max require corresponding bps/iops values")
    if limit.max and limit.max < limit.avg:
        raise CommandError("bps_max/iops_max cannot be lower than bps/iops")


def _from_members(members: Mapping[str, int]) -> Limits:
    def limit(name: str) -> Limit:
        return Limit(members[name], members[f"{name}-max"], members[f"{name}-max-length"])

    return Limits(
        bps_total=limit("bps-total"),
        bps_read=limit("bps-read"),
        bps_write=limit("bps-write"),
        iops_total=limit("iops-total"),
        iops_read=limit("iops-read"),
        iops_write=limit("iops-write"),
        iops_size=members["iops-size"],
    )


class Bucket:
    """What keeps to one limit; see the module.

    Attributes:
        level: Units in the bucket.
        burst_level: Units in the second bucket.
    """

    __slots__ = ("_limit", "burst_level", "level")

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self.level = 0.0
        self.burst_level = 0.0

    def pour(self, units: float) -> None:
        """Count what has been let go."""
        self.level += units
        self.burst_level += units

    def leak(self, elapsed_ns: int) -> None:
        """Let time pass."""
        self.level = max(0.0, self.level - self._limit.avg * elapsed_ns / _SECOND)
        self.burst_level = max(0.0, self.burst_level - self._limit.max * elapsed_ns / _SECOND)

    def wait_ns(self) -> int:
        """Return how long the next request waits, in nanoseconds; 0: not at all."""
        avg, burst, length = self._limit.avg, self._limit.max, self._limit.length
        if not avg:
            return 0
        extra = self.level - (burst * length if burst else avg / 10)
        if extra > 0:
            return int(extra * _SECOND / avg)
        if length > 1:
            extra = self.burst_level - burst / 10
            if extra > 0:
                return int(extra * _SECOND / burst)
        return 0


class Throttle:
    """The buckets of one set of limits.

    Args:
        limits: Checked ones.
        now_ns: The time.

    Attributes:
        limits: As given.
    """

    def __init__(self, limits: Limits, now_ns: int) -> None:
        self.limits = limits
        self._then_ns = now_ns
        bps_total, iops_total = Bucket(limits.bps_total), Bucket(limits.iops_total)
        self._bytes = {
            Direction.READ: (bps_total, Bucket(limits.bps_read)),
            Direction.WRITE: (bps_total, Bucket(limits.bps_write)),
        }
        self._operations = {
            Direction.READ: (iops_total, Bucket(limits.iops_read)),
            Direction.WRITE: (iops_total, Bucket(limits.iops_write)),
        }
        self._buckets = {
            bucket
            for pairs in (self._bytes, self._operations)
            for pair in pairs.values()
            for bucket in pair
        }

    def wait_ns(self, direction: Direction, now_ns: int) -> int:
        """Return how long a request waits from now on, in nanoseconds; 0: it may go."""
        elapsed_ns = max(0, now_ns - self._then_ns)
        self._then_ns += elapsed_ns
        for bucket in self._buckets:
            bucket.leak(elapsed_ns)
        of_direction = self._bytes[direction] + self._operations[direction]
        return max(bucket.wait_ns() for bucket in of_direction)

    def account(self, direction: Direction, length: int) -> None:
        """Count a request of `length` bytes that is let go."""
        for bucket in self._bytes[direction]:
            bucket.pour(length)
        size = self.limits.iops_size
        operations = length / size if 0 < size < length else 1.0
        for bucket in self._operations[direction]:
            bucket.pour(operations)
