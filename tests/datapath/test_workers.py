"""Lanes: every call ends once, in the loop's thread, in order where there is one thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from nbdfleece.datapath import workers
from nbdfleece.datapath.route import EarlyReply, EarlySender
from nbdfleece.datapath.step import Step
from tests.reference import workers as plain
from tests.support.waiting import until

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
    await asyncio.sleep(0)  # handed over
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
    await asyncio.sleep(0)  # handed over
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
    """Makes replies, and notes how many are sent together."""

    def __init__(self, sent: list[int]) -> None:
        self._sent = sent

    def send_early(self, replies: Sequence[EarlyReply]) -> None:
        self._sent.append(len(replies))

    def reply(self) -> EarlyReply:
        return Reply(self)


class Reply:
    """A reply that is not really sent."""

    data = b""
    sent = False

    def __init__(self, way: EarlySender) -> None:
        self.way = way


async def test_calls_gather_while_the_one_thread_is_at_work() -> None:
    lane = workers.Lane("gather", 1)
    go = threading.Event()
    sent: list[int] = []
    mine, other = Replies(sent), Replies(sent)

    first = lane.submit(lambda: go.wait(30), mine.reply())
    await asyncio.sleep(0)  # handed over
    later = []
    for way in (mine, other, mine, mine, other):
        later.append(lane.submit(lambda: None, way.reply()))
        await asyncio.sleep(0)
    go.set()
    await first
    for op in later:
        await op

    assert sent == [1, 3, 2]  # those of one connection together
    assert await lane.submit(lambda: "again") == "again"
    lane.close()


async def test_calls_are_handed_over_when_the_loop_is_about_to_wait() -> None:
    found = workers.completions()
    found.is_told_of_waits = True  # as of a loop with a PollingSelector
    lane = workers.Lane("wait", 1, lambda: Batches([]))
    ran = threading.Event()

    found.begin_turn()
    op = lane.submit(ran.set)
    found.end_turn()
    assert found.outstanding == 0
    found.about_to_wait()
    assert found.outstanding == 1
    await op

    assert ran.is_set()
    assert found.outstanding == 0
    lane.close()


async def test_without_a_thread_to_be_had_calls_fail_and_the_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lane = workers.Lane("none", 2)
    with monkeypatch.context() as patch:

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        ops = [lane.submit(int) for _ in range(3)]
        for op in ops:
            with pytest.raises(RuntimeError, match="can't start"):
                await op
    assert lane.outstanding == 0
    assert await lane.submit(lambda: "later") == "later"
    lane.close()


async def test_a_callback_is_called_with_the_op_and_before_those_added_later() -> None:
    lane = workers.Lane("callback", 1)
    called: list[tuple[str, object]] = []
    op = lane.submit(lambda: int("no"), None, lambda op: called.append(("first", op.error)))
    op.add_done_callback(lambda op: called.append(("second", op.error)))
    with pytest.raises(ValueError, match="no"):
        await op
    assert [name for name, _ in called] == ["first", "second"]
    assert all(isinstance(error, ValueError) for _, error in called)
    lane.close()


class Batches:
    """Makes calls, and notes how many at a time (workers.Batches)."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def run(self, ops: Sequence[workers.Op[object]]) -> None:
        self._sizes.append(len(ops))
        for op in ops:
            op.run()

    def close(self) -> None:
        self._sizes.append(0)


async def test_batches_get_the_calls_of_one_hand_over_and_are_closed() -> None:
    sizes: list[int] = []
    lane = workers.Lane("batch", 1, lambda: Batches(sizes))
    ran: list[int] = []

    def submit(number: int) -> workers.Op[None]:
        return lane.submit(lambda: ran.append(number))

    for op in [submit(number) for number in range(40)]:
        await op
    await submit(40)
    lane.close()
    await until(lambda: 0 in sizes)  # the thread ends by itself

    assert ran == list(range(41))
    assert sizes == [16, 16, 8, 0]  # one alone is no batch


async def test_a_fault_in_a_batch_is_the_error_of_its_calls_and_the_thread_goes_on() -> None:
    class Faulty(Batches):
        def run(self, ops: Sequence[workers.Op[object]]) -> None:
            ops[0].error = OSError("its own")
            raise MemoryError

    lane = workers.Lane("fault", 1, lambda: Faulty([]))
    ops = [lane.submit(int) for _ in range(3)]
    for op, kind in zip(ops, (OSError, MemoryError, MemoryError), strict=True):
        with pytest.raises(kind):
            await op
    assert await lane.submit(lambda: "again") == "again"
    lane.close()


async def test_slow_calls_are_made_one_by_one_so_that_those_before_are_answered() -> None:
    sizes: list[int] = []
    sent: list[int] = []
    way = Replies(sent)
    lane = workers.Lane("slow", 1, lambda: Batches(sizes))
    go = threading.Event()
    slow = lane.submit(lambda: time.sleep(0.002), way.reply())  # a slow disk
    later = [lane.submit(lambda: None, way.reply()) for _ in range(15)]
    stuck = lane.submit(lambda: go.wait(30), way.reply())
    last = lane.submit(lambda: None, way.reply())

    for op in (slow, *later):
        await op  # the stuck one does not keep them
    assert not stuck.done()
    go.set()
    await stuck
    await last
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
    ops = [lane.submit(call, Replies(sent).reply()) for call in (int, lambda: int("no"), int)]

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
