"""The parser of the command line, one function for each group of commands."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias, TypeVar

from nbdfleece.base.errors import ConfigError, NbdfleeceError
from nbdfleece.base.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Commands: TypeAlias = argparse._SubParsersAction["Parser"]  # noqa: SLF001 - has no public name

T = TypeVar("T")


class UsageError(NbdfleeceError):
    """The command line makes no sense. `command` is as far as it was understood."""

    def __init__(self, command: str, text: str) -> None:
        super().__init__(text)
        self.command = command


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError where argparse prints and exits."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(self.prog, _plain(message))


_NO_COMMAND: Final = re.compile(
    r"argument (?:SUB)?COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL
)
_ARGUMENTS_MISSING: Final = "the following arguments are required: "


def _plain(message: str) -> str:
    """Return what argparse says in words for people."""
    found = _NO_COMMAND.fullmatch(message)
    if found is not None:
        commands = [name.strip("' ") for name in found[2].split(",")]
        close = difflib.get_close_matches(found[1], commands, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(commands)}"
        return f"there is no '{found[1]}'; {hint}"
    if message.startswith(_ARGUMENTS_MISSING):
        return f"missing: {message.removeprefix(_ARGUMENTS_MISSING)}"
    return message


# Commands with a name and no code yet: refused in one line.
NOT_BUILT: Final = frozenset(
    {
        ("snapshot", "reset"),
        ("clone",),
        ("rollback",),
        ("check",),
    }
)

# Likewise options, by command: (name, whether it takes a value).
_SERVE_LATER: Final = (("--metrics", True),)
_CREATE_LATER: Final = (("--expire", True),)


def build_parser(version: str) -> Parser:
    """Return the parser of the whole command line; `command` names what was chosen."""
    parser = Parser(
        prog="nbdfleece",
        description="Serve disks over NBD, and read them as they were at one instant.",
        epilog="example: nbdfleece serve vda=/srv/vm/disk.raw",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nbdfleece {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_disk(commands)
    _add_snapshot(commands)
    _add_bitmap(commands)
    _add_backup(commands)
    _add_restore(commands)
    _add_status(commands)
    _add_map(commands)
    _add_client(commands)
    _add_qmp(commands)
    _add_pki(commands)
    _add_completion(commands)
    # Only for the list of commands: its options are read by cli.storage_daemon.
    commands.add_parser(
        "storage-daemon", help="serve what qemu-storage-daemon's options say", add_help=False
    )
    return parser


def _add(commands: _Commands, name: str, text: str, example: str) -> Parser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: nbdfleece {example}",
        allow_abbrev=False,
    )


def _add_serve(commands: _Commands) -> None:
    parser = _add(
        commands,
        "serve",
        "serve disks to NBD clients, and wait for commands",
        "serve --listen unix:/run/nbdfleece/nbd.sock vda=/srv/vm/disk.raw",
    )
    parser.set_defaults(command="serve")
    parser.add_argument(
        "disks",
        nargs="*",
        metavar="DISK",
        help="[NAME=]LOCATION[,key=value...]; LOCATION is a file, a block device, or the URI of "
        "another NBD server's export (nbd://HOST/EXPORT, nbds://..., "
        "nbd+unix:///EXPORT?socket=PATH); keys: format=raw|qcow2, read-only=on|off, "
        "discard=unmap|ignore, cache=writeback|none, locking=on|off, and for another server "
        "reconnect-delay=TIME, open-timeout=TIME",
    )
    text = _Adder(parser)
    text(
        "--listen",
        "unix:PATH, tcp:HOST:PORT, vsock:CID:PORT or fd:N, with ,tls=off|allow|require behind it "
        "if wanted; repeatable",
        "ADDRESS",
        repeat=True,
    )
    text("--control", "control socket", "PATH")
    text("--state-dir", "folder for what outlives the daemon", "DIR")
    text("--temp-dir", "folder for old data (default: in the state folder)", "DIR")
    text("--pid-file", "file for the process id", "PATH")
    text("--config", "TOML file with the same names; the command line wins", "FILE")
    text(
        "--tls-creds",
        "folder with ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem; or with "
        "keys.psk",
        "DIR",
    )
    parser.add_argument(
        "--tls-verify-peer",
        choices=("on", "off"),
        help="whether clients must show a certificate of that authority (default: on)",
    )
    text("--policy", "TOML or JSON file that says who may do what; without it, all may", "FILE")
    _add_serve_limits(parser)
    _switch(parser, "--print-uri", "print nothing but URIs when ready")
    _switch(parser, "--allow-insecure", "listen without TLS on addresses that are not loopback")
    _switch(parser, "--check-config", "say what is wrong with the configuration, and stop")
    _add_verbosity(parser)
    _add_later(parser, _SERVE_LATER)


def _add_serve_limits(parser: Parser) -> None:
    text = _Adder(parser)
    text("--max-connections", "NBD clients at a time; 0: no limit", "N", kind=_count)
    text("--max-connections-per-export", "of those, of one export", "N", kind=_count)
    text(
        "--max-connections-per-identity",
        "of those, with one certificate subject, key, or local user",
        "N",
        kind=_count,
    )
    text("--max-connections-per-address", "of those, from one address", "N", kind=_count)
    text("--max-requests", "requests that one client may have in flight", "N", kind=_count)
    text("--max-request-bytes", "and the memory of their payloads", "SIZE", kind=_size)
    text("--handshake-timeout", "for a client to choose an export", "SECONDS", kind=_seconds)
    text("--idle-timeout", "without a request, then disconnect; 0: never", "SECONDS", kind=_seconds)
    text("--write-stall-timeout", "for a client to take any of a reply", "SECONDS", kind=_seconds)
    text("--drain-timeout", "for requests to end at shutdown", "SECONDS", kind=_seconds)
    parser.add_argument(
        "--extended-headers",
        choices=("on", "off"),
        help="whether clients may use 64-bit requests (default: on)",
    )


def _add_disk(commands: _Commands) -> None:
    group = _add(
        commands, "disk", "serve more disks, or fewer, at run time", "disk list"
    ).add_subparsers(metavar="SUBCOMMAND", required=True)
    add = _add(
        group,
        "add",
        "serve one more disk, and print NAME URI",
        "disk add vdb=/srv/vm/data.raw,discard=ignore",
    )
    add.set_defaults(command="disk add")
    add.add_argument(
        "disk",
        metavar="DISK",
        help="[NAME=]LOCATION[,key=value...], as for serve",
    )
    _add_common(add)
    remove = _add(group, "remove", "serve a disk no more", "disk remove vdb")
    remove.set_defaults(command="disk remove")
    remove.add_argument("disk", metavar="NAME", help="name of a disk")
    _switch(remove, "--force", "also under its clients, and with its snapshots")
    _add_common(remove, json=False)
    listing = _add(group, "list", "list the disks", "disk list --json")
    listing.set_defaults(command="disk list")
    _add_common(listing, quiet="print names only")


def _add_map(commands: _Commands) -> None:
    parser = _add(
        commands,
        "map",
        "show what a disk or a snapshot holds where",
        "map vda@nightly --svg nightly.svg",
    )
    parser.set_defaults(command="map")
    parser.add_argument("export", metavar="DISK|DISK@NAME", help="a disk, or a snapshot of it")
    text = _Adder(parser)
    text("--bitmap", "show too what is dirty in this bitmap of the disk", "NAME")
    text("--svg", "draw it into a file, and print nothing", "FILE")
    _add_common(parser)


def _add_completion(commands: _Commands) -> None:
    parser = _add(
        commands,
        "completion",
        "print what makes a shell complete nbdfleece's commands",
        "completion bash > /etc/bash_completion.d/nbdfleece",
    )
    parser.set_defaults(command="completion")
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "fish"),
        metavar="bash|zsh|fish",
        help="which shell",
    )
    _add_verbosity(parser)


def _add_snapshot(commands: _Commands) -> None:
    group = _add(
        commands, "snapshot", "take, look at and delete snapshots", "snapshot create vda vdb"
    ).add_subparsers(metavar="SUBCOMMAND", required=True)
    create = _add(
        group,
        "create",
        "take the point in time of some disks, the same for all, and print DISK@NAME URI",
        "snapshot create vda vdb --name nightly --temp-limit 20G",
    )
    create.set_defaults(command="snapshot create")
    create.add_argument("disks", nargs="+", metavar="DISK", help="name of a disk")
    text = _Adder(create)
    text("--name", "name of the snapshot (default: the time)", "NAME")
    text("--temp-limit", "most old data that may be kept", "SIZE", kind=_size)
    create.add_argument(
        "--on-error",
        choices=("break-snapshot", "break-guest-write"),
        help="what gives way when old data cannot be kept (default: break-snapshot)",
    )
    text("--bitmap", "freeze this bitmap at the instant, or start it", "NAME")
    text("--timeout", "most that a guest write waits for old data", "SECONDS", kind=_seconds)
    text(
        "--token",
        "print a secret URI that opens the snapshot for so long, without any identity",
        "DURATION",
        kind=_seconds,
    )
    _switch(
        create, "--internal", "inside the disk's qcow2 image, where it stays until it is deleted"
    )
    _add_hooks(create)
    create.add_argument("--durability", choices=("process", "power"), help="what it outlives")
    _add_common(create)
    _add_later(create, _CREATE_LATER)
    listing = _add(group, "list", "list the snapshots", "snapshot list vda")
    listing.set_defaults(command="snapshot list")
    listing.add_argument("disk", nargs="?", metavar="DISK", help="of this disk alone")
    _add_common(listing, quiet="print DISK@NAME only")
    show = _add(
        group, "show", "show all there is to say of a snapshot", "snapshot show vda@nightly"
    )
    show.set_defaults(command="snapshot show")
    show.add_argument("snapshot", metavar="DISK@NAME", help="which one")
    _add_common(show)
    delete = _add(group, "delete", "delete snapshots", "snapshot delete vda@nightly vdb@nightly")
    delete.set_defaults(command="snapshot delete")
    delete.add_argument("snapshots", nargs="+", metavar="DISK@NAME", help="which ones")
    _switch(delete, "--force", "also while they are being read")
    outcome = delete.add_mutually_exclusive_group()
    outcome.add_argument(
        "--success",
        action="store_true",
        help="they have been copied: of their bitmaps, what has changed since stays dirty",
    )
    outcome.add_argument(
        "--failed", action="store_true", help="their bitmaps forget nothing (the default)"
    )
    _add_common(delete, json=False)


def _add_bitmap(commands: _Commands) -> None:
    group = _add(
        commands, "bitmap", "keep dirty bitmaps: what has been written", "bitmap list vda"
    ).add_subparsers(metavar="SUBCOMMAND", required=True)
    for name, text, example in (
        ("add", "begin to record what is written to a disk", "bitmap add vda nightly"),
        ("remove", "forget a bitmap", "bitmap remove vda nightly"),
        ("clear", "forget what a bitmap has recorded so far", "bitmap clear vda nightly"),
    ):
        parser = _add(group, name, text, example)
        parser.set_defaults(command=f"bitmap {name}")
        parser.add_argument("disk", metavar="DISK", help="name of a disk")
        parser.add_argument("name", metavar="NAME", help="name of the bitmap")
        if name == "add":
            _Adder(parser)(
                "--granularity", "bytes per bit, 512 to 2G (default: 64K)", "SIZE", kind=_size
            )
        _add_common(parser, json=False)
    listing = _add(group, "list", "list the bitmaps", "bitmap list vda")
    listing.set_defaults(command="bitmap list")
    listing.add_argument("disk", nargs="?", metavar="DISK", help="of this disk alone")
    _add_common(listing)


def _add_hooks(parser: Parser) -> None:
    text = _Adder(parser)
    text("--pre", "shell command before the instant, as to freeze a guest; it must succeed", "CMD")
    text("--post", "shell command right behind the instant; it runs whatever happened", "CMD")
    text(
        "--hook-timeout",
        "for each of them, and for the instant between them (default: 10)",
        "SECONDS",
        kind=_seconds,
    )


def _add_backup(commands: _Commands) -> None:
    group = _add(
        commands,
        "backup",
        "back up disks into a folder, and look after that",
        "backup create vda vdb --to /srv/backup",
    ).add_subparsers(metavar="SUBCOMMAND", required=True)
    create = _add(
        group,
        "create",
        "back up disks, all at one instant: what has changed, or all the first time",
        "backup create vda vdb --to /srv/backup --keep-daily 7 --keep-weekly 4",
    )
    create.set_defaults(command="backup create")
    create.add_argument("disks", nargs="+", metavar="DISK", help="name of a disk")
    text = _Adder(create)
    text("--to", "folder, on the daemon's machine", "DIR")
    _switch(create, "--stdout", "write one disk to stdout, raw, for another backup program")
    _switch(create, "--full", "make a full file, even if an increment would do")
    _switch(create, "--compress", "compress the data")
    text("--rate", "read at most so many bytes per second", "SIZE", kind=_size)
    _switch(create, "--discard", "give temporary space back as soon as it has been read")
    _add_hooks(create)
    _add_keep(create)
    _add_common(create)
    listing = _add(group, "list", "list the points in time of a folder", "backup list /srv/backup")
    listing.set_defaults(command="backup list")
    verify = _add(
        group,
        "verify",
        "look whether every point can be restored",
        "backup verify /srv/backup --data",
    )
    verify.set_defaults(command="backup verify")
    _switch(verify, "--data", "read all the files, and compare them with their hashes")
    prune = _add(
        group,
        "prune",
        "give up old points; the ones that stay keep their content",
        "backup prune /srv/backup --keep-last 3 --keep-daily 7 --keep-weekly 4",
    )
    prune.set_defaults(command="backup prune")
    _switch(prune, "--dry-run", "say what would be removed, and do nothing")
    _add_keep(prune)
    for parser in (listing, verify, prune):
        parser.add_argument("folder", metavar="DIR[/DISK]", help="of backups, or of one disk's")
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")
        _add_verbosity(parser)


def _add_keep(parser: Parser) -> None:
    text = _Adder(parser)
    text("--keep-last", "keep the newest N points", "N", kind=_count)
    for period in ("hour", "day", "week", "month", "year"):
        name = "daily" if period == "day" else f"{period}ly"
        text(f"--keep-{name}", f"keep the newest point of the last N {period}s", "N", kind=_count)


def _add_restore(commands: _Commands) -> None:
    parser = _add(
        commands,
        "restore",
        "write a point in time of a backup to a file, block device or NBD export",
        "restore /srv/backup/vda@20261127T031644Z /srv/vm/disk.raw",
    )
    parser.set_defaults(command="restore")
    parser.add_argument(
        "source",
        metavar="DIR[/DISK][@INSTANT]",
        help="the disk may be left out if there is one; the newest point unless INSTANT is given",
    )
    parser.add_argument("destination", metavar="DEST", help="path, or NBD URI")
    _switch(parser, "--force", "overwrite what is there")
    _switch(parser, "--verify", "fail unless all that is read is what was written")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    _add_verbosity(parser)


def _add_status(commands: _Commands) -> None:
    status = _add(
        commands,
        "status",
        "show the daemon, its disks, snapshots, clients and temporary space",
        "status --watch",
    )
    status.set_defaults(command="status")
    _switch(status, "--watch", "draw it again every two seconds")
    _add_common(status)
    health = _add(
        commands, "health", "tell, by the exit code, whether all is well", "health && echo well"
    )
    health.set_defaults(command="health")
    _add_common(health, json=False)


def _add_pki(commands: _Commands) -> None:
    group = _add(
        commands, "pki", "make certificates for TLS", "pki init /etc/nbdfleece/tls"
    ).add_subparsers(metavar="SUBCOMMAND", required=True)
    init = _add(
        group,
        "init",
        "make an authority and a server's certificate (serve with --tls-creds DIR)",
        "pki init /etc/nbdfleece/tls --host disks.example.org --host 192.0.2.7",
    )
    init.set_defaults(command="pki init")
    init.add_argument("folder", metavar="DIR", help="made if it is not there")
    init.add_argument(
        "--host",
        dest="hosts",
        action="append",
        metavar="NAME-OR-ADDRESS",
        help="what clients call the server; repeatable (default: this machine's names, loopback)",
    )
    client = _add(
        group,
        "client",
        "make the folder of a client, DIR/clients/NAME, and print where it is",
        "pki client /etc/nbdfleece/tls backup1 --org Example",
    )
    client.set_defaults(command="pki client")
    client.add_argument("folder", metavar="DIR", help="folder of the authority")
    client.add_argument("name", metavar="NAME", help="its common name, and the folder's")
    client.add_argument("--org", metavar="ORG", help="its organization")
    revoke = _add(
        group,
        "revoke",
        "let no server take a client's certificates any more",
        "pki revoke /etc/nbdfleece/tls backup1",
    )
    revoke.set_defaults(command="pki revoke")
    revoke.add_argument("folder", metavar="DIR", help="folder of the authority")
    revoke.add_argument("name", metavar="NAME", help="of the client")
    show = _add(
        group,
        "show",
        "show which certificates there are and when they expire",
        "pki show /etc/nbdfleece/tls",
    )
    show.set_defaults(command="pki show")
    show.add_argument("folder", metavar="DIR", help="folder of the authority")
    show.add_argument("--json", action="store_true", help="print JSON, for programs")
    for parser in (init, client, revoke, show):
        _add_verbosity(parser)


def _add_client(commands: _Commands) -> None:
    group = _add(
        commands, "client", "look at NBD clients, and turn them out", "client list"
    ).add_subparsers(metavar="SUBCOMMAND", required=True)
    listing = _add(group, "list", "list who is connected", "client list --json")
    listing.set_defaults(command="client list")
    _add_common(listing)
    kick = _add(group, "kick", "disconnect a client at once; it may come back", "client kick 7")
    kick.set_defaults(command="client kick")
    kick.add_argument("id", metavar="ID", type=_count, help="its number in `client list`")
    _add_common(kick, json=False)


def _add_qmp(commands: _Commands) -> None:
    parser = _add(
        commands,
        "qmp",
        "run one QMP command, or give a prompt for them",
        """qmp fleece-snapshot-delete '{"disk": "vda", "snapshot": "monday"}'""",
    )
    parser.set_defaults(command="qmp")
    parser.add_argument(
        "qmp_command", metavar="COMMAND", nargs="?", help="of those in docs/qmp.md; none: a prompt"
    )
    parser.add_argument("qmp_arguments", metavar="JSON", nargs="?", help="its arguments")
    _add_common(parser, json=False)


class _Adder:
    """Adds options with a value to one parser; None is the value of those that are not given."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def __call__(
        self,
        name: str,
        text: str,
        metavar: str,
        *,
        kind: Callable[[str], object] = str,
        repeat: bool = False,
    ) -> None:
        action = "append" if repeat else "store"
        self._parser.add_argument(name, metavar=metavar, help=text, type=kind, action=action)


def _switch(parser: Parser, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", default=None, help=text)


def _add_common(parser: Parser, *, json: bool = True, quiet: str = "say less") -> None:
    parser.add_argument("--control", metavar="PATH", help="control socket of the daemon")
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    _add_verbosity(parser, quiet)


def _add_verbosity(parser: Parser, quiet: str = "say less") -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true", help="say more")
    group.add_argument("-q", "--quiet", action="store_true", help=quiet)


class _Later(argparse.Action):
    """Refuses an option that has a name and no code yet."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Refuse."""
        parser.error(f"{option_string} is not built yet")


def _add_later(parser: Parser, options: Sequence[tuple[str, bool]]) -> None:
    for name, has_value in options:
        parser.add_argument(
            name, action=_Later, nargs=None if has_value else 0, help=argparse.SUPPRESS
        )


def _size(text: str) -> int:
    return _parsed(parse_size, text)


def _seconds(text: str) -> float:
    return _parsed(parse_duration, text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return int(text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
