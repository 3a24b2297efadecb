"""What the pump does, in the most obvious way: one request after the other, one reply each.

The plain twin of nbdfleece/datapath/pump.py, replies.py, status.py and outbox.py: no batches, no
reading at once, no buffers that are used again. It works on a bytearray.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.request import check, parse_status_filter

Descriptors = list[tuple[int, int]]


@dataclass
class PlainReply:
    """What the client is to learn: the NBD error, the data of a READ, the extents of a status."""

    error: int
    data: bytes = b""
    status: dict[int, Descriptors] = field(default_factory=dict)


@dataclass
class PlainServer:
    """Carries out requests on `disk`, whose extents end where its 4 KiB blocks do."""

    disk: bytearray
    flags: int
    structured: bool
    contexts: tuple[int, ...]
    extended: bool = False

    def carry_out(
        self, command: int, flags: int, offset: int, length: int, payload: bytes = b""
    ) -> PlainReply:
        contexts: tuple[int, ...] = self.contexts
        if self.extended and command == c.NBD_CMD_BLOCK_STATUS and payload:
            found = parse_status_filter(payload, contexts)
            if found is None:
                return PlainReply(c.NBD_EINVAL)
            length, chosen = found
            contexts = tuple(context for context in contexts if context in chosen)
        error = check(
            command,
            flags,
            offset,
            length,
            len(self.disk),
            self.flags,
            self.structured,
            bool(contexts),
            self.extended,
        )
        if error:
            return PlainReply(error)
        end = offset + length
        if command == c.NBD_CMD_READ:
            return PlainReply(0, bytes(self.disk[offset:end]))
        if command == c.NBD_CMD_BLOCK_STATUS:
            extents = self._extents(offset, end)
            if flags & c.NBD_CMD_FLAG_REQ_ONE:
                extents = extents[:1]
            return PlainReply(0, status=dict.fromkeys(contexts, extents))
        if command == c.NBD_CMD_WRITE:
            self.disk[offset:end] = payload
        elif command in (c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES):
            self.disk[offset:end] = bytes(length)
        return PlainReply(0)

    def _extents(self, offset: int, end: int) -> Descriptors:
        extents: Descriptors = []
        while offset < end:
            stop = min(end, (offset // 4096 + 1) * 4096)
            flags = 0 if any(self.disk[offset:stop]) else c.NBD_STATE_HOLE | c.NBD_STATE_ZERO
            if extents and extents[-1][1] == flags:
                extents[-1] = (extents[-1][0] + stop - offset, flags)
            else:
                extents.append((stop - offset, flags))
            offset = stop
        return extents
