"""An event loop that stays awake for a moment when the next request is about to come.

A processor that goes to sleep takes tens of microseconds to wake, in a virtual machine above all;
a client at depth 1 answers in about that time. So before it sleeps, the loop looks again and again
for a moment, as long as that has been paying off lately.

Invariants
  L1  Looking ends after POLL_MAX_S at the latest, and is given up at once where the last wait was
      longer than that: an idle daemon does not spin.
  L2  Timers are not late by it: a wait that is shorter than a moment is not stretched.
  L3  While a call is in a worker thread, most of the looking is outside the interpreter lock; while
      there are several, there is no looking.

# FAST: saves a wake-up of the processor per request at depth 1, about 40 of 75 microseconds for a
# cached read; plain form in tests/reference/poller.py

# FAST: a worker that wakes needs the interpreter lock, and finds it taken by a loop that does
# nothing but look: let go for the microsecond of epoll_wait, it is taken again before the worker
# has woken for it. A loop that computes a checksum between two looks leaves it free for 4
# microseconds at a time: 4 KiB writes at depth 1 go from 10,600 to 15,500 a second. Where there are
# more calls, results come in numbers and haste gains nothing: the loop sleeps at once, which saves
# a fifth of the processor time of writes at depth 4; plain form in tests/reference/poller.py

Follows: QEMU util/aio-posix.c (poll-max-ns, grow and shrink).
"""

from __future__ import annotations

import asyncio
import os
import selectors
import zlib
from time import perf_counter
from typing import TYPE_CHECKING, Final

from nbdfleece.datapath.workers import completions_of

if TYPE_CHECKING:
    from nbdfleece.datapath.workers import Completions

POLL_MAX_S: Final = 100e-6
_FIRST_S: Final = 10e-6

# What is computed between two looks: zlib lets go of the interpreter lock for it, and it asks
# nothing of the kernel or of memory. Half the size gains half as much, twice the size no more.
_ELSEWHERE: Final = bytes(16384)

_Ready = list[tuple[selectors.SelectorKey, int]]  # type: ignore[explicit-any]  # its `data`


class PollingSelector(selectors.EpollSelector):
    """An epoll selector that looks for a moment before it sleeps.

    Attributes:
        completions: Tells whether calls are in worker threads; set by the maker of the loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.completions: Completions | None = None
        self._moment = 0.0  # seconds to look for now: 0, or _FIRST_S to POLL_MAX_S

    def select(self, timeout: float | None = None) -> _Ready:  # type: ignore[explicit-any]
        """Return what is ready; see selectors.BaseSelector.select."""
        if self.completions is not None:
            self.completions.about_to_wait()
        if timeout is not None and timeout <= 0:
            return super().select(0)
        # None is handed out before we return: the number does not fall meanwhile.
        in_threads = self.completions.outstanding if self.completions is not None else 0
        if in_threads > 1:
            return super().select(timeout)
        began = perf_counter()
        moment = self._moment
        if moment and (timeout is None or timeout > moment):
            until = began + moment
            look = super().select
            while True:
                ready = look(0)
                if ready:
                    return ready
                if perf_counter() >= until:
                    break
                if in_threads:
                    zlib.crc32(_ELSEWHERE)
        ready = super().select(timeout)
        waited = perf_counter() - began
        if waited > POLL_MAX_S:
            self._moment = 0.0
        else:
            self._moment = min(POLL_MAX_S, max(_FIRST_S, 2 * waited))
        return ready


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop with a PollingSelector; a plain one where we have one processor only.

    There the client could not run while we look.
    """
    if len(os.sched_getaffinity(0)) < 2:
        return asyncio.new_event_loop()
    selector = PollingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    selector.completions = completions_of(loop)
    selector.completions.is_told_of_waits = True
    return loop
