"""TLS credentials: a folder of PEM files as QEMU's, or a file of pre-shared keys, made a context.

::

    x509: ca-cert.pem [ca-crl.pem] server-cert.pem server-key.pem       PSK: keys.psk

Invariants
  T1  What is missing or broken is an error before anything changes: nothing is served with less
      than was asked for, and a failed `reload` leaves what there was.
  T2  An `Offer` belongs to one handshake. A connection keeps the credentials it began with.
  T3  A client is verified to the CA, and against the revocation list where there is one, unless
      `verify_peer` is off; then it proves nothing, and no certificate of it is looked at.
  T4  Sessions are not resumed by ticket: who is revoked must not come back on an old proof.

Pre-shared keys always authenticate by (EC)DHE: a key that leaks does not open what was recorded.

Spec: NBD proto.md "TLS support". Follows: QEMU crypto/tlscredsx509.c, crypto/tlscredspsk.c.
"""

from __future__ import annotations

import contextlib
import ssl
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import MAX_PSK_FILE
from nbdfleece.base.needs import check_cryptography

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from cryptography import x509

CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
SERVER_CERT: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"
PSK_KEYS: Final = "keys.psk"

WARN_BEFORE_EXPIRY: Final = timedelta(days=30)

# OpenSSL's own groups of PSK ciphers hold some that do not encrypt. TLS 1.3 has a list of its own.
_PSK_CIPHERS: Final = (
    "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256"
)
_MAX_PSK_BYTES: Final = 256  # what OpenSSL's callback has room for, keys as well as names

if sys.version_info >= (3, 13):
    HAS_PSK: Final = ssl.HAS_PSK
else:
    HAS_PSK: Final = False


@dataclass(frozen=True, slots=True)
class Expiry:
    """When something in the folder ceases to be valid.

    Attributes:
        file: Its name in the folder.
        subject: Whose it is, in RFC 4514 order.
        ends: The last moment.
    """

    file: str
    subject: str
    ends: datetime


class Offer:
    """What one handshake is made with.

    Attributes:
        context: For this handshake alone.
        psk: The name that came with a known key; holds once the handshake has succeeded.
    """

    __slots__ = ("context", "psk")

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.psk: str | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One reading of the folder."""

    offer: Callable[[], Offer]
    expiries: tuple[Expiry, ...]


class TlsCredentials:
    """The credentials in `folder`.

    Args:
        folder: Read once now, and at each `reload`.
        verify_peer: Clients must show a certificate that the CA has signed. Off has no meaning with
            pre-shared keys: those prove both sides.

    Raises:
        ConfigError: Something is missing or broken; the text names the file.
    """

    def __init__(self, folder: Path, *, verify_peer: bool = True) -> None:
        self.folder = folder
        self._verify_peer = verify_peer
        self._loaded = _load(folder, verify_peer=verify_peer)

    @property
    def expiries(self) -> tuple[Expiry, ...]:
        """What ceases to be valid, and when."""
        return self._loaded.expiries

    def offer(self) -> Offer:
        """Return what the next handshake is to be made with."""
        return self._loaded.offer()

    def reload(self) -> None:
        """Read the folder again, for handshakes to come.

        Raises:
            ConfigError: As the constructor; the old credentials stay in use.
        """
        self._loaded = _load(self.folder, verify_peer=self._verify_peer)

    def warnings(
        self, now: datetime | None = None, *, ahead: timedelta = WARN_BEFORE_EXPIRY
    ) -> list[str]:
        """Return a sentence for each thing that has expired or will within `ahead`."""
        now = datetime.now(UTC) if now is None else now
        found = []
        for expiry in self.expiries:
            left = expiry.ends - now
            if left > ahead:
                continue
            when = expiry.ends.strftime("%Y-%m-%dT%H:%M:%SZ")
            what = f"{self.folder / expiry.file} ({expiry.subject})"
            if left <= timedelta():
                found.append(f"{what} has expired: {when}")
            else:
                found.append(f"{what} expires in {left.days} days: {when}")
        return found


def _load(folder: Path, *, verify_peer: bool) -> _Loaded:
    if not folder.is_dir():
        raise ConfigError(f"TLS credentials: '{folder}' is not a folder")
    has_keys = (folder / PSK_KEYS).exists()
    has_certificate = (folder / SERVER_CERT).exists()
    if has_keys and has_certificate:
        raise ConfigError(
            f"TLS credentials: '{folder}' has both {PSK_KEYS} and {SERVER_CERT}; "
            "give each a folder of its own"
        )
    if has_keys:
        return _load_psk(folder / PSK_KEYS)
    return _load_x509(folder, verify_peer=verify_peer)


def _new_context() -> ssl.SSLContext:
    """Return a context without credentials, with everything else as it should be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


# --- x509 ------------------------------------------------------------------------------------


def _load_x509(folder: Path, *, verify_peer: bool) -> _Loaded:
    names = [SERVER_CERT, SERVER_KEY] + ([CA_CERT] if verify_peer else [])
    for name in names:
        if not (folder / name).exists():
            raise ConfigError(f"TLS credentials: '{folder / name}': No such file or directory")
    check_cryptography()
    context = _new_context()
    certificate, key = folder / SERVER_CERT, folder / SERVER_KEY
    expiries = [_expiry_of_certificate(certificate)]
    with _naming(key):
        key.read_bytes()  # OpenSSL does not say which of the two it could not read
    with _naming(key, "does not go with the certificate, or is broken"):
        context.load_cert_chain(certificate, key, password=_refuse_password(key))
    if verify_peer:
        authority, revoked = folder / CA_CERT, folder / CA_CRL
        context.verify_mode = ssl.CERT_REQUIRED
        expiries.append(_expiry_of_certificate(authority))
        with _naming(authority):
            context.load_verify_locations(cafile=authority)
        if revoked.exists():
            # Looked at first: OpenSSL would trust any certificates in that file.
            expiries.append(_expiry_of_list(revoked))
            with _naming(revoked):
                context.load_verify_locations(cafile=revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return _Loaded(lambda: Offer(context), tuple(expiries))


def _refuse_password(key: Path) -> Callable[[], str]:
    def refuse() -> str:  # without it, OpenSSL asks on the terminal
        raise ConfigError(f"TLS credentials: '{key}': the key is encrypted")

    return refuse


@contextlib.contextmanager
def _naming(path: Path, otherwise: str = "not a PEM file of what it should be") -> Iterator[None]:
    """Turn errors about a file into a ConfigError that names it."""
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"TLS credentials: '{path}': {otherwise}") from error
    except OSError as error:
        raise ConfigError(f"TLS credentials: '{path}': {error.strerror}") from error


def _expiry_of_certificate(path: Path) -> Expiry:
    """Return when the first certificate of a file ends.

    Raises:
        ConfigError: There is none in it.
    """
    from cryptography import x509

    with _naming(path):
        found = x509.load_pem_x509_certificate(path.read_bytes())
        ends = found.not_valid_after_utc
    return Expiry(path.name, _name_of(found.subject), ends)


def _expiry_of_list(path: Path) -> Expiry:
    """Return when a revocation list ends; a client whose list has ended is let in by nobody.

    Raises:
        ConfigError: The file holds no list, or something else too.
    """
    from cryptography import x509

    with _naming(path):
        data = path.read_bytes()
        if b"CERTIFICATE-----" in data:
            raise ValueError
        found = x509.load_pem_x509_crl(data)
        ends = found.next_update_utc or datetime.max.replace(tzinfo=UTC)
    return Expiry(path.name, f"revocations by {_name_of(found.issuer)}", ends)


def _name_of(name: x509.Name) -> str:
    return name.rfc4514_string()


# --- pre-shared keys -------------------------------------------------------------------------


def _load_psk(path: Path) -> _Loaded:
    if not HAS_PSK:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ConfigError(
            f"TLS credentials: '{path}': pre-shared keys need Python 3.13 or later with OpenSSL's "
            f"support for them, and this is Python {version}"
        )
    keys = parse_psk(path)

    def offer() -> Offer:
        # The callback is not told of which connection it is asked, so each gets a context.
        return _psk_offer(keys)

    offer()
    return _Loaded(offer, ())


def _psk_offer(keys: Mapping[str, bytes]) -> Offer:
    context = _new_context()
    context.set_ciphers(_PSK_CIPHERS)
    offer = Offer(context)

    def key_of(name: str | None) -> bytes:
        found = keys.get(name or "", b"")
        offer.psk = name if found else None
        return found  # an empty key ends the handshake

    if sys.version_info >= (3, 13):
        context.set_psk_server_callback(key_of)
    return offer


def parse_psk(path: Path) -> dict[str, bytes]:
    """Return name -> key of a file with lines `NAME:HEXKEY`, as psktool of GnuTLS writes them.

    Raises:
        ConfigError: It cannot be read, or a line is something else; keys are not shown.
    """
    with _naming(path, "not UTF-8 text"):
        with path.open("rb") as file:
            text = file.read(MAX_PSK_FILE + 1)
        if len(text) > MAX_PSK_FILE:
            raise ConfigError(f"TLS credentials: '{path}': longer than {MAX_PSK_FILE} bytes")
        lines = text.decode().splitlines()
    keys: dict[str, bytes] = {}
    for number, name, key in _psk_lines(lines):
        place = f"TLS credentials: '{path}', line {number}"
        if key is None:
            raise ConfigError(f"{place}: not NAME:HEXKEY")
        if name in keys:
            raise ConfigError(f"{place}: '{name}' has a key already")
        keys[name] = key
    if not keys:
        raise ConfigError(f"TLS credentials: '{path}': no key in it")
    return keys


def _psk_lines(lines: list[str]) -> Iterator[tuple[int, str, bytes | None]]:
    """Yield (line number, name, key) of the lines that are not empty; key None: not well-formed.

    GnuTLS writes names that are not text as `#` and hexadecimal digits; there is no use for those.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, colon, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        is_good = colon and name and not name.startswith("#") and 0 < len(key) <= _MAX_PSK_BYTES
        is_good = is_good and len(name.encode()) < _MAX_PSK_BYTES
        yield number, name, key if is_good else None
