"""What an errno becomes on the wire: only the eight errors of the spec ever do.

===================  ===============  =================================================
errno                NBD error        where
===================  ===============  =================================================
EPERM, EROFS         NBD_EPERM        any request
EIO, ENOMEM, EINVAL  the same         any request
ENOSPC, EDQUOT,      NBD_ENOSPC       any request
EFBIG
ESHUTDOWN            NBD_ESHUTDOWN    any request
EOVERFLOW            NBD_EOVERFLOW    READ only
ENOTSUP, EOPNOTSUPP  NBD_ENOTSUP      WRITE_ZEROES with NBD_CMD_FLAG_FAST_ZERO only
everything else      NBD_EINVAL       any request, as QEMU
===================  ===============  =================================================

Everything else includes EACCES, of a range outside a snapshot, and ETIMEDOUT, of a copy that took
too long: clients of QEMU's snapshots know these as EINVAL, and keep seeing it.

Spec: NBD proto.md "Error values".
"""

from __future__ import annotations

import errno
from typing import Final

from nbdfleece.protocol.nbd.constants import (
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_READ,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_EIO,
    NBD_ENOMEM,
    NBD_ENOSPC,
    NBD_ENOTSUP,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_ESHUTDOWN,
)

_ANY_REQUEST: Final = {
    errno.EPERM: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EIO: NBD_EIO,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
    errno.ESHUTDOWN: NBD_ESHUTDOWN,
}


def to_nbd_error(number: int, *, command: int, flags: int) -> int:
    """Return the NBD error for the errno `number` of a request with this type and these flags."""
    if number == errno.EOVERFLOW and command == NBD_CMD_READ:
        return NBD_EOVERFLOW
    if (
        number in (errno.ENOTSUP, errno.EOPNOTSUPP)
        and command == NBD_CMD_WRITE_ZEROES
        and flags & NBD_CMD_FLAG_FAST_ZERO
    ):
        return NBD_ENOTSUP
    return _ANY_REQUEST.get(number, NBD_EINVAL)


_TO_ERRNO: Final = {
    NBD_EPERM: errno.EPERM,
    NBD_EIO: errno.EIO,
    NBD_ENOMEM: errno.ENOMEM,
    NBD_EINVAL: errno.EINVAL,
    NBD_ENOSPC: errno.ENOSPC,
    NBD_EOVERFLOW: errno.EOVERFLOW,
    NBD_ENOTSUP: errno.ENOTSUP,
    NBD_ESHUTDOWN: errno.ESHUTDOWN,
}


def to_errno(error: int) -> int:
    """Return the errno for a server's NBD error (not 0); the spec has unknown ones as EINVAL."""
    return _TO_ERRNO.get(error, errno.EINVAL)
