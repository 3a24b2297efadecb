from __future__ import annotations

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_machines import DISK, FIXED, FLAGS, FakeDirectory, Script


@pytest.mark.parametrize(("client_flags", "zeroes"), [(FIXED, 124), (FIXED | 2, 0), (0, 124)])
def test_answer_has_zeroes_unless_the_client_declined(client_flags: int, zeroes: int) -> None:
    script = Script(client_flags=client_flags)

    answer = script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk"))

    assert answer == wire.EXPORT_NAME_REPLY.pack(DISK.size, FLAGS) + bytes(zeroes)
    assert script.transmission.export == DISK


@pytest.mark.parametrize(
    "name", [b"unknown", b"", b"disk\0", b"\xff", b"x" * 4096, b"disk/", b"Disk"]
)
def test_unknown_name_closes_without_an_answer(name: bytes) -> None:
    script = Script()

    assert script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, name)) == b""
    assert "NBD_OPT_EXPORT_NAME" in script.closed.reason
    assert len(script.closed.reason) < 200


@pytest.mark.parametrize("length", [4097, 65536, 0xFFFFFFFF])
def test_longer_name_than_a_string_closes_before_it_is_read(length: int) -> None:
    script = Script()

    script.raw(wire.OPTION_HEADER.pack(c.IHAVEOPT, c.NBD_OPT_EXPORT_NAME, length))

    assert str(length) in script.closed.reason


def test_empty_name_is_the_default_export() -> None:
    script = Script(FakeDirectory(default=DISK))

    script.raw(wire.option(c.NBD_OPT_EXPORT_NAME))

    assert script.transmission.export == DISK


def test_refused_export_closes() -> None:
    script = Script(FakeDirectory(refusal=OptionRefused(c.NBD_REP_ERR_POLICY, "not for you")))

    assert script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk")) == b""
    assert "not for you" in script.closed.reason


def test_structured_replies_show_in_the_flags() -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY)

    answer = script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk"))

    assert answer == wire.EXPORT_NAME_REPLY.pack(DISK.size, FLAGS | c.NBD_FLAG_SEND_DF)


def test_extended_headers_go_with_go_only() -> None:
    script = Script()
    script.option(c.NBD_OPT_EXTENDED_HEADERS)

    assert script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk")) == b""
    assert "NBD_OPT_EXTENDED_HEADERS" in script.closed.reason
