"""The state folder: what outlives the daemon, and who may use it.

::

    STATE/.lock                             held by the daemon that uses the folder
    STATE/DISK/disk.json                    location, identity
    STATE/DISK/bitmaps/NAME                 see block.bitmap_files
    STATE/DISK/snapshots/NAME/meta.json     instant, size, policy
    STATE/DISK/snapshots/NAME/temp.raw      old data, unless there is a folder of its own for that

Invariants
  S1  A JSON file is replaced as a whole: written, synced, renamed.
  S2  Every file says its version; one that we do not know is refused by name, not touched.
  S3  meta.json is there before the temporary image is made and goes after it, so that whatever a
      dead daemon leaves behind is found by the next one.

Everything here blocks; callers on the event loop use a thread.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.fleece.errors import NameTaken, StateError, StateLocked

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION: Final = 1

_FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
_JSON_LIMIT: Final = 1 << 20  # bytes of one of our JSON files

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class SnapshotFiles:
    """Where the files of one snapshot are."""

    folder: Path
    temp: Path

    @property
    def meta(self) -> Path:
        """The file that says what the snapshot is."""
        return self.folder / "meta.json"


class StateFolder:
    """The state folder of this daemon, locked from `open` to `close`.

    Args:
        path: The folder; made if it is not there.
        temp_dir: Where temporary images go; None: beside the snapshots' meta.json.
    """

    def __init__(self, path: Path, temp_dir: Path | None) -> None:
        self.path = path
        self.temp_dir = temp_dir
        self._lock_fd = -1

    def open(self) -> None:
        """Make the folder if need be, and lock it.

        Raises:
            StateLocked: Another daemon has it.
            StateError: It cannot be made, or written.
        """
        try:
            _make_folder(self.path)
            if self.temp_dir is not None:
                _make_folder(self.temp_dir)
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise StateError(f"state folder '{self.path}': {_says(error)}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise StateLocked(
                f"state folder '{self.path}': another nbdfleece daemon is using it"
            ) from error
        self._lock_fd = fd

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # --- disks -----------------------------------------------------------------------------

    def write_disk(self, disk: str, facts: Mapping[str, Value]) -> None:
        """Keep what is known of a disk.

        Raises:
            StateError: The file there is of another version, or cannot be written; or the folder
                is not open, as in a daemon without state.
        """
        if self._lock_fd < 0:
            raise StateError(f"disk '{disk}': this daemon has no state folder ('serve' has)")
        folder = self.path / disk
        try:
            _make_folder(folder)
        except OSError as error:
            raise StateError(f"'{folder}': {_says(error)}") from error
        _read_json(folder / "disk.json")  # refuses what a newer version wrote
        _write_json(folder / "disk.json", facts)

    def bitmap_folder(self, disk: str) -> Path:
        """Return where the bitmaps of a disk are kept; it may not be there."""
        return self.path / disk / "bitmaps"

    # --- snapshots -------------------------------------------------------------------------

    def snapshot_exists(self, disk: str, snapshot: str) -> bool:
        """Tell whether there are files of such a snapshot."""
        return (self.path / disk / "snapshots" / snapshot).exists()

    def make_snapshot(
        self, disk: str, snapshot: str, size: int, facts: Mapping[str, Value]
    ) -> SnapshotFiles:
        """Make the files of a snapshot, the temporary image sparse and of `size` bytes.

        Raises:
            NameTaken: They exist.
            CommandError: They cannot be made. What had been made is gone again.
        """
        folder = self.path / disk / "snapshots" / snapshot
        try:
            _make_folder(folder.parent)
            folder.mkdir(_FOLDER_MODE)
        except FileExistsError as error:
            raise NameTaken(f"disk '{disk}' has a snapshot '{snapshot}' already") from error
        except OSError as error:
            raise StateError(f"'{folder}': {_says(error)}") from error
        temp = folder / "temp.raw"
        if self.temp_dir is not None:
            temp = self.temp_dir / f"{disk}@{snapshot}.raw"
        files = SnapshotFiles(folder, temp)
        try:
            self.write_snapshot(files, facts)
            _make_sparse(temp, size)
        except BaseException:
            remove_files(files)
            raise
        return files

    def write_snapshot(self, files: SnapshotFiles, facts: Mapping[str, Value]) -> None:
        """Keep what is known of a snapshot.

        Raises:
            StateError: It cannot be written.
        """
        _write_json(files.meta, {**facts, "temp": str(files.temp)})

    def clear_leftovers(self) -> list[str]:
        """Remove the snapshots of a dead daemon: without its memory they are nothing.

        Returns:
            A sentence for each.

        Raises:
            StateError: One was made by a version that we do not know; it is not touched.
        """
        found = sorted(self.path.glob("*/snapshots/*"))
        metas = [_read_json(folder / "meta.json") for folder in found]  # all checks first
        return [self._clear(folder, meta) for folder, meta in zip(found, metas, strict=True)]

    def _clear(self, folder: Path, meta: Mapping[str, object]) -> str:
        name = f"{folder.parent.parent.name}@{folder.name}"
        temp = folder / "temp.raw"
        elsewhere = Path(str(meta.get("temp", temp)))
        if elsewhere.name == f"{name}.raw":
            temp = elsewhere
        try:
            remove_files(SnapshotFiles(folder, temp))
        except CommandError as error:
            return f"snapshot {name} of an earlier run cannot be removed: {error}"
        return f"snapshot {name} of an earlier run is lost: it was not kept over a restart"


def remove_files(files: SnapshotFiles) -> None:
    """Remove the files of a snapshot, as far as they are there.

    Raises:
        StateError: One cannot be removed.
    """
    try:
        files.temp.unlink(missing_ok=True)
        (files.folder / "meta.json.new").unlink(missing_ok=True)
        files.meta.unlink(missing_ok=True)  # behind the image: S3
        files.folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StateError(f"'{files.folder}': {_says(error)}") from error


def _make_folder(path: Path) -> None:
    path.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)


def _make_sparse(path: Path, size: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    except FileExistsError as error:
        raise NameTaken(f"temporary image '{path}' exists already") from error
    except OSError as error:
        raise StateError(f"temporary image '{path}': {_says(error)}") from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise StateError(f"temporary image '{path}' of {size} bytes: {_says(error)}") from error
    finally:
        os.close(fd)


def _write_json(path: Path, facts: Mapping[str, Value]) -> None:
    text = json.dumps({"version": VERSION, **facts}, indent=2) + "\n"
    new = path.with_name(path.name + ".new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except OSError as error:
        raise StateError(f"'{path}': {_says(error)}") from error


def _read_json(path: Path) -> Mapping[str, object]:
    """Return what `path` holds: nothing when it is not there, or was cut short by a crash.

    Raises:
        StateError: It is of another version.
    """
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.loads(file.read(_JSON_LIMIT))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise StateError(f"'{path}': {_says(error)}") from error
    if not isinstance(facts, dict):
        return {}
    if facts.get("version") != VERSION:
        raise StateError(
            f"'{path}' is of version {facts.get('version')!r}, and only {VERSION} is known; "
            "it was written by another nbdfleece"
        )
    return facts


def _says(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)
