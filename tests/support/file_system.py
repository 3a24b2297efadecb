"""Small file systems that can be full or stuck, where the machine lets us make them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_FIFREEZE = 0xC0045877  # _IOWR('X', 119, int), as fsfreeze(8)
_FITHAW = 0xC0045878


class FileSystem:
    """A mounted ext4 file system.

    Attributes:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_frozen = False

    def free(self) -> int:
        """Return the bytes that can still be written."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let all writes to it hang, and reads go on, until the block ends or `thaw` is called."""
        self._control(_FIFREEZE)
        self._is_frozen = True
        try:
            yield
        finally:
            self.thaw()

    def thaw(self) -> None:
        """Let the writes go on; nothing happens if it is not frozen."""
        if self._is_frozen:
            self._control(_FITHAW)
            self._is_frozen = False

    def _control(self, number: int) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, number, 0)
        finally:
            os.close(fd)


@contextlib.contextmanager
def file_system(path: Path, size: int) -> Iterator[FileSystem]:
    """Make an ext4 file system of `size` bytes and mount it at `path`, or skip the test."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    tools = [shutil.which(name, path=search) for name in ("mkfs.ext4", "mount", "umount")]
    if os.geteuid() != 0 or not all(tools):
        pytest.skip("a file system of its own needs root, mkfs.ext4 and mount")
    make, mount, umount = map(str, tools)
    image = path.with_name(path.name + ".image")
    with image.open("xb") as file:
        file.truncate(size)
    path.mkdir()
    for command in ([make, "-q", "-F", "-m", "0", image], [mount, "-o", "loop", image, path]):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            pytest.skip(f"this machine gives no file system: {made.stderr.strip()}")
    found = FileSystem(path)
    try:
        yield found
    finally:
        found.thaw()
        subprocess.run([umount, "-l", str(path)], check=True)
