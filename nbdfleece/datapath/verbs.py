"""Requests that have neither payload nor data in their reply, as coroutines over a node's verbs."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from nbdfleece.base.limits import MAX_CACHE, READ_PIECE
from nbdfleece.datapath.step import let_others_run
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE_ZEROES,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.datapath.replies import Request
    from nbdfleece.datapath.route import IoVerbs


# Where all CACHE requests read to, as nobody looks at it: with memory of their own, a client would
# have 256 KiB of ours for each header that it may have in flight.
_NOWHERE: Final = memoryview(mmap.mmap(-1, READ_PIECE))


async def carry_out(io: IoVerbs, request: Request, may_go_on: Callable[[], bool]) -> None:
    """Carry out a FLUSH, TRIM, WRITE_ZEROES or CACHE that is legal.

    Args:
        io: The node.
        request: The request.
        may_go_on: Tells whether nobody waits for this request to end; only a CACHE asks.

    Raises:
        IoError: The node could not.
    """
    flags, command, _, offset, length = request
    fua = bool(flags & NBD_CMD_FLAG_FUA)
    if command == NBD_CMD_FLUSH:
        await io.flush()
    elif command == NBD_CMD_TRIM:
        await io.discard(offset, length)
        if fua:
            await io.flush()
    elif command == NBD_CMD_WRITE_ZEROES:
        await io.write_zeroes(
            offset,
            length,
            fua=fua,
            may_unmap=not flags & NBD_CMD_FLAG_NO_HOLE,
            no_fallback=bool(flags & NBD_CMD_FLAG_FAST_ZERO),
        )
    else:
        assert command == NBD_CMD_CACHE
        await _fill_cache(io, offset, length, may_go_on)


async def _fill_cache(io: IoVerbs, offset: int, length: int, may_go_on: Callable[[], bool]) -> None:
    """Read the range, which leaves it in the page cache, or fails where a READ would.

    It is a hint: of a range longer than MAX_CACHE the rest is left out, and a drain ends it, as the
    client's leaving does.
    """
    length = min(length, MAX_CACHE)
    while length and may_go_on():
        piece = _NOWHERE[: min(length, READ_PIECE)]
        await io.read(offset, piece)
        offset += len(piece)
        length -= len(piece)
        await let_others_run()  # a read need not have waited for anything
