"""Jobs that succeed together or not at all; the order of states is that of the reference."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.jobs.group import JobGroup
from nbdfleece.jobs.job import Job, JobEnded, JobNews, JobOptions, JobPending, StatusChanged
from nbdfleece.jobs.manager import JobManager
from tests.support.waiting import turns


class Work:
    """Work that ends well, by an error or by cancelling: whatever it is told first."""

    type = "work"

    def __init__(self) -> None:
        self.is_done = asyncio.Event()
        self.error: IoError | None = None
        self.clean_error: CommandError | None = None
        self.cleaning = asyncio.Event()
        self.cleaning.set()

    async def run(self, job: Job) -> None:
        await self.is_done.wait()
        if self.error is not None:
            raise self.error

    async def clean(self) -> None:
        await self.cleaning.wait()
        if self.clean_error is not None:
            raise self.clean_error

    def progress(self) -> tuple[int, int]:
        return 1, 1

    def hurry(self) -> None:
        self.is_done.set()


class Bench:
    """A group, and all that its jobs tell, as texts."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.jobs = JobManager(tasks)
        self.group = JobGroup()
        self.works: dict[str, Work] = {}
        self.told: list[str] = []
        self.jobs.news.subscribe(self._hear)

    def add(self, *names: str, **options: bool) -> None:
        for name in names:
            self.works[name] = Work()
            self.jobs.add(
                Job(JobOptions(name, **options), self.works[name], self.jobs.news, self.group)
            )

    async def start(self) -> None:
        for name in self.works:
            self.jobs.start(self.jobs.find(name))
        await turns(5)
        self.told.clear()

    async def end(self, name: str, error: int | None = None) -> None:
        if error is not None:
            self.works[name].error = IoError(error, "planted")
        self.works[name].is_done.set()
        await turns(10)

    def heard(self) -> list[str]:
        told, self.told = self.told, []
        return told

    def _hear(self, news: JobNews) -> None:
        if isinstance(news, StatusChanged):
            self.told.append(f"{news.id} {news.status.value}")
        elif isinstance(news, JobEnded):
            how = "cancelled" if news.cancelled else news.error or "completed"
            self.told.append(f"{news.id} {how}")
        elif isinstance(news, JobPending):
            self.told.append(f"{news.id} is for the user")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tasks)
        yield bench
        for work in bench.works.values():
            work.cleaning.set()
        await bench.jobs.close()


def concluded(name: str, how: str) -> list[str]:
    return [f"{name} {how}", f"{name} concluded", f"{name} null"]


async def test_all_conclude_when_the_last_one_is_done_the_newest_first(bench: Bench) -> None:
    bench.add("a", "b", "c")
    await bench.start()
    await bench.end("b")
    await bench.end("a")
    assert bench.heard() == ["b waiting", "a waiting"]
    await bench.end("c")
    assert bench.heard() == [
        *("c waiting", "c pending", "b pending", "a pending"),
        *(line for name in "cba" for line in concluded(name, "completed")),
    ]


async def test_one_that_fails_cancels_the_others_whatever_they_do(bench: Bench) -> None:
    """T-B3, the jobs' part."""
    bench.add("a", "b", "c")
    await bench.start()
    await bench.end("c")
    await bench.end("b", errno.EIO)
    assert bench.heard() == [
        "c waiting",
        "b aborting",
        "c aborting",
        *concluded("c", "cancelled"),
        "a aborting",
        *concluded("b", "Input/output error"),
        *concluded("a", "cancelled"),
    ]


async def test_cancelling_one_that_waits_cancels_all(bench: Bench) -> None:
    bench.add("a", "b")
    await bench.start()
    await bench.end("b")
    bench.jobs.find("b").cancel()
    await turns(10)
    heard = bench.heard()
    assert heard[:1] == ["b waiting"]
    assert [line for line in heard if "b " in line][1:] == [
        "b aborting",
        *concluded("b", "cancelled"),
    ]
    assert heard[-3:] == concluded("a", "cancelled")


@pytest.mark.parametrize("name", ["a", "b"])
async def test_whichever_is_finalized_all_are(bench: Bench, name: str) -> None:
    bench.add("a", auto_finalize=False)
    bench.add("b")
    await bench.start()
    await bench.end("b")
    await bench.end("a")
    assert bench.heard() == [
        *("b waiting", "a waiting", "b pending", "a pending", "a is for the user"),
    ]
    await bench.jobs.find(name).finalize()
    await turns(5)
    assert bench.heard() == [*concluded("b", "completed"), *concluded("a", "completed")]


async def test_cancelling_a_pending_one_cancels_all(bench: Bench) -> None:
    bench.add("a", "b", auto_finalize=False)
    await bench.start()
    await bench.end("b")
    await bench.end("a")
    bench.heard()
    bench.jobs.find("a").cancel()
    await turns(10)
    assert bench.heard() == [
        *("b aborting", *concluded("b", "cancelled")),
        *("a aborting", *concluded("a", "cancelled")),
    ]


async def test_finalizing_right_behind_a_cancel_is_too_late(bench: Bench) -> None:
    bench.add("a", "b", auto_finalize=False)
    await bench.start()
    await bench.end("b")
    await bench.end("a")
    bench.jobs.find("a").cancel()
    await bench.jobs.find("b").finalize()
    await turns(10)
    assert {line for line in bench.heard() if line.endswith(("cancelled", "completed"))} == {
        "a cancelled",
        "b cancelled",
    }


async def test_nobody_can_be_cancelled_once_the_group_has_succeeded(bench: Bench) -> None:
    bench.add("a", "b")
    bench.works["b"].cleaning.clear()
    await bench.start()
    await bench.end("b")
    await bench.end("a")
    bench.jobs.find("a").cancel()
    bench.jobs.find("b").cancel()
    bench.works["b"].cleaning.set()
    await turns(10)
    heard = bench.heard()
    assert heard[-6:] == [*concluded("b", "completed"), *concluded("a", "completed")]


async def test_a_graph_that_cannot_be_put_back_is_an_error_of_that_job_alone(bench: Bench) -> None:
    bench.add("a", "b")
    bench.works["b"].clean_error = CommandError("stuck")
    await bench.start()
    await bench.end("b")
    await bench.end("a")
    assert bench.heard()[-7:] == [
        *("b aborting", *concluded("b", "stuck")),
        *concluded("a", "completed"),
    ]


async def test_jobs_that_never_started_are_undone_one_by_one(bench: Bench) -> None:
    bench.add("a", "b")
    for name in "ba":
        await bench.jobs.find(name).abandon()
    assert bench.heard() == [
        *("a created", "b created"),
        *("b aborting", "b concluded", "b null", "a aborting", "a concluded", "a null"),
    ]


async def test_the_end_of_the_program_ends_groups(bench: Bench) -> None:
    bench.add("a", "b", auto_finalize=False)
    await bench.start()
    await bench.end("a")
    await bench.jobs.close()
    assert not list(bench.jobs)
