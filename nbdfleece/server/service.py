"""The NBD server as the control plane sees it: there is one, started and stopped by command.

Where the daemon itself listens (`nbdfleece serve`), the server runs from beginning to end: it
cannot be started a second time, and only the daemon's own end stops it.

Errors speak QEMU's words where QEMU knows the error.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ConfigError
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.server.addresses import MAX_UNIX_PATH, TcpAddress, UnixAddress
from nbdfleece.server.exports import RemoveMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.server.addresses import Address
    from nbdfleece.server.authz import Authz
    from nbdfleece.server.exports import Exports
    from nbdfleece.server.server import Server
    from nbdfleece.server.tls import TlsCredentials

_ALREADY: Final = "NBD server already running"
_NOT: Final = "NBD server not running"


@dataclass(frozen=True, slots=True)
class Terms:
    """What clients are let in on.

    Attributes:
        credentials: For TLS, which all must use then; None: there is no TLS.
        authz: Who may go on when TLS has said who it is; None: everybody.
        max_connections: Clients at a time, 0 for any number; None: the default.
    """

    credentials: TlsCredentials | None = None
    authz: Authz | None = None
    max_connections: int | None = None


class NbdService:
    """Starts and stops the server.

    Args:
        server: It.
        exports: What it serves.
        is_permanent: It runs as long as the daemon does.
    """

    def __init__(self, server: Server, exports: Exports, *, is_permanent: bool) -> None:
        self._server = server
        self._exports = exports
        self._is_permanent = is_permanent
        self._is_busy = False  # being started or stopped
        self._when_stopped: Callable[[], None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether clients can connect."""
        return self._is_permanent or (bool(self._server.listeners) and not self._is_busy)

    def check_running(self) -> None:
        """Insist on a running server.

        Raises:
            CommandError: There is none.
        """
        if not self.is_running:
            raise CommandError(_NOT)

    def check_stopped(self) -> None:
        """Insist on there being no server.

        Raises:
            CommandError: There is one.
        """
        if self.is_running or self._is_busy:
            raise CommandError(_ALREADY)

    async def start(self, address: Address, terms: Terms, when_stopped: Callable[[], None]) -> None:
        """Listen.

        Args:
            address: Where.
            terms: For whom.
            when_stopped: Called when the server has stopped, or could not be started.

        Raises:
            CommandError: It runs already, or the address is not to be had. Nothing has changed.

        Cancel: undone.
        """
        self.check_stopped()
        self._is_busy = True
        try:
            self._server.configure(
                max_connections=terms.max_connections,
                credentials=terms.credentials,
                authz=terms.authz,
            )
            tls = TlsMode.OFF if terms.credentials is None else TlsMode.REQUIRE
            await self._server.listen(_checked(address), tls)
        except ConfigError as error:
            when_stopped()
            raise CommandError(_in_qemus_words(address, error)) from error
        except BaseException:
            when_stopped()
            raise
        finally:
            self._is_busy = False
        self._when_stopped = when_stopped

    async def stop(self) -> None:
        """Disconnect all clients, and remove all exports and the socket.

        Raises:
            CommandError: It does not run, or not on command.

        Cancel: it has stopped; exports that wait for requests go later.
        """
        self.check_running()
        if self._is_permanent:
            raise CommandError("the NBD server runs as long as the daemon does")
        self._is_busy = True
        try:
            for listener in list(self._server.listeners):
                self._server.unlisten(listener)
            self._server.disconnect_all("the NBD server is stopped")
            for export in list(self._exports):
                if export.root is not None:  # it may have gone while others were waited for
                    await self._exports.remove(export.options.id, RemoveMode.HARD)
        finally:
            self._is_busy = False
            if self._when_stopped is not None:
                self._when_stopped()
                self._when_stopped = None


def _checked(address: Address) -> Address:
    """Return a unix address whose path is one, and fits.

    Raises:
        ConfigError: It does not.
    """
    if not isinstance(address, UnixAddress):
        return address
    try:
        path = os.fsencode(address.path)
    except UnicodeEncodeError:  # half of a surrogate pair
        path = b"\0"
    if b"\0" in path:
        raise ConfigError(f"UNIX socket path {address.path!a} is not a file name")
    if not 0 < len(path) <= MAX_UNIX_PATH:
        raise ConfigError(f"UNIX socket path '{address.path}' is too long")
    return address


def _in_qemus_words(address: Address, error: ConfigError) -> str:
    """Return why a server could not listen, as QEMU says it."""
    cause = error.__cause__
    if isinstance(cause, UnicodeError) and isinstance(address, TcpAddress):
        where = f"{address.host}:{address.port}"
        return f"address resolution failed for {where}: Name or service not known"
    if not isinstance(cause, OSError):
        return str(error)
    if isinstance(cause, socket.gaierror) and isinstance(address, TcpAddress):
        where = f"{address.host}:{address.port}"
        return f"address resolution failed for {where}: {cause.strerror}"
    if isinstance(address, UnixAddress):
        return f"Failed to bind socket to {address.path}: {cause.strerror}"
    return f"Failed to bind socket: {cause.strerror}"
