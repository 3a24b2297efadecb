"""The compose demo: what it proves, and that it fails when there is nothing to prove."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.containers.conftest import ROOT, Podman

DEMO = ROOT / "examples" / "compose"


def load_records() -> ModuleType:
    spec = importlib.util.spec_from_file_location("records", DEMO / "records.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


records = load_records()


def disk_after(highest: int, path: Path) -> Path:
    """The disk after so many records."""
    with path.open("wb") as file:
        file.truncate(records.SLOTS * records.RECORD)
        for index, number in records.expected(highest).items():
            file.seek(index * records.RECORD)
            file.write(records.record(number))
    return path


def put(path: Path, number: int) -> None:
    with path.open("r+b") as file:
        file.seek(records.slot(number) * records.RECORD)
        file.write(records.record(number))


@pytest.mark.parametrize("highest", [0, 1, 3000, 16384, 20000])
def test_a_copy_of_one_instant_is_known(tmp_path: Path, highest: int) -> None:
    assert records.instant_of(disk_after(highest, tmp_path / "copy")) == highest


def test_the_slots_of_a_round_are_all_different() -> None:
    assert len({records.slot(number) for number in range(records.SLOTS)}) == records.SLOTS


def test_a_copy_of_no_instant_is_known(tmp_path: Path) -> None:
    path = disk_after(3000, tmp_path / "copy")
    put(path, 3002)  # and not 3001
    with pytest.raises(records.TornError, match="1 of 16384 slots"):
        records.instant_of(path)
    put(path, 3001)
    assert records.instant_of(path) == 3002
    with path.open("r+b") as file:
        file.seek(records.slot(7) * records.RECORD + 100)
        file.write(b"?")
    with pytest.raises(records.TornError, match="no whole record"):
        records.instant_of(path)


def test_another_instant_than_the_one_asked_for_is_no_proof(tmp_path: Path) -> None:
    path = disk_after(100, tmp_path / "copy")
    assert records.verify(path, 90, 100) == 0
    assert records.verify(path, 99, 99) == 0  # written, and not yet acknowledged
    assert records.verify(path, 101, 110) == 1
    assert records.verify(path, 1, 98) == 1


@pytest.mark.slow
@pytest.mark.deadline(1200)
@pytest.mark.interop("podman", "podman-compose")
def test_the_demo_proves_what_it_says(podman: Podman, program: Callable[[str], str]) -> None:
    environment = {
        **podman.environment,
        "ENGINE": program("podman"),
        "COMPOSE": program("podman-compose"),
        "BUILD": " ".join(podman.build_options),
    }
    done = subprocess.run(
        ["sh", DEMO / "demo.sh"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for words in (
        "PROVED: the policy keeps the backup from the live disk",
        "PROVED: without TLS nobody opens anything",
        "by nbdcopy: PROVED: exactly the disk after record",
        "by qemu-img: PROVED: exactly the disk after record",
        "ALL PROVED: 3 backups of a disk in use",
    ):
        assert words in done.stdout
    assert "FAILED" not in done.stdout


def test_the_scripts_are_shell() -> None:
    for path in sorted(DEMO.glob("*.sh")):
        subprocess.run(["sh", "-n", path], check=True)
