"""`nbdfleece map`: what a disk or a snapshot holds where, as a bar, a table, JSON or a drawing.

In the bar and the drawing a cell shows the most telling kind of what lies in it, however little
that is; the sums beside it are exact.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

from nbdfleece.cli import output
from nbdfleece.cli.client import Client, Row
from nbdfleece.cli.exits import DONE
from nbdfleece.cli.paths import control_socket

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from nbdfleece.protocol.qmp.values import Json


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of content looks: glyph, the same in ASCII, colour on a terminal and in SVG."""

    word: str
    glyph: str
    ascii: str
    colour: str
    fill: str
    meaning: str


# The least telling first.
KINDS: Final = (
    Kind("hole", "·", ".", "90", "#f1f3f5", "takes no space, reads as zeroes"),
    Kind("zero", "░", "0", "90", "#ced4da", "reads as zeroes"),
    Kind("data", "█", "#", "34", "#4c78a8", "the disk's own data"),
    Kind("given-up", "x", "x", "90", "#868e96", "the reader is done with it"),
    Kind("saved", "▓", "S", "33", "#f2a33a", "overwritten since; the old data is saved"),
    Kind("dirty", "▒", "D", "31", "#d6453d", "written since the bitmap was cleared"),
)
_BY_WORD: Final = {kind.word: rank for rank, kind in enumerate(KINDS)}
_ROWS: Final = 4  # of the bar
_SVG_WIDTH: Final = 960
_SVG_ROWS: Final = 8
_SVG_ROW: Final = 24  # height


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of one kind (an index of KINDS)."""

    start: int
    length: int
    rank: int


def run(args: argparse.Namespace) -> int:
    """Show a map."""
    disk, at, snapshot = args.export.partition("@")
    arguments: dict[str, Json] = {"disk": disk}
    if at:
        arguments["snapshot"] = snapshot
    if args.bitmap is not None:
        arguments["bitmap"] = args.bitmap
    with Client(control_socket(args.control)) as client:
        size, extents = _ask(client, arguments)
    stretches = _stretches(extents)
    if args.svg is not None:
        with output.written(args.svg) as file:
            file.write(draw(args.export, size, stretches))
    if args.json:
        output.print_json({"size": size, "extents": [row.value for row in extents]})
    elif args.svg is None and sys.stdout.isatty():
        _print_bar(args.export, size, stretches)
    elif args.svg is None:
        _print_table(stretches)
    return DONE


def _ask(client: Client, arguments: dict[str, Json]) -> tuple[int, list[Row]]:
    """Return size and all extents, asked for as often as it takes."""
    extents: list[Row] = []
    while True:
        answer = Row(client.execute("query-fleece-map", arguments))
        extents += answer.rows("extents")
        if "next" not in answer.value:
            return answer.number("size"), extents
        arguments = {**arguments, "offset": answer.number("next")}


def _stretches(extents: Sequence[Row]) -> list[Stretch]:
    found: list[Stretch] = []
    for row in extents:
        rank = _rank(row)
        start, length = row.number("start"), row.number("length")
        if found and found[-1].rank == rank:
            start, length = found[-1].start, found.pop().length + length
        found.append(Stretch(start, length, rank))
    return found


def _rank(row: Row) -> int:
    facts = row.value
    if facts.get("dirty"):
        return _BY_WORD["dirty"]
    if facts.get("readable") is False:
        return _BY_WORD["given-up"]
    if facts.get("saved"):
        return _BY_WORD["saved"]
    if facts.get("zero"):
        return _BY_WORD["zero" if facts.get("data") else "hole"]
    return _BY_WORD["data"]


def cells(size: int, stretches: Sequence[Stretch], count: int) -> list[int]:
    """Return the most telling rank in each of `count` equal parts of a disk."""
    found = [0] * count
    for stretch in stretches:
        first = stretch.start * count // size
        last = min(-(-(stretch.start + stretch.length) * count // size), count)
        for index in range(first, last):
            found[index] = max(found[index], stretch.rank)
    return found


def _sums(stretches: Sequence[Stretch]) -> dict[int, int]:
    """Return the bytes of each rank that is there, the most telling first."""
    sums: dict[int, int] = {}
    for stretch in stretches:
        sums[stretch.rank] = sums.get(stretch.rank, 0) + stretch.length
    return dict(sorted(sums.items(), reverse=True))


def _share(part: int, size: int) -> str:
    """Return a part in per cent; what is there is never shown as nothing."""
    share = 100 * part / size
    return "<0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"


def _print_table(stretches: Sequence[Stretch]) -> None:
    output.print_table(
        (">START", ">LENGTH", "HOLDS"),
        [(str(part.start), str(part.length), KINDS[part.rank].word) for part in stretches],
    )


def _print_bar(name: str, size: int, stretches: Sequence[Stretch]) -> None:
    label = max(len(output.size(size * row // _ROWS)) for row in range(_ROWS))
    columns = min(max(shutil.get_terminal_size().columns - label - 4, 16), 128)
    ranks = cells(size, stretches, _ROWS * columns)
    print(f"{output.colour(name, output.BOLD)}  {output.size(size)}\n")
    for row in range(_ROWS):
        start = output.size(size * row // _ROWS)
        print(f"{start:>{label}}  {_painted(ranks[row * columns : (row + 1) * columns])}")
    print()
    sums = _sums(stretches)
    for rank, part in sums.items():
        kind = KINDS[rank]
        sample = output.colour(_glyph(kind) * 3, kind.colour)
        numbers = f"{output.size(part):>10}  {_share(part, size):>7}"
        print(f"{sample}  {kind.word:<8}  {numbers}  {output.colour(kind.meaning, output.DIM)}")


def _painted(ranks: Sequence[int]) -> str:
    """Return glyphs, each run of equal ones in its colour."""
    text, first = "", 0
    for index in range(1, len(ranks) + 1):
        if index == len(ranks) or ranks[index] != ranks[first]:
            kind = KINDS[ranks[first]]
            text += output.colour(_glyph(kind) * (index - first), kind.colour)
            first = index
    return text


def _glyph(kind: Kind) -> str:
    return kind.glyph if output.has_glyphs() else kind.ascii


def draw(name: str, size: int, stretches: Sequence[Stretch]) -> str:
    """Return a map as an SVG picture that stands alone."""
    sums = _sums(stretches)
    ranks = cells(size, stretches, _SVG_ROWS * _SVG_WIDTH)
    top, step = 40, _SVG_ROW + 4
    height = top + _SVG_ROWS * step + 24 + 22 * len(sums)
    title = f"{escape(name)}, {output.size(size)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_SVG_WIDTH + 140}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="120" y="26" font-size="17" font-weight="bold">{title}</text>',
    ]
    for row in range(_SVG_ROWS):
        y = top + row * step
        start = output.size(size * row // _SVG_ROWS)
        lines.append(f'<text x="110" y="{y + 17}" text-anchor="end">{start}</text>')
        lines += _drawn_row(ranks[row * _SVG_WIDTH : (row + 1) * _SVG_WIDTH], y)
    y = top + _SVG_ROWS * step + 12
    for rank, part in sums.items():
        kind = KINDS[rank]
        text = f"{kind.word}: {output.size(part)}, {_share(part, size)} - {kind.meaning}"
        lines.append(
            f'<rect x="120" y="{y}" width="14" height="14" fill="{kind.fill}" stroke="#868e96"/>'
            f'<text x="142" y="{y + 12}">{escape(text)}</text>'
        )
        y += 22
    return "\n".join([*lines, "</svg>", ""])


def _drawn_row(ranks: Sequence[int], y: int) -> list[str]:
    lines: list[str] = []
    first = 0
    for index in range(1, len(ranks) + 1):
        if index == len(ranks) or ranks[index] != ranks[first]:
            lines.append(
                f'<rect x="{120 + first}" y="{y}" width="{index - first}" height="{_SVG_ROW}" '
                f'fill="{KINDS[ranks[first]].fill}"/>'
            )
            first = index
    return lines
