from __future__ import annotations

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.protocol.qmp.schema import (
    SIZE,
    UINT32,
    Arguments,
    Array,
    Boolean,
    Enum,
    Integer,
    Number,
    String,
    Struct,
)

SCHEMA = Struct(
    {"name": String()},
    {
        "size": SIZE,
        "count": UINT32,
        "level": Integer(-1, 1),
        "on": Boolean(),
        "mode": Enum(("a", "b")),
        "seconds": Number(low=0),
        "list": Array(Struct({"x": Array(String())})),
    },
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "Parameter 'name' is missing"),
        ({"name": 1}, "Invalid parameter type for 'name', expected: string"),
        ({"name": "", "colour": 1}, "Parameter 'colour' is unexpected"),
        ({"name": "", "size": "1"}, "Invalid parameter type for 'size', expected: integer"),
        ({"name": "", "size": True}, "Invalid parameter type for 'size', expected: integer"),
        ({"name": "", "size": 1.0}, "Invalid parameter type for 'size', expected: integer"),
        ({"name": "", "size": -1}, "Parameter 'size' expects uint64"),
        ({"name": "", "size": 1 << 63}, "Parameter 'size' expects uint64"),
        ({"name": "", "count": 1 << 32}, "Parameter 'count' expects uint32_t"),
        ({"name": "", "level": 2}, "Parameter 'level' expects a value from -1 to 1"),
        ({"name": "", "on": 1}, "Invalid parameter type for 'on', expected: boolean"),
        ({"name": "", "mode": "c"}, "Parameter 'mode' does not accept value 'c'"),
        ({"name": "", "mode": 1}, "Invalid parameter type for 'mode', expected: string"),
        ({"name": "", "seconds": "1"}, "Invalid parameter type for 'seconds', expected: number"),
        ({"name": "", "seconds": -1}, "Parameter 'seconds' expects a number not below 0"),
        ({"name": "", "list": {}}, "Invalid parameter type for 'list', expected: array"),
        ({"name": "", "list": "ab"}, "Invalid parameter type for 'list', expected: array"),
        ({"name": "", "list": [1]}, "Invalid parameter type for 'list[0]', expected: object"),
        ({"name": "", "list": [{"x": []}, {}]}, "Parameter 'list[1].x' is missing"),
        (
            {"name": "", "list": [{"x": ["", 1]}]},
            "Invalid parameter type for 'list[0].x[1]', expected: string",
        ),
        ({"name": "", "list": [{"x": [], "y": 1}]}, "Parameter 'list[0].y' is unexpected"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(values, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        Arguments(SCHEMA, values)
    assert str(refused.value) == text


def test_getters() -> None:
    arguments = Arguments(SCHEMA, {"name": "x", "size": 5, "seconds": 1.5, "on": True})
    assert arguments.string("name") == "x"
    assert arguments.integer("size") == 5
    assert arguments.optional_number("seconds") == 1.5
    assert arguments.boolean("on", default=False) is True
    assert arguments.optional_string("mode") is None
    assert arguments.optional_integer("count") is None
    assert arguments.strings("list") == []
