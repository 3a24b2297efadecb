import random
from pathlib import Path

import pytest

from nbdfleece.backup.errors import NoBackup
from nbdfleece.backup.folder import DiskFolder
from nbdfleece.backup.listing import list_points
from tests.support.backups import CLUSTER, add_point, some_disk


def test_points_of_all_disks_or_of_one(tmp_path: Path, rng: random.Random) -> None:
    disk = some_disk(rng, 2 * CLUSTER)
    for name in ("vda", "vdb"):
        with DiskFolder(tmp_path / name, for_change=True) as folder:
            add_point(folder, disk)
            add_point(folder, disk, before=disk)
    lost = next((tmp_path / "vdb").glob("*.full.qcow2"))
    lost.unlink()

    found = list_points(tmp_path)

    assert [(one.disk, one.point.kind.value, one.is_whole) for one in found] == [
        ("vda", "full", True),
        ("vda", "inc", True),
        ("vdb", "full", False),
        ("vdb", "inc", False),
    ]
    assert list_points(tmp_path / "vdb") == found[2:]


def test_no_backup_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoBackup):
        list_points(tmp_path)
