"""The command line without a daemon, and status with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdfleece import __version__
from tests.support.daemon_process import Daemon, environment, make_disk, nbdfleece


def test_version() -> None:
    assert nbdfleece("--version").out == f"nbdfleece {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [[], ["serve"], ["snapshot"], ["status"], ["health"]]
    + [["snapshot", name] for name in ("create", "list", "show", "delete")]
    + [["client"], ["client", "list"], ["client", "kick"]]
    + [["disk"], ["disk", "add"], ["disk", "remove"], ["disk", "list"], ["map"], ["completion"]],
    ids=" ".join,
)
def test_help_has_an_example(command: list[str]) -> None:
    done = nbdfleece(*command, "--help")
    assert done.code == 0
    assert "example: nbdfleece " in done.out


@pytest.mark.parametrize(
    "command",
    [["rollback", "a@b"], ["check"], ["clone", "a@b"], ["snapshot", "reset"]],
    ids=" ".join,
)
def test_what_is_not_built_is_refused_in_one_line(command: list[str]) -> None:
    done = nbdfleece(*command)
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("not built yet\n")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["dance"], ["status", "--dance"]], ids=" ".join)
def test_wrong_usage(command: list[str]) -> None:
    done = nbdfleece(*command)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("nbdfleece: ")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([], "command line: missing: COMMAND (see nbdfleece --help)"),
        (
            ["serv"],
            "command line: there is no 'serv'; did you mean 'serve'? (see nbdfleece --help)",
        ),
        (
            ["disk", "zz"],
            "disk: there is no 'zz'; there are add, remove, list (see nbdfleece disk --help)",
        ),
        (
            ["--control", "a", "status"],
            "command line: the command comes first: nbdfleece COMMAND --control"
            " (see nbdfleece --help)",
        ),
        (["map"], "map: missing: DISK|DISK@NAME (see nbdfleece map --help)"),
    ],
    ids=" ".join,
)
def test_what_a_newcomer_gets_wrong_is_said_in_plain_words(command: list[str], text: str) -> None:
    done = nbdfleece(*command)
    assert (done.code, done.err) == (2, f"nbdfleece: {text}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nbdfleece", "completion", "bash"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONUNBUFFERED=unbuffered),
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "nbdfleece: completion: No space left on device\n"


@pytest.mark.parametrize("command", ["status", "health", "snapshot list", "client list"])
def test_without_a_daemon(short_tmp: Path, command: str) -> None:
    done = nbdfleece(*command.split(), "--control", short_tmp / "control.sock")
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        f"nbdfleece: {command}: no daemon at '{short_tmp}/control.sock': "
        "No such file or directory"
        " (it does not run, or --control or NBDFLEECE_CONTROL must name its socket)\n"
    )


def test_status(short_tmp: Path) -> None:
    disk = make_disk(short_tmp / "vda.raw", 3 << 20)
    with Daemon(short_tmp, f"{disk},read-only=on") as daemon:
        daemon.ready()
        daemon.run("snapshot", "create", "vda", "--name", "one")
        shown = daemon.run("status")
        assert shown.code == 0
        assert f"pid {daemon.process.pid}" in shown.out
        assert any(line.split()[:3] == ["vda", "3", "MiB"] for line in shown.out.splitlines())
        facts = daemon.run("status", "--json").json
        assert facts["disks"][0]["read-only"] is True
        assert facts["snapshots"][0]["export"] == "vda@one"
        assert facts["clients"] == []
        assert facts["warnings"] == []
        assert daemon.run("health").out == "ok\n"
