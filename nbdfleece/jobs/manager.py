"""All jobs by their ids, and the tasks that they run in.

Invariants
  M1  A job is in the table from created until null.
  M2  The manager owns the task of every job; a job never lets an exception out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse, NotFound
from nbdfleece.base.notify import Notifier
from nbdfleece.jobs.job import LEGAL, Job, JobNews, Status, StatusChanged, Verb

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from nbdfleece.block.node import Node

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class JobManager:
    """The jobs.

    Args:
        tasks: Where they run.

    Attributes:
        news: What jobs tell of themselves.
    """

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.news: Notifier[JobNews] = Notifier()
        self._tasks = tasks
        self._jobs: dict[str, Job] = {}
        self._is_closing = False
        self.news.subscribe(self._heard)

    def __iter__(self) -> Iterator[Job]:
        """Go through the jobs, the newest first, as QEMU lists them."""
        return reversed(list(self._jobs.values()))

    def find(self, name: str) -> Job:
        """Return the job `name`.

        Raises:
            NotFound: There is none.
        """
        job = self._jobs.get(name)
        if job is None:
            raise NotFound("Job not found")
        return job

    def check_id(self, name: str) -> None:
        """Check that a new job may be called `name`.

        Raises:
            CommandError: It is not well-formed, or taken; or the program ends.
        """
        if _ID.fullmatch(name) is None:
            raise CommandError(f"Invalid job ID '{name}'")
        if name in self._jobs:
            raise CommandError(f"Job ID '{name}' already in use")
        if self._is_closing:
            raise CommandError("The program is about to end")

    def check_not_busy(self, node: Node) -> None:
        """Check that no job works on `node` (QEMU's op blockers; the source of a job is free).

        Raises:
            InUse: One does.
        """
        for job in self._jobs.values():
            if any(edge.node is node for edge in job.edges):
                raise InUse(
                    f"Node '{node.name}' is busy: "
                    f"block device is in use by block job: {job.work.type}"
                )

    def add(self, job: Job) -> None:
        """Take in a new job; its id has been checked."""
        assert job.id not in self._jobs, "a job's id is checked before"
        self._jobs[job.id] = job
        job.created()

    def start(self, job: Job) -> None:
        """Start a job that was added."""
        job.started()
        self._tasks.create_task(job.run(), name=f"job {job.id}")

    async def close(self) -> None:
        """Cancel all jobs, return when they have concluded; further ones are refused.

        Cancel: safe.
        """
        self._is_closing = True
        for job in list(self):
            if job.status in LEGAL[Verb.CANCEL]:
                job.cancel()
        for job in list(self):
            await job.wait_concluded()

    def _heard(self, news: JobNews) -> None:
        if isinstance(news, StatusChanged) and news.status is Status.NULL:
            del self._jobs[news.id]
