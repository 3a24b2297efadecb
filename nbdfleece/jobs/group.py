"""Jobs that succeed together or not at all; a job on its own is a group of one.

A member whose work is done waits for the others. When all are there, all are pending; when none of
them waits for its user any more, or the user has finalized one, all conclude. When one fails or is
cancelled before that, the others are cancelled.

Invariants
  R1  Once it is decided that the group succeeds, no member can be cancelled any more.
  R2  Members conclude one after another, the newest first.

Follows: QEMU job.c (job transactions; order of events).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdfleece.jobs.job import Job


class JobGroup:
    """Jobs that end together.

    Attributes:
        has_succeeded: See R1.
    """

    def __init__(self) -> None:
        self.has_succeeded = False
        self._members: list[Job] = []  # that have not concluded, the newest first

    def join(self, job: Job) -> None:
        """Take in a new job, which nobody has started."""
        self._members.insert(0, job)

    def leave(self, job: Job) -> None:
        """Let a job go that has concluded."""
        self._members.remove(job)
        self._wake()

    async def settle(self, job: Job) -> None:
        """Return when `job`, whose work is over, may conclude; it has failed, or the group has not.

        Cancel: not cancelled.
        """
        if not job.has_failed:
            job.wait_for_others()
            if all(member.is_waiting for member in self._members):  # none of them cancelled
                for member in self._members:
                    member.wait_for_user()
                if all(member.options.auto_finalize for member in self._members):
                    self.finalize()
        while not (job.has_failed or self.has_succeeded):
            await job.changed()
        if job.has_failed:
            for member in self._members:
                member.cancel_with_group()
        while self._members[0] is not job:
            await job.changed()

    def finalize(self) -> None:
        """Let all members, which are pending, conclude; unless one has just been cancelled."""
        self.has_succeeded = not any(member.has_failed for member in self._members)
        self._wake()

    def _wake(self) -> None:
        for member in self._members:
            member.wake()
