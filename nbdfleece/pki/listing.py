"""What is in an authority's folder, and until when it is good."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from nbdfleece.pki import certificates, files
from nbdfleece.pki.authority import CA_CERT, CA_CRL, SERVER_CERT, authority_certificate, issued
from nbdfleece.pki.hosts import host_text

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography import x509

WARN_BEFORE: Final = timedelta(days=30)  # as the daemon's warnings; time to make new ones by hand

OK: Final = "ok"
SOON: Final = "expires soon"
EXPIRED: Final = "expired"
EARLY: Final = "not yet valid"
REVOKED: Final = "revoked"


@dataclass(frozen=True, slots=True)
class Shown:
    """One certificate.

    Attributes:
        name: `ca`, `server`, or the client's name.
        path: Its file, or the folder of a client; None when that has been moved away.
        subject: Written as RFC 4514 does, but in the certificate's order: the name first.
        serial: In hexadecimal digits.
        state: `ok`, `expires soon`, `expired`, `not yet valid` or `revoked`.
        hosts: Names and addresses, of a server.
    """

    name: str
    path: Path | None
    subject: str
    serial: str
    begins: datetime
    ends: datetime
    state: str
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Revocations:
    """The revocation list: when it was made and when it ends, and how many it names."""

    path: Path
    updated: datetime
    ends: datetime | None
    count: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All of a folder. What is not there is None."""

    authority: Shown
    server: Shown | None
    clients: list[Shown]
    revocations: Revocations | None


def show(folder: Path) -> Listing:
    """Return what is in a folder; nothing is locked and nothing needs to be writable.

    Raises:
        NoAuthority: There is no authority in the folder.
        PkiError: A file cannot be read.
    """
    now = datetime.now(UTC)
    authority = authority_certificate(folder)
    crl = None
    if (folder / CA_CRL).exists():
        crl = files.load(folder / CA_CRL, certificates.parse_crl)
    gone = frozenset(entry.serial_number for entry in crl or ())
    server_path = folder / SERVER_CERT
    server = None
    if server_path.exists():
        certificate = files.load(server_path, certificates.parse_certificate)
        server = _shown("server", server_path, certificate, gone, now)
    return Listing(
        _shown("ca", folder / CA_CERT, authority, gone, now),
        server,
        [_shown(name, path, one, gone, now) for name, path, one in issued(folder)],
        None if crl is None else _revocations(folder / CA_CRL, crl),
    )


def _revocations(path: Path, crl: x509.CertificateRevocationList) -> Revocations:
    return Revocations(path, crl.last_update_utc, crl.next_update_utc, len(crl))


def _shown(
    name: str,
    path: Path | None,
    certificate: x509.Certificate,
    revoked: frozenset[int],
    now: datetime,
) -> Shown:
    return Shown(
        name,
        path,
        ",".join(rdn.rfc4514_string() for rdn in certificate.subject.rdns),
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        _state(certificate, revoked, now),
        tuple(host_text(host) for host in certificates.hosts_of(certificate)),
    )


def _state(certificate: x509.Certificate, revoked: frozenset[int], now: datetime) -> str:
    if certificate.serial_number in revoked:
        return REVOKED
    if certificate.not_valid_after_utc <= now:
        return EXPIRED
    if certificate.not_valid_before_utc > now:
        return EARLY
    if certificate.not_valid_after_utc - now < WARN_BEFORE:
        return SOON
    return OK
