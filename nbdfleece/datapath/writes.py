"""Writes to the page cache: alone, behind saved old data, or many by one system call.

Invariants
  B1  Each write of a batch ends for itself: all of its data is written, or it has an error.
  B2  When a batch has run, nothing of it is under way: the kernel has let go of the buffers.
  B3  Where the kernel has no io_submit, or does not let us have it, the writes are made one by one;
      nobody sees a difference but in time.

The kernel makes buffered writes inside io_submit, in their order. Some file systems make them
behind it; those are waited for.

# FAST: a thread that makes 16 writes one by one lets go of the interpreter lock 16 times, and waits
# for the event loop to do so as often. With one call it does that once, and the loop works
# meanwhile: 11 microseconds a write in place of 17 to 20, beside a thread that wants the lock all
# the time; plain form in tests/reference/workers.py

Follows: io_submit(2), io_getevents(2), linux/aio_abi.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdfleece.datapath.workers import Op

MAX_BATCH: Final = 16  # writes by one call


class Write:
    """A write, to be called in a worker thread.

    Args:
        fd: Open for writing, through the page cache.
        offset: Bytes from the start of the file.
        data: Nobody changes it until the write is over.
    """

    __slots__ = ("data", "fd", "offset")

    def __init__(self, fd: int, offset: int, data: memoryview) -> None:
        self.fd = fd
        self.offset = offset
        self.data = data

    def __call__(self) -> None:
        """Make it.

        Raises:
            OSError: Some of it may have been written.
        """
        write_all(self.fd, self.offset, self.data, 0)


Save = tuple[int, bytearray | int, bytearray, int, int]
"""Old data to save: (offset, the old bytes or how many to read, state page, first, last)."""


class SaveStates(NamedTuple):
    """What is said of clusters that have been saved.

    Attributes:
        cluster: Bytes per state.
        done: For clusters that are in the target.
        zero: For clusters of zeroes, which are not written; None: they are, as any other.
    """

    cluster: int
    done: int
    zero: int | None


class SaveError(Exception):
    """Old data could not be saved; the new data has not been written.

    Attributes:
        error: What the system call said.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class SavingWrite(Write):
    """A write that saves old data before.

    Args:
        fd: As in Write.
        offset: As in Write.
        data: As in Write.
        target_fd: Where old data goes, at its own offset.
        saves: What to save; states are set as soon as their old data is in the target.
        states: What to set.
    """

    __slots__ = ("saves", "states", "target_fd")

    def __init__(
        self,
        fd: int,
        offset: int,
        data: memoryview,
        target_fd: int,
        saves: list[Save],
        states: SaveStates,
    ) -> None:
        super().__init__(fd, offset, data)
        self.target_fd = target_fd
        self.saves = saves
        self.states = states

    def __call__(self) -> None:
        """Save and write.

        Raises:
            SaveError: A copy failed; the states of what was not copied are unchanged.
            OSError: All copies are made, and the write failed.
        """
        try:
            for at, old, page, first, last in self.saves:
                if isinstance(old, int):
                    saved = bytearray(old)
                    read_all(self.fd, at, memoryview(saved))
                else:
                    saved = old
                _save(self.target_fd, at, saved, page, first, last, self.states)
        except OSError as error:
            raise SaveError(error) from error
        super().__call__()


def _save(
    fd: int, at: int, old: bytearray, page: bytearray, first: int, last: int, states: SaveStates
) -> None:
    """Write the clusters of `old` that are not zero, and set the states of all, run by run."""
    cluster, start = states.cluster, 0
    zeroes = bytes(cluster) if states.zero is not None else None
    while first < last:
        stop, index = start, first
        is_zero = _is_zero(old, start, cluster, zeroes)
        while index < last and _is_zero(old, stop, cluster, zeroes) == is_zero:
            stop, index = stop + cluster, index + 1
        state = states.done
        if is_zero and states.zero is not None:
            state = states.zero
        else:
            write_all(fd, at + start, memoryview(old)[start:stop], 0)
        # Before the new data, and behind the old: a reader that sees the state from before after
        # it has read from the source has read old data.
        page[first:index] = bytes((state,)) * (index - first)
        start, first = stop, index


def _is_zero(old: bytearray, start: int, cluster: int, zeroes: bytes | None) -> bool:
    # The first byte decides nearly always; the slice is a copy.
    if zeroes is None or old[start]:
        return False
    part = old[start : start + cluster]
    return part == zeroes[: len(part)]


# --- many at once ------------------------------------------------------------------------------


class _Calls(NamedTuple):
    """Numbers of system calls that the C library has no functions for."""

    setup: int
    destroy: int
    getevents: int
    submit: int


_NUMBERS: Final = {"x86_64": _Calls(206, 207, 208, 209), "aarch64": _Calls(0, 1, 4, 2)}
_CALLS: Final = _NUMBERS.get(platform.machine()) if sys.byteorder == "little" else None

# aio_data, aio_lio_opcode, aio_fildes, aio_buf, aio_nbytes, aio_offset; what is between is 0
_IOCB: Final = Struct("<Q8xH2xIQQq16x")
_EVENT: Final = Struct("<Q8xq8x")  # data, res
_PWRITE: Final = 1  # IOCB_CMD_PWRITE

_libc = ctypes.CDLL(None, use_errno=True)
_syscall3 = _libc["syscall"]  # each time a function of its own
_syscall3.argtypes = (ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p)
_syscall5 = _libc["syscall"]
_syscall5.argtypes = (
    ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p,
)  # fmt: skip
_syscall3.restype = _syscall5.restype = ctypes.c_long

_address: Final = ctypes.addressof
_first_byte: Final = ctypes.c_char.from_buffer


class BatchWriter:
    """Makes batches of writes; used by one thread (workers.Batches)."""

    def __init__(self) -> None:
        self._context: int | None = None  # the kernel's; 0: there is none to be had
        self._iocbs = bytearray(_IOCB.size * MAX_BATCH)
        self._events = bytearray(_EVENT.size * MAX_BATCH)
        self._events_at = _address(_first_byte(self._events))
        at = _address(_first_byte(self._iocbs))
        pointers = range(at, at + len(self._iocbs), _IOCB.size)
        self._pointers = (ctypes.c_uint64 * MAX_BATCH)(*pointers)
        self._pointers_at = _address(self._pointers)

    def run(self, ops: Sequence[Op[object]]) -> None:
        """Make the Writes that ops are for, MAX_BATCH at most; see workers.Batches."""
        writes = cast("list[Write]", [op.call for op in ops])
        rest = self._submit(writes) if self._is_ready() else dict.fromkeys(range(len(ops)), 0)
        for index, count in rest.items():
            ops[index].error = _finish(writes[index], count)

    def close(self) -> None:
        """Give back what the kernel keeps for it."""
        if self._context and _CALLS is not None:
            _syscall3(_CALLS.destroy, self._context, 0, None)
        self._context = 0

    def _is_ready(self) -> bool:
        if self._context is None:
            self._context = _set_up()
        return self._context != 0

    def _submit(self, writes: list[Write]) -> dict[int, int]:
        """Have the kernel make writes, MAX_BATCH at most.

        Returns:
            Of those that are not complete, by their index: bytes written, or -errno.
        """
        rest: dict[int, int] = {}
        pack, iocbs, end = _IOCB.pack_into, self._iocbs, 0
        for index, write in enumerate(writes):
            data = write.data
            if data.readonly:  # ctypes does not tell where it is
                rest[index] = 0
            else:
                place = _address(_first_byte(data))
                pack(iocbs, end, index, _PWRITE, write.fd, place, len(data), write.offset)
                end += _IOCB.size
        assert _CALLS is not None, "there is a context"
        context, told = self._context or 0, end // _IOCB.size
        taken = max(0, _syscall3(_CALLS.submit, context, told, self._pointers_at))
        for at in range(taken * _IOCB.size, end, _IOCB.size):  # the first of these it refuses
            rest[_IOCB.unpack_from(iocbs, at)[0]] = 0
        while taken:
            here = _syscall5(_CALLS.getevents, context, taken, taken, self._events_at, None)
            if here < 0:
                if ctypes.get_errno() == errno.EINTR:
                    continue
                return dict.fromkeys(range(len(writes)), -ctypes.get_errno())
            events = _EVENT.iter_unpack(self._events[: here * _EVENT.size])
            rest.update({at: done for at, done in events if done != len(writes[at].data)})
            taken -= here
        return rest


def _set_up() -> int:
    """Return a context of the kernel's, 0 where there is none to be had."""
    context = ctypes.c_ulong(0)
    if _CALLS is None or _syscall3(_CALLS.setup, MAX_BATCH, ctypes.addressof(context), None) < 0:
        return 0
    return context.value


def _finish(write: Write, count: int) -> OSError | None:
    """Write what is left of a write of which `count` bytes are there; return its error."""
    if count == len(write.data):
        return None
    if count < 0:
        return OSError(-count, os.strerror(-count))
    try:
        write_all(write.fd, write.offset + count, write.data[count:], 0)
    except OSError as error:
        return error
    return None


# --- one by one --------------------------------------------------------------------------------


def read_all(fd: int, offset: int, view: memoryview) -> None:
    """Fill `view`.

    Raises:
        OSError: It failed; EIO when the file ends inside the range.
    """
    while True:
        count = os.preadv(fd, (view,), offset)
        if count == len(view):
            return
        if count == 0:
            raise OSError(errno.EIO, "the file ends here")
        view = view[count:]
        offset += count


def write_all(fd: int, offset: int, data: bytes | bytearray | memoryview, flags: int) -> None:
    """Write all of `data`, with RWF_* flags.

    Raises:
        OSError: Some of it may have been written.
    """
    count = os.pwritev(fd, (data,), offset, flags) if flags else os.pwrite(fd, data, offset)
    while count < len(data):
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        data = memoryview(data)[count:]
        offset += count
        count = os.pwritev(fd, (data,), offset, flags)
