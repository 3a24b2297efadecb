"""Why a backup is a full one, or what its increment stands upon."""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nbdfleece.backup.folder import DiskFolder
from nbdfleece.block.bitmap import freeze, new_bitmap
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.fleece.backup_plan import Base, choose_base, damage_of
from tests.support.backups import add_point, some_disk

SIZE = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, rng: random.Random) -> Iterator[DiskFolder]:
    with DiskFolder(tmp_path / "vda", for_change=True) as found:
        add_point(found, some_disk(rng, SIZE), bitmap="backup-1-2")
        yield found


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    graph = Graph()
    driver = NullDriver(size=SIZE, latency_ns=0, read_zeroes=True)
    found = await graph.add(None, driver, read_only=False, discard_enabled=True)
    found.bitmaps["backup-1-2"] = new_bitmap(found, "backup-1-2", None, enabled=True)
    yield found
    found.bitmaps.clear()
    await graph.remove(found)


def chosen(folder: DiskFolder, node: Node, *, size: int = SIZE, full: bool = False) -> Base | str:
    return choose_base(folder, node, size, damage=damage_of(folder), full=full)


async def test_an_increment_holds_what_the_bitmap_of_the_last_point_says(
    folder: DiskFolder, node: Node
) -> None:
    bitmap = node.bitmaps["backup-1-2"]
    bitmap.set(65536, 1)

    base = chosen(folder, node)

    assert isinstance(base, Base)
    assert base.point is folder.manifest.newest
    bitmap.set(0, 1)  # of later writes it knows nothing
    assert list(base.dirty.dirty_ranges()) == [(65536, 65536)]


async def test_why_a_backup_is_a_full_one(folder: DiskFolder, node: Node, tmp_path: Path) -> None:
    bitmap = node.bitmaps["backup-1-2"]
    with DiskFolder(tmp_path / "vdb", for_change=True) as empty:
        assert chosen(empty, node) == "it is the first backup"
    assert chosen(folder, node, full=True) == "it was asked for"
    assert chosen(folder, node, size=2 * SIZE) == "the disk was resized from 1 MiB to 2 MiB"

    freeze(node.bitmaps, bitmap)
    assert "is in use" in str(chosen(folder, node))
    bitmap.inconsistent, bitmap.reason = True, "the disk has changed"
    assert str(chosen(folder, node)).endswith("cannot be trusted: the disk has changed")
    node.bitmaps.clear()
    assert "has no bitmap 'backup-1-2'" in str(chosen(folder, node))


async def test_a_damaged_chain_is_not_built_upon(folder: DiskFolder, node: Node) -> None:
    newest = folder.manifest.newest
    assert newest is not None
    folder.file(newest).unlink()

    assert str(chosen(folder, node)).endswith("is missing")


async def test_a_point_without_bitmap_is_not_built_upon(
    folder: DiskFolder, node: Node, rng: random.Random
) -> None:
    add_point(folder, some_disk(rng, SIZE))

    assert "left no bitmap" in str(chosen(folder, node))
