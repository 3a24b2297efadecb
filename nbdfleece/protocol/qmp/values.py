"""JSON values as Python sees them, and how they are written down."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""Any JSON value. Read it through protocol.qmp.schema, which knows what it must be."""


# Bytes of a file name that are not UTF-8, and what no reader of JSON need take.
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")


def encode(value: Json) -> bytes:
    """Return `value` as one line of ASCII JSON, line end included (QMP ends lines with CR LF)."""
    return json.dumps(value).encode("ascii") + b"\r\n"


def encode_shown(value: Json) -> bytes:
    """Return `value` as `encode` does, with U+FFFD, as QEMU has it, in place of what is no text.

    A file name may be any bytes; JSON that has them is refused by those who read it.
    """
    line = encode(value)
    return encode(_shown(value)) if b"\\u" in line else line


def _shown(value: Json) -> Json:
    if isinstance(value, str):
        return _NO_TEXT.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_NO_TEXT.sub("\ufffd", name): _shown(member) for name, member in value.items()}
    return [_shown(member) for member in value] if isinstance(value, Sequence) else value
