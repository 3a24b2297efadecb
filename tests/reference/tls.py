"""What TlsStream does, in the most obvious way: an SSLSocket, one record at a time.

The plain twin of nbdfleece/datapath/tls.py.
"""

from __future__ import annotations

import contextlib
import socket
import ssl


class PlainTlsStream:
    """TLS on a non-blocking socket, by way of the standard library's own socket."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._sock = context.wrap_socket(
            sock,
            server_side=server_side,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=True,
            server_hostname=None if server_side else "localhost",
        )
        self.family = self._sock.family

    def do_handshake(self) -> bool:
        """Go on with the handshake; tell whether it is over."""
        try:
            self._sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        return True

    def pending(self) -> int:
        return self._sock.pending()

    def recv_into(self, buffer: memoryview, /) -> int:
        try:
            return self._sock.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, data: memoryview, /) -> int:
        try:
            return self._sock.send(data[:16384])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        self._sock.setsockopt(level, option, value)

    def fileno(self) -> int:
        return self._sock.fileno()

    def shutdown(self, how: int, /) -> None:
        self._sock.setblocking(True)
        self._sock.settimeout(0.01)
        with contextlib.suppress(OSError):
            self._sock.unwrap()

    def close(self) -> None:
        self._sock.close()
