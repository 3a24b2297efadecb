"""Text for people: aligned tables, sizes, ages, bars, colours where they are welcome."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TextIO

from nbdfleece.base.errors import CommandError
from nbdfleece.base.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nbdfleece.protocol.qmp.values import Json

RED: Final = "31"
GREEN: Final = "32"
YELLOW: Final = "33"
BOLD: Final = "1"
DIM: Final = "2"

_AGES: Final = ((86400, "d"), (3600, "h"), (60, "m"))

Cell = tuple[str, str] | str
"""A text, with or without the colour that it has on a terminal."""


def print_json(value: Json) -> None:
    """Print `value` for programs."""
    print(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print aligned columns; one whose name begins with `>` is aligned to the right."""
    names = [name.removeprefix(">") for name in header]
    table: list[Sequence[Cell]] = [[(name, BOLD) for name in names], *rows]
    widths = [max(len(_text(row[column])) for row in table) for column in range(len(header))]
    for row in table:
        cells = []
        for cell, width, name in zip(row, widths, header, strict=True):
            gap = " " * (width - len(_text(cell)))
            text = _coloured(cell)
            cells.append(gap + text if name.startswith(">") else text + gap)
        print("  ".join(cells).rstrip())


def print_facts(facts: Sequence[tuple[str, Cell]]) -> None:
    """Print `name: value` lines with the values below each other."""
    width = max(len(name) for name, _ in facts) + 1
    for name, value in facts:
        label = f"{name}:" if name else ""
        print(f"{label:<{width}} {_coloured(value)}")


def size(value: int) -> str:
    """Return bytes for people."""
    return format_size(value)


def age(instant: str) -> str:
    """Return how long ago `instant` (RFC 3339) was: `5s`, `3m`, `2h`, `7d`."""
    try:
        then = datetime.fromisoformat(instant)
    except ValueError:
        return "?"
    seconds = max(int((datetime.now(UTC) - then).total_seconds()), 0)
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds // unit}{name}"
    return f"{seconds}s"


def shown(text: str) -> str:
    """Return `text` without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


def gauge(part: int, whole: int, width: int) -> str:
    """Return a bar, `width` characters long, of which `part` of `whole` is full."""
    full, empty = ("█", "░") if has_glyphs() else ("#", ".")
    filled = min(max(width * part // whole, 0), width) if whole else 0
    return full * filled + empty * (width - filled)


def has_glyphs() -> bool:
    """Tell whether whoever reads our output can be sent more than ASCII."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def colour(text: str, code: str) -> str:
    """Return `text` in a colour, on a terminal that wants it."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


@contextmanager
def written(path: str) -> Iterator[TextIO]:
    """Open a text file to be written; `-` is our output.

    Raises:
        CommandError: It cannot be written.
    """
    if path == "-":
        yield sys.stdout
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise CommandError(f"'{path}': {error.strerror}") from error


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _coloured(cell: Cell) -> str:
    return cell if isinstance(cell, str) else colour(*cell)
