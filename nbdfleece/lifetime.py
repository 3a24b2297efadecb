"""The start of a daemon, which a signal cuts short, and its end, which nothing holds up.

What waits for a system call cannot be cancelled: a disk that is stuck would keep a daemon from
coming up, from giving up, and from going.

Invariants
  L1  A start that is told to stop ends, or the program does when the limit has passed.
  L2  The end takes no longer than the limit and some CLOSE_S; what does not answer is left behind.
  L3  One thing that cannot be closed keeps no other open.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

CLOSE_S: Final = 2.0  # for closing, even when requests took all the time there was


class Lifetime:
    """One daemon's.

    Args:
        limit_s: How long requests, and a start that is to stop, may take to end.
        end_by_force: Ends the program, told why. Called when it took longer.

    Attributes:
        stopping: Set by `stop`.
    """

    def __init__(self, limit_s: float, end_by_force: Callable[[str], object]) -> None:
        self.stopping: Final = asyncio.Event()
        self._limit_s: Final = limit_s
        self._end_by_force: Final = end_by_force
        self._start_limit: asyncio.Timeout | None = None  # while it starts

    async def start(self, starting: Coroutine[object, None, None]) -> bool:
        """Run what starts the daemon; tell whether it came to its end, or was cut short by `stop`.

        Raises:
            What it raises.
        """
        try:
            async with asyncio.timeout(None) as self._start_limit:
                await starting
        except TimeoutError:
            if not self.stopping.is_set():  # of somebody else, then
                raise
            return False
        finally:
            self._start_limit = None
        return True

    def stop(self) -> None:
        """Note that the daemon is to stop, and cut its start short."""
        self.stopping.set()
        if self._start_limit is not None:
            loop = asyncio.get_running_loop()
            self._start_limit.reschedule(loop.time())
            loop.call_later(max(self._limit_s, CLOSE_S), self._end_if_it_starts)

    def _end_if_it_starts(self) -> None:
        if self._start_limit is not None:
            self._end_by_force(self.late)

    @contextmanager
    def end(self) -> Iterator[Ending]:
        """Begin the end; what is closed in the body may take so long, and no longer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limit_s
        last_resort = loop.call_at(deadline + 3 * CLOSE_S, self._end_by_force, self.late)
        try:
            yield Ending(deadline)
        finally:
            last_resort.cancel()

    @property
    def late(self) -> str:
        """Why the program ends by force when it has taken too long."""
        return f"requests had not ended after {self._limit_s:g} seconds"


class Ending:
    """The time that an end has left.

    Args:
        deadline: By the loop's clock.

    Attributes:
        is_late: Something was not closed in time.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline: Final = deadline
        self.is_late = False

    def left(self, least: float | None = None) -> float:
        """Return the seconds that are left, at least so many; by default CLOSE_S."""
        least = CLOSE_S if least is None else least
        return max(self._deadline - asyncio.get_running_loop().time(), least)

    async def close(self, close: Callable[[], Awaitable[bool | None]]) -> bool:
        """Close something; tell whether it took no longer than there was, nor returned False."""
        try:
            async with asyncio.timeout(self.left()):
                return await close() is not False
        except TimeoutError:
            self.is_late = True
            return False
