"""kill -9 of the daemon, and its orderly end, under guests that write."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import client as client_talk
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.client_replies import Reply
from tests.support.daemon_process import Daemon
from tests.support.live import (
    KiB,
    MiB,
    clients,
    eventually,
    listed,
    read_export,
    serving,
    snapshot,
    soon,
)
from tests.support.nbd_client import NbdClient

SIZE = 16 * MiB
SLOT = 64 * KiB
LANES = 32


@dataclass
class Ledger:
    """Per slot of the disk: what was sent last, and what was answered last."""

    sent: dict[int, int] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    total: int = 0

    def check(self, content: bytes) -> None:
        """Each slot holds one whole record, no older than the last that was answered."""
        for slot, sent in self.sent.items():
            found = content[slot * SLOT : (slot + 1) * SLOT]
            words = {found[at : at + 8] for at in range(0, SLOT, 4 * KiB)}
            numbers = {int.from_bytes(word, "big") for word in words}
            answered = self.answered.get(slot, 0)
            assert all(answered <= number <= sent for number in numbers), f"slot {slot}"


async def write(one: NbdClient, ledger: Ledger, lane: int, rng: random.Random) -> None:
    """Write records into slots of our own, until the connection ends."""
    number = 0
    while True:
        number += 1
        slot = lane * (SIZE // SLOT // LANES) + rng.randrange(SIZE // SLOT // LANES)
        flags = c.NBD_CMD_FLAG_FUA if number % 16 == 0 else 0
        ledger.sent[slot] = number
        try:
            await one.write(slot * SLOT, number.to_bytes(8, "big") * (SLOT // 8), flags=flags)
            if number % 40 == 0:
                await one.flush()
        except (OSError, EOFError):
            return
        ledger.answered[slot] = number
        ledger.total += 1


async def connect(daemon: Daemon) -> list[NbdClient]:
    found = [await NbdClient.open(str(daemon.socket)) for _ in range(4)]
    for one in found:
        await one.connect("vda")
    return found


@pytest.mark.parametrize("with_snapshot", [False, True])
async def test_what_was_acknowledged_survives_a_kill(
    short_tmp: Path, rng: random.Random, *, with_snapshot: bool
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(SIZE))
    for attempt in range(2):
        ledger = Ledger()
        with serving(short_tmp, disk) as daemon:
            if with_snapshot:
                await snapshot(daemon, "vda", name="one")
                await snapshot(daemon, "vda", name="two")
            ends = await connect(daemon)
            enough = rng.randrange(300, 1200)
            async with asyncio.TaskGroup() as tasks:
                for lane in range(LANES):
                    tasks.create_task(write(ends[lane % 4], ledger, lane, rng))
                await eventually(lambda enough=enough, ledger=ledger: ledger.total > enough)
                assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
            for one in ends:
                await one.close()
        ledger.check(await asyncio.to_thread(disk.read_bytes))

        with serving(short_tmp, disk) as daemon:
            ledger.check(await read_export(daemon, "vda"))
            warnings = daemon.errors().count("of an earlier run is lost")
            assert warnings == (2 * (attempt + 1) if with_snapshot else 0)
            assert await listed(daemon) == {}
            assert not list(daemon.state.glob("vda/snapshots/*"))
            await snapshot(daemon, "vda", name="one")
            assert daemon.stop() == 0
        with disk.open("r+b") as file:  # start again from nothing
            file.write(bytes(SIZE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_orderly_end_keeps_what_was_acknowledged(
    short_tmp: Path, rng: random.Random, number: int
) -> None:
    """Exit code 0 well within the time to drain; each guest hears an answer or an end."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(SIZE))
    ledger = Ledger()
    with serving(short_tmp, disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        ends = await connect(daemon)
        idle = await NbdClient.open(str(daemon.socket))
        await idle.connect("vda@one")
        silent = await NbdClient.open(str(daemon.socket))  # says nothing at all
        async with asyncio.TaskGroup() as tasks:
            for lane in range(LANES):
                tasks.create_task(write(ends[lane % 4], ledger, lane, rng))
            await eventually(lambda: ledger.total > 500)
            began = time.monotonic()
            daemon.process.send_signal(number)
            assert await asyncio.to_thread(daemon.process.wait, 20) == 0
            assert time.monotonic() - began < 10
        # A reset is what a guest sees that was sending when the server closed.
        assert all(isinstance(one.lost, EOFError | ConnectionResetError) for one in ends)
        for one in (*ends, idle, silent):
            await one.close()
        assert not list(daemon.state.glob("vda/snapshots/*"))
        assert "of an earlier run" not in daemon.errors()
    ledger.check(await asyncio.to_thread(disk.read_bytes))


async def test_requests_that_were_sent_before_the_signal_are_answered(short_tmp: Path) -> None:
    """A burst is in the socket when the signal comes: what is answered is done, in any case."""
    disk = short_tmp / "vda.raw"
    disk.write_bytes(bytes(SIZE))
    with serving(short_tmp, disk) as daemon:
        (one, *others) = await connect(daemon)
        waiting = [
            await one.submit(c.NBD_CMD_WRITE, n * SLOT, SLOT, data=bytes([n + 1]) * SLOT)
            for n in range(100)
        ]
        daemon.process.terminate()
        replies: list[Reply | None] = []
        for each in waiting:
            try:
                replies.append(await soon(each))
            except (OSError, EOFError):
                replies.append(None)
        assert await asyncio.to_thread(daemon.process.wait, 20) == 0
        content = await asyncio.to_thread(disk.read_bytes)
        for n, reply in enumerate(replies):
            if reply is not None and not reply.error:
                assert content[n * SLOT : (n + 1) * SLOT] == bytes([n + 1]) * SLOT
        for end in (one, *others):
            await end.close()


async def stalled_reader(daemon: Daemon) -> NbdClient:
    """A client that has asked for much, and reads nothing: it holds up an orderly end."""
    one = await NbdClient.open(str(daemon.socket))
    await one.run(client_talk.connect("vda", structured=True, contexts=()))
    for cookie in range(32):
        request = wire.request(c.NBD_CMD_READ, flags=0, cookie=cookie, offset=0, length=SIZE)
        await one.send(request)
    await eventually(lambda: has_requests(daemon))
    return one


async def has_requests(daemon: Daemon) -> bool:
    return any(row.get("requests", 0) for row in await clients(daemon))


async def test_a_second_signal_is_immediate(short_tmp: Path) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * SIZE)
    with serving(short_tmp, "--drain-timeout", "100", disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        reader = await stalled_reader(daemon)
        daemon.process.terminate()
        await eventually(lambda: "SIGTERM: stopping" in daemon.errors())
        assert daemon.process.poll() is None
        daemon.process.terminate()
        assert await asyncio.to_thread(daemon.process.wait, 5) == 1
        assert not daemon.socket.exists()
        assert not daemon.control.exists()
        await reader.close()
    with serving(short_tmp, disk) as daemon:  # and what it left is no hindrance
        await snapshot(daemon, "vda", name="one")


async def test_a_client_that_reads_nothing_holds_up_the_end_no_longer_than_allowed(
    short_tmp: Path,
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * SIZE)
    with serving(short_tmp, "--drain-timeout", "1", disk) as daemon:
        await snapshot(daemon, "vda", name="one")
        reader = await stalled_reader(daemon)
        daemon.process.terminate()
        assert await asyncio.to_thread(daemon.process.wait, 8) in (0, 1)
        assert not daemon.socket.exists()
        assert not list(daemon.state.glob("vda/snapshots/*"))
        await reader.close()
