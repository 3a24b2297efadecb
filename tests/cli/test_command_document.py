"""docs/commands.md and the manual page are what the parser says, and can be read."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from nbdfleece.cli import exits
from tests.support.command_document import DOCS, DOCUMENTS, EXITS, commands, manual, markdown


@pytest.mark.parametrize("name", [name for name, _ in DOCUMENTS])
def test_the_document_is_fresh(name: str) -> None:
    made = dict(DOCUMENTS)[name]()
    assert (DOCS / name).read_text() == made, "run: python -m tests.support.command_document"


def test_every_exit_code_is_told() -> None:
    codes = {value for name, value in vars(exits).items() if name.isupper() and name[0] != "_"}
    assert {code for code, _ in EXITS} == codes


def test_every_command_is_in_both() -> None:
    for command in commands():
        name = " ".join(command.path)
        assert f"\n## {name}\n" in markdown()
        assert f"\n.SS nbdfleece {name}".replace("-", "\\-") in manual()


@pytest.mark.interop
def test_the_manual_page_is_well_formed(program: Callable[[str], str]) -> None:
    page = DOCS / "man" / "nbdfleece.1"
    done = subprocess.run(
        [program("mandoc"), "-T", "lint", "-W", "warning", page],
        capture_output=True,
        text=True,
        check=False,
    )
    faults = [line for line in done.stdout.splitlines() if "missing date" not in line]
    assert faults == []
