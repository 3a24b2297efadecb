"""The syntax of disk arguments: ``[NAME=]LOCATION[,key=value...]``.

Commas in values are doubled. NAME ends at the first ``=`` before which there is no slash; so a file
called ``a=b`` is written ``./a=b``. What the parts mean is for `fleece.location` to say.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from nbdfleece.base.errors import ConfigError

KEYS: Final = (
    *("format", "read-only", "discard", "cache", "locking"),
    *("reconnect-delay", "open-timeout"),  # of NBD servers
)

_LOOKS_LIKE_URI: Final = re.compile(r"nbds?(?:\+[a-z]+)?:(?://|$)", re.IGNORECASE)


class DiskArgument(NamedTuple):
    """The parts of a disk argument; `name` is None where none is given."""

    name: str | None
    location: str
    options: dict[str, str]


def split_disk_argument(text: str) -> DiskArgument:
    """Return the parts of a disk argument.

    Raises:
        ConfigError: It is malformed.
    """
    first, *rest = _split_commas(text)
    before, equals, after = first.partition("=")
    name, location = (before, after) if equals and "/" not in before else (None, first)
    options: dict[str, str] = {}
    for option in rest:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"disk '{text}': '{option}' is not of the form key=value")
        if key in options:
            raise ConfigError(f"disk '{text}': '{key}' is given twice")
        options[key] = value
    return DiskArgument(name, location, options)


def is_nbd_uri(location: str) -> bool:
    """Tell whether a location is meant as an NBD URI, good or bad."""
    return _LOOKS_LIKE_URI.match(location) is not None


def _split_commas(text: str) -> list[str]:
    """Split at single commas and undouble the others."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
