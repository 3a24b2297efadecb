"""`nbdfleece client ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.cli import output
from nbdfleece.cli.client import Client, Row
from nbdfleece.cli.exits import DONE
from nbdfleece.cli.paths import control_socket

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def list_all(args: argparse.Namespace) -> int:
    """Print who is connected."""
    with Client(control_socket(args.control)) as client:
        rows = client.query("query-fleece-clients")
    if args.json:
        output.print_json([row.value for row in rows])
    elif rows:
        print_clients(rows)
    return DONE


def kick(args: argparse.Namespace) -> int:
    """Disconnect a client."""
    with Client(control_socket(args.control)) as client:
        client.execute("fleece-client-kick", {"id": args.id})
    return DONE


def print_clients(rows: Sequence[Row], since: tuple[Sequence[Row], float] | None = None) -> None:
    """Print a table of clients.

    Args:
        rows: They.
        since: What there was to say of them so many seconds ago, to show rates; None: show sums.
    """
    earlier = {} if since is None else {row.number("id"): row for row in since[0]}

    def moved(row: Row, name: str) -> str:
        if since is None:
            return output.size(row.number(name))
        before = earlier.get(row.number("id"), Row(None)).number(name)
        return f"{output.size(int((row.number(name) - before) / max(since[1], 0.001)))}/s"

    output.print_table(
        (">CLIENT", "EXPORT", ">REQUESTS", ">READ", ">WRITTEN", "TLS", "IDENTITY", "PEER"),
        [
            (
                str(row.number("id")),
                output.shown(row.text("export")) or "-",
                str(row.number("requests")),
                moved(row, "bytes-read"),
                moved(row, "bytes-written"),
                row.text("tls") or "-",
                output.shown(row.text("identity")) or "-",
                output.shown(row.text("peer")),
            )
            for row in rows
        ],
    )
