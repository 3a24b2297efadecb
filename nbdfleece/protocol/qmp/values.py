"""JSON values as Python sees them, and the one way to write them down."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""Any JSON value. Read it through protocol.qmp.schema, which knows what it must be."""


def encode(value: Json) -> bytes:
    """Return `value` as one line of ASCII JSON, line end included (QMP ends lines with CR LF)."""
    return json.dumps(value).encode("ascii") + b"\r\n"
