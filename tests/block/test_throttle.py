"""The arithmetic of throttling, against time that the test makes."""

from __future__ import annotations

import random

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.throttle import MAX_VALUE, MEMBERS, Direction, Limits, Throttle
from tests.support.manual_clock import SECOND

READ, WRITE = Direction.READ, Direction.WRITE


def limits(**members: int) -> Limits:
    return Limits().with_members({name.replace("_", "-"): n for name, n in members.items()})


def let_go_in(throttle: Throttle, direction: Direction, length: int, until_ns: int) -> list[int]:
    """Ask for requests as fast as they are let go; return when each was."""
    now_ns, went = 0, []
    while True:
        now_ns += throttle.wait_ns(direction, now_ns)
        if now_ns >= until_ns:
            return went
        throttle.account(direction, length)
        went.append(now_ns)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({"bps-total": 1, "bps-read": 1}, "cannot be used at the same time"),
        ({"iops-total": 1, "iops-write": 1}, "cannot be used at the same time"),
        ({"bps-total": 5, "bps-total-max": 10, "bps-read-max": 10}, "cannot be used at the same"),
        ({"bps-total": 5, "bps-read-max": 10}, "bps_max/iops_max require corresponding bps/iops"),
        ({"bps-total-max": 10}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps-total": 10, "bps-total-max": 5}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"bps-total": 10, "bps-total-max-length": 0}, "the burst length cannot be 0"),
        ({"bps-total": 10, "bps-total-max-length": 2}, "burst length set without burst rate"),
        ({"bps-total": 10, "bps-total-max-length": -1}, "burst length set without burst rate"),
        (
            {"bps-total": 10, "bps-total-max": 20, "bps-total-max-length": -1},
            "burst length too high for this burst rate",
        ),
        (
            {"bps-total": 10**14, "bps-total-max": 10**14, "bps-total-max-length": 11},
            "burst length too high for this burst rate",
        ),
        ({"bps-total": -1}, "bps/iops/max values must be within [0, 1000000000000000]"),
        ({"bps-total": MAX_VALUE + 1}, "bps/iops/max values must be within [0, 1000000000000000]"),
        ({"iops-size": 100}, "iops size requires an iops value to be set"),
    ],
)
def test_contradictions_are_refused_in_qemus_words(members: dict[str, int], error: str) -> None:
    with pytest.raises(CommandError) as caught:
        Limits().with_members(members)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"bps-total": MAX_VALUE},
        {"bps-read": 1, "bps-write": 2, "iops-total": 3},
        {"iops-size": 100, "iops-total": 5},
        {"bps-total": 10**14, "bps-total-max": 10**14, "bps-total-max-length": 10},
    ],
)
def test_what_goes_together_is_kept(members: dict[str, int]) -> None:
    found = Limits().with_members(members).members()

    assert len(found) == len(MEMBERS) == 19
    assert found | members == found
    assert found["bps-write-max-length"] == 1


def test_a_change_keeps_the_other_limits() -> None:
    changed = limits(bps_read=7).with_members({"iops-total": 8, "iops-total-max": 10})

    assert changed.bps_read.avg == 7
    with pytest.raises(CommandError, match="cannot be lower"):
        changed.with_members({"iops-total": 20})


def test_are_set_tells_of_any_average() -> None:
    assert not limits().are_set
    assert limits(iops_write=1).are_set


@pytest.mark.parametrize(
    ("rate", "length"), [(3 << 10, 1), (3 << 10, 4096), (1 << 20, 512), (1 << 20, 1 << 20)]
)
@pytest.mark.parametrize("name", ["bps_total", "bps_read"])
def test_bytes_keep_to_the_rate(name: str, rate: int, length: int) -> None:
    """T-T1: within a tenth of a second's worth and one request, over any time."""
    seconds = max(1, min(40, 20_000 * length // rate))
    throttle = Throttle(limits(**{name: rate}), 0)

    went = let_go_in(throttle, READ, length, seconds * SECOND)

    allowed = rate * seconds + rate / 10
    assert allowed - length <= len(went) * length <= allowed + 2 * length


@pytest.mark.parametrize("name", ["iops_total", "iops_write"])
def test_operations_keep_to_the_rate(name: str) -> None:
    throttle = Throttle(limits(**{name: 100}), 0)

    went = let_go_in(throttle, WRITE, 1 << 20, 10 * SECOND)

    assert 1000 <= len(went) <= 1012


def test_directions_are_apart_unless_the_limit_is_total() -> None:
    throttle = Throttle(limits(bps_read=1000, iops_total=10), 0)
    throttle.account(READ, 5000)

    assert throttle.wait_ns(READ, 0) == pytest.approx(4.9 * SECOND)
    assert throttle.wait_ns(WRITE, 0) == 0
    throttle.account(WRITE, 1)
    assert throttle.wait_ns(WRITE, 0) == pytest.approx(0.1 * SECOND)  # (2 - 1) / 10


def test_large_requests_count_as_several_operations() -> None:
    throttle = Throttle(limits(iops_total=10, iops_size=4096), 0)
    throttle.account(READ, 4096)
    assert throttle.wait_ns(READ, 0) == 0
    throttle.account(READ, 6 * 4096)
    assert throttle.wait_ns(READ, 0) == pytest.approx(0.6 * SECOND)  # (7 - 1) / 10


def test_burst_of_one_second_then_the_base_rate() -> None:
    """T-T1: max units at once, then avg per second."""
    throttle = Throttle(limits(iops_total=10, iops_total_max=100), 0)

    went = let_go_in(throttle, READ, 1, 20 * SECOND)

    assert sum(at == 0 for at in went) == 101  # the one that overflows goes too
    late = [at for at in went if 10 * SECOND <= at < 20 * SECOND]
    assert 99 <= len(late) <= 101


def test_long_burst_keeps_to_its_rate_and_ends() -> None:
    """T-T1: burst rate for about max * length / (max - avg) seconds, then the base rate."""
    throttle = Throttle(limits(bps_total=1000, bps_total_max=5000, bps_total_max_length=4), 0)

    went = let_go_in(throttle, READ, 100, 30 * SECOND)

    def rate(first: float, last: float) -> float:
        got = sum(100 for at in went if first * SECOND <= at < last * SECOND)
        return got / (last - first)

    assert rate(1, 4) == pytest.approx(5000, rel=0.05)
    assert rate(10, 30) == pytest.approx(1000, rel=0.05)
    assert rate(0, 30) * 30 == pytest.approx(5000 * 4 + 1000 * 30, rel=0.05)


def test_a_bucket_left_alone_is_empty_again() -> None:
    throttle = Throttle(limits(iops_total=10, iops_total_max=100), 0)
    let_go_in(throttle, READ, 1, 5 * SECOND)

    throttle.wait_ns(READ, 100 * SECOND)
    count = 0
    while throttle.wait_ns(READ, 100 * SECOND) == 0:
        throttle.account(READ, 1)
        count += 1
    assert count == 101


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    throttle = Throttle(limits(bps_total=1000), 10 * SECOND)
    throttle.account(READ, 2000)
    before = throttle.wait_ns(READ, 10 * SECOND)

    assert throttle.wait_ns(READ, 3 * SECOND) == before
    assert throttle.wait_ns(READ, 11 * SECOND) == pytest.approx(before - SECOND, abs=1000)


def test_random_mixes_never_exceed_any_limit(rng: random.Random) -> None:
    """Against a plain sum: in no window more than the rate allows, and the bucket, and one more."""
    for _ in range(20):
        bps, iops = rng.randrange(1000, 100_000), rng.randrange(5, 200)
        throttle = Throttle(limits(bps_total=bps, iops_total=iops), 0)
        now_ns = 0
        went: list[tuple[int, int]] = []
        while now_ns < 5 * SECOND:
            direction = rng.choice((READ, WRITE))
            wait_ns = throttle.wait_ns(direction, now_ns)
            if wait_ns:
                now_ns += wait_ns + rng.randrange(1000)
                continue
            length = rng.randrange(1, 5000)
            throttle.account(direction, length)
            went.append((now_ns, length))
            if rng.random() < 0.1:
                now_ns += rng.randrange(SECOND // 5)
        for first in rng.choices(range(len(went)), k=5):
            window = went[first:]
            seconds = (window[-1][0] - window[0][0]) / SECOND
            assert len(window) <= iops * seconds + iops / 10 + 2
            assert sum(length for _, length in window) <= bps * seconds + bps / 10 + 2 * 5000
