"""Members of a throttle group: turns, the timer, letting through, leaving; its properties."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from nbdfleece.base.errors import CommandError, InUse
from nbdfleece.block.throttle import Direction, Limits
from nbdfleece.block.throttle_group import (
    LoopClock,
    Member,
    ThrottleGroup,
    ThrottleGroups,
    get_property,
    make_throttle_group,
    properties,
    set_property,
)
from nbdfleece.datapath.step import background
from tests.support.manual_clock import SECOND, ManualClock
from tests.support.waiting import turns, until

READ, WRITE = Direction.READ, Direction.WRITE


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def groups(clock: ManualClock) -> ThrottleGroups:
    return ThrottleGroups(clock)


def make(groups: ThrottleGroups, name: str = "group", **limits: int) -> ThrottleGroup:
    members = {limit.replace("_", "-"): number for limit, number in limits.items()}
    return make_throttle_group(groups, name, {"limits": members})


class Guest:
    """Asks for requests, always `depth` at a time, and counts those let go."""

    def __init__(self, member: Member, direction: Direction, length: int, depth: int = 4) -> None:
        self.member = member
        self.direction = direction
        self.length = length
        self.bytes = 0
        self.on = True
        for _ in range(depth):
            self._ask()

    def _ask(self) -> None:
        turn = background(self.member.admit(self.direction, self.length))
        turn.add_done_callback(self._went)

    def _went(self, _: object) -> None:
        self.bytes += self.length
        if self.on:
            self._ask()


async def run(clock: ManualClock, length_ns: int) -> None:
    """Let time pass, and after each timer what it set off."""
    end_ns = clock.time_ns + length_ns
    await turns(20)
    while clock.timers and clock.timers[0].at_ns <= end_ns:
        assert len(clock.timers) == 1  # T2
        clock.fire_next()
        await turns(6)
    clock.time_ns = end_ns


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "limit", ["bps_total", "bps_read", "bps_write", "iops_total", "iops_read", "iops_write"]
)
async def test_members_get_the_rate_evenly(
    groups: ThrottleGroups, clock: ManualClock, limit: str, count: int
) -> None:
    """T-T1: each of the 6 limits with 1 to 3 members, within 10 % and evenly spread."""
    per_request = 512 if limit.startswith("bps") else 1
    group = make(groups, **{limit: 100 * per_request})
    direction = READ if limit.endswith("read") else WRITE
    guests = [Guest(Member(group), direction, 512) for _ in range(count)]

    await run(clock, 10 * SECOND)
    for guest in guests:
        guest.on = False

    total = sum(guest.bytes for guest in guests) / 512
    assert total == pytest.approx(1000, rel=0.1)
    for guest in guests:
        assert guest.bytes / 512 == pytest.approx(total / count, rel=0.05)
    set_property(group, "limits", {limit.replace("_", "-"): 0})
    await turns(5)


async def test_one_active_member_may_use_all(groups: ThrottleGroups, clock: ManualClock) -> None:
    """T-T1."""
    group = make(groups, iops_total=100)
    Member(group)
    guest = Guest(Member(group), READ, 512)

    await run(clock, 5 * SECOND)
    guest.on = False

    assert guest.bytes / 512 == pytest.approx(500, rel=0.1)


async def test_turns_do_not_depend_on_depth(groups: ThrottleGroups, clock: ManualClock) -> None:
    group = make(groups, iops_total=100)
    greedy, modest = Guest(Member(group), READ, 512, 50), Guest(Member(group), READ, 512, 2)

    await run(clock, 10 * SECOND)
    greedy.on = modest.on = False

    assert modest.bytes == pytest.approx(greedy.bytes, rel=0.15)


async def test_reads_and_writes_alternate(groups: ThrottleGroups, clock: ManualClock) -> None:
    group = make(groups, iops_total=100)
    member = Member(group)
    reader, writer = Guest(member, READ, 512), Guest(member, WRITE, 512)

    await run(clock, 10 * SECOND)
    reader.on = writer.on = False

    assert reader.bytes == pytest.approx(writer.bytes, rel=0.05)


async def test_burst_then_base_rate(groups: ThrottleGroups, clock: ManualClock) -> None:
    """T-T1: burst rate x length, then the base rate."""
    group = make(groups, iops_total=10, iops_total_max=50, iops_total_max_length=4)
    guest = Guest(Member(group), READ, 1, 1)

    await run(clock, 4 * SECOND)
    assert guest.bytes == pytest.approx(4 * 50, rel=0.1)
    await run(clock, 10 * SECOND)
    before = guest.bytes
    await run(clock, 20 * SECOND)
    guest.on = False
    assert guest.bytes - before == pytest.approx(20 * 10, rel=0.05)


async def test_who_waits_is_not_overtaken(groups: ThrottleGroups, clock: ManualClock) -> None:
    group = make(groups, bps_total=1000)
    member = Member(group)
    went: list[int] = []
    for number in range(5):
        turn = background(member.admit(READ, 1000))
        turn.add_done_callback(lambda _, number=number: went.append(number))
    await turns(3)
    assert went == [0]
    assert not member.may_go(READ)
    assert not member.admit_now(READ, 1)
    assert member.admit_now(WRITE, 1) is False  # the limit is for both

    await run(clock, 10 * SECOND)

    assert went == [0, 1, 2, 3, 4]
    assert not clock.timers


async def test_leaving_frees_what_waits_and_stalls_nobody(
    groups: ThrottleGroups, clock: ManualClock
) -> None:
    """T-T1: removing a member with queued requests frees them; the others go on."""
    group = make(groups, iops_total=1)
    leaver, stayer = Member(group), Member(group)
    first = Guest(leaver, READ, 1)
    second = Guest(stayer, READ, 1)
    await run(clock, 3 * SECOND)
    first.on = False
    before = second.bytes
    assert len(leaver.waiting[READ]) == 4

    group.leave(leaver)
    await until(lambda: not leaver.waiting[READ] and first.bytes >= 5)

    await run(clock, 10 * SECOND)
    second.on = False
    assert second.bytes - before == pytest.approx(10, abs=1)


async def test_letting_through_is_for_one_member_and_is_counted(
    groups: ThrottleGroups, clock: ManualClock
) -> None:
    group = make(groups, iops_total=1)
    drained, other = Member(group), Member(group)
    first = Guest(drained, READ, 1)
    second = Guest(other, READ, 1)
    await turns(10)
    first.on = second.on = False
    waiting = len(other.waiting[READ])
    assert waiting

    drained.begin_to_let_through()
    assert drained.may_go(READ)
    assert not drained.waiting[READ]
    assert all(drained.admit_now(READ, 1) for _ in range(10))
    assert len(other.waiting[READ]) == waiting
    drained.end_to_let_through()

    assert not drained.admit_now(READ, 1)
    assert len(clock.timers) == 1
    clock.advance(12 * SECOND)
    assert len(other.waiting[READ]) == waiting  # what was let through has to leak away first
    clock.advance(30 * SECOND)
    assert not other.waiting[READ]


async def test_lifting_the_limits_frees_all(groups: ThrottleGroups, clock: ManualClock) -> None:
    group = make(groups, bps_write=1)
    member = Member(group)
    guest = Guest(member, WRITE, 100)
    await turns(5)
    guest.on = False
    assert len(member.waiting[WRITE]) == 4

    set_property(group, "limits", {"bps-write": 0})

    assert not member.waiting[WRITE]
    assert not clock.timers


async def test_new_limits_hold_for_what_waits(groups: ThrottleGroups, clock: ManualClock) -> None:
    group = make(groups, iops_total=1)
    guest = Guest(Member(group), READ, 1)
    await run(clock, 5 * SECOND)
    set_property(group, "limits", {"iops-total": 100})
    await turns(5)
    before = guest.bytes

    await run(clock, 5 * SECOND)
    guest.on = False

    assert guest.bytes - before == pytest.approx(500, rel=0.1)


async def test_moving_to_another_group_frees_what_waits(groups: ThrottleGroups) -> None:
    """T-T2: members move."""
    slow, fast = make(groups, "slow", iops_total=1), make(groups, "fast")
    member = Member(slow)
    guest = Guest(member, READ, 1)
    await turns(5)
    guest.on = False

    member.move(fast)

    assert not member.waiting[READ]
    assert (slow.members, fast.members) == ([], [member])
    assert all(member.admit_now(READ, 1) for _ in range(100))


# --- objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("props", "error"),
    [
        ({"limits": 5}, "Invalid parameter type for 'limits', expected: object"),
        ({"limits": {"bogus": 1}}, "Parameter 'limits.bogus' is unexpected"),
        (
            {"limits": {"bps-total": "x"}},
            "Invalid parameter type for 'limits.bps-total', expected: integer",
        ),
        (
            {"limits": {"bps-total": True}},
            "Invalid parameter type for 'limits.bps-total', expected: integer",
        ),
        (
            {"limits": {"bps-total": 1, "bps-total-max-length": 1 << 33}},
            "bps-total-max-length value must be in the range [0, 4294967295]",
        ),
        ({"x-bps-total": -5}, "Property values cannot be negative"),
        ({"x-iops-size": -1}, "Property values cannot be negative"),
        ({"x-bps-total-max": 5}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"x-bps-total": "a"}, "Invalid parameter type for 'x-bps-total', expected: integer"),
        ({"x-zz": 1}, "Parameter 'x-zz' is unexpected"),
        ({"bps-total": 1}, "Parameter 'bps-total' is unexpected"),
        (
            {"x-bps-total": 5, "x-bps-total-max-length": 1 << 33},
            "x-bps-total-max-length value must be in the range [0, 4294967295]",
        ),
    ],
)
def test_bad_properties_make_no_group(
    groups: ThrottleGroups, props: dict[str, object], error: str
) -> None:
    with pytest.raises(CommandError) as caught:
        make_throttle_group(groups, "g", props)
    assert str(caught.value) == error
    assert list(groups) == []


def test_properties_are_got_and_set(groups: ThrottleGroups) -> None:
    """T-T3."""
    group = make_throttle_group(groups, "g", {"limits": {"bps-read": 5}, "x-iops-total": 6})
    assert get_property(group, "x-bps-read") == 5
    found = get_property(group, "limits")
    assert isinstance(found, dict)
    assert Counter(found.values()) == {0: 11, 1: 6, 5: 1, 6: 1}
    assert set(properties()) == {"limits"} | {f"x-{name}" for name in found}

    for prop, value, error in (
        ("x-bps-read", 7, "Property cannot be set after initialization"),
        ("x-nope", 7, "Property 'throttle-group.x-nope' not found"),
        ("bps-read", 7, "Property 'throttle-group.bps-read' not found"),
        ("limits", {"bps-total": 1}, "bps/iops/max total values and read/write values cannot be"),
        ("limits", 5, "Invalid parameter type for 'limits', expected: object"),
    ):
        with pytest.raises(CommandError) as caught:
            set_property(group, prop, value)
        assert str(caught.value).startswith(error)
    assert get_property(group, "limits") == found

    set_property(group, "limits", {"bps-read": 0, "bps-total": 9})
    assert get_property(group, "limits") == found | {"bps-read": 0, "bps-total": 9}
    set_property(group, "limits", {})
    assert get_property(group, "x-bps-total") == 9


def test_groups_by_name(groups: ThrottleGroups) -> None:
    group = make(groups, "g")
    member = Member(group)
    assert groups.find("g") is group
    with pytest.raises(CommandError, match="A group with this name already exists"):
        make(groups, "g")
    with pytest.raises(CommandError, match="Throttle group 'x' does not exist"):
        groups.find("x")
    with pytest.raises(InUse, match="object 'g' is in use, can not be deleted"):
        groups.remove("g")
    groups.drop_unused(group)
    group.leave(member)
    groups.drop_unused(group)
    assert "g" in groups  # an object stays
    groups.remove("g")
    assert "g" not in groups


def test_groups_that_nobody_made_go_with_their_last_member(groups: ThrottleGroups) -> None:
    group = groups.add("g", Limits(), is_object=False)
    member = Member(group)
    groups.drop_unused(group)
    assert "g" in groups
    group.leave(member)
    groups.drop_unused(group)
    assert "g" not in groups
    other = groups.add("g", Limits(), is_object=False)
    groups.drop_unused(group)
    assert groups.find("g") is other


async def test_the_loops_clock_goes_on_and_calls() -> None:
    clock = LoopClock()
    called: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    before = clock.now_ns()
    clock.call_later(1000, lambda: called.set_result(clock.now_ns()))
    assert await called > before
    clock.call_later(1000, lambda: pytest.fail("it was cancelled")).cancel()
    await turns(3)
