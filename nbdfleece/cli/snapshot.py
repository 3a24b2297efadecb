"""`nbdfleece snapshot ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.backup.hooks import HookFailed, TooLate
from nbdfleece.cli import output
from nbdfleece.cli.arguments import UsageError
from nbdfleece.cli.backup import hooks_of
from nbdfleece.cli.client import Client, CommandFailed, Row
from nbdfleece.cli.exits import BROKEN, DONE, FAILED, NOT_FOUND, PARTLY, code_of, complain
from nbdfleece.cli.paths import control_socket

if TYPE_CHECKING:
    import argparse

    from nbdfleece.cli.output import Cell
    from nbdfleece.protocol.qmp.values import Json


_NEARLY_FULL: Final = 0.8  # of a snapshot's limit


def create(args: argparse.Namespace) -> int:
    """Take snapshots and print `DISK@NAME URI` for each; with a token, the secret URI."""
    if args.durability == "power":
        raise UsageError("nbdfleece snapshot create", "--durability power is not built yet")
    arguments: dict[str, Json] = {"disks": args.disks}
    for name in ("name", "temp-limit", "on-error", "bitmap", "timeout", "token"):
        value = getattr(args, name.replace("-", "_"))
        if value is not None:
            arguments[name] = value
    if args.internal:
        arguments["internal"] = True
    thaw_failed = False
    with Client(control_socket(args.control)) as client:
        with hooks_of(args) as hooks:
            made = client.query("fleece-snapshot-create", arguments)
            try:
                hooks.thaw()
            except TooLate:
                _delete_all(client, made)
                raise
            except HookFailed as error:
                complain("snapshot create", f"{error}; the snapshot is there")
                thaw_failed = True
        uris = exports(client)
    if args.json:
        output.print_json(
            [{**row.value, "uri": next(iter(_reach(row, uris)), None)} for row in made]
        )
    else:
        for row in made:
            print(" ".join([row.text("export"), *_reach(row, uris)[:1]]))
    return FAILED if thaw_failed else DONE


def _delete_all(client: Client, made: list[Row]) -> None:
    """Delete snapshots of an instant that came too late."""
    for row in made:
        name: dict[str, Json] = {"disk": row.text("disk"), "snapshot": row.text("snapshot")}
        client.execute("fleece-snapshot-delete", name)


def _reach(row: Row, uris: dict[str, list[str]]) -> list[str]:
    """Return the URIs of a new snapshot, those with its token where it has one."""
    if "token-uris" in row.value:
        return row.texts("token-uris")
    return uris.get(row.text("export"), [])


def exports(client: Client) -> dict[str, list[str]]:
    """Return the URIs of all exports by name."""
    status = Row(client.execute("query-fleece-status"))
    return {row.text("name"): row.texts("uris") for row in status.rows("exports")}


def list_all(args: argparse.Namespace) -> int:
    """List snapshots."""
    with Client(control_socket(args.control)) as client:
        found = client.query(
            "query-fleece-snapshots", None if args.disk is None else {"disk": args.disk}
        )
    if args.json:
        output.print_json([row.value for row in found])
    elif args.quiet:
        print(*(f"{row.text('export')}\n" for row in found), sep="", end="")
    elif found:
        print_list(found)
    return DONE


def print_list(found: list[Row]) -> None:
    """Print snapshots as a table."""
    output.print_table(
        ("NAME", "DISK", "INSTANT", ">AGE", ">SIZE", ">HELD", ">READERS", "STATE"),
        [
            (
                row.text("snapshot"),
                row.text("disk"),
                row.text("instant"),
                output.age(row.text("instant")),
                output.size(row.number("size")),
                _held(row),
                str(row.number("readers")),
                state(row),
            )
            for row in found
        ],
    )


def _held(row: Row) -> Cell:
    """Return the space that a snapshot takes, and how much it may."""
    held, limit = row.number("temp-bytes"), row.number("temp-limit")
    if not limit:
        return output.size(held)
    text = f"{output.size(held)} of {output.size(limit)}"
    return (text, output.YELLOW) if held > limit * _NEARLY_FULL else text


def state(row: Row) -> Cell:
    """Return the state of a snapshot: `ok`, or `broken: why`."""
    if row.text("state") == "ok":
        return "ok", output.GREEN
    return f"broken: {output.shown(row.text('error'))}", output.RED


def show(args: argparse.Namespace) -> int:
    """Show one snapshot."""
    disk, name = split(args.snapshot, "show")
    with Client(control_socket(args.control)) as client:
        found = client.query("query-fleece-snapshots", {"disk": disk})
        uris = exports(client)
    for row in found:
        if row.text("snapshot") == name:
            break
    else:
        complain("snapshot show", f"disk '{disk}' has no snapshot '{name}'")
        return NOT_FOUND
    reach = uris.get(row.text("export"), [])
    if args.json:
        output.print_json({**row.value, "uris": reach})
    else:
        output.print_facts(_facts(row, reach))
    return DONE if row.text("state") == "ok" else BROKEN


def _facts(row: Row, uris: list[str]) -> list[tuple[str, Cell]]:
    limit = row.number("temp-limit")
    timeout = row.value.get("timeout")
    facts: list[tuple[str, Cell]] = [
        ("snapshot", row.text("export")),
        *(("uri", uri) for uri in uris),
        ("instant", f"{row.text('instant')} ({output.age(row.text('instant'))} ago)"),
        ("size", output.size(row.number("size"))),
        ("state", state(row)),
        ("readers", str(row.number("readers"))),
        ("old data", output.size(row.number("saved-bytes"))),
        ("space held", output.size(row.number("temp-bytes"))),
        ("space limit", output.size(limit) if limit else "none"),
        ("on error", row.text("on-error")),
        ("timeout", f"{timeout} s" if isinstance(timeout, int | float) else "none"),
        ("durability", row.text("durability")),
        ("bitmap", output.shown(row.text("bitmap")) or "none"),
        ("node", row.text("node-name")),
    ]
    return facts


def delete(args: argparse.Namespace) -> int:
    """Delete snapshots, one after another."""
    wanted = [split(text, "delete") for text in args.snapshots]
    failures: list[int] = []
    with Client(control_socket(args.control)) as client:
        for disk, name in wanted:
            arguments: dict[str, Json] = {"disk": disk, "snapshot": name}
            if args.force:
                arguments["force"] = True
            if args.success:
                arguments["success"] = True
            try:
                client.execute("fleece-snapshot-delete", arguments)
            except CommandFailed as error:
                hint = " (--force disconnects the readers)" if error.reason == "in-use" else ""
                complain("snapshot delete", f"{error}{hint}")
                failures.append(code_of(error))
    if not failures:
        return DONE
    return failures[0] if len(failures) == len(wanted) else PARTLY


def split(text: str, subcommand: str) -> tuple[str, str]:
    """Return disk and snapshot of `DISK@NAME`.

    Raises:
        UsageError: It is of another form.
    """
    disk, at, name = text.partition("@")
    if not (disk and at and name):
        raise UsageError(f"nbdfleece snapshot {subcommand}", f"'{text}' is not DISK@NAME")
    return disk, name
