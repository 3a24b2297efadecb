"""`nbdfleece disk ...`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from nbdfleece.base.disk_argument import KEYS, is_nbd_uri, split_disk_argument
from nbdfleece.base.errors import ConfigError
from nbdfleece.cli import output
from nbdfleece.cli.client import Client, CommandFailed, Row
from nbdfleece.cli.exits import DONE, code_of, complain
from nbdfleece.cli.paths import control_socket
from nbdfleece.cli.snapshot import exports

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from nbdfleece.protocol.qmp.values import Json

_SWITCHES: Final = {"on": True, "off": False}


def add(args: argparse.Namespace) -> int:
    """Serve one more disk and print `NAME URI`.

    Raises:
        ConfigError: The disk argument makes no sense.
    """
    name, location, options = split_disk_argument(args.disk)
    if location and not is_nbd_uri(location):
        location = os.path.abspath(location)  # the daemon's folder is another
    arguments: dict[str, Json] = {"location": location}
    if name is not None:
        arguments["disk"] = name
    for key, value in options.items():
        if key not in KEYS:
            raise ConfigError(f"disk '{args.disk}': unknown key '{key}' (known: {', '.join(KEYS)})")
        if key in ("read-only", "locking"):
            if value not in _SWITCHES:
                raise ConfigError(f"disk '{args.disk}': {key}='{value}' is none of on, off")
            arguments[key] = _SWITCHES[value]
        else:
            arguments[key] = value
    with Client(control_socket(args.control)) as client:
        made = Row(client.execute("fleece-disk-add", arguments))
        uris = exports(client).get(made.text("export"), [])
    if args.json:
        output.print_json({**made.value, "uris": uris})
    else:
        print(" ".join([made.text("disk"), *uris[:1]]))
    return DONE


def remove(args: argparse.Namespace) -> int:
    """Serve a disk no more."""
    arguments: dict[str, Json] = {"disk": args.disk}
    if args.force:
        arguments["force"] = True
    with Client(control_socket(args.control)) as client:
        try:
            client.execute("fleece-disk-remove", arguments)
        except CommandFailed as error:
            hint = " (--force disconnects clients and gives snapshots up)"
            complain("disk remove", f"{error}{hint if error.reason == 'in-use' else ''}")
            return code_of(error)
    return DONE


def list_all(args: argparse.Namespace) -> int:
    """List the disks."""
    with Client(control_socket(args.control)) as client:
        rows = client.query("query-fleece-disks")
    if args.json:
        output.print_json([row.value for row in rows])
    elif args.quiet:
        print(*(f"{row.text('disk')}\n" for row in rows), sep="", end="")
    elif rows:
        print_disks(rows)
    return DONE


def print_disks(rows: Sequence[Row]) -> None:
    """Print a table of disks."""
    output.print_table(
        ("DISK", ">SIZE", "MODE", ">SNAPSHOTS", ">CLIENTS", "LOCATION"),
        [
            (
                row.text("disk"),
                output.size(row.number("size")),
                "ro" if row.value.get("read-only") else "rw",
                str(row.number("snapshots")),
                str(row.number("clients")),
                output.shown(row.text("location")),
            )
            for row in rows
        ],
    )
