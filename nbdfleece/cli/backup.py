"""`nbdfleece backup ...` and `nbdfleece restore`.

Making a backup is the daemon's work; what is done to the files of one needs no daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.backup.hooks import HOOK_TIMEOUT_S, HookFailed, Hooks, TooLate
from nbdfleece.backup.retention import RULES, Retention
from nbdfleece.cli import output
from nbdfleece.cli.arguments import UsageError
from nbdfleece.cli.client import Client, CommandFailed, NoDaemon, Row
from nbdfleece.cli.exits import BROKEN, DONE, FAILED, PARTLY, complain
from nbdfleece.cli.paths import control_socket
from nbdfleece.cli.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from nbdfleece.backup.manifest import Point
    from nbdfleece.protocol.qmp.values import Json

_POLL_S: Final = 0.2
_PIECE: Final = 1 << 20  # bytes read at once from the daemon's stream
_WHAT: Final = "backup create"
_JOB_PREFIX: Final = "backup-"  # named here: what is not answered yet can be given up by its name
_JOB_ID_BYTES: Final = 4


# --- create --------------------------------------------------------------------------------------


def create(args: argparse.Namespace) -> int:
    """Back up disks into a folder, or one to stdout."""
    retention = _retention(args)
    if args.stdout and (args.to or retention.counts):
        raise UsageError("nbdfleece backup create", "--stdout goes with neither --to nor --keep-*")
    if args.stdout and len(args.disks) > 1:
        raise UsageError("nbdfleece backup create", "only one disk can go to --stdout")
    if not (args.stdout or args.to):
        raise UsageError("nbdfleece backup create", "say where to: --to DIR, or --stdout")
    if args.stdout and sys.stdout.isatty():
        raise UsageError("nbdfleece backup create", "--stdout is a terminal; send it to a program")
    job_id = f"{_JOB_PREFIX}{secrets.token_hex(_JOB_ID_BYTES)}"
    arguments: dict[str, Json] = {"disks": args.disks, "job-id": job_id}
    for name in ("full", "compress", "discard"):
        if getattr(args, name):
            arguments[name] = True
    if args.rate is not None:
        arguments["speed"] = args.rate
    with _terminated_like_interrupted(), Client(control_socket(args.control)) as client:
        if args.stdout:
            return _to_stdout(args, client, arguments, job_id)
        arguments["dir"] = os.path.abspath(args.to)
        with _given_up_if_interrupted(client, job_id):
            run, late = begin(args, client, arguments)
            run = _follow(args, client, run)
    code = _report(args, run) or (FAILED if late else DONE)
    if code == DONE and retention.counts:
        return _prune(args, [Path(args.to) / disk for disk in args.disks], retention)
    return code


def begin(args: argparse.Namespace, client: Client, arguments: dict[str, Json]) -> tuple[Row, bool]:
    """Take the instant between the hooks; return the backup, and whether the thaw failed.

    Raises:
        HookFailed: There is no backup, as what was frozen was not so at the instant.
    """
    with hooks_of(args) as hooks:
        run = Row(client.execute("fleece-backup", arguments))
        try:
            hooks.thaw()
        except TooLate:
            _cancel(client, run.text("job-id"))
            raise
        except HookFailed as error:
            complain(_WHAT, f"{error}; the backup goes on")
            return run, True
    return run, False


def hooks_of(args: argparse.Namespace) -> Hooks:
    """Return the hooks of a command, not begun."""
    timeout_s = HOOK_TIMEOUT_S if args.hook_timeout is None else args.hook_timeout
    return Hooks(args.pre or "", args.post or "", timeout_s, args.disks)


def _follow(args: argparse.Namespace, client: Client, run: Row) -> Row:
    """Show the progress of a backup until it has ended, and return what it is then."""
    progress = _progress(args, ", ".join(args.disks))
    try:
        while run.text("state") == "running":
            progress(run.number("done"), run.number("total"))
            time.sleep(_POLL_S)
            run = _look(client, run)
    finally:
        progress.end()
    return run


def _look(client: Client, run: Row) -> Row:
    found = _find(client, run.text("job-id"))
    if found is None:
        raise NoDaemon("the daemon knows nothing of the backup: it has been restarted")
    return found


def _find(client: Client, job_id: str) -> Row | None:
    for found in client.query("query-fleece-backups"):
        if found.text("job-id") == job_id:
            return found
    return None


@contextlib.contextmanager
def _given_up_if_interrupted(client: Client, job_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        complain(_WHAT, "interrupted; it is given up")
        _cancel(client, job_id)
        raise


def _cancel(client: Client, job_id: str) -> None:
    """Give a backup up, which may be still to begin, and wait for that.

    On a connection of its own: `client`, which is of no use afterwards, may have been interrupted
    between a command and its answer.
    """
    client.run_out()
    with client.another() as fresh:
        with contextlib.suppress(CommandFailed):  # it may have ended, or never begun
            fresh.execute("job-cancel", {"id": job_id})
        while (run := _find(fresh, job_id)) is not None and run.text("state") == "running":
            time.sleep(_POLL_S)


def _report(args: argparse.Namespace, run: Row) -> int:
    """Print what became of each disk; return the exit code."""
    parts = run.rows("disks")
    failed = [part for part in parts if part.value.get("finished") is not True]
    for part in failed:
        why = part.text("error") or "it was given up"
        complain(_WHAT, f"disk {part.text('disk')}: {output.shown(why)}")
    if args.json:
        output.print_json(run.value)
    else:
        for part in parts:
            if part not in failed:
                reason = part.text("reason")
                print(
                    f"{part.text('disk')} {part.text('kind')} {part.text('file')} "
                    f"{output.size(part.number('file-bytes'))}"
                    + (f" (full: {output.shown(reason)})" if reason else "")
                )
    if not failed:
        return DONE
    if len(failed) < len(parts):
        return PARTLY
    return BROKEN if all(part.value.get("broken") is True for part in failed) else FAILED


def _to_stdout(
    args: argparse.Namespace, client: Client, arguments: dict[str, Json], job_id: str
) -> int:
    """Let the daemon write to a FIFO of ours, and hand that on."""
    with _fifo(args) as (path, fd), _given_up_if_interrupted(client, job_id):
        arguments["stream"] = str(path)
        run, late = begin(args, client, arguments)
        progress = _progress(args, args.disks[0])
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        try:
            while True:
                if not poll.poll(1000 * _POLL_S * 5):
                    run = _look(client, run)
                    progress(run.number("done"), run.number("total"))
                    if run.text("state") != "running":
                        break
                    continue
                data = os.read(fd, _PIECE)
                if not data:
                    break
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError:  # whoever reads has gone
            _cancel(client, run.text("job-id"))
            raise
        finally:
            progress.end()
        while (run := _look(client, run)).text("state") == "running":
            time.sleep(_POLL_S)
    if run.text("state") == "done":
        return FAILED if late else DONE
    for part in run.rows("disks"):
        why = output.shown(part.text("error") or "it was given up")
        complain(_WHAT, f"disk {part.text('disk')}: {why}; what went to stdout is not whole")
    broken = all(part.value.get("broken") is True for part in run.rows("disks"))
    return BROKEN if broken else FAILED


@contextlib.contextmanager
def _fifo(args: argparse.Namespace) -> Iterator[tuple[Path, int]]:
    """Make a FIFO that the daemon can write to, and open it for reading."""
    socket = Path(control_socket(args.control)).absolute()
    parent = socket.parent if os.access(socket.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="stdout-", dir=parent) as folder:
        path = Path(folder) / "fifo"
        os.mkfifo(path, 0o600)
        if os.geteuid() == 0:
            owner = socket.stat()
            for name in (folder, path):
                os.chown(name, owner.st_uid, owner.st_gid)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield path, fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: a service that is stopped gives its backup up."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(args: argparse.Namespace, what: str) -> Progress:
    return Progress(what, as_json=bool(args.json), quiet=bool(args.quiet))


# --- what needs no daemon ------------------------------------------------------------------------


def list_all(args: argparse.Namespace) -> int:
    """List the points of a folder."""
    from nbdfleece.backup.listing import list_points

    found = list_points(Path(args.folder))
    if args.json:
        output.print_json(
            [{**_point(one.disk, one.point), "restorable": one.is_whole} for one in found]
        )
        return DONE
    if found:
        output.print_table(
            ("DISK", "POINT", "AGE", "KIND", "SIZE", "FILE", "STATE"),
            [
                (
                    one.disk,
                    one.point.name,
                    output.age(one.point.instant),
                    one.point.kind.value,
                    output.size(one.point.size),
                    output.size(one.point.file_bytes),
                    ("ok", output.GREEN) if one.is_whole else ("a file is missing", output.RED),
                )
                for one in found
            ],
        )
    return DONE


def _point(disk: str, point: Point) -> dict[str, Json]:
    return {
        "disk": disk,
        "point": point.name,
        "instant": point.instant,
        "kind": point.kind.value,
        "file": point.file,
        "parent": point.parent,
        "size": point.size,
        "file-bytes": point.file_bytes,
        "sha256": point.sha256,
        "reason": point.reason,
    }


def verify(args: argparse.Namespace) -> int:
    """Look whether every point of a folder can be restored."""
    from nbdfleece.backup.folder import DiskFolder
    from nbdfleece.backup.listing import folders
    from nbdfleece.backup.verify import Verdict
    from nbdfleece.backup.verify import verify as verify_folder

    verdicts: list[Verdict] = []
    for path in folders(Path(args.folder)):
        with DiskFolder(path, for_change=False) as folder:
            total = sum(point.file_bytes for point in folder.manifest.points) if args.data else 0
            progress = _Sum(_progress(args, f"verifying {path.name}"), total)
            verdicts += verify_folder(folder, data=bool(args.data), tell=progress)
            progress.end()
            for name in folder.strangers():
                complain("backup verify", f"'{path / name}' is in no manifest, and is left alone")
    if args.json:
        output.print_json([{**_point(one.disk, one.point), "fault": one.fault} for one in verdicts])
    else:
        for one in verdicts:
            state = "ok" if one.fault is None else one.fault
            print(f"{one.disk} {one.point.name} {output.shown(state)}")
    bad = sum(one.fault is not None for one in verdicts)
    if bad:
        complain("backup verify", f"{bad} of {len(verdicts)} points cannot be restored")
    return FAILED if bad else DONE


class _Sum:
    """Progress by what is added."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, more: int) -> None:
        self._done += more
        self._progress(self._done, max(self._total, self._done))

    def end(self) -> None:
        self._progress.end()


def prune(args: argparse.Namespace) -> int:
    """Give up old points."""
    from nbdfleece.backup.listing import folders

    retention = _retention(args)
    retention.check()
    return _prune(args, folders(Path(args.folder)), retention)


def _prune(args: argparse.Namespace, paths: list[Path], retention: Retention) -> int:
    from nbdfleece.backup import prune as pruning
    from nbdfleece.backup.folder import DiskFolder

    dry = bool(getattr(args, "dry_run", False))
    done: list[dict[str, Json]] = []
    for path in paths:
        with DiskFolder(path, for_change=not dry) as folder:
            if dry:
                found = pruning.plan(folder, retention)
            else:
                found = pruning.prune(folder, retention, tell=_teller(args, path.name))
        done.append({"disk": found.disk, "kept": found.kept, "removed": found.removed})
        if not args.json:
            verb = "would remove" if dry else "removed"
            for name in found.removed:
                print(f"{found.disk} {name} {verb}")
    if args.json and args.command == "backup prune":
        output.print_json(done)
    return DONE


def _teller(args: argparse.Namespace, disk: str) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if not (args.quiet or args.json):
            sys.stderr.write(f"{disk}: {text}\n")

    return tell


def _retention(args: argparse.Namespace) -> Retention:
    counts = {rule: getattr(args, f"keep_{rule}") for rule in RULES}
    return Retention({rule: count for rule, count in counts.items() if count is not None})


def restore(args: argparse.Namespace) -> int:
    """Put a point back."""
    from nbdfleece.backup import restore as restoring

    source = restoring.parse_source(args.source)
    progress = _progress(args, "restoring")
    try:
        point = asyncio.run(
            restoring.restore(
                source,
                args.destination,
                force=bool(args.force),
                check=bool(args.verify),
                tell=progress,
            )
        )
    finally:
        progress.end()
    if args.json:
        output.print_json(_point(source.folder.name, point))
    elif not args.quiet:
        print(f"{source.folder.name}@{point.name} {output.size(point.size)}")
    return DONE
