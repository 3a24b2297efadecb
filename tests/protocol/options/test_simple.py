"""NBD_OPT_STRUCTURED_REPLY, NBD_OPT_EXTENDED_HEADERS; NBD_OPT_ABORT has its handshake tests."""

from __future__ import annotations

import pytest

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_machines import Script

GO_DISK = wire.info_request(b"disk", [])
STRUCTURED, EXTENDED = c.NBD_OPT_STRUCTURED_REPLY, c.NBD_OPT_EXTENDED_HEADERS
ACK = [(c.NBD_REP_ACK, b"")]


def test_structured_replies_are_off_unless_asked_for() -> None:
    script = Script()
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert not script.transmission.structured
    assert not script.transmission.flags & c.NBD_FLAG_SEND_DF


def test_structured_replies_may_be_asked_for_twice() -> None:
    script = Script()

    assert script.option(c.NBD_OPT_STRUCTURED_REPLY) == [(c.NBD_REP_ACK, b"")]
    assert script.option(c.NBD_OPT_STRUCTURED_REPLY) == [(c.NBD_REP_ACK, b"")]
    script.option(c.NBD_OPT_GO, GO_DISK)
    assert script.transmission.structured


def test_refused_request_for_structured_replies_does_not_turn_them_on() -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY, b"x")
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert not script.transmission.structured


def test_abort_ends_haggling() -> None:
    script = Script()

    assert script.option(c.NBD_OPT_ABORT) == [(c.NBD_REP_ACK, b"")]
    assert script.closed.quiet


# --- extended headers ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, STRUCTURED], ids=["alone", "after structured replies"])
def test_extended_headers_bring_structured_replies(first: int | None) -> None:
    script = Script()
    if first is not None:
        script.option(first)

    assert script.option(EXTENDED) == ACK
    script.option(c.NBD_OPT_GO, GO_DISK)
    assert script.transmission.extended
    assert script.transmission.structured
    assert script.transmission.flags & c.NBD_FLAG_SEND_DF


def test_extended_headers_are_off_unless_asked_for() -> None:
    script = Script()
    script.option(STRUCTURED)
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert not script.transmission.extended


def test_extended_headers_may_be_asked_for_once() -> None:
    script = Script()
    script.option(EXTENDED)

    assert script.outcome_type(EXTENDED) == c.NBD_REP_ERR_INVALID
    script.option(c.NBD_OPT_GO, GO_DISK)
    assert script.transmission.extended


def test_there_is_no_way_back_from_extended_headers() -> None:
    script = Script()
    script.option(EXTENDED)

    assert script.outcome_type(STRUCTURED) == c.NBD_REP_ERR_EXT_HEADER_REQD
    assert script.outcome_type(STRUCTURED, b"x") == c.NBD_REP_ERR_INVALID
    script.option(c.NBD_OPT_GO, GO_DISK)
    assert script.transmission.extended


def test_refused_request_for_extended_headers_changes_nothing() -> None:
    script = Script()

    assert script.outcome_type(EXTENDED, b"x") == c.NBD_REP_ERR_INVALID
    assert script.option(EXTENDED) == ACK


def test_extended_headers_can_be_switched_off() -> None:
    script = Script(extended=False)

    assert script.outcome_type(EXTENDED) == c.NBD_REP_ERR_UNSUP
    assert script.outcome_type(EXTENDED, b"x") == c.NBD_REP_ERR_UNSUP
    assert script.option(STRUCTURED) == ACK
    script.option(c.NBD_OPT_GO, GO_DISK)
    assert not script.transmission.extended


def flags_in(replies: list[tuple[int, bytes]]) -> int:
    """Return the transmission flags of an answer to INFO or GO."""
    (data,) = [
        data
        for kind, data in replies
        if kind == c.NBD_REP_INFO and data[:2] == wire.U16.pack(c.NBD_INFO_EXPORT)
    ]
    return wire.INFO_EXPORT.unpack(data)[2]


@pytest.mark.parametrize("option", [c.NBD_OPT_INFO, c.NBD_OPT_GO])
@pytest.mark.parametrize(
    ("agreed", "query_for", "expected"),
    [
        ([EXTENDED], "disk", True),
        ([STRUCTURED, EXTENDED], "disk", True),
        ([EXTENDED], "odd", False),
        ([EXTENDED], None, False),
        ([STRUCTURED], "disk", False),
    ],
    ids=["selected", "after structured", "for another export", "no contexts", "compact"],
)
def test_status_payload_is_advertised_with_extended_headers_and_contexts(
    option: int, agreed: list[int], query_for: str | None, expected: bool
) -> None:
    script = Script()
    for number in agreed:
        script.option(number)
    if query_for is not None:
        request = wire.meta_request(query_for.encode(), [b"base:allocation"])
        assert script.outcome_type(c.NBD_OPT_SET_META_CONTEXT, request) == c.NBD_REP_ACK

    flags = flags_in(script.option(option, GO_DISK))

    assert bool(flags & c.NBD_FLAG_BLOCK_STATUS_PAYLOAD) is expected
    if option == c.NBD_OPT_GO:
        assert script.transmission.flags == flags
