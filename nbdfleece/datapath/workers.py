"""Worker threads for system calls that may block, and the way back to the event loop.

A `Lane` is a queue with threads behind it. Each file has lanes of its own, so a stuck disk holds
only its own threads. Results come back through one eventfd per event loop; all that have finished
by the time the loop wakes up are handed out together.

Invariants
  W1  An Op finishes exactly once, in the event loop's thread.
  W2  Threads touch nothing of ours but the arguments of the call they run, and its reply.
  W3  A thread that is stuck in the kernel never keeps the program from ending (daemon threads).

# FAST: `Op` in place of asyncio.Future saves a loop turn per call, by estimate 5 microseconds (not
# measured apart from the rest); plain form in tests/reference/workers.py
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar, cast

from nbdfleece.datapath.writes import MAX_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from nbdfleece.datapath.route import EarlyReply, EarlySender

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_POST_AFTER_S: Final = 0.0005  # results wait so long for others of their batch, no longer


class Op(Generic[T_co]):
    """A call handed to a lane: awaitable, by a task or by a stepped coroutine.

    Shaped like an asyncio.Future, but its callbacks run at once when the result arrives. It cannot
    be cancelled: the system call goes on whatever the caller thinks.

    Attributes:
        call: What it runs.
        reply: What the call is to be answered with, from its thread, if it succeeds.
        error: What the call has raised, when it has ended; set by whoever makes it.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_finished",
        "_lane",
        "_result",
        "call",
        "error",
        "reply",
    )

    def __init__(
        self,
        lane: Lane,
        call: Callable[[], T_co],
        reply: EarlyReply | None,
        callback: Callable[[Op[T_co]], object] | None,
    ) -> None:
        self._asyncio_future_blocking = False
        self._lane = lane
        self.call = call
        self.reply = reply
        self._callback = callback
        self._finished = False
        self._result: T_co | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call; in a worker thread."""
        try:
            self._result = self.call()
        except BaseException as error:  # noqa: BLE001 - carried to the awaiter
            self.error = error

    def finish(self) -> None:
        """Wake the awaiter; in the event loop's thread, once."""
        self._finished = True
        if self._callback is not None:
            self._callback(self)

    def __await__(self) -> Generator[Op[T_co], None, T_co]:
        if not self._finished:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    # --- what asyncio.Task asks of a future ----------------------------------------------------

    def done(self) -> bool:
        """Tell whether the result is there."""
        return self._finished

    def result(self) -> T_co:
        """Return the result, or raise the error, of the finished call."""
        if self.error is not None:
            raise self.error
        return cast("T_co", self._result)

    def add_done_callback(
        self, callback: Callable[[Op[T_co]], object], *, context: object = None
    ) -> None:
        """Call `callback(self)` when the result arrives (it has not yet)."""
        before = self._callback
        if before is None:
            self._callback = callback
            return

        def both(op: Op[T_co]) -> None:
            before(op)
            callback(op)

        self._callback = both

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop in which the Op finishes."""
        return self._lane.loop()

    def cancel(self, msg: object = None) -> bool:
        """Refuse: a system call cannot be taken back."""
        return False


class Completions:
    """The way from worker threads back into one event loop, and the turns of that loop.

    A turn is a stretch of work in the loop's thread that begins many small things: a batch of
    requests, a batch of results. What costs a system call or wakes a thread waits for its end.

    Attributes:
        loop: The event loop.
        outstanding: Calls handed over to threads whose results have not been handed out.
        is_told_of_waits: The loop calls `about_to_wait`; set by the maker of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: Final = loop
        self.outstanding = 0
        self._finished: deque[tuple[Lane | None, list[Op[object]]]] = deque()
        self._waking = False  # an eventfd write is on its way that will see all entries
        self._turns = 0
        self._at_end: list[Callable[[], object]] = []
        self._end_planned = False
        self._before_wait: list[Callable[[], object]] = []
        self.is_told_of_waits = False
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._eventfd, self._hand_out)

    def post(self, lane: Lane, ops: list[Op[object]]) -> None:
        """Hand in finished ops of a lane; from a worker thread."""
        self._finished.append((lane, ops))
        if not self._waking:
            self._waking = True
            os.eventfd_write(self._eventfd, 1)

    def begin_turn(self) -> None:
        """Begin a turn; nests. Not across an await."""
        self._turns += 1

    def end_turn(self) -> None:
        """End a turn; the outermost one runs what `at_end` has gathered."""
        self._turns -= 1
        if self._turns == 0 and self._at_end:
            self._run_at_end()

    def at_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` at the end of the turn, or soon when there is none."""
        self._at_end.append(callback)
        if self._turns == 0 and not self._end_planned:
            self._end_planned = True
            self.loop.call_soon(self._run_at_end)

    def before_wait(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the loop is about to wait, or to look, for events.

        It raises nothing. Where the loop does not tell us: at the end of the turn.
        """
        if self.is_told_of_waits:
            self._before_wait.append(callback)
        else:
            self.at_end(callback)

    def about_to_wait(self) -> None:
        """Run what `before_wait` has gathered; for the loop's selector."""
        while self._before_wait:
            callbacks, self._before_wait = self._before_wait, []
            for callback in callbacks:
                callback()

    def close(self) -> None:
        """Give the eventfd back; the loop has been closed."""
        os.close(self._eventfd)

    def _run_at_end(self) -> None:
        self._end_planned = False
        while self._at_end:
            callbacks, self._at_end = self._at_end, []
            for index, callback in enumerate(callbacks, start=1):
                try:
                    callback()
                except BaseException:
                    # A bug in one: the others must not wait for their end of turn for ever.
                    self._at_end[:0] = callbacks[index:]
                    self._end_planned = True
                    self.loop.call_soon(self._run_at_end)
                    raise

    def _hand_out(self) -> None:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return
        # Before the queue is emptied: whoever appends behind our last look writes again.
        self._waking = False
        finished = self._finished
        self.begin_turn()
        try:
            while finished:
                lane, ops = finished.popleft()
                if lane is not None:
                    self.outstanding -= len(ops)
                    lane.ops_finished(len(ops))
                left = iter(ops)
                try:
                    for op in left:
                        op.finish()
                except BaseException:
                    # A bug in one awaiter: the others still get their results, at the next turn.
                    finished.appendleft((None, list(left)))
                    os.eventfd_write(self._eventfd, 1)
                    raise
        finally:
            self.end_turn()


_completions: dict[asyncio.AbstractEventLoop, Completions] = {}


def completions() -> Completions:
    """Return the running loop's Completions, made at the first call."""
    return completions_of(asyncio.get_running_loop())


def completions_of(loop: asyncio.AbstractEventLoop) -> Completions:
    """Return the Completions of `loop`, made at the first call."""
    found = _completions.get(loop)
    if found is None:
        for closed in [other for other in _completions if other.is_closed()]:
            _completions.pop(closed).close()
        found = _completions[loop] = Completions(loop)
    return found


class Batches(Protocol):
    """Makes calls of a lane many at a time, in its thread."""

    def run(self, ops: Sequence[Op[object]], /) -> None:
        """Make the calls of 2 to MAX_BATCH ops, which return nothing; set `error` of the failed."""

    def close(self) -> None:
        """End; the thread ends."""


class Lane:
    """A queue of calls with up to `threads` worker threads, started as they are needed.

    With one thread, calls run in the order of submission. Those of one turn are handed over
    together, with batches when the loop is about to wait; and while the thread is at work, what is
    submitted gathers until it has done.

    # FAST: threads that wake while the loop is still at work fight it for the interpreter lock: a
    # 1 microsecond read took 70 then, under a profiler. Handed over together, 16 calls cost 4
    # microseconds each against 58 for one alone. A client that keeps 16 writes of 4 KiB in flight
    # sends them one by one, as replies arrive: handed over as they come they are 2 at a time, and 8
    # when they gather, which gains such writes 15 %; plain form in tests/reference/workers.py

    # FAST: a thread that is woken at the end of a turn finds the interpreter lock still taken, and
    # waits for it by five more system calls; woken last of all before the loop waits, it finds it
    # free more often: a tenth to a seventh of the processor time of writes at depth 16. Not where
    # calls are longer: 4 KiB with old data to be saved come 5 % slower then, as they might have
    # begun earlier; plain form in tests/reference/workers.py

    Args:
        name: For the names of its threads.
        threads: How many it may have.
        batches: Makes what makes calls many at a time, for its one thread; None: one by one.
    """

    def __init__(
        self, name: str, threads: int, batches: Callable[[], Batches] | None = None
    ) -> None:
        self._name = name
        self._batches = batches
        self._limit = threads
        self._threads = 0
        self._gathered: list[Op[object]] = []  # of this turn, or until the one thread is free
        self._handed = 0  # handed over, and not finished
        self._queue: SimpleQueue[list[Op[object]] | None] = SimpleQueue()
        self._completions: Completions | None = None

    def submit(
        self,
        call: Callable[[], T],
        reply: EarlyReply | None = None,
        callback: Callable[[Op[T]], object] | None = None,
    ) -> Op[T]:
        """Run `call` in a worker thread; await what this returns for its result or error.

        `reply`, if given, is sent from that thread when the call has succeeded. `callback`, if
        given, is called in the event loop then, and when it has failed.
        """
        found = self._completions
        if found is None:
            found = self._completions = completions()
        op = Op(self, call, reply, callback)
        gathered = self._gathered
        if not gathered:
            self._plan_hand_over(found)
        gathered.append(op)
        return op

    def ops_finished(self, count: int) -> None:
        """Note that ops have come back; in the event loop's thread."""
        self._handed -= count
        if self._gathered and not self._handed and self._completions is not None:
            self._plan_hand_over(self._completions)

    @property
    def outstanding(self) -> int:
        """How many calls have been submitted whose results have not been handed out."""
        return len(self._gathered) + self._handed

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop in which its ops finish; there have been some."""
        assert self._completions is not None, "something has been submitted"
        return self._completions.loop

    def close(self) -> None:
        """Let the threads go when they have run what is queued."""
        self._hand_over()
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = self._limit

    def _plan_hand_over(self, found: Completions) -> None:
        if self._batches is None:
            found.at_end(self._hand_over_when_free)
        else:
            found.before_wait(self._hand_over_when_free)

    def _hand_over_when_free(self) -> None:
        if self._limit > 1 or not self._handed:
            self._hand_over()

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        found = self._completions
        if not gathered or found is None:
            return
        found.outstanding += len(gathered)
        self._handed += len(gathered)
        while self._threads < min(self._limit, self._handed):
            try:
                self._start_thread(found)
            except RuntimeError as error:  # no more threads to be had
                if not self._threads:
                    for op in gathered:
                        op.error = error
                    found.post(self, gathered)
                    return
                break
        if self._limit == 1:
            self._queue.put(gathered)
        else:
            for op in gathered:
                self._queue.put([op])

    def _start_thread(self, found: Completions) -> None:
        threading.Thread(
            target=self._work, args=(found,), name=f"nbdfleece {self._name}", daemon=True
        ).start()
        self._threads += 1

    def _work(self, found: Completions) -> None:
        batches = self._batches() if self._batches is not None else None
        at_once = MAX_BATCH
        while True:
            ops = self._queue.get()
            if ops is None:
                break
            at_once = self._run_all(found, ops, batches, at_once)
            del ops  # while the thread waits, buffers must not hang on this
        if batches is not None:
            batches.close()

    def _run_together(self, ops: list[Op[object]], batches: Batches) -> None:
        all_of_it = Op(self, lambda: batches.run(ops), None, None)
        all_of_it.run()
        if all_of_it.error is not None:  # a fault of ours
            for op in ops:
                op.error = op.error or all_of_it.error

    def _run_all(
        self, found: Completions, ops: list[Op[object]], batches: Batches | None, at_once: int
    ) -> int:
        """Make the calls of ops, so many at once, and hand them in; return how many to take next.

        Nobody waits for the slow calls of others: where they are slow it is one.
        """
        finished: list[Op[object]] = []
        began = perf_counter()
        while ops:
            if batches is None or at_once == 1 or len(ops) == 1:
                part, ops = ops[:1], ops[1:]
                part[0].run()
            else:
                part, ops = ops[:at_once], ops[at_once:]
                self._run_together(part, batches)
            finished += part
            at_once = MAX_BATCH
            if perf_counter() - began > _POST_AFTER_S:
                at_once = 1
                _answer(finished)
                found.post(self, finished)
                finished = []
                began = perf_counter()
        if finished:
            _answer(finished)
            found.post(self, finished)
        return at_once


def _answer(ops: list[Op[object]]) -> None:
    """Send the replies of finished ops; in a worker thread, before they are posted."""
    ways: dict[EarlySender, list[EarlyReply]] = {}
    for op in ops:
        reply = op.reply
        if reply is not None and op.error is None:
            ways.setdefault(reply.way, []).append(reply)
    for way, replies in ways.items():
        way.send_early(replies)
