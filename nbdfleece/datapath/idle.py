"""Dropping clients that ask for nothing.

The hot path takes no time for it: what a client has done is looked at a few times in the while that
it may be idle. Half a header is no request: who sends one byte by byte is idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

LOOKS: Final = 8  # a client is dropped after the time it may be idle, and an eighth more at most


class IdleWatch:
    """Watches one client.

    Args:
        loop: The event loop.
        idle_s: How long the client may be idle; None or 0: for ever.
        progress: Returns what changes whenever the client asks for something or sends it; None
            while it waits for us.
        on_idle: Called with a reason, once.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        idle_s: float | None,
        progress: Callable[[], tuple[int, int] | None],
        on_idle: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._idle_s = idle_s or 0.0
        self._progress = progress
        self._on_idle = on_idle
        self._before: tuple[int, int] | None = None
        self._quiet = 0  # looks in a row that found nothing new
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch."""
        if self._idle_s:
            self._timer = self._loop.call_later(self._idle_s / LOOKS, self._look)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now = self._progress()
        self._quiet = self._quiet + 1 if now is not None and now == self._before else 0
        self._before = now
        if self._quiet < LOOKS:
            self.start()
        else:
            self._on_idle(f"the client asks for nothing for {self._idle_s:g} s")
