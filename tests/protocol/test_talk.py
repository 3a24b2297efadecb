from __future__ import annotations

import pytest

from nbdfleece.base.errors import PeerViolation
from nbdfleece.protocol.nbd.talk import Conversation, Talk


def echo_two() -> Talk[bytes]:
    yield b"hello"
    first = yield 2
    yield first
    second = yield 3
    yield second
    return first + second


@pytest.mark.parametrize("piece", [1, 2, 7])
def test_talk_runs_over_pieces_of_any_size(piece: int) -> None:
    conversation = Conversation(echo_two())
    sent = list(conversation.feed(b""))
    data = b"abcdefg"

    for start in range(0, len(data), piece):
        sent += conversation.feed(data[start : start + piece])

    assert sent == [b"hello", b"ab", b"cde"]
    assert conversation.result == b"abcde"
    assert conversation.leftover == b"fg"


def test_result_is_there_before_the_last_bytes_are_handed_out() -> None:
    conversation = Conversation(echo_two())
    steps = conversation.feed(b"abcde")

    assert [next(steps), next(steps)] == [b"hello", b"ab"]
    assert not conversation.is_over
    assert next(steps) == b"cde"
    assert conversation.is_over


def test_nothing_is_taken_once_it_is_over() -> None:
    conversation = Conversation(echo_two())
    list(conversation.feed(b"abcde"))

    assert list(conversation.feed(b"xyz")) == []
    assert conversation.leftover == b"xyz"


def test_empty_wishes_are_granted_at_once() -> None:
    def talk() -> Talk[int]:
        return len((yield 0)) + 1

    conversation = Conversation(talk())
    assert list(conversation.feed(b"")) == []
    assert conversation.result == 1


def test_violation_ends_the_conversation() -> None:
    def talk() -> Talk[None]:
        yield 1
        raise PeerViolation("no")

    conversation = Conversation(talk())
    with pytest.raises(PeerViolation):
        list(conversation.feed(b"x"))
    assert conversation.is_over
