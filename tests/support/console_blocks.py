"""The commands of a document: its ```console blocks, which tests run as a reader would.

A line that begins with ``$ `` is a command, with the lines that a backslash at its end adds; other
lines are what it must print. An HTML comment in the line before a block says who runs it, if not
the test of the document itself: ``<!-- run by: TEST, WHERE -->`` or ``<!-- not run: WHY -->``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```console\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        mark: The comment before it; empty: none.
        commands: What a shell is given, one after another.
        expected: Lines that must be printed.
    """

    mark: str
    commands: tuple[str, ...]
    expected: tuple[str, ...]


def console_blocks(document: Path) -> list[Block]:
    """Return the blocks of a document, in order."""
    return [
        _read(found["mark"] or "", found["text"]) for found in _BLOCK.finditer(document.read_text())
    ]


def _read(mark: str, text: str) -> Block:
    commands: list[str] = []
    expected: list[str] = []
    continues = False
    for line in text.splitlines():
        if continues:
            commands[-1] += "\n" + line
        elif line.startswith("$ "):
            commands.append(line[2:])
        else:
            expected.append(line)
            continue
        continues = line.endswith("\\")
    return Block(mark, tuple(commands), tuple(expected))
