"""Completion for bash, zsh and fish: made from the parser, and tried in the shells themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece import __version__
from nbdfleece.cli import completion, grammar
from nbdfleece.cli.arguments import build_parser
from tests.support.daemon_process import ROOT, Daemon, environment, make_disk, nbdfleece

PROGRAM = grammar.read(build_parser(__version__))
SHELLS = ("bash", "zsh", "fish")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_option(shell: str) -> None:
    text = completion.script(shell)
    for command in PROGRAM.walk():
        for below in command.commands:
            assert below.path[-1] in text
            assert below.summary
        for option in command.options:
            for name in option.names:
                assert (f"-l {name[2:]}" if shell == "fish" and name[:2] == "--" else name) in text
    assert nbdfleece("completion", shell).out == text


def test_the_grammar_shows_what_is_built_and_nothing_else() -> None:
    commands = {" ".join(command.path): command for command in PROGRAM.walk()}
    assert [option.usage for option in commands["map"].options if option.value] == [
        *("--bitmap NAME", "--svg FILE", "--control PATH")
    ]
    assert [argument.usage for argument in commands["snapshot create"].arguments] == ["DISK..."]
    assert commands["qmp"].arguments[0].usage == "[COMMAND]"
    names = {option.names[0] for option in commands["serve"].options}
    assert "--listen" in names
    assert "--metrics" not in names
    for command in commands.values():
        if command.path != ("storage-daemon",):
            assert command.example.startswith("nbdfleece "), command.path


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.interop
def test_the_shell_understands_the_script(
    shell: str, program: Callable[[str], str], tmp_path: Path
) -> None:
    file = tmp_path / "script"
    file.write_text(completion.script(shell))
    subprocess.run([program(shell), "-n", file], check=True)


@pytest.fixture
def shell_environment(tmp_path: Path, daemon: Daemon) -> dict[str, str]:
    """`nbdfleece` is a program there, as when it is installed."""
    script = tmp_path / "bin" / "nbdfleece"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdfleece "$@"\n')
    script.chmod(0o755)
    path = f"{script.parent}:{os.environ['PATH']}"
    return environment(PATH=path, NBDFLEECE_CONTROL=str(daemon.control), HOME=str(tmp_path))


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", 1 << 20)) as running:
        running.ready()
        running.run("snapshot", "create", "vda", "--name", "one")
        yield running


# What is typed (the folder is the repository), and words that are offered behind it.
OFFERED = (
    ("nbdfleece sna", {"snapshot"}),
    ("nbdfleece snapshot ", {"create", "list", "show", "delete"}),
    ("nbdfleece snapshot create ", {"vda"}),
    ("nbdfleece snapshot delete vda@o", {"vda@one"}),
    ("nbdfleece map vd", {"vda", "vda@one"}),
    ("nbdfleece disk remove ", {"vda"}),
    ("nbdfleece snapshot create vda --on-error ", {"break-snapshot", "break-guest-write"}),
    ("nbdfleece serve --conf", {"--config"}),
    ("nbdfleece serve --policy pyp", {"pyproject.toml"}),
    ("nbdfleece pki show doc", {"docs"}),
    ("nbdfleece completion ", {"bash", "zsh", "fish"}),
)


def bash_offers(line: str, env: dict[str, str]) -> set[str]:
    """What bash would make of the word that is typed."""
    words = line.split(" ")
    script = (
        f"source <({sys.executable} -m nbdfleece completion bash)\n"
        f"COMP_LINE='{line}' COMP_POINT={len(line)}\n"
        f"_nbdfleece\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    # bash puts what is offered behind the last of its own word breaks.
    start = words[-1][: words[-1].rfind("@") + 1]
    return {start + word for word in done.stdout.split()}


@pytest.mark.slow
@pytest.mark.interop("bash")
@pytest.mark.parametrize(("line", "words"), OFFERED)
def test_bash_offers(line: str, words: set[str], shell_environment: dict[str, str]) -> None:
    assert bash_offers(line, shell_environment) == words


@pytest.mark.slow
@pytest.mark.interop("fish")
@pytest.mark.parametrize(("line", "words"), OFFERED)
def test_fish_offers(line: str, words: set[str], shell_environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"nbdfleece completion fish | source; complete -C '{line}'"],
        cwd=ROOT,
        env=shell_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {row.split("\t")[0].rstrip("/") for row in done.stdout.splitlines()} == words
