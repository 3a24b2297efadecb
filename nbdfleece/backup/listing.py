"""What backups a folder has, for lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdfleece.backup import chain
from nbdfleece.backup.folder import DiskFolder, disks
from nbdfleece.backup.names import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from nbdfleece.backup.manifest import Point


@dataclass(frozen=True, slots=True)
class Listed:
    """A point of a folder.

    Attributes:
        disk: Name of the disk.
        point: It.
        is_whole: All files that it needs are there.
    """

    disk: str
    point: Point
    is_whole: bool


def folders(path: Path) -> list[Path]:
    """Return the folders of disks that `path` means: itself (DIR/DISK), or those in it (DIR).

    Raises:
        NoBackup: There is none.
    """
    if (path / MANIFEST).exists():
        return [path]
    return [path / disk for disk in disks(path)]


def list_points(path: Path) -> list[Listed]:
    """Return the points in a folder, disk by disk, the oldest first.

    Raises:
        NoBackup: There is none.
        BackupError: It cannot be read.
    """
    found: list[Listed] = []
    for one in folders(path):
        with DiskFolder(one, for_change=False) as folder:
            whole = chain.restorable(folder.manifest, folder.present())
            found += [
                Listed(folder.manifest.disk, point, point in whole)
                for point in folder.manifest.points
            ]
    return found
