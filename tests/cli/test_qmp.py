"""`nbdfleece qmp`: one command, lines from a pipe, and the prompt on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.cli.client import Row
from nbdfleece.cli.qmp import BadLine, Completer, parse_line
from tests.support.daemon_process import Daemon, environment, make_disk


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


def test_one_command(daemon: Daemon) -> None:
    done = daemon.run("qmp", "query-status")
    assert done.json == {"status": "running", "singlestep": False, "running": True}
    done = daemon.run("qmp", "query-fleece-snapshots", '{"disk": "vda"}')
    assert (done.code, done.json) == (0, [])


def test_what_goes_wrong_is_one_line_and_a_code(daemon: Daemon) -> None:
    done = daemon.run("qmp", "nope")
    assert (done.code, done.out) == (1, "")
    assert done.err == "nbdfleece: qmp: The command nope has not been found\n"
    done = daemon.run("qmp", "fleece-disk-remove", '{"disk": "nope"}')
    assert done.code == 5
    for arguments in ("{", "[]"):
        done = daemon.run("qmp", "query-version", arguments)
        assert done.code == 2
        assert done.err.startswith("nbdfleece: qmp: arguments: ")
        assert done.err.count("\n") == 1


def test_lines_from_a_pipe_and_their_events(daemon: Daemon) -> None:
    lines = [
        "query-status",
        "",
        'fleece-snapshot-create {"disks": ["vda"], "name": "one"}',
        '{"execute": "query-name", "id": 7}',
        "nope",
        "query-tpm",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "nbdfleece", "qmp"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        check=False,
    )
    assert done.returncode == 1  # of the line in between
    values = re.split(r"(?<=[\]}])\n(?=[\[{])", done.stdout.rstrip())
    assert [type(json.loads(value)) for value in values] == [dict, list, dict, list]
    event, error = done.stderr.splitlines()
    assert re.match(r"20[\d-]+T[\d:.]+Z FLEECE_SNAPSHOT_CREATED \{", event)
    assert error == "nbdfleece: qmp: CommandNotFound: The command nope has not been found"


def test_the_end_of_the_daemon_is_the_end_of_the_conversation(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbdfleece", "qmp"],
        input="quit\nquery-status\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(NBDFLEECE_CONTROL=str(daemon.control)),
        check=False,
    )
    assert json.loads(done.stdout) == {}
    assert done.returncode == 3


class Terminal:
    """A prompt on a terminal of its own."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nbdfleece", "qmp"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment(
                NBDFLEECE_CONTROL=str(daemon.control),
                HOME=str(folder),
                XDG_STATE_HOME=str(folder),
                TERM="dumb",
                INPUTRC="/dev/null",
            ),
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        os.close(self.master)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` has been shown, and forget what was shown up to there."""
        while text not in self.seen:
            self.seen += os.read(self.master, 65536).decode()
        self.seen = self.seen.partition(text)[2]


@pytest.mark.slow
def test_history_is_kept_for_its_owner_alone(daemon: Daemon, short_tmp: Path) -> None:
    with Terminal(daemon, short_tmp) as terminal:
        terminal.wait_for("qmp> ")
        terminal.type("query-tpm\n")
        terminal.wait_for("qmp> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    history = short_tmp / "nbdfleece" / "qmp_history"
    assert history.read_text() == "query-tpm\n"
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_the_prompt_completes_and_shows_events(daemon: Daemon, short_tmp: Path) -> None:
    with Terminal(daemon, short_tmp) as terminal:
        terminal.wait_for("qmp> ")
        terminal.type("query-stat\t\n")
        terminal.wait_for('"status": "running"')
        terminal.wait_for("qmp> ")
        terminal.type("query-ver")
        terminal.wait_for("query-ver")
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        terminal.wait_for("FLEECE_SNAPSHOT_CREATED")
        terminal.wait_for("qmp> query-ver")
        terminal.type("sion\n")
        terminal.wait_for('"package"')
        terminal.wait_for("qmp> ")  # before it, the terminal takes the key as its own
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0


def test_lines() -> None:
    assert parse_line("query-name") == {"execute": "query-name", "arguments": {}}
    assert parse_line('x  {"a": 1}') == {"execute": "x", "arguments": {"a": 1}}
    assert parse_line('{"execute": "x", "id": 1}') == {"execute": "x", "id": 1}
    with pytest.raises(BadLine):
        parse_line("x y")
    with pytest.raises(BadLine):
        parse_line("x 5")
    with pytest.raises(BadLine):
        parse_line("x " + "[" * 100000)


SCHEMA = [
    {"name": "blockdev-add", "meta-type": "command", "arg-type": "0"},
    {"name": "blockdev-del", "meta-type": "command", "arg-type": "3"},
    {
        "name": "0",
        "meta-type": "object",
        "members": [{"name": "driver", "type": "1"}],
        "tag": "driver",
        "variants": [{"case": "raw", "type": "2"}],
    },
    {"name": "1", "meta-type": "enum", "values": ["raw", "null-co"]},
    {"name": "2", "meta-type": "object", "members": [{"name": "file", "type": "str"}]},
    {"name": "3", "meta-type": "object", "members": [{"name": "node-name", "type": "str"}]},
]


@pytest.mark.parametrize(
    ("before", "text", "found"),
    [
        ("", "blockdev-a", ["blockdev-add "]),
        ("", "", ["blockdev-add ", "blockdev-del "]),
        ("blockdev-add {", "", ['"driver": ', '"file": ']),
        ('blockdev-add {"', "d", ['driver": ']),
        ('blockdev-add {"driver": "', "r", ['raw"']),
        ('blockdev-add {"driver": ', "", ['"raw"', '"null-co"']),
        ("blockdev-del {", "", ['"node-name": ']),
        ("nope {", "", []),
    ],
)
def test_completion(before: str, text: str, found: list[str]) -> None:
    assert Completer([Row(row) for row in SCHEMA]).candidates(before, text) == found
