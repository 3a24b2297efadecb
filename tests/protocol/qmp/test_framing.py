from __future__ import annotations

import json

import pytest

from nbdfleece.protocol.qmp.framing import BadMessage, Framer, TooMuch

STREAM = (
    b' {"a": "}{\\"]"}\n[1]"x" 12 {"b": {"c": [{}, []]}}\r\nnonsense{"d": 1,, }{"e": "\\u00e9"}'
    b'{"f": 1, "f": 2}{"g": NaN}{"h": "\\ud800"}{"open": [\xff{"i": null}'
)


def take(framer: Framer, stream: bytes, piece: int) -> list[object]:
    found: list[object] = []
    for start in range(0, len(stream), piece):
        found += framer.feed(stream[start : start + piece])
    return found


@pytest.mark.parametrize("piece", [1, 2, 7, 10_000])
def test_every_split_gives_the_same_messages(piece: int) -> None:
    found = take(Framer(), STREAM, piece)
    good = [message for message in found if not isinstance(message, BadMessage)]
    assert good == [{"a": '}{"]'}, {"b": {"c": [{}, []]}}, {"e": "\u00e9"}, {"i": None}]
    bad = [message.text for message in found if isinstance(message, BadMessage)]
    assert bad[:3] == ["QMP input must be a JSON object"] * 3
    assert len(bad) == 8
    assert all(text.startswith("JSON parse error") for text in bad[3:])


def test_a_long_message_ends_the_stream() -> None:
    framer = Framer(max_bytes=100)
    assert list(framer.feed(b'{"a": 1}' * 50)) == [{"a": 1}] * 50
    with pytest.raises(TooMuch, match="size limit"):
        list(framer.feed(b'{"a": "' + b"x" * 100))


def test_a_deep_message_ends_the_stream() -> None:
    deep = b'{"a":' + b"[" * 62 + b"]" * 62 + b"}"
    assert list(Framer().feed(deep)) == [json.loads(deep)]
    with pytest.raises(TooMuch, match="nesting depth"):
        list(Framer().feed(b'{"a":' + b"[" * 64))


def test_numbers_of_any_length_are_no_crash() -> None:
    (found,) = Framer().feed(b'{"a": ' + b"9" * 10_000 + b"}")
    assert isinstance(found, BadMessage)


def test_random_bytes_give_messages_or_refusals(rng) -> None:
    alphabet = b'{}[]",:\\ \n0a\xff\x00\xc3n'
    for _ in range(2000):
        framer = Framer(max_bytes=50, max_depth=5)
        try:
            for _ in range(4):
                for message in framer.feed(bytes(rng.choices(alphabet, k=rng.randrange(30)))):
                    assert isinstance(message, dict | BadMessage)
        except TooMuch:
            pass


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        (rb'{"a": "\u0000"}', False),
        (rb'{"a\u0000": 1}', False),
        (rb'{"a": ["x\\\u0000"]}', False),
        (rb'{"a": "\\u0000"}', True),
        (rb'{"a": "\u0001"}', True),
    ],
)
def test_a_nul_is_in_no_string(text: bytes, is_good: bool) -> None:
    """No name and no path can have one, and Python raises what nobody expects."""
    (message,) = Framer().feed(text)
    if is_good:
        assert isinstance(message, dict)
    else:
        assert message == BadMessage("JSON parse error, a string contains a NUL")
