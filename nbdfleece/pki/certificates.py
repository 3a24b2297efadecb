"""What stands in the certificates that we make; no files, no clock.

Invariants
  C1  Keys are EC P-256: every TLS library takes them, and they are made at once.
  C2  A certificate never outlives its issuer, and begins a little earlier than it is made, for
      peers whose clocks are behind.
  C3  Serial numbers are random.

Lifetimes. The authority: 10 years, since replacing it means a visit to every client. Servers and
clients: 2 years, as nothing renews them but a person; more than 825 days is refused by the TLS
library of some systems. The revocation list: as long as the authority, because a list that has
ended locks everybody out, and a new one is made at each revocation anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdfleece.pki.errors import PkiError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
"""What we sign with: our own keys are EC, those of an authority made elsewhere may be RSA."""

AUTHORITY_LIFE: Final = timedelta(days=3652)
LEAF_LIFE: Final = timedelta(days=730)
MAX_COMMON_NAME: Final = 64  # characters; the bound that X.520 sets

_CLOCK_SKEW: Final = timedelta(hours=1)
_PEM: Final = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority that can sign."""

    certificate: x509.Certificate
    key: PrivateKey


def new_key() -> PrivateKey:
    """Return a new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """Return a private key as PEM, not encrypted."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(_PEM)


def crl_pem(crl: x509.CertificateRevocationList) -> bytes:
    """Return a revocation list as PEM."""
    return crl.public_bytes(_PEM)


def parse_key(pem: bytes) -> PrivateKey:
    """Return the private key in a PEM file.

    Raises:
        PkiError: There is none, it has a password, or it is of another kind than EC and RSA.
    """
    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError as error:
        raise PkiError("the key is protected by a password") from error
    except ValueError as error:
        raise PkiError("there is no private key that can be read") from error
    if not isinstance(key, PrivateKey):
        raise PkiError("the key is neither EC nor RSA")
    return key


def parse_certificate(pem: bytes) -> x509.Certificate:
    """Return the first certificate in a PEM file.

    Raises:
        PkiError: There is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise PkiError("there is no certificate that can be read") from error


def parse_crl(pem: bytes) -> x509.CertificateRevocationList:
    """Return the revocation list in a PEM file.

    Raises:
        PkiError: There is none.
    """
    try:
        return x509.load_pem_x509_crl(pem)
    except ValueError as error:
        raise PkiError("there is no revocation list that can be read") from error


def check_authority(authority: Authority, now: datetime) -> None:
    """Check that an authority may sign, and that clients will believe it.

    Raises:
        PkiError: It may not.
    """
    certificate = authority.certificate
    if certificate.public_key() != authority.key.public_key():
        raise PkiError("the key of the authority is not that of its certificate")
    if certificate.not_valid_after_utc <= now:
        ends = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        raise PkiError(f"the authority has expired on {ends}; make a new one in another folder")
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except x509.ExtensionNotFound as error:
        raise PkiError("the certificate of the authority is not one of an authority") from error
    if not is_authority.value.ca:
        raise PkiError("the certificate of the authority is not one of an authority")


def make_authority(key: PrivateKey, now: datetime) -> Authority:
    """Return a new authority that signs itself; its name tells it from others made so."""
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    name = x509.Name([_common_name(f"nbdfleece CA {digest.hex()[:8]}")])
    certificate = (
        _begin(name, name, key.public_key(), now - _CLOCK_SKEW, now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def make_server(
    authority: Authority, key: PrivateKey, hosts: Sequence[x509.GeneralName], now: datetime
) -> x509.Certificate:
    """Return the certificate of a server that answers to `hosts`."""
    name = next((str(host.value) for host in hosts), "")
    if len(name) > MAX_COMMON_NAME:
        name = "nbdfleece server"  # nobody reads it: clients look at the alternative names
    return (
        _begin_leaf(authority, x509.Name([_common_name(name)]), key, now)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def make_client(
    authority: Authority, key: PrivateKey, name: str, org: str | None, now: datetime
) -> x509.Certificate:
    """Return the certificate of a client, `CN=NAME[,O=ORG]`."""
    parts = [_common_name(name)]
    if org is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, org))
    return (
        _begin_leaf(authority, x509.Name(parts), key, now)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def make_crl(
    authority: Authority,
    old: x509.CertificateRevocationList | None,
    serials: Iterable[int],
    now: datetime,
) -> x509.CertificateRevocationList:
    """Return a revocation list with all that `old` names, and `serials`."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - _CLOCK_SKEW)
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(_crl_number(old) + 1), critical=False)
        .add_extension(_issuer_key(authority), critical=False)
    )
    for entry in old or ():
        builder = builder.add_revoked_certificate(entry)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA256())


def is_crl_of(crl: x509.CertificateRevocationList, certificate: x509.Certificate) -> bool:
    """Tell whether a revocation list is signed by an authority."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        return False
    return crl.issuer == certificate.subject and crl.is_signature_valid(key)


def hosts_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Return the alternative names of a certificate."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return []
    return list(found.value)


def _crl_number(crl: x509.CertificateRevocationList | None) -> int:
    if crl is None:
        return 0
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def _begin_leaf(
    authority: Authority, subject: x509.Name, key: PrivateKey, now: datetime
) -> x509.CertificateBuilder:
    issuer = authority.certificate
    begins = max(now - _CLOCK_SKEW, issuer.not_valid_before_utc)
    ends = min(now + LEAF_LIFE, issuer.not_valid_after_utc)
    return (
        _begin(subject, issuer.subject, key.public_key(), begins, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Not critical, though RFC 5280 would have it so: of a critical one QEMU before 10 demands
        # keyEncipherment, which RFC 5480 forbids for EC keys.
        .add_extension(_key_usage(digital_signature=True), critical=False)
        .add_extension(_issuer_key(authority), critical=False)
    )


def _begin(
    subject: x509.Name, issuer: x509.Name, public: PublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _issuer_key(authority: Authority) -> x509.AuthorityKeyIdentifier:
    try:
        own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)


def _common_name(text: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, text)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
