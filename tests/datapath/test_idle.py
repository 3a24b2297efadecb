"""IdleWatch by a clock that is set by hand."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from nbdfleece.datapath.idle import LOOKS, IdleWatch

IDLE_S = 80.0


class Clock:
    """What IdleWatch asks of an event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def call_later(self, delay: float, callback: Callable[[], None]) -> Clock:
        self._number += 1
        heapq.heappush(self._timers, (self.now + delay, self._number, callback))
        return self

    def cancel(self) -> None:
        self._timers.clear()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, callback = heapq.heappop(self._timers)
            callback()
        self.now = end


class Client:
    def __init__(self, idle_s: float | None = IDLE_S) -> None:
        self.clock = Clock()
        self.progress: tuple[int, int] | None = (0, 0)
        self.dropped: list[tuple[float, str]] = []
        self.watch = IdleWatch(
            self.clock,  # type: ignore[arg-type]
            idle_s,
            lambda: self.progress,
            lambda reason: self.dropped.append((self.clock.now, reason)),
        )
        self.watch.start()


def test_an_idle_client_is_dropped_once_and_not_before_its_time() -> None:
    client = Client()
    client.clock.run(10 * IDLE_S)
    ((when, reason),) = client.dropped
    assert IDLE_S <= when <= IDLE_S * (1 + 1 / LOOKS)
    assert reason == "the client asks for nothing for 80 s"


def test_whoever_asks_in_time_stays() -> None:
    client = Client()
    for count in range(1, 50):
        client.clock.run(IDLE_S * 0.99)
        client.progress = (count, 0)
    assert not client.dropped


def test_a_payload_that_comes_in_is_progress() -> None:
    client = Client()
    for count in range(1, 50):
        client.clock.run(IDLE_S * 0.99)
        client.progress = (0, count)
    assert not client.dropped


def test_a_client_that_waits_for_us_is_not_idle() -> None:
    client = Client()
    client.progress = None
    client.clock.run(10 * IDLE_S)
    assert not client.dropped
    client.progress = (0, 0)
    client.clock.run(IDLE_S * 0.99)
    assert not client.dropped
    client.clock.run(IDLE_S)
    assert client.dropped


@pytest.mark.parametrize("idle_s", [None, 0.0])
def test_without_a_bound_nobody_is_dropped(idle_s: float | None) -> None:
    client = Client(idle_s)
    client.clock.run(1e6)
    assert not client.dropped


def test_after_stop_nobody_is_dropped() -> None:
    client = Client()
    client.watch.stop()
    client.clock.run(10 * IDLE_S)
    assert not client.dropped
