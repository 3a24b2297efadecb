"""Entry point of the command line."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.base.errors import NbdfleeceError
from nbdfleece.cli import (
    backup,
    bitmaps,
    clients,
    completion,
    disks,
    map,  # noqa: A004 - a command's name
    pki,
    qmp,
    serve,
    snapshot,
    status,
    storage_daemon,
)
from nbdfleece.cli.arguments import NOT_BUILT, UsageError, build_parser
from nbdfleece.cli.exits import FAILED, USAGE, code_of, complain

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "serve": serve.run,
    "snapshot create": snapshot.create,
    "snapshot list": snapshot.list_all,
    "snapshot show": snapshot.show,
    "snapshot delete": snapshot.delete,
    "bitmap add": bitmaps.add,
    "bitmap remove": bitmaps.remove,
    "bitmap clear": bitmaps.clear,
    "bitmap list": bitmaps.list_all,
    "backup create": backup.create,
    "backup list": backup.list_all,
    "backup verify": backup.verify,
    "backup prune": backup.prune,
    "restore": backup.restore,
    "disk add": disks.add,
    "disk remove": disks.remove,
    "disk list": disks.list_all,
    "status": status.status,
    "map": map.run,
    "completion": completion.run,
    "client list": clients.list_all,
    "client kick": clients.kick,
    "health": status.health,
    "qmp": qmp.run,
    "pki init": pki.init,
    "pki client": pki.add_client,
    "pki revoke": pki.revoke,
    "pki show": pki.show,
}


_ALONE: Final = frozenset({"-h", "--help", "--version"})  # without a command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    _open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    for name in (tuple(words[:1]), tuple(words[:2])):
        if name in NOT_BUILT:
            complain(" ".join(name), "not built yet")
            return USAGE
    what = " ".join(words[:1])
    try:
        if what == storage_daemon.NAME:
            return storage_daemon.run(words[1:])
        _check_first(what)
        args = build_parser(__version__).parse_args(words)
        what = args.command
        code = _COMMANDS[what](args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        complain(_without_program(error.command), f"{error} (see {error.command} --help)")
        return USAGE
    except NbdfleeceError as error:
        complain(what, str(error))
        return code_of(error)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whoever read our output has had enough
            place = "" if error.filename is None else f"'{error.filename}': "
            complain(what, f"{place}{error.strerror or error}")
        _give_up_unwritten()
        return FAILED
    except KeyboardInterrupt:
        return 130


def _open_standard_streams() -> None:
    """Let nothing else take the place of a standard stream that we were started without.

    A disk could get its descriptor, and then, whatever is said on stderr.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest descriptor that is free: this one
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def _give_up_unwritten() -> None:
    """Lose output that cannot be written, without complaints of the interpreter at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_first(word: str) -> None:
    """Refuse an option of a command before it, whose value argparse would take for the command."""
    if word.startswith("-") and word not in _ALONE:
        raise UsageError("nbdfleece", f"the command comes first: nbdfleece COMMAND {word}")


def _without_program(command: str) -> str:
    return command.removeprefix("nbdfleece").strip() or "command line"
