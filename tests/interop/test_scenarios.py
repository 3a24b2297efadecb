"""The fleecing scenarios of QEMU's own tests, with qemu-io as guest and as reader.

Follows: QEMU tests/qemu-iotests/tests/image-fleecing, 222.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support.daemon_process import Daemon
from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    program_run,
    qemu_io,
    read_export,
    run,
    scribble,
    serving,
    snapshot,
    soon,
)
from tests.support.nbd_client import NbdClient

pytestmark = pytest.mark.interop("qemu-io", "qemu-img")

Program = Callable[[str], str]
Patterns = list[tuple[int, int, int]]  # byte, offset, length

SIZE = 64 * MiB
FILL: Patterns = [
    (0x5D, 0, 64 * KiB),
    (0xD5, MiB, 64 * KiB),
    (0xDC, 32 * MiB, 64 * KiB),
    (0xCD, SIZE - 64 * KiB, 64 * KiB),
]
OVERWRITE: Patterns = [
    (0xAB, 0, 64 * KiB),  # a whole cluster
    (0xAD, MiB - 32 * KiB, 64 * KiB),  # begins left of the data
    (0x1D, 32 * MiB + 32 * KiB, 64 * KiB),  # ends right of the data
    (0xEA, SIZE - 128 * KiB, 64 * KiB),  # adjoins the data
]
ZERO: Patterns = [
    (0, MiB - 32 * KiB, 32 * KiB),
    (0, 32 * MiB + 64 * KiB, 32 * KiB),
    (0, SIZE - 128 * KiB, 64 * KiB),
]
REMAINS: Patterns = [
    (0xD5, MiB + 32 * KiB, 32 * KiB),
    (0xDC, 32 * MiB, 32 * KiB),
    (0xCD, SIZE - 64 * KiB, 64 * KiB),
]


def writes(patterns: Patterns) -> list[str]:
    return [f"write -P {byte:#x} {offset} {length}" for byte, offset, length in patterns]


def reads(patterns: Patterns) -> list[str]:
    return [f"read -P {byte:#x} {offset} {length}" for byte, offset, length in patterns]


def test_fleecing_the_image_of_qemus_test(short_tmp: Path, program: Program) -> None:
    """T-F3."""
    disk = short_tmp / "vda.raw"
    with disk.open("xb") as file:
        file.truncate(SIZE)
    with serving(short_tmp, disk) as daemon:
        live, one = daemon.uri("vda"), daemon.uri("vda@one")
        qemu_io(program, live, *writes(FILL))
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        qemu_io(program, one, *reads(FILL), *reads(ZERO))
        qemu_io(program, live, *writes(OVERWRITE))
        qemu_io(program, one, *reads(FILL), *reads(ZERO))
        qemu_io(program, live, *reads(OVERWRITE), *reads(REMAINS))
        said = qemu_io(program, one, "read -P 0xab 0 64k", code=1)
        assert "Pattern verification failed" in said  # qemu-io looks at what it reads
        assert daemon.run("snapshot", "delete", "vda@one").code == 0
        assert daemon.stop() == 0
    qemu_io(program, disk, *reads(OVERWRITE), *reads(REMAINS))
    remaining = run(program("qemu-img"), "map", "--output=json", "-f", "raw", disk).stdout
    assert sum(each["length"] for each in json.loads(remaining) if each["data"]) < MiB


def test_a_guest_write_is_refused_on_the_snapshot(short_tmp: Path, program: Program) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * MiB)
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        one = daemon.uri("vda@one")
        said = run(program("qemu-io"), "-f", "raw", "-c", "quit", one, code=1).stderr
        assert "Permission denied" in said  # it would open it to write
        for command in ("write 0 4k", "write -z 0 4k", "discard 0 64k"):
            assert "read-only" in qemu_io(program, one, command, code=1)
        qemu_io(program, one, f"read -P 1 0 {MiB}", "flush")


# --- T-F6: reads that straddle what was copied and what was not ----------------------------------


def straddling(size: int) -> tuple[bytes, Patterns]:
    """128 KiB blocks, and overwrites of 64 KiB at odd multiples of 32 KiB."""
    old = blocks(size, 128 * KiB)
    changes = [
        (0xFE, offset, min(64 * KiB, size - offset)) for offset in range(96 * KiB, size, 256 * KiB)
    ]
    return old, changes


@pytest.mark.parametrize("size", [8 * MiB, 8 * MiB + 1536, 8 * MiB + 1, 8 * MiB - 4097])
async def test_reads_that_straddle_saved_and_unsaved(
    short_tmp: Path, program: Program, size: int
) -> None:
    """T-F6, T-F7: also for sizes that are no multiple of anything."""
    disk = short_tmp / "vda.raw"
    old, changes = straddling(size)
    disk.write_bytes(old)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        live, one = daemon.uri("vda"), daemon.uri("vda@one")
        commands = writes(changes)
        commands[1::3] = [text.replace("write -P 0xfe", "write -z") for text in commands[1::3]]
        commands[2::3] = [text.replace("write -P 0xfe", "discard") for text in commands[2::3]]
        options = [part for command in commands for part in ("-c", command)]
        await program_run(program("qemu-io"), "-f", "raw", *options, live)
        whole_blocks = [
            (old[offset], offset, min(128 * KiB, size - offset))
            for offset in range(0, size, 128 * KiB)
        ]
        options = [part for command in reads(whole_blocks) for part in ("-c", command)]
        done = await program_run(program("qemu-io"), "-r", "-f", "raw", *options, one)
        assert "failed" not in done.stdout
        for structured in (True, False):
            assert await read_export(daemon, "vda@one", structured=structured) == old
            async with client(daemon, "vda@one", structured=structured) as reader:
                for offset in range(0, size, 128 * KiB):
                    length = min(2 * MiB, size - offset)
                    assert await reader.read(offset, length) == old[offset : offset + length]
        copy = short_tmp / "copy"
        convert = ("convert", "-f", "raw", "-O", "raw", one, copy)
        await program_run(program("qemu-img"), *convert)
        assert copy.read_bytes()[:size] == old


@pytest.mark.deadline(120)
async def test_random_reads_during_random_writes_zeroes_and_trims(
    short_tmp: Path, rng: random.Random, *, long_run: bool
) -> None:
    """T-F6: 1 byte to 1 MiB, unaligned, on several connections with either kind of reply."""
    size = 6 * MiB + 1 + rng.randrange(4096)
    disk = short_tmp / "vda.raw"
    old = blocks(size // 2, 4 * KiB) + bytes(size - size // 2)
    disk.write_bytes(old)

    async def guest(daemon: Daemon, stop: asyncio.Event) -> None:
        async with client(daemon, "vda") as one:
            while not stop.is_set():
                await scribble(one, rng)

    async def reader(daemon: Daemon, export: str, content: bytes, *, structured: bool) -> None:
        async with client(daemon, export, structured=structured) as one:
            for number in range(600 if long_run else 80):
                offset = rng.randrange(size)
                length = rng.choice((1, 513, 4 * KiB, 100_000, rng.randrange(MiB) + 1))
                length = min(length, size - offset)
                flags = c.NBD_CMD_FLAG_DF if structured and number % 5 == 0 else 0
                got = await one.read(offset, length, flags=flags)
                assert got == content[offset : offset + length], f"at {offset}, {length} bytes"

    with serving(short_tmp, disk) as daemon:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            await snapshot(daemon, "vda", name="one")
            for _ in range(3):
                tasks.create_task(guest(daemon, stop))
            await snapshot(daemon, "vda", name="two")  # of a moment that only it knows
            second = await read_export(daemon, "vda@two")
            async with asyncio.TaskGroup() as readers:
                for structured in (True, False):
                    for export, content in (("vda@one", old), ("vda@two", second)):
                        work = reader(daemon, export, content, structured=structured)
                        readers.create_task(work)
            stop.set()
        for structured in (True, False):
            assert await read_export(daemon, "vda@one", structured=structured) == old
            assert await read_export(daemon, "vda@two", structured=structured) == second


# --- T-F7: sizes ---------------------------------------------------------------------------------


@pytest.mark.interop("nbdcopy")
@pytest.mark.parametrize("size", [1, 511, 1536, 4097, MiB + 1536, 2 * MiB + 1, 3 * MiB - 1])
async def test_sizes_that_are_no_multiple_of_anything(
    short_tmp: Path, program: Program, size: int
) -> None:
    """T-F7, raw."""
    disk = short_tmp / "vda.raw"
    old = blocks(size, 1000)
    disk.write_bytes(old)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        async with client(daemon, "vda") as guest:
            await guest.write(size - 1, b"\xff")
            if size > 1536:
                await guest.zero(size - 1536, 1535)
                await guest.trim(0, 1000)
        assert await read_export(daemon, "vda@one") == old
        copy, image = short_tmp / "copy", short_tmp / "image"
        await program_run(program("nbdcopy"), daemon.uri("vda@one"), copy)
        assert copy.read_bytes() == old
        convert = ("convert", "-f", "raw", "-O", "raw", daemon.uri("vda@one"), image)
        await program_run(program("qemu-img"), *convert)
        assert image.read_bytes()[:size] == old  # QEMU rounds up to 512
        assert not any(image.read_bytes()[size:])
        assert (await read_export(daemon, "vda"))[-1:] == b"\xff"
    assert disk.stat().st_size == size


# --- T-F8: block status --------------------------------------------------------------------------


@pytest.mark.interop("nbdinfo")
async def test_the_status_of_the_snapshot_is_that_of_the_instant(
    short_tmp: Path, program: Program
) -> None:
    """T-F8: what the guest trims or zeroes shows no hole; what was a hole stays one."""
    disk = short_tmp / "vda.raw"
    old = blocks(4 * MiB, 64 * KiB)
    disk.write_bytes(old)
    with disk.open("r+b") as file:
        file.truncate(8 * MiB)  # the second half is a hole
    with serving(short_tmp, disk) as daemon:
        live, one = daemon.uri("vda"), daemon.uri("vda@one")
        await snapshot(daemon, "vda", name="one")
        before = await mapped(program, one)
        assert before == [(0, 4 * MiB, 0), (4 * MiB, 4 * MiB, 3)]
        await asyncio.to_thread(
            qemu_io,
            program,
            live,
            *("discard 0 1M", "write -z 1M 1M", "write -z -u 2M 512k", "write -P 7 3000k 3000"),
            *("write -P 9 5M 1M", "write -P 9 7000k 1", "write -z 6M 64k"),
        )
        after = await mapped(program, live)
        assert {kind for offset, _, kind in after if offset < MiB} == {3}
        assert (5 * MiB, MiB, 0) in after
        assert await mapped(program, one) == before
        assert await read_export(daemon, "vda@one") == old + bytes(4 * MiB)
        assert await read_export(daemon, "vda@one", structured=False) == old + bytes(4 * MiB)


async def mapped(program: Program, uri: str) -> list[tuple[int, int, int]]:
    done = await program_run(program("nbdinfo"), "--map", "--json", uri)
    joined: list[tuple[int, int, int]] = []
    for each in json.loads(done.stdout):
        if joined and joined[-1][2] == each["type"]:
            start, length, kind = joined.pop()
            joined.append((start, length + each["length"], kind))
        else:
            joined.append((each["offset"], each["length"], each["type"]))
    return joined


# --- T-N11, T-N12: misfits -----------------------------------------------------------------------


async def test_a_partial_trim_of_a_snapshot_harms_nobody(short_tmp: Path) -> None:
    """T-N12: QEMU's daemon aborts."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * MiB)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        async with client(daemon, "vda@one") as reader, client(daemon, "vda") as guest:
            for offset, length in ((100, 512), (4096, 4096), (0, MiB), (MiB - 1, 1)):
                assert await soon(reader.error_of(c.NBD_CMD_TRIM, offset, length)) == c.NBD_EPERM
            await guest.trim(4095, 2)
            await guest.trim(100, MiB - 200)
            assert await reader.read(0, MiB) == b"\1" * MiB


async def test_a_failing_status_has_one_error_reply(short_tmp: Path) -> None:
    """T-N11, with the one context there is: an error, and the next request is answered."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * MiB)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one", temp_limit=4096)
        async with client(daemon, "vda@one") as reader, client(daemon, "vda") as guest:
            assert await reader.status(0, MiB) == [(MiB, 0)]
            await guest.write(0, b"\2" * 8192)
            for _ in range(3):
                reply = await soon(reader.ask(c.NBD_CMD_BLOCK_STATUS, 0, MiB))
                assert reply.error == c.NBD_EIO
                assert not reply.status
            assert await soon(reader.error_of(c.NBD_CMD_READ, 0, 4096)) == c.NBD_EIO
            assert await soon(reader.error_of(c.NBD_CMD_FLUSH)) == 0
        assert (await cli(daemon, "snapshot", "show", "vda@one")).code == 6


async def test_a_reader_without_structured_replies_sees_the_broken_snapshot(
    short_tmp: Path,
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * MiB)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one", temp_limit=4096)

        async def ask(one: NbdClient) -> int:
            return await soon(one.error_of(c.NBD_CMD_READ, MiB - 10, 10))

        async with client(daemon, "vda@one", structured=False) as reader:
            assert await ask(reader) == 0
            async with client(daemon, "vda") as guest:
                await guest.write(0, b"\2" * 8192)
            assert await ask(reader) == c.NBD_EIO
            assert await ask(reader) == c.NBD_EIO
