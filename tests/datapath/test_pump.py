"""The transmission phase over a socket pair, against its plain twin and against odd clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import re
import select
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from nbdfleece.base import limits
from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import Extent
from nbdfleece.block.node import Node
from nbdfleece.datapath.pump import Pump, PumpLimits
from nbdfleece.datapath.route import EarlyReply, Route
from nbdfleece.datapath.stream import Stream
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.datapath.workers import Lane
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.client import RemoteExport
from nbdfleece.server.export import READ_ONLY_FLAGS, WRITABLE_FLAGS
from tests.reference.pump import PlainServer
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import BASE, NbdClient
from tests.support.pki import Pki
from tests.support.tls_pair import FORGED, InTheMiddle, cut_in_pieces, socket_pair, tls_pair
from tests.support.waiting import turns, until

KIB, MIB = 1024, 1 << 20


class Line:
    """A pump over a memory node, and the client at the other end."""

    def __init__(
        self,
        driver: MemoryDriver,
        ours: Stream,
        client: NbdClient,
        *,
        structured: bool = True,
        extended: bool = False,
        flags: int = WRITABLE_FLAGS,
        limits: PumpLimits | None = None,
    ) -> None:
        self.driver = driver
        self.node = Node("disk", driver, read_only=False, discard_enabled=True)
        self.node.size = len(driver.data)
        chunks = structured or extended
        contexts = [(context, self.node.block_status) for context in (7, 3)] if chunks else []
        route = Route(self.node, size=self.node.size, flags=flags)
        self.pump = Pump(
            ours,
            route,
            structured=structured,
            extended=extended,
            contexts=contexts,
            leftover=b"",
            limits=limits or PumpLimits(),
        )
        self.client = client
        self.client.contexts = {BASE: 7}
        remote = RemoteExport(self.node.size, flags)
        self.client.begin_transmission(remote, structured=structured, extended=extended)
        self.pump.start()

    async def close(self) -> None:
        self.driver.held.set()
        self.pump.abort("the test is over")
        await self.pump.closed
        await self.client.close()


MakeLine = Callable[..., Awaitable[Line]]


@pytest.fixture
async def line(pki: Pki) -> AsyncIterator[MakeLine]:
    """Makes lines: with `tls` over TLS, with `piece` cut into pieces of so many bytes."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            driver: MemoryDriver, *, tls: bool = False, piece: int = 0, **more: object
        ) -> Line:
            if piece:
                pair = await stack.enter_async_context(cut_in_pieces(piece))
            else:
                pair = socket_pair()
            ours: Stream = pair[0]
            client = NbdClient(pair[1])
            if tls:
                ours, client.tls = await tls_pair(pki, pair)
            made = Line(driver, ours, client, **more)
            stack.push_async_callback(made.close)
            return made

        yield make


MODES = {
    "simple": {"structured": False},
    "structured": {"structured": True},
    "extended": {"structured": True, "extended": True},
}
every = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
over_both = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


# --- the twin ------------------------------------------------------------------------------------


def choose_request(rng: random.Random, size: int, *, extended: bool) -> tuple[int, int, int, int]:
    """Return (command, flags, offset, length): mostly legal, sometimes anything."""
    command = rng.choice([0, 0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 6, 7])
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
    if extended and command not in (c.NBD_CMD_READ, c.NBD_CMD_WRITE) and rng.random() < 0.05:
        length = rng.choice([2**32, 2**63, 2**64 - 1])
    if rng.random() < 0.02 and command != c.NBD_CMD_WRITE:
        command = rng.choice([8, 9, 77])
    return command, flags, offset, length


def choose_payload(
    rng: random.Random, command: int, flags: int, length: int, *, extended: bool
) -> tuple[int, int, bytes]:
    """Return (flags, length field, payload): what a WRITE has, and sometimes something else."""
    if command == c.NBD_CMD_WRITE:
        return flags, length, rng.randbytes(length)
    if not extended or rng.random() < 0.7:
        return flags, length, b""
    if command == c.NBD_CMD_BLOCK_STATUS:
        contexts = rng.choice([[7], [3], [7, 3], [3, 7], [3, 3], [8], [], [7, 3, 9]])
        payload = wire.status_filter(length % 2**64, contexts)
        if rng.random() < 0.1:
            payload = payload[: rng.randrange(1, len(payload))]
    elif rng.random() < 0.2:
        payload = rng.randbytes(rng.choice([1, 28, 32, 70_000]))
    else:
        return flags, length, b""
    return flags | c.NBD_CMD_FLAG_PAYLOAD_LEN, len(payload), payload


async def compare(
    server: Line, twin: PlainServer, rng: random.Random, rounds: int, size: int
) -> None:
    """Ask both the same and compare the answers."""
    extended = twin.extended
    for _ in range(rounds):
        command, flags, offset, length = choose_request(rng, size, extended=extended)
        flags, field, payload = choose_payload(rng, command, flags, length, extended=extended)
        expected = twin.carry_out(command, flags, offset, field, payload)
        reply = await server.client.ask(command, offset, field, flags=flags, data=payload)
        asked = (command, flags, offset, field, payload[:100])
        assert reply.error == expected.error, asked
        if not expected.error:
            assert bytes(reply.data) == expected.data, asked
            assert reply.status == expected.status, asked
    assert server.driver.data == twin.disk
    assert server.pump.requests == rounds


@over_both
@every
@pytest.mark.parametrize("now_share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("flags", [WRITABLE_FLAGS, READ_ONLY_FLAGS], ids=["writable", "read-only"])
async def test_every_reply_is_that_of_the_plain_twin(
    line: MakeLine,
    rng: random.Random,
    mode: dict[str, bool],
    tls: bool,
    now_share: float,
    flags: int,
    long_run: bool,
) -> None:
    size = 2 * MIB + 777
    disk = bytearray(rng.randbytes(size))
    disk[100_000:900_000] = bytes(800_000)
    driver = MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=now_share)
    server = await line(driver, tls=tls, flags=flags, **mode)
    twin = PlainServer(
        disk, flags, contexts=tuple(context for context, _ in server.pump.contexts), **mode
    )
    await compare(server, twin, rng, 3000 if long_run else 200, size)


@over_both
@every
@pytest.mark.parametrize("piece", [1, 2, 7])
async def test_how_the_stream_is_cut_makes_no_difference(
    line: MakeLine, rng: random.Random, mode: dict[str, bool], tls: bool, piece: int
) -> None:
    size = 20_000
    disk = bytearray(rng.randbytes(size // 2)) + bytearray(size - size // 2)
    driver = MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=0.5)
    server = await line(driver, tls=tls, piece=piece, **mode)
    contexts = tuple(context for context, _ in server.pump.contexts)
    twin = PlainServer(disk, WRITABLE_FLAGS, contexts=contexts, **mode)
    await compare(server, twin, rng, 15, size)


@over_both
@every
async def test_many_requests_at_once_each_get_their_own_reply(
    line: MakeLine, rng: random.Random, mode: dict[str, bool], tls: bool
) -> None:
    disk = rng.randbytes(4 * MIB)
    driver = MemoryDriver(bytearray(disk), random.Random(rng.random()), now_share=0.5)
    server = await line(driver, tls=tls, **mode)

    async def read_some() -> None:
        for _ in range(20):
            offset = rng.randrange(len(disk))
            length = 1 + int((len(disk) - offset - 1) * rng.random() ** 4)
            assert await server.client.read(offset, length) == disk[offset : offset + length]

    async with asyncio.TaskGroup() as group:
        for _ in range(40):
            group.create_task(read_some())


@over_both
async def test_the_largest_reads_and_writes_come_through(
    line: MakeLine, rng: random.Random, tls: bool
) -> None:
    size = limits.MAX_PAYLOAD
    driver = MemoryDriver(bytearray(size), random.Random(rng.random()), now_share=1.0)
    server = await line(driver, tls=tls)
    data = rng.randbytes(size)
    await server.client.write(0, data)
    assert driver.data == data
    assert await server.client.read(0, size) == data
    assert await server.client.read(0, size, flags=c.NBD_CMD_FLAG_DF) == data
    assert (server.pump.bytes_written, server.pump.bytes_read) == (size, 2 * size)


@over_both
@every
async def test_writes_that_follow_close_on_each_other_all_land(
    line: MakeLine, rng: random.Random, mode: dict[str, bool], tls: bool
) -> None:
    """Short and long ones, wherever in the inbox their headers and payloads come to lie."""
    lengths = [rng.choice([1, 512, 4096, 65_536, 65_537, 200_000]) for _ in range(60)]
    driver = MemoryDriver(bytearray(sum(lengths)), random.Random(rng.random()))
    server = await line(driver, tls=tls, **mode)
    disk = rng.randbytes(sum(lengths))
    futures = []
    offset = 0
    for length in lengths:
        data = disk[offset : offset + length]
        flags = rng.choice([0, c.NBD_CMD_FLAG_FUA])
        submit = server.client.submit(c.NBD_CMD_WRITE, offset, length, flags=flags, data=data)
        futures.append(await submit)
        offset += length
    assert [(await future).error for future in futures] == [0] * len(lengths)
    assert driver.data == disk


# --- content of replies --------------------------------------------------------------------------


async def test_zeroes_go_out_as_holes(line: MakeLine) -> None:
    disk = bytearray(MIB)
    disk[: 64 * KIB] = b"d" * 64 * KIB
    server = await line(MemoryDriver(disk))
    reply = await server.client.ask(c.NBD_CMD_READ, 64 * KIB, 64 * KIB)
    assert [kind for kind, _, _ in reply.chunks] == [c.NBD_REPLY_TYPE_OFFSET_HOLE]
    reply = await server.client.ask(c.NBD_CMD_READ, 0, 64 * KIB)
    assert [kind for kind, _, _ in reply.chunks] == [c.NBD_REPLY_TYPE_OFFSET_DATA]


@pytest.mark.parametrize("length", [64 * KIB, MIB])
async def test_a_read_with_df_comes_in_one_chunk(line: MakeLine, length: int) -> None:
    server = await line(MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=1.0))
    reply = await server.client.ask(c.NBD_CMD_READ, 0, length, flags=c.NBD_CMD_FLAG_DF)
    assert len(reply.chunks) == 1
    assert bytes(reply.data) == b"x" * length


@pytest.mark.parametrize("one", [True, False])
async def test_block_status_covers_the_request_and_merges(line: MakeLine, one: bool) -> None:
    disk = bytearray(MIB)
    disk[: 8 * KIB] = b"d" * 8 * KIB
    server = await line(MemoryDriver(disk))
    flags = c.NBD_CMD_FLAG_REQ_ONE if one else 0
    extents = await server.client.status(0, MIB, flags=flags)
    assert extents == [(8 * KIB, 0), (MIB - 8 * KIB, 3)][: 1 if one else 2]
    assert await server.client.status(100, 50, flags=flags) == [(50, 0)]


async def test_of_two_contexts_one_failing_there_is_exactly_one_error_reply(
    line: MakeLine,
) -> None:
    """T-N11: QEMU 7.2 sends an error and then goes on with the other context."""
    server = await line(MemoryDriver(bytearray(MIB)))

    async def fail(_offset: int, _length: int) -> list[Extent]:
        raise IoError(errno.EACCES, "no status")

    for contexts in ([(1, fail), (7, server.node.block_status)],
                     [(7, server.node.block_status), (1, fail)]):  # fmt: skip
        server.pump.contexts = contexts
        reply = await server.client.ask(c.NBD_CMD_BLOCK_STATUS, 0, MIB)
        assert reply.error == c.NBD_EINVAL
        assert await server.client.read(0, 512) == bytes(512)


async def test_contexts_of_one_reply_cover_the_same_range(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)))

    async def short(offset: int, length: int) -> list[Extent]:
        return [Extent(offset, min(length, 1000 - offset % 1000), offset // 1000 % 2)]

    server.pump.contexts = [(7, server.node.block_status), (1, short)]
    flags = c.NBD_CMD_FLAG_REQ_ONE
    reply = await server.client.ask(c.NBD_CMD_BLOCK_STATUS, 0, MIB, flags=flags)
    assert reply.status == {7: [(1000, 3)], 1: [(1000, 0)]}


async def test_an_error_after_part_of_a_long_read_is_told_behind_it(line: MakeLine) -> None:
    """E8: content chunks, then an error chunk that ends the reply."""
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=0.0)
    server = await line(driver)
    original = driver.read

    async def fail_late(offset: int, view: memoryview) -> None:
        if offset >= 512 * KIB:
            raise IoError(errno.EIO, "late")
        await original(offset, view)

    driver.read = fail_late  # type: ignore[method-assign]
    reply = await server.client.ask(c.NBD_CMD_READ, 0, MIB)
    assert reply.error == c.NBD_EIO
    assert sum(length for _, _, length in reply.chunks) == 512 * KIB


@every
async def test_an_error_tells_no_names_of_nodes_or_paths(
    line: MakeLine, mode: dict[str, bool]
) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.fail["read"] = errno.EIO
    server = await line(driver, **mode)
    reply = await server.client.ask(c.NBD_CMD_READ, 0, 4096)
    assert reply.error == c.NBD_EIO
    assert "disk" not in (reply.text or "")


# --- odd clients -----------------------------------------------------------------------------


async def test_a_refused_write_is_read_to_its_end_and_the_next_request_parses(
    line: MakeLine,
) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), flags=READ_ONLY_FLAGS)
    for length in (1, 4096, MIB, limits.MAX_PAYLOAD + 1):
        error = await server.client.error_of(c.NBD_CMD_WRITE, 0, length, data=bytes(length))
        assert error == c.NBD_EPERM
        assert await server.client.read(0, 10) == bytes(10)


async def test_a_write_over_the_limit_is_refused_and_a_monstrous_one_ends_the_connection(
    line: MakeLine,
) -> None:
    disk = MemoryDriver(bytearray(limits.MAX_PAYLOAD + MIB))
    server = await line(disk)
    length = limits.MAX_PAYLOAD + 1
    error = await server.client.error_of(c.NBD_CMD_WRITE, 0, length, data=bytes(length))
    assert error == c.NBD_EINVAL
    await server.client.write(0, b"x" * limits.MAX_PAYLOAD)
    assert disk.data[limits.MAX_PAYLOAD - 1] == ord("x")
    header = wire.request(1, flags=0, cookie=1, offset=0, length=limits.MAX_DRAINED_PAYLOAD + 1)
    await server.client.send(header)
    await server.client.wait_closed()
    assert "payload of" in (await server.pump.closed or "")


async def test_a_bad_magic_closes_the_connection(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)))
    await server.client.send(b"\0" * 28)
    await server.client.wait_closed()
    assert "magic" in (await server.pump.closed or "")


@over_both
@pytest.mark.parametrize("cut", [1, 27, 28, 29, 28 + 65536, 28 + 100_000 - 1])
async def test_a_write_that_is_cut_short_is_not_carried_out(
    line: MakeLine, tls: bool, cut: int
) -> None:
    driver = MemoryDriver(bytearray(MIB))
    server = await line(driver, tls=tls)
    whole = wire.request(1, flags=0, cookie=1, offset=0, length=100_000) + b"x" * 100_000
    await server.client.send(whole[:cut])
    server.client.half_close()
    assert "inside a request" in (await server.pump.closed or "")
    assert driver.writes == 0
    assert driver.data == bytearray(MIB)


@over_both
@pytest.mark.parametrize("ending", ["half-close", "DISC"])
async def test_what_was_received_before_the_end_is_carried_out_and_replied_to(
    line: MakeLine, tls: bool, ending: str
) -> None:
    driver = MemoryDriver(bytearray(MIB), random.Random(3))
    server = await line(driver, tls=tls)
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


@over_both
async def test_a_client_that_reads_nothing_is_not_read_from(line: MakeLine, tls: bool) -> None:
    """P2: what waits for it is bounded, and its requests are not begun."""
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=1.0)
    server = await line(driver, tls=tls)
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


@over_both
async def test_a_drain_does_not_wait_for_a_client_that_does_not_read(
    line: MakeLine, tls: bool
) -> None:
    """P6, for reads that need waiting for the disk."""
    driver = MemoryDriver(bytearray(b"x" * 8 * MIB), random.Random(1), now_share=0.0)
    server = await line(driver, tls=tls)
    assert server.client._reader is not None
    server.client._reader.cancel()
    await server.client.send(wire.request(0, flags=0, cookie=1, offset=0, length=8 * MIB))
    await until(lambda: server.pump.requests)
    server.pump.pause()
    await server.pump.wait_idle()
    assert server.pump.in_flight == 0
    server.pump.resume()


@over_both
async def test_a_paused_pump_begins_nothing_and_goes_on_where_it_was(
    line: MakeLine, tls: bool
) -> None:
    driver = MemoryDriver(bytearray(b"x" * MIB))
    server = await line(driver, tls=tls)
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


@over_both
async def test_requests_in_flight_are_bounded_without_refusing_any(
    line: MakeLine, tls: bool
) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = await line(driver, tls=tls)
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


@over_both
async def test_a_reset_with_reads_queued_harms_nobody_else(line: MakeLine, tls: bool) -> None:
    """As CVE-2017-10664."""
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=0.5)
    victim, other = (
        await line(driver, tls=tls),
        await line(MemoryDriver(bytearray(b"y" * MIB)), tls=tls),
    )
    await victim.client.send(wire.request(0, flags=0, cookie=1, offset=0, length=65536) * 64)
    victim.client.reset()
    await victim.pump.closed
    assert victim.pump.in_flight == 0
    assert await other.client.read(0, MIB) == b"y" * MIB


@over_both
async def test_writes_of_a_client_that_is_gone_are_carried_out(line: MakeLine, tls: bool) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = await line(driver, tls=tls)
    await server.client.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"w" * 4096)
    await until(lambda: server.pump.in_flight)
    server.pump.abort("gone")
    assert not server.pump.closed.done()
    driver.held.set()
    await server.pump.closed
    assert driver.writes == 1


# --- limits, and the end of an export ------------------------------------------------------------


async def test_requests_in_flight_are_as_many_as_the_limits_say(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = await line(driver, limits=PumpLimits(requests=3))
    futures = [
        await server.client.submit(c.NBD_CMD_WRITE, n * 512, 512, data=b"w" * 512)
        for n in range(10)
    ]
    await until(lambda: server.pump.in_flight == 3)
    await turns(50)
    assert server.pump.in_flight == 3
    driver.held.set()
    assert [(await future).error for future in futures] == [0] * 10


async def test_bytes_in_flight_are_as_many_as_the_limits_say(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = await line(driver, limits=PumpLimits(bytes_in_flight=10_000))
    futures = [
        await server.client.submit(c.NBD_CMD_WRITE, n * 4096, 4096, data=b"w" * 4096)
        for n in range(10)
    ]
    await until(lambda: server.pump.in_flight == 3)
    await turns(50)
    assert server.pump.in_flight == 3
    driver.held.set()
    assert [(await future).error for future in futures] == [0] * 10


async def test_status_requests_count_by_what_they_may_find(line: MakeLine) -> None:
    """Each may gather a hundred thousand extents, for every context."""
    driver = MemoryDriver(bytearray(64 * MIB))
    driver.hold.add("block_status")
    server = await line(driver)
    for _ in range(10):
        await server.client.submit(c.NBD_CMD_BLOCK_STATUS, 0, 64 * MIB)
    await until(lambda: server.pump.in_flight)
    await turns(50)
    assert server.pump.in_flight < 4


@over_both
async def test_a_client_that_takes_nothing_is_dropped(line: MakeLine, tls: bool) -> None:
    driver = MemoryDriver(bytearray(b"x" * 4 * MIB), random.Random(1), now_share=1.0)
    server = await line(driver, tls=tls, limits=PumpLimits(stall_s=0.05))
    assert server.client._reader is not None
    server.client._reader.cancel()
    header = wire.request(0, flags=0, cookie=1, offset=0, length=4 * MIB)
    await server.client.send(header)
    assert await server.pump.closed == "the client takes no data for 0.05 s"


@over_both
async def test_an_idle_client_is_dropped(line: MakeLine, tls: bool) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), tls=tls, limits=PumpLimits(idle_s=0.1))
    assert await server.client.read(0, 512) == bytes(512)
    await server.client.send(wire.request(0, flags=0, cookie=1, offset=0, length=512)[:20])
    assert await server.pump.closed == "the client asks for nothing for 0.1 s"
    assert server.pump.requests == 1


async def test_a_connection_that_is_closed_is_not_watched_any_more(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), limits=PumpLimits(idle_s=1000.0))
    server.pump.abort("over")
    timer = server.pump._idle._timer
    assert timer is not None
    assert timer.cancelled()


async def test_a_client_whose_request_takes_long_is_not_idle(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("read")
    server = await line(driver, limits=PumpLimits(idle_s=0.01))
    future = await server.client.submit(c.NBD_CMD_READ, 0, 512)
    looks = 0
    original = server.pump._idle._progress

    def counted() -> tuple[int, int] | None:
        nonlocal looks
        looks += 1
        return original()

    server.pump._idle._progress = counted
    await until(lambda: looks > 20)
    driver.held.set()
    assert (await future).error == 0


@every
async def test_once_retired_all_is_refused_but_what_had_begun(
    line: MakeLine, mode: dict[str, bool]
) -> None:
    """P7, NBD_ESHUTDOWN for the rest of the client's days."""
    driver = MemoryDriver(bytearray(b"x" * 4 * MIB), random.Random(1), now_share=1.0)
    driver.hold.add("write")
    server = await line(driver, **mode)
    client = server.client
    begun = await client.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"w" * 4096)
    half_here = await client.submit(c.NBD_CMD_WRITE, 4096, 4096, data=b"v" * 4095)
    await until(lambda: server.pump.in_flight)
    server.pump.retire()
    driver.held.set()
    assert (await begun).error == 0
    await client.send(b"v")
    assert (await half_here).error == c.NBD_ESHUTDOWN
    for command, length in (
        (c.NBD_CMD_READ, 4096),
        (c.NBD_CMD_READ, MIB),
        (c.NBD_CMD_READ, 0),
        (c.NBD_CMD_FLUSH, 0),
        (c.NBD_CMD_TRIM, 4096),
        (c.NBD_CMD_BLOCK_STATUS, 4096),
        (77, 0),
    ):
        assert await client.error_of(command, 0, length) == c.NBD_ESHUTDOWN, command
    for length in (1, 4096, MIB):
        error = await client.error_of(c.NBD_CMD_WRITE, 0, length, data=bytes(length))
        assert error == c.NBD_ESHUTDOWN
    assert driver.writes == 1
    await client.disconnect()
    assert await server.pump.closed is None


async def test_a_long_payload_that_was_coming_in_is_refused_after_retirement(
    line: MakeLine,
) -> None:
    driver = MemoryDriver(bytearray(4 * MIB))
    server = await line(driver)
    data = b"w" * MIB
    future = await server.client.submit(c.NBD_CMD_WRITE, 0, MIB, data=data[: MIB // 2])
    await until(lambda: server.pump.requests)
    server.pump.retire()
    await server.client.send(data[MIB // 2 :])
    assert (await future).error == c.NBD_ESHUTDOWN
    assert driver.writes == 0


async def test_a_long_read_half_sent_ends_in_an_error_after_retirement(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(b"x" * 32 * MIB), random.Random(1), now_share=1.0)
    server = await line(driver)
    future = await server.client.submit(c.NBD_CMD_READ, 0, 32 * MIB)
    await until(lambda: server.pump.bytes_read)
    assert server.pump._longs
    server.pump.retire()
    read = server.pump.bytes_read
    reply = await future
    assert reply.error == c.NBD_ESHUTDOWN
    assert reply.text == "the export is being removed"
    assert server.pump.bytes_read == read


# --- extended headers ----------------------------------------------------------------------------


async def test_one_extended_extent_tells_of_a_whole_disk(line: MakeLine) -> None:
    """And 32-bit ones are cut, aligned."""
    disk = 1 << 50

    async def all_alike(offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, 1)]

    for extended, told in ((True, disk), (False, limits.MAX_EXTENT_LENGTH)):
        server = await line(MemoryDriver(bytearray(MIB)), extended=extended)
        server.pump.route.size = disk
        server.pump.contexts = [(7, all_alike)]
        for flags in (0, c.NBD_CMD_FLAG_REQ_ONE):
            length = disk if extended else 2**32 - 1
            assert await server.client.status(0, length, flags=flags) == [(told, 1)]


async def test_a_status_is_of_the_contexts_that_are_asked_for(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), extended=True)
    for chosen in ([7], [3], [3, 7]):
        reply = await server.client.ask(
            c.NBD_CMD_BLOCK_STATUS,
            0,
            length=8 + 4 * len(chosen),
            flags=c.NBD_CMD_FLAG_PAYLOAD_LEN,
            data=wire.status_filter(MIB, chosen),
        )
        assert reply.status == {context: [(MIB, 3)] for context in chosen}


@pytest.mark.parametrize("length", [1, 7, 8, 11, 13, 16, 17, 4096, 100_000])
async def test_a_bad_status_filter_is_read_to_its_end_and_refused(
    line: MakeLine, length: int
) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), extended=True)
    server.pump.contexts = server.pump.contexts[:1]
    error = await server.client.error_of(
        c.NBD_CMD_BLOCK_STATUS,
        0,
        length=length,
        flags=c.NBD_CMD_FLAG_PAYLOAD_LEN,
        data=wire.status_filter(MIB, [3] * 30_000)[:length],
    )
    assert error == c.NBD_EINVAL
    assert await server.client.read(0, 512) == bytes(512)


async def test_lengths_of_64_bits_are_refused_where_they_are_too_long(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), extended=True)
    longest = 2**64 - 1
    for command, error in (
        (c.NBD_CMD_TRIM, c.NBD_EINVAL),
        (c.NBD_CMD_CACHE, c.NBD_EINVAL),
        (c.NBD_CMD_BLOCK_STATUS, c.NBD_EINVAL),
        (c.NBD_CMD_WRITE_ZEROES, c.NBD_ENOSPC),
    ):
        for offset in (0, 1, longest):
            assert await server.client.error_of(command, offset, longest) == error


@pytest.mark.parametrize("length", [2**32, 2**63, 2**64 - 1])
async def test_a_read_longer_than_any_disk_is_refused(line: MakeLine, length: int) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), extended=True)
    assert server.client._reader is not None
    server.client._reader.cancel()
    await asyncio.wait([server.client._reader])
    await server.client.send(wire.extended_request(0, flags=0, cookie=9, offset=5, length=length))
    header = await server.client.receive(wire.EXTENDED_CHUNK_HEADER.size)
    magic, flags, kind, cookie, offset, _ = wire.EXTENDED_CHUNK_HEADER.unpack(header)
    assert (magic, flags, kind) == (c.NBD_EXTENDED_REPLY_MAGIC, 1, c.NBD_REPLY_TYPE_ERROR)
    assert (cookie, offset) == (9, 5)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (wire.extended_request(1, flags=0, cookie=1, offset=0, length=2**32), "payload of"),
        (wire.extended_request(1, flags=32, cookie=1, offset=0, length=2**63), "payload of"),
        (
            wire.extended_request(77, flags=32, cookie=1, offset=0, length=limits.MAX_PAYLOAD + 1),
            "payload of",
        ),
        (wire.request(0, flags=0, cookie=1, offset=0, length=512) + bytes(4), "magic"),
    ],
    ids=[
        "monstrous WRITE without the flag",
        "monstrous WRITE",
        "monstrous payload",
        "compact header",
    ],
)
async def test_what_cannot_be_skipped_ends_the_connection(
    line: MakeLine, header: bytes, reason: str
) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), extended=True)
    await server.client.send(header)
    assert reason in (await server.pump.closed or "")


async def test_an_extended_header_is_no_compact_one(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)))
    await server.client.send(wire.extended_request(0, flags=0, cookie=1, offset=0, length=512))
    assert "magic" in (await server.pump.closed or "")


# --- TLS -----------------------------------------------------------------------------------------


async def test_what_tls_holds_back_is_worked_on_without_a_word_from_the_socket(
    line: MakeLine,
) -> None:
    """The requests fill the inbox and more, and no poll of the socket announces the rest."""
    driver = MemoryDriver(bytearray(MIB))
    driver.hold.add("write")
    server = await line(driver, tls=True, limits=PumpLimits(requests=4))
    count = 400

    async def ask(number: int) -> int:
        return await server.client.error_of(c.NBD_CMD_WRITE, number * 1024, 1024, data=bytes(1024))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(number)) for number in range(count)]
        await until(lambda: server.pump.in_flight == 4)
        await turns(50)
        assert server.pump.in_flight == 4
        driver.hold.clear()
        driver.held.set()
    assert [task.result() for task in tasks] == [0] * count


async def test_bytes_left_in_tls_are_taken_when_reading_goes_on(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    server = await line(driver, tls=True)
    stream = server.pump._stream
    assert isinstance(stream, TlsStream)
    server.pump.pause()
    server.pump._update_reader()
    future = await server.client.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"w" * 4096)
    stream._receive_raw(may_wait=False)  # the socket is empty from now on
    assert stream.pending()
    await turns(20)
    assert server.pump.requests == 0
    server.pump.resume()
    assert (await future).error == 0


async def test_a_client_that_floods_over_tls_leaves_others_their_turn(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(b"x" * MIB), random.Random(1), now_share=1.0)
    flood, other = await line(driver, tls=True), await line(MemoryDriver(bytearray(MIB)), tls=True)

    async def pour() -> None:
        while True:
            data = await flood.client.submit(c.NBD_CMD_WRITE, 0, MIB, data=bytes(MIB))
            await data

    task = asyncio.get_running_loop().create_task(pour())
    await until(lambda: flood.pump.requests > 2)
    for _ in range(20):
        assert await other.client.read(0, 4096) == bytes(4096)
    task.cancel()


@pytest.mark.parametrize("ending", ["DISC", "goodbye"])
async def test_a_proper_end_is_told_by_tls(line: MakeLine, ending: str) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), tls=True)
    future = await server.client.submit(c.NBD_CMD_READ, 0, 4096)
    stream = server.client.tls
    assert stream is not None
    if ending == "DISC":
        await server.client.send(wire.request(2, flags=0, cookie=9, offset=0, length=0))
    else:
        with contextlib.suppress(ssl.SSLError):
            stream._ssl.unwrap()
        stream._send_own()
    assert (await future).error == 0
    assert await server.client.wait_closed() is None
    assert await server.pump.closed is None
    stream._ssl.unwrap()  # raises unless the other side has said goodbye


async def test_an_abort_is_no_proper_end(line: MakeLine) -> None:
    server = await line(MemoryDriver(bytearray(MIB)), tls=True)
    await server.client.read(0, 512)
    server.pump.abort("kicked")
    await server.client.wait_closed()
    assert server.client.tls is not None
    with pytest.raises(ssl.SSLError):
        server.client.tls._ssl.unwrap()


async def test_a_forged_record_ends_the_connection(line: MakeLine) -> None:
    driver = MemoryDriver(bytearray(MIB))
    server = await line(driver, tls=True)
    request = wire.request(1, flags=0, cookie=1, offset=0, length=4) + b"evil"
    server.client.sock.send(b"\x17\x03\x03" + (len(request) + 16).to_bytes(2) + request + bytes(16))
    assert re.search(f"receive failed: {FORGED}", await server.pump.closed or "")
    assert driver.writes == 0


async def test_a_client_that_makes_tls_answer_and_does_not_read_is_not_read_from(
    line: MakeLine,
) -> None:
    """As P2, where what waits for the socket are words of TLS itself."""
    driver = MemoryDriver(bytearray(MIB))
    server = await line(driver, tls=True)
    stream, client = server.pump._stream, server.client
    assert isinstance(stream, TlsStream)
    assert client._reader is not None
    client._reader.cancel()
    with contextlib.suppress(BlockingIOError):
        while True:
            stream._sock.send(bytes(10_000))
    stream._outgoing.write(bytes(5000))
    await client.send(wire.request(1, flags=0, cookie=1, offset=0, length=4) + b"word")
    await turns(50)
    assert server.pump.requests == 0
    assert not server.pump._reading
    with contextlib.suppress(BlockingIOError):
        while client.sock.recv(MIB):
            pass
    await until(lambda: driver.writes)
    assert server.pump._reading


async def test_a_reply_waits_for_the_rest_of_the_clients_message(line: MakeLine) -> None:
    """TLS cannot send while it has half a message of its own from the client."""
    server = await line(MemoryDriver(bytearray(MIB)), tls=True)
    stream = server.pump._stream
    assert isinstance(stream, TlsStream)
    engine = stream._ssl
    is_whole = False
    stream._ssl = InTheMiddle(engine, lambda: not is_whole)  # type: ignore[assignment]
    future = await server.client.submit(c.NBD_CMD_READ, 0, 4096)
    await until(lambda: server.pump._out.blocked)
    assert not asyncio.get_running_loop().remove_writer(
        stream.fileno()
    )  # it would be called always
    is_whole = True
    assert (await future).error == 0
    assert not server.pump._out.blocked


# --- replies of worker threads --------------------------------------------------------------------


class InThreads(MemoryDriver):
    """Writes in a worker thread, which replies as drivers of plain files do.

    Attributes:
        lane: Of that thread.
        replied: How many writes had a reply to send early.
        fail_behind: Raise when the reply has gone out: a bug.
        go: Writes wait for it in the thread.
    """

    def __init__(self, data: bytearray) -> None:
        super().__init__(data, random.Random(0), now_share=1.0)
        self.lane = Lane("test", 1)
        self.replied = 0
        self.fail_behind = False
        self.go = threading.Event()
        self.go.set()

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        def call() -> None:
            assert self.go.wait(30)
            self.data[offset : offset + len(data)] = data
            self.replied += reply is not None

        await self.lane.submit(call, reply)
        if self.fail_behind:
            raise IoError(errno.EIO, "behind the reply")


@every
@pytest.mark.parametrize("count", [1, 20])
async def test_writes_are_answered_while_the_event_loop_is_elsewhere(
    line: MakeLine, mode: dict[str, bool], count: int
) -> None:
    driver = InThreads(bytearray(MIB))
    server = await line(driver, **mode)
    server.pump.route.write_replying = server.node.write_replying
    driver.go.clear()
    futures = [
        await server.client.submit(c.NBD_CMD_WRITE, 4096 * number, 4096, data=b"w" * 4096)
        for number in range(count)
    ]
    await until(lambda: server.pump.in_flight == count)
    await turns(2)  # the calls are handed over at the end of the turn
    driver.go.set()
    readable, _, _ = select.select([server.client.sock], [], [], 30)  # the loop stands still
    assert readable
    assert server.pump.in_flight == count
    for future in futures:
        assert (await future).error == 0
    await until(lambda: not server.pump.in_flight)
    assert driver.replied == count
    assert driver.data[: 4096 * count] == b"w" * 4096 * count
    driver.lane.close()


@over_both
@every
async def test_early_replies_and_others_mix_into_one_good_stream(
    line: MakeLine, rng: random.Random, mode: dict[str, bool], tls: bool
) -> None:
    disk = bytearray(rng.randbytes(4 * MIB))
    driver = InThreads(bytearray(disk))
    server = await line(driver, tls=tls, **mode)
    server.pump.route.write_replying = server.node.write_replying
    for _ in range(150):
        at = rng.randrange(MIB)
        data = rng.randbytes(rng.randrange(1, 5000))
        future = await server.client.submit(c.NBD_CMD_WRITE, at, len(data), data=data)
        reads = []
        for _ in range(rng.randrange(4)):  # of another part of the disk, some of them long
            start = rng.randrange(2 * MIB, 3 * MIB)
            length = rng.choice([1, 4096, 300_000, MIB])
            reads.append((start, length, await server.client.submit(0, start, length)))
        assert (await future).error == 0
        disk[at : at + len(data)] = data
        for start, length, reading in reads:
            assert (await reading).data == disk[start : start + length]
    assert driver.data == disk
    assert (driver.replied > 0) == (not tls)
    driver.lane.close()


async def test_writes_with_fua_wait_for_the_loop(line: MakeLine) -> None:
    driver = InThreads(bytearray(MIB))
    server = await line(driver)
    server.pump.route.write_replying = server.node.write_replying
    await server.client.write(0, b"w" * 512, flags=c.NBD_CMD_FLAG_FUA)
    assert driver.replied == 0
    driver.lane.close()


async def test_a_failure_behind_the_reply_ends_the_connection(
    line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    driver = InThreads(bytearray(MIB))
    driver.fail_behind = True
    server = await line(driver)
    server.pump.route.write_replying = server.node.write_replying
    assert (await server.client.ask(c.NBD_CMD_WRITE, 0, 512, data=b"w" * 512)).error == 0
    assert await server.pump.closed == "internal error"
    assert "behind its reply" in caplog.text
    driver.lane.close()
