"""A clock that stands still until a test moves it (block.throttle_group.Clock)."""

from __future__ import annotations

from collections.abc import Callable

SECOND = 10**9


class ManualTimer:
    """A call to come."""

    def __init__(self, at_ns: int, callback: Callable[[], None]) -> None:
        self.at_ns = at_ns
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Time in nanoseconds."""

    def __init__(self) -> None:
        self.time_ns = 0
        self._timers: list[ManualTimer] = []

    def now_ns(self) -> int:
        return self.time_ns

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> ManualTimer:
        assert delay_ns > 0
        timer = ManualTimer(self.time_ns + delay_ns, callback)
        self._timers.append(timer)
        return timer

    @property
    def timers(self) -> list[ManualTimer]:
        """Those that are neither cancelled nor over, the next first."""
        self._timers = [timer for timer in self._timers if timer.callback is not None]
        return sorted(self._timers, key=lambda timer: timer.at_ns)

    def fire_next(self) -> None:
        """Let time pass until the next timer, and call it."""
        timer = self.timers[0]
        self.time_ns = max(self.time_ns, timer.at_ns)
        callback, timer.callback = timer.callback, None
        assert callback is not None
        callback()

    def advance(self, length_ns: int) -> None:
        """Let so much time pass, with all the timers that are due in it."""
        end_ns = self.time_ns + length_ns
        while self.timers and self.timers[0].at_ns <= end_ns:
            self.fire_next()
        self.time_ns = end_ns
