"""A job: its states, what may be asked of it in each, and its pause points.

::

    created -> running -> waiting -> pending -> concluded -> null
                | ^  |       `---------`--> aborting --^
                v |  `----------------------------^
               paused

What a job does is its `Work`. The work asks before every piece (`begin`), says when the piece is
over (`end`), and stops when `begin` says no; so a job is cancelled, paused and slowed down between
its pieces only, and a piece that has begun runs to its end.

Invariants
  J1  A paused job has no piece in flight. A drained section pauses the job, and waits for that.
  J2  The status changes by `_change` alone, along _NEXT; every change is published.
  J3  A job that has concluded has left the graph as it was before the job.
  J4  No exception leaves `run`: a fault of ours fails the job.

Follows: QEMU job.c and blockjob.c (states, verbs, events).
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
from dataclasses import dataclass
from os import strerror
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block.drain import in_time
from nbdfleece.jobs.group import JobGroup

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from nbdfleece.base.notify import Notifier
    from nbdfleece.block.child import Child

_log = logging.getLogger(__name__)


class Status(enum.Enum):
    """Where a job is in its life; values as in QMP."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(enum.Enum):
    """What may be asked of a job; values as in QEMU's errors."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = Status
_AT_WORK: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

LEGAL: Final[Mapping[Verb, frozenset[Status]]] = MappingProxyType(
    {
        Verb.CANCEL: _AT_WORK | {_S.WAITING, _S.PENDING},
        Verb.PAUSE: _AT_WORK,
        Verb.RESUME: _AT_WORK,
        Verb.SET_SPEED: _AT_WORK,
        Verb.COMPLETE: frozenset({_S.READY}),
        Verb.FINALIZE: frozenset({_S.PENDING}),
        Verb.DISMISS: frozenset({_S.CONCLUDED}),
    }
)

_NEXT: Final[Mapping[Status, frozenset[Status]]] = MappingProxyType(
    {
        _S.UNDEFINED: frozenset({_S.CREATED}),
        _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING}),
        _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
        _S.PAUSED: frozenset({_S.RUNNING}),
        _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
        _S.STANDBY: frozenset({_S.READY}),
        _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
        _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
        _S.ABORTING: frozenset({_S.CONCLUDED}),
        _S.CONCLUDED: frozenset({_S.NULL}),
        _S.NULL: frozenset(),
    }
)


class OnError(enum.Enum):
    """What an I/O error does to the job; values as in QMP."""

    REPORT = "report"  # the job fails
    IGNORE = "ignore"  # the piece is tried again
    ENOSPC = "enospc"  # no space: stop; anything else: report
    STOP = "stop"  # the job pauses until the user resumes it
    AUTO = "auto"  # for a backup: as enospc


# --- news --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """The job `id` is now in `status`."""

    id: str
    status: Status


@dataclass(frozen=True, slots=True)
class JobPending:
    """The job `id` waits for its user to finalize it."""

    id: str
    type: str


@dataclass(frozen=True, slots=True)
class JobIoError:
    """A piece of the job `id` failed; `action` is report, ignore or stop."""

    id: str
    is_read: bool
    action: OnError


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The work of a job is over, and the graph as before.

    Attributes:
        id: The job.
        type: The job's type.
        done: Progress.
        total: Progress that would have been all.
        speed: The limit at the end.
        cancelled: It was cancelled.
        error: Why it failed, or None.
    """

    id: str
    type: str
    done: int
    total: int
    speed: int
    cancelled: bool
    error: str | None


JobNews = StatusChanged | JobPending | JobIoError | JobEnded


# --- the job -----------------------------------------------------------------------------------


class Work(Protocol):
    """What a job does."""

    type: str

    async def run(self, job: Job) -> None:
        """Do it, in pieces between `job.begin` and `job.end`; return when `begin` says no.

        Raises:
            IoError: The job fails.
        """

    async def clean(self) -> None:
        """Put the graph back; called once, at the end, whatever that was.

        Raises:
            CommandError: The graph cannot be put back.
        """

    def progress(self) -> tuple[int, int]:
        """Return (done, total), in bytes of whole clusters."""

    def hurry(self) -> None:
        """Make pieces in flight end, if they wait for somebody who may never answer."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What the user may say of any job.

    Attributes:
        id: Its name.
        speed: Bytes per second; 0: no limit.
        auto_finalize: It finishes by itself.
        auto_dismiss: It is forgotten when it has concluded.
        on_blocks: It is a block job: it has events of its own, and `block-job-*` find it.
    """

    id: str
    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True
    on_blocks: bool = True


class Job:
    """A job, and the parent of its edges into the graph (block.child.Parent).

    Args:
        options: See JobOptions; the speed has been checked.
        work: What it does.
        news: Where it tells of itself.
        group: The jobs that it ends together with; None: it is on its own.

    Attributes:
        options: See JobOptions; `speed` is the first one.
        work: What it does.
        status: Where it is in its life.
        speed: Bytes per second; 0: no limit.
        is_cancelled: The user gave it up.
        is_abandoned: It was never started.
        user_paused: The user, or an error under `stop`, paused it.
        error: Why it failed, or None.
        io_status: `ok`, `failed` or `nospace`: the error that stopped it.
        edges: Its edges to nodes.
    """

    is_abandoned = False

    def __init__(
        self,
        options: JobOptions,
        work: Work,
        news: Notifier[JobNews],
        group: JobGroup | None = None,
    ) -> None:
        self.options = options
        self.work = work
        self.status = Status.UNDEFINED
        self.speed = options.speed
        self.is_cancelled = False
        self.user_paused = False
        self.error: IoError | CommandError | None = None
        self.io_status = "ok"
        self.edges: list[Child] = []
        self._news = news
        self._pauses = 0  # drained sections, and one for the user
        self._pieces = 0  # in flight
        self._next_piece_at = 0.0  # when the speed allows it, by the loop's clock
        self._group = JobGroup() if group is None else group
        self._is_concluding = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def id(self) -> str:
        """Its name."""
        return self.options.id

    @property
    def is_paused(self) -> bool:
        """Whether anybody wants it to pause."""
        return self._pauses > 0

    @property
    def has_failed(self) -> bool:
        """Whether it was cancelled or an error ended it: its work is to stop."""
        return self.is_cancelled or self.error is not None

    @property
    def error_text(self) -> str | None:
        """Why it failed, for the user; None: it did not."""
        if self.is_cancelled:
            return strerror(errno.ECANCELED)
        if isinstance(self.error, IoError):
            return strerror(self.error.errno)
        return None if self.error is None else str(self.error)

    # --- what its manager does -----------------------------------------------------------------

    def created(self) -> None:
        """Begin life, and join the group."""
        self._group.join(self)
        self._change(Status.CREATED)

    def started(self) -> None:
        """Go from created to running; inside a drained section, on to paused."""
        self._change(Status.RUNNING)
        self._look_at_pauses()

    async def run(self) -> None:
        """Do the work, then what the user chose to happen at its end. Never raises (J4).

        Cancel: not cancelled, except when the daemon stops by force.
        """
        await self._guarded(self.work.run(self))
        while self._pauses or self.status is Status.PAUSED:
            await self.changed()
        if self.has_failed:
            self._change(Status.ABORTING)
        await self._group.settle(self)
        await self._conclude()

    async def abandon(self) -> None:
        """Undo a job that was created and never started (a transaction was aborted)."""
        self.is_cancelled = self.is_abandoned = True
        await self._conclude(silent=True)

    async def _conclude(self, *, silent: bool = False) -> None:
        """Leave the graph, and tell everybody; `silent`: the work had not begun."""
        self._is_concluding = True
        self._abort_if_failed()
        await self._guarded(self.work.clean())
        self._abort_if_failed()
        if not silent and self.options.on_blocks:
            done, total = self.work.progress()
            self._news.publish(
                JobEnded(
                    self.id,
                    self.work.type,
                    done,
                    total,
                    self.speed,
                    self.is_cancelled,
                    self.error_text,
                )
            )
        self._change(Status.CONCLUDED)
        if self.options.auto_dismiss or silent:
            self._change(Status.NULL)
        self._group.leave(self)
        self.wake()

    def _abort_if_failed(self) -> None:
        if self.has_failed and self.status is not Status.ABORTING:
            self._change(Status.ABORTING)

    async def _guarded(self, part: Coroutine[object, None, None]) -> None:
        """Await a part of the job; what it raises fails the job. This is the job boundary."""
        try:
            await part
        except (IoError, CommandError) as error:
            _log.error("job '%s': %s", self.id, error)
            self.fail(error)
        except Exception:  # noqa: BLE001 - a fault of ours ends one job
            _log.exception("job '%s' failed by a fault of nbdfleece", self.id)
            self.fail(IoError(errno.EIO, f"job '{self.id}'"))

    # --- what its group does -------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether its work is done well, and others of the group may still be at theirs."""
        return self.status is Status.WAITING and not self.has_failed

    def wait_for_others(self) -> None:
        """Go from running to waiting."""
        self._change(Status.WAITING)

    def wait_for_user(self) -> None:
        """Go from waiting to pending; a user who wants to finalize the job is told."""
        self._change(Status.PENDING)
        if not self.options.auto_finalize:
            self._news.publish(JobPending(self.id, self.work.type))

    def cancel_with_group(self) -> None:
        """Give the job up, unless it has failed already; another of its group has."""
        if not self.has_failed:
            self._give_up()

    async def changed(self) -> None:
        """Return when anything about the job has changed that somebody may wait for."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        """Make all who await `changed` look again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- what its work does --------------------------------------------------------------------

    async def begin(self, length: int) -> bool:
        """Return when a piece of `length` bytes may begin; False: the work shall stop.

        After True the caller owes an `end`.

        Cancel: safe.
        """
        loop = asyncio.get_running_loop()
        while not self.has_failed:
            if self._pauses:
                await self.changed()
                continue
            now = loop.time()
            if self.speed and now < self._next_piece_at:
                timer = loop.call_later(self._next_piece_at - now, self.wake)
                await self.changed()
                timer.cancel()
                continue
            self.charge(length)
            self._pieces += 1
            return True
        return False

    def end(self) -> None:
        """Say that a piece is over."""
        self._pieces -= 1
        if self._pieces == 0:
            self._look_at_pauses()
            self.wake()

    def charge(self, length: int) -> None:
        """Count bytes against the speed limit."""
        if self.speed:
            now = asyncio.get_running_loop().time()
            self._next_piece_at = max(now, self._next_piece_at) + length / self.speed

    async def wait_cancelled(self) -> None:
        """Return when the job is to stop."""
        while not self.has_failed:
            await self.changed()

    async def rest(self, seconds: float) -> None:
        """Return after `seconds`, or when the job is to stop."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not self.has_failed and loop.time() < end:
            timer = loop.call_at(end, self.wake)
            await self.changed()
            timer.cancel()

    def fail(self, error: IoError | CommandError) -> None:
        """Make the job fail, for the first reason that is given."""
        if self.error is None:
            self.error = error
        self.wake()

    def piece_failed(self, error: IoError, policy: OnError, *, is_read: bool) -> None:
        """Do what the user wants done about an error; then `begin` says how it goes on."""
        action = policy
        if policy in (OnError.ENOSPC, OnError.AUTO):
            action = OnError.STOP if error.errno == errno.ENOSPC else OnError.REPORT
        self._news.publish(JobIoError(self.id, is_read, action))
        if action is OnError.REPORT:
            self.fail(error)
        elif action is OnError.STOP:
            self.io_status = "nospace" if error.errno == errno.ENOSPC else "failed"
            if not self.user_paused:
                self.user_paused = True
                self._pauses += 1
                self._look_at_pauses()

    # --- what its user does --------------------------------------------------------------------

    def pause(self) -> None:
        """Pause at the next pause point.

        Raises:
            CommandError: Not in this state, or the user has paused it already.
        """
        self._check(Verb.PAUSE)
        if self.user_paused:
            raise CommandError("Job is already paused")
        self.user_paused = True
        self._pauses += 1
        self._look_at_pauses()

    def resume(self) -> None:
        """Undo `pause`.

        Raises:
            CommandError: The user has not paused it.
        """
        if not self.user_paused:
            raise CommandError("Can't resume a job that was not paused")
        self._check(Verb.RESUME)
        self.io_status = "ok"
        self.user_paused = False
        self._pauses -= 1
        self._look_at_pauses()

    def set_speed(self, speed: int) -> None:
        """Change the limit, in bytes per second; 0: none.

        Raises:
            CommandError: Not in this state, or negative.
        """
        self._check(Verb.SET_SPEED)
        check_speed(speed)
        now = asyncio.get_running_loop().time()
        owed = max(0.0, self._next_piece_at - now) * self.speed  # bytes that went ahead
        self._next_piece_at = now + owed / speed if speed else 0.0
        self.speed = speed
        self.wake()

    def cancel(self) -> None:
        """Give the job up; it concludes when its pieces in flight have ended.

        Raises:
            CommandError: Not in this state.
        """
        self._check(Verb.CANCEL)
        if self.is_cancelled or self._is_concluding or self._group.has_succeeded:
            return  # the latter two: too late, by a moment
        self._give_up()

    def _give_up(self) -> None:
        self.is_cancelled = True
        if self.user_paused:
            self.user_paused = False
            self._pauses -= 1
            self._look_at_pauses()
        self.work.hurry()
        self.wake()

    def complete(self) -> None:
        """Refuse: no job of ours is ever ready.

        Raises:
            CommandError: Always.
        """
        self._check(Verb.COMPLETE)
        raise CommandError(f"The active block job '{self.id}' cannot be completed")

    async def finalize(self) -> None:
        """Let a pending job, and with it its group, conclude; return when the job has.

        Raises:
            CommandError: Not in this state; or stuck requests keep it from concluding for now.
        """
        self._check(Verb.FINALIZE)
        self._group.finalize()
        async with in_time(f"job '{self.id}' concludes"):
            await self.wait_concluded()

    def dismiss(self) -> None:
        """Forget a concluded job.

        Raises:
            CommandError: Not in this state.
        """
        self._check(Verb.DISMISS)
        self._change(Status.NULL)

    async def wait_concluded(self) -> None:
        """Return when the job has concluded.

        Cancel: safe.
        """
        while self.status not in (Status.CONCLUDED, Status.NULL):
            await self.changed()

    # --- as a parent (block.child.Parent) ------------------------------------------------------

    def describe_parent(self) -> str:
        """Return how errors call this job."""
        return f"job '{self.id}'"

    def child_attached(self, edge: Child) -> None:
        """Take the edge in."""
        self.edges.append(edge)

    def child_detached(self, edge: Child) -> None:
        """Let the edge go."""
        self.edges.remove(edge)

    def drained_begin(self) -> None:
        """Begin no piece until the matching `drained_end`; nests."""
        self._pauses += 1
        self._look_at_pauses()

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""
        assert self._pauses > 0, "drained_end without drained_begin"
        self._pauses -= 1
        self._look_at_pauses()

    def is_idle(self) -> bool:
        """Tell whether no piece is in flight."""
        return self._pieces == 0

    async def wait_idle(self) -> None:
        """Return when no piece is in flight.

        Cancel: safe.
        """
        while self._pieces:
            await self.changed()

    # --- private ---------------------------------------------------------------------------

    def _check(self, verb: Verb) -> None:
        if self.status not in LEGAL[verb]:
            raise CommandError(
                f"Job '{self.id}' in state '{self.status.value}' "
                f"cannot accept command verb '{verb.value}'"
            )

    def _change(self, status: Status) -> None:
        """Go to another state and say so (J2)."""
        assert status in _NEXT[self.status], f"{self.status} -> {status}"
        self.status = status
        self._news.publish(StatusChanged(self.id, status))

    def _look_at_pauses(self) -> None:
        """Show as paused what pauses (J1), and as running what does not any more."""
        if self.status is Status.RUNNING and self._pauses and not self._pieces:
            self._change(Status.PAUSED)
        elif self.status is Status.PAUSED and not self._pauses:
            self._change(Status.RUNNING)
            self.wake()


def check_speed(speed: int) -> None:
    """Check a speed limit.

    Raises:
        CommandError: It is negative.
    """
    if speed < 0:
        raise CommandError("Parameter 'speed' expects a non-negative value")
