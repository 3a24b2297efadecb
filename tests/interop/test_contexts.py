"""The metadata contexts of QEMU, as real programs see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import MiB, blocks, eventually, qemu_io, run, serving, started

pytestmark = pytest.mark.interop("nbdinfo", "qemu-nbd", "qemu-io")

Program = Callable[[str], str]
DEPTH = "qemu:allocation-depth"
SIZE = 6 * MiB


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    """Data, 2 MiB of hole, data."""
    path = short_tmp / "vda.raw"
    with path.open("wb") as file:
        file.write(blocks(2 * MiB, 4096))
        file.seek(4 * MiB)
        file.write(blocks(2 * MiB, 4096))
    return path


def depths(program: Program, uri: str, context: str = DEPTH) -> list[tuple[int, int, int]]:
    done = run(program("nbdinfo"), f"--map={context}", "--json", uri)
    return [(each["offset"], each["length"], each["type"]) for each in json.loads(done.stdout)]


async def test_allocation_depth_is_that_of_qemu_nbd(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    theirs = short_tmp / "theirs"
    options = ("--read-only", "--allocation-depth", "--format=raw", "--export-name=vda")
    with started(program("qemu-nbd"), *options, f"--socket={theirs}", disk):
        await eventually(theirs.exists)
        expected = depths(program, f"nbd+unix:///vda?socket={theirs}")
    with serving(short_tmp, disk) as daemon:
        assert depths(program, daemon.uri("vda")) == expected
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        before = depths(program, daemon.uri("vda@one"))
        assert sum(length for _, length, _ in before) == SIZE
        qemu_io(program, daemon.uri("vda"), "write -P 7 1M 2M")
        after = depths(program, daemon.uri("vda@one"))
        assert sum(length for _, length, _ in after) == SIZE


def test_contexts_are_found_by_their_wildcards(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    with serving(short_tmp, disk) as daemon:
        uri = daemon.uri("vda")
        found = json.loads(run(program("nbdinfo"), "--json", uri).stdout)["exports"][0]
        assert found["contexts"] == ["base:allocation", DEPTH]
        for unknown in ("qemu:", "qemu:dirty-bitmap:none", "qemu:allocation"):
            done = run(program("nbdinfo"), f"--map={unknown}", uri, code=1)
            assert "metadata" in done.stderr or "context" in done.stderr
