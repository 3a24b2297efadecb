"""TLS on a non-blocking socket, in the shape of a socket.

::

    socket -> raw -> incoming -> [ OpenSSL ] -> recv_into            decrypted, into the caller's
    socket <- sealed <- outgoing <- [ OpenSSL ] <- send              memory

Invariants
  T1  Only bytes of the socket reach OpenSSL, and only what comes out of it is handed on. What was
      received before the stream was made is none of it: whoever read the plain socket must have
      nothing left.
  T2  `send` reports bytes as taken only as the socket takes the encrypted ones, the last of them
      when it has all: nothing waits here that the caller believes gone.
  T3  What TLS itself has to say (answers to the peer's key updates) is bounded: a peer that asks
      and does not read is not read from.
  T4  Nothing blocks, and nothing but `handshake` awaits.

A stream that ends without close_notify ends all the same: every request and reply tells its
length, so what was cut off is seen to be.

# FAST: an SSLObject between memory buffers in place of an SSLSocket, with which OpenSSL makes two
# system calls per record it receives, and one per record it sends: a short request costs 2.9
# microseconds to receive, not 4.5, and a GiB of replies 0.45 seconds to encrypt and send, not 0.51
# (processor time); plain form in tests/reference/tls.py

Spec: NBD proto.md "TLS support".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import socket
import ssl
from collections.abc import Callable
from typing import Final, cast

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import READ_PIECE
from nbdfleece.base.units import KiB
from nbdfleece.datapath.stream import WantsRead, WantsWrite

_RAW: Final = 64 * KiB  # encrypted bytes received at once
# Bytes encrypted and sent at once, for which OpenSSL keeps memory: a piece of a READ with its
# header. Half as much costs 6 % of the time.
_STEP: Final = READ_PIECE + 4 * KiB
_TURN_BYTES: Final = 512 * KiB  # decrypted for one caller before others get their turn
_MAX_OWN: Final = 4 * KiB  # see T3; no peer has a reason to ask a hundred times
_NOTHING: Final = memoryview(b"")

_ReadInto = Callable[[int, memoryview], int]


class TlsStream:
    """A socket with TLS on it; see datapath.stream.Stream.

    Args:
        sock: Connected and non-blocking. Owned by the stream from now on.
        ssl_context: Certificates and rules. Renegotiation should be off in it.
        server_side: We are the server.
        server_hostname: As a client: the name that the server's certificate must have.

    Attributes:
        family: The address family of the socket.
    """

    def __init__(
        self,
        sock: socket.socket,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool = True,
        server_hostname: str | None = None,
    ) -> None:
        self.family: int = sock.family
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = ssl_context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        # Anonymous memory costs nothing until it is used.
        self._raw = memoryview(mmap.mmap(-1, _RAW))
        self._dry = True  # OpenSSL has nothing for us before the socket has more for it
        self._ended = False  # the peer sends no more
        self._failure: OSError | None = None  # what receiving raises from now on
        self._sealed = _NOTHING  # encrypted, and not with the socket yet
        self._owed = 0  # the caller's bytes among them that were not reported as taken

    async def handshake(self) -> None:
        """Begin TLS.

        Raises:
            PeerViolation: The peer does not speak TLS, or has not shown what it must.
            OSError: The connection failed.

        Cancel: the stream is of no further use.
        """
        loop = asyncio.get_running_loop()
        is_done = False
        while not is_done:
            try:
                self._ssl.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self._say_goodbye()  # with the alert
                raise PeerViolation(f"TLS handshake failed: {_words(error)}") from error
            if self._outgoing.pending:
                await loop.sock_sendall(self._sock, self._outgoing.read())
            if not is_done:
                received = await loop.sock_recv(self._sock, _RAW)
                if not received:
                    raise ConnectionResetError(errno.ECONNRESET, "closed in the TLS handshake")
                self._incoming.write(received)
        self._dry = not self._incoming.pending

    def peer_certificate(self) -> bytes | None:
        """Return the peer's certificate as DER; None when it has none or nobody verified it."""
        if self._ssl.context.verify_mode == ssl.CERT_NONE:
            return None
        return self._ssl.getpeercert(binary_form=True)

    def version(self) -> str:
        """Return the version of the protocol, such as "TLSv1.3"; "" before the handshake."""
        return self._ssl.version() or ""

    # --- receiving -----------------------------------------------------------------------------

    def pending(self) -> int:
        """Return not 0 when `recv_into` may have something that no poll of the socket announces."""
        if self._ended or self._failure is not None:
            return 1
        return 0 if self._dry else self._ssl.pending() or self._incoming.pending

    def recv_into(self, buffer: memoryview, /) -> int:
        """Decrypt into `buffer`, as much as there is.

        Returns:
            How many bytes; 0 when the peer sends no more, in good order or not.

        Raises:
            WantsWrite: First the socket must take what TLS itself has to say (T3).
            BlockingIOError: There was nothing.
            OSError: The connection failed, or what came is not what the peer sent.
        """
        if self._outgoing.pending > _MAX_OWN:
            self._send_own()
        if self._failure is not None:
            raise self._failure
        view = buffer[:_TURN_BYTES]
        got, room = 0, len(view)
        read, incoming = cast("_ReadInto", self._ssl.read), self._incoming
        failure: OSError | None = None
        is_drained = False  # the socket has been asked and had less than it could give
        while got < room and not self._ended:
            if self._dry:
                if is_drained:
                    break
                count = self._receive_raw(may_wait=got > 0)
                if not count:
                    break
                is_drained = count < _RAW
            try:
                count = read(room - got, view[got:])
            except ssl.SSLWantReadError:
                self._dry = True
                continue
            except ssl.SSLZeroReturnError:  # in place of 0, once we have said goodbye ourselves
                count = 0
            except ssl.SSLError as error:
                failure = self._failure = OSError(errno.EPROTO, f"TLS: {_words(error)}")
                break
            self._ended = not count
            self._dry = not incoming.pending and not self._ssl.pending()
            got += count
        if self._outgoing.pending and not self._sealed:
            with contextlib.suppress(OSError):
                self._send_own()
        if got or self._ended:
            return got
        raise failure or BlockingIOError(errno.EAGAIN, "nothing to receive")

    def _receive_raw(self, *, may_wait: bool) -> int:
        """Receive for OpenSSL, once; return how many bytes, 0 at the end of the stream.

        Args:
            may_wait: There is something for the caller already: 0, too, for whatever is wrong with
                the socket, which the next call will meet again.
        """
        try:
            count = self._sock.recv_into(self._raw)
        except OSError:
            if may_wait:
                return 0
            raise
        if count:
            self._incoming.write(self._raw[:count])
            self._dry = False
        else:
            self._ended = True
        return count

    # --- sending -------------------------------------------------------------------------------

    def send(self, data: memoryview, /) -> int:
        """Encrypt and send some of `data`; see datapath.stream.Stream for what to repeat.

        Args:
            data: At least a byte.

        Returns:
            How many bytes need not be repeated.

        Raises:
            WantsRead: The peer is in the middle of a message without which nothing can be sent.
            BlockingIOError: The socket takes nothing now.
            OSError: The connection failed.
        """
        owed = self._owed
        if not owed:
            if self._sealed or self._outgoing.pending:
                self._send_own()
            owed = self._owed = self._encrypt(data[:_STEP])
            self._sealed = memoryview(self._outgoing.read())
        taken = self._sock.send(self._sealed)
        if taken == len(self._sealed):
            self._sealed = _NOTHING
            self._owed = 0
            return owed
        self._sealed = self._sealed[taken:]
        taken = min(taken, owed - 1)
        self._owed = owed - taken
        return taken

    def _encrypt(self, data: memoryview) -> int:
        """Encrypt `data` into `outgoing`; return its length."""
        while True:
            try:
                return self._ssl.write(data)
            except ssl.SSLWantReadError:
                try:
                    if not self._receive_raw(may_wait=False):
                        raise BrokenPipeError(errno.EPIPE, "closed in a message of TLS")
                except BlockingIOError:
                    raise WantsRead(errno.EAGAIN, "the peer is in a message of TLS") from None
            except ssl.SSLError as error:
                raise OSError(errno.EPROTO, f"TLS: {_words(error)}") from error

    def _send_own(self) -> None:
        """Send all that TLS itself has to say, and what is sealed before it.

        Raises:
            WantsWrite: The socket does not take it all now.
            OSError: The connection failed.
        """
        try:
            while self._sealed or self._outgoing.pending:
                if not self._sealed:
                    self._sealed = memoryview(self._outgoing.read())
                self._sealed = self._sealed[self._sock.send(self._sealed) :]
        except BlockingIOError:
            raise WantsWrite(errno.EAGAIN, "TLS has something to say") from None

    # --- the end -------------------------------------------------------------------------------

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option of the socket."""
        self._sock.setsockopt(level, option, value)

    def fileno(self) -> int:
        """Return the descriptor to wait on, -1 after `close`."""
        return self._sock.fileno()

    def shutdown(self, how: int, /) -> None:
        """End the stream in good order, as far as that goes without waiting: close_notify, FIN."""
        assert how == socket.SHUT_WR, "TLS has no other end"
        if not self._owed:
            with contextlib.suppress(ssl.SSLError):  # "wants read": the answer is not waited for
                self._ssl.unwrap()
        self._say_goodbye()

    def close(self) -> None:
        """Close the socket. Without `shutdown` before, the peer sees that something is wrong."""
        self._sock.close()

    def _say_goodbye(self) -> None:
        """Send what TLS still has to say, and FIN; then make room for the peer to hear it.

        Closed with bytes unread (the peer's own goodbye), TCP would send a reset, which takes from
        the peer what it has not read yet.
        """
        with contextlib.suppress(OSError):
            self._send_own()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.recv_into(self._raw)


def _words(error: ssl.SSLError) -> str:
    """Return what went wrong, as a person would say it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or "unknown error"
