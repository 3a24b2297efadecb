"""What the pump does, in the most obvious way: one request after the other, one reply each.

The plain twin of nbdfleece/datapath/pump.py and outbox.py: no batches, no reading at once, no
buffers that are used again. It works on a bytearray.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.request import check


@dataclass
class PlainReply:
    """What the client is to learn: the NBD error, and the data of a READ."""

    error: int
    data: bytes = b""


@dataclass
class PlainServer:
    """Carries out requests on `disk`."""

    disk: bytearray
    flags: int
    structured: bool
    has_contexts: bool

    def carry_out(
        self, command: int, flags: int, offset: int, length: int, payload: bytes = b""
    ) -> PlainReply:
        error = check(
            command,
            flags,
            offset,
            length,
            len(self.disk),
            self.flags,
            self.structured,
            self.has_contexts,
        )
        if error:
            return PlainReply(error)
        end = offset + length
        if command == c.NBD_CMD_READ:
            return PlainReply(0, bytes(self.disk[offset:end]))
        if command == c.NBD_CMD_WRITE:
            self.disk[offset:end] = payload
        elif command in (c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES):
            self.disk[offset:end] = bytes(length)
        return PlainReply(0)
