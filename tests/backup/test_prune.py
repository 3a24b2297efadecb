"""Pruning, with the machine stopping before each step of it."""

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.backup.errors import Damaged
from nbdfleece.backup.folder import DiskFolder
from nbdfleece.backup.prune import plan, prune
from nbdfleece.backup.retention import Retention
from nbdfleece.backup.verify import verify
from tests.support.backups import (
    CLUSTER,
    FailingFiles,
    PowerFailureError,
    add_point,
    changed,
    content,
    some_disk,
)

SIZE = 20 * CLUSTER + 77


class Only(Retention):
    """Keeps the points of the given numbers, and the newest."""

    def __init__(self, *numbers: int) -> None:
        super().__init__({})
        object.__setattr__(self, "numbers", numbers)

    def kept(self, points):
        chosen = {points[number].name for number in self.numbers if number < len(points)}
        return chosen | {points[-1].name}


def make(path: Path, rng: random.Random, *kinds: str, compress: bool = False) -> dict[str, bytes]:
    """A folder with such files (`full` or `inc`); the content of each point by name."""
    states: dict[str, bytes] = {}
    disk = some_disk(rng, SIZE)
    with DiskFolder(path, for_change=True) as folder:
        for kind in kinds:
            before = disk if kind == "inc" else None
            disk = changed(rng, disk)
            point = add_point(folder, disk, before=before, compress=compress)
            states[point.name] = disk
    return states


def check(path: Path, states: dict[str, bytes], *, at_least: set[str] | None = None) -> None:
    with DiskFolder(path, for_change=False) as folder:
        names = {point.name for point in folder.manifest.points}
        assert names >= (at_least or set(states))
        for point in folder.manifest.points:
            assert content(folder, point) == states[point.name]
        assert [found.fault for found in verify(folder, data=True)] == [None] * len(names)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_the_oldest_points_go_and_the_others_stay_as_they_are(
    tmp_path: Path, rng: random.Random, compress: bool
) -> None:
    path = tmp_path / "vda"
    states = make(path, rng, "full", "inc", "inc", "inc", "inc", compress=compress)

    with DiskFolder(path, for_change=True) as folder:
        found = prune(folder, Retention({"last": 2}))
        files = folder.present()

    assert found.kept == list(states)[3:]
    assert files == {f"{found.kept[0]}.full.qcow2", f"{found.kept[1]}.inc.qcow2"}
    check(path, {name: states[name] for name in found.kept})


def test_points_in_the_middle_go_too(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "vda"
    states = make(path, rng, "full", "inc", "inc", "inc", "full", "inc", "inc")
    names = list(states)

    with DiskFolder(path, for_change=True) as folder:
        prune(folder, Only(0, 3, 5))

    check(path, {names[number]: states[names[number]] for number in (0, 3, 5, 6)})


def test_a_plan_changes_nothing(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "vda"
    states = make(path, rng, "full", "inc", "inc")

    with DiskFolder(path, for_change=False) as folder:
        found = plan(folder, Retention({"last": 1}))

    assert found.removed == list(states)[:2]
    check(path, states)


def test_a_damaged_file_behind_a_merge_does_not_shut_the_folder(
    tmp_path: Path, rng: random.Random
) -> None:
    """It cannot learn the new name of what it stands on, which other points do not need."""
    path = tmp_path / "vda"
    states = make(path, rng, "full", "inc", "inc", "full")
    names = list(states)
    damaged = path / f"{names[2]}.inc.qcow2"
    good = damaged.read_bytes()
    damaged.write_bytes(b"RAW" + good[3:])
    with DiskFolder(path, for_change=True) as folder:
        prune(folder, Only(1, 2))
        add_point(folder, states[names[3]])
    with DiskFolder(path, for_change=True) as folder:
        found = verify(folder, data=True)
        assert [one.fault is None for one in found] == [True, False, True, True]
        assert f"{names[1]}.inc.qcow2" in folder.manifest.garbage
    damaged.write_bytes(good)
    with DiskFolder(path, for_change=True) as folder:
        assert not folder.manifest.garbage
        assert [one.fault for one in verify(folder, data=True)] == [None] * 4
        assert folder.present() == {point.file for point in folder.manifest.points}


def attempt(path: Path, keep: set[str], steps: int) -> bool:
    """Prune until so many steps are done; tell whether it came to its end."""
    files = FailingFiles(steps)
    try:
        with DiskFolder(path, for_change=True, files=files) as folder:
            names = [point.name for point in folder.manifest.points]
            prune(folder, Only(*(names.index(name) for name in keep)), files=files)
    except PowerFailureError:
        return False
    return True


@pytest.mark.slow
def test_a_crash_at_any_step_leaves_every_point_that_stays(
    tmp_path: Path, rng: random.Random
) -> None:
    states = make(tmp_path / "good", rng, "full", "inc", "full", "inc", "inc", "inc", "inc")
    keep = {list(states)[number] for number in (4, 6)}

    for steps in range(200):
        path = tmp_path / "vda"
        shutil.copytree(tmp_path / "good", path)
        is_done = attempt(path, keep, steps)
        check(path, states, at_least=keep)
        while not attempt(path, keep, rng.randrange(30)):  # what finishes is interrupted, too
            check(path, states, at_least=keep)
        check(path, {name: states[name] for name in keep})
        with DiskFolder(path, for_change=False) as folder:
            assert folder.strangers() == []
            assert folder.present() == {point.file for point in folder.manifest.points}
        shutil.rmtree(path)
        if is_done:
            break

    assert steps > 50


@pytest.mark.interop("qemu-img")
def test_qemu_img_chains_the_files_at_every_step(
    tmp_path: Path, rng: random.Random, program: Callable[[str], str]
) -> None:
    path = tmp_path / "vda"
    states = make(path, rng, "full", "inc", "inc", "inc")
    last = list(states)[-1]
    raw = tmp_path / "raw"
    raw.write_bytes(states[last] + bytes(-SIZE % 512))

    for steps in range(100):
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        is_done = attempt(copy, set(list(states)[2:]), steps)
        command = [program("qemu-img"), "compare", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*command, copy / f"{last}.inc.qcow2", raw], check=True)
        shutil.rmtree(copy)
        if is_done:
            break
    assert steps > 15


def test_what_is_damaged_is_not_merged(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "vda"
    states = make(path, rng, "full", "inc", "inc")
    with DiskFolder(path, for_change=False) as folder:
        file = folder.file(folder.manifest.points[1])
    data = bytearray(file.read_bytes())
    data[CLUSTER + 10] ^= 1  # of the first cluster of data
    file.write_bytes(data)

    with (
        DiskFolder(path, for_change=True) as folder,
        pytest.raises(Damaged, match="not those that were written"),
    ):
        prune(folder, Retention({"last": 1}))

    with DiskFolder(path, for_change=False) as folder:
        assert [point.name for point in folder.manifest.points] == list(states)
        assert content(folder, folder.manifest.points[0]) == states[next(iter(states))]
