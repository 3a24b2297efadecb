"""fio's nbd engine: as a guest that verifies what it wrote, and as a reader of snapshots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import (
    MiB,
    listed,
    program_run,
    read_export,
    run,
    serving,
    snapshot,
)

pytestmark = pytest.mark.interop("fio")

Program = Callable[[str], str]
SIZE = 16 * MiB


@pytest.fixture
def fio(program: Program) -> str:
    path = program("fio")
    if "nbd" not in run(path, "--enghelp").stdout.split():
        pytest.skip("this fio has no nbd engine")
    return path


def job(fio: str, uri: str, *options: str) -> list[str]:
    common = ["--name=job", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}", "--thread=1"]
    return [fio, *common, "--output-format=json", *options]


async def work(fio: str, uri: str, folder: Path, *options: str, code: int = 0) -> dict:
    """Run a job and return its numbers; fio's files go into `folder`."""
    command = job(fio, uri, f"--aux-path={folder}", *options)
    done = await program_run(*command, code=code)
    (found,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert bool(found["error"]) == bool(code)
    return found


@pytest.mark.parametrize("block", ["--bs=4k", "--bsrange=512-256k", "--bs=1m"])
async def test_a_guest_reads_back_what_it_wrote_under_snapshots(
    short_tmp: Path, fio: str, block: str
) -> None:
    """Each block carries its checksum; snapshots come and go meanwhile."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * SIZE)
    verify = ("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=1")
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="first")

        async def snapshots() -> None:
            for number in range(3):
                await snapshot(daemon, "vda", name=f"s{number}")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(snapshots())
            options = ("--rw=randwrite", "--iodepth=16", "--fsync=200", block, *verify)
            numbers = await work(fio, daemon.uri("vda"), short_tmp, *options)
        assert numbers["write"]["io_bytes"] == SIZE
        assert {row["state"] for row in (await listed(daemon)).values()} == {"ok"}
        assert await read_export(daemon, "vda@first") == b"\1" * SIZE


async def test_a_snapshot_is_read_at_random_while_the_guest_writes(
    short_tmp: Path, fio: str
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\x11" * SIZE)
    pattern = ("--verify=pattern", "--verify_fatal=1", "--verify_pattern=0x11")
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        one, live = daemon.uri("vda@one"), daemon.uri("vda")
        async with asyncio.TaskGroup() as tasks:
            write = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--buffer_pattern=0x22")
            writing = tasks.create_task(work(fio, live, short_tmp, *write))
            for options in (
                ("--rw=randread", "--bs=4k", "--iodepth=16"),
                ("--rw=randread", "--bs=64k", "--iodepth=16"),
                ("--rw=read", "--bs=1m", "--iodepth=4"),
            ):
                tasks.create_task(work(fio, one, short_tmp, *options, *pattern))
        assert writing.result()["write"]["io_bytes"] == SIZE
        wrong = (*pattern[:2], "--verify_pattern=0x12")
        read = ("--rw=read", "--bs=64k", "--iodepth=4")
        await work(fio, one, short_tmp, *read, *wrong, code=1)  # fio does look
        await work(fio, live, short_tmp, *read, *pattern[:2], "--verify_pattern=0x22")


async def test_trims_and_writes_mixed(short_tmp: Path, fio: str) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * SIZE)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        options = ("--rw=randtrimwrite", "--bs=64k", "--iodepth=8", "--fsync=32")
        numbers = await work(fio, daemon.uri("vda"), short_tmp, *options)
        assert numbers["trim"]["io_bytes"] > 0
        assert await read_export(daemon, "vda@one") == b"\1" * SIZE
