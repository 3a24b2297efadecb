"""Backups without a daemon: folders filled from disks that are byte strings, and power failures."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nbdfleece.backup.chain import lineage
from nbdfleece.backup.files import Files
from nbdfleece.backup.folder import DiskFolder
from nbdfleece.backup.image import Image
from nbdfleece.backup.layers import Layers
from nbdfleece.backup.manifest import Change, Point
from nbdfleece.backup.names import Kind, point_name
from nbdfleece.backup.prune import check_hashes
from nbdfleece.backup.writing import NewImage, prepare

CLUSTER = 64 << 10
CHUNK = 1 << 20
EPOCH = datetime(2026, 11, 27, 3, tzinfo=UTC)


class PowerFailureError(BaseException):
    """The machine stops here. No code of ours may catch it."""


class FailingFiles(Files):
    """Stops before the step number `left`; each step is whole, as rename and fsync are."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _step(self) -> None:
        if self.left == 0:
            raise PowerFailureError
        self.left -= 1

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)

    def sync(self, fd: int) -> None:
        self._step()
        super().sync(fd)

    def sync_folder(self, path: Path) -> None:
        self._step()
        super().sync_folder(path)

    def rename(self, path: Path, to: Path) -> None:
        self._step()
        super().rename(path, to)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self._step()
        super().write(fd, data, offset)


def some_disk(rng: random.Random, size: int) -> bytes:
    """A disk with data, zeroes, and nothing in particular."""
    clusters = -(-size // CLUSTER)
    return b"".join(_cluster(rng) for _ in range(clusters))[:size]


def changed(rng: random.Random, disk: bytes, *, count: int = 5) -> bytes:
    """The disk after some writes."""
    found = bytearray(disk)
    for _ in range(count):
        at = rng.randrange(len(disk))
        data = rng.randbytes(rng.randrange(1, 3 * CLUSTER))
        if rng.random() < 0.3:
            data = bytes(len(data) + 4 * CLUSTER)
        found[at : at + len(data)] = data[: len(disk) - at]
    return bytes(found)


def _cluster(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(CLUSTER)
    if kind == 1:
        return rng.randbytes(CLUSTER)
    return bytes((rng.randrange(256),)) * CLUSTER


def add_point(
    folder: DiskFolder,
    disk: bytes,
    *,
    before: bytes | None = None,
    instant: datetime | None = None,
    compress: bool = False,
    files: Files | None = None,
    bitmap: str = "",
) -> Point:
    """Add a point with the content of `disk`; an increment, if `before` is the newest's content."""
    newest = folder.manifest.newest
    if folder.is_new:
        folder.start("0123abcd")
    last = EPOCH if newest is None else datetime.fromisoformat(newest.instant)
    text = (instant or last + timedelta(hours=1)).isoformat()
    names = {point.name for point in folder.manifest.points}
    below = newest if before is not None else None
    point = Point(
        name=point_name(text, names),
        instant=text,
        kind=Kind.FULL if below is None else Kind.INCREMENT,
        parent=None if below is None else below.name,
        size=len(disk),
        file_bytes=0,
        sha256="0" * 64,
        compressed=compress,
        bitmap=bitmap,
    )
    padding = bytes(-len(disk) % 512)
    disk, before = disk + padding, before and before + padding
    fd = (files or Files()).create(folder.partial(point))
    try:
        new = NewImage(fd, len(disk), None if below is None else below.file)
        for start in range(0, len(disk), CHUNK):
            piece = disk[start : start + CHUNK]
            for first, end in _different(piece, before and before[start : start + CHUNK]):
                data = bytearray(piece[first:end])
                new.put(prepare(start + first, data, 0, len(data), compress=compress))
        sha256, size = new.finish()
        point = replace(point, sha256=sha256, file_bytes=size)
        folder.finish(Change(point), fd)
    finally:
        os.close(fd)
    return point


def _different(piece: bytes, before: bytes | None) -> list[tuple[int, int]]:
    """The runs of clusters of a chunk that have changed."""
    runs: list[tuple[int, int]] = []
    for at in range(0, len(piece), CLUSTER):
        end = min(at + CLUSTER, len(piece))
        if before is not None and before[at:end] == piece[at:end]:
            continue
        if runs and runs[-1][1] == at:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((at, end))
    return runs


def content(folder: DiskFolder, point: Point, *, check: bool = True) -> bytes:
    """What a point restores to."""
    points = lineage(folder.manifest, point)
    images = [Image(folder.file(below)) for below in points]
    try:
        layers = Layers(images, check=check)
        disk = bytearray(layers.size)
        for offset, length, data in layers.pieces():
            disk[offset : offset + length] = bytes(length) if data is None else data
        if check:
            check_hashes(folder, tuple(points), layers.hashes())
        assert not any(disk[point.size :])
        return bytes(disk[: point.size])
    finally:
        for image in images:
            image.close()
