"""The units in examples/systemd: systemd understands them, and nbdfleece their command lines."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece import __version__
from nbdfleece.cli.arguments import build_parser

UNITS = Path(__file__).resolve().parent.parent / "examples" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
MOST_EXPOSED = 2.0  # of `systemd-analyze security`, 0 to 10


def settings(path: Path) -> dict[str, list[str]]:
    """The settings of a unit, whatever section they are in."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, templates with an instance, and programs that are really there."""
    for path in UNITS.iterdir():
        text = path.read_text().replace("/usr/local/bin/nbdfleece", "/bin/true")
        (tmp_path / path.name).write_text(text)
        if "@" in path.name:
            (tmp_path / path.name.replace("@", "@vda")).write_text(text)
    return tmp_path


@pytest.mark.interop
def test_systemd_finds_no_fault(program: Callable[[str], str], installed: Path) -> None:
    names = sorted(path for path in installed.iterdir() if "@." not in path.name)
    assert len(names) == len(list(UNITS.iterdir()))
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", *names],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{installed}:"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.interop
@pytest.mark.parametrize("name", ["nbdfleece.service", "nbdfleece@vda.service"])
def test_a_daemon_may_do_little_else(
    program: Callable[[str], str], installed: Path, name: str
) -> None:
    done = subprocess.run(
        [program("systemd-analyze"), "security", "--offline=yes", installed / name],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
        check=True,
    )
    level = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level is not None
    assert float(level[1]) < MOST_EXPOSED


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_nbdfleece_understands_the_command_line(path: Path) -> None:
    (command,) = settings(path)["ExecStart"]
    program, *words = shlex.split(command.replace("%i", "vda"))
    assert program == "/usr/local/bin/nbdfleece"
    install = (UNITS.parents[1] / "docs/install.md").read_text()
    assert f"ln -s /opt/nbdfleece/bin/nbdfleece {program}\n" in install, "where it is installed"
    build_parser(__version__).parse_args(words)


@pytest.mark.parametrize("name", ["nbdfleece.service", "nbdfleece@.service"])
def test_a_daemon_tells_systemd_that_it_is_ready_and_alive(name: str) -> None:
    found = settings(UNITS / name)
    assert found["Type"] == ["notify"]
    assert found["WatchdogSec"]
    assert found["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    (socket,) = found["Requires"]
    listen = settings(UNITS / socket.replace("%i", ""))["ListenStream"]
    folder = found["RuntimeDirectory"][0]
    assert listen == [f"/run/{folder}/nbd.sock"]
    assert f"--control /run/{folder}/control.sock" in found["ExecStart"][0]
