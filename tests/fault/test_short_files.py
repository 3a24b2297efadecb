"""Files that end too soon: a failing source, and a failing temporary image, of a real daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    listed,
    read_export,
    serving,
    snapshot,
    soon,
)

SIZE = 4 * MiB
OLD = blocks(SIZE, 64 * KiB)


@pytest.mark.parametrize("length", [4 * KiB, 512 * KiB])
@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
async def test_old_data_that_cannot_be_read_is_a_failed_copy(
    short_tmp: Path, policy: str, length: int
) -> None:
    """Somebody cuts the disk in half under us: reads there fail, and never give zeroes."""
    disks = [short_tmp / f"{name}.raw" for name in ("vda", "vdb")]
    for disk in disks:
        disk.write_bytes(OLD)
    with serving(short_tmp, *disks, disks=2) as daemon:
        await snapshot(daemon, "vda", "vdb", name="one", on_error=policy)
        async with (
            client(daemon, "vda") as guest,
            client(daemon, "vda@one") as reader,
            client(daemon, "vdb") as other,
        ):
            await guest.write(0, b"\xaa" * MiB)
            os.truncate(disks[0], SIZE // 2)
            lost = 3 * MiB
            for one in (guest, reader):
                assert await soon(one.error_of(c.NBD_CMD_READ, lost, 4096)) == c.NBD_EIO
                assert await soon(one.error_of(c.NBD_CMD_READ, SIZE // 2 - 5, 10)) == c.NBD_EIO
            assert await reader.read(0, SIZE // 2) == OLD[: SIZE // 2]
            data = b"\xee" * length
            error = await soon(guest.error_of(c.NBD_CMD_WRITE, lost, length, data=data))
            row = (await listed(daemon))["vda@one"]
            if policy == "break-snapshot":
                assert error == 0
                assert row["state"] == "broken"
                assert await soon(reader.error_of(c.NBD_CMD_READ, 0, 1)) == c.NBD_EIO
            else:
                assert error == c.NBD_EIO
                assert row["state"] == "ok"
                assert await reader.read(0, SIZE // 2) == OLD[: SIZE // 2]
                assert await soon(reader.error_of(c.NBD_CMD_READ, lost, length)) == c.NBD_EIO
            await other.write(0, b"\xaa" * MiB)
            assert await read_export(daemon, "vdb@one") == OLD


async def test_saved_data_that_is_lost_is_an_error_and_never_zeroes(short_tmp: Path) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(OLD)
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        (temp,) = daemon.state.glob("vda/snapshots/one/temp.raw")
        async with client(daemon, "vda") as guest, client(daemon, "vda@one") as reader:
            await guest.write(2 * MiB, b"\xaa" * MiB)
            os.truncate(temp, 2 * MiB + 64 * KiB)
            assert await soon(reader.error_of(c.NBD_CMD_READ, 2 * MiB, MiB)) == c.NBD_EIO
            assert await soon(reader.error_of(c.NBD_CMD_READ, 2 * MiB + 70_000, 1)) == c.NBD_EIO
            at = 2 * MiB
            assert await reader.read(at, 64 * KiB) == OLD[at : at + 64 * KiB]
            assert await reader.read(0, 2 * MiB) == OLD[: 2 * MiB]
            assert await reader.read(3 * MiB, MiB) == OLD[3 * MiB :]
            assert (await cli(daemon, "status")).code == 0
