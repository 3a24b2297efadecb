from __future__ import annotations

import json

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.protocol.qmp import messages
from nbdfleece.protocol.qmp.values import encode, encode_shown


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({}, "QMP input lacks member 'execute'"),
        ({"execute": 5}, "QMP input member 'execute' must be a string"),
        ({"execute": "x", "arguments": 7}, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "zz": 1}, "QMP input member 'zz' is unexpected"),
        ({"exec-oob": "x"}, "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_what_is_no_request(message, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        messages.parse_request(message)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({}, "QMP input lacks member 'execute'"),
        ({"exec-oob": 5}, "QMP input member 'exec-oob' must be a string"),
        ({"exec-oob": "x", "execute": "x"}, "QMP input member 'execute' clashes with 'exec-oob'"),
    ],
)
def test_what_is_no_request_with_out_of_band_execution(message, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        messages.parse_request(message, oob=True)
    assert str(refused.value) == text


def test_a_request_out_of_band() -> None:
    assert messages.parse_request({"exec-oob": "x"}, oob=True).out_of_band
    assert not messages.parse_request({"execute": "x"}, oob=True).out_of_band


@pytest.mark.parametrize("identity", [None, 0, "x", [1, {"a": 2}]])
def test_the_id_is_echoed(identity) -> None:
    given = messages.request_id({"execute": "x", "id": identity})
    assert messages.success({}, given) == {"return": {}, "id": identity}
    assert messages.failure("C", "d", given) == {
        "error": {"class": "C", "desc": "d"},
        "id": identity,
    }


def test_no_id_no_echo() -> None:
    assert messages.success(1, messages.request_id({"execute": "x"})) == {"return": 1}


def test_event() -> None:
    assert messages.event("E", {"a": 1}, microseconds=5_000_007) == {
        "timestamp": {"seconds": 5, "microseconds": 7},
        "event": "E",
        "data": {"a": 1},
    }


def test_what_is_no_text_is_shown_as_such() -> None:
    value = {"a\udcff": ["\ud83d\ude00", "\U0001f600", "\\ud800", 1.5, None, "\0"]}
    shown = encode_shown(value)
    assert shown.isascii()
    good = ["\ufffd\ufffd", "\U0001f600", "\\ud800", 1.5, None, "\ufffd"]
    assert json.loads(shown) == {"a\ufffd": good}
    assert encode_shown({"a": "é"}) == encode({"a": "é"})


def test_encoded_messages_are_one_line_of_ascii() -> None:
    line = encode({"a": "\u00e9\n"})
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert json.loads(line.decode("ascii")) == {"a": "\u00e9\n"}
