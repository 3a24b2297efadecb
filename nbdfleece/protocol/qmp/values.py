"""JSON values as Python sees them, and how they are written down."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""Any JSON value. Read it through protocol.qmp.schema, which knows what it must be."""


_HALF: Final = re.compile("[\ud800-\udfff]")  # bytes of a file name that are not UTF-8


def encode(value: Json) -> bytes:
    """Return `value` as one line of ASCII JSON, line end included (QMP ends lines with CR LF)."""
    return json.dumps(value).encode("ascii") + b"\r\n"


def encode_shown(value: Json) -> bytes:
    """Return `value` as `encode` does, with U+FFFD, as QEMU has it, in place of what is no text.

    A file name may be any bytes; JSON that has them is refused by those who read it.
    """
    if b"\\ud" in (line := encode(value)):  # half of a pair, or both
        text = json.dumps(value, ensure_ascii=False)
        return encode(json.loads(_HALF.sub("\ufffd", text)))
    return line
