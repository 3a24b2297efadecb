"""`nbdfleece qmp`: one QMP command from the shell, or a prompt with completion and history.

At the prompt a thread reads what the daemon sends: events are shown when they come, above the line
that is being typed, and answers go to the main thread. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError
from nbdfleece.cli import output
from nbdfleece.cli.client import Client, NoDaemon, Row, as_rows
from nbdfleece.cli.exits import DONE, FAILED, complain
from nbdfleece.cli.paths import control_socket, personal_folder

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from nbdfleece.protocol.qmp.values import Json

_PROMPT: Final = "qmp> "
_HISTORY_LINES: Final = 1000
_VALUE_OF: Final = re.compile(r'"([\w-]+)"\s*:\s*"?$')  # the cursor stands where its value goes


class BadLine(ConfigError):
    """What was typed is no command."""


def run(args: argparse.Namespace) -> int:
    """Run one command, or read commands until the end of the input."""
    if args.qmp_command is None:
        with Client(control_socket(args.control)) as client:
            return _converse(client)
    arguments = _object(args.qmp_arguments or "{}")
    with Client(control_socket(args.control)) as client:
        output.print_json(client.execute(args.qmp_command, arguments))
    return DONE


def parse_line(line: str) -> Mapping[str, Json]:
    """Return the request in a line: `COMMAND`, `COMMAND {...}`, or a whole request in JSON.

    Raises:
        BadLine: There is none.
    """
    if line.startswith("{"):
        return _object(line)
    command, _, rest = line.partition(" ")
    return {"execute": command, "arguments": _object(rest or "{}")}


def _object(text: str) -> Mapping[str, Json]:
    try:
        value: Json = json.loads(text)
    except ValueError as error:
        raise BadLine(f"arguments: no JSON: {error}") from error
    except RecursionError as error:
        raise BadLine("arguments: nested too deeply") from error
    if not isinstance(value, Mapping):
        raise BadLine('arguments: must be a JSON object, such as {"name": "value"}')
    return value


# --- the prompt ----------------------------------------------------------------------------------


class _Reader(threading.Thread):
    """Reads what the daemon sends, until the connection ends.

    Attributes:
        answers: To requests; None at last, when the daemon has gone.
    """

    def __init__(self, client: Client) -> None:
        super().__init__(name="qmp-reader", daemon=True)
        self.answers: queue.SimpleQueue[Mapping[str, Json] | None] = queue.SimpleQueue()
        self._client = client

    def run(self) -> None:
        """Read; ends with the connection."""
        with contextlib.suppress(NoDaemon, OSError):
            while True:
                message = self._client.receive()
                if "event" in message:
                    _show_event(message)
                else:
                    self.answers.put(message)
        self.answers.put(None)


def _converse(client: Client) -> int:
    typed_by_person = sys.stdin.isatty()
    if typed_by_person:
        _prepare(Completer(as_rows(client.execute("query-qmp-schema"))))
        print("Ctrl-D leaves; the command quit ends the daemon.", file=sys.stderr)
    reader = _Reader(client)
    reader.start()
    code = DONE
    try:
        while (line := _read_line(typed_by_person)) is not None:
            if not line:
                continue
            if not _do(client, reader, line) and not typed_by_person:
                code = FAILED
    finally:
        client.hang_up()
        reader.join()
        if typed_by_person:
            _save_history()
    return code


def _do(client: Client, reader: _Reader, line: str) -> bool:
    """Carry out a line; tell whether it succeeded.

    Raises:
        NoDaemon: The daemon has gone.
    """
    try:
        request = parse_line(line)
    except BadLine as error:
        complain("qmp", str(error))
        return False
    client.send(request)
    answer = reader.answers.get()
    if answer is None:
        raise client.gone("the daemon closed the connection")
    if "error" in answer:
        error_row = Row(answer["error"])
        complain("qmp", f"{error_row.text('class')}: {output.shown(error_row.text('desc'))}")
        return False
    output.print_json(answer.get("return"))
    sys.stdout.flush()
    return True


def _read_line(typed_by_person: bool) -> str | None:
    try:
        return (input(_PROMPT) if typed_by_person else input()).strip()
    except EOFError:
        if typed_by_person:
            print(file=sys.stderr)
        return None


def _show_event(message: Mapping[str, Json]) -> None:
    stamp = Row(message.get("timestamp"))
    seconds = stamp.number("seconds") + stamp.number("microseconds") / 1e6
    time = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    text = f"{time.replace('+00:00', 'Z')} {message['event']} {json.dumps(message.get('data', {}))}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        print(text, file=sys.stderr, flush=True)
        return
    import readline

    # Over the line that is being typed, which is then written again below.
    print(f"\r\033[K{text}\n{_PROMPT}{readline.get_line_buffer()}", end="", file=sys.stderr)
    sys.stderr.flush()


# --- completion and history ----------------------------------------------------------------------


class Completer:
    """Completes names of commands, of their arguments, and words that an argument may be.

    Args:
        schema: What `query-qmp-schema` gives.
    """

    def __init__(self, schema: list[Row]) -> None:
        self._types = {row.text("name"): row for row in schema}
        self._commands = sorted(
            row.text("name") for row in schema if row.text("meta-type") == "command"
        )

    def candidates(self, before: str, text: str) -> list[str]:
        """Return what `text`, which stands after `before`, may become."""
        command, blank, rest = before.lstrip().partition(" ")
        if not blank:
            found = [name + " " for name in self._commands]
            return [word for word in found if word.startswith(text)]
        members = self._members(command)
        opened = rest.endswith('"')
        if value := _VALUE_OF.search(rest):
            words = self._words(members.get(value[1], ""))
            found = [word + '"' if opened else json.dumps(word) for word in words]
        elif opened:
            found = [name + '": ' for name in members]
        else:
            found = [f'"{name}": ' for name in members]
        return [word for word in found if word.startswith(text)]

    def _members(self, command: str) -> dict[str, str]:
        arguments = self._types.get(self._types.get(command, Row(None)).text("arg-type"), Row(None))
        found = {row.text("name"): row.text("type") for row in arguments.rows("members")}
        for variant in arguments.rows("variants"):
            more = self._types.get(variant.text("type"), Row(None))
            found |= {row.text("name"): row.text("type") for row in more.rows("members")}
        return found

    def _words(self, kind: str) -> list[str]:
        return self._types.get(kind, Row(None)).texts("values")


def _prepare(completer: Completer) -> None:
    import readline

    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            before = readline.get_line_buffer()[: readline.get_begidx()]
            found[:] = completer.candidates(before, text)
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(' \t{}[],:"')
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(_HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(_history_file())


def _save_history() -> None:
    import readline

    path = _history_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Arguments may hold secrets: nobody else is to read them.
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        readline.write_history_file(path)


def _history_file() -> Path:
    return personal_folder(os.environ) / "qmp_history"
