"""Our handshake machines in memory: a scripted client, or our own client, against our server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_SEND_FLUSH,
    NBD_OPT_STARTTLS,
    NBD_OPTION_REPLY_MAGIC,
    NBD_REP_ACK,
    NBD_REP_ERR_TLS_REQD,
)
from nbdfleece.protocol.nbd.haggle import ExportInfo, TlsMode
from nbdfleece.protocol.nbd.handshake import Closed, Handshake, Transmission
from nbdfleece.protocol.nbd.talk import Conversation, Talk

T = TypeVar("T")

FLAGS = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH
FIXED = NBD_FLAG_C_FIXED_NEWSTYLE
FIXED_NO_ZEROES = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES

DISK = ExportInfo("disk", 1 << 20, FLAGS, "a disk")
ODD = ExportInfo("odd", 1048577, FLAGS)


@dataclass
class FakeDirectory:
    """Exports by name; `default` answers for the empty name; `refusal` is raised instead."""

    exports: list[ExportInfo] = field(default_factory=lambda: [DISK, ODD])
    default: ExportInfo | None = None
    refusal: OptionRefused | None = None

    def find(self, name: str) -> ExportInfo | None:
        if self.refusal is not None:
            raise self.refusal
        if not name:
            return self.default
        return next((export for export in self.exports if export.name == name), None)

    def list(self) -> Sequence[ExportInfo]:
        if self.refusal is not None:
            raise self.refusal
        return self.exports


class NeedsTls(FakeDirectory):
    """What a client sees before TLS where TLS is allowed: what it does not see may need TLS."""

    def find(self, name: str) -> ExportInfo:
        export = super().find(name)
        if export is None:
            raise OptionRefused(NBD_REP_ERR_TLS_REQD, "TLS is needed for that")
        return export


class Script:
    """A client that sends what it is told, and takes the answers apart."""

    def __init__(
        self,
        directory: FakeDirectory | None = None,
        *,
        client_flags: int | None = FIXED_NO_ZEROES,
        tls: TlsMode = TlsMode.OFF,
        extended: bool = True,
    ) -> None:
        self.directory = directory or FakeDirectory()
        self.server = Handshake(self.directory, tls=tls, extended=extended)
        self.greeting = b"".join(self.server.feed(b""))
        if client_flags is not None:
            assert self.raw(wire.CLIENT_FLAGS.pack(client_flags)) == b""

    def raw(self, data: bytes) -> bytes:
        """Send bytes; return what the server sends."""
        return b"".join(self.server.feed(data))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return (type, data) of its replies."""
        return parse_replies(number, self.raw(wire.option(number, data)))

    def outcome_type(self, number: int, data: bytes = b"") -> int:
        """Send an option; return the type of its last reply, ACK or an error."""
        return self.option(number, data)[-1][0]

    def start_tls(self, directory: FakeDirectory | None = None) -> None:
        """Go on over TLS, where the client may see `directory`."""
        assert self.option(NBD_OPT_STARTTLS) == [(NBD_REP_ACK, b"")]
        assert self.server.wants_tls
        self.directory = directory or FakeDirectory()
        self.server.tls_begun(self.directory)

    @property
    def closed(self) -> Closed:
        """How the server closed, which it must have."""
        assert isinstance(self.server.outcome, Closed), self.server.outcome
        return self.server.outcome

    @property
    def transmission(self) -> Transmission:
        """The transmission phase, which it must have reached."""
        assert isinstance(self.server.outcome, Transmission), self.server.outcome
        return self.server.outcome

    @property
    def is_haggling(self) -> bool:
        return self.server.outcome is None


def parse_replies(number: int, data: bytes) -> list[tuple[int, bytes]]:
    """Return (type, data) of option replies, which must all answer `number`."""
    replies = []
    while data:
        magic, option, kind, length = wire.OPTION_REPLY_HEADER.unpack_from(data)
        assert magic == NBD_OPTION_REPLY_MAGIC
        assert option == number
        end = wire.OPTION_REPLY_HEADER.size + length
        assert len(data) >= end
        replies.append((kind, data[wire.OPTION_REPLY_HEADER.size : end]))
        data = data[end:]
    return replies


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cut `data` into pieces of `size` bytes; 0 for all in one."""
    step = size or max(len(data), 1)
    for start in range(0, len(data), step):
        yield data[start : start + step]


def join(
    client: Talk[T], server: Handshake, *, piece: int, over_tls: FakeDirectory | None = None
) -> T:
    """Run a client's talk against the server, both hearing pieces of `piece` bytes (0: all).

    TLS is taken as done at once; then the client may see `over_tls`.
    """
    conversation = Conversation(client)
    to_server = b"".join(conversation.feed(b""))
    to_client = b"".join(server.feed(b""))
    while to_server or to_client:
        sent, to_server = to_server, b""
        heard, to_client = to_client, b""
        for part in pieces(sent, piece):
            to_client += b"".join(server.feed(part))
        if server.wants_tls:
            server.tls_begun(over_tls or FakeDirectory())
        for part in pieces(heard, piece):
            to_server += b"".join(conversation.feed(part))
    assert conversation.is_over, "the client waits for ever"
    result = conversation.result
    assert result is not None
    return result
