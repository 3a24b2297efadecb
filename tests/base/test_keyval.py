"""key=value texts of QEMU's command lines."""

from __future__ import annotations

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.base.keyval import Spelled, parse, split


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1,", {"a": "1"}),
        ("a=", {"a": ""}),
        ("a=x=y", {"a": "x=y"}),
        ("a=1,a=2", {"a": "2"}),
        ("a=x,,y,b=,,", {"a": "x,y", "b": ","}),
        ("a=CN=x,,O=y", {"a": "CN=x,O=y"}),
        (
            "raw,file.driver=file,file.filename=f",
            {"driver": "raw", "file": {"driver": "file", "filename": "f"}},
        ),
        ("a.b.c=1,a.b.d=2", {"a": {"b": {"c": "1", "d": "2"}}}),
        ("r.1.m=b,r.0.m=a", {"r": [{"m": "a"}, {"m": "b"}]}),
    ],
)
def test_text_becomes_nested_objects(text: str, expected: dict) -> None:
    assert parse(text, "driver") == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a=1,b", "Expected '=' after parameter 'b'"),
        ("a b=1", "Invalid parameter 'a b'"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        (".a=1", "Invalid parameter '.a'"),
        ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
        ("a.0=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("a.0=1,a.2=2", "Parameter 'a.1' missing"),
        (".".join("a" * 65) + "=1", f"Invalid parameter '{'.'.join('a' * 65)}'"),
    ],
)
def test_errors_in_qemus_words(text: str, error: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(text, "driver")
    assert str(caught.value) == error


def test_first_value_needs_a_key_where_none_is_implied() -> None:
    with pytest.raises(CommandError, match="Expected '=' after parameter 'raw'"):
        parse("raw")


def test_pairs_keep_what_has_no_value() -> None:
    assert split("socket,id=c,server,path=a,,b") == [
        ("socket", None),
        ("id", "c"),
        ("server", None),
        ("path", "a,b"),
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("yes", True), ("true", True), ("off", False), ("n", False)]
)
def test_truth_values(text: str, value: bool) -> None:
    assert Spelled(text).boolean("x") is value


@pytest.mark.parametrize(("text", "value"), [("5", 5), ("-1", -1), ("0x10", 16), ("-0x1", -1)])
def test_numbers(text: str, value: int) -> None:
    assert Spelled(text).integer("x") == value


@pytest.mark.parametrize("text", ["", "1M", "5_0", "1.0", " 1", "٣", "9" * 5000])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(CommandError, match=r"^Parameter 'a.b' expects integer$"):
        Spelled(text).integer("a.b")


def test_what_is_no_truth_value() -> None:
    with pytest.raises(CommandError, match=r"^Parameter 'read-only' expects 'on' or 'off'$"):
        Spelled("maybe").boolean("read-only")
