"""Snapshots inside a disk's image, at a real daemon: made, read, kept over a restart, deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon
from tests.support.live import MiB, blocks, serving
from tests.support.qcow2_history import run

pytestmark = pytest.mark.interop("qemu-img", "qemu-io")

Program = Callable[[str], str]
SIZE = 4 * MiB


@pytest.fixture
def disk(short_tmp: Path, program: Program) -> Path:
    raw, path = short_tmp / "vda.raw", short_tmp / "vda.qcow2"
    raw.write_bytes(blocks(SIZE, 4096))
    run(program("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def overwrite(daemon: Daemon, program: Program) -> None:
    run(program("qemu-io"), "-f", "raw", "-c", f"write -P 0xee 0 {SIZE}", daemon.uri("vda"))


def is_raw(daemon: Daemon, program: Program, export: str, raw: Path) -> None:
    run(program("qemu-img"), "compare", "-f", "raw", "-F", "raw", daemon.uri(export), raw)


def names(daemon: Daemon) -> list[str]:
    found = daemon.run("snapshot", "list", "--json")
    assert found.code == 0, found.err
    return [row["snapshot"] for row in json.loads(found.out)]


def test_an_internal_snapshot_is_exported_and_outlives_the_daemon(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    raw = short_tmp / "vda.raw"
    argument = f"vda={disk},format=qcow2"
    with serving(short_tmp, argument) as daemon:
        made = daemon.run("snapshot", "create", "vda", "--name", "one", "--internal")
        assert made.code == 0, made.err
        assert made.out.startswith("vda@one ")
        overwrite(daemon, program)
        is_raw(daemon, program, "vda@one", raw)
        assert daemon.run("map", "vda@one").code == 0
        assert daemon.run("snapshot", "create", "vda", "--name", "one", "--internal").code != 0
        shown = json.loads(daemon.run("snapshot", "show", "vda@one", "--json").out)
        assert (shown["size"], shown["state"], shown["durability"]) == (SIZE, "ok", "power")
    assert "one" in run(program("qemu-img"), "snapshot", "-l", disk)
    with serving(short_tmp, argument) as daemon:
        assert names(daemon) == ["one"]
        is_raw(daemon, program, "vda@one", raw)
        assert daemon.run("snapshot", "delete", "vda@one").code == 0
        assert names(daemon) == []
    assert "one" not in run(program("qemu-img"), "snapshot", "-l", disk)
    run(program("qemu-img"), "check", disk)


def test_a_raw_disk_has_no_internal_snapshots(short_tmp: Path, disk: Path) -> None:
    disks = (f"vda={short_tmp}/vda.raw", f"vdb={disk},format=qcow2")
    with serving(short_tmp, *disks, disks=2) as daemon:
        for disks in (["vda"], ["vdb", "vda"]):
            refused = daemon.run("snapshot", "create", *disks, "--name", "x", "--internal")
            assert refused.code != 0
            assert "does not support internal snapshots" in refused.err
        assert names(daemon) == []
        both = ["snapshot", "create", "vdb", "--internal", "--temp-limit", "1M"]
        assert "means nothing" in daemon.run(*both).err
