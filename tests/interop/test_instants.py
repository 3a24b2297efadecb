"""What a snapshot is the point in time of: for one disk, for several, and for who is writing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon
from tests.support.live import (
    KiB,
    MiB,
    ask,
    blocks,
    cli,
    client,
    clients,
    eventually,
    listed,
    program_run,
    read_export,
    serving,
    snapshot,
    soon,
    started,
)
from tests.support.nbd_client import NbdClient

Program = Callable[[str], str]


@pytest.mark.interop("nbdcopy")
async def test_snapshots_of_different_instants_are_each_right(
    short_tmp: Path, program: Program
) -> None:
    """Deleted in another order than they were made, with writes in between."""
    size = 4 * MiB + 1536
    disk = short_tmp / "vda.raw"
    content = bytearray(blocks(size, 4 * KiB))
    disk.write_bytes(content)
    wanted: dict[str, bytes] = {}

    async def check(daemon: Daemon) -> None:
        for name, expected in wanted.items():
            copy = short_tmp / "copy"
            await program_run(program("nbdcopy"), daemon.uri(f"vda@{name}"), copy)
            assert copy.read_bytes() == expected, name

    with serving(short_tmp, disk) as daemon:
        async with client(daemon, "vda") as guest:
            for number in range(5):
                await snapshot(daemon, "vda", name=f"s{number}")
                wanted[f"s{number}"] = bytes(content)
                for offset, length in ((number * 700_001, 300_000), (2 * MiB, 64 * KiB)):
                    data = bytes([100 + number]) * length
                    await guest.write(offset, data)
                    content[offset : offset + length] = data
                await guest.trim(number * 4096, 4096)
                content[number * 4096 : (number + 1) * 4096] = bytes(4096)
            await check(daemon)
            for name in ("s2", "s4", "s0", "s3"):
                assert (await cli(daemon, "snapshot", "delete", f"vda@{name}")).code == 0
                del wanted[name]
                await guest.write(0, name.encode() * 100_000)
                await check(daemon)
    assert list(wanted) == ["s1"]


async def test_disks_of_a_group_are_taken_at_one_instant(short_tmp: Path) -> None:
    """Each guest writes n to a, then n to b, then n to c, each after the answer to the one before.

    So a is never behind b, b never behind c, and none more than one behind the first. A group whose
    disks were taken one after another would break that one way or the other, whatever the order in
    which they are named.
    """
    disks = [short_tmp / f"{name}.raw" for name in "abc"]
    for disk in disks:
        disk.write_bytes(bytes(MiB))
    stop = asyncio.Event()
    lanes = 12
    written = 0

    async def guest(lane: int, ends: list[NbdClient]) -> None:
        nonlocal written
        for number in itertools.count(1):
            for end in ends:
                await end.write(lane * 4096, number.to_bytes(8, "big"))
            written += 1
            if stop.is_set():
                return

    orders = list(itertools.permutations("abc")) * 3
    with serving(short_tmp, *disks, disks=3) as daemon:
        async with (
            client(daemon, "a") as a,
            client(daemon, "b") as b,
            client(daemon, "c") as c,
            asyncio.TaskGroup() as tasks,
        ):
            for lane in range(lanes):
                tasks.create_task(guest(lane, [a, b, c]))
            for number, order in enumerate(orders):
                enough = written + 5 * lanes
                await eventually(lambda enough=enough: written > enough)
                await snapshot(daemon, *order, name=f"s{number}")
            stop.set()
        for number in range(len(orders)):
            found = [await read_export(daemon, f"{disk}@s{number}") for disk in "abc"]
            for lane in range(lanes):
                at = slice(lane * 4096, lane * 4096 + 8)
                first, second, third = (int.from_bytes(each[at], "big") for each in found)
                assert first >= second >= third >= first - 1, f"snapshot {number}, lane {lane}"
        instants = {row["snapshot"]: set() for row in (await listed(daemon)).values()}
        for row in (await listed(daemon)).values():
            instants[row["snapshot"]].add(row["instant"])
        assert all(len(each) == 1 for each in instants.values())


async def test_snapshots_and_backups_of_one_transaction_are_of_one_instant(
    short_tmp: Path,
) -> None:
    """As above; each disk has its own actions, and is both snapshot and backed up."""
    for disk in "abc":
        (short_tmp / disk).write_bytes(bytes(MiB))
    stop = asyncio.Event()
    lanes, rounds = 12, 8
    written = 0

    async def guest(lane: int, ends: list[NbdClient]) -> None:
        nonlocal written
        for number in itertools.count(1):
            for end in ends:
                await end.write(lane * 4096, number.to_bytes(8, "big"))
            written += 1
            if stop.is_set():
                return

    def target(disk: str, number: int) -> str:
        return f"{disk}-copy{number}"

    def actions(number: int) -> list[dict]:
        order = "".join(list(itertools.permutations("abc"))[number % 6])
        found: list[tuple[str, dict]] = []
        for disk in order:
            name = target(disk, number)
            (short_tmp / name).write_bytes(bytes(MiB))
            node = {"driver": "file", "node-name": name, "filename": str(short_tmp / name)}
            found.append(("blockdev-add", node))
            job = {"job-id": name, "device": disk, "target": name, "sync": "full"}
            found.append(("blockdev-backup", job))
        name = f"s{number}"
        snapshots = [
            ("fleece-snapshot-create", {"disks": [disk], "name": name}) for disk in reversed(order)
        ]
        found = [*snapshots, *found] if number % 2 else [*found, *snapshots]
        return [{"type": kind, "data": data} for kind, data in found]

    async def finished(daemon: Daemon) -> bool:
        return not await ask(daemon, "query-jobs")

    with serving(short_tmp, *(short_tmp / disk for disk in "abc"), disks=3) as daemon:
        async with (
            client(daemon, "a") as a,
            client(daemon, "b") as b,
            client(daemon, "c") as c,
            asyncio.TaskGroup() as tasks,
        ):
            for lane in range(lanes):
                tasks.create_task(guest(lane, [a, b, c]))
            for number in range(rounds):
                enough = written + 5 * lanes
                await eventually(lambda enough=enough: written > enough)
                await ask(daemon, "transaction", {"actions": actions(number)})
                await eventually(lambda: finished(daemon))
            stop.set()
        for number in range(rounds):
            found = [await read_export(daemon, f"{disk}@s{number}") for disk in "abc"]
            copies = [(short_tmp / target(disk, number)).read_bytes() for disk in "abc"]
            assert found == copies, f"round {number}"
            for lane in range(lanes):
                at = slice(lane * 4096, lane * 4096 + 8)
                first, second, third = (int.from_bytes(each[at], "big") for each in found)
                assert first >= second >= third >= first - 1, f"round {number}, lane {lane}"


async def test_a_write_that_was_answered_before_is_in_and_one_sent_after_is_not(
    short_tmp: Path,
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(MiB))
    with serving(short_tmp, disk) as daemon:
        async with client(daemon, "vda") as one, client(daemon, "vda") as two:
            for number in range(1, 6):
                for guest, offset in ((one, 0), (two, 100_000)):
                    await guest.write(offset, bytes([number]) * 50_000)
                await snapshot(daemon, "vda", name=f"s{number}")
            await one.write(0, b"\xff" * MiB)
        for number in range(1, 6):
            found = await read_export(daemon, f"vda@s{number}")
            assert set(found[:50_000]) == {number}
            assert set(found[100_000:150_000]) == {number}


async def test_a_guest_with_writes_in_flight_notices_nothing(short_tmp: Path) -> None:
    """The same connections, no error, and every write where it belongs."""
    size = 8 * MiB
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(size))
    stop = asyncio.Event()
    answered = 0

    async def write(guest: NbdClient, lane: int) -> bytes:
        nonlocal answered
        for number in itertools.count(1):
            data = (number * 64 + lane).to_bytes(8, "big") * 1024
            await guest.write(lane * 65536, data)
            assert await guest.read(lane * 65536, 8192) == data
            answered += 1
            if stop.is_set():
                return data
        raise AssertionError

    with serving(short_tmp, disk) as daemon:
        async with client(daemon, "vda") as one, client(daemon, "vda") as two:
            before = {row["id"] for row in await clients(daemon)}
            async with asyncio.TaskGroup() as tasks:
                lanes = [tasks.create_task(write((one, two)[lane % 2], lane)) for lane in range(64)]
                for number in range(4):
                    seen = answered
                    await soon(snapshot(daemon, "vda", name=f"s{number}"))
                    assert answered > seen  # nobody was kept waiting for the command's time
                for number in (1, 3, 0):
                    done = await soon(cli(daemon, "snapshot", "delete", f"vda@s{number}"))
                    assert done.code == 0
                assert {row["id"] for row in await clients(daemon)} == before
                stop.set()
            assert one.lost is two.lost is None
            for lane, task in enumerate(lanes):
                assert await one.read(lane * 65536, 8192) == task.result()


@pytest.mark.interop("qemu-io")
async def test_a_qemu_guest_notices_nothing(short_tmp: Path, program: Program) -> None:
    """qemu-io keeps 2000 writes coming, and fails at the first error."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * 8 * MiB)
    commands = []
    for number in range(2000):
        offset = number * 7919 % (8 * MiB // 4096 - 16) * 4096
        kind = ("aio_write -P 0x55", "aio_write -P 0x66", "aio_write -z", "discard")[number % 4]
        commands += ["-c", f"{kind} {offset} {4096 * (number % 16 + 1)}"]
    command = (program("qemu-io"), "-f", "raw", *commands, "-c", "aio_flush")
    with serving(short_tmp, disk) as daemon:
        with started(*command, daemon.uri("vda")) as guest:
            taken = 0
            while guest.poll() is None and taken < 6:
                await snapshot(daemon, "vda", name=f"s{taken}")
                taken += 1
            _, err = await asyncio.to_thread(guest.communicate)
            assert (guest.returncode, err) == (0, b"")
        assert taken
        assert await read_export(daemon, "vda@s0") is not None
        assert {row["state"] for row in (await listed(daemon)).values()} == {"ok"}
