from __future__ import annotations

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.protocol.qmp.schema import (
    SIZE,
    UINT32,
    Alternate,
    Anything,
    Arguments,
    Array,
    Boolean,
    Enum,
    Integer,
    Later,
    Null,
    Number,
    String,
    Struct,
    Union,
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
        ({"name": "", "size": "1"}, "Parameter 'size' expects uint64"),
        ({"name": "", "size": True}, "Parameter 'size' expects uint64"),
        ({"name": "", "size": 1.0}, "Parameter 'size' expects uint64"),
        ({"name": "", "level": "1"}, "Invalid parameter type for 'level', expected: integer"),
        ({"name": "", "level": 1.0}, "Invalid parameter type for 'level', expected: integer"),
        ({"name": "", "size": -1}, "Parameter 'size' expects uint64"),
        ({"name": "", "size": 1 << 63}, "Parameter 'size' expects uint64"),
        ({"name": "", "count": 1 << 32}, "Parameter 'count' expects uint32_t"),
        ({"name": "", "count": -1}, "Parameter 'count' expects uint32_t"),
        ({"name": "", "count": 1 << 64}, "Parameter 'count' expects uint64"),
        ({"name": "", "count": []}, "Parameter 'count' expects uint64"),
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


def test_the_whole_range_of_integers_is_a_matter_of_type() -> None:
    with pytest.raises(CommandError, match="Invalid parameter type for 'n', expected: integer"):
        Arguments(Struct({"n": Integer()}), {"n": 1 << 63})


def _options() -> Union:
    ref = Alternate("BlockdevRefOrNull", (String(), Later(_options), Null()))
    return Union(
        "driver",
        Struct(optional={"node-name": String()}),
        {"null-co": Struct(optional={"size": SIZE}), "raw": Struct({"file": ref})},
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": "x"}, "Parameter 'driver' does not accept value 'x'"),
        ({"driver": "raw"}, "Parameter 'file' is missing"),
        ({"driver": "raw", "file": "a", "size": 1}, "Parameter 'size' is unexpected"),
        (
            {"driver": "raw", "file": 1},
            "Invalid parameter type for 'file', expected: BlockdevRefOrNull",
        ),
        ({"driver": "raw", "file": {}}, "Parameter 'file.driver' is missing"),
        (
            {"driver": "raw", "file": {"driver": "raw", "file": {"driver": "null-co", "x": 1}}},
            "Parameter 'file.file.x' is unexpected",
        ),
        (
            {"driver": "null-co", "node-name": 1},
            "Invalid parameter type for 'node-name', expected: string",
        ),
    ],
)
def test_unions_and_alternates_of_the_block_layer(values, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        Arguments(_options(), values)
    assert str(refused.value) == text


@pytest.mark.parametrize("file", ["a", None, {"driver": "null-co", "size": 1}])
def test_an_alternate_takes_each_of_its_types(file) -> None:
    values = {"driver": "raw", "node-name": "n", "file": file}
    assert Arguments(_options(), values).members == values


def test_anything_is_anything() -> None:
    assert Arguments(Struct({"x": Anything()}), {"x": [None]}).members == {"x": [None]}
