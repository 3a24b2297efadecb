"""TlsStream against its plain twin, and against peers that trickle, vanish or lie."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import subprocess
from collections.abc import Callable

import pytest

from nbdfleece.base.errors import PeerViolation
from nbdfleece.datapath.stream import WantsRead, WantsWrite, receive, send_all
from nbdfleece.datapath.tls import TlsStream
from tests.reference.tls import PlainTlsStream
from tests.support.pki import Pki
from tests.support.tls_pair import (
    FORGED,
    InTheMiddle,
    client_context,
    closing,
    cut_in_pieces,
    server_context,
    shake_hands,
    socket_pair,
    tls_pair,
)
from tests.support.waiting import until

KIB = 1024


async def receive_exactly(stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await receive(stream, min(count - len(data), 300 * KIB))
        assert part, f"the stream ends after {len(data)} of {count} bytes"
        data += part
    return data


async def twin_pair(pki: Pki, *, server_is_plain: bool) -> tuple[object, object]:
    """A TlsStream and a plain twin, after the handshake: (server, client)."""
    ours, theirs = socket_pair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    server_side, client_side = server_context(pki.server), client_context(pki.client())
    if server_is_plain:
        plain = PlainTlsStream(ours, server_side, server_side=True)
        quick = TlsStream(theirs, client_side, server_side=False, server_hostname="localhost")
    else:
        plain = PlainTlsStream(theirs, client_side, server_side=False)
        quick = TlsStream(ours, server_side)

    async with asyncio.TaskGroup() as group:
        group.create_task(quick.handshake())
        await until(plain.do_handshake)
    return (plain, quick) if server_is_plain else (quick, plain)


# --- the twin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_is_plain", [False, True])
async def test_it_talks_to_its_plain_twin_both_ways_at_once(
    pki: Pki, rng: random.Random, server_is_plain: bool
) -> None:
    one, other = await twin_pair(pki, server_is_plain=server_is_plain)
    sizes = [1, 28, 4096, 16384, 16385, 131072, 131073, 300_000]

    async def talk(sender, receiver, rng: random.Random) -> None:
        messages = [rng.randbytes(rng.choice(sizes)) for _ in range(30)]

        async def say() -> None:
            for message in messages:
                await send_all(sender, message)

        async with asyncio.TaskGroup() as group:
            group.create_task(say())
            for message in messages:
                assert await receive_exactly(receiver, len(message)) == message

    with closing(one, other):
        async with asyncio.TaskGroup() as group:
            group.create_task(talk(one, other, random.Random(rng.random())))
            group.create_task(talk(other, one, random.Random(rng.random())))


# --- the handshake -------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7])
async def test_a_handshake_that_trickles_in_lets_others_go_on(pki: Pki, piece: int) -> None:
    async with cut_in_pieces(piece) as pair:
        server, client = await tls_pair(pki, pair)
        with closing(server, client):
            await send_all(client, b"hello")
            assert await receive(server, 100) == b"hello"
            assert server.version() == client.version() == "TLSv1.3"


async def test_tls_1_2_will_do(pki: Pki) -> None:
    ours, theirs = socket_pair()
    context = client_context(pki.client())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = TlsStream(ours, server_context(pki.server))
    client = TlsStream(theirs, context, server_side=False, server_hostname="localhost")
    with closing(server, client):
        await shake_hands(server, client)
        assert server.version() == "TLSv1.2"
        await send_all(server, b"x" * 100_000)
        assert await receive_exactly(client, 100_000) == b"x" * 100_000


async def refused(pki: Pki, folder, server=None) -> str:
    """Return why the server refuses a client with this folder."""
    ours, theirs = socket_pair(tcp=True)
    server = TlsStream(ours, server_context(server or pki.server))
    client = TlsStream(
        theirs, client_context(folder), server_side=False, server_hostname="localhost"
    )
    with closing(server, client):

        async def try_client() -> None:
            with contextlib.suppress(OSError, PeerViolation):
                await client.handshake()
                await receive(client, 100)

        task = asyncio.get_running_loop().create_task(try_client())
        with pytest.raises(PeerViolation) as caught:
            await server.handshake()
        await task
        return str(caught.value)


async def test_the_reason_of_a_refusal_is_told_in_words(pki: Pki) -> None:
    said = await refused(pki, pki.anonymous_client())
    assert said == "TLS handshake failed: peer did not return a certificate"
    assert "certificate has expired" in await refused(pki, pki.expired_client())
    assert "issuer certificate" in await refused(pki, pki.foreign_client())


async def test_a_client_hears_by_an_alert_why_it_is_refused(pki: Pki) -> None:
    ours, theirs = socket_pair(tcp=True)
    server = TlsStream(ours, server_context(pki.server))
    context = client_context(pki.expired_client())
    client = TlsStream(theirs, context, server_side=False, server_hostname="localhost")
    with closing(client):
        task = asyncio.get_running_loop().create_task(client.handshake())
        with closing(server), pytest.raises(PeerViolation, match="expired"):
            await server.handshake()
        await task
        with pytest.raises(OSError, match="alert certificate expired"):
            await receive(client, 100)


async def test_what_is_not_tls_is_a_violation(pki: Pki) -> None:
    ours, theirs = socket_pair()
    server = TlsStream(ours, server_context(pki.server))
    with closing(server), theirs:
        theirs.send(b"IHAVEOPT\0\0\0\3\0\0\0\0")
        with pytest.raises(PeerViolation, match="TLS handshake failed: "):
            await server.handshake()


@pytest.mark.parametrize("sent", [0, 1, 5, 100])
async def test_a_peer_that_vanishes_in_the_handshake_is_an_os_error(pki: Pki, sent: int) -> None:
    ours, theirs = socket_pair()
    server = TlsStream(ours, server_context(pki.server))
    hello = ssl.MemoryBIO()
    client = client_context(pki.client()).wrap_bio(
        ssl.MemoryBIO(), hello, server_hostname="localhost"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    with closing(server):
        theirs.send(hello.read()[:sent])
        theirs.close()
        with pytest.raises(OSError, match=r"handshake|reset|Broken"):
            await server.handshake()


async def test_only_a_verified_certificate_is_told(pki: Pki) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        told = server.peer_certificate()
        pem = (pki.client() / "client-cert.pem").read_text()
        assert told == ssl.PEM_cert_to_DER_cert(pem)
    ours, theirs = socket_pair()
    server = TlsStream(ours, server_context(pki.server, verify=False))
    context = client_context(pki.foreign_client())
    client = TlsStream(theirs, context, server_side=False, server_hostname="localhost")
    with closing(server, client):
        await shake_hands(server, client)
        assert server.peer_certificate() is None


# --- receiving -----------------------------------------------------------------------------------


async def test_bytes_that_no_poll_announces_are_pending(pki: Pki) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        assert not server.pending()
        await send_all(client, b"abc" * 10_000)
        assert await receive(server, 1) == b"a"
        rest = bytearray()
        view = memoryview(bytearray(5000))
        while server.pending():
            rest += view[: server.recv_into(view)]
        assert b"a" + rest == b"abc" * 10_000
        with pytest.raises(BlockingIOError):
            server.recv_into(view)
        assert not server.pending()


async def test_what_came_with_the_end_of_the_handshake_is_not_lost(pki: Pki) -> None:
    """A client may send at once; its first bytes travel with its last of the handshake."""
    ours, theirs = socket_pair()
    server = TlsStream(ours, server_context(pki.server))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(pki.client()).wrap_bio(incoming, outgoing, server_hostname="localhost")
    loop = asyncio.get_running_loop()
    with closing(server), theirs:
        task = loop.create_task(server.handshake())
        done = False
        while not done:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
                client.write(b"at once")
                done = True
            await loop.sock_sendall(theirs, outgoing.read())
            if not done:
                incoming.write(await loop.sock_recv(theirs, 1 << 16))
        await task
        assert server.pending()
        view = memoryview(bytearray(100))
        assert view[: server.recv_into(view)] == b"at once"


async def test_one_call_takes_many_records_and_no_more_than_its_turn(pki: Pki) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        for _ in range(16):
            await send_all(client, b"r" * 28)
        view = memoryview(bytearray(4 << 20))
        assert server.recv_into(view) == 16 * 28
        await send_all(client, bytes(90_000))
        assert server.recv_into(view) == 90_000
        task = asyncio.get_running_loop().create_task(send_all(client, bytes(4 << 20)))
        left = 4 << 20
        while left:
            await asyncio.sleep(0)
            with contextlib.suppress(BlockingIOError):
                count = server.recv_into(view)
                assert 0 < count <= 512 * KIB
                left -= count
        await task


@pytest.mark.parametrize("polite", [True, False])
async def test_an_end_is_an_end_with_close_notify_or_without(pki: Pki, polite: bool) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        await send_all(client, b"last words")
        if polite:
            client.shutdown(socket.SHUT_WR)
        client.close()
        assert await receive(server, 100) == b"last words"
        for _ in range(2):
            assert await receive(server, 100) == b""
        assert server.pending()


async def test_a_record_that_is_cut_off_is_not_given(pki: Pki) -> None:
    ours, theirs = socket_pair()
    near, far = socket_pair()
    server, client = await tls_pair(pki, (ours, theirs))
    with closing(server), near, far:
        client._sock.close()
        client._sock = near
        client.send(memoryview(b"x" * 1000))
        sealed = far.recv(2000)
        assert len(sealed) > 1000
        await feed(server, sealed[:-1])
        assert await receive(server, 100) == b""


async def feed(stream: TlsStream, data: bytes) -> None:
    """Let `stream` receive `data`, and then the end, in place of what its socket has."""
    ours, theirs = socket_pair()
    stream._sock.close()
    stream._sock = ours
    theirs.send(data)
    theirs.close()


async def test_what_is_not_from_the_peer_is_an_error_behind_what_is(pki: Pki) -> None:
    ours, theirs = socket_pair()
    server, client = await tls_pair(pki, (ours, theirs))
    near, far = socket_pair()
    with closing(server), near, far:
        client._sock.close()
        client._sock = near
        client.send(memoryview(b"good"))
        good = far.recv(2000)
        client.send(memoryview(b"evil"))
        evil = bytearray(far.recv(2000))
        evil[-1] ^= 1
        await feed(server, good + evil)
        assert await receive(server, 100) == b"good"
        assert server.pending()
        for _ in range(2):
            with pytest.raises(OSError, match=FORGED):
                await receive(server, 100)


# --- sending -------------------------------------------------------------------------------------


async def test_what_is_reported_as_sent_is_with_the_socket(pki: Pki, rng: random.Random) -> None:
    """T2: also when the socket takes part of a record."""
    ours, theirs = socket_pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8000)
    server, client = await tls_pair(pki, (ours, theirs))
    data = rng.randbytes(400_000)
    with closing(server, client):
        sent = got = 0
        received = bytearray()
        view = memoryview(bytearray(1 << 20))
        while len(received) < len(data):
            with contextlib.suppress(BlockingIOError):
                while sent < len(data):
                    sent += server.send(memoryview(data)[sent:])
            assert (sent == len(data)) == (not server._sealed)
            with contextlib.suppress(BlockingIOError):
                while True:
                    got = client.recv_into(view[: rng.randrange(1, 30_000)])
                    received += view[:got]
            assert sent <= len(received) + 16384
        assert received == data


async def test_a_peer_that_has_said_goodbye_may_still_listen(pki: Pki) -> None:
    """Half-closed: we go on sending."""
    server, client = await tls_pair(pki)
    with closing(server, client):
        with contextlib.suppress(ssl.SSLError):
            client._ssl.unwrap()
        client._send_own()  # close_notify, without FIN
        assert await receive(server, 100) == b""
        await send_all(server, b"still here")
        assert await receive(client, 100) == b"still here"


@pytest.mark.parametrize("tcp", [False, True])
async def test_the_end_is_announced_before_the_socket_closes(pki: Pki, tcp: bool) -> None:
    """T6 of the notes on NBD: close_notify, then FIN, and no reset."""
    ours, theirs = socket_pair(tcp=tcp)
    server = TlsStream(ours, server_context(pki.server))
    loop = asyncio.get_running_loop()
    task = loop.create_task(server.handshake())
    context = client_context(pki.client())
    theirs.setblocking(True)
    client = await asyncio.to_thread(
        lambda: context.wrap_socket(theirs, server_hostname="localhost", suppress_ragged_eofs=False)
    )
    await task
    with client:
        await send_all(server, b"bye")
        await asyncio.to_thread(client.send, b"unread")
        server.shutdown(socket.SHUT_WR)
        server.close()
        assert await asyncio.to_thread(client.recv, 100) == b"bye"
        assert await asyncio.to_thread(client.recv, 100) == b""  # SSLEOFError without close_notify


async def test_an_end_in_the_middle_of_a_record_is_not_announced(pki: Pki) -> None:
    ours, theirs = socket_pair()
    server, client = await tls_pair(pki, (ours, theirs))
    with closing(client):
        with contextlib.suppress(BlockingIOError):
            while True:
                server.send(memoryview(bytes(100_000)))
        assert server._owed
        view = memoryview(bytearray(1 << 20))
        with contextlib.suppress(BlockingIOError):
            while client.recv_into(view):
                pass
        server.shutdown(socket.SHUT_WR)  # there is room for a goodbye now
        server.close()
        while client.recv_into(view):
            pass
        with pytest.raises(ssl.SSLError):  # it has not heard a goodbye
            client._ssl.unwrap()


class Miser:
    """A socket that takes as many bytes per call as it is told, and then no more."""

    def __init__(self, sock: socket.socket, *amounts: int) -> None:
        self._sock = sock
        self.amounts = list(amounts)

    def send(self, data: memoryview) -> int:
        if not self.amounts:
            raise BlockingIOError
        return self._sock.send(data[: self.amounts.pop(0)])

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


async def test_the_last_byte_is_owed_until_the_socket_has_all(pki: Pki) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        server._sock = miser = Miser(server._sock, 110)  # type: ignore[assignment]
        data = memoryview(b"x" * 100)
        assert server.send(data) == 99  # 122 bytes, 110 of which are gone
        with pytest.raises(BlockingIOError):
            server.send(data[99:])
        miser.amounts += [5, 1000]
        assert server.send(data[99:]) == 0
        assert server.send(data[99:]) == 1
        assert await receive(client, 200) == data


async def test_words_of_tls_go_out_whole_and_first(pki: Pki) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        server._sock = miser = Miser(server._sock, 10)  # type: ignore[assignment]
        server._outgoing.write(b"o" * 100)
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                server.send(memoryview(b"data"))
        miser.amounts += [1000, 1000]
        assert server.send(memoryview(b"data")) == 4
        raw = client._sock.recv(1000)
        assert raw[:100] == b"o" * 100
        assert raw[100:105] == bytes.fromhex("1703030015")  # a record of 4 + 17 bytes


# --- when TLS wants the other direction ----------------------------------------------------------


async def test_receiving_waits_while_answers_of_tls_pile_up(pki: Pki) -> None:
    """T3: a peer that makes us answer and does not read."""
    ours, theirs = socket_pair()
    server, client = await tls_pair(pki, (ours, theirs))
    with closing(server, client):
        await send_all(client, b"hello")
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(10_000))
        server._outgoing.write(bytes(5000))
        view = memoryview(bytearray(100))
        with pytest.raises(WantsWrite):
            server.recv_into(view)
        with contextlib.suppress(BlockingIOError):
            while theirs.recv(1 << 20):
                pass
        assert view[: server.recv_into(view)] == b"hello"
        assert not server._outgoing.pending


async def test_sending_waits_for_the_rest_of_the_peers_message(pki: Pki) -> None:
    server, client = await tls_pair(pki)
    with closing(server, client):
        engine = server._ssl
        server._ssl = InTheMiddle(engine, lambda: not server._incoming.pending)  # type: ignore
        with pytest.raises(WantsRead):
            server.send(memoryview(b"reply"))
        task = asyncio.get_running_loop().create_task(send_all(server, b"reply"))
        await asyncio.sleep(0)
        await send_all(client, b"the rest")
        await task
        assert await receive(client, 100) == b"reply"
        assert await receive(server, 100) == b"the rest"


async def test_a_key_update_is_answered(pki: Pki, program: Callable[[str], str]) -> None:
    """openssl s_client sends one, and asks for one, when it is told `K`."""
    folder = pki.client()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        host, port = listener.getsockname()
        process = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
            [
                *(program("openssl"), "s_client", "-connect", f"{host}:{port}", "-quiet"),
                *("-CAfile", folder / "ca-cert.pem", "-cert", folder / "client-cert.pem"),
                *("-key", folder / "client-key.pem", "-no_ign_eof"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            loop = asyncio.get_running_loop()
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(False)
            server = TlsStream(sock, server_context(pki.server))
            await server.handshake()
            with closing(server):
                for word in (b"one\n", b"K\n", b"two\n"):
                    process.stdin.write(word)
                    process.stdin.flush()
                    if word != b"K\n":
                        assert await receive(server, 100) == word
                    else:
                        view = memoryview(bytearray(100))
                        came = asyncio.Event()
                        loop.add_reader(server.fileno(), came.set)
                        await came.wait()
                        loop.remove_reader(server.fileno())
                        with pytest.raises(BlockingIOError):
                            server.recv_into(view)
                    await send_all(server, word)
                    assert await asyncio.to_thread(process.stdout.readline) == word
            process.kill()
