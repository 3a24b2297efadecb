"""receive and send_all, on sockets and over TLS."""

from __future__ import annotations

import asyncio
import socket

import pytest

from nbdfleece.datapath.stream import Stream, WantsRead, WantsWrite, receive, send_all
from tests.support.pki import Pki
from tests.support.tls_pair import closing, socket_pair, tls_pair
from tests.support.waiting import turns

over_both = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


async def pair(pki: Pki, tls: bool) -> tuple[Stream, Stream]:
    return await tls_pair(pki) if tls else socket_pair()


def is_watched(stream: Stream) -> bool:
    loop = asyncio.get_running_loop()
    return loop.remove_reader(stream.fileno()) or loop.remove_writer(stream.fileno())


@over_both
async def test_what_is_sent_is_received_whatever_its_size(pki: Pki, tls: bool) -> None:
    one, other = await pair(pki, tls)
    data = bytes(range(256)) * 10_000
    with closing(one, other):
        sending = asyncio.get_running_loop().create_task(send_all(one, data))
        received = b""
        while len(received) < len(data):
            part = await receive(other, 100_000)
            assert 0 < len(part) <= 100_000
            received += part
        await sending
        assert received == data
        assert not is_watched(one)
        assert not is_watched(other)


@over_both
async def test_receive_waits_for_something_and_gives_what_there_is(pki: Pki, tls: bool) -> None:
    one, other = await pair(pki, tls)
    with closing(one, other):
        receiving = asyncio.get_running_loop().create_task(receive(one, 1000))
        await turns(20)
        assert not receiving.done()
        await send_all(other, b"some")
        assert await receiving == b"some"
        other.shutdown(socket.SHUT_WR)
        assert await receive(one, 1000) == b""


@over_both
async def test_a_cancelled_receive_loses_nothing_and_leaves_nothing(pki: Pki, tls: bool) -> None:
    one, other = await pair(pki, tls)
    with closing(one, other):
        receiving = asyncio.get_running_loop().create_task(receive(one, 1000))
        await turns(20)
        receiving.cancel()
        await asyncio.wait([receiving])
        assert not is_watched(one)
        await send_all(other, b"still there")
        assert await receive(one, 1000) == b"still there"


@over_both
async def test_a_cancelled_send_leaves_nothing(pki: Pki, tls: bool) -> None:
    one, other = await pair(pki, tls)
    with closing(one, other):
        sending = asyncio.get_running_loop().create_task(send_all(one, bytes(10_000_000)))
        await turns(20)
        sending.cancel()
        await asyncio.wait([sending])
        assert not is_watched(one)


@over_both
async def test_one_task_may_send_while_another_receives(pki: Pki, tls: bool) -> None:
    """Each side sends more than sockets hold before it has read anything."""
    one, other = await pair(pki, tls)
    size = 3_000_000

    async def take_all(stream: Stream) -> None:
        left = size
        while left:
            left -= len(await receive(stream, left))

    with closing(one, other):
        async with asyncio.TaskGroup() as group:
            for stream in (one, other):
                group.create_task(send_all(stream, bytes(size)))
                group.create_task(take_all(stream))


@over_both
async def test_a_lost_connection_is_an_os_error(pki: Pki, tls: bool) -> None:
    one, other = await pair(pki, tls)
    with closing(one):
        other.close()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            await send_all(one, bytes(1_000_000))


class Contrary:
    """A stream that wants the other direction, three times."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._times = 3

    def recv_into(self, buffer: memoryview, /) -> int:
        if self._times:
            self._times -= 1
            raise WantsWrite
        return self._sock.recv_into(buffer)

    def send(self, data: memoryview, /) -> int:
        if self._times:
            self._times -= 1
            raise WantsRead
        return self._sock.send(data)


async def test_when_tls_wants_the_other_direction_it_is_tried_again() -> None:
    one, other = socket_pair()
    with closing(one, other):
        await send_all(Contrary(one), b"x")  # type: ignore[arg-type]
        assert await receive(Contrary(other), 10) == b"x"  # type: ignore[arg-type]
