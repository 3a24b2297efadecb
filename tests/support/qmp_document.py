"""docs/qmp.md, made from the commands' own declarations.

    python -m tests.support.qmp_document

writes it anew; tests/control/test_qmp_document.py fails when that was forgotten.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

from nbdfleece.control.command import Command
from nbdfleece.control.commands import COMMANDS
from nbdfleece.control.event_table import EVENTS
from nbdfleece.protocol.qmp.schema import (
    Alternate,
    Anything,
    Array,
    Boolean,
    Enum,
    Integer,
    Later,
    Null,
    Number,
    String,
    Struct,
    Type,
    Union,
)
from tests.support.qmp_conversation import DEFECTS, DIFFERENCES
from tests.support.qmp_table import TABLE_DEFECTS, TABLE_DIFFERENCES
from tests.support.qmp_transactions import TRANSACTION_DEFECTS, TRANSACTION_DIFFERENCES

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "qmp.md"

_HEAD = """\
# QMP

The control socket of the daemon speaks QMP, QEMU's protocol: JSON objects, in requests
`{"execute": COMMAND, "arguments": {...}, "id": ANYTHING}`, each answered by `{"return": ...}` or
`{"error": {"class": ..., "desc": ...}}` with the same `id`. The first command of a connection must
be `qmp_capabilities`. Events come in between, with the time at which they happened. Up to 64
programs may be connected; one that does not read loses its oldest events and delays nobody.

```console run-by="tests/test_documents.py, with a daemon"
$ nbdfleece qmp query-version
$ nbdfleece qmp fleece-snapshot-create '{"disks": ["vda"]}'
$ nbdfleece qmp
```

runs one command, another one, and a prompt with completion, where events are shown as they come.
`query-qmp-schema` describes all that is below for programs, in QEMU's format.

This document is made from the declarations in the code: `python -m tests.support.qmp_document`.
"""


def document() -> str:
    """Return the text of docs/qmp.md."""
    lines = [_HEAD, "## Commands", ""]
    for name in sorted(COMMANDS):
        lines += _command(COMMANDS[name])
    lines += ["## Events", ""]
    for name in sorted(EVENTS):
        lines += [f"### {name}", "", *_members(EVENTS[name], 0), ""]
    lines += ["## Where answers are not those of qemu-storage-daemon 7.2", ""]
    lines += ["tests/interop/test_qmp_conversation.py holds all else to it.", ""]
    for difference in DIFFERENCES + TRANSACTION_DIFFERENCES + TABLE_DIFFERENCES:
        lines += [
            f"- **{difference.request}**",
            f"  - qemu-storage-daemon: {difference.reference}",
            f"  - nbdfleece: {difference.ours}",
            f"  - because: {difference.reason}",
        ]
    lines += ["", "These are faults of qemu-storage-daemon 7.2 that we do not have:", ""]
    for defect in DEFECTS + TRANSACTION_DEFECTS + TABLE_DEFECTS:
        lines += [
            f"- **{defect.title}**",
            f"  - qemu-storage-daemon: {defect.reference}",
            f"  - nbdfleece: {defect.ours}",
        ]
    return "\n".join(lines) + "\n"


def _command(command: Command) -> Iterator[str]:
    yield f"### {command.name}"
    yield ""
    run = command.run.func if isinstance(command.run, functools.partial) else command.run
    text = inspect.getdoc(run)
    if text:
        yield text.partition("\n\n")[0].replace("\n", " ")
        yield ""
    if command.features:
        yield f"Marked {', '.join(command.features)}."
        yield ""
    members = list(_members(command.arguments, 0))
    if members:
        yield from members
        yield ""


def _members(kind: Type, depth: int) -> Iterator[str]:
    """Lines for the members of an object."""
    indent = "  " * depth
    if isinstance(kind, Union):
        yield f"{indent}- `{kind.tag}`: {_words(tuple(kind.variants))}"
        yield from _members(kind.base, depth)
        for word, variant in kind.variants.items():
            if variant.required or variant.optional:
                yield f"{indent}- with `{kind.tag}` `{word}`:"
                yield from _members(variant, depth + 1)
    elif isinstance(kind, Struct):
        for name, member in kind.required.items():
            yield from _member(name, member, "", depth)
        for name, member in kind.optional.items():
            yield from _member(name, member, ", optional", depth)


def _member(name: str, kind: Type, optional: str, depth: int) -> Iterator[str]:
    yield f"{'  ' * depth}- `{name}`{optional}: {_words_of(kind)}"
    inner = kind
    while isinstance(inner, Array):
        inner = inner.item
    if isinstance(inner, Struct | Union):
        yield from _members(inner, depth + 1)


def _words(words: tuple[str, ...]) -> str:
    return " \\| ".join(f"`{word}`" for word in words)


def _words_of(kind: Type) -> str:
    if isinstance(kind, Enum):
        return _words(kind.words)
    if isinstance(kind, Array):
        return f"list of {_words_of(kind.item)}"
    if isinstance(kind, Alternate):
        return f"{kind.name}: " + " or ".join(_words_of(choice) for choice in kind.choices)
    if isinstance(kind, Later):
        made = kind.make()
        return "object" if isinstance(made, Struct | Union) else _words_of(made)
    simple: dict[type, str] = {
        String: "string",
        Integer: "integer",
        Number: "number",
        Boolean: "boolean",
        Null: "null",
        Anything: "any value",
        Struct: "object",
        Union: "object",
    }
    return simple[type(kind)]


if __name__ == "__main__":
    PATH.write_text(document())
