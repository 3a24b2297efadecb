"""Driver `nbd`: the verbs of a node that is an export of another NBD server.

::

    asked for                offered                  not offered
    FUA of a write           NBD_CMD_FLAG_FUA         FLUSH behind it
    flush                    NBD_CMD_FLUSH            nothing: the server says there is no need
    write zeroes             NBD_CMD_WRITE_ZEROES     ENOTSUP, and the node writes them
      no_fallback            NBD_CMD_FLAG_FAST_ZERO   ENOTSUP
    discard                  NBD_CMD_TRIM             nothing
    block status             NBD_CMD_BLOCK_STATUS     all is data

Requests are cut to what the server takes. They are never rounded: a server with a minimum block
above 1 is not promised that we keep to it (see protocol.nbd.client), so it serves any range, or
is refused at open. Reading, changing and writing back what surrounds a request is not done here.

A server that comes back behind `reconnect-delay` may have lost what it had replied to and not
flushed. QEMU does not know that, and a FLUSH succeeds all the same; here such requests are repeated
first (module `unflushed`). Without the delay a lost server is lost for ever.

With `x-dirty-bitmap` block status tells of the bitmap in place of allocation: dirty is reported as
HOLE, clean as DATA, as QEMU does. Such a node is for looking at the bitmap, not for copying from.

Follows: QEMU block/nbd.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.base.limits import MAX_EXTENT_LENGTH, MAX_PAYLOAD, NBD_ZERO_PIECE
from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.nbd.links import Links
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_STATE_HOLE,
    NBD_STATE_ZERO,
)
from nbdfleece.protocol.nbd.errno_map import to_errno
from nbdfleece.protocol.nbd.strings import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdfleece.block.child import Child
    from nbdfleece.block.driver import Reopening
    from nbdfleece.block.drivers.nbd.target import Target
    from nbdfleece.protocol.nbd.client import Connected
    from nbdfleece.protocol.nbd.client_replies import Reply


class NbdDriver(Driver):
    """An export of another NBD server.

    Args:
        target: Which one.
        reconnect_delay_s: Seconds that requests wait for a lost server; 0: they fail, for ever.
        open_timeout_s: Seconds that `open` tries; 0: once.
    """

    name: ClassVar[str] = "nbd"

    def __init__(self, target: Target, *, reconnect_delay_s: float, open_timeout_s: float) -> None:
        self.target = target
        self._links = Links(
            target, reconnect_delay_s=reconnect_delay_s, open_timeout_s=open_timeout_s
        )
        self._flags = 0
        self._max_payload = MAX_PAYLOAD

    # --- life ------------------------------------------------------------------------------

    async def open(self) -> int:
        """Connect; see Driver.open."""
        await self._links.open()
        export = self._links.first.export
        self._flags = export.flags
        self._max_payload = min(export.maximum_block, MAX_PAYLOAD)
        try:
            self._check_writable(read_only=self.node.read_only)
        except CommandError:
            await self._links.close()
            raise
        return export.size

    async def reopen_prepare(self, to: Reopening) -> None:
        """Check that the server takes writes, if there are to be any; see Driver.reopen_prepare."""
        self._check_writable(read_only=to.read_only)

    def _check_writable(self, *, read_only: bool) -> None:
        """Check that a node that may be written is of an export that may.

        Raises:
            CommandError: It is not.
        """
        if self._flags & NBD_FLAG_READ_ONLY and not read_only:
            raise CommandError(f"{self.target}: the export is read-only (use read-only=on)")

    async def close(self) -> None:
        """Take leave of the server; see Driver.close."""
        await self._links.close()

    def yank(self) -> bool:
        """Give up the server; see Driver.yank."""
        return self._links.yank()

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Fail: there are no children."""
        raise AssertionError("nbd has no children")

    # --- reading ---------------------------------------------------------------------------

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` from the server; see Driver.read."""
        for start, length in _pieces(0, len(view), self._max_payload):
            part = view[start : start + length]
            await self._do("read", NBD_CMD_READ, offset + start, length, view=part)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Ask the server; see Driver.block_status and, for `x-dirty-bitmap`, the module."""
        connected = self._links.first
        if self.target.context not in connected.contexts:
            return [Extent(offset, length, DATA)]
        if not connected.extended:
            length = min(length, MAX_EXTENT_LENGTH)
        reply, connected = await self._do("block status", NBD_CMD_BLOCK_STATUS, offset, length)
        extents: list[Extent] = []
        for extent_length, flags in reply.status[connected.contexts[self.target.context]]:
            inside = min(extent_length, self.node.size - offset)
            extents.append(Extent(offset, inside, self._state(flags)))
            offset += inside
            if offset >= self.node.size:
                break
        return extents

    def _state(self, flags: int) -> int:
        """Return what the flags of the metadata context say, as those of an extent."""
        if self.target.dirty_bitmap is not None:
            flags &= NBD_STATE_HOLE  # where NBD_STATE_DIRTY is
        return (HOLE if flags & NBD_STATE_HOLE else 0) | (ZERO if flags & NBD_STATE_ZERO else 0)

    # --- writing ---------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Send `data`; see Driver.write."""
        flags = self._fua(fua=fua)
        for start, length in _pieces(0, len(data), self._max_payload):
            part = data[start : start + length]
            await self._do("write", NBD_CMD_WRITE, offset + start, length, flags=flags, data=part)
        if fua and not flags:
            await self._flush()

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Have the server write zeroes; see Driver.write_zeroes."""
        can_zero = self._flags & NBD_FLAG_SEND_WRITE_ZEROES
        if not can_zero or (no_fallback and not self._flags & NBD_FLAG_SEND_FAST_ZERO):
            raise IoError(errno.ENOTSUP, self._where("write zeroes", offset, length))
        fua_flag = self._fua(fua=fua)
        flags = fua_flag | (0 if may_unmap else NBD_CMD_FLAG_NO_HOLE)
        flags |= NBD_CMD_FLAG_FAST_ZERO if no_fallback else 0
        for start, part in _pieces(offset, length, NBD_ZERO_PIECE):
            await self._do("write zeroes", NBD_CMD_WRITE_ZEROES, start, part, flags=flags)
        if fua and not fua_flag:
            await self._flush()

    async def discard(self, offset: int, length: int) -> None:
        """Have the server trim, if it can; see Driver.discard."""
        if self._flags & NBD_FLAG_SEND_TRIM:
            for start, part in _pieces(offset, length, NBD_ZERO_PIECE):
                await self._do("discard", NBD_CMD_TRIM, start, part)

    async def flush(self) -> None:
        """Have the server flush; one connection does it for all (K1 of `links`)."""
        self._links.check_flushes(self._where("flush", 0, 0))
        await self._flush()

    # --- private ---------------------------------------------------------------------------

    async def _flush(self) -> None:
        if self._flags & NBD_FLAG_SEND_FLUSH:
            await self._do("flush", NBD_CMD_FLUSH, 0, 0)

    def _fua(self, *, fua: bool) -> int:
        """Return the flag for `fua`, or 0: not wanted, or a flush has to do."""
        return NBD_CMD_FLAG_FUA if fua and self._flags & NBD_FLAG_SEND_FUA else 0

    async def _do(
        self,
        verb: str,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: memoryview | None = None,
        view: memoryview | None = None,
    ) -> tuple[Reply, Connected]:
        """Have the server carry out a request.

        Raises:
            IoError: It could not, or there is none.
        """
        where = self._where(verb, offset, length)
        reply, connected = await self._links.request(
            where, command, offset, length, flags=flags, data=data, view=view
        )
        if reply.error:
            number = to_errno(reply.error)
            said = f": the server says {shown(reply.text)}" if reply.text else ""
            # That the server goes away does not mean that we do.
            told = errno.EIO if number == errno.ESHUTDOWN else None
            raise IoError(number, f"{where}: {self.target}{said}", wire_errno=told)
        return reply, connected


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield the range in pieces of at most `most` bytes."""
    end = offset + length
    while offset < end:
        piece = min(most, end - offset)
        yield offset, piece
        offset += piece
