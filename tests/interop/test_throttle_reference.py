"""Throttle groups and filters: the same requests to qemu-storage-daemon and to ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.storage_daemon import StorageDaemon


def add(group: str, **props: object) -> tuple[str, dict[str, Any]]:
    given = {name.replace("_", "-"): value for name, value in props.items()}
    return "object-add", {"qom-type": "throttle-group", "id": group, **given}


def limited(group: str, **limits: object) -> tuple[str, dict[str, Any]]:
    return add(group, limits={name.replace("_", "-"): value for name, value in limits.items()})


def throttle(**options: object) -> dict[str, object]:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    return {"driver": "throttle", "node-name": "t0", **given}


STEPS: list[tuple[str, dict[str, Any]]] = [
    add("g0"),
    limited("g1", bps_total=1000),
    limited("e", bps_total=1, bps_read=1),
    limited("e", iops_total=1, iops_write=1),
    limited("e", bps_total_max=10),
    limited("e", bps_total=10, bps_total_max=5),
    limited("e", bps_total=10, bps_total_max_length=0),
    limited("e", bps_total=10, bps_total_max_length=2),
    limited("e", bps_total=10, bps_total_max_length=-1),
    limited("e", bps_total=-1),
    limited("e", bps_total=10**15 + 1),
    limited("e", bps_total=10, bps_total_max=20, bps_total_max_length=-1),
    limited("e", bps_total=10, bps_total_max=20, bps_total_max_length=1 << 33),
    limited("e", iops_size=100),
    limited("e", bogus=1),
    limited("e", bps_total="x"),
    limited("e", bps_total=10, bps_total_max=10**15, bps_total_max_length=10),
    limited("e", bps_total=10**14, bps_total_max=10**14, bps_total_max_length=11),
    limited("e", bps_total_max=10, bps_read_max=10, bps_total=5),
    limited("e", bps_total=5, bps_read_max=10),
    limited("e1", bps_total=10**15),
    limited("e2", iops_size=100, iops_total=5),
    limited("e3", bps_total=10**14, bps_total_max=10**14, bps_total_max_length=10),
    add("x1", x_bps_total=100),
    add("e", x_bps_total=-5),
    add("e", x_bps_total_max=5),
    add("e", x_bps_total=5, x_bps_total_max_length=0),
    add("e", x_bps_total="a"),
    add("e", x_iops_size=-1),
    add("e", x_zz=1),
    add("e", limits=5),
    add("g1"),
    add("x7", limits={"bps-total": 5}, x_iops_total=5),
    ("blockdev-add", {"driver": "null-co", "node-name": "n0", "size": 1 << 20}),
    ("blockdev-add", throttle(file="n0")),
    ("blockdev-add", throttle(file="n0", throttle_group="nope")),
    ("blockdev-add", throttle(throttle_group="g1")),
    ("blockdev-add", throttle(file="n0", throttle_group="g1")),
    ("object-del", {"id": "g1"}),
    ("object-del", {"id": "g0"}),
    ("object-del", {"id": "nope"}),
    ("blockdev-reopen", {"options": [throttle(file="n0", throttle_group="nope")]}),
    ("blockdev-reopen", {"options": [throttle(file="n0", throttle_group="g0")]}),
    ("blockdev-reopen", {"options": [throttle(file="n0", throttle_group="x1")]}),
    ("object-del", {"id": "x1"}),
    ("object-del", {"id": "g1"}),
    ("query-blockstats", {"query-nodes": True}),
    ("blockdev-del", {"node-name": "t0"}),
    ("object-del", {"id": "x1"}),
]


def answers(folder: Path, *program: str) -> list[dict[str, Any]]:
    folder.mkdir()
    with StorageDaemon(folder, program=program) as daemon:
        return [daemon.answer(command, arguments) for command, arguments in STEPS]


def plain(value: Any) -> Any:
    """Without order among nodes, which differs."""
    if isinstance(value, list):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in sorted(value.items())}
    return value


@pytest.mark.interop("qemu-storage-daemon")
def test_every_answer_is_that_of_the_reference(
    short_tmp: Path, program: Callable[[str], str]
) -> None:
    reference = answers(short_tmp / "qemu", program("qemu-storage-daemon"))
    ours = answers(short_tmp / "ours")

    for step, theirs, mine in zip(STEPS, reference, ours, strict=True):
        assert (step, plain(mine)) == (step, plain(theirs))
