"""What real clients send: captures of handshake and transmission, and mutations of them.

A capture is a text file in corpus/: a comment that says which client did what, then one line of
hexadecimal digits for each thing that the client sent, in order: ``flags``, ``option`` (header and
data) and ``request`` (header and payload). All are about an export `disk` of 1 MiB. They are made
by ``python -m tests.fuzz.record``; those whose name begins with ``hand`` were written by hand, for
what no client here sends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire

CORPUS = Path(__file__).parent / "corpus"

Messages = list[bytes]


@dataclass(frozen=True)
class Capture:
    """One connection of a client.

    Attributes:
        name: Of its file.
        handshake: Client flags, then options.
        transmission: Requests.
    """

    name: str
    handshake: tuple[bytes, ...]
    transmission: tuple[bytes, ...]

    @classmethod
    def load(cls, path: Path) -> Capture:
        handshake: Messages = []
        transmission: Messages = []
        for line in path.read_text().splitlines():
            kind, _, digits = line.partition(" ")
            if kind in ("flags", "option"):
                handshake.append(bytes.fromhex(digits))
            elif kind == "request":
                transmission.append(bytes.fromhex(digits))
            else:
                assert kind == "#", f"{path}: {line[:40]}"
        return cls(path.stem, tuple(handshake), tuple(transmission))

    def save(self, folder: Path, comment: str) -> None:
        lines = [f"# {comment}", f"flags {self.handshake[0].hex()}"]
        lines += [f"option {option.hex()}" for option in self.handshake[1:]]
        lines += [f"request {request.hex()}" for request in self.transmission]
        (folder / f"{self.name}.txt").write_text("\n".join(lines) + "\n")


def load_corpus() -> list[Capture]:
    """Return all captures, in the order of their names."""
    return [Capture.load(path) for path in sorted(CORPUS.glob("*.txt"))]


def take_apart(name: str, stream: bytes) -> Capture:
    """Return the capture in all that a client sent on one connection; a rest is dropped."""
    handshake = [stream[: wire.CLIENT_FLAGS.size]]
    transmission: Messages = []
    position = wire.CLIENT_FLAGS.size
    for size, is_option in _sizes(stream, position):
        message = stream[position : position + size]
        (handshake if is_option else transmission).append(message)
        position += size
    return Capture(name, tuple(handshake), tuple(transmission))


def _sizes(stream: bytes, position: int) -> Iterator[tuple[int, bool]]:
    """Yield the size of each whole message from `position` on, and whether it is an option."""
    is_option = True
    while True:
        rest = stream[position:]
        is_option = is_option and rest.startswith(c.IHAVEOPT.to_bytes(8, "big"))
        size = _option_size(rest) if is_option else _request_size(rest)
        if not size or size > len(rest):
            return
        yield size, is_option
        position += size


def _option_size(rest: bytes) -> int:
    header = wire.OPTION_HEADER
    return header.size + header.unpack_from(rest)[2] if len(rest) >= header.size else 0


def _request_size(rest: bytes) -> int:
    """Bytes of a request with a compact header, from the layout in the spec."""
    if len(rest) < 28:
        return 0
    assert rest[:4] == c.NBD_REQUEST_MAGIC.to_bytes(4, "big"), rest[:4].hex()
    command, length = int.from_bytes(rest[6:8], "big"), int.from_bytes(rest[24:28], "big")
    return 28 + (length if command == c.NBD_CMD_WRITE else 0)


# --- mutations -----------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 10, 11, 127, 255, 4095, 4096, 4097, 65535, 65536, 1 << 20)
_LARGE = ((1 << 23) - 1, 1 << 23, (1 << 23) + 1, 1 << 25, (1 << 25) + 1, 1 << 26, (1 << 31) - 1)
_HUGE = (1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_MAGICS = (c.IHAVEOPT, c.NBD_REQUEST_MAGIC, c.NBD_EXTENDED_REQUEST_MAGIC)

# Where the fields of options, and of requests with compact and extended headers, are, with sizes.
_OPTION_FIELDS = ((8, 4), (12, 4), (16, 4), (20, 2))
_REQUEST_FIELDS = ((4, 2), (6, 2), (8, 8), (16, 8), (24, 4))
_EXTENDED_FIELDS = ((4, 2), (6, 2), (8, 8), (16, 8), (24, 8))


def mutate(rng: random.Random, messages: Sequence[bytes], spare: Sequence[bytes]) -> Messages:
    """Return the messages, changed in one to some places.

    Args:
        rng: Decides.
        messages: What a client sent.
        spare: Messages of other clients, to be mixed in.
    """
    changed = list(messages)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        if not changed:
            changed = [rng.choice(spare)]
        rng.choice(_MUTATIONS)(rng, changed, spare)
    return changed


def _pick(rng: random.Random, messages: Messages) -> tuple[int, bytearray]:
    index = rng.randrange(len(messages))
    return index, bytearray(messages[index])


def _flip_a_bit(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    index, message = _pick(rng, messages)
    if message:
        message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
    messages[index] = bytes(message)


def _set_a_field(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    """Set a field of a header to a number that means something somewhere."""
    index, message = _pick(rng, messages)
    fields = _REQUEST_FIELDS
    if message.startswith(c.IHAVEOPT.to_bytes(8, "big")):
        fields = _OPTION_FIELDS
    elif message.startswith(c.NBD_EXTENDED_REQUEST_MAGIC.to_bytes(4, "big")):
        fields = _EXTENDED_FIELDS
    offset, size = rng.choice(fields)
    if offset + size <= len(message):
        message[offset : offset + size] = _number(rng, size)
    messages[index] = bytes(message)


def _set_a_number(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    """Put a number anywhere."""
    index, message = _pick(rng, messages)
    size = rng.choice((1, 2, 4, 4, 8))
    offset = rng.randrange(len(message) + 1)
    message[offset : offset + size] = _number(rng, size)
    messages[index] = bytes(message)


def _number(rng: random.Random, size: int) -> bytes:
    kind = rng.choice((_NUMBERS, _NUMBERS, _LARGE, _HUGE, _MAGICS))
    return (rng.choice(kind) & ((1 << (8 * size)) - 1)).to_bytes(size, "big")


def _change_the_length(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    """Cut or lengthen the data of an option, and say so in its header."""
    index, message = _pick(rng, messages)
    header = wire.OPTION_HEADER
    if len(message) >= header.size and message.startswith(c.IHAVEOPT.to_bytes(8, "big")):
        data = message[header.size :]
        data = data[: rng.randrange(len(data) + 1)]
        data += rng.randbytes(rng.choice((0, 0, 1, 2, 4, 100)))
        if rng.randrange(20) == 0:
            data += bytes(rng.choice((4096, 65536)))
        message[12 : header.size] = len(data).to_bytes(4, "big")
        message[header.size :] = data
    messages[index] = bytes(message)


def _cut_out(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    index, message = _pick(rng, messages)
    start = rng.randrange(len(message) + 1)
    del message[start : start + rng.choice((1, 2, 4, 8, 64))]
    messages[index] = bytes(message)


def _put_in(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    index, message = _pick(rng, messages)
    start = rng.randrange(len(message) + 1)
    message[start:start] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))
    messages[index] = bytes(message)


def _stop_early(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    index, message = _pick(rng, messages)
    messages[index:] = [bytes(message[: rng.randrange(len(message) + 1)])]


def _say_again(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    index, message = _pick(rng, messages)
    messages[index:index] = [bytes(message)] * rng.choice((1, 1, 1, 2, 20, 300))


def _leave_out(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    del messages[rng.randrange(len(messages))]


def _swap(rng: random.Random, messages: Messages, _spare: Sequence[bytes]) -> None:
    one, other = rng.randrange(len(messages)), rng.randrange(len(messages))
    messages[one], messages[other] = messages[other], messages[one]


def _mix_in(rng: random.Random, messages: Messages, spare: Sequence[bytes]) -> None:
    index = rng.randrange(len(messages) + 1)
    messages[index:index] = [rng.choice(spare) for _ in range(rng.choice((1, 1, 2, 5)))]


_MUTATIONS: tuple[Callable[[random.Random, Messages, Sequence[bytes]], None], ...] = (
    *(_flip_a_bit, _set_a_field, _set_a_field, _set_a_number, _change_the_length),
    *(_change_the_length, _cut_out, _put_in, _stop_early, _say_again, _leave_out, _swap),
    *(_mix_in, _mix_in),
)
