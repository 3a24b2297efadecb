"""What README.md and docs/ tell people to type: found in the text, run, and compared.

A block of ```console holds commands behind `$ `, continued behind `> ` or after a backslash, and
what they print; a line `...` stands for any lines, and `...` within a line for anything. A block of
```sh is run as it is, and has to succeed. All blocks of a document are run in order, in one shell
and one empty folder.

Two marks in a block's first line take it out of that: ```console needs="a service manager" for what
a machine for tests has not, and ```console run-by="tests/TEST.py, WHERE" for what a test of that
file runs in another place. Their lines that call nbdfleece are parsed all the same.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon_process import ROOT, environment

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r'^```([a-z]*)(?: needs="([^"]+)")?(?: run-by="([^"]+)")?\n(.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
# A line that looks as if it were to be typed, in an indented block; a synopsis says [OPTION].
_TYPED = re.compile(
    r"^ {4}(?:[$] |(?:nbdfleece|python3?|qemu-|nbd|apt)(?!.*\[OPTION))", re.MULTILINE
)
_END = "=== end of command"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: As it is marked; empty: not at all.
        needs: What it needs that a machine for tests has not; empty: nothing.
        run_by: The file of the test that runs it, and where; empty: the document's own.
        text: All between the fences.
    """

    language: str
    needs: str
    run_by: str
    text: str

    @property
    def is_run(self) -> bool:
        """Tell whether it is run with the rest of its document."""
        return self.language in ("sh", "console") and not self.needs and not self.run_by

    def steps(self) -> Iterator[tuple[str, str]]:
        """Commands, each with what it is said to print."""
        command, output = "", ""
        for line in self.text.splitlines(keepends=True):
            if line.startswith("$ "):
                if command:
                    yield command, output
                command, output = line[2:], ""
            elif line.startswith("> ") and not output:
                command += line[2:]
            elif command.endswith("\\\n") and not output:
                command += line
            else:
                output += line
        if command:
            yield command, output


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a document."""
    return [Block(*found) for found in _FENCE.findall(path.read_text())]


def unmarked_commands(path: Path) -> list[str]:
    """Commands that stand in no block, so that nothing runs them and nothing says why."""
    return [found[0] for found in _TYPED.finditer(_FENCE.sub("", path.read_text()))]


def blocks_run_by(test: str, path: Path) -> list[list[str]]:
    """The commands of each block of a document that is left to this test."""
    return [
        [command.rstrip("\n") for command, _ in block.steps()]
        for block in blocks(path)
        if test in block.run_by
    ]


def program_lines(block: Block) -> Iterator[list[str]]:
    """The words of each line of a block that calls nbdfleece and nothing else."""
    text = block.text.replace("\\\n> ", " ").replace("\\\n", " ")
    for typed in text.splitlines():
        prompt = "$ " if block.language == "console" else ""
        line = typed.removesuffix(" &")
        line = line[len(prompt) :] if line.startswith(prompt) else ""
        if line.startswith("nbdfleece "):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # it goes on in the next line
                continue
            redirects = any(word.lstrip("2").startswith((">", "|", "&&")) for word in words)
            if not redirects and not {"--help", "--version"} & set(words):
                yield words[1:]


def matches(said: str, printed: str) -> bool:
    """Tell whether a command has printed what the document says."""
    said, printed = said.rstrip("\n"), printed.rstrip("\n")
    pattern = re.escape(said).replace(r"\.\.\.", ".*?")
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
os.execvp(sys.argv[1], sys.argv[1:])
"""


def own_network() -> list[str]:
    """What runs a command with a loopback of its own, where we may: documents name ports."""
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return [] if tried.returncode else ["unshare", "--net", sys.executable, "-c", _UP]


class Shell:
    """A bash in an empty folder, where `nbdfleece` is a program. Ends with all it has started.

    Attributes:
        folder: Where it begins.
    """

    def __init__(self, folder: Path) -> None:
        programs = folder / "bin"
        here = folder / "here"
        programs.mkdir()
        here.mkdir()
        self.folder = here
        script = programs / "nbdfleece"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdfleece "$@"\n')
        script.chmod(0o755)
        paths = f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._process = subprocess.Popen(
            [*own_network(), "bash", "--norc", "-o", "pipefail"],
            cwd=here,
            env=environment(PATH=paths, HOME=str(here), XDG_RUNTIME_DIR=str(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def run(self, command: str) -> tuple[int, str]:
        """Run a command; return its exit code and what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            f'{{ {command}\n}} </dev/null\ncode=$?; echo; echo "{_END} $code"\n'
        )
        self._process.stdin.flush()
        output = ""
        for line in self._process.stdout:
            if line.startswith(_END):
                return int(line.split()[-1]), output.removesuffix("\n")
            output += line
        raise AssertionError(f"the shell ended in: {command}{output}")


def run_document(path: Path, shell: Shell) -> None:
    """Run the blocks of a document.

    Raises:
        AssertionError: A command failed, or printed something else.
    """
    for block in blocks(path):
        if not block.is_run:
            continue
        if block.language == "sh":
            code, printed = shell.run(f"set -e\n{block.text}set +e")
            assert code == 0, f"{block.text}{printed}"
            continue
        for command, said in block.steps():
            code, printed = shell.run(command)
            # Where the text shows an error it is meant; else a command has to succeed.
            assert code == 0 or "nbdfleece: " in said, f"exit code {code}: {command}{printed}"
            assert not said or matches(said, printed), f"{command}said:\n{said}got:\n{printed}"
