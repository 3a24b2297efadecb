"""What is done to the files of a backup, one step at a time, so that tests can stop at each.

All of it blocks. An `OSError` comes out as it is: `folder` says what was being done.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_MODE: Final = 0o600
_SPARE: Final = 64  # files that are open besides those of a chain
_NEW: Final = ".new"


def allow_open(count: int) -> None:
    """Let this process have so many files open, as far as it may: a chain can be very long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


class Files:
    """The steps; each is whole when it returns, and what `sync` names outlives a power failure."""

    def create(self, path: Path) -> int:
        """Make an empty file in place of any that is there; return its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)

    def sync(self, fd: int) -> None:
        """Bring a file's content to stable storage."""
        os.fsync(fd)

    def sync_folder(self, path: Path) -> None:
        """Bring the names in a folder to stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, path: Path, to: Path) -> None:
        """Give a file another name, in place of any file that has it."""
        path.replace(to)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done

    def replace_content(self, path: Path, data: bytes) -> None:
        """Put `data` in place of a small file's content, as a whole, on stable storage."""
        new = path.with_name(path.name + _NEW)
        fd = self.create(new)
        try:
            self.write(fd, data, 0)
            self.sync(fd)
        finally:
            os.close(fd)
        self.rename(new, path)
        self.sync_folder(path.parent)
