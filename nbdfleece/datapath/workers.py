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
from typing import TYPE_CHECKING, Final, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from nbdfleece.datapath.route import EarlyReply

T = TypeVar("T")

_POST_AFTER_S: Final = 0.0005  # results wait so long for others of their batch, no longer


class Op(Generic[T]):
    """A call handed to a lane: awaitable, by a task or by a stepped coroutine.

    Shaped like an asyncio.Future, but its callbacks run at once when the result arrives. It cannot
    be cancelled: the system call goes on whatever the caller thinks.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_call",
        "_callbacks",
        "_error",
        "_finished",
        "_lane",
        "_loop",
        "_reply",
        "_result",
    )

    def __init__(
        self,
        lane: Lane,
        loop: asyncio.AbstractEventLoop,
        call: Callable[[], T],
        reply: EarlyReply | None,
    ) -> None:
        self._asyncio_future_blocking = False
        self._lane = lane
        self._loop = loop
        self._call = call
        self._reply = reply
        self._callbacks: list[Callable[[Op[T]], object]] = []
        self._finished = False
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call; in a worker thread."""
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - carried to the awaiter
            self._error = error

    def early_reply(self) -> EarlyReply | None:
        """Return what a call that has succeeded is to be answered with; in a worker thread."""
        return self._reply if self._error is None else None

    def finish(self) -> None:
        """Wake the awaiter; in the event loop's thread, once."""
        self._finished = True
        self._lane.op_finished()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def __await__(self) -> Generator[Op[T], None, T]:
        if not self._finished:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    # --- what asyncio.Task asks of a future ----------------------------------------------------

    def done(self) -> bool:
        """Tell whether the result is there."""
        return self._finished

    def result(self) -> T:
        """Return the result, or raise the error, of the finished call."""
        if self._error is not None:
            raise self._error
        return cast("T", self._result)

    def add_done_callback(
        self, callback: Callable[[Op[T]], object], *, context: object = None
    ) -> None:
        """Call `callback(self)` when the result arrives (it has not yet)."""
        self._callbacks.append(callback)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop in which the Op finishes."""
        return self._loop

    def cancel(self, msg: object = None) -> bool:
        """Refuse: a system call cannot be taken back."""
        return False


class Completions:
    """The way from worker threads back into one event loop, and the turns of that loop.

    A turn is a stretch of work in the loop's thread that begins many small things: a batch of
    requests, a batch of results. What costs a system call or wakes a thread waits for its end.

    Attributes:
        loop: The event loop.
        outstanding: Calls submitted to lanes whose results have not been handed out.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: Final = loop
        self.outstanding = 0
        self._finished: deque[Op[object]] = deque()
        self._waking = False  # an eventfd write is on its way that will see all entries
        self._turns = 0
        self._at_end: list[Callable[[], object]] = []
        self._end_planned = False
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._eventfd, self._hand_out)

    def post(self, ops: list[Op[object]]) -> None:
        """Hand in finished ops; from a worker thread."""
        self._finished.extend(ops)
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
                op = finished.popleft()
                self.outstanding -= 1
                op.finish()
        except BaseException:
            # A bug in one awaiter: the others still get their results, at the next turn.
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


class Lane:
    """A queue of calls with up to `threads` worker threads, started as they are needed.

    With one thread, calls run in the order of submission. Those of one turn are handed over
    together; and while the thread is at work, what is submitted gathers until it has done.

    # FAST: threads that wake while the loop is still at work fight it for the interpreter lock: a
    # 1 microsecond read took 70 then, under a profiler. Handed over together, 16 calls cost 4
    # microseconds each against 58 for one alone. A client that keeps 16 writes of 4 KiB in flight
    # sends them one by one, as replies arrive: handed over as they come they are 2 at a time, and 8
    # when they gather, which gains such writes 15 %; plain form in tests/reference/workers.py

    Attributes:
        outstanding: Calls submitted whose results have not been handed out.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._limit = threads
        self._threads = 0
        self.outstanding = 0
        self._gathered: list[Op[object]] = []  # of this turn, or until the one thread is free
        self._handed = 0  # handed over, and not finished
        self._queue: SimpleQueue[list[Op[object]] | None] = SimpleQueue()
        self._completions: Completions | None = None

    def submit(self, call: Callable[[], T], reply: EarlyReply | None = None) -> Op[T]:
        """Run `call` in a worker thread; await what this returns for its result or error.

        `reply`, if given, is sent from that thread when the call has succeeded.
        """
        found = self._completions
        if found is None:
            found = self._completions = completions()
        op = Op(self, found.loop, call, reply)
        self.outstanding += 1
        found.outstanding += 1
        if self.outstanding > self._threads < self._limit:
            self._start_thread(found)
        if not self._gathered:
            found.at_end(self._hand_over_when_free)
        self._gathered.append(cast("Op[object]", op))
        return op

    def op_finished(self) -> None:
        """Note that an Op has come back; in the event loop's thread."""
        self.outstanding -= 1
        self._handed -= 1
        if self._gathered and not self._handed and self._completions is not None:
            self._completions.at_end(self._hand_over_when_free)

    def close(self) -> None:
        """Let the threads go when they have run what is queued."""
        self._hand_over()
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = self._limit

    def _hand_over_when_free(self) -> None:
        if self._limit > 1 or not self._handed:
            self._hand_over()

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._handed += len(gathered)
        if self._limit == 1:
            if gathered:
                self._queue.put(gathered)
        else:
            for op in gathered:
                self._queue.put([op])

    def _start_thread(self, found: Completions) -> None:
        self._threads += 1
        threading.Thread(
            target=self._work, args=(found,), name=f"nbdfleece {self._name}", daemon=True
        ).start()

    def _work(self, found: Completions) -> None:
        while True:
            ops = self._queue.get()
            if ops is None:
                return
            if len(ops) == 1:
                ops[0].run()
                _answer(ops)
                found.post(ops)
                del ops
                continue
            finished: list[Op[object]] = []
            began = perf_counter()
            for op in ops:
                op.run()
                finished.append(op)
                if perf_counter() - began > _POST_AFTER_S:
                    _answer(finished)
                    found.post(finished)
                    finished = []
                    began = perf_counter()
            if finished:
                _answer(finished)
                found.post(finished)
            del ops, op, finished  # while the thread waits, buffers must not hang on these


def _answer(ops: list[Op[object]]) -> None:
    """Send the replies of finished ops; in a worker thread, before they are posted."""
    replies = [reply for op in ops if (reply := op.early_reply()) is not None]
    while replies:
        replies = replies[0].send_with(replies[1:])
