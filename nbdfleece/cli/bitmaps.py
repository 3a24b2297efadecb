"""`nbdfleece bitmap ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.cli import output
from nbdfleece.cli.client import Client, Row
from nbdfleece.cli.exits import DONE
from nbdfleece.cli.paths import control_socket

if TYPE_CHECKING:
    import argparse

    from nbdfleece.protocol.qmp.values import Json


def add(args: argparse.Namespace) -> int:
    """Make a bitmap of a disk."""
    arguments: dict[str, Json] = {"disk": args.disk, "bitmap": args.name}
    if args.granularity is not None:
        arguments["granularity"] = args.granularity
    with Client(control_socket(args.control)) as client:
        client.execute("fleece-bitmap-add", arguments)
    return DONE


def remove(args: argparse.Namespace) -> int:
    """Forget a bitmap."""
    with Client(control_socket(args.control)) as client:
        client.execute("fleece-bitmap-remove", {"disk": args.disk, "bitmap": args.name})
    return DONE


def clear(args: argparse.Namespace) -> int:
    """Make a bitmap clean."""
    with Client(control_socket(args.control)) as client:
        client.execute("fleece-bitmap-clear", {"disk": args.disk, "bitmap": args.name})
    return DONE


def list_all(args: argparse.Namespace) -> int:
    """Print the bitmaps of one disk, or of all."""
    with Client(control_socket(args.control)) as client:
        rows = client.query(
            "query-fleece-bitmaps", None if args.disk is None else {"disk": args.disk}
        )
    if args.json:
        output.print_json([row.value for row in rows])
    elif rows:
        output.print_table(
            ("NAME", "DISK", "DIRTY", "GRANULARITY", "STATE"),
            [
                (
                    output.shown(row.text("bitmap")),
                    row.text("disk"),
                    output.size(row.number("count")),
                    output.size(row.number("granularity")),
                    _state(row),
                )
                for row in rows
            ],
        )
    return DONE


def _state(row: Row) -> output.Cell:
    """Return the states that a bitmap is in, in words."""
    if row.value.get("inconsistent"):
        reason = row.text("reason")
        return f"inconsistent: {output.shown(reason)}" if reason else "inconsistent", output.RED
    words = ["recording" if row.value.get("recording") else "disabled"]
    words += [word for word in ("busy", "persistent") if row.value.get(word)]
    return ", ".join(words)
