"""`nbdfleece pki ...`: these commands work on files, and need no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nbdfleece.base.needs import check_cryptography
from nbdfleece.cli import output
from nbdfleece.cli.exits import DONE

if TYPE_CHECKING:
    import argparse
    from datetime import datetime

    from nbdfleece.cli.output import Cell
    from nbdfleece.pki.listing import Listing, Shown
    from nbdfleece.protocol.qmp.values import Json


def init(args: argparse.Namespace) -> int:
    """Make an authority and a server's certificate."""
    check_cryptography()
    from nbdfleece.pki import authority, hosts, listing

    folder = Path(args.folder)
    given = args.hosts
    authority.init(folder, hosts.own_hosts() if given is None else hosts.parse_hosts(given))
    if not args.quiet:
        made = listing.show(folder)
        facts = [
            (one.name, f"{one.path}, until {one.ends:%Y-%m-%d}")
            for one in (made.authority, made.server)
            if one is not None
        ]
        hosts_made = made.server.hosts if made.server is not None else ()
        output.print_facts([*facts, ("hosts", " ".join(hosts_made))])
    return DONE


def add_client(args: argparse.Namespace) -> int:
    """Make a client's folder, and print where it is."""
    check_cryptography()
    from nbdfleece.pki import authority

    made = authority.add_client(Path(args.folder), args.name, args.org)
    if not args.quiet:
        print(made)
    return DONE


def revoke(args: argparse.Namespace) -> int:
    """Revoke a client's certificates."""
    check_cryptography()
    from nbdfleece.pki import authority

    folder = Path(args.folder)
    count = authority.revoke(folder, args.name)
    if not args.quiet:
        done = "is revoked" if count else "was revoked before"
        print(f"{args.name} {done}: {folder / authority.CA_CRL}")
        print("running servers must read that file again; nbdfleece does so at SIGHUP")
    return DONE


def show(args: argparse.Namespace) -> int:
    """Show what is in a folder, and when it expires."""
    check_cryptography()
    from nbdfleece.pki import listing

    found = listing.show(Path(args.folder))
    if args.json:
        output.print_json(_json(found))
    else:
        _print(found)
    return DONE


def _json(found: Listing) -> Json:
    crl = found.revocations
    return {
        "ca": _row(found.authority),
        "server": None if found.server is None else _row(found.server),
        "crl": None
        if crl is None
        else {
            "path": str(crl.path),
            "updated": _time(crl.updated),
            "not-after": None if crl.ends is None else _time(crl.ends),
            "revoked": crl.count,
        },
        "clients": [_row(one) for one in found.clients],
    }


def _row(one: Shown) -> Json:
    return {
        "name": one.name,
        "path": None if one.path is None else str(one.path),
        "subject": one.subject,
        "serial": one.serial,
        "not-before": _time(one.begins),
        "not-after": _time(one.ends),
        "state": one.state,
        "hosts": list(one.hosts),
    }


def _print(found: Listing) -> None:
    rows = [("ca", found.authority)]
    if found.server is not None:
        rows.append(("server", found.server))
    rows += [("client", one) for one in found.clients]
    output.print_table(
        ("KIND", "NAME", "SUBJECT", "EXPIRES", "STATE", "HOSTS"),
        [
            (
                kind,
                output.shown(one.name) if kind == "client" else "-",
                output.shown(one.subject),
                f"{one.ends:%Y-%m-%d}",
                _state(one.state),
                output.shown(" ".join(one.hosts)),
            )
            for kind, one in rows
        ],
    )
    crl = found.revocations
    if crl is None:
        print("no revocation list")
        return
    until = "" if crl.ends is None else f", until {crl.ends:%Y-%m-%d}"
    print(f"revocation list: {crl.count} revoked{until}")


def _state(state: str) -> Cell:
    return state, output.GREEN if state == "ok" else output.RED


def _time(value: datetime) -> str:
    return f"{value:%Y-%m-%dT%H:%M:%SZ}"
