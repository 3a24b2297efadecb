"""A live server, with clients that send mutations of what real clients send, plain and after GO.

Whatever they send: no session dies of our own fault, each ends in time, nothing is left of it, and
a well-behaved client on the same server notices nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base.units import KiB
from nbdfleece.datapath.pump import Pump
from nbdfleece.datapath.stream import receive, send_all
from nbdfleece.datapath.tls import TlsStream
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import GREETING
from nbdfleece.server.tls import TlsCredentials
from tests.fuzz.captures import Capture, load_corpus, mutate
from tests.support.nbd_client import NbdClient, connected
from tests.support.nbd_server import Served, pattern, serving
from tests.support.pki import Pki
from tests.support.waiting import until

CORPUS = load_corpus()
OPTIONS = [message for capture in CORPUS for message in capture.handshake[1:]]
REQUESTS = [message for capture in CORPUS for message in capture.transmission]
WORKING = [capture for capture in CORPUS if capture.transmission]

LONG = os.environ.get("NBDFLEECE_LONG") == "1"
BATCHES = 500 if LONG else 25
BATCH = 200  # sessions
AT_ONCE = 8
SOON_S = 10.0
QUIET_SIZE = 256 * KiB

FIXED = wire.CLIENT_FLAGS.pack(c.NBD_FLAG_C_FIXED_NEWSTYLE | c.NBD_FLAG_C_NO_ZEROES)
FLAGS_AND_STARTTLS = FIXED + wire.option(c.NBD_OPT_STARTTLS)


def make_stream(rng: random.Random) -> list[bytes]:
    """Return what a client sends, in the pieces that it sends it in."""
    capture: Capture = rng.choice(WORKING)
    handshake, transmission = list(capture.handshake), list(capture.transmission)
    kind = rng.randrange(4)
    if kind != 0:  # mostly after GO
        transmission = mutate(rng, transmission, REQUESTS)
    if kind <= 1:
        handshake = mutate(rng, handshake, OPTIONS)
    messages = handshake + transmission
    if rng.randrange(2):
        return messages
    stream = b"".join(messages)
    size = rng.choice((13, 100, 5000)) if len(stream) < 5000 else 1 << 16
    return [stream[start : start + size] for start in range(0, len(stream), size)]


async def misbehave(served: Served, rng: random.Random) -> None:
    """Be one client, from the connection to its end."""
    client = await served.open()
    try:
        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
            reading = group.create_task(drain(client))
            with contextlib.suppress(ConnectionError):
                for part in make_stream(rng):
                    await client.send(part)
            if rng.randrange(3) == 0:
                reading.cancel()  # leaves in the middle, replies unread
            else:
                with contextlib.suppress(OSError):  # it has closed already
                    client.half_close()
    finally:
        client.sock.close()


async def misbehave_over_tls(served: Served, rng: random.Random, context: ssl.SSLContext) -> None:
    """Be a client that begins TLS, and sends nonsense for it or over it."""
    client = await served.open()
    stream: TlsStream | None = None
    try:
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(OSError, EOFError):
                await client.receive(len(GREETING))
                await client.send(FLAGS_AND_STARTTLS)
                await client.receive(wire.OPTION_REPLY_HEADER.size)
                if rng.randrange(4) == 0:
                    await client.send(b"".join(mutate(rng, client_hello(context), REQUESTS)))
                    client.half_close()
                    await drain(client)
                    return
                stream = TlsStream(
                    client.sock, context, server_side=False, server_hostname="localhost"
                )
                await stream.handshake()
                await _misbehave_inside(stream, rng)
    finally:
        (stream or client.sock).close()


async def _misbehave_inside(stream: TlsStream, rng: random.Random) -> None:
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(drain_stream(stream))
        with contextlib.suppress(OSError):
            flags, *rest = make_stream(rng)
            for part in [flags[4:], *rest]:  # flags are not sent again
                await send_all(stream, part)
            stream.shutdown(socket.SHUT_WR)
        if rng.randrange(3) == 0:
            reading.cancel()


def client_hello(context: ssl.SSLContext) -> list[bytes]:
    """Return the first thing that a client says for TLS."""
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return [outgoing.read()]


async def drain_stream(stream: TlsStream) -> None:
    with contextlib.suppress(OSError):
        while await receive(stream, 1 << 16):
            pass


async def drain(client: NbdClient) -> None:
    """Read to the end, and keep nothing."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while await loop.sock_recv(client.sock, 1 << 18):
            pass


@asynccontextmanager
async def witness(served: Served, rng: random.Random) -> AsyncIterator[None]:
    """A client that reads and writes all the time, and compares."""
    export = await served.add("quiet", bytes(QUIET_SIZE))
    del export
    expected = bytearray(QUIET_SIZE)
    is_over = False
    rounds = 0

    async def work(client: NbdClient) -> None:
        nonlocal rounds
        while not is_over:
            offset = rng.randrange(QUIET_SIZE)
            length = min(rng.choice((1, 512, 4096, 40_000)), QUIET_SIZE - offset)
            if rng.randrange(2):
                expected[offset : offset + length] = data = rng.randbytes(length)
                await client.write(offset, data)
            async with asyncio.timeout(SOON_S):
                assert await client.read(offset, length) == expected[offset : offset + length]
            rounds += 1

    async with connected(served.path, "quiet") as client, asyncio.TaskGroup() as group:
        group.create_task(work(client))
        yield
        is_over = True
    assert rounds > 50
    assert served.drivers["quiet"].data == expected


Misbehaviour = Callable[[Served, random.Random], Awaitable[None]]


async def batch(served: Served, seed: str, misbehave: Misbehaviour) -> None:
    """Let a batch of clients misbehave, some at a time; return when the server has forgotten them.

    Each has a seed of its own, so that the same bytes are sent again whatever the clients before
    it did.
    """
    numbers = iter(range(BATCH))

    async def clients() -> None:
        for number in numbers:
            try:
                await misbehave(served, random.Random(f"{seed} {number}"))
            except BaseException:
                print(f"client '{seed} {number}'")
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(clients())
    async with asyncio.timeout(SOON_S):
        await until(lambda: len(served.server.sessions) == 1)  # the witness


class Faults(logging.Handler):
    """Writes every line of the log, as a daemon does, and keeps those about our own faults."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        is_fault = record.levelno >= logging.ERROR or "internal error" in text
        if is_fault or not text.isprintable():  # a traceback is not, nor is what a peer slips in
            self.found.append(text)


@pytest.fixture
def faults() -> Iterator[list[str]]:
    """What goes wrong inside. Nothing else is kept of the log: that would look like a leak."""
    handler = Faults()
    loggers = [logging.getLogger(name) for name in ("nbdfleece", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    collecting = [
        (one, one.level)
        for logger in [*loggers, logging.getLogger()]
        for one in logger.handlers
        if one is not handler
    ]
    for one, _ in collecting:
        one.setLevel(logging.ERROR)
    yield handler.found
    for one, level in collecting:
        one.setLevel(level)
    for logger in loggers:
        logger.removeHandler(handler)


def footprint() -> tuple[int, int, int]:
    """Return counts of descriptors, tasks, and blocks of memory."""
    gc.collect()
    blocks = sys.getallocatedblocks()
    return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()), blocks


@contextlib.contextmanager
def counted_transmissions() -> Iterator[Callable[[], int]]:
    """Count the connections that come to transmission; the function tells how many have."""
    real, count = Pump.start, 0

    def start(pump: Pump) -> None:
        nonlocal count
        count += 1
        real(pump)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pump, "start", start)
        yield lambda: count


async def let_misbehave(
    served: Served, seed: int, faults: list[str], one: Misbehaviour, *, batches: int
) -> None:
    """Let many clients misbehave, beside one that does not; see what it leaves behind."""
    served.disk._rng = random.Random(seed)  # its requests take a while
    with counted_transmissions() as transmissions:
        async with witness(served, random.Random(seed)):
            await batch(served, f"{seed} warm", one)
            assert faults == []
            before, warm = footprint(), transmissions()
            for number in range(batches):
                await batch(served, f"{seed} {number}", one)
                assert faults == []
            after = footprint()
    assert transmissions() - warm > batches * BATCH / 4, "most never came to transmission"
    assert served.disk.writes > 0
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 1000 + batches * BATCH // 50
    assert served.drivers["frozen"].data == pattern(len(served.drivers["frozen"].data))


@pytest.mark.slow
@pytest.mark.deadline(1800 if LONG else 300)
async def test_nothing_that_clients_send_harms_the_server(
    short_tmp: Path, seed: int, faults: list[str]
) -> None:
    async with serving(short_tmp) as served:
        await let_misbehave(served, seed, faults, misbehave, batches=BATCHES)


@pytest.mark.slow
@pytest.mark.deadline(1800 if LONG else 300)
async def test_nothing_that_clients_send_over_tls_harms_the_server(
    short_tmp: Path, seed: int, faults: list[str], pki: Pki
) -> None:
    folder = pki.client()
    context = ssl.create_default_context(cafile=folder / "ca-cert.pem")
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")

    async def one(served: Served, rng: random.Random) -> None:
        await misbehave_over_tls(served, rng, context)

    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, credentials=credentials, tls=TlsMode.ALLOW) as served:
        await let_misbehave(
            served, seed, faults, one, batches=BATCHES // 6
        )  # a TLS handshake takes time


@pytest.mark.parametrize("count", [1, 3, 64])
async def test_a_long_write_behind_other_requests_lands_whole(short_tmp: Path, count: int) -> None:
    """The fuzzer has found one that did not: its payload began where it had been."""
    data = random.Random(count).randbytes(300 * KiB)
    async with serving(short_tmp) as served:
        client = await served.open()
        go = wire.option(c.NBD_OPT_EXPORT_NAME, b"disk")
        stream = FIXED + go + _request(c.NBD_CMD_READ, 0, 1) * count
        stream += _request(c.NBD_CMD_WRITE, 0, len(data)) + data
        reply_size = 16
        with contextlib.closing(client.sock):
            await client.send(stream + _request(c.NBD_CMD_READ, 5, 1))
            await client.receive(len(GREETING) + 10 + count * (reply_size + 1))
            async with asyncio.timeout(SOON_S):
                await client.receive(reply_size * 2 + 1)
        assert served.disk.data[: len(data)] == data


async def test_a_client_that_leaves_in_a_long_read_is_no_fault_of_ours(
    short_tmp: Path, faults: list[str]
) -> None:
    """The fuzzer has found that it was: it went on after sending what waited had failed."""
    async with serving(short_tmp) as served:
        served.disk._rng, served.disk._now_share = random.Random(0), 1.0
        client = await served.open()
        await client.connect("disk")
        short = _request(c.NBD_CMD_READ, 0, 4 * KiB) * 20  # replies that wait in the buffer
        client.sock.send(short + _request(c.NBD_CMD_READ, 0, 1 << 20))
        await client.close()
        await until(lambda: not served.server.sessions)
        assert faults == []


def _request(command: int, offset: int, length: int) -> bytes:
    return wire.request(command, flags=0, cookie=1, offset=offset, length=length)


@pytest.mark.parametrize("capture", WORKING, ids=lambda capture: capture.name)
async def test_what_clients_sent_is_served(
    short_tmp: Path, capture: Capture, faults: list[str]
) -> None:
    """The captures themselves: or the mutations would be of what nobody sends."""
    async with serving(short_tmp) as served:
        client = await served.open()
        for message in capture.handshake + capture.transmission:
            await client.send(message)
        client.half_close()
        received = await client.receive_to_end()
        client.sock.close()
        assert len(received) > 16 * len(capture.transmission)
        await until(lambda: not served.server.sessions)
        assert faults == []
