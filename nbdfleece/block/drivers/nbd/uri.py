"""NBD URIs: which export they lead to.

::

    nbd://HOST[:PORT]/EXPORT                 nbd+unix:///EXPORT?socket=PATH
    nbds://HOST[:PORT]/EXPORT                nbds+unix:///EXPORT?socket=PATH       (over TLS)

The export's name is the path without its first slash; empty: the server's default. HOST may be left
out for localhost. Over TLS `tls-certificates=FOLDER` names a folder as QEMU's and libnbd's clients
have it (else the system's CAs are asked), and `tls-hostname=NAME` what the server's certificate
must be for (else HOST). What is not understood is refused: it may have been meant to keep us safe.

Follows: the NBD project's doc/uri.md; `tls-certificates` is libnbd's.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdfleece.base.disk_argument import without_secrets
from nbdfleece.base.errors import CommandError, ConfigError
from nbdfleece.block.drivers.nbd.target import (
    DEFAULT_PORT,
    InetServer,
    Target,
    UnixServer,
    make_target,
)

_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TLS_PARAMETERS: Final = ("tls-certificates", "tls-hostname", "tls-type", "tls-verify-peer")
_SCHEMES: Final[dict[str, tuple[str, ...]]] = {
    "nbd": (),
    "nbd+unix": ("socket",),
    "nbds": _TLS_PARAMETERS,
    "nbds+unix": ("socket", *_TLS_PARAMETERS),
}
# Parameters of other programs that could only say what holds anyway.
_ONLY: Final = {"tls-type": ("x509",), "tls-verify-peer": ("1", "true")}


def parse_nbd_uri(text: str) -> Target:
    """Return the export that a URI leads to.

    Raises:
        ConfigError: It is malformed, or asks for what is not done here; without its secrets.
    """
    whole, text = text, without_secrets(text)
    try:
        parts = urlsplit(whole)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError as error:
        raise ConfigError(f"'{text}': {error}") from error
    if parts.scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"'{text}': '{parts.scheme}://' is none of {known}")
    if parts.username is not None or parts.fragment or "#" in whole:
        raise ConfigError(f"'{text}': there is no use for a user or a fragment in an NBD URI")
    parameters = _parameters(text, parts.query, _SCHEMES[parts.scheme])
    server: InetServer | UnixServer
    if "socket" in _SCHEMES[parts.scheme]:
        if parts.netloc or "socket" not in parameters:
            raise ConfigError(f"'{text}': {parts.scheme}:///EXPORT?socket=PATH is the form")
        server = UnixServer(parameters["socket"])
    else:
        server = InetServer(_decode(text, parts.hostname or "localhost"), port)
    try:
        return make_target(
            server,
            _decode(text, parts.path.removeprefix("/")),
            use_tls=parts.scheme.startswith("nbds"),
            tls_folder=parameters.get("tls-certificates"),
            tls_hostname=parameters.get("tls-hostname"),
            dirty_bitmap=None,
        )
    except CommandError as error:
        raise ConfigError(f"'{text}': {error}") from error


def _parameters(text: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, _, value = (_decode(text, piece) for piece in part.partition("="))
        if key not in known:
            names = ", ".join(known) or "none"
            raise ConfigError(f"'{text}': unknown parameter '{key}' (known here: {names})")
        if key in found or not value:
            raise ConfigError(f"'{text}': '{key}' needs one value")
        if value not in _ONLY.get(key, (value,)):
            raise ConfigError(f"'{text}': {key}={value} is not done here")
        found[key] = value
    return found


def _decode(text: str, part: str) -> str:
    try:
        if _BAD_ESCAPE.search(part) is None:
            return unquote(part, errors="strict")
    except UnicodeDecodeError:
        pass
    raise ConfigError(f"'{text}': it is not percent-encoded UTF-8")
