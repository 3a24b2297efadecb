"""Strings of the spec: UTF-8, at most 4096 bytes, no NUL; and names made fit to be shown.

Spec: NBD proto.md "Conventions" (string). Showing a name is bounded because a peer chose it:
an echoed name once overran QEMU's error text (CVE-2020-10761).
"""

from __future__ import annotations

from typing import Final

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_STRING
from nbdfleece.protocol.nbd.constants import NBD_REP_ERR_INVALID

SHOWN_CHARACTERS: Final = 80  # of a name in logs and error texts; as QEMU


def decode(data: bytes, what: str) -> str:
    """Return the string in `data`.

    Raises:
        OptionRefused: NBD_REP_ERR_INVALID, with a text that begins with `what`.
    """
    if len(data) > MAX_STRING:
        raise OptionRefused(NBD_REP_ERR_INVALID, f"{what} is longer than {MAX_STRING} bytes")
    if b"\0" in data:
        raise OptionRefused(NBD_REP_ERR_INVALID, f"{what} contains a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionRefused(NBD_REP_ERR_INVALID, f"{what} is not UTF-8") from None


def encode(text: str) -> bytes:
    """Return `text` for the wire, cut to what a string may hold."""
    data = text.encode()
    if len(data) <= MAX_STRING:
        return data
    return data[:MAX_STRING].decode(errors="ignore").encode()


def shown(name: str) -> str:
    """Return a peer's name for people: quoted, control characters escaped, long ones cut."""
    cut = name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "..."
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in cut) + '"'
