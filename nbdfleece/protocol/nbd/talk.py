"""Sequential protocols without I/O: a generator says what it needs, somebody else moves the bytes.

A `Talk` yields either a number ("give me exactly that many bytes") or bytes ("send these") and
returns its result. It reads like the protocol's description from top to bottom. A `Conversation`
runs one talk over received bytes that arrive in pieces of any size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")

Talk: TypeAlias = Generator[int | bytes, bytes, T]


class Conversation(Generic[T]):
    """One talk in progress.

    Attributes:
        result: What the talk returned; None before.
        is_over: The talk has returned.
    """

    def __init__(self, talk: Talk[T]) -> None:
        self._talk = talk
        self._received = bytearray()
        self._wish: int | bytes | None = None  # None: not begun
        self.result: T | None = None
        self.is_over = False

    @property
    def leftover(self) -> bytes:
        """Received bytes that the talk has not taken yet (once it is over: will never take)."""
        return bytes(self._received)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take received bytes; yield what to send, one item of the talk at a time.

        The iterator must be run to its end. When it yields the talk's last item, `result` is
        already there: what must be settled before the peer sees that item can be.

        Raises:
            Whatever the talk raises; it is over then.
        """
        self._received += data
        while not self.is_over:
            wish = self._wish
            if wish is None:
                self._resume(None)
            elif isinstance(wish, bytes):
                self._resume(b"")
                yield wish
            elif len(self._received) >= wish:
                taken = bytes(self._received[:wish])
                del self._received[:wish]
                self._resume(taken)
            else:
                return

    def _resume(self, data: bytes | None) -> None:
        """Begin the talk (None) or go on with `data`, to its next wish or to its end."""
        try:
            self._wish = next(self._talk) if data is None else self._talk.send(data)
        except StopIteration as end:
            self.result = end.value
            self.is_over = True
        except BaseException:
            self.is_over = True
            raise
