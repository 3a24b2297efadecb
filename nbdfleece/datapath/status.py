"""BLOCK_STATUS: extents, gathered from status functions, bounded, and made to agree.

Invariants
  B1  All contexts of one reply tell of the same range, from the request's offset on.
  B2  Extents with equal flags side by side are one; there is at least one, and none is empty.
  B3  The work for one request is bounded, however the extents are cut: what is not told of, the
      client asks for again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.extent import clip
from nbdfleece.base.limits import MAX_STATUS_EXTENTS
from nbdfleece.base.units import KiB
from nbdfleece.datapath.step import let_others_run
from nbdfleece.protocol.nbd.constants import NBD_CMD_FLAG_REQ_ONE

if TYPE_CHECKING:
    from nbdfleece.datapath.replies import Request, SimpleReplies
    from nbdfleece.datapath.route import StatusFunction

Context = tuple["int", "StatusFunction"]
"""(id, status function) of a negotiated metadata context."""

_TURN_EXTENTS: Final = 4096  # looked at before others get their turn
_EXTENT_COST: Final = 192  # bytes of memory, at most, from the status function to the reply
# Who asks for one extent (qemu-img asks so, extent after extent) does not pay for a look at all
# that follow: the look grows with the extent that is found.
_FIRST_LOOK: Final = 64 * KiB
_NEXT_LOOK: Final = 8
_MIN_EXTENT: Final = 512  # bytes; shorter ones are possible and rare


def memory_needed(length: int, contexts: int, *, one: bool) -> int:
    """Return about how many bytes `block_status` will take at the worst."""
    extents = 1 if one else min(length // _MIN_EXTENT + 1, MAX_STATUS_EXTENTS)
    return extents * contexts * _EXTENT_COST


async def block_status(
    replies: SimpleReplies, request: Request, contexts: list[Context], length: int
) -> bytes:
    """Return the chunks of a reply, one per context.

    Args:
        replies: Makes the chunks.
        request: The request.
        contexts: Those that it asks about, at least one.
        length: Bytes (> 0) to tell of at most.

    Raises:
        IoError: A status function failed.
    """
    flags, _, _, offset, _ = request
    one = bool(flags & NBD_CMD_FLAG_REQ_ONE)
    found = [
        (context, await _collect(status, offset, length, one=one)) for context, status in contexts
    ]
    told = min(sum(extent for extent, _ in extents) for _, extents in found)
    last = len(found) - 1
    return b"".join(
        replies.status(request, context, _cut(extents, told), done=index == last)
        for index, (context, extents) in enumerate(found)
    )


async def _collect(
    status: StatusFunction, offset: int, length: int, *, one: bool
) -> list[tuple[int, int]]:
    """Ask for status until the range is covered, or there is enough."""
    end = offset + length
    enough = 1 if one else MAX_STATUS_EXTENTS
    ahead = _FIRST_LOOK if one else length
    gathered: list[tuple[int, int]] = []
    looked = 0
    while offset < end and looked < MAX_STATUS_EXTENTS:
        part = min(ahead, end - offset)
        found = clip(await status(offset, part), offset, end - offset)
        assert found, "status makes no progress"
        for extent in found:
            if gathered and gathered[-1][1] == extent.flags:
                gathered[-1] = (gathered[-1][0] + extent.length, extent.flags)
            elif len(gathered) == enough:
                return gathered
            else:
                gathered.append((extent.length, extent.flags))
        offset = found[-1].end
        ahead *= _NEXT_LOOK
        if (looked + len(found)) // _TURN_EXTENTS > looked // _TURN_EXTENTS:
            await let_others_run()
        looked += len(found)
    return gathered


def _cut(extents: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the extents within the first `length` bytes."""
    kept = []
    for extent, flags in extents:
        kept.append((min(extent, length), flags))
        length -= extent
        if length <= 0:
            break
    return kept
