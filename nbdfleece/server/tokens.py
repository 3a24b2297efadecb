"""Tokens: export names that nobody can guess, for clients that can show no identity.

`DISK@NAME:TOKEN` opens what `DISK@NAME` does, read-only, until the token expires. It goes through
logs and lists as little as a password does.

Invariants
  K1  A token is known here by its hash only: neither memory, nor state folder, nor a list gives it
      away after it was handed out once.
  K2  Looking a name up takes the same steps whatever the name is, and compares in constant time.
  K3  A token opens the export for which it was made and dies with it: it never opens a later one of
      the same name.
  K4  Expiry ends new connections. Those that are there go on: a backup is not cut off at its end.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import MAX_TOKEN_LIFETIME_S, MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN_BYTES: Final = 24  # 192 bits, 32 characters
_SEPARATOR: Final = ":"  # not in the alphabet of disks and snapshots, nor in that of tokens
_SECRET: Final = re.compile(r"([^@:]*@[^:]*:).*", re.DOTALL)


def clock() -> float:
    """Return seconds that no change of the date moves, and that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class _Token:
    digest: bytes
    export_name: str
    expires: float


class Tokens:
    """The tokens that are valid.

    Args:
        clock: Seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: list[_Token] = []

    def add(self, export_name: str, lifetime_s: float) -> str:
        """Return a name that opens the export `export_name` for so long; see K1.

        Raises:
            CommandError: The lifetime is none, or there are too many tokens. Nothing has changed.
        """
        check_lifetime(lifetime_s)
        self._forget_expired()
        if len(self._tokens) >= MAX_TOKENS:
            raise CommandError(f"{MAX_TOKENS} tokens are valid, no more can be")
        name = f"{export_name}{_SEPARATOR}{secrets.token_urlsafe(_TOKEN_BYTES)}"
        self._tokens.append(_Token(_digest(name), export_name, self._clock() + lifetime_s))
        return name

    def find(self, name: str) -> str | None:
        """Return the name of the export that `name` opens by its token, or None (K2)."""
        self._forget_expired()
        digest = _digest(name)
        found: str | None = None
        for token in self._tokens:
            if hmac.compare_digest(digest, token.digest):
                found = token.export_name
        return found

    def revoke(self, export_name: str) -> None:
        """Forget the tokens of an export (K3)."""
        self._tokens = [token for token in self._tokens if token.export_name != export_name]

    def _forget_expired(self) -> None:
        now = self._clock()
        self._tokens = [token for token in self._tokens if now < token.expires]


def check_lifetime(lifetime_s: float) -> None:
    """Check that a token may last so long.

    Raises:
        CommandError: It may not.
    """
    if not 0 < lifetime_s <= MAX_TOKEN_LIFETIME_S:  # nor is NaN
        days = math.floor(MAX_TOKEN_LIFETIME_S / 86400)
        raise CommandError(f"a token can last up to {days} days, not {lifetime_s:g} seconds")


def _digest(name: str) -> bytes:
    # The token has 192 random bits: there is nothing that a slow hash would make harder to guess.
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def hide(name: str) -> str:
    """Return an export name as it may be logged: without what may be a token, right or wrong."""
    return _SECRET.sub(r"\1***", name)
