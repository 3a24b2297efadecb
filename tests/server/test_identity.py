"""Identities, and the names in certificates: all of them or none."""

from __future__ import annotations

import datetime
import ipaddress
import random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import MAX_CERTIFICATE, MAX_CERTIFICATE_NAMES
from nbdfleece.server.distinguished_name import parse_name
from nbdfleece.server.identity import Identity, PeerCertificate, peer_address
from tests.support.pki import DAY, Authority

KEY = ec.generate_private_key(ec.SECP256R1())


def der(subject: x509.Name, *extensions: x509.ExtensionType) -> bytes:
    """A certificate with any subject at all, signed by itself."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def common_name(value: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value)])


def test_names_of_a_certificate() -> None:
    issued = Authority().issue(
        [("C", "GB"), ("O", "Example"), ("CN", "backup1")],
        extra_names=[
            x509.DNSName("Backup.example.com"),
            x509.IPAddress(ipaddress.ip_address("::ffff:10.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
            x509.UniformResourceIdentifier("spiffe://example.org/backup"),
            x509.RFC822Name("ops@example.com"),
            x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        ],
    )

    found = PeerCertificate.from_der(issued.der)

    assert found.subject == parse_name("CN=backup1,O=Example,C=GB")
    assert found.dns_names == ("Backup.example.com",)
    assert found.addresses == (
        ipaddress.ip_address("10.0.0.1"),
        ipaddress.ip_address("2001:db8::1"),
    )
    assert found.uris == ("spiffe://example.org/backup",)
    assert found.emails == ("ops@example.com",)


def test_certificate_without_names() -> None:
    found = PeerCertificate.from_der(der(x509.Name([])))
    assert found.subject.rdns == ()
    assert Identity(certificate=found).name() == "certificate (no subject)"


def test_multi_valued_rdn_and_unknown_type() -> None:
    subject = x509.Name(
        [
            x509.RelativeDistinguishedName(
                [
                    x509.NameAttribute(NameOID.COMMON_NAME, "x"),
                    x509.NameAttribute(x509.ObjectIdentifier("1.2.3.4"), "y"),
                ]
            )
        ]
    )
    found = PeerCertificate.from_der(der(subject))
    assert found.subject == parse_name("1.2.3.4=y+CN=x")


def test_values_of_odd_length_are_no_reason_to_complain() -> None:
    """The library warns of them, and a warning is a failure here, as it would be noise in a log."""
    with pytest.warns(UserWarning, match="length"):
        long = x509.NameAttribute(NameOID.COMMON_NAME, "x" * 100, _validate=False)
    found = PeerCertificate.from_der(der(x509.Name([long])))
    assert found.subject.text() == "CN=" + "x" * 100


def test_comma_in_a_value_stays_in_the_value() -> None:
    found = PeerCertificate.from_der(der(common_name("backup,O=Admin")))
    assert found.subject != parse_name("CN=backup,O=Admin")
    assert found.subject.text() == r"CN=backup\,O=Admin"


@pytest.mark.parametrize(
    "made",
    [
        der(common_name("backup\0.evil")),
        der(common_name("backup"), x509.SubjectAlternativeName([x509.DNSName("a.b\0.evil")])),
        der(common_name("x"), x509.SubjectAlternativeName([x509.RFC822Name("a@b\0c")])),
        der(
            common_name("x"),
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("a://b\0c")]),
        ),
    ],
    ids=["subject", "DNS", "email", "URI"],
)
def test_nul_in_a_name_is_refused(made: bytes) -> None:
    with pytest.raises(PeerViolation, match="contains a NUL"):
        PeerCertificate.from_der(made)


def test_attribute_type_twice_in_one_rdn_is_refused() -> None:
    twice = x509.RelativeDistinguishedName(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "a"),
            x509.NameAttribute(NameOID.COMMON_NAME, "b"),
        ]
    )
    with pytest.raises(PeerViolation, match="stands twice"):
        PeerCertificate.from_der(der(x509.Name([twice])))


def test_attribute_that_is_no_text_is_refused() -> None:
    bits = x509.NameAttribute(NameOID.X500_UNIQUE_IDENTIFIER, b"\0\1", _ASN1Type.BitString)
    with pytest.raises(PeerViolation, match="not a text"):
        PeerCertificate.from_der(der(x509.Name([bits])))


def test_network_among_the_alternative_names_is_refused() -> None:
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_network("10.0.0.0/8"))])
    with pytest.raises(PeerViolation, match="is a network"):
        PeerCertificate.from_der(der(common_name("x"), names))


def test_too_many_names_are_refused() -> None:
    names = [x509.DNSName(f"h{number}") for number in range(MAX_CERTIFICATE_NAMES)]
    most = der(common_name("x"), x509.SubjectAlternativeName(names[1:]))
    assert len(PeerCertificate.from_der(most).dns_names) == MAX_CERTIFICATE_NAMES - 1
    with pytest.raises(PeerViolation, match=f"more than {MAX_CERTIFICATE_NAMES} names"):
        PeerCertificate.from_der(der(common_name("x"), x509.SubjectAlternativeName(names)))


GOOD = der(
    x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"),
            x509.NameAttribute(NameOID.COMMON_NAME, "backup1"),
        ]
    ),
    x509.SubjectAlternativeName(
        [x509.DNSName("backup1"), x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]
    ),
)


@pytest.mark.parametrize(
    "made",
    [b"", b"\0", b"\x30\x80", GOOD[:-1], GOOD + b"\0", GOOD[:100], bytes(MAX_CERTIFICATE + 1)],
    ids=["nothing", "a byte", "open end", "cut", "more behind it", "half", "too long"],
)
def test_malformed_certificate_is_refused(made: bytes) -> None:
    with pytest.raises(PeerViolation, match="its certificate is"):
        PeerCertificate.from_der(made)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_mutated_certificates_are_understood_or_refused(rng: random.Random) -> None:
    """Nothing but PeerViolation comes out, and never a name with a NUL."""
    refused = 0
    for _ in range(3000):
        data = bytearray(GOOD)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = PeerCertificate.from_der(bytes(data))
        except PeerViolation:
            refused += 1
            continue
        texts = [value for rdn in found.subject.rdns for _, value in rdn]
        assert all("\0" not in text for text in [*texts, *found.dns_names])
        assert parse_name(found.subject.text()) == found.subject if texts else True
    assert refused > 100


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_address_of_a_peer(host: str, address: str) -> None:
    assert peer_address(host) == ipaddress.ip_address(address)


@pytest.mark.parametrize("host", ["", "localhost", "10.0.0", "010.0.0.1", "10.0.0.1/8"])
def test_what_is_no_address(host: str) -> None:
    with pytest.raises(ValueError, match="address"):
        peer_address(host)


def test_proved_name_is_fit_for_logs() -> None:
    assert Identity().name() == ""
    assert Identity(uid=0, tls=True).name() == ""
    assert Identity(psk="al\nice").name() == r"psk 'al\nice'"
    found = PeerCertificate.from_der(der(common_name("a\nb")))
    assert Identity(certificate=found, tls=True).name() == r"certificate CN=a\0Ab"
