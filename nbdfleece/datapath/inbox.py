"""The receiving side of a connection: bytes of the socket, and payloads that bypass them.

::

    socket -> view [head ... tail)          headers and short payloads, parsed in place
          `-> payload [0 ... have ... end)  one long payload at a time, into memory of its own
          `-> nowhere                       a payload that has been refused

Invariants
  I1  At most one of: a payload is awaited, bytes are being skipped.
  I2  Memory follows what has arrived, not what a client has announced.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from nbdfleece.base.units import KiB, MiB

if TYPE_CHECKING:
    from nbdfleece.datapath.stream import Stream

CAPACITY: Final = 256 * KiB
_LAZY_FROM: Final = 1 * MiB  # larger payloads get memory that costs nothing until it is filled


class Inbox:
    """Received bytes of one connection.

    Attributes:
        view: The buffer; [head, tail) is unparsed.
        head: The parser moves it.
        tail: End of what was received.
        skipping: Bytes of a refused payload that are still to come.
    """

    def __init__(self, leftover: bytes) -> None:
        self.view = memoryview(mmap.mmap(-1, CAPACITY))
        self.head = 0
        self.tail = len(leftover)
        self.view[: self.tail] = leftover
        self.skipping = 0
        self._payload: memoryview | None = None
        self._have = 0

    def is_empty(self) -> bool:
        """Tell whether nothing has been begun and left incomplete."""
        return self.head == self.tail and self._payload is None and not self.skipping

    def is_full(self) -> bool:
        """Tell whether there is no room to receive anything: the parser must go on first."""
        return self._payload is None and self.tail == CAPACITY and self.head == 0

    @property
    def progress(self) -> int:
        """What changes while a long payload, wanted or not, comes in."""
        return self.skipping if self._payload is None else self._have

    def receive(self, stream: Stream) -> int:
        """Receive once; `is_full` does not hold.

        Returns:
            How many bytes came; 0 when the peer sends no more.

        Raises:
            BlockingIOError: There was nothing.
            OSError: The connection failed.
        """
        if self._payload is not None:
            count = stream.recv_into(self._payload[self._have :])
            self._have += count
            return count
        if self.tail == CAPACITY or self.head == self.tail:
            self.make_room()
        count = stream.recv_into(self.view[self.tail :])
        self.tail += count
        return count

    def make_room(self) -> None:
        """Move what is unparsed to the front."""
        rest = self.tail - self.head
        if rest:
            self.view[:rest] = self.view[self.head : self.tail]
        self.head, self.tail = 0, rest

    def clear(self) -> None:
        """Forget everything."""
        self.head = self.tail = self.skipping = 0
        self._payload = None

    def skip(self, length: int) -> bool:
        """Drop `length` bytes more from here on; True when all of them had come."""
        self.skipping += length
        count = min(self.skipping, self.tail - self.head)
        self.head += count
        self.skipping -= count
        return self.skipping == 0

    def await_payload(self, length: int) -> None:
        """Receive the next `length` bytes, not all of which are here, into their own memory."""
        have = self.tail - self.head
        lazy = length > _LAZY_FROM
        self._payload = memoryview(mmap.mmap(-1, length) if lazy else bytearray(length))
        self._payload[:have] = self.view[self.head : self.tail]
        self._have = have
        self.head = self.tail = 0

    def take_payload(self) -> memoryview | None:
        """Return the awaited payload, which is the caller's then; None when it is not complete."""
        payload = self._payload
        if payload is None or self._have < len(payload):
            return None
        self._payload = None
        return payload
