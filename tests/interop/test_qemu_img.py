"""qemu-img, and other QEMU tools on top of our exports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon
from tests.support.live import KiB, MiB, blocks, eventually, run, serving, started

pytestmark = pytest.mark.interop("qemu-img", "qemu-io", "qemu-nbd")

Program = Callable[[str], str]
SIZE = 8 * MiB


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    """Data, 2 MiB of hole, data."""
    path = short_tmp / "vda.raw"
    with path.open("wb") as file:
        file.write(blocks(2 * MiB, 4 * KiB))
        file.seek(4 * MiB)
        file.write(blocks(SIZE - 4 * MiB, 4 * KiB, first=99))
    return path


def take_and_overwrite(daemon: Daemon, program: Program) -> None:
    """A snapshot `one`, and then writes, zeroes and trims of the guest."""
    assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
    commands = ("write -P 0xfe 1M 2M", "write -z 4M 1M", "discard 6M 1M", "write -P 1 3000K 9K")
    options = [part for command in commands for part in ("-c", command)]
    run(program("qemu-io"), "-f", "raw", *options, daemon.uri("vda"))


@pytest.mark.parametrize("how", [(), ("-m", "16", "-W"), ("-O", "qcow2"), ("-S", "0")], ids=str)
def test_convert_from_a_snapshot(
    short_tmp: Path, disk: Path, program: Program, how: tuple[str, ...]
) -> None:
    before = short_tmp / "before.raw"
    before.write_bytes(disk.read_bytes())
    with serving(short_tmp, disk) as daemon:
        take_and_overwrite(daemon, program)
        copy = short_tmp / "copy"
        options = how if "-O" in how else (*how, "-O", "raw")
        run(program("qemu-img"), "convert", "-f", "raw", *options, daemon.uri("vda@one"), copy)
    form = "qcow2" if "qcow2" in how else "raw"
    run(program("qemu-img"), "compare", "-f", "raw", "-F", form, before, copy)


@pytest.mark.parametrize("how", [(), ("-m", "16", "-W"), ("-t", "none"), ("-S", "64k")], ids=str)
def test_convert_into_a_live_export(
    short_tmp: Path, disk: Path, program: Program, how: tuple[str, ...]
) -> None:
    source = short_tmp / "source.raw"
    content = blocks(MiB, 1000) + bytes(5 * MiB) + blocks(2 * MiB, 3000)
    source.write_bytes(content)
    before = disk.read_bytes()
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        live, one = daemon.uri("vda"), daemon.uri("vda@one")
        convert = (program("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw")
        run(*convert, *how, source, live)
        run(program("qemu-img"), "compare", "-f", "raw", "-F", "raw", source, live)
        run(*convert[:2], *convert[3:], one, short_tmp / "copy")
    assert disk.read_bytes() == content
    assert (short_tmp / "copy").read_bytes() == before


def test_compare_tells_what_differs(short_tmp: Path, disk: Path, program: Program) -> None:
    before = short_tmp / "before.raw"
    before.write_bytes(disk.read_bytes())
    compare = (program("qemu-img"), "compare", "-f", "raw", "-F", "raw")
    with serving(short_tmp, disk) as daemon:
        live, one = daemon.uri("vda"), daemon.uri("vda@one")
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        assert "identical" in run(*compare, live, one).stdout
        run(program("qemu-io"), "-f", "raw", "-c", "write -P 0xfe 5M 1", live)
        assert "mismatch at offset 5242880" in run(*compare, live, one, code=1).stdout
        assert "identical" in run(*compare, before, one).stdout


def test_info_and_measure(short_tmp: Path, disk: Path, program: Program) -> None:
    with serving(short_tmp, disk) as daemon:
        take_and_overwrite(daemon, program)
        for export in ("vda", "vda@one"):
            done = run(program("qemu-img"), "info", "--output=json", daemon.uri(export))
            facts = json.loads(done.stdout)
            assert (facts["virtual-size"], facts["format"]) == (SIZE, "raw")
            needed = run(
                *(program("qemu-img"), "measure", "-O", "qcow2", "--output=json"),
                daemon.uri(export),
            )
            assert json.loads(needed.stdout)["required"] >= 4 * MiB


def test_map_of_a_snapshot_stays(short_tmp: Path, disk: Path, program: Program) -> None:
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        before = run(program("qemu-img"), "map", "--output=json", daemon.uri("vda@one")).stdout
        expected = [(0, 2 * MiB, True), (2 * MiB, 2 * MiB, False), (4 * MiB, 4 * MiB, True)]
        assert data_map(before) == expected
        assert daemon.run("snapshot", "delete", "vda@one").code == 0
        take_and_overwrite(daemon, program)
        after = run(program("qemu-img"), "map", "--output=json", daemon.uri("vda@one")).stdout
        assert data_map(after) == expected


def data_map(text: str) -> list[tuple[int, int, bool]]:
    """Join what touches in the JSON of `qemu-img map`."""
    found: list[tuple[int, int, bool]] = []
    for each in json.loads(text):
        assert each["data"] != each["zero"]
        if found and found[-1][2] == each["data"]:
            start, length, data = found.pop()
            found.append((start, length + each["length"], data))
        else:
            found.append((each["start"], each["length"], each["data"]))
    return found


@pytest.mark.parametrize("export", ["vda", "vda@one"])
def test_bench_reads(short_tmp: Path, disk: Path, program: Program, export: str) -> None:
    with serving(short_tmp, disk) as daemon:
        take_and_overwrite(daemon, program)
        bench = (program("qemu-img"), "bench", "-f", "raw", "-c", "1000", "-d", "64", "-s", "4096")
        run(*bench, "-S", "5120", daemon.uri(export))


def test_bench_writes_with_flushes(short_tmp: Path, disk: Path, program: Program) -> None:
    before = disk.read_bytes()
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        bench = (program("qemu-img"), "bench", "-w", "--pattern=90", "-f", "raw")
        options = ("-c", "1500", "-d", "32", "-s", "4096", "--flush-interval=200")
        run(*bench, *options, daemon.uri("vda"))
        run(
            *(program("qemu-img"), "convert", "-f", "raw", "-O", "raw"),
            *(daemon.uri("vda@one"), short_tmp / "copy"),
        )
    assert (short_tmp / "copy").read_bytes() == before
    assert disk.read_bytes()[: 1500 * 4096] == b"Z" * (1500 * 4096)


# --- other servers as our clients ----------------------------------------------------------------


def test_an_overlay_over_a_snapshot(short_tmp: Path, disk: Path, program: Program) -> None:
    """A writable qcow2 whose backing image is the snapshot, over NBD."""
    before = disk.read_bytes()
    overlay = short_tmp / "overlay.qcow2"
    with serving(short_tmp, disk) as daemon:
        take_and_overwrite(daemon, program)
        backing = ("-b", daemon.uri("vda@one"), "-F", "raw")
        run(program("qemu-img"), "create", "-q", "-f", "qcow2", *backing, overlay)
        write = ("-f", "qcow2", "-c", "write -P 0xab 100000 70000")
        run(program("qemu-io"), *write, overlay)
        flat = short_tmp / "flat"
        run(program("qemu-img"), "convert", "-f", "qcow2", "-O", "raw", overlay, flat)
    assert flat.read_bytes() == before[:100000] + b"\xab" * 70000 + before[170000:]


async def test_through_a_qemu_nbd_in_between(short_tmp: Path, disk: Path, program: Program) -> None:
    before = await asyncio.to_thread(disk.read_bytes)
    relay = short_tmp / "relay.sock"
    copy = short_tmp / "copy"
    with serving(short_tmp, disk) as daemon:
        take_and_overwrite(daemon, program)
        options = ("-r", "-t", "-f", "raw", "-x", "again", "-k", relay)
        with started(program("qemu-nbd"), *options, daemon.uri("vda@one")):
            await eventually(relay.exists)
            uri = f"nbd+unix:///again?socket={relay}"
            run(program("qemu-img"), "convert", "-f", "raw", "-O", "raw", uri, copy)
    assert copy.read_bytes() == before


@pytest.mark.interop("nbdkit", "nbdcopy")
def test_through_an_nbdkit_in_between(short_tmp: Path, disk: Path, program: Program) -> None:
    before = disk.read_bytes()
    if run(program("nbdkit"), "--dump-plugin", "nbd", code=None).returncode != 0:
        pytest.skip("nbdkit has no nbd plugin here")
    copy = short_tmp / "copy"
    with serving(short_tmp, disk) as daemon:
        take_and_overwrite(daemon, program)
        relay = ("-U", "-", "-r", "nbd", f"socket={daemon.socket}", "export=vda@one", "shared=true")
        run(program("nbdkit"), *relay, "--run", f'{program("nbdcopy")} "$uri" {copy}')
    assert copy.read_bytes() == before
