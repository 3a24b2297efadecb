"""What stands in a certificate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdfleece.pki import certificates, hosts
from nbdfleece.pki.errors import PkiError

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def authority() -> certificates.Authority:
    return certificates.make_authority(certificates.new_key(), NOW)


def common_name(certificate: x509.Certificate) -> object:
    return certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


def test_lifetimes(authority: certificates.Authority) -> None:
    key = certificates.new_key()
    client = certificates.make_client(authority, key, "a", None, NOW)
    assert authority.certificate.not_valid_after_utc - NOW > timedelta(days=3650)
    assert timedelta(days=365) <= client.not_valid_after_utc - NOW <= timedelta(days=825)
    assert client.not_valid_before_utc < NOW


def test_no_certificate_outlives_its_authority(authority: certificates.Authority) -> None:
    late = authority.certificate.not_valid_after_utc - timedelta(days=10)
    client = certificates.make_client(authority, certificates.new_key(), "a", None, late)
    assert client.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_an_authority_may_sign_and_no_more(authority: certificates.Authority) -> None:
    found = authority.certificate.extensions
    constraints = found.get_extension_for_class(x509.BasicConstraints)
    usage = found.get_extension_for_class(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (
        *(True, True),
        0,
    )
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign) == (True, True)
    assert not usage.value.digital_signature


def test_two_authorities_have_two_names(authority: certificates.Authority) -> None:
    other = certificates.make_authority(certificates.new_key(), NOW)
    assert other.certificate.subject != authority.certificate.subject


@pytest.mark.parametrize("is_server", [True, False])
def test_a_leaf_is_for_one_purpose(authority: certificates.Authority, is_server: bool) -> None:
    key = certificates.new_key()
    if is_server:
        leaf = certificates.make_server(authority, key, hosts.parse_hosts(["a"]), NOW)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
    else:
        leaf = certificates.make_client(authority, key, "a", None, NOW)
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
    found = leaf.extensions
    assert list(found.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    assert not found.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = found.get_extension_for_class(x509.KeyUsage)
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert not usage.critical  # or QEMU 7 asks for keyEncipherment
    leaf.verify_directly_issued_by(authority.certificate)


def test_serial_numbers_and_keys_are_never_the_same(authority: certificates.Authority) -> None:
    made = [
        certificates.make_client(authority, certificates.new_key(), "a", None, NOW)
        for _ in range(20)
    ]
    assert len({one.serial_number for one in made}) == 20
    assert min(one.serial_number.bit_length() for one in made) > 100
    subject_keys = {
        one.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        for one in made
    }
    assert len(subject_keys) == 20


def test_keys_are_p256() -> None:
    key = certificates.new_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"


def test_a_long_host_name_does_not_go_into_the_common_name(
    authority: certificates.Authority,
) -> None:
    long = ".".join(["x" * 40] * 3)
    key = certificates.new_key()
    made = certificates.make_server(authority, key, hosts.parse_hosts([long, "b"]), NOW)
    assert common_name(made) == "nbdfleece server"
    assert [hosts.host_text(host) for host in certificates.hosts_of(made)] == [long, "b"]


def test_what_is_no_key_is_refused() -> None:
    none, password = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"x")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = certificates.new_key().private_bytes(pem, pkcs8, password)
    strange = ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, none)
    for text, why in ((b"", "no private key"), (locked, "password"), (strange, "neither")):
        with pytest.raises(PkiError, match=why):
            certificates.parse_key(text)


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(PkiError):
        certificates.parse_certificate(b"-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(PkiError):
        certificates.parse_crl(b"")
