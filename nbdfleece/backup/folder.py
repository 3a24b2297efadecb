"""The folder of one disk's backups, and the rules that keep it whole through crashes.

A new file becomes part of the backup in steps, each of which leaves every point restorable::

    1  it is written under its `.partial` name, and synced        nobody knows it yet
    2  the manifest says `pending`
    3  it gets its final name, perhaps in place of another file   with the same content at its point
    4  the manifest says what there is now; what is needless is `garbage`
    5  children of a file with a new name learn that name         both files are there meanwhile
    6  garbage is removed, and the manifest forgets it

Invariants
  F1  A file has a final name only when it is complete and synced.
  F2  At every moment, and after a crash at any, each point of the manifest (with `pending` applied
      once step 3 has happened) can be restored.
  F3  Whoever changes the folder holds its lock alone, and first finishes what a crash left behind.
  F4  A finished file that the manifest does not know is never touched.

Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from nbdfleece.backup import image
from nbdfleece.backup import manifest as manifests
from nbdfleece.backup.errors import BackupError, Damaged, FolderBusy, NoBackup
from nbdfleece.backup.files import Files
from nbdfleece.backup.manifest import Change, Manifest, Point
from nbdfleece.backup.names import LOCK, MANIFEST, PARTIAL, parse_file_name
from nbdfleece.base.limits import MAX_BACKUP_MANIFEST, MAX_BACKUP_POINTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

_log = logging.getLogger(__name__)

_FOLDER_MODE: Final = 0o700
_LOCK_MODE: Final = 0o600


class DiskFolder:
    """The folder of one disk's backups, locked as long as this is open.

    Args:
        path: DIR/DISK. For change both are made, and what is above them is not.
        for_change: Lock it alone, and finish what a crash left behind; else for reading.
        files: How files are changed.

    Attributes:
        path: The folder.
        manifest: What it holds; for reading, with what is pending taken into account.

    Raises:
        NoBackup: For reading: there is no backup.
        FolderBusy: Somebody else holds the lock.
        Damaged: The manifest makes no sense.
        BackupError: The file system refuses.
    """

    def __init__(self, path: Path, *, for_change: bool, files: Files | None = None) -> None:
        self.path = path
        self.manifest = Manifest(path.name, "")
        self.is_new = False
        self._files = files or Files()
        self._lock_fd = -1
        with self._says("use"):
            self._lock(for_change=for_change)
        try:
            self._load(for_change=for_change)
            if for_change and not self.is_new:
                self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # --- looking -------------------------------------------------------------------------------

    def file(self, point: Point) -> Path:
        """Return where a point's file is."""
        return self.path / point.file

    def partial(self, point: Point | str) -> Path:
        """Return where a point's file is until it is finished."""
        name = point if isinstance(point, str) else point.file
        return self.path / (name + PARTIAL)

    def present(self) -> set[str]:
        """Return the names of the finished files that are there."""
        with self._says("list the files of"):
            return {name for name in os.listdir(self.path) if parse_file_name(name) is not None}

    def strangers(self) -> list[str]:
        """Return finished files that the manifest does not know (F4)."""
        known = {point.file for point in self.manifest.points} | set(self.manifest.garbage)
        return sorted(self.present() - known)

    def check_room(self) -> None:
        """Check that there may be one more point.

        Raises:
            BackupError: There are too many: nobody would understand the manifest any more.
        """
        if len(self.manifest.points) >= MAX_BACKUP_POINTS:
            raise BackupError(
                f"'{self.path}' has {MAX_BACKUP_POINTS} points, and may have no more: prune them"
            )

    # --- changing ------------------------------------------------------------------------------

    def start(self, folder_id: str) -> None:
        """Write the first manifest of a new folder."""
        assert self.is_new, "there is a manifest"
        self._put(Manifest(self.path.name, folder_id))
        self.is_new = False

    def finish(self, change: Change, fd: int) -> None:
        """Make a complete `.partial` file part of the backup, and remove what it makes needless.

        Args:
            change: See Change; its file is at `partial(change.add)`.
            fd: The file, open; stays open.

        Raises:
            BackupError: It failed. Every point that was there still is.
        """
        if self.manifest.point(change.add.name) is None:
            self.check_room()
        with self._says(f"finish {change.add.file} in"):
            self._files.sync(fd)
            self._put(replace(self.manifest, pending=change))
            self._finish_pending(is_done=False)
            self._clear_garbage()

    def forget(self, names: Sequence[str]) -> None:
        """Give up points that nothing stands upon but others of them; remove their files.

        Raises:
            BackupError: It failed. Every point that stays is whole.
        """
        kept = tuple(point for point in self.manifest.points if point.name not in names)
        gone = tuple(point.file for point in self.manifest.points if point.name in names)
        with self._says("remove points from"):
            garbage = (*self.manifest.garbage, *gone)
            self._put(replace(self.manifest, points=kept, garbage=garbage))
            self._clear_garbage()

    def remove_partials(self) -> list[str]:
        """Remove unfinished files; return their names."""
        with self._says("remove unfinished files from"):
            found = sorted(
                name
                for name in os.listdir(self.path)
                if name.endswith(PARTIAL) and parse_file_name(name.removesuffix(PARTIAL))
            )
            for name in found:
                self._files.remove(self.path / name)
            return found

    # --- private -------------------------------------------------------------------------------

    def _lock(self, *, for_change: bool) -> None:
        if for_change:
            for folder in (self.path.parent, self.path):
                is_new = not folder.exists()
                folder.mkdir(_FOLDER_MODE, exist_ok=True)
                if is_new:
                    with contextlib.suppress(PermissionError):  # to look into what is above
                        self._files.sync_folder(folder.parent)
            fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _LOCK_MODE)
        else:
            try:
                fd = os.open(self.path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):
                return  # a copy without the lock file, or of somebody else: nobody changes that
        try:
            kind = fcntl.LOCK_EX if for_change else fcntl.LOCK_SH
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                raise FolderBusy(f"'{self.path}' is in use by another backup command") from error
            if for_change:
                raise
            return  # a file system without locks
        self._lock_fd = fd

    def _load(self, *, for_change: bool) -> None:
        path = self.path / MANIFEST
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BACKUP_MANIFEST + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            if for_change:
                self.is_new = True
                return
            raise NoBackup(f"there is no backup in '{self.path}' (no {MANIFEST})") from error
        except OSError as error:
            raise BackupError(f"read '{path}': {error.strerror}") from error
        if len(data) > MAX_BACKUP_MANIFEST:
            raise Damaged(f"'{path}' is longer than {MAX_BACKUP_MANIFEST} bytes")
        self.manifest = manifests.load(data, str(path))
        if not for_change and self.manifest.pending is not None and self._is_named():
            self.manifest = self.manifest.applied()

    def _is_named(self) -> bool:
        """Tell whether the pending file has its final name (step 3).

        A file that it replaces has the same name and stands on another parent.
        """
        change = self.manifest.pending
        assert change is not None, "something is pending"
        path = self.file(change.add)
        if not path.exists():
            return False
        try:
            return image.backing_name(path) == self._backing_of(change.add, self.manifest)
        except Damaged:
            return False

    def _recover(self) -> None:
        """Finish what a crash left behind (F3)."""
        with self._says("finish an interrupted change of"):
            change = self.manifest.pending
            if change is not None:
                is_named = self._is_named()
                if is_named or self.partial(change.add).exists():
                    _log.warning("%s: finishing %s", self.path, change.add.file)
                    self._finish_pending(is_done=is_named)
                else:
                    _log.warning("%s: %s is gone", self.path, change.add.file + PARTIAL)
                    self._put(replace(self.manifest, pending=None))
            self._clear_garbage()
            for name in self.remove_partials():
                _log.warning("%s: %s was not finished; it is removed", self.path, name)

    def _finish_pending(self, *, is_done: bool) -> None:
        """Do steps 3 and 4."""
        change = self.manifest.pending
        assert change is not None, "something is pending"
        if not is_done:
            self._files.rename(self.partial(change.add), self.file(change.add))
        self._files.sync_folder(self.path)
        self._put(self.manifest.applied())

    def _clear_garbage(self) -> None:
        """Do steps 5 and 6."""
        if not self.manifest.garbage:
            return
        for point in self.manifest.points:
            wanted = self._backing_of(point, self.manifest)
            path = self.file(point)
            try:
                if wanted is not None and path.exists() and image.backing_name(path) != wanted:
                    image.set_backing_name(path, wanted, self._files)
            except BackupError as error:  # it may say a name that is garbage, which stays for it
                _log.warning("%s: files that are not needed stay: %s", self.path, error)
                return
        for name in self.manifest.garbage:
            self._files.remove(self.path / name)
        self._files.sync_folder(self.path)
        self._put(replace(self.manifest, garbage=()))

    @staticmethod
    def _backing_of(point: Point, manifest: Manifest) -> str | None:
        if point.parent is None:
            return None
        below = manifest.point(point.parent)
        assert below is not None, "the manifest has been checked"
        return below.file

    def _put(self, manifest: Manifest) -> None:
        self._files.replace_content(self.path / MANIFEST, manifests.dump(manifest))
        self.manifest = manifest

    @contextlib.contextmanager
    def _says(self, what: str) -> Iterator[None]:
        """Turn an OSError into what it means.

        Raises:
            BackupError: It happened.
        """
        try:
            yield
        except OSError as error:
            where = error.filename or self.path
            why = "is not a folder" if isinstance(error, FileExistsError) else error.strerror
            raise BackupError(f"cannot {what} '{where}': {why}") from error


def folder_id(path: Path) -> str | None:
    """Return the id that a sibling in `path` (DIR) has, or None.

    Raises:
        Damaged: A manifest makes no sense.
    """
    for manifest in sorted(path.glob(f"*/{MANIFEST}")):
        try:
            found = manifests.load(manifest.read_bytes(), str(manifest))
        except OSError as error:
            raise BackupError(f"read '{manifest}': {error.strerror}") from error
        return found.folder_id
    return None


def disks(path: Path) -> list[str]:
    """Return the names of the disks that have backups in `path` (DIR).

    Raises:
        NoBackup: There is no such folder, or no backup in it.
    """
    try:
        found = sorted(entry.name for entry in path.iterdir() if (entry / MANIFEST).exists())
    except OSError as error:
        raise NoBackup(f"'{path}': {error.strerror}") from error
    if not found:
        raise NoBackup(f"there is no backup in '{path}'")
    return found
