"""The job "create": a new image, made in one piece (blockdev-create).

It stays when it has concluded until the user dismisses it, as its error is told by the list of jobs
and by no event.

Follows: QEMU block/create.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.block.create import create, find_creator
from nbdfleece.jobs.job import Job, JobOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdfleece.block.graph import Graph
    from nbdfleece.jobs.manager import JobManager


class CreateWork:
    """See jobs.job.Work.

    Args:
        graph: The nodes.
        driver: The format.
        options: Those of the format.
    """

    type = "create"

    def __init__(self, graph: Graph, driver: str, options: Mapping[str, object]) -> None:
        self._graph = graph
        self._driver = driver
        self._options = options
        self._done = 0

    async def run(self, job: Job) -> None:
        """Make the image; see Work.run."""
        if not await job.begin(1):
            return
        try:
            await create(self._graph, self._driver, self._options)
        finally:
            self._done = 1
            job.end()

    async def clean(self) -> None:
        """Leave the image as it is."""

    def progress(self) -> tuple[int, int]:
        """Return (done, total) of the one piece."""
        return self._done, 1

    def hurry(self) -> None:
        """Let it be made to its end."""


def start_create(
    graph: Graph, jobs: JobManager, job_id: str, driver: str, options: Mapping[str, object]
) -> None:
    """Begin to make an image.

    Raises:
        CommandError: The id is bad, or nothing makes such images. There is no job.
    """
    find_creator(driver)
    jobs.check_id(job_id)
    work = CreateWork(graph, driver, options)
    job = Job(JobOptions(job_id, auto_dismiss=False, on_blocks=False), work, jobs.news)
    jobs.add(job)
    jobs.start(job)
