"""Jobs by their ids, and the end of all of them."""

from __future__ import annotations

import asyncio

import pytest

from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.jobs.job import Job, JobOptions
from nbdfleece.jobs.manager import JobManager
from tests.support.waiting import turns


class Endless:
    """Work that has no end but cancelling."""

    type = "endless"

    async def run(self, job: Job) -> None:
        await job.wait_cancelled()

    async def clean(self) -> None:
        await turns(3)

    def progress(self) -> tuple[int, int]:
        return 0, 1

    def hurry(self) -> None: ...


def add(jobs: JobManager, name: str, **options: bool) -> Job:
    jobs.check_id(name)
    job = Job(JobOptions(name, **options), Endless(), jobs.news)
    jobs.add(job)
    return job


async def test_ids() -> None:
    async with asyncio.TaskGroup() as tasks:
        jobs = JobManager(tasks)
        job = add(jobs, "a-1._")
        assert jobs.find("a-1._") is job
        with pytest.raises(CommandError, match=r"Job ID 'a-1\._' already in use"):
            jobs.check_id("a-1._")
        for bad in ("", "1x", "a b", "#x", "\u00e9"):
            with pytest.raises(CommandError, match=f"Invalid job ID '{bad}'"):
                jobs.check_id(bad)
        await job.abandon()
        jobs.check_id("a-1._")
        with pytest.raises(NotFound, match="Job not found"):
            jobs.find("a-1._")


async def test_the_newest_is_listed_first() -> None:
    async with asyncio.TaskGroup() as tasks:
        jobs = JobManager(tasks)
        for name in "abc":
            jobs.start(add(jobs, name))
        assert [job.id for job in jobs] == ["c", "b", "a"]
        await jobs.close()


async def test_close_ends_every_job_and_lets_no_other_begin() -> None:
    async with asyncio.TaskGroup() as tasks:
        jobs = JobManager(tasks)
        jobs.start(add(jobs, "running"))
        jobs.start(add(jobs, "kept", auto_dismiss=False))
        paused = add(jobs, "paused")
        jobs.start(paused)
        paused.pause()
        await jobs.close()
        assert [job.id for job in jobs] == ["kept"]
        with pytest.raises(CommandError, match="about to end"):
            jobs.check_id("late")
