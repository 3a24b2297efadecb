"""Commands of backups into folders.

Such a backup is a job: see `query-jobs`, `job-cancel` and so on. What becomes of each disk, also
after the job has ended, `query-fleece-backups` tells.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.control.command import Command
from nbdfleece.fleece.backup import BackupOptions
from nbdfleece.fleece.backup_work import kind_of
from nbdfleece.jobs.job import JobOptions
from nbdfleece.protocol.qmp.schema import SIZE, Array, Boolean, Enum, String, Struct

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.fleece.backup import BackupRun
    from nbdfleece.fleece.backup_work import Part
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json

_ID_BYTES: Final = 4


async def _backup(context: Context, arguments: Arguments) -> Json:
    """Back up disks, all as they are now, into a folder or (one disk, raw) to a FIFO.

    `dir` is a path of the daemon's machine, absolute. The first backup of a disk in a folder is a
    full one, later ones are increments where that can be (`full`: never). The answer comes when the
    instant has been taken; then the job reads. `speed` is in bytes per second.
    """
    folder, stream = arguments.optional_string("dir"), arguments.optional_string("stream")
    options = BackupOptions(
        disks=tuple(arguments.strings("disks")),
        folder=None if folder is None else Path(folder),
        stream=None if stream is None else Path(stream),
        full=arguments.boolean("full", default=False),
        compress=arguments.boolean("compress", default=False),
        discard=arguments.boolean("discard", default=False),
    )
    job_options = JobOptions(
        id=arguments.optional_string("job-id") or f"backup-{secrets.token_hex(_ID_BYTES)}",
        speed=arguments.optional_integer("speed") or 0,
    )
    return _described(await context.backups.start(options, job_options))


async def _query_backups(context: Context, _arguments: Arguments) -> Json:
    """List the backups that run, and the last ones that have ended, the newest last."""
    return [_described(run) for run in context.backups.runs]


def _described(run: BackupRun) -> Json:
    done, total = run.job.work.progress()
    return {
        "job-id": run.job.id,
        "instant": run.instant,
        "state": run.state,
        "done": done,
        "total": total,
        "disks": [_part(part) for part in run.parts],
    }


def _part(part: Part) -> Json:
    answer: dict[str, Json] = {
        "disk": part.disk,
        "kind": kind_of(part),
        "size": part.size,
        "done": part.done,
        "total": part.total,
        "finished": part.is_finished,
    }
    if part.folder is not None and part.point is not None:
        answer |= {"file": str(part.folder.file(part.point)), "reason": part.point.reason}
        if part.is_finished:
            answer |= {"file-bytes": part.point.file_bytes, "data-bytes": part.data_bytes}
    if part.error is not None:
        answer |= {"error": part.error, "broken": part.is_broken}
    return answer


_PART: Final = Struct(
    {
        "disk": String(),
        "kind": Enum(("full", "inc", "stream")),
        "size": SIZE,
        "done": SIZE,
        "total": SIZE,
        "finished": Boolean(),
    },
    {
        "file": String(),
        "reason": String(),
        "file-bytes": SIZE,
        "data-bytes": SIZE,
        "error": String(),
        "broken": Boolean(),
    },
)
_RUN: Final = Struct(
    {
        "job-id": String(),
        "instant": String(),
        "state": Enum(("running", "done", "failed", "cancelled")),
        "done": SIZE,
        "total": SIZE,
        "disks": Array(_PART),
    }
)

COMMANDS: Final = (
    Command(
        "fleece-backup",
        Struct(
            {"disks": Array(String())},
            {
                "dir": String(),
                "stream": String(),
                "full": Boolean(),
                "compress": Boolean(),
                "discard": Boolean(),
                "speed": SIZE,
                "job-id": String(),
            },
        ),
        _backup,
        returns=_RUN,
    ),
    Command("query-fleece-backups", Struct(), _query_backups, returns=Array(_RUN)),
)
