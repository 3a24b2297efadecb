"""Arguments that a command line spells, typed by the schema of the command."""

from __future__ import annotations

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.base.keyval import parse
from nbdfleece.protocol.qmp.keyval import typed
from nbdfleece.protocol.qmp.schema import Array, Boolean, Integer, String, Struct, Union

RULE = Struct({"match": String(), "last": Boolean()})
KIND = Union(
    "type",
    Struct({"id": String()}, {"rules": Array(RULE)}),
    {"nbd": Struct(optional={"name": String(), "writable": Boolean(), "limit": Integer()})},
)


def test_spellings_become_values_of_the_declared_type() -> None:
    text = "nbd,id=1,name=on,writable=on,limit=0x10,rules.0.match=5,rules.0.last=off"
    found = typed(KIND, parse(text, "type"))
    assert found == {
        "type": "nbd",
        "id": "1",
        "name": "on",
        "writable": True,
        "limit": 16,
        "rules": [{"match": "5", "last": False}],
    }
    KIND.check(found, "")


def test_what_is_not_declared_is_left_to_the_check() -> None:
    found = typed(KIND, parse("type=nbd,id=x,dance=1"))
    with pytest.raises(CommandError, match="Parameter 'dance' is unexpected"):
        KIND.check(found, "")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("type=nbd,limit=5x", "Parameter 'limit' expects integer"),
        ("type=nbd,rules.0.last=2", "Parameter 'rules[0].last' expects 'on' or 'off'"),
    ],
)
def test_wrong_spellings_are_named_by_their_path(text: str, error: str) -> None:
    with pytest.raises(CommandError) as caught:
        typed(KIND, parse(text))
    assert str(caught.value) == error


def test_json_stays_as_it_is() -> None:
    value = {"type": "nbd", "id": "x", "writable": "on"}
    assert typed(KIND, value) == value
