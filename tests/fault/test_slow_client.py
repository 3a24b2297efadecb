"""Clients that stop in the middle: of reading replies, of sending a request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import client as client_talk
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.client_replies import ReplyParser
from tests.support.daemon_process import Daemon
from tests.support.live import (
    KiB,
    MiB,
    blocks,
    cli,
    client,
    clients,
    eventually,
    listed,
    read_export,
    serving,
    snapshot,
    soon,
)
from tests.support.nbd_client import NbdClient

SIZE = 32 * MiB
OLD = blocks(SIZE, 64 * KiB)
READS = 64
QUICK_S = 5.0  # for a command, with the start of its interpreter


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    disks = [short_tmp / f"{name}.raw" for name in ("vda", "vdb")]
    for disk in disks:
        disk.write_bytes(OLD)
    with serving(short_tmp, *disks, disks=2) as running:
        yield running


async def lazy(
    daemon: Daemon, export: str, *, structured: bool = True, length: int = MiB
) -> NbdClient:
    """A client that asks for 64 reads, and reads no byte of the replies."""
    one = await NbdClient.open(str(daemon.socket))
    talk = client_talk.connect(export, structured=structured, contexts=())
    await one.run(talk)
    for number in range(READS):
        header = wire.request(
            c.NBD_CMD_READ,
            flags=0,
            cookie=number,
            offset=number * length % SIZE,
            length=length,
        )
        await one.send(header)
    await eventually(lambda: has_begun(daemon))
    return one


async def has_begun(daemon: Daemon) -> bool:
    return any(row.get("requests", 0) > 0 for row in await clients(daemon))


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_who_does_not_read_live_data_holds_up_nobody(
    daemon: Daemon, *, structured: bool
) -> None:
    idle = await lazy(daemon, "vda", structured=structured)
    async with client(daemon, "vda") as guest, client(daemon, "vdb") as other:
        await soon(guest.write(0, b"\xaa" * MiB))
        await soon(guest.flush())
        await soon(snapshot(daemon, "vda", "vdb", name="one"), QUICK_S)
        await soon(guest.write(0, b"\xbb" * 4 * MiB))
        await soon(other.write(0, b"\xbb" * 4 * MiB))
        assert await soon(read_export(daemon, "vda@one")) == b"\xaa" * MiB + OLD[MiB:]
        assert (await soon(cli(daemon, "snapshot", "delete", "vda@one"), QUICK_S)).code == 0
        assert await soon(read_export(daemon, "vdb@one")) == OLD
    await idle.close()
    await eventually(lambda: nobody(daemon))


async def nobody(daemon: Daemon) -> bool:
    return not await clients(daemon)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_a_late_reader_of_a_snapshot_gets_the_instant_all_the_same(
    daemon: Daemon, *, structured: bool
) -> None:
    """Replies wait in the server while the guest overwrites all that they were made of."""
    await snapshot(daemon, "vda", name="one")
    reader = await lazy(daemon, "vda@one", structured=structured)
    async with client(daemon, "vda") as guest:
        for offset in range(0, SIZE, 4 * MiB):
            await soon(guest.write(offset, b"\xee" * 4 * MiB))
        await soon(guest.trim(0, SIZE // 2))
        await soon(snapshot(daemon, "vda", name="two"), QUICK_S)
        await soon(guest.write(0, b"\xdd" * MiB))

    # Now it reads; replies come in any order.
    found = await soon(replies(reader, structured=structured), 25)
    assert sorted(found) == list(range(READS))
    for number, data in found.items():
        at = number * MiB % SIZE
        assert data == OLD[at : at + MiB], f"request {number}"
    await reader.close()
    assert (await listed(daemon))["vda@one"]["state"] == "ok"


async def replies(reader: NbdClient, *, structured: bool) -> dict[int, bytes]:
    """Read and return the data of all replies, by cookie."""
    parser = ReplyParser(structured=structured)
    for number in range(READS):
        parser.expect(number, c.NBD_CMD_READ, offset=number * MiB % SIZE, length=MiB)
    found: dict[int, bytes] = {}
    loop = asyncio.get_running_loop()
    while len(found) < READS:
        received = await loop.sock_recv(reader.sock, 1 << 18)
        assert received, "the server closed"
        for reply in parser.feed(received):
            assert reply.error == 0
            found[reply.cookie] = bytes(reply.data)
    return found


@pytest.mark.parametrize("export", ["vda", "vda@one"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_who_does_not_read_costs_little_memory(
    daemon: Daemon, export: str, *, structured: bool
) -> None:
    """Replies of 512 MiB in all are asked for; what the daemon may take under load is 200 MiB."""
    await snapshot(daemon, "vda", name="one")
    idle = await lazy(daemon, export, structured=structured, length=8 * MiB)
    for _ in range(3):
        await soon(read_export(daemon, "vdb"))
    peak = peak_memory(daemon)
    await idle.close()
    assert peak < 200 * MiB


def peak_memory(daemon: Daemon) -> int:
    """Return the most bytes that the daemon has ever held at a time."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return peak * KiB


async def test_a_snapshot_with_a_reader_that_stands_still_is_deleted_by_force(
    daemon: Daemon,
) -> None:
    await snapshot(daemon, "vda", name="one")
    reader = await lazy(daemon, "vda@one")
    async with client(daemon, "vda") as guest:
        refused = await soon(cli(daemon, "snapshot", "delete", "vda@one"), QUICK_S)
        assert refused.code == 4
        done = await soon(cli(daemon, "snapshot", "delete", "--force", "vda@one"), QUICK_S)
        assert done.code == 0
        await soon(guest.write(0, b"\xaa" * MiB))
    assert await listed(daemon) == {}
    await soon(reader.receive_to_end(), 25)
    await reader.close()


async def test_half_a_write_holds_up_nobody_and_changes_nothing(daemon: Daemon) -> None:
    """The payload stops in the middle; a snapshot is taken; then the client goes."""
    slow = await NbdClient.open(str(daemon.socket))
    await slow.run(client_talk.connect("vda", structured=True, contexts=()))
    header = wire.request(c.NBD_CMD_WRITE, flags=0, cookie=1, offset=0, length=8 * MiB)
    await slow.send(header + b"\xee" * 3 * MiB)
    async with client(daemon, "vda") as guest:
        await soon(snapshot(daemon, "vda", name="one"), QUICK_S)
        await soon(guest.write(16 * MiB, b"\xaa" * MiB))
        await soon(guest.flush())
        await slow.close()
        await eventually(lambda: is_alone(daemon))
        assert await soon(guest.read(0, 8 * MiB)) == OLD[: 8 * MiB]
        assert await soon(read_export(daemon, "vda@one")) == OLD


async def is_alone(daemon: Daemon) -> bool:
    return len(await clients(daemon)) == 1


async def test_a_monitor_that_reads_nothing_holds_up_nobody(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(daemon.control))
        monitor.setblocking(False)
        monitor.send(b'{"execute":"qmp_capabilities"}\n')
        request = b'{"execute":"query-commands"}\n' * 2000
        sent = 0
        while sent < 20 * len(request):
            try:
                sent += monitor.send(request)
            except BlockingIOError:
                break
        await soon(snapshot(daemon, "vda", name="one"), QUICK_S)
        assert "vda@one" in await soon(listed(daemon), QUICK_S)
        async with client(daemon, "vda") as guest:
            await soon(guest.write(0, b"\xaa" * MiB))
