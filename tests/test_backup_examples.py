"""The examples of docs/backup.md run: a timer's unit, restic, and a guest agent's freeze."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, environment, make_disk, nbdfleece

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "backup"
SIZE = 2 << 20


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    disks = [make_disk(short_tmp / f"{name}.raw", SIZE) for name in ("vda", "vdb")]
    with Daemon(short_tmp, *disks) as running:
        running.ready(2)
        yield running
        assert "Traceback" not in running.errors()


@pytest.fixture
def path(short_tmp: Path) -> str:
    """A PATH on which `nbdfleece` is this one."""
    folder = short_tmp / "bin"
    folder.mkdir()
    command = folder / "nbdfleece"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdfleece "$@"\n')
    command.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_unit_does_a_backup(daemon: Daemon, path: str) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(EXAMPLES / "nbdfleece-backup.service")
    to = daemon.folder / "backup"
    command = unit["Service"]["ExecStart"].replace("/srv/backup", str(to))
    assert command.startswith("/usr/local/bin/nbdfleece backup create vda vdb --to ")

    for _ in range(2):
        done = subprocess.run(
            shlex.split(command.replace("/usr/local/bin/nbdfleece", "nbdfleece")),
            executable=path.split(":", maxsplit=1)[0] + "/nbdfleece",
            env=environment(NBDFLEECE_CONTROL=str(daemon.control), PATH=path),
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    assert nbdfleece("backup", "verify", to, "--data").code == 0


def test_systemd_understands_the_units(short_tmp: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed (apt-get install systemd)")
    for name in ("nbdfleece-backup.service", "nbdfleece-backup.timer"):
        text = (EXAMPLES / name).read_text().replace("/usr/local/bin/nbdfleece", "/bin/true")
        (short_tmp / name).write_text(text)

    done = subprocess.run(
        [tool, "verify", "--man=no", *sorted(map(str, short_tmp.glob("nbdfleece-backup.*")))],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "nbdfleece-backup" not in done.stderr, done.stderr


@pytest.mark.interop("restic")
def test_restic_stores_what_is_whole_and_nothing_else(
    daemon: Daemon, path: str, program: Callable[[str], str]
) -> None:
    restic = program("restic")
    variables = {
        "NBDFLEECE_CONTROL": str(daemon.control),
        "PATH": path,
        "RESTIC_REPOSITORY": str(daemon.folder / "restic"),
        "RESTIC_PASSWORD": "secret",
        "RESTIC_CACHE_DIR": str(daemon.folder / "cache"),
    }

    def run(*command: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=environment(**variables),
            capture_output=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout.decode("latin-1")

    run(restic, "init")
    stored = run(EXAMPLES / "restic.sh", "vda", "vdb").splitlines()
    assert [line.split(": stored as ")[0] for line in stored] == ["vda", "vdb"]
    snapshot = stored[0].split()[-1]
    dumped = run(restic, "dump", snapshot, "vda.raw").encode("latin-1")
    assert dumped == (daemon.folder / "vda.raw").read_bytes()

    run(EXAMPLES / "restic.sh", "nope", code=1)
    kept = json.loads(run(restic, "snapshots", "--json"))
    assert len(kept) == 2


class FakeAgent:
    """What a guest agent answers to one client after the other; it remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.asked: list[str] = []
        self.fails = False
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                end, _ = self._server.accept()
            except OSError:
                return
            with end, end.makefile("rwb") as file:
                for line in file:
                    request = json.loads(line.lstrip(b"\xff"))
                    is_sync = request["execute"] == "guest-sync-delimited"
                    answer = json.dumps(self._answer(request)).encode() + b"\n"
                    file.write(b"\xff" + answer if is_sync else answer)
                    file.flush()

    def _answer(self, request: dict) -> dict:
        if request["execute"] == "guest-sync-delimited":
            return {"return": request["arguments"]["id"]}
        self.asked.append(request["execute"])
        if self.fails and request["execute"] == "guest-fsfreeze-freeze":
            return {"error": {"class": "GenericError", "desc": "cannot freeze"}}
        return {"return": 3}


def test_a_guest_agent_freezes_and_thaws(daemon: Daemon) -> None:
    agent = FakeAgent(daemon.folder / "qga")
    command = f"{sys.executable} {EXAMPLES.parent / 'guest_agent.py'} {daemon.folder / 'qga'}"
    hooks = ("--pre", f"{command} freeze", "--post", f"{command} thaw")

    done = daemon.run("snapshot", "create", "vda", "--name", "one", *hooks)
    assert done.code == 0, done.err
    assert agent.asked == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]

    agent.fails = True
    done = daemon.run("snapshot", "create", "vda", "--name", "two", *hooks)
    assert done.code == 1
    assert "the guest agent says: cannot freeze" in done.err
    assert agent.asked[2:] == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
    assert "two" not in daemon.run("snapshot", "list").out
    agent.close()
