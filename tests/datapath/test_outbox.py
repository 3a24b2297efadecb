"""Replies on their way to the socket: the event loop and a worker thread, one beside the other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator

import pytest

from nbdfleece.datapath.outbox import CAPACITY, Outbox
from nbdfleece.datapath.route import EarlySender
from tests.support.waiting import until

REPLY = b"reply of 16 bytes"[:16]


class Ends:
    """An outbox over a unix socket, and the client's end of it, which blocks."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.settimeout(30)
        self.rooms = 0
        self.reasons: list[str] = []
        self.out = Outbox(self.ours, self.found_room, self.reasons.append, stall_s=60)

    def found_room(self) -> None:
        self.rooms += 1

    def fill(self) -> bytes:
        """Queue more than the socket takes; return all of it."""
        data = bytes(range(256)) * (CAPACITY // 256)
        self.out.put(data)
        self.out.put(data)
        self.out.flush()
        assert self.out.blocked
        return 2 * data

    def receive(self, count: int) -> bytes:
        """Receive so much."""
        data = bytearray()
        while len(data) < count:
            part = self.theirs.recv(count - len(data))
            assert part
            data += part
        return bytes(data)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    made = Ends()
    yield made
    made.out.close()
    made.ours.close()
    made.theirs.close()


class Early:
    """A reply for a thread to send (route.EarlyReply)."""

    def __init__(self, way: EarlySender, data: bytes) -> None:
        self.way = way
        self.data = data
        self.sent = False


def in_a_thread(early: Early) -> None:
    thread = threading.Thread(target=early.way.send_early, args=([early],))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


async def test_a_thread_sends_a_reply_without_the_event_loop(ends: Ends) -> None:
    early = Early(ends.out, REPLY)
    in_a_thread(early)  # the loop does not run meanwhile
    assert early.sent
    assert ends.receive(16) == REPLY


async def test_a_thread_sends_the_replies_of_one_connection_together(ends: Ends) -> None:
    replies = [Early(ends.out, b"%2d of 16 bytes..." % number) for number in range(3)]
    ends.out.send_early(replies)
    assert ends.receive(3 * 17) == b" 0 of 16 bytes... 1 of 16 bytes... 2 of 16 bytes..."
    assert all(early.sent for early in replies)


async def test_a_thread_sends_before_replies_that_only_wait_for_their_turn(ends: Ends) -> None:
    ends.out.put(b"of the loop")
    early = Early(ends.out, REPLY)
    in_a_thread(early)
    assert early.sent
    ends.out.flush()
    assert ends.receive(16 + 11) == REPLY + b"of the loop"


async def test_the_first_reply_does_not_begin_with_a_page(ends: Ends) -> None:
    for _ in range(2):
        assert ends.out.is_empty()
        assert ends.out.filled >= 32
        ends.out.put(REPLY)
        ends.out.flush()
        assert ends.receive(16) == REPLY


async def test_a_thread_sends_nothing_into_a_reply_that_is_half_sent(ends: Ends) -> None:
    expected = ends.fill()
    received = ends.receive(100_000)  # there is room now, and the loop has not looked
    early = Early(ends.out, REPLY)
    in_a_thread(early)
    assert not early.sent
    loop = asyncio.get_running_loop()
    left = len(expected) - len(received)
    received += await loop.run_in_executor(None, ends.receive, left)
    assert received == expected
    await until(lambda: ends.rooms)
    in_a_thread(early)
    assert early.sent
    assert ends.receive(16) == REPLY


async def test_a_thread_sends_nothing_while_the_loop_sends(ends: Ends) -> None:
    early = Early(ends.out, REPLY)
    with ends.out._gate:
        in_a_thread(early)
    assert not early.sent
    assert ends.out.is_empty()


async def test_a_thread_sends_nothing_to_a_connection_that_is_closed(ends: Ends) -> None:
    early = Early(ends.out, REPLY)
    number = ends.ours.fileno()
    ends.out.close()
    ends.ours.close()
    other, peer = socket.socketpair()  # gets the number that has become free
    with other, peer:
        assert number in (other.fileno(), peer.fileno())
        in_a_thread(early)
        assert not early.sent
        for end in (other, peer):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(1)


async def test_a_socket_that_is_full_leaves_the_reply_to_the_loop(ends: Ends) -> None:
    data = memoryview(bytes(65_536))
    with contextlib.suppress(BlockingIOError):
        while True:
            ends.ours.send(data)
    early = Early(ends.out, REPLY)
    in_a_thread(early)
    assert not early.sent
    assert not ends.reasons


async def test_a_peer_that_has_gone_is_left_to_the_loop(ends: Ends) -> None:
    ends.theirs.close()
    early = Early(ends.out, REPLY)
    in_a_thread(early)
    assert not early.sent
    ends.out.put(REPLY)
    ends.out.flush()
    assert len(ends.reasons) == 1
