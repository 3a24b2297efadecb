"""A stream of bytes -> JSON objects, one after another, whatever stands between them.

QMP does not frame its messages: an object ends where its braces balance. The scan looks only at
quotes, escapes, braces and brackets, each byte once; `json` then judges the text as a whole.

Invariants
  R1  At most `max_bytes` of an unfinished message are held, and no message nests deeper than
      `max_depth`. Beyond that the stream is given up (`TooMuch`): where the next message begins is
      not known any more.
  R2  Every other fault costs one message: it comes out as a `BadMessage`, in its place.
  R3  A byte 0xFF, which is in no JSON text, drops what has been collected: a client that does not
      know the state of the stream sends it to begin anew.

Follows: QEMU qobject/json-lexer.c and json-streamer.c.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import MAX_QMP_DEPTH, MAX_QMP_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nbdfleece.protocol.qmp.values import Json

_SPACE: Final = b" \t\r\n"
_OUTSIDE_STRING: Final = re.compile(rb'["{}\[\]\xff]')
_INSIDE_STRING: Final = re.compile(rb'["\\\xff]')
_END_OF_GARBAGE: Final = re.compile(rb"[\s{\[\xff]")
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # no escape of a backslash before it
_OPENING: Final = (ord("{"), ord("["))


class TooMuch(PeerViolation):
    """A message is too long or too deep; the stream cannot be followed any further."""


@dataclass(frozen=True, slots=True)
class BadMessage:
    """Something in the stream that is no message; `text` says why, as QEMU does."""

    text: str


class Framer:
    """Collects bytes and gives out messages.

    Args:
        max_bytes: Bytes of one message.
        max_depth: Objects and arrays inside each other.
    """

    def __init__(self, *, max_bytes: int = MAX_QMP_MESSAGE, max_depth: int = MAX_QMP_DEPTH) -> None:
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer that have been looked at
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> Iterator[Mapping[str, Json] | BadMessage]:
        """Take `data` and yield every message that it completes.

        Raises:
            TooMuch: See R1. What was yielded before it stands.
        """
        self._buffer += data
        while True:
            if not self._depth and not self._begin():
                return
            if not self._buffer:
                return
            if self._buffer[0] not in _OPENING:
                garbage = self._take_garbage()
                if garbage is None:
                    return
                yield garbage
                continue
            text = self._take_balanced()
            if text is None:
                return
            if text:
                yield _parse(text)

    def _begin(self) -> bool:
        """Skip the space between messages; tell whether anything is left."""
        stripped = self._buffer.lstrip(_SPACE + b"\xff")
        del self._buffer[: len(self._buffer) - len(stripped)]
        return bool(self._buffer)

    def _take_garbage(self) -> BadMessage | None:
        """Take what begins neither an object nor an array, up to a border; None: not complete."""
        match = _END_OF_GARBAGE.search(self._buffer, self._scanned)
        if match is None:
            self._scanned = len(self._buffer)
            self._check_length(len(self._buffer))
            return None
        text = bytes(self._buffer[: match.start()])
        del self._buffer[: match.start()]
        self._scanned = 0
        try:
            json.loads(text, parse_constant=_refuse_constant)
        except ValueError:
            return BadMessage(f"JSON parse error, invalid keyword '{_shown(text)}'")
        return BadMessage("QMP input must be a JSON object")

    def _take_balanced(self) -> bytes | None:
        """Take one balanced text; b"" when 0xFF dropped it; None when it is not complete."""
        buffer = self._buffer
        while True:
            pattern = _INSIDE_STRING if self._in_string else _OUTSIDE_STRING
            match = pattern.search(buffer, self._scanned)
            if match is None:
                self._scanned = max(self._scanned, len(buffer))
                self._check_length(len(buffer))
                return None
            self._scanned = match.end()
            self._check_length(match.end())
            found = match[0]
            if found == b"\xff":
                self._drop(match.end())
                return b""
            if found == b"\\":
                self._scanned += 1  # whatever is escaped, it does not end the string
            elif found == b'"':
                self._in_string = not self._in_string
            elif found in b"{[":
                self._depth += 1
                if self._depth > self._max_depth:
                    raise TooMuch("JSON nesting depth limit exceeded")
            else:
                self._depth -= 1
                if self._depth == 0:
                    text = bytes(buffer[: match.end()])
                    self._drop(match.end())
                    return text

    def _drop(self, length: int) -> None:
        del self._buffer[:length]
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    def _check_length(self, length: int) -> None:
        if length > self._max_bytes:
            raise TooMuch("JSON token size limit exceeded")


def _parse(text: bytes) -> Mapping[str, Json] | BadMessage:
    try:
        value: Json = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_unique_members
        )
        if b"\\u" in text:
            _check_strings(value)
    except ValueError as error:
        return BadMessage(f"JSON parse error, {error}")
    if not isinstance(value, dict):
        return BadMessage("QMP input must be a JSON object")
    return value


def _check_strings(value: Json) -> None:
    """Refuse what is in no name and no path: a NUL, and half of a surrogate pair.

    Raises:
        ValueError: There is one.
    """
    if _NUL.search(json.dumps(value, ensure_ascii=False).encode()):
        raise ValueError("a string contains a NUL")


def _unique_members(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate key")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"invalid keyword '{name}'")


def _shown(text: bytes) -> str:
    return ascii(text[:40].decode("ascii", "replace"))[1:-1]
