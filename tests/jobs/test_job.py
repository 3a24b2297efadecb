"""The life of a job: what is allowed in which state, pause points, speed, errors, endings."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.block.drain import drained
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.graph import Graph
from nbdfleece.jobs.job import (
    LEGAL,
    Job,
    JobEnded,
    JobIoError,
    JobNews,
    JobOptions,
    JobPending,
    OnError,
    Status,
    StatusChanged,
    Verb,
)
from nbdfleece.jobs.manager import JobManager
from tests.support.fleecing import add_plain
from tests.support.waiting import turns


class Pieces:
    """Work of `count` pieces, each of which waits for `let_go`."""

    type = "pieces"

    def __init__(self, count: int, *, size: int = 1) -> None:
        self.count = count
        self.size = size
        self.done = 0
        self.cleaned = 0
        self.gate = asyncio.Event()
        self.fault: Exception | None = None
        self.errors: list[IoError] = []
        self.policy = OnError.REPORT
        self.clean_error: CommandError | None = None

    async def run(self, job: Job) -> None:
        while self.done < self.count and await job.begin(self.size):
            try:
                await self.gate.wait()
                if self.fault is not None:
                    raise self.fault
                if self.errors:
                    job.piece_failed(self.errors.pop(), self.policy, is_read=True)
                else:
                    self.done += 1
            finally:
                job.end()

    async def clean(self) -> None:
        self.cleaned += 1
        if self.clean_error is not None:
            raise self.clean_error

    def progress(self) -> tuple[int, int]:
        return self.done, self.count

    def hurry(self) -> None:
        self.gate.set()


class Bench:
    """A manager with everything that its jobs tell."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.jobs = JobManager(tasks)
        self.news: list[JobNews] = []
        self.jobs.news.subscribe(self.news.append)

    def add(self, work: Pieces, **options: object) -> Job:
        job = Job(JobOptions("j", **options), work, self.jobs.news)  # type: ignore[arg-type]
        self.jobs.add(job)
        return job

    def start(self, work: Pieces, **options: object) -> Job:
        job = self.add(work, **options)
        self.jobs.start(job)
        return job

    def states(self) -> list[str]:
        return [news.status.value for news in self.news if isinstance(news, StatusChanged)]

    def ended(self) -> JobEnded:
        (ended,) = [news for news in self.news if isinstance(news, JobEnded)]
        return ended


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tasks)
        yield bench
        await bench.jobs.close()


async def ask(job: Job, verb: Verb) -> None:
    if verb is Verb.SET_SPEED:
        job.set_speed(1)
    elif verb is Verb.FINALIZE:
        await job.finalize()
    else:
        getattr(job, verb.value)()


@pytest.mark.parametrize(
    ("auto_finalize", "auto_dismiss"), list(itertools.product((True, False), repeat=2))
)
async def test_the_life_of_a_job_and_what_is_allowed_in_it(
    bench: Bench, auto_finalize: bool, auto_dismiss: bool
) -> None:
    """T-J9."""
    work = Pieces(1)
    job = bench.start(work, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
    await turns(5)
    for verb in (Verb.COMPLETE, Verb.FINALIZE, Verb.DISMISS):
        with pytest.raises(CommandError, match=f"in state 'running' cannot .* '{verb.value}'"):
            await ask(job, verb)
    work.gate.set()
    await turns(5)
    expected = ["created", "running", "waiting", "pending"]
    if not auto_finalize:
        assert bench.states() == expected
        assert bench.news[-1] == JobPending("j", "pieces")
        assert not work.cleaned
        for verb in (Verb.PAUSE, Verb.SET_SPEED, Verb.COMPLETE, Verb.DISMISS):
            with pytest.raises(CommandError, match="in state 'pending' cannot accept"):
                await ask(job, verb)
        await job.finalize()
    expected.append("concluded")
    assert work.cleaned == 1
    assert bench.ended() == JobEnded("j", "pieces", 1, 1, 0, False, None)
    if not auto_dismiss:
        assert bench.states() == expected
        assert list(bench.jobs) == [job]
        for verb in set(Verb) - {Verb.DISMISS, Verb.RESUME}:
            with pytest.raises(CommandError, match="in state 'concluded' cannot accept"):
                await ask(job, verb)
        job.dismiss()
    assert bench.states() == [*expected, "null"]
    assert not list(bench.jobs)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("verb", Verb)
async def test_in_each_state_exactly_the_verbs_of_the_table(
    bench: Bench, status: Status, verb: Verb
) -> None:
    job = Job(JobOptions("j"), Pieces(1), bench.jobs.news)
    job.status = status
    if status in LEGAL[verb]:
        assert verb.value in QEMU[status.value]
        return
    assert verb.value not in QEMU.get(status.value, "")
    words = "Can't resume" if verb is Verb.RESUME else f"Job 'j' in state '{status.value}' cannot"
    with pytest.raises(CommandError, match=words):
        await ask(job, verb)


QEMU = {
    "created": "cancel pause resume set-speed",
    "running": "cancel pause resume set-speed",
    "paused": "cancel pause resume set-speed",
    "ready": "cancel pause resume set-speed complete",
    "standby": "cancel pause resume set-speed",
    "waiting": "cancel",
    "pending": "cancel finalize",
    "concluded": "dismiss",
}


async def test_a_paused_job_has_nothing_in_flight(bench: Bench) -> None:
    work = Pieces(2)
    job = bench.start(work)
    await turns(5)
    job.pause()
    assert job.is_paused
    assert job.status is Status.RUNNING, "the piece in flight is not over"
    work.gate.set()
    await turns(5)
    assert job.status is Status.PAUSED
    assert work.done == 1
    with pytest.raises(CommandError, match="already paused"):
        job.pause()
    job.resume()
    with pytest.raises(CommandError, match="not paused"):
        job.resume()
    await job.wait_concluded()
    assert work.done == 2
    assert bench.states()[2:4] == ["paused", "running"]


async def test_a_drained_section_waits_for_the_piece_and_holds_the_next(bench: Bench) -> None:
    graph = Graph()
    node = await add_plain(graph, NullDriver(size=1, read_zeroes=True, latency_ns=0))
    work = Pieces(2)
    job = bench.start(work)
    edge = graph.attach_root("main node", job, node, perm=0, shared=15)
    await turns(5)
    inside = asyncio.Event()

    async def drain() -> None:
        async with drained(node):
            inside.set()
            assert work.done == 1
            await turns(20)
            assert work.done == 1
            assert job.status is Status.PAUSED

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(drain())
        await turns(5)
        assert not inside.is_set()
        work.gate.set()
    await job.wait_concluded()
    assert work.done == 2
    graph.detach_root(edge)
    await graph.remove(node)


async def test_cancelling_a_paused_job_shows_it_running_first(bench: Bench) -> None:
    work = Pieces(2)
    job = bench.start(work)
    work.gate.set()
    job.pause()
    await turns(5)
    job.cancel()
    await job.wait_concluded()
    assert bench.states() == [
        *("created", "running", "paused", "running", "aborting", "concluded", "null"),
    ]
    assert bench.ended().cancelled
    assert work.cleaned == 1


async def test_cancelled_while_pending(bench: Bench) -> None:
    work = Pieces(1)
    work.gate.set()
    job = bench.start(work, auto_finalize=False, auto_dismiss=False)
    await turns(5)
    job.cancel()
    await job.wait_concluded()
    assert bench.states()[-3:] == ["pending", "aborting", "concluded"]
    assert job.error_text == "Operation canceled"


async def test_a_job_that_never_started_ends_without_an_event_of_its_own(bench: Bench) -> None:
    work = Pieces(1)
    job = bench.add(work)
    await job.abandon()
    assert bench.states() == ["created", "aborting", "concluded", "null"]
    assert not any(isinstance(news, JobEnded) for news in bench.news)
    assert work.cleaned == 1


@pytest.mark.parametrize(
    ("policy", "number", "action"),
    [
        (OnError.REPORT, errno.EIO, OnError.REPORT),
        (OnError.IGNORE, errno.EIO, OnError.IGNORE),
        (OnError.STOP, errno.EIO, OnError.STOP),
        (OnError.ENOSPC, errno.EIO, OnError.REPORT),
        (OnError.ENOSPC, errno.ENOSPC, OnError.STOP),
        (OnError.AUTO, errno.ENOSPC, OnError.STOP),
    ],
)
async def test_what_an_error_does(
    bench: Bench, policy: OnError, number: int, action: OnError
) -> None:
    work = Pieces(1)
    work.policy = policy
    work.errors = [IoError(number, "here")]
    work.gate.set()
    job = bench.start(work)
    await turns(10)
    assert JobIoError("j", is_read=True, action=action) in bench.news
    if action is OnError.STOP:
        assert job.status is Status.PAUSED
        assert job.io_status == ("nospace" if number == errno.ENOSPC else "failed")
        job.resume()
        assert job.io_status == "ok"
    await job.wait_concluded()
    failed = action is OnError.REPORT
    assert (bench.ended().error is not None) is failed
    assert ("aborting" in bench.states()) is failed


async def test_a_fault_of_ours_fails_the_job_and_nothing_else(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    work = Pieces(1)
    work.fault = AssertionError("planted")
    work.gate.set()
    await bench.start(work).wait_concluded()
    assert bench.ended().error == "Input/output error"
    assert "planted" in caplog.text


async def test_a_graph_that_cannot_be_put_back_is_an_error_of_the_job(bench: Bench) -> None:
    work = Pieces(1)
    work.clean_error = CommandError("stuck")
    work.gate.set()
    await bench.start(work).wait_concluded()
    assert bench.ended().error == "stuck"
    assert bench.states()[-4:] == ["pending", "aborting", "concluded", "null"]


async def test_speed_lets_one_piece_go_at_once_and_the_next_in_its_time(bench: Bench) -> None:
    """T-J3."""
    work = Pieces(3, size=1 << 20)
    work.gate.set()
    job = bench.start(work, speed=1)
    await turns(20)
    assert work.done == 1
    with pytest.raises(CommandError, match="'speed' expects a non-negative value"):
        job.set_speed(-1)
    job.set_speed(0)
    await job.wait_concluded()
    assert work.done == 3
