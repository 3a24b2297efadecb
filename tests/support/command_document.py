"""docs/commands.md and docs/man/nbdfleece.1, made from the parser of the command line.

    python -m tests.support.command_document

writes them anew; tests/cli/test_command_document.py fails when that was forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nbdfleece import __version__
from nbdfleece.cli import exits, grammar
from nbdfleece.cli.arguments import build_parser
from nbdfleece.cli.grammar import Command, Option

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"

EXITS = (
    (exits.DONE, "done"),
    (exits.FAILED, "the operation failed"),
    (exits.USAGE, "wrong usage or configuration"),
    (exits.NO_DAEMON, "no daemon at the control socket"),
    (exits.REFUSED, "refused: not allowed, in use, or it would overwrite something"),
    (exits.NOT_FOUND, "not found"),
    (exits.BROKEN, "the snapshot is broken"),
    (exits.PARTLY, "partly done: some disks or snapshots of several"),
)

ENVIRONMENT = (
    ("NBDFLEECE_CONTROL", "control socket where --control is not given"),
    ("XDG_RUNTIME_DIR", "folder of nbdfleece/control.sock and nbdfleece/nbd.sock; not for root"),
    ("XDG_STATE_HOME", "folder of nbdfleece/, the state folder; not for root"),
    ("NO_COLOR", "no colours, whatever it is set to"),
    ("LISTEN_FDS", "sockets handed over by a service manager; sd_listen_fds(3)"),
    ("NOTIFY_SOCKET", "where readiness and life are told; sd_notify(3)"),
    ("WATCHDOG_USEC", "how often the service manager wants to hear of us; sd_watchdog_enabled(3)"),
)

FILES = (
    ("/run/nbdfleece/control.sock", "control socket of root's daemon"),
    ("/run/nbdfleece/nbd.sock", "its NBD socket, unless --listen says otherwise"),
    ("/var/lib/nbdfleece", "its state folder"),
)

NOTES = (
    "A size is a number of bytes, or a number with K, M, G or T, in powers of 1024. "
    "A duration is a number of seconds, or a number with s, m, h or d.",
    "Results go to stdout and everything else to stderr. An error is one line, "
    "`nbdfleece: COMMAND: WHY`.",
)


def program() -> Command:
    """The whole command line."""
    return grammar.read(build_parser(__version__))


def commands() -> list[Command]:
    """What can be run, without groups; `storage-daemon` reads its own options."""
    return [command for command in program().walk() if command.path and not command.commands]


def _told(command: Command) -> list[Option]:
    """The options of a command but `--help`, which all have."""
    return [option for option in command.options if "--help" not in option.names]


def synopsis(command: Command) -> str:
    """`nbdfleece snapshot create [OPTION]... DISK...`"""
    words = ["nbdfleece", *command.path]
    if command.options:
        words.append("[OPTION]...")
    return " ".join([*words, *(argument.usage for argument in command.arguments)])


# --- Markdown ------------------------------------------------------------------------------------

_MARKDOWN_HEAD = """\
# The command line

`nbdfleece COMMAND --help` says what is here; `man nbdfleece` and `nbdfleece completion` too. All
of it is made from the same source: `python -m tests.support.command_document`.
"""


def markdown() -> str:
    """Return the text of docs/commands.md."""
    lines = [_MARKDOWN_HEAD, "| command | does |", "|---|---|"]
    for command in commands():
        name = " ".join(command.path)
        lines.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(command.summary)} |")
    lines += ["", *[line for note in NOTES for line in (note, "")]]
    for command in commands():
        lines += [*_markdown_command(command), ""]
    lines += ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXITS]
    lines += ["", "## Environment", "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT]
    lines += ["", "## Files", "", "| path | what it is |", "|---|---|"]
    lines += [f"| `{path}` | {meaning} |" for path, meaning in FILES]
    return "\n".join(lines) + "\n"


def _markdown_command(command: Command) -> Iterator[str]:
    yield f"## {' '.join(command.path)}"
    yield ""
    yield command.text or f"{command.summary[:1].upper()}{command.summary[1:]}."
    yield ""
    yield f"    {synopsis(command)}"
    if command.arguments or _told(command):
        yield ""
        yield "| | |"
        yield "|---|---|"
    for argument in command.arguments:
        yield f"| `{_cell(argument.usage)}` | {_cell(argument.text)} |"
    for option in _told(command):
        repeat = "; repeatable" if option.repeats and "repeatable" not in option.text else ""
        yield f"| `{_cell(option.usage)}` | {_cell(option.text)}{repeat} |"
    if command.example:
        yield ""
        yield f"Example: `{command.example}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the manual page -----------------------------------------------------------------------------


def manual() -> str:
    """Return the text of docs/man/nbdfleece.1."""
    lines = [
        f'.TH NBDFLEECE 1 "" "nbdfleece {__version__}" "User Commands"',
        ".SH NAME",
        "nbdfleece \\- NBD server whose disks are read as they were at one instant",
        ".SH SYNOPSIS",
        ".B nbdfleece",
        ".I COMMAND",
        "[\\fISUBCOMMAND\\fR] [\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...",
        ".SH DESCRIPTION",
        _roff(program().text),
        "Only writes that pass through its live exports are seen: whoever writes to a disk beside "
        "the daemon changes the points in time that are being read.",
    ]
    for note in NOTES:
        lines += [".PP", _roff(note.replace("`", ""))]
    lines.append(".SH COMMANDS")
    for command in commands():
        lines += _manual_command(command)
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXITS:
        lines += [".TP", f".B {code}", _roff(meaning)]
    for heading, rows in (("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
        lines.append(f".SH {heading}")
        for name, meaning in rows:
            lines += [".TP", f".B {_roff(name)}", _roff(meaning)]
    lines += [".SH SEE ALSO", ".BR nbdcopy (1),", ".BR qemu-img (1),", ".BR nbd-client (8)"]
    return "\n".join(lines) + "\n"


def _manual_command(command: Command) -> Iterator[str]:
    yield f".SS {_roff(synopsis(command))}"
    yield _roff(command.text or f"{command.summary[:1].upper()}{command.summary[1:]}.")
    for argument in command.arguments:
        yield from (".TP", f".I {_roff(argument.usage)}", _roff(argument.text))
    for option in _told(command):
        names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in option.names)
        value = f" \\fI{_roff(option.value)}\\fR" if option.value else ""
        yield from (".TP", names + value, _roff(option.text))
    if command.example:
        yield from (".PP", "Example:", ".PP", ".nf", f".RS\n{_roff(command.example)}\n.RE", ".fi")


def _roff(text: str) -> str:
    """Return `text` so that roff takes none of it for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text


DOCUMENTS = (("commands.md", markdown), ("man/nbdfleece.1", manual))

if __name__ == "__main__":
    for name, make in DOCUMENTS:
        (DOCS / name).write_text(make())
