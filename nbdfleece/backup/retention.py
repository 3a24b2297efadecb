"""Which points a rule keeps: `--keep-last`, `--keep-daily` and the like. Pure.

For each period the newest point of each of the last N days (weeks, ...) that have one is kept; a
point is kept when any rule keeps it. The newest point is kept always: the next increment stands on
it. Days begin at midnight UTC, weeks on Monday.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbdfleece.backup.manifest import Point

_PERIODS: Final[Mapping[str, str]] = {
    "hourly": "%Y%m%dT%H",
    "daily": "%Y%m%d",
    "weekly": "%G-%V",
    "monthly": "%Y%m",
    "yearly": "%Y",
}
RULES: Final = ("last", *_PERIODS)
"""The names of the rules, as in `--keep-NAME`."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many of each are kept, by the names of RULES; what is missing keeps none."""

    counts: Mapping[str, int]

    def check(self) -> None:
        """Check that the rule keeps something.

        Raises:
            ConfigError: It keeps nothing.
        """
        if not any(self.counts.values()):
            options = ", ".join(f"--keep-{name}" for name in RULES)
            raise ConfigError(f"nothing says what to keep ({options})")

    def kept(self, points: Sequence[Point]) -> set[str]:
        """Return the names of the points that stay, of `points` in the order of time."""
        keep = {point.name for point in points[-1:]}
        keep |= {point.name for point in points[len(points) - self.counts.get("last", 0) :]}
        if self.counts.get("last", 0) >= len(points):
            keep = {point.name for point in points}
        for rule, form in _PERIODS.items():
            newest: dict[str, str] = {}
            for point in points:
                when = datetime.fromisoformat(point.instant).astimezone(UTC)
                newest[when.strftime(form)] = point.name
            wanted = self.counts.get(rule, 0)
            keep |= set(list(newest.values())[len(newest) - min(wanted, len(newest)) :])
        return keep
