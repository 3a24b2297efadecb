"""Many clients, one server: limits, isolation, shutdown."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from nbdfleece.base.errors import ConfigError, OptionRefused
from nbdfleece.base.units import KiB, MiB
from nbdfleece.block.graph import Graph
from nbdfleece.protocol.nbd import client as talks
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.handshake import GREETING
from nbdfleece.server import server as server_module
from nbdfleece.server import session as session_module
from nbdfleece.server.addresses import TcpAddress, UnixAddress
from nbdfleece.server.audit import ClientConnected, ClientDisconnected
from nbdfleece.server.export import ExportOptions
from nbdfleece.server.exports import Exports
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.server import Server
from nbdfleece.server.session import Session
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import NbdClient, connected
from tests.support.nbd_server import Served, pattern, serving
from tests.support.waiting import turns, until


async def sessions_are(served: Served, count: int) -> None:
    """Return when the server knows of so many clients."""
    await until(lambda: len(served.server.sessions) == count)


def exists(path: str) -> bool:
    return Path(path).exists()


async def hold_writes(served: Served, client: NbdClient) -> asyncio.Future:
    """Return a write that is in flight until `served.disk.held` is set."""
    served.disk.hold = {"write"}
    write = await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
    await until(lambda: served.disk.waiting)
    return write


# --- listeners -------------------------------------------------------------------------------


async def test_several_listeners_serve_the_same_exports(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        tcp = await served.server.listen(TcpAddress("127.0.0.1", 0))
        second = await served.server.listen(UnixAddress(str(short_tmp / "second")))
        assert isinstance(tcp.address, TcpAddress)
        addresses = [served.path, ("127.0.0.1", tcp.address.port), str(short_tmp / "second")]

        for address in addresses:
            async with connected(address) as client:
                assert await client.read(0, 4) == pattern(4)

        served.server.unlisten(second)
        assert not (short_tmp / "second").exists()
        with pytest.raises(FileNotFoundError):
            await NbdClient.open(addresses[2])


async def test_tcp_connections_send_at_once_and_notice_dead_peers(short_tmp: Path) -> None:
    seen = []

    class Watched(Session):
        def __init__(self, session_id, sock, *args, **kwargs):
            super().__init__(session_id, sock, *args, **kwargs)
            seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            seen.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    async with serving(short_tmp) as served:
        tcp = await served.server.listen(TcpAddress("127.0.0.1", 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module, "Session", Watched)
            async with connected(("127.0.0.1", tcp.address.port)):
                (session,) = served.server.sessions.values()
                assert session.peer.startswith("127.0.0.1, port ")
    assert seen == [1, 1]


async def test_failed_listen_leaves_the_server_as_it_was(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        with pytest.raises(ConfigError):
            await served.server.listen(UnixAddress(served.path))

        assert len(served.server.listeners) == 1
        async with connected(served.path) as client:
            assert await client.read(0, 4) == pattern(4)


async def test_clients_of_a_closed_listener_stay(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        served.server.unlisten(served.server.listeners[0])

        assert await client.read(0, 4) == pattern(4)


# --- limits and isolation --------------------------------------------------------------------


async def test_full_server_says_so(short_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(short_tmp, options=ServerOptions(max_connections=2)) as served:
        async with connected(served.path) as first, connected(served.path):
            for talk in (talks.go("disk"), talks.info("disk"), talks.list_exports()):
                turned_away = await served.open()
                await turned_away.run(talks.greet(no_zeroes=True))
                with pytest.raises(OptionRefused) as caught:
                    await turned_away.run(talk)
                assert caught.value.reply == c.NBD_REP_ERR_SHUTDOWN
                assert caught.value.text == "the server is full: 2 clients are connected"
                await turned_away.close()
            await first.disconnect()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

        await sessions_are(served, 0)
        async with connected(served.path) as client:
            assert await client.read(0, 4) == pattern(4)


async def test_full_server_says_so_for_a_moment_and_to_few(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "TURN_AWAY_S", 0.05)
    monkeypatch.setattr(server_module, "MAX_TURNED_AWAY", 2)
    async with (
        serving(short_tmp, options=ServerOptions(max_connections=1)) as served,
        connected(served.path) as client,
    ):
        silent = [await served.open() for _ in range(5)]
        for one in silent:
            assert await one.receive_to_end() == GREETING
            await one.close()
        assert len(served.server.sessions) == 1
        assert await client.read(0, 4) == pattern(4)


async def test_one_address_has_only_so_many_connections(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_tmp, options=ServerOptions(max_per_address=2)) as served:
        tcp = await served.server.listen(TcpAddress("127.0.0.1", 0))
        assert isinstance(tcp.address, TcpAddress)
        address = ("127.0.0.1", tcp.address.port)
        async with connected(address), connected(address), connected(served.path) as local:
            for _ in range(2):
                late = await NbdClient.open(address)
                with pytest.raises(OptionRefused) as caught:
                    await late.connect()
                assert caught.value.reply == c.NBD_REP_ERR_SHUTDOWN
                assert "your address" in caught.value.text
                await late.close()
            assert await local.read(0, 4) == pattern(4)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        await sessions_are(served, 0)
        async with connected(address) as again:
            assert await again.read(0, 4) == pattern(4)


async def test_one_export_has_only_so_many_connections(short_tmp: Path) -> None:
    async with (
        serving(short_tmp, options=ServerOptions(max_per_export=1)) as served,
        connected(served.path, "disk") as client,
    ):
        late = await served.open()
        await late.run(talks.greet(no_zeroes=True))
        with pytest.raises(OptionRefused) as caught:
            await late.run(talks.go("disk"))
        assert caught.value.reply == c.NBD_REP_ERR_POLICY
        assert (await late.run(talks.go("frozen"))).size == MiB
        await late.close()
        assert await client.read(0, 4) == pattern(4)


async def test_news_of_clients_that_open_exports(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        heard: list[object] = []
        served.server.news.subscribe(heard.append)
        probe = await served.open()
        await probe.close()
        async with connected(served.path) as client:
            await client.read(0, 100)
            await client.write(0, b"abcd")
            await client.disconnect()
        await sessions_are(served, 0)
        opened, left = heard
        assert isinstance(opened, ClientConnected)
        assert isinstance(left, ClientDisconnected)
        assert (opened.id, opened.export) == (left.id, "disk")
        assert (left.bytes_read, left.bytes_written, left.requests) == (100, 4, 2)
        assert left.reason == "disconnects"


async def test_extended_headers_can_be_switched_off(short_tmp: Path) -> None:
    for offered in (True, False):
        options = ServerOptions(extended_headers=offered)
        async with serving(short_tmp, options=options) as served:
            client = await served.open()
            await client.run(talks.greet(no_zeroes=True))
            assert await client.run(talks.extended_headers()) is offered
            await client.close()


async def test_cve_2024_7409_silent_clients_are_bounded_in_number_and_time(
    short_tmp: Path,
) -> None:
    """Qemu < 9.1: sockets still in negotiation when the server stopped crashed it."""
    options = ServerOptions(max_connections=20, handshake_timeout_s=0.1)
    async with serving(short_tmp, options=options) as served:
        silent = [await served.open() for _ in range(40)]
        await asyncio.sleep(0)
        assert len(served.server.sessions) <= 20

        await asyncio.sleep(0.2)
        await sessions_are(served, 0)
        async with connected(served.path) as client:
            assert await client.read(0, 4) == pattern(4)
        for client in silent:
            await client.close()


async def test_stop_and_restart_with_half_negotiated_clients(short_tmp: Path) -> None:
    for _ in range(3):
        async with serving(short_tmp) as served:
            clients = []
            for count in range(0, 40, 4):
                client = await served.open()
                await client.send((wire.CLIENT_FLAGS.pack(3) + wire.option(6, bytes(99)))[:count])
                clients.append(client)
            await served.server.shutdown(timeout_s=0)
            assert not served.server.sessions
        for client in clients:
            await client.receive_to_end()
            await client.close()


async def test_stalled_client_does_not_delay_another(short_tmp: Path) -> None:
    """One sends reads and takes no replies; one stops in a payload; one in the handshake."""
    async with (
        serving(short_tmp) as served,
        connected(served.path) as greedy,
        connected(served.path) as slow,
        connected(served.path) as other,
    ):
        silent = await served.open()
        greedy._reader.cancel()
        reads = wire.request(c.NBD_CMD_READ, flags=0, cookie=1, offset=0, length=MiB) * 64
        await greedy.send(reads)
        await slow.send(
            wire.request(c.NBD_CMD_WRITE, flags=0, cookie=1, offset=0, length=MiB) + bytes(99)
        )

        async with asyncio.timeout(5):
            for offset in range(0, MiB, 64 * KiB):
                assert await other.read(offset, 4) == pattern(MiB)[offset : offset + 4]
        await silent.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_cve_2017_10664_client_that_vanishes_with_replies_queued(
    short_tmp: Path, kind: str
) -> None:
    """Qemu-nbd: SIGPIPE ended the server; nbdkit: replies went to a socket of another client."""
    async with serving(short_tmp) as served:
        address = served.path
        if kind == "tcp":
            tcp = await served.server.listen(TcpAddress("127.0.0.1", 0))
            address = ("127.0.0.1", tcp.address.port)
        async with connected(address) as other:
            for _ in range(10):
                client = await NbdClient.open(address)
                await client.connect()
                for cookie in range(64):
                    await client.send(
                        wire.request(
                            c.NBD_CMD_READ, flags=0, cookie=cookie, offset=0, length=256 * KiB
                        )
                    )
                client.reset()
                assert await other.read(1024, 4096) == pattern(MiB)[1024:5120]
        await sessions_are(served, 0)


async def test_write_of_a_vanished_client_is_carried_out(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        client = await served.open()
        await client.connect()
        await hold_writes(served, client)
        await client.close()
        served.disk.held.set()

        await sessions_are(served, 0)
        assert served.disk.data[:4] == b"abcd"


async def test_storm_of_clients(short_tmp: Path, rng) -> None:
    async def one(served: Served, behaviour: int) -> None:
        client = await served.open()
        try:
            if behaviour > 0:
                await client.connect(structured=behaviour % 2 == 0)
            if behaviour > 1:
                for _ in range(behaviour):
                    await client.submit(c.NBD_CMD_READ, 0, 64 * KiB)
            if behaviour > 4:
                await client.disconnect()
        except (OSError, EOFError):
            pass  # turned away
        finally:
            client._close_socket()

    async with serving(short_tmp, options=ServerOptions(max_connections=30)) as served:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(150):
                tasks.create_task(one(served, rng.randrange(8)))
        await sessions_are(served, 0)
        assert not any(export.is_used for export in served.exports)


async def test_fault_of_our_own_ends_one_session(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_tmp) as served, connected(served.path) as other:

        def broken(*_args: object) -> None:
            raise AssertionError("a planted fault")

        monkeypatch.setattr(served.exports, "named", broken)
        client = await served.open()
        with pytest.raises((EOFError, ConnectionError)):
            await client.connect()
        await client.close()

        assert "a planted fault" in caplog.text
        assert await other.read(0, 4) == pattern(4)


async def test_concurrent_requests_of_several_connections(short_tmp: Path, rng) -> None:
    async with serving(short_tmp) as served:
        clients = []
        for structured in (True, False, True, False):
            client = await served.open()
            await client.connect(structured=structured)
            clients.append(client)
        expected = bytearray(pattern(MiB))
        writes = []
        for index, start in enumerate(range(0, MiB, 4096)):
            data = rng.randbytes(4096)
            expected[start : start + 4096] = data
            client = clients[index % 4]
            writes.append(await client.submit(c.NBD_CMD_WRITE, start, 4096, data=data))
        for write in writes:
            assert (await write).error == 0

        for client in clients:
            assert await client.read(0, MiB) == expected
            await client.close()


# --- shutdown --------------------------------------------------------------------------------


async def test_shutdown_finishes_what_has_begun(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        write = await hold_writes(served, client)
        async with asyncio.TaskGroup() as tasks:
            shutdown = tasks.create_task(served.server.shutdown(timeout_s=30))
            await turns(20)
            assert not shutdown.done()
            assert not exists(served.path)
            served.disk.held.set()

        assert shutdown.result() is True
        assert (await write).error == 0
        await client.wait_closed()


async def test_shutdown_without_clients_is_immediate(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        assert await served.server.shutdown(timeout_s=30) is True
        assert await served.server.shutdown(timeout_s=30) is True


async def test_shutdown_closes_idle_clients(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        assert await served.server.shutdown(timeout_s=30) is True

        assert await client.wait_closed() is None


async def test_haggling_client_hears_of_the_shutdown(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        client = await served.open()
        await client.run(talks.greet(no_zeroes=True))
        async with asyncio.TaskGroup() as tasks:
            shutdown = tasks.create_task(served.server.shutdown(timeout_s=30))
            await until(lambda: not served.server.listeners)
            await asyncio.sleep(0)
            with pytest.raises(OptionRefused) as caught:
                await client.run(talks.go("disk"))
            assert caught.value.reply == c.NBD_REP_ERR_SHUTDOWN
            await client.run(talks.abort())
        await client.close()

        assert shutdown.result() is True


async def test_silent_client_does_not_hold_up_the_shutdown(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "SHUTDOWN_HANDSHAKE_S", 0.01)
    async with serving(short_tmp) as served:
        client = await served.open()
        await client.receive(len(GREETING))

        async with asyncio.timeout(5):
            assert await served.server.shutdown(timeout_s=30) is True
        await client.close()


async def test_shutdown_deadline_cuts_off_stuck_requests(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ABORT_TIMEOUT_S", 0.01)
    async with serving(short_tmp) as served, connected(served.path) as client:
        await hold_writes(served, client)

        assert await served.server.shutdown(timeout_s=0.01) is False

        await client.wait_closed()
        assert not served.exports.get("disk").is_idle()
        served.disk.held.set()
        await served.exports.get("disk").wait_unused()
        assert served.disk.data[:4] == b"abcd"


async def test_leaving_the_server_closes_everything(short_tmp: Path) -> None:
    path = str(short_tmp / "s")
    async with Server(Exports(Graph()), ServerOptions()) as server:
        await server.listen(UnixAddress(path))
        client = await NbdClient.open(path)
        await client.receive(len(GREETING))

    assert await client.receive_to_end() == b""
    assert not exists(path)
    await client.close()


async def test_failure_of_the_owner_closes_everything_too(short_tmp: Path) -> None:
    path = str(short_tmp / "s")

    async def fail() -> None:
        async with Server(Exports(Graph()), ServerOptions()) as server:
            await server.listen(UnixAddress(path))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not exists(path)


async def test_second_cancellation_does_not_wait_for_stuck_requests(short_tmp: Path) -> None:
    path, exports, ready = str(short_tmp / "s"), Exports(graph := Graph()), asyncio.Event()
    driver = MemoryDriver(bytearray(4096))
    driver.hold = {"write"}
    node = await graph.add(None, driver, read_only=False, discard_enabled=True)
    exports.add(node, ExportOptions("disk", "disk", writable=True, description=""))

    async def serve() -> None:
        async with Server(exports, ServerOptions()) as server:
            await server.listen(UnixAddress(path))
            ready.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(serve())
        await ready.wait()
        async with connected(path) as client:
            await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
            await until(lambda: driver.waiting)
            task.cancel()
            await client.wait_closed()  # cut off; the write is stuck
            task.cancel()
    assert task.cancelled()
    assert not exports.get("disk").is_idle()
    driver.held.set()
    await exports.get("disk").wait_unused()


async def test_client_is_kicked(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        (session,) = served.server.sessions.values()
        haggling = await served.open()
        await haggling.receive(len(GREETING))
        await sessions_are(served, 2)

        for one in list(served.server.sessions.values()):
            one.abort("kicked")

        await client.wait_closed()
        assert await haggling.receive_to_end() == b""
        await sessions_are(served, 0)
        assert session.export is not None
        assert session.peer.startswith("unix, uid ")
        await haggling.close()
