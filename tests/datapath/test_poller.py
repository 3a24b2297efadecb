"""The selector that looks before it sleeps: the same events as the plain one, and no spinning."""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Iterator

import pytest

from nbdfleece.datapath import poller, workers
from tests.reference import poller as plain


@pytest.fixture(params=[poller.PollingSelector, plain.PollingSelector], ids=["polling", "plain"])
def selector(request: pytest.FixtureRequest) -> Iterator[selectors.EpollSelector]:
    with request.param() as made:
        yield made


def test_what_is_ready_is_returned(selector: selectors.EpollSelector) -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    for fd in (first, second):
        selector.register(fd, selectors.EVENT_READ)
    for turn in range(20):
        ready = (first, second)[turn % 2]
        os.eventfd_write(ready, 1)
        for timeout in (None, 0, 0.01, 5):
            assert [key.fd for key, _ in selector.select(timeout)] == [ready]
        os.eventfd_read(ready)
        assert selector.select(0) == []
    os.close(first)
    os.close(second)


def test_a_wait_without_events_ends_at_its_timeout(selector: selectors.EpollSelector) -> None:
    for timeout in (0.00001, 0.0005, 0.01):
        for _ in range(3):
            assert selector.select(timeout) == []


def test_a_long_wait_ends_the_looking_and_a_short_one_begins_it() -> None:
    with poller.PollingSelector() as selector:
        fd = os.eventfd(1)
        selector.register(fd, selectors.EVENT_READ)
        selector.select(1)
        assert 0 < selector._moment <= poller.POLL_MAX_S
        os.eventfd_read(fd)
        selector.select(0.01)
        assert selector._moment == 0
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_there_is_no_looking_while_several_calls_are_in_threads(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    class Calls:
        outstanding = 0

        def about_to_wait(self) -> None:
            self.outstanding = count  # those that are handed over now are in threads

    asked: list[float | None] = []

    def select(_self: object, timeout: float | None = None) -> list[object]:
        asked.append(timeout)
        return []

    with poller.PollingSelector() as selector:
        monkeypatch.setattr(selectors.EpollSelector, "select", select)
        selector._moment = poller.POLL_MAX_S
        selector.completions = Calls()  # type: ignore[assignment]
        assert selector.select(5) == []
        assert asked[-1] == 5
        assert (len(asked) == 1) == (count > 1)
        monkeypatch.undo()


def test_the_loop_knows_of_calls_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many short calls through a lane, under the loop that the daemon runs: all end, in order, and
    # the selector that looks for them is told how many there are.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})

    async def work() -> list[int]:
        found = workers.completions()
        selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        assert selector.completions is found
        lane = workers.Lane("test", 1)
        results = []
        for number in range(200):
            op = lane.submit(lambda number=number: number)  # type: ignore[misc]
            assert lane.outstanding == 1
            results.append(await op)
            assert lane.outstanding == found.outstanding == 0
        lane.close()
        return results

    with asyncio.Runner(loop_factory=poller.new_event_loop) as runner:
        assert runner.run(work()) == list(range(200))
