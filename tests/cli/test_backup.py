"""Backups from the command line, on a real daemon; and the mistakes of a newcomer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.cli.backup import _cancel
from nbdfleece.cli.client import Client
from tests.support.daemon_process import Daemon, environment, make_disk, nbdfleece
from tests.support.live import client

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    disks = [make_disk(short_tmp / f"{name}.raw", SIZE) for name in ("vda", "vdb")]
    with Daemon(short_tmp, *disks) as running:
        running.ready(2)
        yield running
        assert "Traceback" not in running.errors()


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon of which nothing is asked that changes it."""
    folder = Path(tempfile.mkdtemp(prefix="nbdf-"))
    disks = [make_disk(folder / f"{name}.raw", SIZE) for name in ("vda", "vdb")]
    with Daemon(folder, *disks) as running:
        running.ready(2)
        yield running
        assert "Traceback" not in running.errors()
    shutil.rmtree(folder)


@pytest.fixture
def to(short_tmp: Path) -> Path:
    return short_tmp / "backup"


async def write(daemon: Daemon, disk: str, offset: int, data: bytes) -> None:
    async with client(daemon, disk) as guest:
        await guest.write(offset, data)


def started(daemon: Daemon, *args: str | Path, **options) -> subprocess.Popen[str]:
    """A command in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "nbdfleece", *map(str, args)],
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def disk(daemon: Daemon, name: str) -> bytes:
    return (daemon.folder / f"{name}.raw").read_bytes()


def restored(to: Path, what: str) -> bytes:
    path = to.parent / "restored.raw"
    done = nbdfleece("restore", f"{to}/{what}", path, "--force", "--verify")
    assert done.code == 0, done.err
    return path.read_bytes()


def files(to: Path, name: str) -> list[str]:
    return sorted(path.name for path in (to / name).glob("*.qcow2*"))


# --- create --------------------------------------------------------------------------------------


async def test_the_first_backup_is_full_and_the_next_ones_are_increments(
    daemon: Daemon, to: Path
) -> None:
    first = daemon.run("backup", "create", "vda", "vdb", "--to", to)
    assert first.code == 0, first.err
    assert re.fullmatch(
        r"vda full (\S+/vda/\d{8}T\d{6}Z\.full\.qcow2) \S+ MiB \(full: it is the first backup\)\n"
        r"vdb full .*\n",
        first.out,
    )
    states = [disk(daemon, "vda")]
    for number in range(2):
        await write(daemon, "vda", number * MIB + 5, b"new" * 1000)
        states.append(disk(daemon, "vda"))
        done = daemon.run("backup", "create", "vda", "vdb", "--to", to, "--json")
        assert done.code == 0, done.err
        parts = done.json["disks"]
        assert [part["kind"] for part in parts] == ["inc", "inc"]
        assert [part["data-bytes"] for part in parts] == [65536, 0]

    points = nbdfleece("backup", "list", to / "vda", "--json").json
    assert [point["kind"] for point in points] == ["full", "inc", "inc"]
    for point, state in zip(points, states, strict=True):
        assert restored(to, f"vda@{point['point']}") == state
    assert restored(to, "vdb") == disk(daemon, "vdb")
    assert nbdfleece("backup", "verify", to, "--data").code == 0
    assert daemon.run("snapshot", "list").out == ""


@pytest.mark.parametrize("restart", [False, True], ids=["at once", "after a restart"])
def test_a_bitmap_of_backups_can_be_removed_and_not_be_changed(
    short_tmp: Path, to: Path, restart: bool
) -> None:
    """Cleared, it would make the next increment too small; removed, the next one is full."""
    image = make_disk(short_tmp / "vda.raw", MIB)
    with Daemon(short_tmp, image) as before:
        before.ready()
        assert before.run("backup", "create", "vda", "--to", to).code == 0
        if restart:
            assert before.stop() == 0
        with Daemon(short_tmp, image) if restart else contextlib.nullcontext(before) as daemon:
            if restart:
                daemon.ready()
            try_to_change_the_bitmap(daemon, to)


def try_to_change_the_bitmap(daemon: Daemon, to: Path) -> None:
    (bitmap,) = daemon.run("bitmap", "list", "--json").json
    name = bitmap["bitmap"]
    text = f"Bitmap '{name}' belongs to a backup: it can only be removed"
    done = daemon.run("bitmap", "clear", "vda", name)
    assert (done.code, text in done.err) == (4, True)
    for verb in ("enable", "disable"):
        arguments = json.dumps({"node": "vda", "name": name})
        done = daemon.run("qmp", f"block-dirty-bitmap-{verb}", arguments)
        assert (done.code, text in done.err) == (1, True), done.err
    done = daemon.run("snapshot", "create", "vda", "--bitmap", name)
    assert (done.code, text in done.err) == (4, True), done.err
    assert daemon.run("bitmap", "remove", "vda", name).code == 0
    done = daemon.run("backup", "create", "vda", "--to", to)
    assert "full: the disk has no bitmap" in done.out


def test_a_relative_folder_is_that_of_the_command(daemon: Daemon, to: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbdfleece", "backup", "create", "vda", "--to", to.name],
        cwd=to.parent,
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(files(to, "vda")) == 1


def test_full_and_compressed_files_are_made_on_request(daemon: Daemon, to: Path) -> None:
    assert daemon.run("backup", "create", "vda", "--to", to).code == 0
    done = daemon.run("backup", "create", "vda", "--to", to, "--full", "--compress", "--json")

    part = done.json["disks"][0]
    assert part["kind"] == "full"
    assert part["reason"] == "it was asked for"
    assert part["file-bytes"] < SIZE // 4
    assert restored(to, "vda") == disk(daemon, "vda")


def test_points_that_are_too_old_go(daemon: Daemon, to: Path) -> None:
    for _ in range(3):
        done = daemon.run("backup", "create", "vda", "--to", to, "--keep-last", "2")
        assert done.code == 0, done.err
    assert "removed" in done.out

    assert [name.split(".")[1] for name in files(to, "vda")] == ["full", "inc"]
    assert restored(to, "vda") == disk(daemon, "vda")


def test_a_disk_that_grew_is_backed_up_whole(short_tmp: Path, to: Path) -> None:
    make_disk(short_tmp / "vda.raw", SIZE)
    for size in (SIZE, 2 * SIZE):
        os.truncate(short_tmp / "vda.raw", size)
        with Daemon(short_tmp, short_tmp / "vda.raw") as daemon:
            daemon.ready()
            done = daemon.run("backup", "create", "vda", "--to", to)
            assert done.code == 0, done.err
            assert daemon.stop() == 0
    assert "resized from 4 MiB to 8 MiB" in done.out
    assert restored(to, "vda") == disk(daemon, "vda")


def test_temporary_space_is_given_back_on_request(daemon: Daemon, to: Path) -> None:
    done = daemon.run("backup", "create", "vda", "--to", to, "--discard")

    assert done.code == 0, done.err
    assert restored(to, "vda") == disk(daemon, "vda")


def test_a_rate_is_kept_and_progress_is_told(daemon: Daemon, to: Path) -> None:
    begin = time.monotonic()
    done = daemon.run("backup", "create", "vda", "--to", to, "--rate", "2M", "--json")

    assert done.code == 0, done.err
    assert time.monotonic() - begin > 1.4  # the first piece may go at once
    told = [json.loads(line) for line in done.err.splitlines()]
    assert told
    assert all(line["type"] == "progress" for line in told)
    assert all(line["total"] == SIZE for line in told)


def test_one_disk_goes_to_stdout(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbdfleece", "backup", "create", "vda", "--stdout"],
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        check=False,
        capture_output=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == disk(daemon, "vda")
    assert daemon.run("snapshot", "list").out == ""


def test_a_reader_of_stdout_that_leaves_leaves_nothing_behind(daemon: Daemon) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "nbdfleece", "backup", "create", "vda", "--stdout"],
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        assert command.stdout is not None
        assert command.stdout.read(10)
        command.stdout.close()
        assert command.wait(30) == 1

    assert daemon.run("snapshot", "list").out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_backup_is_given_up(daemon: Daemon, to: Path, number: int) -> None:
    slow = ("backup", "create", "vda", "--to", to, "--rate", "64K", "--json")
    with started(daemon, *slow, stdout=subprocess.DEVNULL) as command:
        assert command.stderr is not None
        assert "progress" in command.stderr.readline()
        busy = daemon.run("backup", "create", "vda", "--to", to)
        assert busy.code == 4
        assert "in use by another backup" in busy.err
        command.send_signal(number)
        assert "it is given up" in command.stderr.read()
        assert command.wait(30) == 130

    assert files(to, "vda") == []
    assert daemon.run("snapshot", "list").out == ""
    assert daemon.run("backup", "create", "vda", "--to", to).code == 0


def test_a_command_interrupted_before_its_answer_gives_its_backup_up(
    daemon: Daemon, to: Path
) -> None:
    with Client(str(daemon.control)) as interrupted:
        slow = {"job-id": "slow", "disks": ["vda"], "dir": str(to), "speed": 65536}
        interrupted.execute("fleece-backup", slow)
        interrupted.send({"execute": "query-fleece-backups"})  # and nobody takes the answer
        _cancel(interrupted, "slow")
    with Client(str(daemon.control)) as after:
        (ended,) = after.query("query-fleece-backups")
        assert ended.text("state") == "cancelled"


def test_an_interrupted_stream_is_given_up(daemon: Daemon) -> None:
    slow = ("backup", "create", "vda", "--stdout", "--rate", "64K")
    with started(daemon, *slow, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert command.stdout.read(1)
        command.send_signal(signal.SIGINT)
        assert "it is given up" in command.stderr.read()
        assert command.wait(30) == 130
    assert daemon.run("snapshot", "list").out == ""
    with Client(str(daemon.control)) as after:
        (ended,) = after.query("query-fleece-backups")
        assert ended.text("state") == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_backup_interrupted_before_it_has_begun_is_given_up(
    daemon: Daemon, to: Path, number: int
) -> None:
    silent = str(daemon.folder / "silent")
    with socket.socket(socket.AF_UNIX) as server, Client(str(daemon.control)) as other:
        server.bind(silent)
        server.listen()
        # Whoever changes what is served waits for this one, since it snapshots a disk.
        at = {"type": "unix", "path": silent}
        waiting = {"driver": "nbd", "node-name": "x", "server": at, "export": "x"}
        actions = [
            {"type": "blockdev-add", "data": waiting},
            {"type": "blockdev-snapshot", "data": {"node": "vda", "overlay": "x"}},
        ]
        other.send({"execute": "transaction", "arguments": {"actions": actions}})
        connection, _ = server.accept()
        with started(daemon, "backup", "create", "vda", "--to", to, "--rate", "64K") as command:
            assert command.stderr is not None
            deadline = time.monotonic() + 30
            while not (to / "vda").exists():  # the daemon has begun
                assert time.monotonic() < deadline
                time.sleep(0.02)
            command.send_signal(number)
            assert "it is given up" in command.stderr.readline()
            assert command.poll() is None
            connection.close()
            server.close()
            assert command.wait(30) == 130
            assert "Traceback" not in command.stderr.read()
        while "event" in (answer := other.receive()):
            pass
        assert "error" in answer
        assert [run.text("state") for run in other.query("query-fleece-backups")] == ["cancelled"]
    assert daemon.run("snapshot", "list").out == ""


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["backup create vda --to {to}", "snapshot create vda"])
def test_the_instant_lies_between_the_hooks(daemon: Daemon, to: Path, command: str) -> None:
    log = daemon.folder / "hooks"
    hooks = ["--pre", f"echo pre $NBDFLEECE_DISKS >> {log}", "--post", f"echo post >> {log}"]

    done = daemon.run(*command.format(to=to).split(), *hooks)

    assert done.code == 0, done.err
    assert log.read_text() == "pre vda\npost\n"


@pytest.mark.parametrize("command", ["backup create vda --to {to}", "snapshot create vda"])
def test_without_freeze_there_is_no_instant(daemon: Daemon, to: Path, command: str) -> None:
    log = daemon.folder / "hooks"

    done = daemon.run(
        *command.format(to=to).split(), "--pre", "false", "--post", f"echo post >> {log}"
    )

    assert done.code == 1
    assert "the hook 'false' failed: it ended with exit code 1" in done.err
    assert log.read_text() == "post\n"
    assert daemon.run("snapshot", "list").out == ""


@pytest.mark.parametrize("command", ["backup create vda --to {to}", "snapshot create vda"])
def test_a_failed_thaw_fails_the_command(daemon: Daemon, to: Path, command: str) -> None:
    done = daemon.run(*command.format(to=to).split(), "--post", "exit 9")

    assert done.code == 1
    assert "the hook 'exit 9' failed" in done.err


@pytest.mark.parametrize("command", ["backup create vda --to {to}", "snapshot create vda"])
def test_a_daemon_that_hangs_or_dies_keeps_nothing_frozen(
    daemon: Daemon, to: Path, command: str
) -> None:
    log = daemon.folder / "hooks"
    kill = f"kill -STOP {daemon.process.pid}; echo pre >> {log}"
    hooks = ("--pre", kill, "--post", f"echo post >> {log}", "--hook-timeout", "1")
    with started(
        daemon, *command.format(to=to).split(), *hooks, stdout=subprocess.DEVNULL
    ) as waiting:
        assert waiting.stderr is not None
        while not (log.exists() and log.read_text() == "pre\npost\n"):
            assert waiting.poll() is None
            time.sleep(0.01)
        daemon.process.send_signal(signal.SIGCONT)
        assert waiting.wait(30) == 1
        assert "not taken within 1 seconds" in waiting.stderr.read()
    assert daemon.run("snapshot", "list").out == ""
    assert not to.exists() or files(to, "vda") == []

    log.unlink()
    dead = daemon.run(
        *command.format(to=to).split(),
        "--pre",
        f"kill -KILL {daemon.process.pid}; echo pre >> {log}",
        "--post",
        f"echo post >> {log}",
    )
    assert dead.code == 3
    assert log.read_text() == "pre\npost\n"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "complaint"),
    [
        ("backup create vda", 2, "say where to: --to DIR, or --stdout"),
        ("backup create --to {to}", 2, "missing: DISK"),
        ("backup create nope --to {to}", 5, "there is no disk 'nope'"),
        ("backup create vda vda --to {to}", 1, "a disk is named twice"),
        ("backup create vda --to {to}/not/there", 1, "not/there': No such file or directory"),
        ("backup create vda --to {to}.file", 1, "is not a folder"),
        ("backup create vda vdb --stdout", 2, "only one disk can go to --stdout"),
        ("backup create vda --stdout --to {to}", 2, "--stdout goes with neither"),
        ("backup create vda --to {to} --rate fast", 2, "'fast' is not a size"),
        ("backup create vda --to {to} --keep-daily x", 2, "'x' is not a number"),
        ("backup list {to}", 5, "backup': No such file or directory"),
        ("backup verify {to}.file", 5, "Not a directory"),
        ("backup prune {to}", 2, "nothing says what to keep (--keep-last, "),
        ("backup prune {to} --keep-last 1", 5, "No such file or directory"),
        ("restore {to} disk.raw", 5, "No such file or directory"),
        ("restore {to}", 2, "missing: DEST"),
        ("backup", 2, "missing: SUBCOMMAND"),
        ("backup delete x", 2, "there is no 'delete'"),
    ],
)
def test_mistakes_get_one_clear_line(
    shared: Daemon, command: str, code: int, complaint: str
) -> None:
    to = shared.folder / "backup"
    Path(f"{to}.file").write_bytes(b"")

    done = shared.run(*command.format(to=to).split())

    assert complaint in done.err
    assert len(done.err.splitlines()) == 1
    assert done.code == code
    assert done.out == ""
    with Client(str(shared.control)) as monitor:
        assert monitor.execute("query-fleece-snapshots") == []


def test_one_bad_disk_keeps_no_other_from_its_backup(daemon: Daemon, to: Path) -> None:
    assert daemon.run("backup", "create", "vda", "vdb", "--to", to).code == 0
    blocked = to / "vdb"
    slow = ("backup", "create", "vda", "vdb", "--to", to, "--full", "--rate", "2M")
    with started(daemon, *slow, stdout=subprocess.PIPE) as command:
        while len(files(to, "vda")) < 2:  # it has begun
            time.sleep(0.01)
        blocked.rename(to / "moved")
        out, err = command.communicate(timeout=40)
    assert command.returncode == 7, err
    assert re.match(r"vda full \S+", out)
    assert "disk vdb: " in err
    assert "No such file or directory" in err


def test_without_daemon_only_making_fails(short_tmp: Path) -> None:
    done = nbdfleece(
        *("backup", "create", "vda", "--to", short_tmp), NBDFLEECE_CONTROL=str(short_tmp / "none")
    )

    assert done.code == 3
    assert "no daemon at" in done.err


def test_older_snapshots_do_not_matter(daemon: Daemon, to: Path) -> None:
    assert daemon.run("snapshot", "create", "vda", "--name", "other").code == 0

    assert daemon.run("backup", "create", "vda", "--to", to).code == 0
    assert daemon.run("snapshot", "delete", "vda@other").code == 0
    assert restored(to, "vda") == disk(daemon, "vda")
