"""Give up old points: the files of those that go become part of the next one that stays.

Each merge writes one new file beside the old ones and goes through the steps of `folder`, so that
every point which stays can be restored at every moment. The sources are checked while they are
read: what is damaged is not merged, and stays where it is.

Everything here blocks.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbdfleece.backup import chain
from nbdfleece.backup.errors import BackupError, Damaged
from nbdfleece.backup.files import Files, allow_open
from nbdfleece.backup.image import Image
from nbdfleece.backup.layers import Layers
from nbdfleece.backup.manifest import Change
from nbdfleece.backup.writing import NewImage, Prepared, prepare, zeroes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbdfleece.backup.chain import Merge
    from nbdfleece.backup.folder import DiskFolder
    from nbdfleece.backup.layers import Piece
    from nbdfleece.backup.manifest import Point
    from nbdfleece.backup.retention import Retention


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was, or would be, done to one disk's backups: names of points."""

    disk: str
    kept: list[str]
    removed: list[str]


def plan(folder: DiskFolder, retention: Retention) -> Pruned:
    """Return what `prune` would do; changes nothing."""
    points = folder.manifest.points
    keep = retention.kept(points)
    return Pruned(
        folder.manifest.disk,
        [point.name for point in points if point.name in keep],
        [point.name for point in points if point.name not in keep],
    )


def prune(
    folder: DiskFolder,
    retention: Retention,
    *,
    files: Files | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Pruned:
    """Keep the points that a rule keeps, give up the others.

    Args:
        folder: Opened for change.
        retention: The rule.
        files: How files are changed.
        tell: Told in a sentence what is about to be done.

    Raises:
        Damaged: A file is; nothing of it has been given up.
        BackupError: It failed. Every point that stays can be restored; another call goes on.
    """
    found = plan(folder, retention)
    keep = set(found.kept)
    # A file that nothing kept stands upon: the newest first, so that no chain is broken.
    for name in chain.useless(folder.manifest, keep):
        tell(f"removing {name}")
        folder.forget([name])
    while (merge := chain.next_merge(folder.manifest, keep)) is not None:
        first, last = merge.parts[0].name, merge.parts[-1].name
        tell(f"merging {len(merge.parts)} files, {first} to {last}")
        _merge(folder, merge, files or Files())
    return found


def _merge(folder: DiskFolder, merge: Merge, files: Files) -> None:
    stays = merge.parts[-1]
    result = replace(
        stays,
        kind=merge.kind,
        parent=merge.parent,
        reason=merge.parts[0].reason,
        compressed=any(point.compressed for point in merge.parts),
    )
    path = folder.partial(result)
    backing = None
    if merge.parent is not None:
        below = folder.manifest.point(merge.parent)
        assert below is not None, "the manifest has been checked"
        backing = below.file
    try:
        fd = files.create(path)
    except OSError as error:
        raise BackupError(f"create '{path}': {error.strerror}") from error
    try:
        sha256, file_bytes = _write(folder, merge, fd, backing, compress=result.compressed)
        result = replace(result, sha256=sha256, file_bytes=file_bytes)
        change = Change(result, tuple(point.name for point in merge.parts[:-1]))
        folder.finish(change, fd)
    except OSError as error:
        raise BackupError(f"write '{path}': {error.strerror}") from error
    finally:
        os.close(fd)


def _write(
    folder: DiskFolder, merge: Merge, fd: int, backing: str | None, *, compress: bool
) -> tuple[str, int]:
    allow_open(len(merge.parts))
    with contextlib.ExitStack() as stack:
        images = [stack.enter_context(Image(folder.file(point))) for point in merge.parts]
        layers = Layers(images, check=True)
        new = NewImage(fd, layers.size, backing)
        for piece in layers.pieces():
            new.put(_prepared(piece, compress=compress))
        check_hashes(folder, merge.parts, layers.hashes())
        return new.finish()


def _prepared(piece: Piece, *, compress: bool) -> Iterator[Prepared]:
    if piece.data is None:
        yield zeroes(piece.offset, piece.length)
    else:
        yield from prepare(piece.offset, bytearray(piece.data), 0, piece.length, compress=compress)


def check_hashes(folder: DiskFolder, points: tuple[Point, ...], hashes: list[str]) -> None:
    """Check that files held what the manifest says.

    Raises:
        Damaged: One did not.
    """
    for point, found in zip(points, hashes, strict=True):
        if found != point.sha256:
            raise Damaged(
                f"'{folder.file(point)}' is damaged: its contents are not those that were written"
            )
