"""Names of the files of a backup.

A point is called by its instant, `YYYYmmddTHHMMSSZ`, in UTC. A second point of the same second has
`_2` behind that, which sorts behind the ending of the first; so names sort by time.
"""

from __future__ import annotations

import enum
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Container

MANIFEST: Final = "manifest.json"
PARTIAL: Final = ".partial"
LOCK: Final = ".lock"

_POINT: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z(?:_[1-9][0-9]*)?")
_FILE: Final = re.compile(r"([^.]+)\.(full|inc)\.qcow2")
_DISK: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_FORM: Final = "%Y%m%dT%H%M%SZ"


class Kind(enum.Enum):
    """What a file holds; values as in its name."""

    FULL = "full"
    INCREMENT = "inc"


def is_point(text: str) -> bool:
    """Tell whether a point may be called so."""
    return _POINT.fullmatch(text) is not None


def is_disk(text: str) -> bool:
    """Tell whether a disk may be called so."""
    return _DISK.fullmatch(text) is not None


def point_name(instant: str, taken: Container[str]) -> str:
    """Return the name of a new point.

    Args:
        instant: RFC 3339.
        taken: Names that there are already.
    """
    base = datetime.fromisoformat(instant).astimezone(UTC).strftime(_FORM)
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def file_name(point: str, kind: Kind) -> str:
    """Return the name of a point's file, once that is finished."""
    return f"{point}.{kind.value}.qcow2"


def parse_file_name(name: str) -> tuple[str, Kind] | None:
    """Return (point, kind) of a finished file's name; None: it is no such name."""
    match = _FILE.fullmatch(name)
    if match is None or not is_point(match[1]):
        return None
    return match[1], Kind(match[2])


def time_prefix(text: str) -> str:
    """Return what the names of the points begin with that somebody means by `text`.

    Args:
        text: A point's name or the beginning of one, or a time in RFC 3339.

    Raises:
        ConfigError: It is neither.
    """
    if is_point(text) or re.fullmatch(r"[0-9]{4,8}(T[0-9]{0,6}Z?)?", text):
        return text
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or len(text) < len("2026-01-01"):
        raise ConfigError(f"'{text}' is no instant (as 20261127T031644Z, or 2026-11-27T03:16:44Z)")
    if len(text) == len("2026-01-01"):
        return when.strftime("%Y%m%dT")
    return when.replace(tzinfo=when.tzinfo or UTC).astimezone(UTC).strftime(_FORM)
