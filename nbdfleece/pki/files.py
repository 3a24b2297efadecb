"""How files get into a folder of certificates.

Invariants
  F1  A file appears whole: written under another name, synced, renamed. What a run that was cut
      off leaves behind has a name that nobody reads, and goes at the next write.
  F2  A private file is never readable by others, not even for a moment.
  F3  Whoever changes the folder holds its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING, Final, TypeVar

from nbdfleece.pki.errors import NoAuthority, PkiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

_PRIVATE: Final = 0o600
_PUBLIC: Final = 0o644
_FOLDER: Final = 0o700
_LIMIT: Final = 1 << 20  # bytes of one file


def make_folder(path: Path) -> None:
    """Make a folder that only its owner may look into; one that is there stays as it is.

    Raises:
        PkiError: It cannot be made.
    """
    with _converted(path):
        path.mkdir(_FOLDER, parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, waiting for whoever has it.

    Raises:
        NoAuthority: There is no such folder.
        PkiError: It cannot be locked.
    """
    if not folder.is_dir():
        raise NoAuthority(f"there is no folder '{folder}'; pki init makes it")
    with _converted(folder):
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
    try:
        with _converted(folder):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        PkiError: It cannot be read.
    """
    with _converted(path), open(path, "rb") as file:
        return file.read(_LIMIT)


def load(path: Path, parse: Callable[[bytes], T]) -> T:
    """Return what `parse` makes of a file.

    Raises:
        PkiError: It cannot be read, or parsed.
    """
    data = read(path)
    try:
        return parse(data)
    except PkiError as error:
        raise PkiError(f"'{path}': {error}") from error


def write(path: Path, data: bytes, *, private: bool) -> None:
    """Write a file, replacing what was there.

    Raises:
        PkiError: It cannot be written; what was there still is.
    """
    new = path.with_name(f".{path.name}.new")
    with _converted(path):
        new.unlink(missing_ok=True)
        # O_EXCL: the mode is that of a file we made, not of one that somebody has put there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(new, flags, _PRIVATE if private else _PUBLIC), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder outlive a power cut.

    Raises:
        PkiError: It cannot be done.
    """
    with _converted(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def rename_folder(old: Path, new: Path) -> None:
    """Give a folder another name, in the same folder.

    Raises:
        PkiError: It cannot be done.
    """
    with _converted(new):
        old.rename(new)
    sync_folder(new.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        PkiError: It cannot be done.
    """
    with _converted(path):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it.

    Raises:
        PkiError: It cannot be done.
    """
    with _converted(path):
        shutil.rmtree(path)


@contextlib.contextmanager
def _converted(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PkiError(f"'{path}': {os.strerror(error.errno or 0)}") from error
