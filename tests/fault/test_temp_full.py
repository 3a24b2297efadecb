"""No space for old data: a full file system, or --temp-limit."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import constants as c
from tests.support.daemon_process import Daemon
from tests.support.file_system import FileSystem, file_system
from tests.support.live import (
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

SIZE = 24 * MiB
OLD = blocks(SIZE, 64 << 10)
NEW = b"\xee" * MiB


@dataclass
class Scene:
    """Disks vda and vdb, and a small file system for what they save."""

    daemon: Daemon
    temp: FileSystem


@pytest.fixture
def scene(short_tmp: Path) -> Iterator[Scene]:
    disks = [short_tmp / f"{name}.raw" for name in ("vda", "vdb")]
    for disk in disks:
        disk.write_bytes(OLD)
    with file_system(short_tmp / "small", 16 * MiB) as temp:
        options = ("--temp-dir", temp.path, *disks)
        with serving(short_tmp, *options, disks=2) as daemon:
            yield Scene(daemon, temp)


async def test_break_snapshot_lets_the_guest_go_on(scene: Scene) -> None:
    daemon = scene.daemon
    await snapshot(daemon, "vdb", name="two")
    async with (
        client(daemon, "vda") as guest,
        client(daemon, "vdb") as other,
        client(daemon, "vdb@two") as other_reader,
    ):
        await other.write(0, NEW)  # saved while there is space
        await snapshot(daemon, "vda", name="one")
        async with client(daemon, "vda@one") as reader:
            assert await reader.read(0, 4096) == OLD[:4096]
            for offset in range(0, SIZE, MiB):
                await soon(guest.write(offset, NEW))
            assert await guest.read(SIZE - MiB, MiB) == NEW

            # Reading is over for good: wherever, in whatever way, for whoever comes later.
            for offset in (0, SIZE // 2, SIZE - 1):
                assert await soon(reader.error_of(c.NBD_CMD_READ, offset, 1)) == c.NBD_EIO
            status = await soon(reader.error_of(c.NBD_CMD_BLOCK_STATUS, 0, SIZE))
            assert status == c.NBD_EIO
            with contextlib.suppress(OptionRefused):
                async with client(daemon, "vda@one", structured=False) as late:
                    assert await soon(late.error_of(c.NBD_CMD_READ, 0, 1)) == c.NBD_EIO

        told = await cli(daemon, "snapshot", "list", "--json")
        assert told.code == 0
        rows = {row["export"]: row for row in told.json}
        assert rows["vda@one"]["state"] == "broken"
        assert "No space left on device" in rows["vda@one"]["error"]
        shown = await cli(daemon, "snapshot", "show", "vda@one")
        assert shown.code == 6
        assert "broken: " in shown.out
        assert (await cli(daemon, "health")).code == 6
        assert (await cli(daemon, "snapshot", "list")).code == 0

        # What was saved of the other disk is still there; and so is its guest.
        assert rows["vdb@two"]["state"] == "ok"
        assert await other_reader.read(0, 2 * MiB) == OLD[: 2 * MiB]
        await other.write(4096, b"\xaa" * 8192)
        await guest.flush()

        # The space comes back with the deletion, and what is taken then is good.
        assert (await cli(daemon, "snapshot", "delete", "vda@one")).code == 0
        assert (await cli(daemon, "health")).code == 0
        await snapshot(daemon, "vda", name="one")
        await guest.write(0, b"\xcc" * 3 * MiB)
        await other.write(MiB, NEW)
        assert await read_export(daemon, "vda@one") == NEW * (SIZE // MiB)
        assert await read_export(daemon, "vdb@two") == OLD


@pytest.mark.parametrize("piece", [4096, 64 << 10, MiB, 8 * MiB])
async def test_break_guest_write_keeps_the_snapshot(scene: Scene, piece: int) -> None:
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one", on_error="break-guest-write")
    model = bytearray(OLD)
    async with client(daemon, "vda") as guest:
        # Fill it up; then go on with the piece under test. Space may be left for a smaller piece.
        failed = 0
        for offset in range(0, 12 * MiB, MiB):
            failed = await soon(guest.error_of(c.NBD_CMD_WRITE, offset, MiB, data=NEW))
            if not failed:
                model[offset : offset + MiB] = NEW
        for offset in range(12 * MiB, SIZE - piece + 1, max(piece, MiB)):
            new = b"\xdd" * piece
            error = await soon(guest.error_of(c.NBD_CMD_WRITE, offset, piece, data=new))
            if error:
                failed = error
                assert error == c.NBD_ENOSPC
            else:
                model[offset : offset + piece] = new
        for number in range(2048):  # the last crumbs
            offset = SIZE - (number + 1) * 4096
            error = await soon(guest.error_of(c.NBD_CMD_WRITE, offset, 4096, data=b"\xcc" * 4096))
            if error:
                failed = error
                break
            model[offset : offset + 4096] = b"\xcc" * 4096
        assert failed == c.NBD_ENOSPC
        # A write that failed has changed nothing; one to what is saved needs no space.
        assert await read_export(daemon, "vda") == model
        await guest.write(0, b"\xbb" * MiB)
        await guest.flush()
        for verb in (c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES):
            assert await soon(guest.error_of(verb, 11 * MiB, 12 * MiB)) == c.NBD_ENOSPC
        assert (await guest.read(MiB, SIZE - MiB)) == model[MiB:]

        assert (await listed(daemon))["vda@one"]["state"] == "ok"
        assert (await cli(daemon, "snapshot", "show", "vda@one")).code == 0
        assert await read_export(daemon, "vda@one") == OLD
        assert await read_export(daemon, "vda@one", structured=False) == OLD
        await soon(free_some(daemon))
        await guest.write(SIZE - MiB, NEW)


async def free_some(daemon: Daemon) -> None:
    assert (await cli(daemon, "snapshot", "delete", "vda@one")).code == 0
    await snapshot(daemon, "vda", name="one", on_error="break-guest-write")


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
async def test_a_limit_is_of_one_snapshot_alone(short_tmp: Path, policy: str) -> None:
    """An older and a newer snapshot of the same disk, and one of another, have what they need."""
    disks = [short_tmp / f"{name}.raw" for name in ("vda", "vdb")]
    for disk in disks:
        disk.write_bytes(OLD)
    with serving(short_tmp, *disks, disks=2) as daemon:
        await snapshot(daemon, "vda", "vdb", name="older")
        await snapshot(daemon, "vda", name="small", temp_limit=MiB, on_error=policy)
        await snapshot(daemon, "vda", name="newer")
        async with client(daemon, "vda") as guest, client(daemon, "vdb") as other:
            await guest.write(0, NEW)
            error = await guest.error_of(c.NBD_CMD_WRITE, 2 * MiB, MiB, data=NEW)
            breaks_snapshot = policy == "break-snapshot"
            assert error == (0 if breaks_snapshot else c.NBD_ENOSPC)
            await guest.write(0, b"\xcc" * MiB)  # the newer one has these in its own image
            await other.write(0, NEW * 4)
            rows = await listed(daemon)
            states = {name: row["state"] for name, row in rows.items()}
            assert states == {
                "vda@older": "ok",
                "vda@small": "broken" if breaks_snapshot else "ok",
                "vda@newer": "ok",
                "vdb@older": "ok",
            }
            if breaks_snapshot:
                assert "No space" in rows["vda@small"]["error"]
                assert "limit" in rows["vda@small"]["error"]
            for name, state in states.items():
                if state == "ok":
                    assert await read_export(daemon, name) == OLD, name
            assert (await cli(daemon, "snapshot", "delete", "vda@small")).code == 0
            await guest.write(3 * MiB, NEW)
            assert await read_export(daemon, "vda@older") == OLD
            assert await read_export(daemon, "vda@newer") == OLD


async def test_a_snapshot_that_cannot_be_made_changes_nothing(scene: Scene) -> None:
    """The file system of the temporary images is so full that there is no place for a new one."""
    daemon = scene.daemon
    await snapshot(daemon, "vda", name="one", on_error="break-guest-write")
    async with client(daemon, "vda") as guest, client(daemon, "vdb") as other:
        with contextlib.suppress(OSError), (scene.temp.path / "ballast").open("wb", 0) as ballast:
            while ballast.write(bytes(64 << 10)):
                pass
        assert await soon(guest.error_of(c.NBD_CMD_WRITE, 0, MiB, data=NEW)) == c.NBD_ENOSPC
        with contextlib.suppress(OSError):  # no more files either
            for number in itertools.count():
                (scene.temp.path / f"f{number}").touch()
        done = await soon(cli(daemon, "snapshot", "create", "vda", "vdb", "--name", "two"))
        assert done.code == 1
        assert "No space left" in done.err
        assert done.err.count("\n") == 1
        assert list(await listed(daemon)) == ["vda@one"]
        await other.write(0, NEW)
        assert await read_export(daemon, "vda@one") == OLD
