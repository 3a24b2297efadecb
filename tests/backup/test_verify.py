import random
from pathlib import Path

import pytest

from nbdfleece.backup.folder import DiskFolder
from nbdfleece.backup.verify import verify
from tests.support.backups import CLUSTER, add_point, changed, some_disk


@pytest.fixture
def path(tmp_path: Path, rng: random.Random) -> Path:
    """A chain of three points, and a full one behind it."""
    disk = b"\1" * CLUSTER + some_disk(rng, 9 * CLUSTER)
    with DiskFolder(tmp_path / "vda", for_change=True) as folder:
        add_point(folder, disk)
        for _ in range(2):
            before, disk = disk, changed(rng, disk)
            add_point(folder, disk, before=before)
        add_point(folder, disk)
    return tmp_path / "vda"


def faults(path: Path, *, data: bool) -> list[str | None]:
    with DiskFolder(path, for_change=False) as folder:
        return [verdict.fault for verdict in verify(folder, data=data)]


def file(path: Path, number: int) -> Path:
    with DiskFolder(path, for_change=False) as folder:
        return folder.file(folder.manifest.points[number])


@pytest.mark.parametrize("data", [False, True])
def test_what_is_whole_has_no_fault(path: Path, data: bool) -> None:
    assert faults(path, data=data) == [None] * 4


def test_a_missing_file_costs_all_points_above_it(path: Path) -> None:
    file(path, 1).unlink()

    found = faults(path, data=False)

    assert found[0] is None
    assert found[3] is None
    assert found[1] is not None
    assert found[1].endswith("is missing")
    assert found[2] is not None
    assert "on which it stands" in found[2]


def test_a_file_that_was_cut_is_found_at_once(path: Path) -> None:
    data = file(path, 3).read_bytes()
    file(path, 3).write_bytes(data[: len(data) - CLUSTER])

    assert faults(path, data=False)[3] is not None


def test_another_file_under_the_name_is_found_at_once(path: Path) -> None:
    file(path, 2).write_bytes(file(path, 1).read_bytes())

    assert faults(path, data=False)[2] is not None


def test_a_flipped_bit_is_found_with_data_only(path: Path) -> None:
    bad = bytearray(file(path, 0).read_bytes())
    bad[CLUSTER + 1] ^= 4
    file(path, 0).write_bytes(bad)

    assert faults(path, data=False) == [None] * 4
    found = faults(path, data=True)
    assert [fault is not None for fault in found] == [True, True, True, False]
