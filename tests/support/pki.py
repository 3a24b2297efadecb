"""Certificates for tests: EC keys, made in milliseconds, in the folders that real programs take.

::

    pki.server                              ca-cert.pem ca-crl.pem server-cert.pem server-key.pem
    pki.client("backup1", org="Example")    ca-cert.pem client-cert.pem client-key.pem

These are the folders of QEMU's tls-creds-x509 (`dir=`) and of libnbd (`tls-certificates=`). The
server answers to localhost, 127.0.0.1 and ::1. The fixture `pki` is one for the whole session, and
so for reading only: a test that changes files, or makes a CRL of its own, takes
``Pki(tmp_path)``. The same arguments give the same folder.
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
LOCAL = ("localhost", "127.0.0.1", "::1")

_SHORT = {
    "CN": NameOID.COMMON_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "C": NameOID.COUNTRY_NAME,
    "L": NameOID.LOCALITY_NAME,
    "DC": NameOID.DOMAIN_COMPONENT,
}


def subject_name(parts: Iterable[tuple[str, str]]) -> x509.Name:
    """A name from (short attribute name, value) pairs, one RDN each, in the certificate's order."""
    return x509.Name([x509.NameAttribute(_SHORT[kind], value) for kind, value in parts])


@dataclass(frozen=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def write(self, folder: Path, role: str) -> None:
        """Write ROLE-cert.pem and ROLE-key.pem."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{role}-cert.pem").write_bytes(self.pem)
        (folder / f"{role}-key.pem").touch(0o600)
        (folder / f"{role}-key.pem").write_bytes(self.key_pem)


class Authority:
    """A CA. What it revokes is in the next `crl()`."""

    def __init__(self, name: str = "nbdfleece test CA") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = subject_name([("CN", name)])
        self._revoked: list[int] = []
        self._crl_numbers = itertools.count(1)
        self.certificate = (
            self._begin(self._name, self.key.public_key(), -DAY, 100 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        subject: Sequence[tuple[str, str]],
        *,
        server: bool = False,
        hosts: Iterable[str] = (),
        extra_names: Iterable[x509.GeneralName] = (),
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 30 * DAY,
    ) -> Issued:
        """A certificate; `begins` and `ends` count from now, `hosts` are names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            self._begin(subject_name(subject), key.public_key(), begins, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # Not critical: QEMU before 10 demands keyEncipherment of one that is.
            .add_extension(_usage(digital_signature=True), critical=False)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        names = [*map(_general_name, hosts), *extra_names]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Issued(builder.sign(self.key, hashes.SHA256()), key)

    def revoke(self, issued: Issued) -> None:
        self._revoked.append(issued.certificate.serial_number)

    def crl(self, begins: datetime.timedelta = -DAY, ends: datetime.timedelta = 30 * DAY) -> bytes:
        """The revocation list, as PEM."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now + begins)
            .next_update(now + ends)
            .add_extension(x509.CRLNumber(next(self._crl_numbers)), critical=False)
            .add_extension(self._issuer_key(), critical=False)
        )
        for serial in self._revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(entry.revocation_date(now + begins).build())
        crl = builder.sign(self.key, hashes.SHA256())
        return crl.public_bytes(serialization.Encoding.PEM)

    def _issuer_key(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())

    def _begin(
        self,
        subject: x509.Name,
        public: ec.EllipticCurvePublicKey,
        begins: datetime.timedelta,
        ends: datetime.timedelta,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(self._issuer_key(), critical=False)
        )


class Pki:
    """A CA with the folders of servers and clients, below `root`, each made when first asked for.

    The CRL in every server's folder names the client `revoked` and nobody else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authority = Authority()
        self.stranger = Authority("a CA that nobody here trusts")
        self._revoked = self.authority.issue([("CN", "revoked")])
        self.authority.revoke(self._revoked)
        self._crl = self.authority.crl()

    # --- servers ---------------------------------------------------------------------------

    @property
    def server(self) -> Path:
        """The folder of a server that all is well with."""
        return self.server_for("server")

    def server_for(
        self,
        folder: str,
        *,
        hosts: Sequence[str] = LOCAL,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 30 * DAY,
        by: Authority | None = None,
        crl: bool = True,
    ) -> Path:
        """The folder `folder` of a server with other hosts, times, CA, or without a CRL.

        Its ca-cert.pem, by which it looks at clients, is always that of this CA.
        """
        path = self.root / folder
        if not path.exists():
            subject = [("CN", hosts[0] if hosts else "nameless")]
            issued = (by or self.authority).issue(
                subject, server=True, hosts=hosts, begins=begins, ends=ends
            )
            issued.write(path, "server")
            (path / "ca-cert.pem").write_bytes(self.authority.pem)
            if crl:
                (path / "ca-crl.pem").write_bytes(self._crl)
        return path

    def expired_server(self) -> Path:
        return self.server_for("expired-server", begins=-20 * DAY, ends=-10 * DAY)

    def foreign_server(self) -> Path:
        """The folder of a server whose certificate is of a CA that clients do not know."""
        return self.server_for("foreign-server", by=self.stranger)

    # --- clients ---------------------------------------------------------------------------

    def client(self, name: str = "backup1", org: str | None = None) -> Path:
        """The folder of a client with the subject `CN=NAME[,O=ORG]`."""
        subject = [("CN", name), *([("O", org)] if org is not None else [])]
        return self.client_for(f"client-{name}-{org}", self._subject_issued, subject)

    def expired_client(self) -> Path:
        return self.client_for("expired", self._timed, "expired", -20 * DAY, -10 * DAY)

    def early_client(self) -> Path:
        """The folder of a client whose certificate is not yet valid."""
        return self.client_for("early", self._timed, "early", 10 * DAY, 20 * DAY)

    def revoked_client(self) -> Path:
        return self.client_for("revoked", lambda: self._revoked)

    def foreign_client(self, name: str = "backup1") -> Path:
        """The folder of a client of a CA that the server does not know; it knows the server's."""
        return self.client_for(f"foreign-{name}", self.stranger.issue, [("CN", name)])

    def server_as_client(self) -> Path:
        """The folder of a client that shows a server's certificate."""
        return self.client_for("server-as-client", self._server_certificate)

    def anonymous_client(self) -> Path:
        """The folder of a client that has no certificate, and knows the CA."""
        return self.client_for("anonymous", lambda: None)

    def client_for(self, folder: str, issue, *args) -> Path:
        """The folder `folder` of a client that has what `issue(*args)` gives."""
        path = self.root / folder
        if not path.exists():
            path.mkdir(parents=True)
            issued: Issued | None = issue(*args)
            if issued is not None:
                issued.write(path, "client")
            (path / "ca-cert.pem").write_bytes(self.authority.pem)
        return path

    def _subject_issued(self, subject: Sequence[tuple[str, str]]) -> Issued:
        return self.authority.issue(subject)

    def _timed(self, name: str, begins: datetime.timedelta, ends: datetime.timedelta) -> Issued:
        return self.authority.issue([("CN", name)], begins=begins, ends=ends)

    def _server_certificate(self) -> Issued:
        return self.authority.issue([("CN", "localhost")], server=True, hosts=LOCAL)


def _usage(**true: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: true.get(name, False) for name in names})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
