"""What a transmission request must satisfy before it is carried out: pure, on plain ints.

The checks run in one fixed order, so that a request with several faults has one right answer:

1. the command is known, else NBD_EINVAL;
2. its flags are allowed for it, and advertised where they must be, else NBD_EINVAL;
3. it does not write to a read-only export, else NBD_EPERM;
4. the command was advertised or negotiated, else NBD_EINVAL;
5. offset and length lie inside the export, else NBD_ENOSPC (WRITE, WRITE_ZEROES) or NBD_EINVAL;
6. its length is not over the cap of its kind, else NBD_EINVAL or NBD_EOVERFLOW.

The wire comes before: a wrong magic closes the connection, and the payload of a request is read
before anything is answered; how long it is, `payload_length` says. A BLOCK_STATUS with a payload
has its length in there: first `parse_status_filter`, then `check`. Exports have a minimum block
size of 1, so there is no alignment check.

Spec: NBD proto.md "Request types", "Size constraints", "Error values"; for payloads of extended
requests, "Request message" on the branch extension-ext-header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import MAX_DRAINED_PAYLOAD, MAX_PAYLOAD, MAX_STRUCTURED_READ
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_SUCCESS,
)
from nbdfleece.protocol.nbd.names import command_name

if TYPE_CHECKING:
    from collections.abc import Collection

# Flags that a command may carry. FUA goes with every command once NBD_FLAG_SEND_FUA is advertised,
# even where it means nothing: existing clients set it on odd ones.
_FLAGS_ALLOWED: Final = {
    NBD_CMD_READ: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF,
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA,
    NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
    NBD_CMD_CACHE: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE,
}

# Transmission flag without which a command is refused. CACHE needs none: the spec lets a client
# try it on any server.
_FLAG_NEEDED: Final = {
    NBD_CMD_FLUSH: NBD_FLAG_SEND_FLUSH,
    NBD_CMD_TRIM: NBD_FLAG_SEND_TRIM,
    NBD_CMD_WRITE_ZEROES: NBD_FLAG_SEND_WRITE_ZEROES,
}

# Commands that may carry NBD_CMD_FLAG_PAYLOAD_LEN; with extended headers only.
_MAY_HAVE_PAYLOAD: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_BLOCK_STATUS})

_CHANGES_THE_EXPORT: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})
_OUT_OF_SPACE_PAST_END: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES})


def check(
    command: int,
    flags: int,
    offset: int,
    length: int,
    size: int,
    export_flags: int,
    structured: bool,
    has_contexts: bool,
    extended: bool = False,
) -> int:
    """Return the NBD error that a request deserves, or NBD_SUCCESS.

    NBD_CMD_DISC is never at fault: it has no reply to put an error in.

    Args:
        command: Request type from the wire; unknown values are welcome.
        flags: Command flags from the wire.
        offset: Bytes from the start of the export; any 64-bit value.
        length: Bytes that the request concerns; any 32-bit value, or with extended headers any
            64-bit value. Of a BLOCK_STATUS with a payload, the effect length in there.
        size: Bytes of the export.
        export_flags: Transmission flags of the export.
        structured: Whether replies come in chunks, structured or extended.
        has_contexts: Whether metadata contexts were negotiated for this export.
        extended: Whether extended headers were negotiated.
    """
    if command == NBD_CMD_READ and flags == 0 and length <= MAX_PAYLOAD and offset + length <= size:
        return NBD_SUCCESS  # the usual request, before the tables
    if command == NBD_CMD_DISC:
        return NBD_SUCCESS
    if extended and command in _MAY_HAVE_PAYLOAD:
        flags &= ~NBD_CMD_FLAG_PAYLOAD_LEN
    if not _are_flags_legal(command, flags, export_flags, structured):
        return NBD_EINVAL
    if command in _CHANGES_THE_EXPORT and export_flags & NBD_FLAG_READ_ONLY:
        return NBD_EPERM
    if _FLAG_NEEDED.get(command, 0) & ~export_flags:
        return NBD_EINVAL
    if command == NBD_CMD_FLUSH:
        return NBD_SUCCESS  # it has no range: what stands in those fields is ignored, as QEMU does
    if command == NBD_CMD_BLOCK_STATUS and not (has_contexts and length):
        return NBD_EINVAL
    if offset + length > size:
        return NBD_ENOSPC if command in _OUT_OF_SPACE_PAST_END else NBD_EINVAL
    return _check_length(command, flags, length, structured)


def payload_length(command: int, flags: int, length: int, *, extended: bool) -> int:
    """Return how many bytes of payload follow a request header, whatever else is wrong with it.

    A WRITE always has one, of any other command a flag of extended headers says so. Clients are to
    set it in a WRITE too, but QEMU (seen: 10.0) does not, and sends the data all the same.

    Args:
        command: Request type from the wire.
        flags: Command flags from the wire.
        length: Length field from the wire.
        extended: Whether extended headers were negotiated.

    Raises:
        PeerViolation: More than we read.
    """
    if command == NBD_CMD_DISC:
        return 0  # the last request: what follows is not read
    if command != NBD_CMD_WRITE and not (extended and flags & NBD_CMD_FLAG_PAYLOAD_LEN):
        return 0
    longest = MAX_PAYLOAD if extended else MAX_DRAINED_PAYLOAD
    if length > longest:
        raise PeerViolation(f"{command_name(command)} with a payload of {length} bytes")
    return length


def max_status_filter(contexts: int) -> int:
    """Return the bytes of the longest legal status filter with so many negotiated contexts."""
    return wire.STATUS_FILTER.size + contexts * wire.U32.size


def parse_status_filter(
    payload: bytes, negotiated: Collection[int]
) -> tuple[int, frozenset[int]] | None:
    """Return effect length and context ids of a BLOCK_STATUS payload; None: NBD_EINVAL.

    Args:
        payload: All of it: effect length:8, then context:4 each.
        negotiated: Ids of the contexts that were negotiated.
    """
    head = wire.STATUS_FILTER.size
    if len(payload) <= head or (len(payload) - head) % wire.U32.size:
        return None  # too short, torn, or about no context at all
    if len(payload) > max_status_filter(len(negotiated)):
        return None
    (effect_length,) = wire.STATUS_FILTER.unpack_from(payload)
    ids = [context for (context,) in wire.U32.iter_unpack(payload[head:])]
    chosen = frozenset(ids)
    if len(chosen) < len(ids) or not chosen.issubset(negotiated):
        return None
    return effect_length, chosen


def _are_flags_legal(command: int, flags: int, export_flags: int, structured: bool) -> bool:
    """Tell whether the command is known and may carry these flags here."""
    allowed = _FLAGS_ALLOWED.get(command)
    if allowed is None:
        return False
    if not structured:
        allowed &= ~NBD_CMD_FLAG_DF
    if not export_flags & NBD_FLAG_SEND_FUA:
        allowed &= ~NBD_CMD_FLAG_FUA
    if not export_flags & NBD_FLAG_SEND_FAST_ZERO:
        allowed &= ~NBD_CMD_FLAG_FAST_ZERO
    return not flags & ~allowed


def _check_length(command: int, flags: int, length: int, structured: bool) -> int:
    """Return the error for a length over the cap of the command.

    Only bytes that travel are capped: TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS may be as long as
    the export. A structured READ may be longer than one payload, as it goes out in several chunks;
    with DF it may not.
    """
    if length <= MAX_PAYLOAD or command not in (NBD_CMD_READ, NBD_CMD_WRITE):
        return NBD_SUCCESS
    if command == NBD_CMD_WRITE or not structured:
        return NBD_EINVAL
    if flags & NBD_CMD_FLAG_DF or length > MAX_STRUCTURED_READ:
        return NBD_EOVERFLOW
    return NBD_SUCCESS
