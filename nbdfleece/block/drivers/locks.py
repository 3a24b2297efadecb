"""QEMU's image locks: what we do to an image, and what we bear, told to every other process.

::

    byte   100 + i   locked (shared): the holder uses permission i
    byte   200 + i   locked (shared): the holder does not bear others using permission i
    i      0 consistent-read, 1 write, 2 write-unchanged, 3 resize

All locks are shared ones, so taking them says something and forbids nothing. Who wants a
permission takes its own bytes first, and then asks whether an exclusive lock could be had on the
opposite bytes (F_OFD_GETLK takes none): somebody else's lock there is the conflict. As everybody
takes before asking, two that come at the same moment may both be refused, but never both let in.

Open file description locks belong to the descriptor: two nodes of this process conflict like two
processes, and closing another descriptor of the same file drops nothing.

Invariants
  L1  Between changes exactly the bytes of the permissions in force are locked.
  L2  From a successful `check` to its `commit` or `abort` the bytes of the old and of the new
      permissions are locked, so either outcome cannot fail.
  L3  After a failed `check` the old bytes are locked, and nothing else.

Follows: QEMU block/file-posix.c (raw_apply_lock_bytes, raw_check_lock_bytes) and util/osdep.c.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import os
import struct
from typing import Final

from nbdfleece.base.errors import CommandError, InUse
from nbdfleece.block import permissions as perms

log = logging.getLogger(__name__)

PERM_BASE: Final = 100  # RAW_LOCK_PERM_BASE
SHARED_BASE: Final = 200  # RAW_LOCK_SHARED_BASE
_BITS: Final = tuple(perms.NAMES)  # bit i has the value 1 << i, as QEMU's BLK_PERM_*
_FLOCK: Final = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, pid
_HELD: Final = (errno.EAGAIN, errno.EACCES)  # somebody holds an exclusive lock


class Locking(enum.Enum):
    """Whether an image is locked; values as in QMP."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"  # where the file system can


def can_lock(fd: int) -> bool:
    """Tell whether the file behind `fd` knows open file description locks."""
    try:
        _call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, PERM_BASE)
    except OSError:
        return False
    return True


class ImageLocks:
    """The locks of one open image.

    Args:
        fd: Open for reading at least; stays the caller's. Closing it drops the locks.
        filename: For messages.
    """

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._perm = perms.NONE
        self._unshared = perms.NONE
        self._locked: set[int] = set()

    def check(self, perm: int, shared: int) -> None:
        """Get ready for `commit` or `abort`, one of which follows.

        Args:
            perm: What all parents of the image need together.
            shared: What all of them bear others doing.

        Raises:
            CommandError: Another process forbids it; the locks are as before.
        """
        unshared = perms.ALL & ~shared
        try:
            # The old bytes too, in case of an abort.
            for byte in sorted(_bytes(perm | self._perm, unshared | self._unshared)):
                self._lock(byte)
            # What is in force already has been asked for; asking again could fail only because
            # somebody has come who must not be there.
            self._probe(perm & ~self._perm, unshared & ~self._unshared)
        except CommandError:
            self.abort()
            raise

    def commit(self, perm: int, shared: int) -> None:
        """Drop the locks that the checked permissions do not need. Cannot fail."""
        self._perm, self._unshared = perm, perms.ALL & ~shared
        self._drop_others()

    def abort(self) -> None:
        """Go back to the locks in force before `check`. Cannot fail."""
        self._drop_others()

    def _lock(self, byte: int) -> None:
        if byte in self._locked:
            return
        try:
            _call(self._fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        except OSError as error:
            if error.errno in _HELD:
                raise InUse(f"Failed to lock byte {byte}\n{self._hint()}") from error
            raise CommandError(
                f"Failed to lock byte {byte} of '{self._filename}': "
                f"{os.strerror(error.errno or errno.EIO)}"
            ) from error
        self._locked.add(byte)

    def _probe(self, perm: int, unshared: int) -> None:
        """Ask whether others forbid `perm`, or do what we do not share."""
        for index, bit in enumerate(_BITS):
            if perm & bit and self._is_taken(SHARED_BASE + index):
                raise InUse(f'Failed to get "{perms.NAMES[bit]}" lock\n{self._hint()}')
        for index, bit in enumerate(_BITS):
            if unshared & bit and self._is_taken(PERM_BASE + index):
                raise InUse(f'Failed to get shared "{perms.NAMES[bit]}" lock\n{self._hint()}')

    def _is_taken(self, byte: int) -> bool:
        """Tell whether anybody but us holds a lock on the byte (or nobody can tell)."""
        try:
            return _call(self._fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK
        except OSError as error:
            log.warning("%s: cannot ask for lock byte %d: %s", self._filename, byte, error)
            return True

    def _drop_others(self) -> None:
        for byte in self._locked - _bytes(self._perm, self._unshared):
            try:
                _call(self._fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
            except OSError as error:
                # The byte stays ours until the file is closed: others are refused too much.
                log.warning("%s: cannot unlock byte %d: %s", self._filename, byte, error)
            else:
                self._locked.discard(byte)

    def _hint(self) -> str:
        return f"Is another process using the image [{self._filename}]?"


def _bytes(perm: int, unshared: int) -> set[int]:
    """Return the bytes to lock for permissions in use and permissions not shared."""
    used = {PERM_BASE + index for index, bit in enumerate(_BITS) if perm & bit}
    return used | {SHARED_BASE + index for index, bit in enumerate(_BITS) if unshared & bit}


def _call(fd: int, command: int, kind: int, byte: int) -> int:
    """Make a lock call on one byte; return the type in the kernel's answer."""
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    kind, *_ = _FLOCK.unpack(answer)
    return kind
