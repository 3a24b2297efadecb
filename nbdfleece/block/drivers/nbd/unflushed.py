"""What a server has replied to and not flushed: done again on the server that comes back.

::

    reply to a change -> [ oldest ... newest ] -> forgotten by a FLUSH that was sent behind it
                                `-> on the first connection after none was left: repeated in order

Invariants
  U1  Whatever was replied to is on stable storage of the server, or is here.
  U2  Changes are repeated in the order of their replies. Of two that overlap and were under way at
      the same time, either may win: nobody was promised more.
  U3  Memory is bounded: a change that finds it full flushes before it is done.

A FUA write is kept as well: repeated without it, an older one to the same place would win.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.limits import NBD_UNFLUSHED_BYTES, NBD_UNFLUSHED_REQUESTS
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHANGES: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM})


@dataclass(frozen=True, slots=True)
class Change:
    """A request that changed the export; `data` is the payload of a WRITE."""

    command: int
    offset: int
    length: int
    flags: int
    data: bytes | None


class Unflushed:
    """The changes that a server may still lose."""

    def __init__(self) -> None:
        self._changes: deque[Change] = deque()
        self._bytes = 0
        self._forgotten = 0  # changes before the first one here

    def __iter__(self) -> Iterator[Change]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    @property
    def newest(self) -> int:
        """What a FLUSH that is sent now will let us forget."""
        return self._forgotten + len(self._changes)

    def note(
        self, command: int, offset: int, length: int, flags: int, data: memoryview | None
    ) -> bool:
        """Keep a request that was replied to, if it has changed anything.

        Returns:
            Whether a flush has to make room for it (U3).
        """
        if command not in _CHANGES:
            return False
        flags &= ~NBD_CMD_FLAG_FAST_ZERO  # it has been done; how fast does not matter any more
        kept = None if data is None else bytes(data)
        self._changes.append(Change(command, offset, length, flags, kept))
        self._bytes += 0 if kept is None else len(kept)
        return self._bytes > NBD_UNFLUSHED_BYTES or len(self) > NBD_UNFLUSHED_REQUESTS

    def forget(self, newest: int) -> None:
        """Forget what was here when `newest` was asked for: a FLUSH sent then has succeeded."""
        while self._changes and self._forgotten < newest:
            data = self._changes.popleft().data
            self._bytes -= 0 if data is None else len(data)
            self._forgotten += 1
