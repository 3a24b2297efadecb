"""NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from nbdfleece.base.limits import MAX_META_DATA, MAX_META_QUERIES
from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_machines import DISK, ODD, FakeDirectory, Script

LIST, SET = c.NBD_OPT_LIST_META_CONTEXT, c.NBD_OPT_SET_META_CONTEXT
BOTH = pytest.mark.parametrize("number", [LIST, SET])

BASE = "base:allocation"
BITMAP = "qemu:dirty-bitmap:b0"
COLONS = "qemu:dirty-bitmap:b0:2026:x"
DEPTH = "qemu:allocation-depth"
RICH = dataclasses.replace(DISK, name="rich", contexts=(BASE, BITMAP, COLONS, DEPTH))


def script(*, structured: bool = True) -> Script:
    made = Script(FakeDirectory(exports=[DISK, ODD, RICH]))
    if structured:
        made.option(c.NBD_OPT_STRUCTURED_REPLY)
    return made


def query(name: str, *queries: str) -> bytes:
    return wire.meta_request(name.encode(), [query.encode() for query in queries])


def contexts(replies: list[tuple[int, bytes]]) -> list[tuple[int, str]]:
    """Return (id, name) of the contexts before the ACK."""
    assert replies[-1] == (c.NBD_REP_ACK, b"")
    assert all(kind == c.NBD_REP_META_CONTEXT for kind, _ in replies[:-1])
    return [(wire.U32.unpack_from(data)[0], data[4:].decode()) for _, data in replies[:-1]]


def listed(*queries: str) -> list[str]:
    found = contexts(script(structured=False).option(LIST, query("rich", *queries)))
    assert all(context_id == 0 for context_id, _ in found)
    return [name for _, name in found]


# --- LIST ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], [BASE, BITMAP, COLONS, DEPTH]),
        (["base:"], [BASE]),
        ([BASE], [BASE]),
        (["qemu:"], [BITMAP, COLONS, DEPTH]),
        (["qemu:dirty-bitmap:"], [BITMAP, COLONS]),
        ([COLONS], [COLONS]),
        (["qemu:dirty"], []),
        (["qemu:dirty-bitmap:b0:"], []),
        (["qemu:dirty-bitmap:b0:2026:"], []),
        (["qemu:dirty-bitmap"], []),
        ([DEPTH, "qemu:dirty-bitmap:"], [BITMAP, COLONS, DEPTH]),
        (["qemu:", "qemu:dirty-bitmap:", BITMAP, "qemu:"], [BITMAP, COLONS, DEPTH]),
        (["qemu:allocation-depth:"], []),
        (["qemu:unknown", "QEMU:", "Base:"], []),
        (["x-nbdfleece:"], []),
        (["base:unknown", "x-other:", "x-other:y", "base", "", ":"], []),
        ([BASE, BASE, "base:"], [BASE]),
        (["qemu:", "base:"], [BASE, BITMAP, COLONS, DEPTH]),
    ],
)
def test_list_finds(queries: list[str], expected: list[str]) -> None:
    assert listed(*queries) == expected


def test_list_does_not_change_what_is_set() -> None:
    one = script()
    one.option(SET, query("rich", BASE))
    one.option(LIST, query("rich", "qemu:"))
    one.option(LIST, query("nowhere"))
    one.option(c.NBD_OPT_GO, wire.info_request(b"rich", []))

    assert one.transmission.contexts == ((0, BASE),)


# --- SET -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], []),
        (["base:"], []),
        (["qemu:", "qemu:dirty-bitmap:"], []),
        (["base:unknown", "base", "x:y"], []),
        ([BASE], [BASE]),
        ([BASE, BASE, BASE], [BASE]),
        ([DEPTH, BITMAP, BASE], [BASE, BITMAP, DEPTH]),
        ([COLONS, "other:x"], [COLONS]),
    ],
)
def test_set_selects_exact_names_once(queries: list[str], expected: list[str]) -> None:
    one = script()

    selected = contexts(one.option(SET, query("rich", *queries)))

    assert [name for _, name in selected] == expected
    assert len({context_id for context_id, _ in selected}) == len(selected)
    one.option(c.NBD_OPT_GO, wire.info_request(b"rich", []))
    assert list(one.transmission.contexts) == selected


def test_set_needs_structured_replies() -> None:
    one = script(structured=False)

    assert one.outcome_type(SET, query("rich", BASE)) == c.NBD_REP_ERR_INVALID


def test_extended_headers_are_as_good_as_structured_replies() -> None:
    one = script(structured=False)
    one.option(c.NBD_OPT_EXTENDED_HEADERS)

    assert contexts(one.option(SET, query("rich", DEPTH))) == [(3, DEPTH)]
    one.option(c.NBD_OPT_GO, wire.info_request(b"rich", []))
    assert one.transmission.contexts == ((3, DEPTH),)


def test_longest_context_name_is_listed_and_set() -> None:
    long = "qemu:dirty-bitmap:" + "b" * (4096 - 18)
    one = Script(FakeDirectory(exports=[dataclasses.replace(DISK, contexts=(BASE, long))]))
    one.option(c.NBD_OPT_STRUCTURED_REPLY)

    assert contexts(one.option(LIST, query("disk", "qemu:"))) == [(0, long)]
    assert contexts(one.option(SET, query("disk", long))) == [(1, long)]


@pytest.mark.parametrize(
    "second",
    [query("rich"), query("nowhere", BASE), b"", query("rich", BASE) + b"x"],
    ids=["nothing", "unknown export", "empty", "trailing"],
)
def test_set_replaces_what_was_set_also_when_it_fails(second: bytes) -> None:
    one = script()
    one.option(SET, query("rich", BASE))
    one.option(SET, second)
    one.option(c.NBD_OPT_GO, wire.info_request(b"rich", []))

    assert one.transmission.contexts == ()


@pytest.mark.parametrize("enter", [c.NBD_OPT_GO, c.NBD_OPT_EXPORT_NAME])
def test_contexts_of_another_export_are_void(enter: int) -> None:
    one = script()
    one.option(SET, query("disk", BASE))
    data = b"odd" if enter == c.NBD_OPT_EXPORT_NAME else wire.info_request(b"odd", [])
    one.raw(wire.option(enter, data))

    assert one.transmission.contexts == ()


def test_contexts_of_an_export_that_was_replaced_are_void() -> None:
    one = script()
    one.option(SET, query("disk", BASE))
    one.directory.exports = [dataclasses.replace(DISK, generation=1)]
    one.option(c.NBD_OPT_GO, wire.info_request(b"disk", []))

    assert one.transmission.contexts == ()


def test_default_export_and_its_name_are_the_same_export() -> None:
    one = script()
    one.directory.default = RICH
    one.option(SET, query("", BASE))
    one.option(c.NBD_OPT_GO, wire.info_request(b"rich", []))

    assert one.transmission.contexts == ((0, BASE),)


# --- both ------------------------------------------------------------------------------------


@BOTH
def test_unknown_export_is_unknown(number: int) -> None:
    one = script()

    assert one.outcome_type(number, query("nowhere", BASE)) == c.NBD_REP_ERR_UNKNOWN
    assert one.is_haggling


def raw(name: bytes, count: int, rest: bytes) -> bytes:
    return wire.counted(name) + struct.pack(">I", count) + rest


MALFORMED = {
    "empty": b"",
    "three bytes": bytes(3),
    "name length at its limit": b"\xff\xff\xff\xffdisk",
    "name longer than the option": b"\0\0\0\5disk",
    "no count": wire.counted(b"disk"),
    "half a count": wire.counted(b"disk") + b"\0\0",
    "query missing": raw(b"disk", 1, b""),
    "half a query length": raw(b"disk", 1, b"\0\0"),
    "query length at its limit": raw(b"disk", 1, b"\xff\xff\xff\xff"),
    "query cut": raw(b"disk", 1, b"\0\0\0\5base"),
    "second query missing": raw(b"disk", 2, wire.counted(b"base:")),
    "trailing byte": query("disk", BASE) + b"x",
    "trailing query": raw(b"disk", 0, wire.counted(b"base:")),
    "trailing MiB": raw(b"disk", 0, bytes(2 * MiB)),
    "query too long": query("disk", "x" * 4097),
    "name too long": query("x" * 4097, BASE),
    "name too long by far": query("x" * MAX_META_DATA, BASE),
    "NUL in a query": query("disk", "base:\0"),
    "query not UTF-8": wire.meta_request(b"disk", [b"\xff"]),
    "NUL in the name": query("di\0sk", BASE),
}


@BOTH
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_data_is_invalid_and_the_next_option_parses(number: int, data: bytes) -> None:
    one = script()

    assert one.outcome_type(number, data) == c.NBD_REP_ERR_INVALID
    assert one.outcome_type(LIST, query("disk")) == c.NBD_REP_ACK


@BOTH
def test_as_many_queries_as_the_limit_are_taken(number: int) -> None:
    assert script().outcome_type(number, query("rich", *[BASE] * MAX_META_QUERIES)) == 1


@BOTH
@pytest.mark.parametrize(
    "data",
    [
        raw(b"disk", MAX_META_QUERIES + 1, b""),
        raw(b"disk", 0xFFFFFFFF, b""),
        query("disk", *["q"] * (MAX_META_QUERIES + 1)),
        query("disk", *["q" * 4096] * (MAX_META_DATA // 4096 + 1)),
    ],
    ids=["counted", "counted high", "too many", "too many bytes"],
)
def test_more_than_we_take_is_too_big(number: int, data: bytes) -> None:
    one = script()

    assert one.outcome_type(number, data) == c.NBD_REP_ERR_TOO_BIG
    assert one.outcome_type(LIST, query("disk")) == c.NBD_REP_ACK
