"""`nbdfleece status` and `nbdfleece health`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

from nbdfleece.cli import output
from nbdfleece.cli.client import Client, Row
from nbdfleece.cli.clients import print_clients
from nbdfleece.cli.disks import print_disks
from nbdfleece.cli.exits import BROKEN, DONE, FAILED, complain
from nbdfleece.cli.paths import control_socket
from nbdfleece.cli.snapshot import print_list

if TYPE_CHECKING:
    import argparse

_REDRAW_S: Final = 2.0
_CLEAR: Final = "\033[H\033[2J"
_GAUGE: Final = 20  # characters
_LITTLE_SPACE: Final = 0.05  # of the file system of the temporary images


class Picture:
    """Everything that `status` shows, asked for at once."""

    def __init__(self, client: Client) -> None:
        self.time = time.monotonic()
        self.daemon = Row(client.execute("query-fleece-status"))
        self.disks = client.query("query-fleece-disks")
        self.snapshots = client.query("query-fleece-snapshots")
        self.clients = client.query("query-fleece-clients")

    def warnings(self) -> list[str]:
        """Return what is not as it should be, or will not be, a sentence each."""
        return self._faults() + [output.shown(text) for text in self.daemon.texts("warnings")]

    def problems(self) -> list[str]:
        """Return what is not as it should be now."""
        return self._faults() + [output.shown(text) for text in self.daemon.texts("expired")]

    def _faults(self) -> list[str]:
        found = [
            f"snapshot {row.text('export')} is broken: {output.shown(row.text('error'))}"
            for row in self.snapshots
            if row.text("state") != "ok"
        ]
        temp = self.daemon.row("temp")
        if temp.number("free") < temp.number("total") * _LITTLE_SPACE:
            free = output.size(temp.number("free"))
            found.append(f"little space for old data: {free} in {temp.text('path')}")
        return found


def status(args: argparse.Namespace) -> int:
    """Show how the daemon is doing; with --watch until it is interrupted, which is no failure."""
    with Client(control_socket(args.control)) as client:
        if not args.watch:
            _print_all(Picture(client), args, None)
            return DONE
        before: Picture | None = None
        on_screen = sys.stdout.isatty() and not args.json
        try:
            while True:
                picture = Picture(client)
                if on_screen:
                    print(_CLEAR, end="")
                elif before is not None and not args.json:
                    print()
                _print_all(picture, args, before)
                sys.stdout.flush()
                before = picture
                time.sleep(_REDRAW_S)
        except KeyboardInterrupt:
            return DONE


def _print_all(picture: Picture, args: argparse.Namespace, before: Picture | None) -> None:
    if args.json:
        _print_json(picture)
    else:
        _print(picture, before)


def health(args: argparse.Namespace) -> int:
    """Return 0 when all is well; say what is not."""
    with Client(control_socket(args.control)) as client:
        picture = Picture(client)
    problems = picture.problems()
    if not problems:
        if not args.quiet:
            print("ok")
        return DONE
    for problem in problems:
        complain("health", problem)
    is_broken = any(row.text("state") != "ok" for row in picture.snapshots)
    return BROKEN if is_broken else FAILED


def _print_json(picture: Picture) -> None:
    output.print_json(
        {
            "daemon": picture.daemon.value,
            "disks": [row.value for row in picture.disks],
            "snapshots": [row.value for row in picture.snapshots],
            "clients": [row.value for row in picture.clients],
            "warnings": picture.warnings(),
        }
    )


def _print(picture: Picture, before: Picture | None) -> None:
    """Print everything; with rates where an earlier picture tells of them."""
    daemon = picture.daemon
    temp = daemon.row("temp")
    free, total = temp.number("free"), temp.number("total")
    space = f"{output.size(free)} free of {output.size(total)} in {temp.text('path')}"
    listening = daemon.texts("listen")
    labels = ["listening", *[""] * (len(listening) - 1)]
    warnings = picture.warnings()
    output.print_facts(
        [
            ("daemon", f"nbdfleece {daemon.text('version')}, pid {daemon.number('pid')}"),
            ("running", f"{output.age(daemon.text('started'))}, since {daemon.text('started')}"),
            *zip(labels, listening, strict=False),
            ("space", f"{output.gauge(total - free, total, _GAUGE)} {space}"),
            *[("warning", (text, output.RED)) for text in warnings],
            *([] if warnings else [("health", ("all is well", output.GREEN))]),
        ]
    )
    if picture.disks:
        print()
        print_disks(picture.disks)
    if picture.snapshots:
        print()
        print_list(picture.snapshots)
    if picture.clients:
        print()
        if before is None:
            print_clients(picture.clients)
        else:
            print_clients(picture.clients, (before.clients, picture.time - before.time))
