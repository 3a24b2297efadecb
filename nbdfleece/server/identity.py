"""Who a client is, as far as it has been proved.

Invariants
  I1  A field of `Identity` is set only when the kernel (address, uid, gid, pid, cid) or a finished
      TLS handshake (certificate, psk) vouches for it. In particular `certificate` is set only after
      its chain was verified: nobody looks at names in a certificate that anybody could have made.
  I2  A certificate is understood as a whole or refused: nothing in it is skipped because it could
      not be read, and no name has a NUL, at which other programs would cut it off.
  I3  An address is IPv4 or IPv6 for good: an IPv4 client at an IPv6 socket has its IPv4 address.
"""

from __future__ import annotations

import ipaddress
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import MAX_CERTIFICATE, MAX_CERTIFICATE_NAMES
from nbdfleece.server.distinguished_name import DistinguishedName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography import x509

    from nbdfleece.server.distinguished_name import Rdn

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def peer_address(host: str) -> IpAddress:
    """Return the address of a peer as the kernel writes it (I3), without a scope.

    Raises:
        ValueError: `host` is not an address.
    """
    return unmapped(ipaddress.ip_address(host.partition("%")[0]))


def unmapped(address: IpAddress) -> IpAddress:
    """Return the IPv4 address in an IPv4-mapped IPv6 address, any other as it is."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The names in a client's certificate.

    Attributes:
        subject: Its distinguished name; may have no attributes at all.
        dns_names: Alternative names of this kind, as they stand there.
        addresses: Likewise; IPv4-mapped ones unwrapped.
        uris: Likewise.
        emails: Likewise.
    """

    subject: DistinguishedName
    dns_names: tuple[str, ...] = ()
    addresses: tuple[IpAddress, ...] = ()
    uris: tuple[str, ...] = ()
    emails: tuple[str, ...] = ()

    @classmethod
    def from_der(cls, der: bytes) -> PeerCertificate:
        """Return the names in a certificate whose chain has been verified (I1).

        Raises:
            PeerViolation: It is malformed, too big, or a name in it has a NUL or is not a text.
        """
        from cryptography import x509

        if len(der) > MAX_CERTIFICATE:
            raise PeerViolation(f"its certificate is longer than {MAX_CERTIFICATE} bytes")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd lengths and numbers, which change no name
                found = _names(x509.load_der_x509_certificate(der))
        except (
            ValueError,
            TypeError,  # of the library, for a value that is not of the kind its type must have
            x509.DuplicateExtension,
            x509.InvalidVersion,
            x509.UnsupportedGeneralNameType,
        ) as error:
            raise PeerViolation(f"its certificate is malformed: {error}") from error
        _check_names(found)
        return found


def _names(certificate: x509.Certificate) -> PeerCertificate:
    """Return the names in a certificate, not checked.

    Raises:
        ValueError: Something in it cannot be read; as the errors of x509 that `from_der` names.
        PeerViolation: A name is not of a kind that can be compared.
    """
    from cryptography import x509

    subject = DistinguishedName(tuple(_rdn(rdn) for rdn in certificate.subject.rdns))
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return PeerCertificate(subject)
    return PeerCertificate(
        subject,
        tuple(names.get_values_for_type(x509.DNSName)),
        tuple(_host(name) for name in names.get_values_for_type(x509.IPAddress)),
        tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        tuple(names.get_values_for_type(x509.RFC822Name)),
    )


def _rdn(rdn: x509.RelativeDistinguishedName) -> Rdn:
    """Return the attributes of an RDN.

    Raises:
        PeerViolation: One is not a text, or two are of one type.
    """
    found: dict[str, str] = {}
    for attribute in rdn:
        number = attribute.oid.dotted_string
        value: object = attribute.value  # bytes for the rare types that are no texts
        if not isinstance(value, str):
            raise PeerViolation(f"attribute {number} of its certificate's subject is not a text")
        if number in found:
            raise PeerViolation(f"attribute {number} stands twice in its certificate's subject")
        found[number] = value
    return frozenset(found.items())


def _host(address: object) -> IpAddress:
    """Return the address of an alternative name.

    Raises:
        PeerViolation: It is a network.
    """
    if not isinstance(address, IpAddress):
        raise PeerViolation("an alternative name of its certificate is a network")
    return unmapped(address)


def _check_names(found: PeerCertificate) -> None:
    """Check the bounds and that no name has a NUL.

    Raises:
        PeerViolation: Otherwise.
    """
    values = [value for rdn in found.subject.rdns for _, value in rdn]
    texts = [*values, *found.dns_names, *found.uris, *found.emails]
    if len(texts) + len(found.addresses) > MAX_CERTIFICATE_NAMES:
        raise PeerViolation(f"its certificate has more than {MAX_CERTIFICATE_NAMES} names")
    if _has_nul(texts):
        raise PeerViolation("a name in its certificate contains a NUL")


def _has_nul(texts: Iterable[str]) -> bool:
    return any("\0" in text for text in texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One client. What is None is not known (I1).

    Attributes:
        address: Of a TCP client; IPv4-mapped ones unwrapped (`peer_address`).
        uid: User of a unix client's process, when it connected.
        gid: Its primary group.
        pid: Its process.
        cid: Context id of a vsock client.
        tls: The connection is encrypted.
        certificate: The names in its certificate, whose chain has been verified.
        psk: Its user name, when it proved to have the pre-shared key of that name.
    """

    address: IpAddress | None = None
    uid: int | None = None
    gid: int | None = None
    pid: int | None = None
    cid: int | None = None
    tls: bool = False
    certificate: PeerCertificate | None = None
    psk: str | None = None

    def name(self) -> str:
        """Return what TLS has proved the client to be called, for logs and counts; else "".

        Nothing in it is unprintable, and two different subjects or users are never called the same.
        """
        if self.certificate is not None:
            return f"certificate {self.certificate.subject.text() or '(no subject)'}"
        if self.psk is not None:
            return f"psk {self.psk!a}"
        return ""
