"""The syntax of disk arguments: ``[NAME=]LOCATION[,key=value...]``.

Commas in values are doubled. NAME ends at the first ``=`` before which there is no slash; so a file
called ``a=b`` is written ``./a=b``. What the parts mean is for `fleece.location` to say.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from nbdfleece.base.errors import ConfigError

KEYS: Final = (
    *("format", "read-only", "discard", "cache", "locking"),
    *("reconnect-delay", "open-timeout"),  # of NBD servers
)

_LOOKS_LIKE_URI: Final = re.compile(r"nbds?(?:\+[a-z]+)?:(?://|$)", re.IGNORECASE)


_SECRETS: Final = re.compile(
    r"(?P<before>nbds?(?:\+[a-z]+)?://)(?P<user>[^/?#@]*@)?(?P<server>[^/?#]*/?)(?P<export>[^?#,]*)",
    re.IGNORECASE,
)
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{32}")


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
            raise ConfigError(
                f"disk '{without_secrets(text)}': '{option}' is not of the form key=value"
            )
        if key in options:
            raise ConfigError(f"disk '{without_secrets(text)}': '{key}' is given twice")
        options[key] = value
    return DiskArgument(name, location, options)


def is_nbd_uri(location: str) -> bool:
    """Tell whether a location is meant as an NBD URI, good or bad."""
    return _LOOKS_LIKE_URI.match(location) is not None


def without_secrets(text: str) -> str:
    """Return a URI, or a disk argument with one, as it may be shown, logged and kept."""
    return _SECRETS.sub(
        lambda match: (
            match["before"]
            + ("***@" if match["user"] else "")
            + match["server"]
            + _without_token(match["export"])
        ),
        text,
    )


def _without_token(quoted: str) -> str:
    export = unquote(quoted)
    hidden = without_token(export)
    return quoted if hidden == export else quote(hidden, safe="/@:")


def without_token(export: str) -> str:
    """Return an export's name as it may be shown, logged and kept: a token in it opens a snapshot.

    Of the token, which is as `server.tokens` makes it, a hash remains to tell it by.
    """
    name, separator, token = export.rpartition(":")
    if not separator or _TOKEN.fullmatch(token) is None:
        return export
    return f"{name}:token-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def _split_commas(text: str) -> list[str]:
    """Split at single commas and undouble the others."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
