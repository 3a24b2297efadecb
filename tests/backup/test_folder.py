"""The crash rules: stop before each step of a change, look, and go on."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.backup.errors import BackupError, Damaged, FolderBusy, NoBackup
from nbdfleece.backup.files import Files
from nbdfleece.backup.folder import DiskFolder, disks
from nbdfleece.backup.names import MANIFEST, PARTIAL
from nbdfleece.backup.prune import prune
from nbdfleece.backup.retention import Retention
from tests.support.backups import (
    CLUSTER,
    FailingFiles,
    PowerFailureError,
    add_point,
    changed,
    content,
    some_disk,
)

SIZE = 3 * CLUSTER + 100


def everything(path: Path) -> list[bytes]:
    """The content of each point, checked, as somebody who may only read sees it."""
    with DiskFolder(path, for_change=False) as folder:
        return [content(folder, point) for point in folder.manifest.points]


def crashes(path: Path) -> Iterator[FailingFiles]:
    """Steps to fail at, until none fails."""
    for steps in range(100):
        files = FailingFiles(steps)
        yield files
        if files.left:
            return
    raise AssertionError("there is no end")


def test_a_crash_at_any_step_leaves_what_was_there(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "vda"
    states = [some_disk(rng, SIZE)]
    with DiskFolder(path, for_change=True) as folder:
        add_point(folder, states[0])
    crashed = 0
    tried: list[bytes] = []

    for files in crashes(path):
        new = changed(rng, states[-1])
        tried.append(new)
        try:
            with DiskFolder(path, for_change=True, files=files) as folder:
                recovered = [content(folder, point) for point in folder.manifest.points]
                assert recovered[: len(states)] == states
                states = recovered
                add_point(folder, new, before=recovered[-1], files=files)
            states.append(new)
        except PowerFailureError:
            crashed += 1
            seen = everything(path)
            assert seen[: len(states)] == states
            # What was complete when it was interrupted may be finished by a later run.
            assert all(state in tried[-2:] for state in seen[len(states) :])
            states = seen

    assert crashed > 5
    assert everything(path) == states
    with DiskFolder(path, for_change=True) as folder:
        assert folder.strangers() == []
        assert not [name for name in path.iterdir() if name.name.endswith(PARTIAL)]


def test_the_names_of_new_folders_are_made_stable(tmp_path: Path, rng: random.Random) -> None:
    """A backup that is reported as done must not vanish with its folder in a power failure."""
    synced: list[Path] = []

    class Noting(Files):
        def sync_folder(self, path: Path) -> None:
            synced.append(path)
            super().sync_folder(path)

    path = tmp_path / "backups" / "vda"
    with DiskFolder(path, for_change=True, files=Noting()):
        assert synced == [tmp_path, tmp_path / "backups"]
    with DiskFolder(path, for_change=True, files=Noting()):
        assert len(synced) == 2


def test_an_unfinished_file_is_removed_by_the_next_run(tmp_path: Path, rng: random.Random) -> None:
    with DiskFolder(tmp_path / "vda", for_change=True) as folder:
        add_point(folder, some_disk(rng, SIZE))
    rest = tmp_path / "vda" / ("20270101T000000Z.inc.qcow2" + PARTIAL)
    rest.write_bytes(b"half")

    assert len(everything(tmp_path / "vda")) == 1
    assert rest.exists()  # reading changes nothing
    DiskFolder(tmp_path / "vda", for_change=True).close()
    assert not rest.exists()


def test_a_finished_file_of_strangers_is_named_and_never_touched(
    tmp_path: Path, rng: random.Random
) -> None:
    with DiskFolder(tmp_path / "vda", for_change=True) as folder:
        add_point(folder, some_disk(rng, SIZE))
    stranger = tmp_path / "vda" / "20270101T000000Z.full.qcow2"
    stranger.write_bytes(b"mine")

    with DiskFolder(tmp_path / "vda", for_change=True) as folder:
        assert folder.strangers() == [stranger.name]
        folder.forget([folder.manifest.points[0].name])
    assert stranger.read_bytes() == b"mine"


def test_two_cannot_change_a_folder_and_many_can_read_it(
    tmp_path: Path, rng: random.Random
) -> None:
    path = tmp_path / "vda"
    with DiskFolder(path, for_change=True) as folder:
        add_point(folder, some_disk(rng, SIZE))
        with pytest.raises(FolderBusy, match="in use"):
            DiskFolder(path, for_change=True)
        with pytest.raises(FolderBusy, match="in use"):
            DiskFolder(path, for_change=False)
    with (
        DiskFolder(path, for_change=False),
        DiskFolder(path, for_change=False),
        pytest.raises(FolderBusy, match="in use"),
    ):
        DiskFolder(path, for_change=True)


def test_a_copy_without_lock_file_can_be_read(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "vda"
    with DiskFolder(path, for_change=True) as folder:
        add_point(folder, some_disk(rng, SIZE))
    (path / ".lock").unlink()

    assert len(everything(path)) == 1


def test_a_folder_without_backup_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoBackup, match="there is no backup in"):
        DiskFolder(tmp_path, for_change=False)
    with pytest.raises(NoBackup, match="there is no backup in"):
        disks(tmp_path)
    with pytest.raises(NoBackup, match="No such file"):
        disks(tmp_path / "nowhere")


def test_a_manifest_of_the_future_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vda"
    path.mkdir()
    (path / MANIFEST).write_text(json.dumps({"version": 99}))

    with pytest.raises(Damaged, match="another nbdfleece"):
        DiskFolder(path, for_change=True)


def test_a_folder_that_is_full_takes_no_further_point_and_can_be_read(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("manifest", "folder"):
        monkeypatch.setattr(f"nbdfleece.backup.{room}.MAX_BACKUP_POINTS", 2)
    path = tmp_path / "vda"
    states = [some_disk(rng, SIZE) for _ in range(3)]
    with DiskFolder(path, for_change=True) as folder:
        for state in states[:2]:
            add_point(folder, state)
        with pytest.raises(BackupError, match="prune"):
            add_point(folder, states[2])
    assert everything(path) == states[:2]
    with DiskFolder(path, for_change=True) as folder:
        assert [partial.name for partial in path.glob("*.partial")] == []
        prune(folder, Retention({"last": 1}))
        add_point(folder, states[2])
