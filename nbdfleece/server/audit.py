"""What is told of clients: one line in the log for each connection at its end, and news.

The line has `name=value` fields, texts in JSON's quotes and escapes, so that no name that a client
has chosen can look like another field or line. Tokens are left out.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TypeAlias

from nbdfleece.base.limits import MAX_COMPLAINTS
from nbdfleece.protocol.nbd.strings import SHOWN_CHARACTERS
from nbdfleece.server.tokens import hide

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientConnected:
    """A client has opened an export. `identity` may be empty, and `tls` too, for none."""

    id: int
    peer: str
    identity: str
    tls: str
    export: str


@dataclass(frozen=True, slots=True)
class ClientDisconnected:
    """Such a client is gone; counts are of data in bytes, and of requests."""

    id: int
    peer: str
    identity: str
    export: str
    bytes_read: int
    bytes_written: int
    requests: int
    duration_s: float
    reason: str


ClientNews: TypeAlias = ClientConnected | ClientDisconnected


@dataclass(slots=True)
class Audit:
    """One connection; filled as it goes on.

    Attributes:
        id: Number of the session.
        peer: Where the client is.
        identity: As whom it acts; "" for one that has shown nothing.
        tls: The version of TLS, or "".
        export: What it opened, or "".
        refused: What it was not allowed to open, or "".
        bytes_read: Data sent to it.
        bytes_written: Data taken from it.
        requests: Begun.
        duration_s: From the greeting to the end.
    """

    id: int
    peer: str
    identity: str = ""
    tls: str = ""
    export: str = ""
    refused: str = ""
    bytes_read: int = 0
    bytes_written: int = 0
    requests: int = 0
    duration_s: float = 0.0

    def write(self, reason: str, level: int) -> None:
        """Write the line: `reason` is how the connection ended."""
        if self.refused:
            level = max(level, logging.WARNING)
        fields = [f"client {self.id} ends: peer={quoted(self.peer)}"]
        for name in ("identity", "tls", "export", "refused"):
            text: str = getattr(self, name)
            if text:
                fields.append(f"{name}={quoted(text)}")
        fields.append(f"read={self.bytes_read} written={self.bytes_written}")
        fields.append(f"requests={self.requests} seconds={self.duration_s:.1f}")
        fields.append(f"how={quoted(reason, longest=4 * SHOWN_CHARACTERS)}")
        _log.log(level, "%s", " ".join(fields))

    def connected(self) -> ClientConnected:
        """Return the news that it has opened an export."""
        return ClientConnected(self.id, self.peer, self.identity, self.tls, self.export)

    def disconnected(self, reason: str) -> ClientDisconnected:
        """Return the news that it is gone."""
        return ClientDisconnected(
            self.id,
            self.peer,
            self.identity,
            self.export,
            self.bytes_read,
            self.bytes_written,
            self.requests,
            round(self.duration_s, 3),
            hide(reason),
        )


class Complaints:
    """Limits that were reached: one line each until there is room again, however many come."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, about: str, text: str) -> None:
        """Log a complaint, unless it is said already."""
        if about not in self._said:
            if len(self._said) >= MAX_COMPLAINTS:
                self._said.clear()  # a client may have addresses without end
            self._said.add(about)
            _log.warning("%s: %s", about, text)

    def end(self, about: str) -> None:
        """Note that there is room again."""
        self._said.discard(about)


def quoted(text: str, longest: int = SHOWN_CHARACTERS) -> str:
    """Return a text in quotes, in ASCII, on one line, without tokens, cut where it is too long."""
    text = hide(text)
    return json.dumps(text if len(text) <= longest else text[:longest] + "...")
