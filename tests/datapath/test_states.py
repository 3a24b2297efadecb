"""StateMap against a plain bytearray, in random histories."""

from __future__ import annotations

import random
import threading

import pytest

from nbdfleece.datapath import states as module
from nbdfleece.datapath.states import PAGE, StateMap
from tests.support.interleaving import acting


class PlainStates:
    """The obvious StateMap: one byte per state."""

    def __init__(self, count: int) -> None:
        self.states = bytearray(count)

    def run_end(self, first: int, last: int) -> int:
        end = first
        while end < last and self.states[end] == self.states[first]:
            end += 1
        return end

    def uniform(self, first: int, last: int) -> int:
        return self.states[first] if len(set(self.states[first:last])) == 1 else -1

    def runs(self, first: int, last: int) -> list[tuple[int, int, int]]:
        runs = []
        while first < last:
            end = self.run_end(first, last)
            runs.append((first, end, self.states[first]))
            first = end
        return runs

    def fill(self, first: int, last: int, state: int) -> None:
        self.states[first:last] = bytes((state,)) * (last - first)


def random_range(rng: random.Random, count: int) -> tuple[int, int]:
    """Return a non-empty range; short ones, long ones, and such that end at borders of pages."""
    kind = rng.randrange(4)
    first = rng.randrange(count)
    if kind == 0:
        return first, min(count, first + rng.randrange(1, 9))
    if kind == 1:
        return first, rng.randrange(first, count) + 1
    first -= first % PAGE
    if kind == 2:
        return first, min(count, first + PAGE * rng.randrange(1, 4))
    return max(0, first - rng.randrange(3)), min(count, first + PAGE + rng.randrange(3))


@pytest.mark.parametrize("count", [1, 7, PAGE, PAGE + 1, 3 * PAGE - 1, 6 * PAGE + 5])
def test_random_history_equals_a_plain_bytearray(
    count: int, rng: random.Random, *, long_run: bool
) -> None:
    states, plain = StateMap(count), PlainStates(count)
    assert len(states) == count

    for _ in range(5000 if long_run else 300):
        first, last = random_range(rng, count)
        verb = rng.randrange(3)
        if verb == 0:
            state = rng.randrange(4)
            states.fill(first, last, state)
            plain.fill(first, last, state)
        elif verb == 1:
            span = states.span(first, last)
            if span is None:
                assert first // PAGE != (last - 1) // PAGE
            else:
                page, start, stop = span
                state = rng.randrange(1, 4)
                page[start:stop] = bytes((state,)) * (stop - start)
                plain.fill(first, last, state)
        first, last = random_range(rng, count)
        state = rng.randrange(4)
        assert states.get(first) == plain.states[first]
        assert states.uniform(first, last) == plain.uniform(first, last)
        assert states.run_end(first, last) == plain.run_end(first, last)
        assert states.find(state, first, last) == plain.states.find(state, first, last)
        assert states.count(state) == plain.states.count(state)
        if last - first < 2000:
            assert states.runs(first, last) == plain.runs(first, last)
    assert states.runs(0, count) == plain.runs(0, count)
    twin = states.copy()
    by_pages = bytearray(count)
    for first, page in states.pages():
        last = min(count, first + PAGE)
        by_pages[first:last] = (
            bytes((page,)) * (last - first) if isinstance(page, int) else page[: last - first]
        )
    assert by_pages == plain.states
    loaded = StateMap(count)
    for first in range(0, count, PAGE):
        loaded.put_page(first, bytes(plain.states[first : first + PAGE]))
    assert loaded.runs(0, count) == plain.runs(0, count)
    states.fill(0, count, 3)
    assert twin.runs(0, count) == plain.runs(0, count)


def test_marking_a_huge_disk_as_a_whole_takes_no_page_of_bytes() -> None:
    count = 16 << 40 >> 12  # 16 TiB in 4 KiB clusters
    states = StateMap(count)

    assert states.uniform(0, 1 << 20) == 0
    assert states.find(3, 0, count) == -1

    states.fill(0, PAGE * 100, 4)

    assert states.find(4, 0, count) == 0
    assert states.run_end(0, PAGE * 200) == PAGE * 100
    assert not any(isinstance(page, bytearray) for page in states._pages.values())


def test_a_page_stays_the_same_object_once_it_holds_bytes() -> None:
    states = StateMap(2 * PAGE)
    span = states.span(5, 6)
    assert span is not None

    states.fill(0, 2 * PAGE, 1)
    again = states.span(0, PAGE)

    assert again is not None
    assert again[0] is span[0]


def test_a_span_may_be_set_from_another_thread() -> None:
    states = StateMap(PAGE)
    span = states.span(10, 20)
    assert span is not None
    page, first, last = span

    def work() -> None:
        page[first:last] = bytes((2,)) * (last - first)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert states.runs(0, PAGE) == [(0, 10, 0), (10, 20, 2), (20, PAGE, 0)]


def test_a_span_over_two_pages_is_refused() -> None:
    assert StateMap(2 * PAGE).span(PAGE - 1, PAGE + 1) is None


@pytest.mark.parametrize("first", [0, PAGE - 2], ids=["one page", "two pages"])
def test_what_a_worker_sets_meanwhile_is_told_of_no_other_state(first: int) -> None:
    """Whenever it comes: a state that is told of a run has been that of each state in the run."""
    last = first + 4
    line, reached = 0, 1
    while line < reached:
        states = StateMap(2 * PAGE)
        states.fill(first, last, 1)
        span = states.span(first, first + 2)
        assert span is not None
        page, start, _ = span

        def work(page: bytearray = page, start: int = start) -> None:
            page[start] = 2

        with acting((module,), {line: work}) as lines:
            runs = states.runs(first, last)
            uniform = states.uniform(first, last)
        for start, stop, state in runs:
            assert state == 1 or (start, stop, state) == (first, first + 1, 2)
        assert uniform in {1, -1}
        line, reached = line + 1, lines.reached
    assert reached > 10
