"""The handshake as a whole: flags, framing of options, limits, how it ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_OPTION_LENGTH, MAX_OPTIONS, MAX_OPTIONS_PER_EXPORT
from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.haggle import ExportInfo
from nbdfleece.protocol.nbd.handshake import Closed, Handshake, Transmission
from tests.support.nbd_machines import DISK, FIXED, FIXED_NO_ZEROES, FakeDirectory, Script, pieces

GO_DISK = wire.option(c.NBD_OPT_GO, wire.info_request(b"disk", []))
EMPTY_ONLY = [
    c.NBD_OPT_LIST, c.NBD_OPT_STARTTLS, c.NBD_OPT_STRUCTURED_REPLY, c.NBD_OPT_EXTENDED_HEADERS,
]  # fmt: skip
UNKNOWN = [c.NBD_OPT_PEEK_EXPORT, 12, 77, 0, 0xFFFFFFFF]


def test_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert Script().greeting == bytes.fromhex("4e42444d41474943 49484156454f5054 0003")


# --- client flags ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [1 << 2, 3 | 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_close_the_connection(flags: int) -> None:
    script = Script(client_flags=None)

    assert script.raw(wire.CLIENT_FLAGS.pack(flags)) == b""
    assert "client flags" in script.closed.reason
    assert not script.closed.quiet


@pytest.mark.parametrize("flags", [0, c.NBD_FLAG_C_NO_ZEROES])
def test_client_without_fixed_newstyle_may_only_name_an_export(flags: int) -> None:
    allowed, refused = Script(client_flags=flags), Script(client_flags=flags)

    allowed.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk"))
    assert refused.raw(wire.option(c.NBD_OPT_LIST)) == b""

    assert allowed.transmission.export == DISK
    assert "NBD_OPT_LIST" in refused.closed.reason


# --- framing ---------------------------------------------------------------------------------


def test_bad_option_magic_closes() -> None:
    script = Script()

    assert script.raw(wire.OPTION_HEADER.pack(c.NBDMAGIC, c.NBD_OPT_LIST, 0)) == b""
    assert "magic" in script.closed.reason


@pytest.mark.parametrize("number", UNKNOWN)
@pytest.mark.parametrize("size", [0, 5, MiB, MAX_OPTION_LENGTH])
def test_unknown_option_is_dropped_refused_and_survived(number: int, size: int) -> None:
    script = Script()

    assert script.outcome_type(number, bytes(size)) == c.NBD_REP_ERR_UNSUP
    assert script.outcome_type(c.NBD_OPT_LIST) == c.NBD_REP_ACK


@pytest.mark.parametrize("number", [*EMPTY_ONLY, c.NBD_OPT_INFO, 77, c.NBD_OPT_SET_META_CONTEXT])
@pytest.mark.parametrize("length", [MAX_OPTION_LENGTH + 1, 40 * MiB, 0xFFFFFFFF])
def test_longer_option_than_any_legal_one_closes_unread(number: int, length: int) -> None:
    script = Script()

    assert script.raw(wire.OPTION_HEADER.pack(c.IHAVEOPT, number, length)) == b""
    assert str(length) in script.closed.reason


@pytest.mark.parametrize("number", EMPTY_ONLY)
@pytest.mark.parametrize("size", [1, 24, MiB])
def test_data_with_an_option_that_takes_none_is_invalid(number: int, size: int) -> None:
    script = Script()

    assert script.outcome_type(number, bytes(size)) == c.NBD_REP_ERR_INVALID
    assert script.outcome_type(c.NBD_OPT_LIST) == c.NBD_REP_ACK
    assert script.is_haggling


def test_dropped_data_is_not_kept() -> None:
    script = Script()
    script.raw(wire.OPTION_HEADER.pack(c.IHAVEOPT, 77, MAX_OPTION_LENGTH))

    for _ in range(MAX_OPTION_LENGTH // MiB - 1):
        script.raw(bytes(MiB))
        assert len(script.server._conversation.leftover) < MiB // 4


def test_no_reply_before_the_whole_option_is_there() -> None:
    script = Script()
    option = wire.option(c.NBD_OPT_LIST_META_CONTEXT, wire.meta_request(b"disk", [b"base:"]))

    for byte in option[:-1]:
        assert script.raw(bytes([byte])) == b""
    assert script.raw(option[-1:]) != b""


def test_replies_come_one_option_at_a_time() -> None:
    script = Script()
    steps = script.server.feed(wire.option(c.NBD_OPT_LIST) * 3)

    assert len(list(steps)) == 3


def test_pipelined_options_are_answered_in_order() -> None:
    script = Script()
    sent = wire.option(c.NBD_OPT_STRUCTURED_REPLY) + wire.option(77, b"x") + GO_DISK

    answers = script.raw(sent)

    go = c.NBD_OPT_GO
    assert answered_options(answers) == [c.NBD_OPT_STRUCTURED_REPLY, 77, go, go, go]
    assert script.transmission.structured


def answered_options(data: bytes) -> list[int]:
    """Return the option that each reply is for."""
    options = []
    while data:
        _, option, _, length = wire.OPTION_REPLY_HEADER.unpack_from(data)
        options.append(option)
        data = data[wire.OPTION_REPLY_HEADER.size + length :]
    return options


# --- limits ----------------------------------------------------------------------------------


def test_more_options_than_any_client_needs_close() -> None:
    script = Script()
    allowed = MAX_OPTIONS + MAX_OPTIONS_PER_EXPORT * len(script.directory.exports)

    for _ in range(allowed):
        assert script.outcome_type(c.NBD_OPT_LIST) == c.NBD_REP_ACK
    assert script.raw(wire.option(c.NBD_OPT_LIST)) == b""
    assert "options" in script.closed.reason


def test_exports_are_not_counted_again_for_each_further_option() -> None:
    directory = CountingDirectory()
    script = Script(directory)
    allowed = MAX_OPTIONS + MAX_OPTIONS_PER_EXPORT * len(directory.exports)

    for _ in range(allowed):
        assert script.outcome_type(77) == c.NBD_REP_ERR_UNSUP
    assert directory.counted == 1


class CountingDirectory(FakeDirectory):
    """Counts how often it is listed."""

    counted = 0

    def list(self) -> Sequence[ExportInfo]:
        self.counted += 1
        return super().list()


def test_forbidden_list_gives_no_further_options() -> None:
    script = Script(FakeDirectory(refusal=OptionRefused(c.NBD_REP_ERR_POLICY, "no")))

    for _ in range(MAX_OPTIONS):
        assert script.outcome_type(c.NBD_OPT_LIST) == c.NBD_REP_ERR_POLICY
    assert script.raw(wire.option(c.NBD_OPT_LIST)) == b""
    assert not script.is_haggling


# --- how it ends -----------------------------------------------------------------------------


def test_go_ends_in_transmission_with_what_was_agreed_on() -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY)
    script.option(c.NBD_OPT_SET_META_CONTEXT, wire.meta_request(b"disk", [b"base:allocation"]))
    script.raw(GO_DISK)

    assert script.transmission == Transmission(
        DISK,
        DISK.flags | c.NBD_FLAG_SEND_DF,
        structured=True,
        extended=False,
        contexts=((0, "base:allocation"),),
        leftover=b"",
    )


@pytest.mark.parametrize("piece", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("number", [c.NBD_OPT_GO, c.NBD_OPT_EXPORT_NAME])
def test_requests_behind_the_last_option_are_handed_on(number: int, piece: int) -> None:
    script = Script()
    data = b"disk" if number == c.NBD_OPT_EXPORT_NAME else wire.info_request(b"disk", [])
    request = wire.request(c.NBD_CMD_READ, flags=0, cookie=1, offset=0, length=512)
    handed_on = b""

    for part in pieces(wire.option(number, data) + request, piece):
        if script.is_haggling:
            script.raw(part)
        else:
            handed_on += part  # read by transmission itself

    assert script.transmission.leftover + handed_on == request


def test_outcome_is_there_before_the_last_reply_is_sent() -> None:
    script = Script()
    steps = script.server.feed(GO_DISK)

    next(steps)
    assert script.transmission.export == DISK


def test_abort_is_acknowledged_and_closes_quietly() -> None:
    script = Script()

    assert script.option(c.NBD_OPT_ABORT, b"ignored") == [(c.NBD_REP_ACK, b"")]
    assert script.closed.quiet


def test_nothing_is_heard_after_the_end() -> None:
    script = Script()
    script.option(c.NBD_OPT_ABORT)

    assert script.raw(wire.option(c.NBD_OPT_LIST)) == b""


@pytest.mark.parametrize(
    ("sent", "quiet"),
    [
        (b"", True),
        (wire.CLIENT_FLAGS.pack(3), True),
        (wire.CLIENT_FLAGS.pack(3) + wire.option(c.NBD_OPT_LIST), True),
        (wire.CLIENT_FLAGS.pack(3)[:2], False),
        (wire.CLIENT_FLAGS.pack(3) + GO_DISK[:7], False),
        (wire.CLIENT_FLAGS.pack(3) + GO_DISK[:-1], False),
        (wire.CLIENT_FLAGS.pack(3) + wire.OPTION_HEADER.pack(c.IHAVEOPT, 77, 5), False),
    ],
    ids=["probe", "flags", "between options", "half flags", "half header", "half data", "no data"],
)
def test_client_that_leaves_is_an_error_in_the_middle_of_something_only(
    sent: bytes, quiet: bool
) -> None:
    script = Script(client_flags=None)
    script.raw(sent)

    closed = script.server.end_of_stream()

    assert closed.quiet is quiet
    assert script.server.outcome == closed


def test_shutdown_is_told_to_options_but_abort() -> None:
    script = Script()
    script.server.is_shutting_down = True

    for number in [*EMPTY_ONLY, 77]:
        assert script.outcome_type(number) == c.NBD_REP_ERR_SHUTDOWN
    request = wire.info_request(b"disk", [])
    assert script.outcome_type(c.NBD_OPT_GO, request) == c.NBD_REP_ERR_SHUTDOWN
    assert script.outcome_type(c.NBD_OPT_ABORT) == c.NBD_REP_ACK


def test_text_of_the_shutdown_may_say_why() -> None:
    script = Script()
    script.server.is_shutting_down = True
    script.server.shutdown_text = "the server is full"

    assert script.option(c.NBD_OPT_LIST) == [(c.NBD_REP_ERR_SHUTDOWN, b"the server is full")]


def test_shutdown_closes_on_export_name() -> None:
    script = Script()
    script.server.is_shutting_down = True

    assert script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk")) == b""
    assert isinstance(script.server.outcome, Closed)


def test_every_order_of_options_before_go_is_survived() -> None:
    """CVE-2019-14851: a fix once asserted on an unusual order."""
    info = wire.info_request(b"disk", [])
    meta = wire.meta_request(b"disk", [b"base:allocation"])
    options = [
        (c.NBD_OPT_INFO, info),
        (c.NBD_OPT_INFO, wire.info_request(b"odd", [3])),
        (c.NBD_OPT_LIST_META_CONTEXT, meta),
        (c.NBD_OPT_SET_META_CONTEXT, meta),
        (c.NBD_OPT_STRUCTURED_REPLY, b""),
        (c.NBD_OPT_GO, wire.info_request(b"unknown", [])),
    ]
    for order in itertools.permutations(options, 4):
        script = Script()
        for number, data in order:
            script.option(number, data)
        assert script.outcome_type(c.NBD_OPT_GO, info) == c.NBD_REP_ACK
        assert script.transmission.export == DISK


@pytest.mark.parametrize("client_flags", [FIXED, FIXED_NO_ZEROES])
def test_random_bytes_have_only_documented_outcomes(rng, client_flags: int) -> None:
    for _ in range(2000):
        server = Handshake(FakeDirectory())
        list(server.feed(b""))
        sent = wire.CLIENT_FLAGS.pack(client_flags) + random_options(rng)
        for part in pieces(sent, rng.choice([0, 1, 5, 17])):
            for answer in server.feed(part):
                assert isinstance(answer, bytes)
        assert server.outcome is None or isinstance(server.outcome, Closed | Transmission)


def random_options(rng) -> bytes:
    """Options that are nearly right: a valid one with a few bytes changed, cut or added."""
    sent = b""
    for _ in range(rng.randrange(1, 5)):
        body = rng.choice([
            b"",
            b"disk",
            wire.info_request(b"disk", [3, 1]),
            wire.meta_request(b"disk", [b"base:allocation", b"base:"]),
            rng.randbytes(rng.randrange(40)),
        ])  # fmt: skip
        option = bytearray(wire.option(rng.randrange(13), body))
        for _ in range(rng.choice([0, 0, 1, 2])):
            option[rng.randrange(len(option))] = rng.randrange(256)
        sent += option[: rng.choice([len(option), len(option), rng.randrange(len(option))])]
    return sent
