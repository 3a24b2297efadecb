"""Throttle groups: members share limits, take turns, and wait for one timer.

Invariants
  T1  A request is let go when no other of its direction waits and the buckets allow it, else it
      joins the queue of its member. Each is counted in the buckets once, when it is let go.
  T2  While any request waits there is exactly one timer, for the earliest moment at which one of
      the queues may go on; without waiting requests there is none.
  T3  Members that have requests waiting are served in turn, one request each, whatever the size.
      Reads and writes alternate.
  T4  Nothing waits at a member that lets through (its requests are counted all the same), nor at
      one that has left its group.

Follows: QEMU block/throttle-groups.c.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from nbdfleece.base.errors import CommandError, InUse
from nbdfleece.base.limits import MAX_THROTTLE_GROUPS
from nbdfleece.block.throttle import MEMBERS, Direction, Limits, Throttle, check_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECOND: Final = 10**9
_INT64: Final = range(-(1 << 63), 1 << 63)


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Do without it."""


class Clock(Protocol):
    """Time, real or made."""

    def now_ns(self) -> int:
        """Return the time in nanoseconds from whenever."""

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` when the time has passed."""


class LoopClock:
    """The time of the running event loop."""

    def now_ns(self) -> int:
        """See Clock.now_ns."""
        return time.monotonic_ns()

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> Timer:
        """See Clock.call_later."""
        return asyncio.get_running_loop().call_later(delay_ns / _SECOND, callback)


class ThrottleGroup:
    """Limits, and the members that share them.

    Args:
        name: Unique among groups.
        limits: Checked ones.
        clock: Where time comes from.
        is_object: The user made it and removes it; else it goes with its last member.

    Attributes:
        name: As given.
        is_object: As given.
        members: Who shares the limits, in the order of joining.
    """

    def __init__(self, name: str, limits: Limits, clock: Clock, *, is_object: bool) -> None:
        self.name = name
        self.is_object = is_object
        self.members: list[Member] = []
        self._clock = clock
        self._throttle = Throttle(limits, clock.now_ns())
        self._timer: Timer | None = None
        self._last: dict[Direction, Member | None] = dict.fromkeys(Direction)
        self._order = (Direction.READ, Direction.WRITE)  # whose turn is first

    @property
    def limits(self) -> Limits:
        """What holds now."""
        return self._throttle.limits

    def set_limits(self, limits: Limits) -> None:
        """Let other limits, checked ones, hold from now on; bursts begin anew."""
        self._throttle = Throttle(limits, self._clock.now_ns())
        self._go_on()

    def admit_now(self, member: Member, direction: Direction, length: int) -> bool:
        """Let a request of a member go, or return False: it has to wait (T1)."""
        if not member.lets_through and (
            any(other.waiting[direction] for other in self.members)
            or self._throttle.wait_ns(direction, self._clock.now_ns())
        ):
            return False
        self._throttle.account(direction, length)
        return True

    def may_go(self, direction: Direction) -> bool:
        """Tell whether a request that came now would be let go, without doing so."""
        if any(member.waiting[direction] for member in self.members):
            return False
        return self._throttle.wait_ns(direction, self._clock.now_ns()) == 0

    def join(self, member: Member) -> None:
        """Share the limits with one more; it has nothing waiting."""
        self.members.append(member)

    def leave(self, member: Member) -> None:
        """Share with one less: what it has waiting goes at once, the others take their turns."""
        self.members.remove(member)
        for direction in Direction:
            if self._last[direction] is member:
                self._last[direction] = None
            for _, future in member.take_all(direction):
                _let_go(future)
        self._go_on()

    def let_through(self, member: Member) -> None:
        """Let all go that a member has waiting, counted (T4)."""
        for direction in Direction:
            for length, future in member.take_all(direction):
                self._throttle.account(direction, length)
                _let_go(future)
        self._go_on()

    def arm(self) -> None:
        """See to it that somebody looks when the next request may go (T2)."""
        if self._timer is not None:
            return
        now_ns = self._clock.now_ns()
        delays = [
            self._throttle.wait_ns(direction, now_ns)
            for direction in Direction
            if any(member.waiting[direction] for member in self.members)
        ]
        if delays:
            self._timer = self._clock.call_later(max(1, min(delays)), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._go_on()

    def _go_on(self) -> None:
        """Let go what may go, in turns (T3), and arm for the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_ns = self._clock.now_ns()
        stopped = 0
        while stopped < len(self._order):
            direction = self._order[0]
            self._order = (*self._order[1:], direction)
            member = self._next(direction)
            if member is None or self._throttle.wait_ns(direction, now_ns):
                stopped += 1
                continue
            stopped = 0
            length, future = member.waiting[direction].popleft()
            self._last[direction] = member
            self._throttle.account(direction, length)
            _let_go(future)
        self.arm()

    def _next(self, direction: Direction) -> Member | None:
        """Return the member behind the one served last that has requests waiting."""
        last = self._last[direction]
        start = 0 if last is None else self.members.index(last) + 1
        for member in self.members[start:] + self.members[:start]:
            if member.waiting[direction]:
                return member
        return None


class Member:
    """One that shares a group's limits: the requests of a throttle node.

    Attributes:
        group: Whose limits; `move` changes it.
        waiting: (bytes, future) of each request that waits, oldest first.
        lets_through: Nothing waits here now (nests).
    """

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self.waiting: dict[Direction, deque[tuple[int, asyncio.Future[None]]]] = {
            direction: deque() for direction in Direction
        }
        self.lets_through = 0
        group.join(self)

    def may_go(self, direction: Direction) -> bool:
        """Tell whether a request that came now would not have to wait."""
        return self.lets_through > 0 or self.group.may_go(direction)

    def admit_now(self, direction: Direction, length: int) -> bool:
        """Let a request go if it need not wait; tell whether it did."""
        return self.group.admit_now(self, direction, length)

    async def admit(self, direction: Direction, length: int) -> None:
        """Wait until a request may go.

        Cancel: not cancelled.
        """
        if self.admit_now(direction, length):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting[direction].append((length, turn))
        self.group.arm()
        await turn

    def take_all(self, direction: Direction) -> list[tuple[int, asyncio.Future[None]]]:
        """Return what waits, which waits no more."""
        found = list(self.waiting[direction])
        self.waiting[direction].clear()
        return found

    def begin_to_let_through(self) -> None:
        """Let everything go at once until the matching `end_to_let_through`; nests."""
        self.lets_through += 1
        self.group.let_through(self)

    def end_to_let_through(self) -> None:
        """Undo one `begin_to_let_through`."""
        assert self.lets_through > 0, "a drain ends that has not begun"
        self.lets_through -= 1

    def move(self, group: ThrottleGroup) -> None:
        """Share another group's limits from now on; what waits goes at once."""
        if group is not self.group:
            self.group.leave(self)
            self.group = group
            group.join(self)


class ThrottleGroups:
    """All throttle groups by name.

    Args:
        clock: Where time comes from; None: the event loop.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Clock = LoopClock() if clock is None else clock
        self._groups: dict[str, ThrottleGroup] = {}

    def __iter__(self) -> Iterator[ThrottleGroup]:
        return iter(list(self._groups.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def find(self, name: str) -> ThrottleGroup:
        """Return the group called `name`.

        Raises:
            CommandError: There is none.
        """
        group = self._groups.get(name)
        if group is None:
            raise CommandError(f"Throttle group '{name}' does not exist")
        return group

    def add(self, name: str, limits: Limits, *, is_object: bool) -> ThrottleGroup:
        """Make a group.

        Raises:
            CommandError: The name is taken, or there are too many groups.
        """
        if name in self._groups:
            raise CommandError("A group with this name already exists")
        if len(self._groups) >= MAX_THROTTLE_GROUPS:
            raise CommandError(f"There are {MAX_THROTTLE_GROUPS} throttle groups already")
        group = ThrottleGroup(name, limits, self._clock, is_object=is_object)
        self._groups[name] = group
        return group

    def remove(self, name: str) -> None:
        """Remove a group that has no members (object-del).

        Raises:
            InUse: It has members. Nothing has changed.
            CommandError: There is none.
        """
        group = self.find(name)
        if group.members:
            raise InUse(f"object '{name}' is in use, can not be deleted")
        del self._groups[name]

    def drop_unused(self, group: ThrottleGroup) -> None:
        """Forget a group that nobody made an object of and nobody is a member of.

        It may be forgotten already, and another have its name.
        """
        is_unused = not group.is_object and not group.members
        if is_unused and self._groups.get(group.name) is group:
            del self._groups[group.name]


def make_throttle_group(
    groups: ThrottleGroups, name: str, props: Mapping[str, object]
) -> ThrottleGroup:
    """Make the group that `object-add qom-type=throttle-group` asks for.

    Args:
        groups: Where it goes.
        name: The object's id.
        props: `limits`, `x-bps-total` and so on, without `id` and `qom-type`.

    Raises:
        CommandError: A property is unknown, of the wrong type or out of range; the limits
            contradict each other; the name is taken. Nothing has changed.
    """
    members: dict[str, int] = {}
    for prop, value in props.items():
        if prop == "limits":
            members |= parse_limits(value)
            continue
        member = prop.removeprefix("x-")
        if member == prop or member not in MEMBERS:
            raise CommandError(f"Parameter '{prop}' is unexpected")
        members[member] = _integer(prop, value)
        if members[member] < 0:
            raise CommandError("Property values cannot be negative")
        if member.endswith("-length"):
            check_length(prop, members[member])
    return groups.add(name, Limits().with_members(members), is_object=True)


def parse_limits(value: object) -> dict[str, int]:
    """Return the members of the property `limits`, a ThrottleLimits of QMP.

    Raises:
        CommandError: A member is unknown, of the wrong type or out of range.
    """
    if not isinstance(value, Mapping):
        raise CommandError("Invalid parameter type for 'limits', expected: object")
    members: dict[str, int] = {}
    for member, number in value.items():
        if member not in MEMBERS:
            raise CommandError(f"Parameter 'limits.{member}' is unexpected")
        members[member] = _integer(f"limits.{member}", number)
        if member.endswith("-length"):
            check_length(member, members[member])
    return members


def set_property(group: ThrottleGroup, prop: str, value: object) -> None:
    """Change a property of a group (qom-set); members of `limits` not given stay as they are.

    Raises:
        CommandError: It cannot be changed, does not exist, or the limits would contradict each
            other. Nothing has changed.
    """
    if prop == "limits":
        group.set_limits(group.limits.with_members(parse_limits(value)))
        return
    get_property(group, prop)
    raise CommandError("Property cannot be set after initialization")


def get_property(group: ThrottleGroup, prop: str) -> int | dict[str, int]:
    """Return a property of a group (qom-get): `limits`, or a single one, `x-bps-total` and so on.

    Raises:
        CommandError: It does not exist.
    """
    members = group.limits.members()
    if prop == "limits":
        return members
    member = prop.removeprefix("x-")
    if member == prop or member not in members:
        raise CommandError(f"Property 'throttle-group.{prop}' not found")
    return members[member]


def properties() -> dict[str, str]:
    """Return the types of all properties of a group by name (qom-list), without `type`."""
    return {"limits": "ThrottleLimits"} | {f"x-{member}": "int" for member in MEMBERS}


def _integer(path: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _INT64:
        raise CommandError(f"Invalid parameter type for '{path}', expected: integer")
    return value


def _let_go(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
