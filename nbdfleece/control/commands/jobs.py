"""Commands about jobs: blockdev-backup, and what may be asked of a job while it runs.

`job-*` and `block-job-*` are two spellings of the same verbs, with errors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.control.command import Command
from nbdfleece.control.transaction import Action, ActionKind
from nbdfleece.jobs.backup import BackupOptions, BitmapMode, Sync, check_backup, prepare_backup
from nbdfleece.jobs.job import (
    Job,
    JobOptions,
    OnError,
    Status,
)
from nbdfleece.protocol.qmp.schema import Array, Boolean, Enum, Integer, String, Struct

if TYPE_CHECKING:
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.control.transaction import Transaction
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json


class JobNotActive(NotFound):
    """There is no such block job."""

    qmp_class = "DeviceNotActive"


# --- backup ------------------------------------------------------------------------------------


class _Backup(Action):
    """Copy a node as it is now to another one, in the background."""

    _job: Job

    def __init__(self, transaction: Transaction, arguments: Arguments) -> None:
        super().__init__(transaction, arguments)
        self._options, self._job_options = _backup_options(arguments)

    def nodes(self) -> list[Node]:
        """See Action.nodes."""
        found = map(self.context.graph.get, (self._options.device, self._options.target))
        return [node for node in found if node is not None]

    async def prepare(self) -> None:
        """See Action.prepare."""
        graph, jobs, group = self.context.graph, self.context.jobs, self.transaction.group
        check_backup(graph, jobs, self._options)  # before anybody is stopped
        await self.transaction.quieten(self)
        self._job = await prepare_backup(graph, jobs, self._options, self._job_options, group)

    def commit(self) -> None:
        """See Action.commit."""
        self.context.jobs.start(self._job)

    async def abort(self) -> None:
        """See Action.abort."""
        await self._job.abandon()


def _backup_options(arguments: Arguments) -> tuple[BackupOptions, JobOptions]:
    perf = arguments.members.get("x-perf", {})
    assert isinstance(perf, Mapping), "checked by the schema"
    workers, chunk = perf.get("max-workers", 64), perf.get("max-chunk", 0)
    assert isinstance(workers, int), "checked by the schema"
    assert isinstance(chunk, int), "checked by the schema"
    mode = arguments.optional_string("bitmap-mode")
    options = BackupOptions(
        device=arguments.string("device"),
        target=arguments.string("target"),
        sync=Sync(arguments.string("sync")),
        bitmap=arguments.optional_string("bitmap"),
        bitmap_mode=None if mode is None else BitmapMode(mode),
        compress=arguments.boolean("compress", default=False),
        on_source_error=OnError(arguments.optional_string("on-source-error") or "report"),
        on_target_error=OnError(arguments.optional_string("on-target-error") or "report"),
        filter_node_name=arguments.optional_string("filter-node-name"),
        on_cbw_error=arguments.optional_string("on-cbw-error") or "break-guest-write",
        max_workers=workers,
        max_chunk=chunk,
        discard_source=arguments.boolean("discard-source", default=False),
    )
    job_options = JobOptions(
        id=arguments.optional_string("job-id") or "",
        speed=arguments.optional_integer("speed") or 0,
        auto_finalize=arguments.boolean("auto-finalize", default=True),
        auto_dismiss=arguments.boolean("auto-dismiss", default=True),
    )
    return options, job_options


# --- queries -----------------------------------------------------------------------------------


async def _query_block_jobs(context: Context, _arguments: Arguments) -> Json:
    """List the jobs on block nodes, the newest first."""
    return [_block_job(job) for job in context.jobs if job.options.on_blocks]


def _block_job(job: Job) -> Json:
    done, total = job.work.progress()
    found: dict[str, Json] = {
        "type": job.work.type,
        "device": job.id,
        "len": total,
        "offset": done,
        # As in QEMU, where a backup copies aside of the job's own routine, which is never busy.
        "busy": False,
        "paused": job.is_paused,
        "speed": job.speed,
        "io-status": job.io_status,
        "ready": job.status in (Status.READY, Status.STANDBY),
        "status": job.status.value,
        "auto-finalize": job.options.auto_finalize,
        "auto-dismiss": job.options.auto_dismiss,
    }
    if job.status is Status.CONCLUDED and job.error_text is not None:
        found["error"] = job.error_text
    return found


async def _query_jobs(context: Context, _arguments: Arguments) -> Json:
    """List all jobs, the newest first."""
    return [_job(job) for job in context.jobs]


def _job(job: Job) -> Json:
    done, total = job.work.progress()
    found: dict[str, Json] = {
        "id": job.id,
        "type": job.work.type,
        "status": job.status.value,
        "current-progress": done,
        "total-progress": total,
    }
    if job.status is Status.CONCLUDED and job.error_text is not None:
        found["error"] = job.error_text
    return found


# --- verbs -------------------------------------------------------------------------------------


def _named(context: Context, arguments: Arguments) -> Job:
    return context.jobs.find(arguments.string("id"))


def _block_named(context: Context, arguments: Arguments) -> Job:
    """Return the job of a `block-job-*` command, where the id may be called `device`.

    Raises:
        JobNotActive: There is none.
    """
    name = arguments.string("id" if "id" in arguments else "device")
    for job in context.jobs:
        if job.id == name and job.options.on_blocks:
            return job
    raise JobNotActive(f"Block job '{name}' not found")


async def _cancel(context: Context, arguments: Arguments) -> Json:
    """Give a job up; it ends at its next pause point."""
    _named(context, arguments).cancel()
    return {}


async def _block_cancel(context: Context, arguments: Arguments) -> Json:
    """As job-cancel; a job that the user paused needs `force`."""
    job = _block_named(context, arguments)
    if job.user_paused and not arguments.boolean("force", default=False):
        raise CommandError(f"The block job for device '{job.id}' is currently paused")
    job.cancel()
    return {}


async def _pause(context: Context, arguments: Arguments) -> Json:
    """Make a job pause at its next pause point."""
    _named(context, arguments).pause()
    return {}


async def _block_pause(context: Context, arguments: Arguments) -> Json:
    """As job-pause."""
    _block_named(context, arguments).pause()
    return {}


async def _resume(context: Context, arguments: Arguments) -> Json:
    """Let a job go on that was paused by the user or by an error."""
    _named(context, arguments).resume()
    return {}


async def _block_resume(context: Context, arguments: Arguments) -> Json:
    """As job-resume."""
    _block_named(context, arguments).resume()
    return {}


async def _set_speed(context: Context, arguments: Arguments) -> Json:
    """Limit what a job copies to so many bytes per second; 0: no limit."""
    _block_named(context, arguments).set_speed(arguments.integer("speed"))
    return {}


async def _complete(context: Context, arguments: Arguments) -> Json:
    """Let a job that is ready end; no job of ours is ever that."""
    _named(context, arguments).complete()
    return {}


async def _block_complete(context: Context, arguments: Arguments) -> Json:
    """As job-complete."""
    _block_named(context, arguments).complete()
    return {}


async def _finalize(context: Context, arguments: Arguments) -> Json:
    """Let a pending job conclude."""
    await _named(context, arguments).finalize()
    return {}


async def _block_finalize(context: Context, arguments: Arguments) -> Json:
    """As job-finalize."""
    await _block_named(context, arguments).finalize()
    return {}


async def _dismiss(context: Context, arguments: Arguments) -> Json:
    """Forget a concluded job."""
    _named(context, arguments).dismiss()
    return {}


async def _block_dismiss(context: Context, arguments: Arguments) -> Json:
    """As job-dismiss."""
    _block_named(context, arguments).dismiss()
    return {}


_NOTHING: Final = Struct()
_ON_ERROR: Final = Enum(tuple(member.value for member in OnError))
_STATUS: Final = Enum(tuple(member.value for member in Status))
_ID: Final = Struct({"id": String()})
_DEVICE: Final = Struct({"device": String()})
_BACKUP: Final = Struct(
    {
        "device": String(),
        "sync": Enum(tuple(member.value for member in Sync)),
        "target": String(),
    },
    {
        "job-id": String(),
        "speed": Integer(),
        "bitmap": String(),
        "bitmap-mode": Enum(tuple(member.value for member in BitmapMode)),
        "compress": Boolean(),
        "on-source-error": _ON_ERROR,
        "on-target-error": _ON_ERROR,
        "auto-finalize": Boolean(),
        "auto-dismiss": Boolean(),
        "filter-node-name": String(),
        "discard-source": Boolean(),
        "on-cbw-error": Enum(("break-guest-write", "break-snapshot")),
        "x-perf": Struct(
            optional={
                "use-copy-range": Boolean(),
                "max-workers": Integer(),
                "max-chunk": Integer(),
            }
        ),
    },
)
_BLOCK_JOBS: Final = Array(
    Struct(
        {
            "type": String(),
            "device": String(),
            "len": Integer(),
            "offset": Integer(),
            "busy": Boolean(),
            "paused": Boolean(),
            "speed": Integer(),
            "io-status": Enum(("ok", "failed", "nospace")),
            "ready": Boolean(),
            "status": _STATUS,
            "auto-finalize": Boolean(),
            "auto-dismiss": Boolean(),
        },
        {"error": String()},
    )
)
_JOBS: Final = Array(
    Struct(
        {
            "id": String(),
            "type": String(),
            "status": _STATUS,
            "current-progress": Integer(),
            "total-progress": Integer(),
        },
        {"error": String()},
    )
)

BACKUP: Final = ActionKind("blockdev-backup", _BACKUP, _Backup, can_be_grouped=True)

COMMANDS: Final = (
    BACKUP.command(returns=_NOTHING),
    Command("query-block-jobs", _NOTHING, _query_block_jobs, returns=_BLOCK_JOBS),
    Command("query-jobs", _NOTHING, _query_jobs, returns=_JOBS),
    Command(
        "block-job-cancel",
        Struct({"device": String()}, {"force": Boolean()}),
        _block_cancel,
        returns=_NOTHING,
    ),
    Command("block-job-pause", _DEVICE, _block_pause, returns=_NOTHING),
    Command("block-job-resume", _DEVICE, _block_resume, returns=_NOTHING),
    Command(
        "block-job-set-speed",
        Struct({"device": String(), "speed": Integer()}),
        _set_speed,
        returns=_NOTHING,
    ),
    Command("block-job-complete", _DEVICE, _block_complete, returns=_NOTHING),
    Command("block-job-finalize", _ID, _block_finalize, returns=_NOTHING),
    Command("block-job-dismiss", _ID, _block_dismiss, returns=_NOTHING),
    Command("job-cancel", _ID, _cancel, returns=_NOTHING),
    Command("job-pause", _ID, _pause, returns=_NOTHING),
    Command("job-resume", _ID, _resume, returns=_NOTHING),
    Command("job-complete", _ID, _complete, returns=_NOTHING),
    Command("job-finalize", _ID, _finalize, returns=_NOTHING),
    Command("job-dismiss", _ID, _dismiss, returns=_NOTHING),
)
