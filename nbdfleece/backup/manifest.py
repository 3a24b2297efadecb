"""manifest.json: which points a folder has, and what must come out of their files.

Invariants
  M1  Points stand in the order of time, each behind its parent. What breaks that is refused.
  M2  What is not understood is refused with its name; nothing in it is guessed.
  M3  `pending` is a change whose new file is complete and synced, under its `.partial` name or its
      final one; `garbage` are files that no point needs any more. Both are finished by the next
      run that changes the folder (backup.folder), in that order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from nbdfleece.backup.errors import Damaged
from nbdfleece.backup.names import Kind, file_name, is_disk, is_point, parse_file_name
from nbdfleece.base.limits import MAX_BACKUP_POINTS, MAX_SIZE

VERSION: Final = 1

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{0,128}")


@dataclass(frozen=True, slots=True)
class Point:
    """A point in time that can be restored.

    Attributes:
        name: See names.
        instant: RFC 3339, UTC.
        kind: What its file holds.
        parent: Name of the point whose content shows where this file has nothing; None for FULL.
        size: Bytes of the disk at that instant.
        file_bytes: Bytes of the file.
        sha256: See backup.content.
        bitmap: The dirty bitmap that was started at this instant, on the disk; empty: none.
        reason: Why the file is a full one; empty for increments.
        compressed: Its data was to be compressed.
    """

    name: str
    instant: str
    kind: Kind
    parent: str | None
    size: int
    file_bytes: int
    sha256: str
    bitmap: str = ""
    reason: str = ""
    compressed: bool = False

    @property
    def file(self) -> str:
        """Name of its file."""
        return file_name(self.name, self.kind)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the points that one new file brings.

    Attributes:
        add: The point of the new file; a point of that name is replaced.
        drop: Names of the points whose files the new one makes needless.
    """

    add: Point
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds.

    Attributes:
        disk: Name of the disk.
        folder_id: Of this folder and its siblings; part of the names of their bitmaps.
        points: See M1.
        pending: See M3.
        garbage: See M3.
    """

    disk: str
    folder_id: str
    points: tuple[Point, ...] = ()
    pending: Change | None = None
    garbage: tuple[str, ...] = field(default=())

    @property
    def newest(self) -> Point | None:
        """The newest point."""
        return self.points[-1] if self.points else None

    def point(self, name: str) -> Point | None:
        """Return a point by name."""
        return next((point for point in self.points if point.name == name), None)

    def applied(self) -> Manifest:
        """Return the manifest as it is when the pending change has happened."""
        change = self.pending
        assert change is not None, "there is nothing to apply"
        gone = [point for point in self.points if point.name in {*change.drop, change.add.name}]
        kept = [point for point in self.points if point not in gone]
        points = sorted([*kept, change.add], key=lambda point: point.name)
        files = [point.file for point in gone if point.file != change.add.file]
        return replace(self, points=tuple(points), pending=None, garbage=(*self.garbage, *files))


def dump(manifest: Manifest) -> bytes:
    """Return the file's content."""
    pending = manifest.pending
    value = {
        "version": VERSION,
        "disk": manifest.disk,
        "folder": manifest.folder_id,
        "points": [_point_out(point) for point in manifest.points],
        "pending": None
        if pending is None
        else {"add": _point_out(pending.add), "drop": list(pending.drop)},
        "garbage": list(manifest.garbage),
    }
    return (json.dumps(value, indent=2) + "\n").encode()


def load(data: bytes, where: str) -> Manifest:
    """Return what the file says.

    Args:
        data: Its content.
        where: Its path, for errors.

    Raises:
        Damaged: It is of another version, or makes no sense.
    """
    try:
        value = _Fields(json.loads(data), where)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"'{where}' is not JSON: {str(error)[:80]}") from error
    version = value.raw("version")
    if version != VERSION:
        raise Damaged(
            f"'{where}' is of version {version!r}, and only {VERSION} is known; "
            "it was written by another nbdfleece"
        )
    points = tuple(_point_in(item) for item in value.objects("points"))
    pending = value.optional_object("pending")
    change = None
    if pending is not None:
        drop = tuple(pending.text_list("drop"))
        change = Change(_point_in(_Fields(pending.raw("add"), where)), drop)
    disk, garbage = value.text("disk"), tuple(value.text_list("garbage"))
    if not is_disk(disk):
        raise value.wrong("disk")
    if any(parse_file_name(name) is None for name in garbage):
        raise value.wrong("garbage")
    manifest = Manifest(disk, value.text("folder", _NAME), points, change, garbage)
    _check_order(manifest, where)
    if change is not None:
        _check_order(manifest.applied(), where)
    return manifest


def _check_order(manifest: Manifest, where: str) -> None:
    """Check M1."""
    if len(manifest.points) > MAX_BACKUP_POINTS:
        raise Damaged(f"'{where}' has more than {MAX_BACKUP_POINTS} points")
    seen: set[str] = set()
    last = ""
    for point in manifest.points:
        if point.name <= last:
            raise Damaged(f"'{where}': point {point.name} is out of order")
        if (point.parent is None) is not (point.kind is Kind.FULL):
            raise Damaged(f"'{where}': point {point.name} has a wrong parent")
        if point.parent is not None and point.parent not in seen:
            raise Damaged(f"'{where}': point {point.name} needs {point.parent}, which is missing")
        seen.add(point.name)
        last = point.name


def _point_out(point: Point) -> dict[str, str | int | None]:
    return {
        "name": point.name,
        "instant": point.instant,
        "kind": point.kind.value,
        "file": point.file,
        "parent": point.parent,
        "size": point.size,
        "file-bytes": point.file_bytes,
        "sha256": point.sha256,
        "bitmap": point.bitmap,
        "reason": point.reason,
        "compressed": point.compressed,
    }


def _point_in(value: _Fields) -> Point:
    kind = value.text("kind")
    if kind not in {member.value for member in Kind}:
        raise value.wrong("kind")
    parent = value.raw("parent")
    if parent is not None and not (isinstance(parent, str) and is_point(parent)):
        raise value.wrong("parent")
    point = Point(
        name=value.text("name"),
        instant=value.text("instant"),
        kind=Kind(kind),
        parent=parent,
        size=value.number("size"),
        file_bytes=value.number("file-bytes"),
        sha256=value.text("sha256", _SHA256),
        bitmap=value.text("bitmap", _NAME),
        reason=value.text("reason"),
        compressed=value.raw("compressed") is True,
    )
    if not is_point(point.name):
        raise value.wrong("name")
    if value.text("file") != point.file:
        raise value.wrong("file")
    try:
        is_absolute = datetime.fromisoformat(point.instant).tzinfo is not None
    except ValueError:
        is_absolute = False
    if not is_absolute:
        raise value.wrong("instant")
    return point


class _Fields:
    """An object of the file, by checked getters."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise Damaged(f"'{where}': an object is expected, not {str(value)[:40]!r}")
        self._value: Mapping[object, object] = value
        self._where = where

    def wrong(self, name: str) -> Damaged:
        """Return the error that says that a member makes no sense."""
        return Damaged(f"'{self._where}': '{name}' is {str(self._value.get(name))[:60]!r}")

    def raw(self, name: str) -> object:
        return self._value.get(name)

    def text(self, name: str, form: re.Pattern[str] | None = None) -> str:
        value = self._value.get(name)
        if not isinstance(value, str) or (form is not None and form.fullmatch(value) is None):
            raise self.wrong(name)
        return value

    def number(self, name: str) -> int:
        value = self._value.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
            raise self.wrong(name)
        return value

    def _items(self, name: str) -> list[object]:
        value = self._value.get(name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.wrong(name)
        return list(value)

    def text_list(self, name: str) -> list[str]:
        found = self._items(name)
        texts = [item for item in found if isinstance(item, str)]
        if len(texts) < len(found):
            raise self.wrong(name)
        return texts

    def objects(self, name: str) -> list[_Fields]:
        return [_Fields(item, self._where) for item in self._items(name)]

    def optional_object(self, name: str) -> _Fields | None:
        value = self._value.get(name)
        return None if value is None else _Fields(value, self._where)
