"""A certificate authority in a folder: made, asked for a client's certificate, told to revoke one.

Invariants
  A1  What is there is never overwritten, but for the revocation list, which only grows.
  A2  A certificate is in `issued` before its key is anywhere that a person looks, so whatever was
      given away can be revoked, also when the client's folder has been moved.
  A3  `init` makes its files in one order, so whatever an interrupted run has made is a beginning
      of that order, and the next run goes on from there. It goes on from nothing else: a list of
      the revoked that is missing among other files must not be taken for an empty one.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError
from nbdfleece.pki import certificates, files
from nbdfleece.pki.certificates import Authority
from nbdfleece.pki.errors import AlreadyThere, ClientNotFound, NoAuthority, PkiError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryptography import x509

CA_KEY: Final = "ca-key.pem"
CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
SERVER_KEY: Final = "server-key.pem"
SERVER_CERT: Final = "server-cert.pem"
CLIENT_KEY: Final = "client-key.pem"
CLIENT_CERT: Final = "client-cert.pem"
CLIENTS: Final = "clients"
ISSUED: Final = "issued"

_ORDER: Final = (CA_KEY, CA_CERT, CA_CRL, SERVER_KEY, SERVER_CERT)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_ORG: Final = 64  # characters; the bound that X.520 sets


def init(folder: Path, hosts: Sequence[x509.GeneralName]) -> None:
    """Make an authority and a server's certificate, as far as they are not there.

    Args:
        folder: Made if it is not there.
        hosts: What the server is called by its clients; at least one.

    Raises:
        AlreadyThere: There is nothing left to make, or what is there does not belong together.
        PkiError: The folder cannot be used as it is.
    """
    files.make_folder(folder)
    now = datetime.now(UTC)
    with files.locked(folder):
        _check_beginning(folder)
        key = _key(folder / CA_KEY)
        if not (folder / CA_CERT).exists():
            made = certificates.make_authority(key, now)
            _write_public(folder / CA_CERT, certificates.certificate_pem(made.certificate))
        authority = _load(folder, now)
        if not (folder / CA_CRL).exists():
            crl = certificates.make_crl(authority, None, (), now)
            _write_public(folder / CA_CRL, certificates.crl_pem(crl))
        server = certificates.make_server(authority, _key(folder / SERVER_KEY), hosts, now)
        _write_public(folder / SERVER_CERT, certificates.certificate_pem(server))


def add_client(folder: Path, name: str, org: str | None) -> Path:
    """Make the folder of a client.

    Args:
        folder: An authority's folder.
        name: The client's name, and its folder's.
        org: Its organization.

    Returns:
        The new folder.

    Raises:
        ConfigError: The names are not such as a client can have.
        AlreadyThere: The client's folder is there.
        NoAuthority: There is no authority in the folder.
        PkiError: The folder cannot be used as it is.
    """
    _check_names(name, org)
    now = datetime.now(UTC)
    made = folder / CLIENTS / name
    new = made.with_name(f".{name}.new")
    with files.locked(folder):
        authority = _load(folder, now)
        _clear_leftovers(folder)
        if made.exists():
            raise AlreadyThere(f"'{made}' is there already; to have a new one, move it away first")
        key = certificates.new_key()
        certificate = certificates.make_client(authority, key, name, org, now)
        pem = certificates.certificate_pem(certificate)
        for needed in (made.parent, new, folder / ISSUED):
            files.make_folder(needed)
        files.sync_folder(folder)
        _write_public(new / CLIENT_CERT, pem)  # first: it tells a later run what to clear
        _write_public(new / CA_CERT, files.read(folder / CA_CERT))
        files.write(new / CLIENT_KEY, certificates.key_pem(key), private=True)
        _write_public(_record(folder, name, certificate), pem)
        files.rename_folder(new, made)
    return made


def revoke(folder: Path, name: str) -> int:
    """Revoke every certificate that was issued to a client.

    Returns:
        How many of them had not been revoked before.

    Raises:
        ConfigError: No client can have such a name.
        ClientNotFound: There is no certificate of that client.
        NoAuthority: There is no authority in the folder.
        PkiError: The folder cannot be used as it is; nothing has changed.
    """
    _check_names(name, None)
    now = datetime.now(UTC)
    with files.locked(folder):
        authority = _load(folder, now)
        _clear_leftovers(folder)
        found = {one.serial_number for client, _, one in issued(folder) if client == name}
        if not found:
            raise ClientNotFound(f"no client '{name}' was ever given a certificate in '{folder}'")
        old = files.load(folder / CA_CRL, certificates.parse_crl)
        if not certificates.is_crl_of(old, authority.certificate):
            raise PkiError(f"'{folder / CA_CRL}' was not made by the authority in that folder")
        fresh = sorted(found - {entry.serial_number for entry in old})
        if fresh:
            crl = certificates.make_crl(authority, old, fresh, now)
            _write_public(folder / CA_CRL, certificates.crl_pem(crl))
    return len(fresh)


def issued(folder: Path) -> list[tuple[str, Path | None, x509.Certificate]]:
    """Return the clients' certificates: name, the client's folder if it is there, certificate.

    Raises:
        PkiError: A file cannot be read.
    """
    records = [
        (path.stem.rpartition(".")[0], files.load(path, certificates.parse_certificate))
        for path in (folder / ISSUED).glob("[!.]*.*.pem")
    ]
    folders = {
        files.load(path, certificates.parse_certificate): path.parent
        for path in (folder / CLIENTS).glob(f"[!.]*/{CLIENT_CERT}")
    }
    unrecorded = folders.keys() - {certificate for _, certificate in records}
    records += [(folders[certificate].name, certificate) for certificate in unrecorded]
    records.sort(key=lambda record: (record[0], record[1].not_valid_before_utc))
    return [(name, folders.get(certificate), certificate) for name, certificate in records]


def authority_certificate(folder: Path) -> x509.Certificate:
    """Return the certificate of the authority.

    Raises:
        NoAuthority: There is none in the folder.
        PkiError: It cannot be read.
    """
    path = folder / CA_CERT
    if not path.exists():
        raise NoAuthority(f"there is no '{path}'; pki init makes it")
    return files.load(path, certificates.parse_certificate)


def _load(folder: Path, now: datetime) -> Authority:
    certificate = authority_certificate(folder)
    if not (folder / CA_KEY).exists():
        raise NoAuthority(f"there is no '{folder / CA_KEY}', and nothing can be signed without it")
    authority = Authority(certificate, files.load(folder / CA_KEY, certificates.parse_key))
    try:
        certificates.check_authority(authority, now)
    except PkiError as error:
        raise PkiError(f"'{folder}': {error}") from error
    return authority


def _check_beginning(folder: Path) -> None:
    missing = [name for name in _ORDER if not (folder / name).exists()]
    if not missing:
        raise AlreadyThere(
            f"'{folder}' has an authority and a server's certificate already; "
            f"to renew the server's, move {SERVER_CERT} away first"
        )
    later = [name for name in _ORDER[_ORDER.index(missing[0]) :] if name not in missing]
    if missing[0] in (CA_KEY, CA_CERT, CA_CRL):
        later += [name for name in (ISSUED, CLIENTS) if (folder / name).exists()]
    if later:
        raise AlreadyThere(
            f"'{folder}' has {later[0]} and no {missing[0]}; put it back, or take another folder"
        )


def _clear_leftovers(folder: Path) -> None:
    """Remove what an interrupted `add_client` has left: a key that nobody has seen, its record."""
    for path in (folder / CLIENTS).glob(".*.new"):
        name = path.name.removeprefix(".").removesuffix(".new")
        if (path / CLIENT_CERT).exists():
            certificate = files.load(path / CLIENT_CERT, certificates.parse_certificate)
            files.remove(_record(folder, name, certificate))
        files.remove_folder(path)


def _record(folder: Path, name: str, certificate: x509.Certificate) -> Path:
    return folder / ISSUED / f"{name}.{certificate.serial_number:x}.pem"


def _key(path: Path) -> certificates.PrivateKey:
    """Return the key in a file; a new one is written there if there is none."""
    if not path.exists():
        files.write(path, certificates.key_pem(certificates.new_key()), private=True)
    return files.load(path, certificates.parse_key)


def _write_public(path: Path, pem: bytes) -> None:
    files.write(path, pem, private=False)


def _check_names(name: str, org: str | None) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot be a client's name: 1 to 64 letters, digits, and after the first "
            "also _ . -"
        )
    if org is not None and not (0 < len(org) <= _MAX_ORG and org.isprintable() and org.strip()):
        raise ConfigError(
            f"'{org}' cannot be an organization: 1 to {_MAX_ORG} printable characters"
        )
