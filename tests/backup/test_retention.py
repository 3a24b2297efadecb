from datetime import datetime, timedelta

import pytest

from nbdfleece.backup.manifest import Point
from nbdfleece.backup.names import Kind, point_name
from nbdfleece.backup.retention import Retention
from nbdfleece.base.errors import ConfigError


def hourly(start: str, count: int, step: timedelta = timedelta(hours=1)) -> list[Point]:
    first = datetime.fromisoformat(start)
    points: list[Point] = []
    for number in range(count):
        instant = (first + number * step).isoformat()
        points.append(Point(point_name(instant, ()), instant, Kind.FULL, None, 1, 1, ""))
    return points


def kept(points: list[Point], **counts: int) -> list[str]:
    return sorted(Retention(counts).kept(points))


def test_the_last_ones() -> None:
    points = hourly("2026-11-01T00:00:00Z", 5)

    assert kept(points, last=2) == ["20261101T030000Z", "20261101T040000Z"]
    assert kept(points, last=9) == [point.name for point in points]


def test_the_newest_of_each_day() -> None:
    points = hourly("2026-11-01T00:00:00Z", 60)

    assert kept(points, daily=2) == ["20261102T230000Z", "20261103T110000Z"]
    assert kept(points, daily=99)[0] == "20261101T230000Z"


def test_days_without_points_are_not_counted() -> None:
    points = hourly("2026-11-01T00:00:00Z", 4, timedelta(days=7))

    assert kept(points, daily=3) == ["20261108T000000Z", "20261115T000000Z", "20261122T000000Z"]


def test_rules_add_up() -> None:
    points = hourly("2026-01-01T12:00:00Z", 300, timedelta(days=1))

    found = kept(points, last=1, daily=3, weekly=2, monthly=2, yearly=5)

    assert (
        found
        == [
            "20260930T120000Z",  # the newest of September
            "20261025T120000Z",  # a Sunday
            "20261025T120000Z",
            "20261026T120000Z",
            "20261027T120000Z",
        ][:2]
        + ["20261025T120000Z", "20261026T120000Z", "20261027T120000Z"][1:]
    )


def test_the_time_zone_of_an_instant_does_not_matter() -> None:
    points = [
        *hourly("2026-11-01T23:30:00+00:00", 1),
        *hourly("2026-11-02T01:30:00+01:00", 1),
    ]

    assert len(kept(points, daily=2)) == 2


def test_the_newest_stays_always() -> None:
    assert kept(hourly("2026-11-01T00:00:00Z", 3)) == ["20261101T020000Z"]


def test_a_rule_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--keep-daily"):
        Retention({"last": 0}).check()
