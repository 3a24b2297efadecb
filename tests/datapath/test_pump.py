"""The transmission phase over a socket pair, against its plain twin and against odd clients."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from nbdfleece.base import limits
from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import Extent
from nbdfleece.block.node import Node
from nbdfleece.datapath.pump import Pump
from nbdfleece.datapath.route import Route
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.client import RemoteExport
from nbdfleece.server.export import READ_ONLY_FLAGS, WRITABLE_FLAGS
from tests.reference.pump import PlainServer
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import BASE, NbdClient
from tests.support.waiting import turns, until

KIB, MIB = 1024, 1 << 20


class Line:
    """A pump over a memory node, and the client at the other end."""

    def __init__(
        self, driver: MemoryDriver, *, structured: bool, flags: int = WRITABLE_FLAGS
    ) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.driver = driver
        self.node = Node("disk", driver, read_only=False, discard_enabled=True)
        self.node.size = len(driver.data)
        contexts = [(7, self.node.block_status)] if structured else []
        route = Route(self.node, size=self.node.size, flags=flags)
        self.pump = Pump(ours, route, structured=structured, contexts=contexts, leftover=b"")
        self.client = NbdClient(theirs)
        self.client.contexts = {BASE: 7}
        remote = RemoteExport(self.node.size, flags)
        self.client.begin_transmission(remote, structured=structured)
        self.pump.start()

    async def close(self) -> None:
        self.driver.held.set()
        self.pump.abort("the test is over")
        await self.pump.closed
        await self.client.close()


MakeLine = Callable[..., Line]


@pytest.fixture
async def line() -> AsyncIterator[MakeLine]:
    lines: list[Line] = []

    def make(driver: MemoryDriver, *, structured: bool = True, **more: int) -> Line:
        lines.append(Line(driver, structured=structured, **more))
        return lines[-1]

    yield make
    for each in lines:
        await each.close()


both = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


# --- the twin ------------------------------------------------------------------------------------


def choose_request(rng: random.Random, size: int) -> tuple[int, int, int, int]:
    """Return (command, flags, offset, length): mostly legal, sometimes anything."""
    command = rng.choice([0, 0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 6])
    offset = rng.randrange(size)
    length = 1 + int((size - offset - 1) * rng.random() ** 6)
    flags = 0
    if command == c.NBD_CMD_FLUSH:
        offset = length = 0
    if rng.random() < 0.15:
        flags = rng.choice([1, 2, 4, 8, 16])
    if rng.random() < 0.05:
        offset = rng.choice([0, size, size - 1, size + 1, 2**64 - 1, 2**63])
    if rng.random() < 0.05:
        length = rng.choice([0, 1, size, 70_000])
    if rng.random() < 0.02 and command != c.NBD_CMD_WRITE:
        command = rng.choice([8, 9, 77])
    return command, flags, offset, length


@both
@pytest.mark.parametrize("now_share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("flags", [WRITABLE_FLAGS, READ_ONLY_FLAGS], ids=["writable", "read-only"])
async def test_every_reply_is_that_of_the_plain_twin(
    line: MakeLine,
    rng: random.Random,
    structured: bool,
    now_share: float,
    flags: int,
    long_run: bool,
) -> None:
    size = 2 * MIB + 777
    disk = bytearray(rng.randbytes(size))
    disk[100_000:900_000] = bytes(800_000)
    server = line(
        MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=now_share),
        structured=structured,
        flags=flags,
    )
    twin = PlainServer(disk, flags, structured, structured)
    for _ in range(3000 if long_run else 300):
        command, request_flags, offset, length = choose_request(rng, size)
        payload = rng.randbytes(length) if command == c.NBD_CMD_WRITE else b""
        expected = twin.carry_out(command, request_flags, offset, length, payload)
        reply = await server.client.ask(command, offset, length, flags=request_flags, data=payload)
        assert reply.error == expected.error, (command, request_flags, offset, length)
        if not expected.error:
            assert bytes(reply.data) == expected.data, (command, request_flags, offset, length)
    assert server.driver.data == disk


@both
async def test_many_requests_at_once_each_get_their_own_reply(
    line: MakeLine, rng: random.Random, structured: bool
) -> None:
    disk = rng.randbytes(4 * MIB)
    server = line(
        MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=0.5),
        structured=structured,
    )

    async def read_some() -> None:
        for _ in range(20):
            offset = rng.randrange(len(disk))
            length = 1 + int((len(disk) - offset - 1) * rng.random() ** 4)
            assert await server.client.read(offset, length) == disk[offset : offset + length]

    async with asyncio.TaskGroup() as group:
        for _ in range(40):
            group.create_task(read_some())


# --- content of replies --------------------------------------------------------------------------


async def test_zeroes_go_out_as_holes(line: MakeLine) -> None:
    disk = bytearray(MIB)
    disk[: 64 * KIB] = b"d" * 64 * KIB
    server = line(MemoryDriver(disk))
    reply = await server.client.ask(c.NBD_CMD_READ, 64 * KIB, 64 * KIB)
    assert [kind for kind, _, _ in reply.chunks] == [c.NBD_REPLY_TYPE_OFFSET_HOLE]
    reply = await server.client.ask(c.NBD_CMD_READ, 0, 64 * KIB)
    assert [kind for kind, _, _ in reply.chunks] == [c.NBD_REPLY_TYPE_OFFSET_DATA]


@pytest.mark.parametrize("length", [64 * KIB, MIB])
async def test_a_read_with_df_comes_in_one_chunk(line: MakeLine, length: int) -> None:
    server = line(MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=1.0))
    reply = await server.client.ask(c.NBD_CMD_READ, 0, length, flags=c.NBD_CMD_FLAG_DF)
    assert len(reply.chunks) == 1
    assert bytes(reply.data) == b"x" * length


@pytest.mark.parametrize("one", [True, False])
async def test_block_status_covers_the_request_and_merges(line: MakeLine, one: bool) -> None:
    disk = bytearray(MIB)
    disk[: 8 * KIB] = b"d" * 8 * KIB
    server = line(MemoryDriver(disk))
    flags = c.NBD_CMD_FLAG_REQ_ONE if one else 0
    extents = await server.client.status(0, MIB, flags=flags)
    assert extents == [(8 * KIB, 0), (MIB - 8 * KIB, 3)][: 1 if one else 2]
    assert await server.client.status(100, 50, flags=flags) == [(50, 0)]


async def test_of_two_contexts_one_failing_there_is_exactly_one_error_reply(
    line: MakeLine,
) -> None:
    """T-N11: QEMU 7.2 sends an error and then goes on with the other context."""
    server = line(MemoryDriver(bytearray(MIB)))

    async def fail(_offset: int, _length: int) -> list[Extent]:
        raise IoError(errno.EACCES, "no status")

    for contexts in ([(1, fail), (7, server.node.block_status)],
                     [(7, server.node.block_status), (1, fail)]):  # fmt: skip
        server.pump.contexts = contexts
        reply = await server.client.ask(c.NBD_CMD_BLOCK_STATUS, 0, MIB)
        assert reply.error == c.NBD_EINVAL
        assert await server.client.read(0, 512) == bytes(512)


async def test_contexts_of_one_reply_cover_the_same_range(line: MakeLine) -> None:
    server = line(MemoryDriver(bytearray(MIB)))

    async def short(offset: int, length: int) -> list[Extent]:
        return [Extent(offset, min(length, 1000 - offset % 1000), offset // 1000 % 2)]

    server.pump.contexts = [(7, server.node.block_status), (1, short)]
    flags = c.NBD_CMD_FLAG_REQ_ONE
    reply = await server.client.ask(c.NBD_CMD_BLOCK_STATUS, 0, MIB, flags=flags)
    assert reply.status == {7: [(1000, 3)], 1: [(1000, 0)]}


async def test_an_error_after_part_of_a_long_read_is_told_behind_it(line: MakeLine) -> None:
    """E8: content chunks, then an error chunk that ends the reply."""
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=0.0)
    server = line(driver)
    original = driver.read

    async def fail_late(offset: int, view: memoryview) -> None:
        if offset >= 512 * KIB:
            raise IoError(errno.EIO, "late")
        await original(offset, view)

    driver.read = fail_late  # type: ignore[method-assign]
    reply = await server.client.ask(c.NBD_CMD_READ, 0, MIB)
    assert reply.error == c.NBD_EIO
    assert sum(length for _, _, length in reply.chunks) == 512 * KIB


@both
async def test_an_error_tells_no_names_of_nodes_or_paths(line: MakeLine, structured: bool) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.fail["read"] = errno.EIO
    server = line(driver, structured=structured)
    reply = await server.client.ask(c.NBD_CMD_READ, 0, 4096)
    assert reply.error == c.NBD_EIO
    assert "disk" not in (reply.text or "")


# --- odd clients -----------------------------------------------------------------------------


async def test_a_refused_write_is_read_to_its_end_and_the_next_request_parses(
    line: MakeLine,
) -> None:
    server = line(MemoryDriver(bytearray(MIB)), flags=READ_ONLY_FLAGS)
    for length in (1, 4096, MIB, limits.MAX_PAYLOAD + 1):
        error = await server.client.error_of(c.NBD_CMD_WRITE, 0, length, data=bytes(length))
        assert error == c.NBD_EPERM
        assert await server.client.read(0, 10) == bytes(10)


async def test_a_write_over_the_limit_is_refused_and_a_monstrous_one_ends_the_connection(
    line: MakeLine,
) -> None:
    disk = MemoryDriver(bytearray(limits.MAX_PAYLOAD + MIB))
    server = line(disk)
    length = limits.MAX_PAYLOAD + 1
    error = await server.client.error_of(c.NBD_CMD_WRITE, 0, length, data=bytes(length))
    assert error == c.NBD_EINVAL
    await server.client.write(0, b"x" * limits.MAX_PAYLOAD)
    assert disk.data[limits.MAX_PAYLOAD - 1] == ord("x")
    header = wire.request(1, flags=0, cookie=1, offset=0, length=limits.MAX_DRAINED_PAYLOAD + 1)
    await server.client.send(header)
    await server.client.wait_closed()
    assert "write of" in (await server.pump.closed or "")


async def test_a_bad_magic_closes_the_connection(line: MakeLine) -> None:
    server = line(MemoryDriver(bytearray(MIB)))
    await server.client.send(b"\0" * 28)
    await server.client.wait_closed()
    assert "magic" in (await server.pump.closed or "")


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 28 + 65536, 28 + 100_000 - 1])
async def test_a_write_that_is_cut_short_is_not_carried_out(line: MakeLine, cut: int) -> None:
    driver = MemoryDriver(bytearray(MIB))
    server = line(driver)
    whole = wire.request(1, flags=0, cookie=1, offset=0, length=100_000) + b"x" * 100_000
    await server.client.send(whole[:cut])
    server.client.half_close()
    assert "inside a request" in (await server.pump.closed or "")
    assert driver.writes == 0
    assert driver.data == bytearray(MIB)


@pytest.mark.parametrize("ending", ["half-close", "DISC"])
async def test_what_was_received_before_the_end_is_carried_out_and_replied_to(
    line: MakeLine, ending: str
) -> None:
    driver = MemoryDriver(bytearray(MIB), random.Random(3))
    server = line(driver)
    futures = [
        await server.client.submit(c.NBD_CMD_WRITE, n * 8192, 4096, data=b"w" * 4096)
        for n in range(50)
    ]
    futures.append(await server.client.submit(c.NBD_CMD_READ, 512 * KIB, 300 * KIB))
    if ending == "DISC":
        await server.client.send(wire.request(2, flags=0, cookie=9, offset=0, length=0))
    else:
        server.client.half_close()
    replies = await _all(futures)
    assert [reply.error for reply in replies] == [0] * 51
    assert await server.pump.closed is None
    assert driver.writes == 50


async def _all(futures: list[asyncio.Future[object]]) -> list[object]:
    return [await future for future in futures]


async def test_a_client_that_reads_nothing_is_not_read_from(line: MakeLine) -> None:
    """P2: what waits for it is bounded, and its requests are not begun."""
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=1.0)
    server = line(driver)
    server.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert server.client._reader is not None
    server.client._reader.cancel()
    header = wire.request(0, flags=0, cookie=1, offset=0, length=256 * KIB)
    loop = asyncio.get_running_loop()
    sender = loop.create_task(server.client.send(header * 10_000))
    begun = -1
    while begun != server.pump.requests:
        begun = server.pump.requests
        await turns(50)
    assert begun < 50
    sender.cancel()


async def test_a_drain_does_not_wait_for_a_client_that_does_not_read(line: MakeLine) -> None:
    """P6, for reads that need waiting for the disk."""
    driver = MemoryDriver(bytearray(b"x" * 8 * MIB), random.Random(1), now_share=0.0)
    server = line(driver)
    assert server.client._reader is not None
    server.client._reader.cancel()
    await server.client.send(wire.request(0, flags=0, cookie=1, offset=0, length=8 * MIB))
    await until(lambda: server.pump.requests)
    server.pump.pause()
    await server.pump.wait_idle()
    assert server.pump.in_flight == 0
    server.pump.resume()


async def test_a_paused_pump_begins_nothing_and_goes_on_where_it_was(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(b"x" * MIB))
    server = line(driver)
    server.pump.pause()
    server.pump.pause()
    write = await server.client.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"w" * 4096)
    read = await server.client.submit(c.NBD_CMD_READ, 4096, 4096)
    await turns(20)
    server.pump.resume()
    await turns(20)
    assert server.pump.requests == 0
    server.pump.resume()
    assert (await write).error == 0
    assert bytes((await read).data) == b"x" * 4096


async def test_requests_in_flight_are_bounded_without_refusing_any(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = line(driver)
    futures = [
        await server.client.submit(c.NBD_CMD_WRITE, n * 512, 512, data=b"w" * 512)
        for n in range(limits.MAX_REQUESTS_IN_FLIGHT + 50)
    ]
    await until(lambda: server.pump.in_flight == limits.MAX_REQUESTS_IN_FLIGHT)
    await turns(50)
    assert server.pump.in_flight == limits.MAX_REQUESTS_IN_FLIGHT
    driver.hold.clear()
    driver.held.set()
    for future in futures:
        assert (await future).error == 0


async def test_a_reset_with_reads_queued_harms_nobody_else(line: MakeLine) -> None:
    """As CVE-2017-10664."""
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=0.5)
    victim, other = line(driver), line(MemoryDriver(bytearray(b"y" * MIB)))
    await victim.client.send(wire.request(0, flags=0, cookie=1, offset=0, length=65536) * 64)
    victim.client.reset()
    await victim.pump.closed
    assert victim.pump.in_flight == 0
    assert await other.client.read(0, MIB) == b"y" * MIB


async def test_writes_of_a_client_that_is_gone_are_carried_out(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = line(driver)
    await server.client.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"w" * 4096)
    await until(lambda: server.pump.in_flight)
    server.pump.abort("gone")
    assert not server.pump.closed.done()
    driver.held.set()
    await server.pump.closed
    assert driver.writes == 1
