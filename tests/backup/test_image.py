import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.backup.errors import BackupError, Damaged
from nbdfleece.backup.files import Files
from nbdfleece.backup.folder import DiskFolder
from nbdfleece.backup.image import Image, backing_name, set_backing_name
from tests.support.backups import (
    CLUSTER,
    FailingFiles,
    PowerFailureError,
    add_point,
    changed,
    content,
    some_disk,
)

SIZE = 5 * 1024 * 1024 + 1234


@pytest.fixture
def folder(tmp_path: Path):
    with DiskFolder(tmp_path / "vda", for_change=True) as found:
        yield found


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_what_was_written_is_read(folder: DiskFolder, rng: random.Random, compress: bool) -> None:
    disk = some_disk(rng, SIZE)

    point = add_point(folder, disk, compress=compress)

    assert content(folder, point) == disk
    with Image(folder.file(point)) as image:
        held = sum(run.length for run in image.runs(0))
    padded = disk + bytes(-SIZE % 512)
    zero = sum(
        not any(padded[at : at + CLUSTER]) and len(padded[at : at + CLUSTER])
        for at in range(0, len(padded), CLUSTER)
    )
    assert held == SIZE + -SIZE % 512 - zero  # holes are kept


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_qemu_img_reads_and_chains_the_files(
    folder: DiskFolder, rng: random.Random, program: Callable[[str], str], compress: bool
) -> None:
    disks = [some_disk(rng, SIZE)]
    disks += [changed(rng, disks[0])]
    disks += [changed(rng, disks[1])]
    points = [add_point(folder, disks[0], compress=compress)]
    points += [add_point(folder, disks[1], before=disks[0], compress=compress)]
    points += [add_point(folder, disks[2], before=disks[1], compress=compress)]

    for point, disk in zip(points, disks, strict=True):
        raw = folder.path / "raw"
        raw.write_bytes(disk + bytes(-len(disk) % 512))
        subprocess.run([program("qemu-img"), "check", folder.file(point)], check=True)
        command = [program("qemu-img"), "compare", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*command, folder.file(point), raw], check=True)
    chain = subprocess.run(
        [program("qemu-img"), "info", "--backing-chain", folder.file(points[2])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"backing file: {points[1].file}" in chain
    assert "backing file format: qcow2" in chain
    assert str(folder.file(points[0])) in chain


def test_damage_is_found_and_never_a_traceback(folder: DiskFolder, rng: random.Random) -> None:
    point = add_point(folder, some_disk(rng, SIZE), compress=True)
    path, good = folder.file(point), folder.file(point).read_bytes()

    found = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            start = rng.choice((0, len(bad) - 3 * CLUSTER, rng.randrange(len(bad))))
            bad[min(start + rng.randrange(200), len(bad) - 1)] ^= rng.randrange(1, 256)
        if rng.random() < 0.2:
            del bad[rng.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            content(folder, point)
        except BackupError:
            found += 1
    assert found > 50


def test_a_header_alone_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"", b"QFI\xfb", os.urandom(100000)):
        path.write_bytes(data)
        with pytest.raises(Damaged, match="x' is damaged"):
            Image(path)


def test_a_backing_name_changes_as_a_whole(folder: DiskFolder, rng: random.Random) -> None:
    disk = some_disk(rng, SIZE)
    first = add_point(folder, disk)
    second = add_point(folder, changed(rng, disk), before=disk)
    path, old = folder.file(second), first.file

    for name in ("20260101T000000Z.full.qcow2", "x" * 40, "y"):
        for steps in range(10):
            try:
                set_backing_name(path, name, FailingFiles(steps))
            except PowerFailureError:
                assert backing_name(path) in (old, name)
                continue
            break
        assert backing_name(path) == name
        old = name
    set_backing_name(path, first.file, Files())
    content(folder, second)
