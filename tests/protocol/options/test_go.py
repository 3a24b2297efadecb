"""NBD_OPT_INFO and NBD_OPT_GO."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_machines import DISK, FLAGS, ODD, FakeDirectory, Script

BOTH = pytest.mark.parametrize("number", [c.NBD_OPT_INFO, c.NBD_OPT_GO])
EXPORT_INFO = wire.INFO_EXPORT.pack(c.NBD_INFO_EXPORT, DISK.size, FLAGS)
BLOCK_INFO = wire.INFO_BLOCK_SIZE.pack(c.NBD_INFO_BLOCK_SIZE, 1, 4096, 32 * MiB)
NAME_INFO = wire.U16.pack(c.NBD_INFO_NAME) + b"disk"
DESCRIPTION_INFO = wire.U16.pack(c.NBD_INFO_DESCRIPTION) + b"a disk"


def infos(replies: list[tuple[int, bytes]]) -> list[bytes]:
    """Return the information before the ACK."""
    assert replies[-1] == (c.NBD_REP_ACK, b"")
    assert all(kind == c.NBD_REP_INFO for kind, _ in replies[:-1])
    return [data for _, data in replies[:-1]]


@BOTH
def test_size_flags_and_block_sizes_are_told_unasked(number: int) -> None:
    assert infos(Script().option(number, wire.info_request(b"disk", []))) == [
        EXPORT_INFO,
        BLOCK_INFO,
    ]


@BOTH
def test_each_information_comes_once_however_often_asked(number: int) -> None:
    asked = [3, 2, 1, 0, 3, 2, 1, 0, 1, 77, 0xFFFF]

    told = infos(Script().option(number, wire.info_request(b"disk", asked)))

    assert told == [EXPORT_INFO, NAME_INFO, DESCRIPTION_INFO, BLOCK_INFO]


def test_as_many_requests_as_can_be_counted_are_taken() -> None:
    told = infos(Script().option(c.NBD_OPT_INFO, wire.info_request(b"disk", [1] * 0xFFFF)))

    assert told == [EXPORT_INFO, NAME_INFO, BLOCK_INFO]


def test_export_without_description_tells_none() -> None:
    told = infos(Script().option(c.NBD_OPT_INFO, wire.info_request(b"odd", [2])))

    assert [data[:2] for data in told] == [b"\0\0", b"\0\3"]


def test_sizes_are_told_to_the_byte() -> None:
    told = infos(Script().option(c.NBD_OPT_INFO, wire.info_request(b"odd", [])))

    assert told[0] == wire.INFO_EXPORT.pack(c.NBD_INFO_EXPORT, 1048577, ODD.flags)


@BOTH
def test_df_is_told_once_structured_replies_are_on(number: int) -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY)

    told = infos(script.option(number, wire.info_request(b"disk", [])))

    assert told[0] == wire.INFO_EXPORT.pack(0, DISK.size, FLAGS | c.NBD_FLAG_SEND_DF)


@BOTH
def test_default_export_is_told_by_its_name(number: int) -> None:
    script = Script(FakeDirectory(default=DISK))

    told = infos(script.option(number, wire.info_request(b"", [c.NBD_INFO_NAME])))

    assert NAME_INFO in told


@BOTH
@pytest.mark.parametrize("name", [b"", b"unknown", b"x" * 4096, "dísk".encode()])
def test_unknown_export_is_unknown_and_nothing_else_is_told(number: int, name: bytes) -> None:
    script = Script()

    ((kind, text),) = script.option(number, wire.info_request(name, [3]))

    assert kind == c.NBD_REP_ERR_UNKNOWN
    assert len(text) < 400
    assert script.is_haggling


def test_the_lack_of_a_default_export_is_said_in_words() -> None:
    ((_, text),) = Script().option(c.NBD_OPT_GO, wire.info_request(b"", []))

    assert text == b"there is no default export"


def test_error_text_shows_no_control_characters() -> None:
    ((_, text),) = Script().option(c.NBD_OPT_GO, wire.info_request(b"a\r\n\x1b[2J", []))

    assert text.isascii()
    assert text.decode().isprintable()


def raw(name_length: int, name: bytes, count: int, rest: bytes) -> bytes:
    return struct.pack(">I", name_length) + name + struct.pack(">H", count) + rest


MALFORMED = {
    "empty": b"",
    "five bytes": bytes(5),
    "name length at its limit": raw(0xFFFFFFFF, b"disk", 0, b""),
    "name length plus one": raw(5, b"disk", 0, b""),
    "name length beyond the count": raw(6, b"disk", 0, b""),
    "name too long": raw(4097, b"x" * 4097, 0, b""),
    "NUL in the name": raw(5, b"di\0sk", 0, b""),
    "name not UTF-8": raw(2, b"\xff\xfe", 0, b""),
    "fewer infos than counted": raw(4, b"disk", 2, b"\0\3"),
    "half an info": raw(4, b"disk", 1, b"\0"),
    "more infos than counted": raw(4, b"disk", 0, b"\0\3"),
    "trailing byte": raw(4, b"disk", 1, b"\0\3x"),
    "a MiB of data": raw(4, b"disk", 0, bytes(MiB)),
}


@BOTH
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_data_is_invalid_and_the_next_option_parses(number: int, data: bytes) -> None:
    script = Script()

    assert script.outcome_type(number, data) == c.NBD_REP_ERR_INVALID
    assert script.outcome_type(c.NBD_OPT_GO, wire.info_request(b"disk", [])) == c.NBD_REP_ACK


def test_directory_refuses_with_its_own_error() -> None:
    script = Script(FakeDirectory(refusal=OptionRefused(c.NBD_REP_ERR_POLICY, "not for you")))

    assert script.option(c.NBD_OPT_GO, wire.info_request(b"disk", [])) == [
        (c.NBD_REP_ERR_POLICY, b"not for you")
    ]
    assert script.is_haggling


def test_info_does_not_enter_transmission() -> None:
    script = Script()
    script.option(c.NBD_OPT_INFO, wire.info_request(b"disk", []))

    assert script.is_haggling


def test_go_right_after_info_keeps_what_info_told() -> None:
    script = Script()
    request = wire.info_request(b"disk", [3])
    script.option(c.NBD_OPT_INFO, request)
    script.directory.exports = [dataclasses.replace(DISK, size=DISK.size * 2)]

    assert script.outcome_type(c.NBD_OPT_GO, request) == c.NBD_REP_ERR_UNKNOWN
    assert script.outcome_type(c.NBD_OPT_GO, request) == c.NBD_REP_ACK


def test_another_generation_of_the_same_size_is_another_export() -> None:
    script = Script()
    request = wire.info_request(b"disk", [])
    script.option(c.NBD_OPT_INFO, request)
    script.directory.exports = [dataclasses.replace(DISK, generation=DISK.generation + 1)]

    assert script.outcome_type(c.NBD_OPT_GO, request) == c.NBD_REP_ERR_UNKNOWN


@pytest.mark.parametrize("between", [c.NBD_OPT_LIST, c.NBD_OPT_STRUCTURED_REPLY])
def test_info_binds_only_the_next_option(between: int) -> None:
    script = Script()
    request = wire.info_request(b"disk", [])
    script.option(c.NBD_OPT_INFO, request)
    script.option(between)
    script.directory.exports = [dataclasses.replace(DISK, size=DISK.size * 2)]

    assert script.outcome_type(c.NBD_OPT_GO, request) == c.NBD_REP_ACK
