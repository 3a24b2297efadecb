"""Text for people: aligned tables, sizes, ages, colours where they are welcome."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from nbdfleece.base.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdfleece.protocol.qmp.values import Json

RED: Final = "31"
GREEN: Final = "32"
BOLD: Final = "1"

_AGES: Final = ((86400, "d"), (3600, "h"), (60, "m"))

Cell = tuple[str, str] | str
"""A text, with or without the colour that it has on a terminal."""


def print_json(value: Json) -> None:
    """Print `value` for programs."""
    print(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print aligned columns; no column but the last is cut or padded at the end of its line."""
    table: list[Sequence[Cell]] = [[(name, BOLD) for name in header], *rows]
    widths = [max(len(_text(row[column])) for row in table) for column in range(len(header))]
    for row in table:
        cells = [
            _colour(cell) + " " * (width - len(_text(cell)))
            for cell, width in zip(row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def print_facts(facts: Sequence[tuple[str, Cell]]) -> None:
    """Print `name: value` lines with the values below each other."""
    width = max(len(name) for name, _ in facts) + 1
    for name, value in facts:
        print(f"{name + ':':<{width}} {_colour(value)}")


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


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _colour(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    text, code = cell
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"
