from __future__ import annotations

import errno

import pytest

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.errno_map import to_errno, to_nbd_error

ON_THE_WIRE = {
    c.NBD_EPERM, c.NBD_EIO, c.NBD_ENOMEM, c.NBD_EINVAL,
    c.NBD_ENOSPC, c.NBD_EOVERFLOW, c.NBD_ENOTSUP, c.NBD_ESHUTDOWN,
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, c.NBD_EPERM),
        (errno.EROFS, c.NBD_EPERM),
        (errno.EIO, c.NBD_EIO),
        (errno.ENOMEM, c.NBD_ENOMEM),
        (errno.EINVAL, c.NBD_EINVAL),
        (errno.ENOSPC, c.NBD_ENOSPC),
        (errno.EDQUOT, c.NBD_ENOSPC),
        (errno.EFBIG, c.NBD_ENOSPC),
        (errno.ESHUTDOWN, c.NBD_ESHUTDOWN),
        (errno.EACCES, c.NBD_EINVAL),
        (errno.ETIMEDOUT, c.NBD_EINVAL),
        (errno.EOVERFLOW, c.NBD_EINVAL),
        (errno.ENOTSUP, c.NBD_EINVAL),
    ],
)
def test_errno_of_a_write_on_the_wire(number: int, error: int) -> None:
    assert to_nbd_error(number, command=c.NBD_CMD_WRITE, flags=0) == error


def test_every_errno_becomes_an_error_of_the_spec() -> None:
    for number in errno.errorcode:
        assert to_nbd_error(number, command=c.NBD_CMD_TRIM, flags=0) in ON_THE_WIRE


def test_enotsup_is_for_fast_zero_alone() -> None:
    fast, slow = c.NBD_CMD_FLAG_FAST_ZERO, 0
    zero, trim = c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_TRIM

    assert to_nbd_error(errno.ENOTSUP, command=zero, flags=fast) == c.NBD_ENOTSUP
    assert to_nbd_error(errno.ENOTSUP, command=zero, flags=slow) == c.NBD_EINVAL
    assert to_nbd_error(errno.ENOTSUP, command=trim, flags=fast) == c.NBD_EINVAL


def test_eoverflow_is_for_reads_alone() -> None:
    assert to_nbd_error(errno.EOVERFLOW, command=c.NBD_CMD_READ, flags=0) == c.NBD_EOVERFLOW


def test_client_sees_errnos_and_takes_unknown_errors_as_einval() -> None:
    assert to_errno(c.NBD_ENOSPC) == errno.ENOSPC
    assert to_errno(c.NBD_ENOTSUP) == errno.ENOTSUP
    assert to_errno(4711) == errno.EINVAL
