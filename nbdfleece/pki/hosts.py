"""The names and addresses that a server's certificate is for."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING, Final

from cryptography import x509

from nbdfleece.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")

_MAX_NAME: Final = 253  # bytes of a DNS name, by its own rules
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def parse_hosts(texts: Sequence[str]) -> list[x509.GeneralName]:
    """Return what a certificate says of hosts, each once, in the order given.

    Raises:
        ConfigError: One is neither a host name nor an address.
    """
    return list(dict.fromkeys(_parse(text) for text in texts))


def own_hosts() -> list[x509.GeneralName]:
    """Return the names of this machine, and loopback."""
    found = []
    for text in (socket.gethostname(), socket.getfqdn()):
        try:
            found.append(_parse(text))
        except ConfigError:
            continue  # a machine may be called what no certificate can say
    return list(dict.fromkeys([*found, *parse_hosts(LOOPBACK)]))


def host_text(host: x509.GeneralName) -> str:
    """Return a host as a person writes it."""
    return str(host.value)


def _parse(text: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return _parse_name(text)
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise ConfigError(f"'{text}' has a zone, and a certificate cannot say one")
    return x509.IPAddress(address)


def _parse_name(text: str) -> x509.DNSName:
    try:
        name = text.removesuffix(".").encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = name.removeprefix("*.").split(".")
    is_name = all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
    if not is_name or len(name) > _MAX_NAME:
        raise ConfigError(f"'{text}' is neither a host name nor an address")
    return x509.DNSName(name.lower())
