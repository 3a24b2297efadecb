"""Listening sockets: opened, accepted from, closed.

Invariants
  L1  A unix socket is never accessible to anybody but its owner, not even while it is being made.
  L2  Only the socket file of a server that is gone is ever replaced, and only our own is removed.
  L3  Running out of descriptors delays new connections and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import ACCEPT_RETRY_S, LISTEN_BACKLOG
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.server.addresses import (
    VSOCK_ANY,
    Address,
    FdAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

_UNIX_MODE: Final = 0o600
_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """One address that is listened on.

    Attributes:
        address: Where; with the port that the system chose, if it was to choose.
        tls: What connections here may do about TLS.
        sockets: The listening sockets: one, or one for each address that a host name has.
    """

    def __init__(
        self, address: Address, sockets: list[socket.socket], file: os.stat_result | None = None
    ) -> None:
        self.address = address
        self.tls = TlsMode.OFF
        self.sockets = sockets
        self._file = file  # of the unix socket that we made
        # The working folder may be another one when it is removed.
        self._path = Path(address.path).absolute() if isinstance(address, UnixAddress) else None
        self._retry: asyncio.TimerHandle | None = None

    @property
    def needs_tls(self) -> bool:
        """Whether clients get nothing here without TLS."""
        return self.tls is TlsMode.REQUIRE

    def describe(self) -> str:
        """Return where it listens, and what it does about TLS, as `--listen` takes it."""
        place = self.address.describe().replace(",", ",,")
        return place if self.tls is TlsMode.OFF else f"{place},tls={self.tls.name.lower()}"

    def start(self, take: Callable[[socket.socket], None]) -> None:
        """Hand every connection that arrives, non-blocking, to `take`, which must not raise.

        A callback rather than a task: a connection cannot get lost between being accepted and
        being taken when the server stops.
        """
        loop = asyncio.get_running_loop()
        for sock in self.sockets:
            loop.add_reader(sock, self._accept, sock, take)

    def close(self) -> None:
        """Stop listening and remove the socket file, if it still is ours. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        file, self._file = self._file, None
        path = self._path
        if file is None or path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), file):
                path.unlink()

    def _accept(self, sock: socket.socket, take: Callable[[socket.socket], None]) -> None:
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            where, why = self.address.describe(), error.strerror
            if error.errno in _OUT_OF_RESOURCES:
                _log.warning("%s: accept: %s; trying again", where, why)
                self._pause(take)
            else:  # this client went away before it was accepted
                _log.debug("%s: accept: %s", where, why)
            return
        connection.setblocking(False)
        take(connection)

    def _pause(self, take: Callable[[socket.socket], None]) -> None:
        """Accept nothing for a moment (L3); clients wait in the queue of the socket."""
        loop = asyncio.get_running_loop()
        for sock in self.sockets:
            loop.remove_reader(sock)
        self._retry = loop.call_later(ACCEPT_RETRY_S, self.start, take)


async def open_listener(address: Address) -> Listener:
    """Listen on `address`.

    Raises:
        ConfigError: That cannot be; the text says why. Nothing is left open.

    Cancel: safe.
    """
    try:
        if isinstance(address, UnixAddress):
            return _listen_unix(address)
        if isinstance(address, TcpAddress):
            return await _listen_tcp(address)
        if isinstance(address, VsockAddress):
            return Listener(address, [_listen_vsock(address)])
        return Listener(address, [_adopt(address)])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address.describe()}: {error.strerror or error}"
        ) from error
    except ValueError as error:  # of Python's own, of names that no system call is asked about
        raise ConfigError(f"cannot listen on {address.describe()}: {error}") from error


# --- unix ------------------------------------------------------------------------------------


def _listen_unix(address: UnixAddress) -> Listener:
    """Return a listener on a unix socket, in place of one whose server is gone."""
    path = Path(address.path)
    sock = _new_socket(socket.AF_UNIX)
    try:
        # Linux makes the file with the mode of the unbound socket, so there is no moment in which
        # it is open to others (L1), and the umask, which all threads share, stays as it is.
        os.fchmod(sock.fileno(), _UNIX_MODE)
        with _folder_locked(path.parent):
            try:
                sock.bind(address.path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _check_replaceable(address, path)
                path.unlink()
                sock.bind(address.path)
            sock.listen(LISTEN_BACKLOG)
            return Listener(address, [sock], path.lstat())
    except BaseException:
        sock.close()
        raise


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Keep other servers that start now from replacing socket files in this folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _check_replaceable(address: UnixAddress, path: Path) -> None:
    """Check that what stands at `path` is a socket whose server is gone.

    Raises:
        ConfigError: It is something else, or somebody listens there.
    """
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(
            f"cannot listen on {address.describe()}: there is a file that is not a socket"
        )
    with _new_socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass  # its queue is full: alive
    raise ConfigError(f"cannot listen on {address.describe()}: another server is listening there")


# --- the others ------------------------------------------------------------------------------


async def _listen_tcp(address: TcpAddress) -> Listener:
    """Return a listener on every address that the host name has, all on the same port."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    port = address.port
    try:
        for family, _, _, _, place in dict.fromkeys(found):
            host = str(place[0])
            sock = _listen_on_port(family, host, port)
            sockets.append(sock)
            port = sock.getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return Listener(TcpAddress(address.host, port), sockets)


def _listen_on_port(family: int, host: str, port: int) -> socket.socket:
    sock = _new_socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has a socket of its own.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(LISTEN_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_vsock(address: VsockAddress) -> socket.socket:
    sock = _new_socket(socket.AF_VSOCK)
    try:
        cid = socket.VMADDR_CID_ANY if address.cid == VSOCK_ANY else address.cid
        sock.bind((cid, address.port))
        sock.listen(LISTEN_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _adopt(address: FdAddress) -> socket.socket:
    """Return the socket that was handed to us; it is ours from now on."""
    sock = socket.socket(fileno=address.fd)
    is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not is_listening or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ConfigError(f"cannot listen on {address.describe()}: not a listening stream socket")
    sock.setblocking(False)
    sock.set_inheritable(False)  # it was inheritable, or it would not be here
    return sock


def _new_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock
