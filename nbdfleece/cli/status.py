"""`nbdfleece status` and `nbdfleece health`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from nbdfleece.cli import output
from nbdfleece.cli.client import Client, Row
from nbdfleece.cli.clients import print_clients
from nbdfleece.cli.exits import BROKEN, DONE, FAILED, complain
from nbdfleece.cli.paths import control_socket
from nbdfleece.cli.snapshot import print_list

if TYPE_CHECKING:
    import argparse

_REDRAW_S: Final = 2.0
_CLEAR: Final = "\033[H\033[2J"
_LITTLE_SPACE: Final = 0.05  # of the file system of the temporary images


class Picture:
    """Everything that `status` shows, asked for at once."""

    def __init__(self, client: Client) -> None:
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
    """Show how the daemon is doing."""
    with Client(control_socket(args.control)) as client:
        while True:
            picture = Picture(client)
            if args.watch:
                print(_CLEAR, end="")
            if args.json:
                _print_json(picture)
            else:
                _print(picture)
            if not args.watch:
                return DONE
            time.sleep(_REDRAW_S)


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


def _print(picture: Picture) -> None:
    daemon = picture.daemon
    temp = daemon.row("temp")
    free, total = output.size(temp.number("free")), output.size(temp.number("total"))
    output.print_facts(
        [
            ("daemon", f"nbdfleece {daemon.text('version')}, pid {daemon.number('pid')}"),
            ("running", f"{output.age(daemon.text('started'))}, since {daemon.text('started')}"),
            *(("listening", address) for address in daemon.texts("listen")),
            ("temporary", f"{free} free of {total} in {temp.text('path')}"),
        ]
    )
    for warning in picture.warnings():
        output.print_facts([("warning", (warning, output.RED))])
    if picture.disks:
        print()
        output.print_table(
            ("DISK", "SIZE", "MODE", "SNAPSHOTS", "CLIENTS", "LOCATION"),
            [
                (
                    row.text("disk"),
                    output.size(row.number("size")),
                    "ro" if row.value.get("read-only") else "rw",
                    str(row.number("snapshots")),
                    str(row.number("clients")),
                    output.shown(row.text("location")),
                )
                for row in picture.disks
            ],
        )
    if picture.snapshots:
        print()
        print_list(picture.snapshots)
    if picture.clients:
        print()
        print_clients(picture.clients)
