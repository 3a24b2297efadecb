"""Whom a rule of the policy is for: the `who` of it.

All keys of one `who` must hold, and for each key one of its values. A key says something of what
has been proved of a client (see `Identity`): where that is not known, the key does not hold.

    cert     "CN=backup*,O=Example"         subject of a verified certificate
    san      "DNS:*.example.com"            an alternative name of it: DNS, IP, URI or email
    psk      "alice"                        user of a pre-shared key
    uid gid  1000 or "backup"               of the process at a unix socket
    address  "10.0.0.0/8" or "::1"          of a TCP client
    cid      3                              of a vsock client
    any      true                           everybody
"""

from __future__ import annotations

import grp
import ipaddress
import pwd
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.distinguished_name import NamePattern
from nbdfleece.server.glob import Glob, check_pattern, parse_glob
from nbdfleece.server.rule_file import check_members, list_of, table_of, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdfleece.server.identity import Identity, IpAddress, PeerCertificate

    Test: TypeAlias = Callable[[Identity], bool]
    _CertificateTest: TypeAlias = Callable[[PeerCertificate], bool]

IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
_MAX_ID: Final = 0xFFFFFFFE  # of a user or group; the next one is "none" to the kernel
_MAX_CID: Final = 0xFFFFFFFE  # likewise


class Who:
    """Whom a rule is for.

    Args:
        value: The table as written. User and group names are looked up now, which may block.

    Raises:
        ConfigError: It is wrong; the text says which key and why.
    """

    def __init__(self, value: object) -> None:
        table = table_of(value, "'who'")
        check_members(table, _TESTS, "'who'")
        if not table:
            raise ConfigError("'who' is empty (for everybody: any = true)")
        self._tests = [_any_value(name, table[name], _TESTS[name]) for name in table]

    def matches(self, identity: Identity) -> bool:
        """Tell whether the rule is for this client."""
        return all(test(identity) for test in self._tests)


def _any_value(name: str, value: object, make: Callable[[object], Test]) -> Test:
    """Return a test that holds when that of one of the values does."""
    tests: list[Test] = []
    for one in list_of(value, name):
        try:
            tests.append(make(one))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    return lambda identity: any(test(identity) for test in tests)


# --- TLS ---------------------------------------------------------------------------------------


def _cert(value: object) -> Test:
    pattern = NamePattern(text_of(value, "it"), globs=True)
    return _of_certificate(lambda certificate: pattern.matches(certificate.subject))


def _san(value: object) -> Test:
    text = text_of(value, "it")
    check_pattern(text)
    kind, colon, rest = text.partition(":")
    if not colon or kind.lower() not in _SAN_KINDS:
        raise ConfigError(f"'{text}' must begin with DNS:, IP:, URI: or email:")
    return _of_certificate(_SAN_KINDS[kind.lower()](text_of(rest, kind)))


def _of_certificate(test: _CertificateTest) -> Test:
    return lambda identity: identity.certificate is not None and test(identity.certificate)


def _san_dns(text: str) -> _CertificateTest:
    matches = _host_test(text)
    return lambda certificate: any(matches(name) for name in certificate.dns_names)


def _san_ip(text: str) -> _CertificateTest:
    network = parse_network(text)
    return lambda certificate: any(is_in(one, network) for one in certificate.addresses)


def _san_uri(text: str) -> _CertificateTest:
    matches = _parts_test(text, "/")
    return lambda certificate: any(matches(uri) for uri in certificate.uris)


def _san_email(text: str) -> _CertificateTest:
    """Mailboxes: what is before the last @ counts as written, the host without case."""
    mailbox, at, host = text.rpartition("@")
    if not at:
        raise ConfigError(f"'{text}' is not MAILBOX@HOST")
    wanted, is_host = parse_glob(mailbox), _host_test(host)

    def matches(name: str) -> bool:
        found, _, found_host = name.rpartition("@")
        return wanted.matches(found) and is_host(found_host)

    return lambda certificate: any(matches(name) for name in certificate.emails)


_SAN_KINDS: Final[Mapping[str, Callable[[str], _CertificateTest]]] = {
    "dns": _san_dns,
    "ip": _san_ip,
    "uri": _san_uri,
    "email": _san_email,
}


def _parts_test(text: str, separator: str) -> Callable[[str], bool]:
    """Return a test of texts in which a glob stays within its part between two separators."""
    parts = [parse_glob(part) if part else Glob("") for part in text.split(separator)]

    def matches(found: str) -> bool:
        pieces = found.split(separator)
        return len(pieces) == len(parts) and all(map(Glob.matches, parts, pieces))

    return matches


def _host_test(text: str) -> Callable[[str], bool]:
    """Return a test of host names: without case, and `*` stands for one label as in TLS."""
    if not text.isascii():
        raise ConfigError(f"'{text}' is not a host name (write it in its xn-- form)")
    matches = _parts_test(text.lower(), ".")
    return lambda found: found.isascii() and matches(found.lower())


def _psk(value: object) -> Test:
    pattern = parse_glob(text_of(value, "it"))
    return lambda identity: identity.psk is not None and pattern.matches(identity.psk)


# --- the kernel's word ---------------------------------------------------------------------------


def _uid(value: object) -> Test:
    number = _id(value, lambda name: pwd.getpwnam(name).pw_uid, "user")
    return lambda identity: identity.uid == number


def _gid(value: object) -> Test:
    number = _id(value, lambda name: grp.getgrnam(name).gr_gid, "group")
    return lambda identity: identity.gid == number


def _id(value: object, find: Callable[[str], int], what: str) -> int:
    """Return the number of a user or group, given as such or by name."""
    if isinstance(value, str):
        try:
            return find(value)
        except (KeyError, ValueError):
            raise ConfigError(f"there is no {what} '{value}'") from None
    return _number(value, _MAX_ID, f"the name or number of a {what}")


def _number(value: object, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ConfigError(f"'{value}' is not {what}")
    return value


def _address(value: object) -> Test:
    network = parse_network(text_of(value, "it"))
    return lambda identity: identity.address is not None and is_in(identity.address, network)


def _cid(value: object) -> Test:
    number = _number(value, _MAX_CID, "the number of a context")
    return lambda identity: identity.cid == number


def _anybody(value: object) -> Test:
    if value is not True:
        raise ConfigError("it can be true only")
    return lambda _: True


_TESTS: Final[Mapping[str, Callable[[object], Test]]] = {
    "cert": _cert,
    "san": _san,
    "psk": _psk,
    "uid": _uid,
    "gid": _gid,
    "address": _address,
    "cid": _cid,
    "any": _anybody,
}


# --- networks ------------------------------------------------------------------------------------


def parse_network(text: str) -> IpNetwork:
    """Return a network, or the network of one address; the IPv4 one for IPv4-mapped IPv6.

    Raises:
        ConfigError: `text` is neither, or has bits set beyond its prefix: it may not say what was
            meant.
    """
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(network, ipaddress.IPv6Network):
        return network
    if getattr(network.network_address, "scope_id", None) is not None:
        raise ConfigError(f"'{text}' has a scope; interfaces are not told apart")
    if network.subnet_of(_MAPPED):
        host = network.network_address.ipv4_mapped
        assert host is not None, "an address in ::ffff:0:0/96"
        return ipaddress.IPv4Network((int(host), network.prefixlen - _MAPPED.prefixlen))
    return network


def is_in(address: IpAddress, network: IpNetwork) -> bool:
    """Tell whether an address (not IPv4-mapped) is in a network; of one version only."""
    return address in network
