"""Driver `nbd` and its connections: lost, stuck, hostile, several, and over TLS."""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base import limits
from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.units import GiB, MiB
from nbdfleece.block.drivers.nbd import links, unflushed
from nbdfleece.block.drivers.nbd.driver import NbdDriver
from nbdfleece.block.drivers.nbd.target import ClientTls
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.datapath.step import background
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.server.export import ExportOptions
from tests.support import nbd_peers
from tests.support.driver_kit import fails, make_image, open_descriptors, read, remove_all
from tests.support.memory import MemoryDriver
from tests.support.nbd_peers import OPEN_S, Peer, add, scripted, upstream, upstream_tcp
from tests.support.nbd_script import Backend, export
from tests.support.nbd_server import Served, serving
from tests.support.pki import Pki
from tests.support.waiting import until

Programs = Callable[[str], str]
PLAIN = c.NBD_FLAG_HAS_FLAGS | c.NBD_FLAG_SEND_FLUSH
MULTI = PLAIN | c.NBD_FLAG_CAN_MULTI_CONN
EIO = errno.EIO


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    for node in graph:
        node.driver.yank()
    await remove_all(graph)


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """Put servers here; they are stopped at the end."""
    started: list[Peer] = []
    yield started
    for peer in started:
        peer.stop()


@pytest.fixture(params=["qemu-nbd", "nbdkit"])
def peer(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    short_tmp: Path,
    program: Programs,
    peers: list[Peer],
) -> Peer:
    """A server of 1 MiB at the socket `s`, which can be killed and started again."""
    image = make_image(tmp_path / "image", 1 * MiB)
    if request.param == "qemu-nbd":
        made = nbd_peers.qemu_nbd(program("qemu-nbd"), image, short_tmp / "s", "--export-name=x")
    else:
        made = restartable_nbdkit(program, image, short_tmp / "s")
    peers.append(made)
    return made


def restartable_nbdkit(program: Programs, image: Path, path: Path) -> Peer:
    """Removing the socket of the one before is what a service manager would do."""
    made = nbd_peers.nbdkit(program("nbdkit"), image, path)

    class Restartable(Peer):
        def start(self) -> None:
            path.unlink(missing_ok=True)
            super().start()

    made.stop()
    return Restartable(*made.command)


def driver_of(node: Node) -> NbdDriver:
    assert isinstance(node.driver, NbdDriver)
    return node.driver


def connections(node: Node) -> int:
    return len(driver_of(node)._links._up)


# --- a server that is killed ---------------------------------------------------------------------


async def test_requests_wait_for_a_killed_server(graph: Graph, peer: Peer, short_tmp: Path) -> None:
    node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
    await node.write(0, memoryview(b"before"), fua=False)

    peer.kill()
    await until(lambda: connections(node) == 0)
    running = [
        background(node.write(100, memoryview(b"during"), fua=True)),
        background(node.read(0, memoryview(bytearray(6)))),
        background(node.flush()),
    ]
    peer.start()
    for each in running:
        await each

    assert await read(node, 0, 6) == b"before"
    assert await read(node, 100, 6) == b"during"


@pytest.mark.slow
async def test_histories_go_on_over_crashes(
    graph: Graph, peer: Peer, short_tmp: Path, rng: random.Random
) -> None:
    """Requests in flight at the crash are sent again: all succeed, and nothing is torn or stale."""
    node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
    model = bytearray(node.size)
    crashes = 3
    stripes = 8
    done = False

    async def guest(index: int, choice: random.Random) -> None:
        width = node.size // stripes
        while not done:
            offset = index * width + choice.randrange(width)
            length = 1 + choice.randrange((index + 1) * width - offset)
            if choice.random() < 0.5:
                data = choice.randbytes(length)
                await background(node.write(offset, memoryview(data), fua=False))
                model[offset : offset + length] = data
            else:
                view = memoryview(bytearray(length))
                await background(node.read(offset, view))
                assert view == model[offset : offset + length]

    async with asyncio.TaskGroup() as group:
        for index in range(stripes):
            group.create_task(guest(index, random.Random(rng.random())))
        for _ in range(crashes):
            await asyncio.sleep(rng.random() * 0.3)  # the moment of the crash, not a wait
            peer.kill()
            await until(lambda: connections(node) == 0)
            peer.start()
            await until(lambda: connections(node) > 0)
        done = True

    assert await read(node, 0, node.size) == model


async def test_without_a_delay_a_lost_server_is_lost_for_ever(
    graph: Graph, peer: Peer, short_tmp: Path
) -> None:
    node = await add(graph, upstream(short_tmp / "s"))
    peer.kill()
    await until(lambda: connections(node) == 0)
    assert await fails(node.read(0, memoryview(bytearray(6)))) == EIO

    peer.start()
    other = await add(graph, upstream(short_tmp / "s"))  # so it is there again
    assert len(await read(other, 0, 10)) == 10
    assert await fails(node.read(0, memoryview(bytearray(6)))) == EIO
    assert await fails(node.flush()) == EIO


async def test_when_the_delay_is_over_requests_fail_and_the_node_heals_later(
    graph: Graph, peer: Peer, short_tmp: Path
) -> None:
    node = await add(graph, upstream(short_tmp / "s", reconnect_s=0.3))
    peer.kill()
    await until(lambda: connections(node) == 0)
    began = asyncio.get_running_loop().time()
    waiting = background(node.read(0, memoryview(bytearray(6))))

    assert await fails(waiting) == EIO
    assert asyncio.get_running_loop().time() - began > 0.25
    assert await fails(node.write(0, memoryview(b"x"), fua=False)) == EIO  # at once

    peer.start()
    await until(lambda: connections(node) > 0)
    assert len(await read(node, 0, 6)) == 6


CHANGED = {
    "size": export(size=1 * MiB + 512),
    "read-only": export(flags=PLAIN | c.NBD_FLAG_READ_ONLY),
    "no flush": export(flags=c.NBD_FLAG_HAS_FLAGS),
    "smaller maximum": export(flags=PLAIN, maximum=4096),
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
async def test_server_that_comes_back_as_another_is_refused(
    graph: Graph, short_tmp: Path, changed
) -> None:
    backend = Backend(export(flags=PLAIN))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=1.0))
    await until(lambda: connections(node) == 0)
    other = Backend(changed)
    async with other.serving(short_tmp / "s"):
        assert await fails(background(node.read(0, memoryview(bytearray(6))))) == EIO
        assert other.connections > 0
        assert other.requests == [], "it was sent a request"
    async with Backend(export(flags=PLAIN)).serving(short_tmp / "s"):
        await until(lambda: connections(node) > 0)
        assert len(await read(node, 0, 6)) == 6


async def test_server_that_drops_every_connection_is_not_dialled_without_pause(
    graph: Graph, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "NBD_RETRY_S", (0.05, 0.1, 10.0))
    backend = Backend(export(flags=PLAIN))
    async with backend.serving(short_tmp / "s"):
        await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
    dropped = 0

    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dropped
        writer.write(wire.greeting(c.NBD_FLAG_FIXED_NEWSTYLE | c.NBD_FLAG_NO_ZEROES))
        await reader.readexactly(4)
        await backend.haggle(reader, writer)
        dropped += 1

    async with scripted(short_tmp / "s", drop):
        await until(lambda: dropped == 3)
        await asyncio.sleep(0.2)
        assert dropped == 3


async def test_server_that_comes_back_without_block_status_is_refused(
    graph: Graph, short_tmp: Path
) -> None:
    async with Backend(export()).serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=0.4))
    await until(lambda: connections(node) == 0)
    async with Backend(export(), contexts=()).serving(short_tmp / "s"):
        assert await fails(background(node.block_status(0, 10))) == EIO


async def test_server_that_comes_back_without_extended_headers_is_refused(
    graph: Graph, short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests may be too long for plain ones."""
    backend = Backend(export(size=16 * GiB, flags=PLAIN), extended=True, status=[(16 * GiB, 3)])
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
        backend.extended = False
        driver_of(node)._links._up[0]._lose("the test says so")
        running = background(node.block_status(0, node.size))
        await until(lambda: "not the same export" in caplog.text)
        backend.extended = True
        assert [extent.length for extent in await running] == [node.size]


async def test_server_that_comes_back_without_the_export_is_refused(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs, peers: list[Peer]
) -> None:
    image, path = make_image(tmp_path / "image", 1 * MiB), short_tmp / "s"
    peers.append(nbd_peers.qemu_nbd(program("qemu-nbd"), image, path, "--export-name=x"))
    node = await add(graph, upstream(path, reconnect_s=1.0))
    peers[0].kill()
    await until(lambda: connections(node) == 0)
    peers.append(nbd_peers.qemu_nbd(program("qemu-nbd"), image, path, "--export-name=y"))

    assert await fails(background(node.read(0, memoryview(bytearray(6))))) == EIO
    assert connections(node) == 0


# --- opening -------------------------------------------------------------------------------------


async def test_open_waits_for_a_server_that_is_not_there_yet(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs, peers: list[Peer]
) -> None:
    with pytest.raises(CommandError, match="No such file"):
        await add(graph, upstream(short_tmp / "s", open_s=0))
    opening = asyncio.get_running_loop().create_task(add(graph, upstream(short_tmp / "s")))
    await asyncio.sleep(0)
    image = make_image(tmp_path / "image", 4096)
    peers.append(nbd_peers.nbdkit(program("nbdkit"), image, short_tmp / "s"))

    assert (await opening).size == 4096


async def test_open_gives_up_when_its_time_is_over(graph: Graph, short_tmp: Path) -> None:
    before = open_descriptors()
    with pytest.raises(CommandError, match="No such file"):
        await add(graph, upstream(short_tmp / "s", open_s=0.5))
    async with scripted(short_tmp / "silent", never_answer):
        with pytest.raises(CommandError, match="no answer within"):
            await add(graph, upstream(short_tmp / "silent", open_s=0.3))
    assert not list(graph)
    await until(lambda: open_descriptors() == before)


async def never_answer(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_what_is_no_nbd_server_is_refused_at_once(graph: Graph, short_tmp: Path) -> None:
    async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    async with scripted(short_tmp / "s", speak_http):
        with pytest.raises(CommandError, match="not a newstyle NBD server"):
            await add(graph, upstream(short_tmp / "s"))


async def test_refusal_of_the_server_is_told(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs, peers: list[Peer]
) -> None:
    image = make_image(tmp_path / "image", 4096)
    path = short_tmp / "s"
    peers.append(nbd_peers.qemu_nbd(program("qemu-nbd"), image, path, "--export-name=y"))
    await add(graph, upstream(path, "y"))  # it is up

    with pytest.raises(CommandError, match=r"NBD_REP_ERR_UNKNOWN: .*export 'x' not present"):
        await add(graph, upstream(path, open_s=0))


# --- a server that is stuck ----------------------------------------------------------------------


async def test_stuck_server_harms_its_own_node_only_and_can_be_given_up(
    graph: Graph, short_tmp: Path
) -> None:
    before = open_descriptors()
    stuck = Backend(export(flags=MULTI), silent={c.NBD_CMD_READ, c.NBD_CMD_WRITE, c.NBD_CMD_FLUSH})
    async with (
        stuck.serving(short_tmp / "stuck"),
        Backend(export()).serving(short_tmp / "well"),
    ):
        node = await add(graph, upstream(short_tmp / "stuck", reconnect_s=1000.0))
        well = await add(graph, upstream(short_tmp / "well"))
        running = [
            background(node.read(0, memoryview(bytearray(6)))),
            background(node.write(0, memoryview(bytes(MiB)), fua=False)),
            *(background(node.flush()) for _ in range(500)),  # more than can be in flight
        ]
        await until(lambda: len(stuck.requests) > 100)
        assert len(await read(well, 0, 6)) == 6

        assert node.driver.yank()
        assert {await fails(each) for each in running} == {EIO}
        assert node.in_flight == 0
        assert not node.driver.yank()
        assert await fails(node.flush()) == EIO
        await graph.remove(node)
        await graph.remove(well)
    await until(lambda: open_descriptors() == before)


async def test_close_does_not_wait_for_a_server_that_does_not_come_back(
    graph: Graph, short_tmp: Path
) -> None:
    before = open_descriptors()
    async with Backend(export()).serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=1000.0))
    await until(lambda: connections(node) == 0)
    greeted = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeted.set()
        await never_answer(reader, writer)

    async with scripted(short_tmp / "s", hang):
        await greeted.wait()
        began = asyncio.get_running_loop().time()
        await graph.remove(node)
        assert asyncio.get_running_loop().time() - began < 5
    await until(lambda: open_descriptors() == before)


# --- a server that means harm --------------------------------------------------------------------

DONE = c.NBD_REPLY_FLAG_DONE


def chunk(kind: int, payload: bytes, flags: int = DONE) -> bytes:
    made = wire.chunk(kind, payload, flags=flags, cookie=0)
    return made[:8] + b"COOKIE!!" + made[16:]


HOSTILE = {
    "noise": b"\xff" * 100,
    "greeting": wire.greeting(3),
    "simple": wire.simple_reply(0, 0)[:8] + b"COOKIE!!" + bytes(8),
    "another cookie": wire.none_chunk(1 << 60, flags=DONE),
    "elsewhere": chunk(1, wire.CHUNK_OFFSET.pack(1 << 40) + b"x"),
    "before": chunk(1, wire.CHUNK_OFFSET.pack((1 << 64) - 1) + b"x"),
    "twice": chunk(1, wire.CHUNK_OFFSET.pack(0) + b"x", 0) * 2,
    "not whole": chunk(1, wire.CHUNK_OFFSET.pack(0) + b"x"),
    "4 GiB": wire.chunk_header(1, flags=0, cookie=0, length=0xFFFFFFFF).replace(
        bytes(8), b"COOKIE!!", 1
    ),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
async def test_server_that_breaks_the_protocol_is_not_asked_again(
    graph: Graph, short_tmp: Path, raw: bytes
) -> None:
    backend = Backend(export(), raw=raw)
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=1000.0))
        memory = bytearray(b"\xa5" * 30)
        reading = background(node.read(0, memoryview(memory)[10:20]))
        with pytest.raises(IoError, match="broke the protocol"):
            await reading
        assert memory[:10] == memory[20:] == b"\xa5" * 10
        assert await fails(node.flush()) == EIO
        assert backend.connections == 1


async def test_reply_to_a_write_that_is_not_sent_yet_is_a_violation(
    graph: Graph, short_tmp: Path
) -> None:
    """Its payload belongs to the guest again as soon as there is a reply."""

    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = Backend(export(size=64 * MiB))
        writer.write(wire.greeting(3))
        await reader.readexactly(4)
        await backend.haggle(reader, writer)
        *_, cookie, _, _ = wire.REQUEST.unpack(await reader.readexactly(wire.REQUEST.size))
        writer.write(wire.none_chunk(cookie, flags=DONE))
        await writer.drain()
        await asyncio.Event().wait()

    async with scripted(short_tmp / "s", hasty):
        node = await add(graph, upstream(short_tmp / "s"))
        with pytest.raises(IoError, match="not sent to its end"):
            await node.write(0, memoryview(bytes(32 * MiB)), fua=False)


async def test_server_that_ends_in_the_middle_of_a_reply_gives_eio(
    graph: Graph, short_tmp: Path
) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = Backend(export())
        writer.write(wire.greeting(3))
        await reader.readexactly(4)
        await backend.haggle(reader, writer)
        *_, cookie, _, _ = wire.REQUEST.unpack(await reader.readexactly(wire.REQUEST.size))
        writer.write(wire.data_chunk_header(cookie, flags=DONE, offset=0, length=1000) + b"x" * 500)

    async with scripted(short_tmp / "s", half):
        node = await add(graph, upstream(short_tmp / "s"))
        assert await fails(background(node.read(0, memoryview(bytearray(1000))))) == EIO


# --- several connections -------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "count"), [(PLAIN, 1), (MULTI, limits.NBD_CONNECTIONS)])
async def test_several_connections_where_the_server_allows(
    graph: Graph, short_tmp: Path, flags: int, count: int
) -> None:
    backend = Backend(export(flags=flags))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s"))
        await until(lambda: connections(node) == count)
        keeper = driver_of(node)._links
        await until(lambda: not keeper._changed.is_set())  # it is content
        assert backend.connections == count


async def test_fewer_connections_where_the_server_takes_no_more(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs, peers: list[Peer]
) -> None:
    image, path = make_image(tmp_path / "image", 1 * MiB), short_tmp / "s"
    made = nbd_peers.nbdkit(program("nbdkit"), image, path, "--filter=limit", "limit=2")
    peers.append(made)
    node = await add(graph, upstream(path))
    await until(lambda: driver_of(node)._links._wanted == 2)

    assert connections(node) == 2
    await node.write(0, memoryview(b"hello"), fua=False)
    assert await read(node, 0, 5) == b"hello"


@pytest.mark.parametrize("delay_s", [0.0, 1000.0])
async def test_loss_of_one_of_several_connections(
    graph: Graph, short_tmp: Path, delay_s: float
) -> None:
    """Its requests go elsewhere, or fail where nothing is to be sent again; the others go on."""
    backend = Backend(export(flags=MULTI), silent={c.NBD_CMD_READ})
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=delay_s))
        await until(lambda: connections(node) == limits.NBD_CONNECTIONS)
        running = [background(node.read(0, memoryview(bytearray(6)))) for _ in range(4)]
        await until(lambda: len(backend.requests) == 4)  # one on each
        backend.silent.clear()
        lost = driver_of(node)._links._up[1]
        lost._lose("the test says so")
        if delay_s:
            await until(lambda: sum(each.done() for each in running) == 1)
            await until(lambda: connections(node) == limits.NBD_CONNECTIONS)
        else:
            await until(lambda: sum(each.done() for each in running) == 1)
            assert connections(node) == limits.NBD_CONNECTIONS - 1
        outcomes = [await fails(each) for each in running if each.done()]
        assert outcomes == [0 if delay_s else EIO]
        await node.flush()
        node.driver.yank()
        for each in running:
            await fails(each)


async def test_requests_beyond_the_limit_wait_for_their_turn(
    graph: Graph, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "NBD_REQUESTS", 2)
    monkeypatch.setattr(links, "NBD_CONNECTIONS", 2)
    backend = Backend(export(flags=MULTI))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s"))
        await until(lambda: connections(node) == 2)
        running = [background(node.read(at, memoryview(bytearray(6)))) for at in range(50)]
        assert sum(each.pending for each in driver_of(node)._links._up) == 4
        for each in running:
            await each
    assert sorted(request[2] for request in backend.requests) == list(range(50))


# --- TLS -----------------------------------------------------------------------------------------


def tls_server(program: Programs, image: Path, port: int, folder: Path, *options: str) -> Peer:
    return Peer(
        *(program("qemu-nbd"), "-t", "-f", "raw", "-e8", "-x", "x", "-b", "127.0.0.1"),
        *("-p", str(port), "--tls-creds=t", *options, "--object"),
        *(f"tls-creds-x509,id=t,endpoint=server,dir={folder},verify-peer=on", image),
    )


@pytest.fixture
def tls_port(tmp_path: Path, program: Programs, peers: list[Peer], pki: Pki) -> int:
    """A port of qemu-nbd that wants TLS and a client's certificate."""
    port = nbd_peers.free_port()
    image = make_image(tmp_path / "image", 4 * MiB)
    peers.append(tls_server(program, image, port, pki.server))
    return port


async def test_tls_with_a_client_certificate(graph: Graph, tls_port: int, pki: Pki) -> None:
    tls = ClientTls(str(pki.client("guest")), "127.0.0.1")
    node = await add(graph, upstream_tcp(tls_port, "x", tls))
    data = random.Random(1).randbytes(3 * MiB)

    running = [
        background(node.write(at, memoryview(data)[at : at + 100_000], fua=False))
        for at in range(0, len(data), 100_000)
    ]
    for each in running:
        await each
    await node.flush()

    assert await read(node, 0, len(data)) == data
    assert await read(node, 12345, 17) == data[12345:12362]


async def test_tls_by_another_host_name(graph: Graph, tls_port: int, pki: Pki) -> None:
    folder = str(pki.client("guest"))
    node = await add(graph, upstream_tcp(tls_port, "x", ClientTls(folder, "localhost")))
    assert len(await read(node, 0, 10)) == 10

    with pytest.raises(CommandError, match=r"(?i)mismatch"):
        await add(graph, upstream_tcp(tls_port, "x", ClientTls(folder, "elsewhere.example")))


async def test_plaintext_to_a_tls_server_is_refused(graph: Graph, tls_port: int, pki: Pki) -> None:
    tls = ClientTls(str(pki.client("guest")), "127.0.0.1")
    await add(graph, upstream_tcp(tls_port, "x", tls))  # it is up
    with pytest.raises(CommandError, match="requires TLS"):
        await add(graph, upstream_tcp(tls_port, "x", None))


@pytest.mark.parametrize("kind", ["foreign_server", "expired_server"])
async def test_server_whose_certificate_is_no_good_is_refused(
    graph: Graph,
    kind: str,
    tmp_path: Path,
    program: Programs,
    peers: list[Peer],
    pki: Pki,
) -> None:
    port = nbd_peers.free_port()
    image = make_image(tmp_path / "image", 4096)
    folder = getattr(pki, kind)()
    # qemu-nbd itself looks at its certificate first, and would not start.
    options = ("--tls-certificates=" + str(folder), "--tls=require", "--tls-verify-peer")
    peers.append(
        Peer(program("nbdkit"), "-f", "-p", str(port), "-i", "127.0.0.1", *options, "file", image)
    )
    tls = ClientTls(str(pki.client("guest")), "127.0.0.1")
    with pytest.raises(CommandError, match="TLS handshake failed"):
        await add(graph, upstream_tcp(port, "x", tls))


async def test_server_whose_certificate_is_revoked_is_refused(
    graph: Graph, tmp_path: Path, program: Programs, peers: list[Peer]
) -> None:
    pki = Pki(tmp_path / "pki")
    issued = pki.authority.issue([("CN", "localhost")], server=True, hosts=["127.0.0.1"])
    folder = tmp_path / "server"
    issued.write(folder, "server")
    (folder / "ca-cert.pem").write_bytes(pki.authority.pem)
    port = nbd_peers.free_port()
    peers.append(tls_server(program, make_image(tmp_path / "image", 4096), port, folder))
    client = pki.client("guest")
    tls = ClientTls(str(client), "127.0.0.1")
    (client / "ca-crl.pem").write_bytes(pki.authority.crl())
    assert (await add(graph, upstream_tcp(port, "x", tls))).size == 4096

    pki.authority.revoke(issued)
    (client / "ca-crl.pem").write_bytes(pki.authority.crl())
    with pytest.raises(CommandError, match="revoked"):
        await add(graph, upstream_tcp(port, "x", tls))


async def test_server_given_up_while_it_is_dialled_gets_no_connection(
    graph: Graph, short_tmp: Path
) -> None:
    before = open_descriptors()
    backend = Backend(export())
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=1000.0))
    await until(lambda: connections(node) == 0)
    proceed = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend.connections += 1
        await proceed.wait()
        await backend.run(reader, writer)

    async with scripted(short_tmp / "s", slow):
        await until(lambda: backend.connections == 2)
        node.driver.yank()
        proceed.set()
        keeper = driver_of(node)._links._keeper
        assert keeper is not None
        await until(keeper.done)
        assert connections(node) == 0
        await graph.remove(node)
    await until(lambda: open_descriptors() == before)


@pytest.mark.parametrize("kind", ["anonymous_client", "expired_client", "foreign_client"])
async def test_client_that_the_server_does_not_want_gets_no_node(
    graph: Graph, tls_port: int, pki: Pki, kind: str
) -> None:
    await add(graph, upstream_tcp(tls_port, "x", ClientTls(str(pki.client("g")), "127.0.0.1")))
    driver = upstream_tcp(tls_port, "x", ClientTls(str(getattr(pki, kind)()), "127.0.0.1"))
    driver._links._open_timeout_s = 0.0
    with pytest.raises(CommandError):
        await add(graph, driver)


async def test_server_without_tls_is_not_used_where_tls_was_asked_for(
    graph: Graph, short_tmp: Path, peer: Peer, pki: Pki
) -> None:
    tls = ClientTls(str(pki.client("guest")), "localhost")
    with pytest.raises(CommandError, match="NBD_REP_ERR_"):
        await add(graph, upstream(short_tmp / "s", tls=tls))


async def test_plaintext_behind_starttls_is_never_taken_for_tls(
    graph: Graph, short_tmp: Path, pki: Pki
) -> None:
    async def inject(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.greeting(3))
        await reader.readexactly(4 + wire.OPTION_HEADER.size)
        early = wire.option_reply(c.NBD_OPT_EXTENDED_HEADERS, c.NBD_REP_ACK)
        writer.write(wire.option_reply(c.NBD_OPT_STARTTLS, c.NBD_REP_ACK) + early)
        assert await reader.read() == b"", "something was said behind it"

    async with scripted(short_tmp / "s", inject):
        tls = ClientTls(str(pki.client("guest")), "localhost")
        with pytest.raises(CommandError, match="plaintext behind"):
            await add(graph, upstream(short_tmp / "s", tls=tls))


async def test_bad_credentials_are_told_by_file(graph: Graph, tmp_path: Path, pki: Pki) -> None:
    for name, text in (("empty", "No such file"), ("broken", "broken/ca-cert.pem")):
        folder = tmp_path / name
        folder.mkdir()
        if name == "broken":
            (folder / "ca-cert.pem").write_text("no certificate")
        with pytest.raises(CommandError, match=text):
            await add(graph, upstream("/nowhere", tls=ClientTls(str(folder), "x")))


# --- a server that loses what it has not flushed -------------------------------------------------


class Volatile(MemoryDriver):
    """A disk that a power failure takes back to what was flushed."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self.durable = bytes(data)

    async def flush(self) -> None:
        await super().flush()
        self.durable = bytes(self.data)


@asynccontextmanager
async def volatile(folder: Path) -> AsyncIterator[tuple[Served, Volatile]]:
    async with serving(folder) as served:
        disk = Volatile(bytearray(MiB))
        node = await served.add_node(disk)
        served.exports.add(node, ExportOptions("v", "v", writable=True, description=""))
        yield served, disk


async def crash(served: Served, disk: Volatile) -> None:
    """A power failure."""
    disk.data[:] = disk.durable
    there = list(served.server.sessions.values())
    for session in there:
        session.abort("the test says so")
    await until(lambda: not any(session.id in served.server.sessions for session in there))


@pytest.mark.parametrize("fua", [False, True])
async def test_what_was_acknowledged_survives_a_server_that_loses_it(
    graph: Graph, short_tmp: Path, fua: bool
) -> None:
    """Repeated in order, and before anything else is asked of the server."""
    async with volatile(short_tmp) as (served, disk):
        node = await add(graph, upstream(served.path, "v", reconnect_s=OPEN_S))
        await node.write(0, memoryview(b"durable"), fua=False)
        await node.flush()
        await node.write(2, memoryview(b"first"), fua=False)
        await node.write(4, memoryview(b"second"), fua=fua)
        await node.write_zeroes(8, 4, fua=False, may_unmap=True, no_fallback=False)
        await node.discard(4096, 4096)
        expected = await read(node, 0, 8192)
        assert expected[:12] == b"dufisecond\0\0"[:8] + bytes(4)

        await crash(served, disk)
        assert await read(node, 0, 8192) == expected
        await crash(served, disk)
        await node.flush()
        assert disk.durable[:8192] == expected
        driver_of(node).yank()


async def test_a_history_over_crashes_that_lose_data(
    graph: Graph, short_tmp: Path, rng: random.Random
) -> None:
    async with volatile(short_tmp) as (served, disk):
        node = await add(graph, upstream(served.path, "v", reconnect_s=OPEN_S))
        model = bytearray(disk.data)
        for _ in range(150):
            offset = rng.randrange(node.size - 5000)
            length = 1 + rng.randrange(5000)
            kind = rng.randrange(10)
            if kind == 0:
                await crash(served, disk)
            elif kind == 1:
                await node.flush()
                assert disk.durable == model
            elif kind == 2:
                await node.write_zeroes(
                    offset, length, fua=False, may_unmap=False, no_fallback=False
                )
                model[offset : offset + length] = bytes(length)
            elif kind < 7:
                data = rng.randbytes(length)
                await node.write(offset, memoryview(data), fua=False)
                model[offset : offset + length] = data
            else:
                assert await read(node, offset, length) == model[offset : offset + length]
        driver_of(node).yank()


async def test_server_that_does_not_take_the_repetition_is_not_used(
    graph: Graph, short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend(export(flags=PLAIN))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
        await node.write(0, memoryview(b"abcd"), fua=False)
        backend.error = (c.NBD_ENOSPC, b"full")
        driver_of(node)._links._up[0]._lose("the test says so")
        await until(lambda: "does not take" in caplog.text)
        assert connections(node) == 0
        backend.error = None
        await node.flush()
        wanted = (c.NBD_CMD_WRITE, 0, 0, 4)
        flush = (c.NBD_CMD_FLUSH, 0, 0, 0)
        assert backend.requests[-3:] == [wanted, flush, flush]


async def test_what_is_kept_for_repetition_is_bounded(
    graph: Graph, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By flushes of our own; one that fails is told to whom it was for, at the next flush too."""
    monkeypatch.setattr(unflushed, "NBD_UNFLUSHED_BYTES", 1000)
    backend = Backend(export(flags=PLAIN))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
        for _ in range(10):
            await node.write(0, memoryview(bytes(300)), fua=False)
        flushes = [each for each in backend.requests if each[0] == c.NBD_CMD_FLUSH]
        assert len(flushes) == 2
        for _ in range(2):
            await node.write(0, memoryview(bytes(100)), fua=False)
        backend.errors = {c.NBD_CMD_FLUSH: (c.NBD_EIO, b"")}
        assert await fails(background(node.write(0, memoryview(bytes(900)), fua=False))) == EIO
        backend.errors = {}
        assert await fails(background(node.flush())) == EIO
        await node.flush()


async def test_failed_flush_of_our_own_is_told_by_the_next_flush_whatever_comes_between(
    graph: Graph, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about the writes of others, too: a write that fails does not tell them."""
    monkeypatch.setattr(unflushed, "NBD_UNFLUSHED_BYTES", 1000)
    backend = Backend(export(flags=PLAIN))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
        await node.write(0, memoryview(bytes(900)), fua=False)
        backend.errors = {c.NBD_CMD_FLUSH: (c.NBD_EIO, b"")}
        assert await fails(background(node.write(0, memoryview(bytes(900)), fua=False))) == EIO
        backend.errors = {}
        await node.write(0, memoryview(bytes(900)), fua=False)
        await node.write(0, memoryview(bytes(10)), fua=True)
        assert await fails(background(node.flush())) == EIO
        await node.flush()


async def test_reads_go_on_while_the_server_cannot_flush(
    graph: Graph, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unflushed, "NBD_UNFLUSHED_BYTES", 1000)
    backend = Backend(export(flags=PLAIN), errors={c.NBD_CMD_FLUSH: (c.NBD_EIO, b"")})
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
        assert await fails(background(node.write(0, memoryview(bytes(1001)), fua=False))) == EIO
        assert await read(node, 0, 4) == bytes(4)


async def test_server_that_is_lost_again_in_the_repetition_is_waited_for(
    graph: Graph, short_tmp: Path, pki: Pki
) -> None:
    """Over TLS a reply and the end of the connection may come in one."""
    backend = Backend(export(flags=PLAIN))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki.server / "server-cert.pem", pki.server / "server-key.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.greeting(c.NBD_FLAG_FIXED_NEWSTYLE | c.NBD_FLAG_NO_ZEROES))
        await reader.readexactly(4 + wire.OPTION_HEADER.size)
        writer.write(wire.option_reply(c.NBD_OPT_STARTTLS, c.NBD_REP_ACK))
        await writer.drain()
        await writer.start_tls(context)
        backend.connections += 1
        selected = await backend.haggle(reader, writer)
        while True:
            await backend.answer(reader, writer, selected)
            if backend.connections == 2:
                writer.close()
            await writer.drain()

    async with scripted(short_tmp / "s", serve):
        tls = ClientTls(str(pki.client("guest")), "localhost")
        node = await add(graph, upstream(short_tmp / "s", tls=tls, reconnect_s=OPEN_S))
        await node.write(0, memoryview(b"abcd"), fua=False)
        driver_of(node)._links._up[0]._lose("the test says so")
        await node.flush()
        assert backend.connections == 3


async def test_no_connection_joins_those_of_a_server_that_is_gone(
    graph: Graph, short_tmp: Path
) -> None:
    """It may be to the next server; then what the one before has acknowledged would be missing."""
    backend = Backend(export(flags=MULTI), silent={c.NBD_CMD_READ})
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s", reconnect_s=OPEN_S))
        await node.write(0, memoryview(b"abcd"), fua=False)
        await until(lambda: c.NBD_CMD_READ in [each[0] for each in backend.requests])
        assert connections(node) == 1  # the first is asked whether it still is there
        driver_of(node)._links._up[0]._lose("the test says so")
        backend.silent.clear()
        await until(lambda: connections(node) == limits.NBD_CONNECTIONS)
        written = [each for each in backend.requests if each[0] == c.NBD_CMD_WRITE]
        assert len(written) == 2
