"""Whether backups are whole: the files of each point, and on request all they contain.

Everything here blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdfleece.backup import chain
from nbdfleece.backup.content import image_size
from nbdfleece.backup.errors import BackupError, Damaged
from nbdfleece.backup.image import Image
from nbdfleece.backup.layers import Layers
from nbdfleece.backup.prune import check_hashes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.backup.folder import DiskFolder
    from nbdfleece.backup.manifest import Point


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one point.

    Attributes:
        disk: Name of the disk.
        point: It.
        fault: Why it cannot be restored, or None.
    """

    disk: str
    point: Point
    fault: str | None


def verify(
    folder: DiskFolder, *, data: bool, tell: Callable[[int], None] = lambda _: None
) -> list[Verdict]:
    """Look at every point, the oldest first.

    Args:
        folder: Opened for reading.
        data: Also read and hash all that the files contain.
        tell: Told of bytes that were read and found good.
    """
    faults: dict[str, str | None] = {}
    verdicts: list[Verdict] = []
    for point in folder.manifest.points:
        faults[point.name] = _fault(folder, point, data=data, tell=tell)
        bad = next(
            (
                fault if below is point else f"{below.name}, on which it stands: {fault}"
                for below in chain.lineage(folder.manifest, point)
                if (fault := faults[below.name]) is not None
            ),
            None,
        )
        verdicts.append(Verdict(folder.manifest.disk, point, bad))
    return verdicts


def verify_files(folder: DiskFolder, points: list[Point]) -> str | None:
    """Return what is wrong with the files of some points, without reading all of them, or None."""
    for point in points:
        fault = _fault(folder, point, data=False, tell=lambda _: None)
        if fault is not None:
            return fault
    return None


def _fault(
    folder: DiskFolder, point: Point, *, data: bool, tell: Callable[[int], None]
) -> str | None:
    """Return what is wrong with a point's own file, or None."""
    path = folder.file(point)
    try:
        if not path.exists():
            return f"'{path}' is missing"
        with Image(path) as image:
            check_image(folder, point, image)
            if data:
                layers = Layers([image], check=True)
                for piece in layers.pieces():
                    tell(piece.length if piece.data is not None else 0)
                check_hashes(folder, (point,), layers.hashes())
    except BackupError as error:
        return str(error)
    except OSError as error:
        return f"'{path}': {error.strerror}"
    return None


def check_image(folder: DiskFolder, point: Point, image: Image) -> None:
    """Check what a file says of itself against the manifest.

    Raises:
        Damaged: It says something else.
    """
    below = None if point.parent is None else folder.manifest.point(point.parent)
    wanted = None if below is None else below.file
    if image.size != image_size(point.size):
        raise Damaged(f"'{image.path}' is of a disk of {image.size} bytes, not {point.size}")
    if image.file_bytes != point.file_bytes:
        raise Damaged(f"'{image.path}' has {image.file_bytes} bytes, not {point.file_bytes}")
    if image.backing_name != wanted and not is_renamed(image.backing_name, wanted):
        raise Damaged(f"'{image.path}' stands on {image.backing_name}, not on {wanted}")


def is_renamed(found: str | None, wanted: str | None) -> bool:
    """Tell whether two names are those of one point before and after a merge made it full.

    Between two steps of a merge a child still says the old one (backup.folder, step 5).
    """
    if found is None or wanted is None:
        return False
    return found.replace(".inc.", ".full.") == wanted
