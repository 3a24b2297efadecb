"""README.md and docs/: every command is run, or says what it needs; every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nbdfleece import __version__
from nbdfleece.cli import storage_daemon
from nbdfleece.cli.arguments import build_parser
from nbdfleece.cli.config import _KEYS
from tests.conftest import require_program
from tests.support.daemon_process import ROOT
from tests.support.documents import (
    DOCUMENTS,
    Shell,
    blocks,
    blocks_run_by,
    matches,
    program_lines,
    run_document,
    unmarked_commands,
)

# Programs that a document runs, beside the shell's own.
PROGRAMS = {
    "README.md": ("qemu-io", "nbdcopy"),
    "clients.md": ("qemu-img", "qemu-io", "nbdcopy", "nbdinfo", "restic", "borg"),
    "scaling.md": ("qemu-io", "qemu-nbd", "qemu-img"),
    "tls.md": ("qemu-img", "nbdcopy", "nbdinfo"),
    "tour.md": ("qemu-io", "nbdcopy"),
    "troubleshooting.md": ("qemu-img", "qemu-io", "nbdinfo"),
}
# What these have to say to a test is more than their commands: each has a test of its own.
ELSEWHERE = {
    "backup.md": "tests/test_backup_document.py",
    "virtual-machines.md": "tests/interop/test_virtual_machines_guide.py",
}
RUN = [
    path
    for path in DOCUMENTS
    if path.name not in ELSEWHERE and any(block.is_run for block in blocks(path))
]
LANGUAGES = {"sh", "console", "toml", "yaml", "ini", "json", "python", "text", "xml", ""}


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.deadline(300)
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_what_it_tells_people_to_type_does_what_it_says(path: Path, short_tmp: Path) -> None:
    for name in PROGRAMS.get(path.name, ()):
        require_program(name)
    with Shell(short_tmp) as shell:
        run_document(path, shell)


def test_the_commands_of_qmp_md_do_what_they_say(short_tmp: Path) -> None:
    (commands,) = blocks_run_by("tests/test_documents.py", ROOT / "docs" / "qmp.md")
    with Shell(short_tmp) as shell:
        begin = (
            "truncate -s 1M vda.raw; export NBDFLEECE_CONTROL=$PWD/control; "
            "nbdfleece serve --listen unix:$PWD/nbd --state-dir state vda.raw >log 2>&1 & "
            "until nbdfleece health --quiet 2>/dev/null; do sleep 0.1; done"
        )
        assert shell.run(begin) == (0, "")
        for command in commands:
            code, printed = shell.run(command)
            assert code == 0, f"{command}{printed}"
        assert "vda" in shell.run("nbdfleece snapshot list")[1]
        shell.run("kill %1; wait %1")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_run_or_marked(path: Path) -> None:
    text = path.read_text()
    fences = [line for line in text.splitlines() if line.startswith("```") and line != "```"]
    languages = [block.language for block in blocks(path) if block.language]
    assert len(fences) == len(languages), "a block's first line is not understood"
    for block in blocks(path):
        assert block.language == "console" or not block.text.startswith("$ ")
        if block.run_by:
            assert path.name in (ROOT / block.run_by.partition(",")[0]).read_text()
    if path.name != "commands.md":  # made from the parser: it has only forms of commands
        assert unmarked_commands(path) == []


def test_documents_with_a_test_of_their_own_are_named_there() -> None:
    for name, test in ELSEWHERE.items():
        assert name in (ROOT / test).read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_its_command_lines_are_understood(path: Path) -> None:
    parser = build_parser(__version__)
    for block in blocks(path):
        assert block.language in LANGUAGES
        if block.language in ("sh", "console"):
            if block.language == "sh":
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            for words in program_lines(block):
                if words[0] != storage_daemon.NAME:
                    parser.parse_args(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_its_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_document_is_named_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in DOCUMENTS[1:] if path.name not in text] == []


def test_every_key_of_the_configuration_file_is_told() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text().partition("\n## Disks")[0]
    told = re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)
    assert sorted(told) == sorted(_KEYS)


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("a\n", "a\n", True),
        ("a ... c\n", "a b c", True),
        ("a\n...\nz\n", "a\nb\nc\nz\n", True),
        ("a\n", "b\n", False),
        ("a...\n", "b\na", False),
    ],
)
def test_what_is_said_and_what_is_printed(said: str, printed: str, same: bool) -> None:
    assert matches(said, printed) == same
