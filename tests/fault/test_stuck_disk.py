"""A disk whose file system hangs harms its own export alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support.file_system import file_system
from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    eventually,
    has_in_flight,
    listed,
    read_export,
    serving,
    snapshot,
    soon,
)

SIZE = 8 * MiB
OLD = blocks(SIZE, 64 * KiB)


@pytest.mark.parametrize("with_snapshot", [False, True])
@pytest.mark.parametrize("length", [4 * KiB, 256 * KiB])
async def test_other_disks_do_not_notice(
    short_tmp: Path, length: int, *, with_snapshot: bool
) -> None:
    good = short_tmp / "good.raw"
    good.write_bytes(OLD)
    with file_system(short_tmp / "m", 32 * MiB) as mounted:
        bad = mounted.path / "bad.raw"
        bad.write_bytes(OLD)
        with serving(short_tmp, bad, good, disks=2) as daemon:
            await snapshot(daemon, "good", name="one")
            if with_snapshot:
                await snapshot(daemon, "bad", name="one")
            async with (
                client(daemon, "bad") as victim,
                client(daemon, "bad") as second,
                client(daemon, "good") as guest,
                client(daemon, "good@one") as reader,
            ):
                with mounted.frozen():
                    waiting = [
                        await one.submit(
                            *(c.NBD_CMD_WRITE, number * length % SIZE, length),
                            data=b"\xee" * length,
                        )
                        for number in range(50)
                        for one in (victim, second)
                    ]
                    await eventually(lambda: has_in_flight(daemon, 100))
                    assert await soon(read_export(daemon, "bad")) == OLD
                    await soon(guest.write(100, b"\xaa" * MiB))
                    await soon(guest.trim(2 * MiB, MiB))
                    await soon(guest.zero(4 * MiB, MiB))
                    await soon(guest.flush())
                    assert await soon(reader.read(0, SIZE)) == OLD
                    await soon(snapshot(daemon, "good", name="two"))
                    await soon(guest.write(0, b"\xbb" * MiB))
                    done = await soon(cli(daemon, "snapshot", "delete", "good@two"))
                    assert done.code == 0
                    for command in (("status",), ("snapshot", "list"), ("health",)):
                        assert (await soon(cli(daemon, *command))).code == 0
                    assert not any(each.done() for each in waiting)
                    mounted.thaw()
                    for each in waiting:
                        assert (await soon(each)).error == 0
                assert await reader.read(0, SIZE) == OLD
                assert {row["state"] for row in (await listed(daemon)).values()} == {"ok"}
                if with_snapshot:
                    assert await read_export(daemon, "bad@one") == OLD


@pytest.mark.deadline(90)
async def test_a_snapshot_of_it_is_refused_in_bounded_time(short_tmp: Path) -> None:
    """Nobody waits for ever: the command ends, nothing has changed, and the guest goes on."""
    with file_system(short_tmp / "m", 32 * MiB) as mounted:
        bad = mounted.path / "bad.raw"
        bad.write_bytes(OLD)
        with serving(short_tmp, bad) as daemon:
            async with client(daemon, "bad") as guest:
                with mounted.frozen():
                    stuck = await guest.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"\xee" * 4096)
                    await eventually(lambda: has_in_flight(daemon, 1))
                    done = await soon(cli(daemon, "snapshot", "create", "bad"), 20)
                    assert done.code == 1
                    assert "did not end" in done.err
                    assert await soon(guest.read(0, 4096)) == OLD[:4096]
                    assert not stuck.done()
                    mounted.thaw()
                    assert (await soon(stuck)).error == 0
                assert await listed(daemon) == {}
                await soon(snapshot(daemon, "bad", name="one"))
                await guest.write(0, b"\xaa" * 4096)
                assert await read_export(daemon, "bad@one") == b"\xee" * 4096 + OLD[4096:]
