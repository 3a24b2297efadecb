"""Lanes: every call ends once, in the loop's thread, in order where there is one thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from nbdfleece.datapath import workers
from nbdfleece.datapath.route import EarlyReply
from nbdfleece.datapath.step import Step
from tests.reference import workers as plain

AnyLane = workers.Lane | plain.Lane


@pytest.fixture(params=[workers.Lane, plain.Lane], ids=["lane", "plain"])
def make_lane(request: pytest.FixtureRequest) -> Iterator[Callable[[int], AnyLane]]:
    made: list[AnyLane] = []

    def make(threads: int) -> AnyLane:
        made.append(request.param("test", threads))
        return made[-1]

    yield make
    for lane in made:
        lane.close()


async def test_results_and_errors_come_back(make_lane: Callable[[int], AnyLane]) -> None:
    lane = make_lane(4)

    def fail() -> None:
        raise OSError(5, "no")

    assert await lane.submit(lambda: 42) == 42
    with pytest.raises(OSError, match="no"):
        await lane.submit(fail)


async def test_one_thread_runs_calls_in_order(make_lane: Callable[[int], AnyLane]) -> None:
    lane = make_lane(1)
    order: list[int] = []

    ops = [lane.submit(lambda index=index: order.append(index)) for index in range(100)]
    for op in reversed(ops):
        await op

    assert order == list(range(100))


async def test_threads_work_at_the_same_time(make_lane: Callable[[int], AnyLane]) -> None:
    lane = make_lane(3)
    meet = threading.Barrier(3, timeout=30)

    ops = [lane.submit(meet.wait) for _ in range(3)]

    assert sorted([await op for op in ops]) == [0, 1, 2]


async def test_no_more_threads_than_asked_for() -> None:
    lane = workers.Lane("few", 2)
    go = threading.Event()
    ops = [lane.submit(go.wait) for _ in range(10)]
    mine = [thread for thread in threading.enumerate() if thread.name == "nbdfleece few"]
    go.set()
    for op in ops:
        await op
    lane.close()

    assert len(mine) == 2
    assert all(thread.daemon for thread in mine)  # a stuck one does not keep the program


async def test_outstanding_counts_what_was_not_handed_out() -> None:
    lane = workers.Lane("count", 1)
    go = threading.Event()
    ops = [lane.submit(go.wait) for _ in range(3)]
    assert lane.outstanding == 3

    go.set()
    for op in ops:
        await op

    assert lane.outstanding == 0
    lane.close()


async def test_close_lets_queued_calls_run_and_then_ends_the_threads() -> None:
    lane = workers.Lane("closing", 1)
    go = threading.Event()
    first = lane.submit(go.wait)
    second = lane.submit(lambda: "ran")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "nbdfleece closing"]

    lane.close()
    go.set()

    assert await first
    assert await second == "ran"
    thread.join(30)
    assert not thread.is_alive()


async def test_a_task_that_waits_cannot_cancel_the_call() -> None:
    lane = workers.Lane("cancel", 1)
    go = threading.Event()
    op = lane.submit(go.wait)

    async def wait() -> None:
        await op

    task = asyncio.get_running_loop().create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()

    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert op.done()
    lane.close()


async def test_a_stepped_coroutine_may_await_a_call() -> None:
    lane = workers.Lane("step", 1)
    ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def request() -> int:
        return await lane.submit(lambda: 1) + await lane.submit(lambda: 2)

    def done(result: object, error: BaseException | None) -> None:
        ended.set_result((result, error, threading.current_thread()))

    Step(request(), done).resume()

    assert await ended == (3, None, threading.main_thread())
    lane.close()


async def test_an_awaiter_that_raises_does_not_keep_results_from_others() -> None:
    loop = asyncio.get_running_loop()
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: reported.append(context))
    lane = workers.Lane("bug", 1)
    go = threading.Event()
    bad, good = lane.submit(go.wait), lane.submit(lambda: "fine")

    def raise_error(_op: object) -> None:
        raise AssertionError("a bug")

    bad.add_done_callback(raise_error)
    go.set()

    assert await good == "fine"
    await asyncio.sleep(0)  # a result is handed out inside the handing out
    assert len(reported) == 1
    assert workers.completions()._turns == 0
    lane.close()


async def test_an_end_of_turn_that_raises_does_not_keep_calls_from_their_threads() -> None:
    loop = asyncio.get_running_loop()
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: reported.append(context))
    lane = workers.Lane("turn", 1)

    def raise_error() -> None:
        raise AssertionError("a bug")

    workers.completions().at_end(raise_error)
    op = lane.submit(lambda: "ran")

    assert await op == "ran"
    assert len(reported) == 1
    assert await lane.submit(lambda: "again") == "again"
    lane.close()


async def test_calls_of_one_turn_are_handed_over_at_its_end() -> None:
    lane = workers.Lane("gather", 1)
    ran = threading.Event()
    found = workers.completions()

    found.begin_turn()
    op = lane.submit(ran.set)
    assert not ran.is_set()
    found.end_turn()
    await op

    assert ran.is_set()
    lane.close()


class Replies:
    """A reply that notes with how many others it was sent."""

    def __init__(self, sent: list[int]) -> None:
        self._sent = sent

    def send_with(self, others: Sequence[EarlyReply]) -> list[EarlyReply]:
        self._sent.append(1 + len(others))
        return []


async def test_calls_gather_while_the_one_thread_is_at_work() -> None:
    lane = workers.Lane("gather", 1)
    go = threading.Event()
    sent: list[int] = []

    first = lane.submit(lambda: go.wait(30), Replies(sent))
    await asyncio.sleep(0)  # handed over
    later = []
    for _ in range(5):
        later.append(lane.submit(lambda: None, Replies(sent)))
        await asyncio.sleep(0)
    go.set()
    await first
    for op in later:
        await op

    assert sent == [1, 5]
    assert await lane.submit(lambda: "again") == "again"
    lane.close()


async def test_what_has_gathered_runs_when_the_lane_is_closed() -> None:
    lane = workers.Lane("close", 1)
    go = threading.Event()
    ops = [lane.submit(lambda: go.wait(30))]
    await asyncio.sleep(0)
    ops.append(lane.submit(lambda: True))
    lane.close()
    go.set()

    assert [await op for op in ops] == [True, True]


async def test_a_call_that_fails_sends_no_reply(make_lane: Callable[[int], AnyLane]) -> None:
    lane = make_lane(1)
    sent: list[int] = []
    ops = [lane.submit(call, Replies(sent)) for call in (int, lambda: int("no"), int)]

    assert await ops[0] == 0
    with pytest.raises(ValueError, match="no"):
        await ops[1]
    assert await ops[2] == 0
    assert sum(sent) == 2
    lane.close()


async def test_a_waiting_thread_keeps_nothing_of_the_last_call_alive() -> None:
    class Payload:
        pass

    lane = workers.Lane("free", 1)
    payload = Payload()
    gone = weakref.ref(payload)
    await lane.submit(lambda payload=payload: id(payload))
    del payload

    while gone() is not None:  # until the deadline: nothing else is handed to the thread
        gc.collect()
        await asyncio.sleep(0)
    lane.close()


def test_each_loop_has_completions_of_its_own_and_closed_ones_go() -> None:
    async def use() -> workers.Completions:
        lane = workers.Lane("loop", 1)
        assert await lane.submit(lambda: 1) == 1
        lane.close()
        return workers.completions()

    first, second = asyncio.run(use()), asyncio.run(use())

    assert first is not second
    assert first.loop not in workers._completions
