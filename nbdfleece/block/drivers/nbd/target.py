"""Which export of which server, and how to get there."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.disk_argument import without_token
from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import MAX_STRING
from nbdfleece.protocol.nbd import constants
from nbdfleece.protocol.nbd.strings import shown

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_PORT: Final = constants.NBD_DEFAULT_PORT
_MAX_UNIX_PATH: Final = 107  # sun_path without its zero byte


@dataclass(frozen=True, slots=True)
class InetServer:
    """A server on TCP.

    Attributes:
        host: Name or address.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixServer:
    """A server on a unix socket, at `path`."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class ClientTls:
    """That TLS is to be used, and never gone without.

    Attributes:
        folder: Holds ca-cert.pem, and if there are any ca-crl.pem, client-cert.pem and
            client-key.pem; as QEMU's tls-creds-x509. None: the CAs of the system, no certificate.
        hostname: What the server's certificate has to be for.
    """

    folder: str | None
    hostname: str

    def context(self) -> ssl.SSLContext:
        """Read the files and return a context that accepts this server only; may block.

        Raises:
            CommandError: A file cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.folder is None:
            _load("the CAs of the system", context.load_default_certs)
            return context
        ca, crl, certificate, key = (
            os.path.join(self.folder, name)
            for name in ("ca-cert.pem", "ca-crl.pem", "client-cert.pem", "client-key.pem")
        )
        _load(ca, lambda: context.load_verify_locations(ca))
        if os.path.lexists(crl):
            _load(crl, lambda: context.load_verify_locations(crl))
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        if os.path.lexists(certificate) or os.path.lexists(key):
            # With a password, so that OpenSSL does not ask for one at the terminal.
            _load(certificate, lambda: context.load_cert_chain(certificate, key, password=""))
        return context


@dataclass(frozen=True, slots=True)
class Target:
    """An export of another server.

    Attributes:
        server: Where it is.
        export: Its name there; empty for the server's default.
        tls: None: plaintext.
        dirty_bitmap: Name of a metadata context (`qemu:dirty-bitmap:NAME`) that takes the place of
            base:allocation. None: base:allocation, where the server has it.
    """

    server: InetServer | UnixServer
    export: str
    tls: ClientTls | None = None
    dirty_bitmap: str | None = None

    def __str__(self) -> str:
        return f"NBD server {self.server}, export {shown(without_token(self.export))}"

    @property
    def context(self) -> str:
        """The metadata context that answers block status."""
        return self.dirty_bitmap or constants.NBD_META_BASE_ALLOCATION


def make_target(
    server: InetServer | UnixServer,
    export: str,
    *,
    use_tls: bool,
    tls_folder: str | None,
    tls_hostname: str | None,
    dirty_bitmap: str | None,
) -> Target:
    """Return the target of its parts.

    Raises:
        CommandError: The parts do not go together, or the protocol has no room for one.
    """
    for what, text in (("export name", export), ("x-dirty-bitmap", dirty_bitmap or "")):
        if len(text.encode(errors="replace")) > MAX_STRING or "\0" in text:
            raise CommandError(f"{what} {shown(text)} is no string of at most {MAX_STRING} bytes")
    if isinstance(server, UnixServer) and not 0 < len(os.fsencode(server.path)) <= _MAX_UNIX_PATH:
        raise CommandError(f"'{server.path}' cannot be the path of a unix socket")
    if isinstance(server, InetServer) and not (server.host and 0 < server.port < 1 << 16):
        raise CommandError(f"'{server}' is no host and port")
    tls: ClientTls | None = None
    if use_tls:
        hostname = tls_hostname or (server.host if isinstance(server, InetServer) else "")
        if not hostname:
            raise CommandError("TLS over a unix socket needs tls-hostname to check the certificate")
        tls = ClientTls(tls_folder, hostname)
    elif tls_hostname is not None:
        raise CommandError("tls-hostname is of no use without TLS")
    return Target(server, export, tls, dirty_bitmap)


def _load(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # SSLError is an OSError, and has texts of many kinds
        text = error.strerror if type(error) is FileNotFoundError else str(error)
        raise CommandError(f"TLS credentials: '{what}': {text}") from error
