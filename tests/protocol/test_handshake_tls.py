"""TLS in the handshake: what each mode answers, and that nothing survives from before TLS.

TLS itself is not here: the tests say when it has begun.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_OPTION_LENGTH, MAX_OPTIONS
from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import client, wire
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client import RemoteExport
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import Handshake
from nbdfleece.protocol.nbd.talk import Talk
from tests.support.nbd_machines import (
    DISK,
    FIXED,
    FLAGS,
    ODD,
    FakeDirectory,
    NeedsTls,
    Script,
    join,
    parse_replies,
    pieces,
)

OFF, ALLOW, REQUIRE = TlsMode.OFF, TlsMode.ALLOW, TlsMode.REQUIRE
WITH_TLS = pytest.mark.parametrize("mode", [ALLOW, REQUIRE])
PIECES = pytest.mark.parametrize("piece", [0, 1, 2, 7])

SECRET = dataclasses.replace(DISK, name="secret", description="over TLS only")
BASE = "base:allocation"

ACK, CLOSED = c.NBD_REP_ACK, None
TLS_REQD, UNKNOWN, INVALID = c.NBD_REP_ERR_TLS_REQD, c.NBD_REP_ERR_UNKNOWN, c.NBD_REP_ERR_INVALID
POLICY, UNSUP = c.NBD_REP_ERR_POLICY, c.NBD_REP_ERR_UNSUP


def info(name: str) -> bytes:
    return wire.info_request(name.encode(), [])


def meta(name: str) -> bytes:
    return wire.meta_request(name.encode(), [BASE.encode()])


# Row: an option. Columns: the last reply without TLS, before a forced TLS, before a TLS that is
# allowed, and over TLS. DISK may be seen in plain text where TLS is not a must, SECRET may not.
MATRIX: dict[str, tuple[int, bytes, tuple[int | None, ...]]] = {
    "STARTTLS": (c.NBD_OPT_STARTTLS, b"", (POLICY, ACK, ACK, INVALID)),
    "STARTTLS with data": (c.NBD_OPT_STARTTLS, b"x", (INVALID, INVALID, INVALID, INVALID)),
    "LIST": (c.NBD_OPT_LIST, b"", (ACK, TLS_REQD, ACK, ACK)),
    "LIST with data": (c.NBD_OPT_LIST, b"x", (INVALID, TLS_REQD, INVALID, INVALID)),
    "INFO ordinary": (c.NBD_OPT_INFO, info("disk"), (ACK, TLS_REQD, ACK, ACK)),
    "INFO TLS-only": (c.NBD_OPT_INFO, info("secret"), (UNKNOWN, TLS_REQD, TLS_REQD, ACK)),
    "INFO unknown": (c.NBD_OPT_INFO, info("no"), (UNKNOWN, TLS_REQD, TLS_REQD, UNKNOWN)),
    "INFO malformed": (c.NBD_OPT_INFO, b"x", (INVALID, TLS_REQD, INVALID, INVALID)),
    "GO ordinary": (c.NBD_OPT_GO, info("disk"), (ACK, TLS_REQD, ACK, ACK)),
    "GO TLS-only": (c.NBD_OPT_GO, info("secret"), (UNKNOWN, TLS_REQD, TLS_REQD, ACK)),
    "GO unknown": (c.NBD_OPT_GO, info("no"), (UNKNOWN, TLS_REQD, TLS_REQD, UNKNOWN)),
    "EXPORT_NAME TLS-only": (
        c.NBD_OPT_EXPORT_NAME, b"secret", (CLOSED, CLOSED, CLOSED, ACK),
    ),
    "EXPORT_NAME unknown": (c.NBD_OPT_EXPORT_NAME, b"no", (CLOSED, CLOSED, CLOSED, CLOSED)),
    "EXPORT_NAME ordinary": (c.NBD_OPT_EXPORT_NAME, b"disk", (ACK, CLOSED, ACK, ACK)),
    "ABORT": (c.NBD_OPT_ABORT, b"", (ACK, ACK, ACK, ACK)),
    "STRUCTURED_REPLY": (c.NBD_OPT_STRUCTURED_REPLY, b"", (ACK, TLS_REQD, ACK, ACK)),
    "EXTENDED_HEADERS": (c.NBD_OPT_EXTENDED_HEADERS, b"", (ACK, TLS_REQD, ACK, ACK)),
    "LIST_META ordinary": (c.NBD_OPT_LIST_META_CONTEXT, meta("disk"), (ACK, TLS_REQD, ACK, ACK)),
    "LIST_META TLS-only": (
        c.NBD_OPT_LIST_META_CONTEXT, meta("secret"), (UNKNOWN, TLS_REQD, UNKNOWN, ACK),
    ),
    "LIST_META unknown": (
        c.NBD_OPT_LIST_META_CONTEXT, meta("no"), (UNKNOWN, TLS_REQD, UNKNOWN, UNKNOWN),
    ),
    "SET_META too early": (
        c.NBD_OPT_SET_META_CONTEXT, meta("secret"), (INVALID, TLS_REQD, INVALID, INVALID),
    ),
    "PEEK_EXPORT": (c.NBD_OPT_PEEK_EXPORT, b"disk", (UNSUP, TLS_REQD, UNSUP, UNSUP)),
    "unknown": (77, bytes(MiB), (UNSUP, TLS_REQD, UNSUP, UNSUP)),
}  # fmt: skip

COLUMNS = ["none", "forced", "allowed", "over forced", "over allowed"]


def arrive(column: str) -> Script:
    """Return a client in that column of the matrix."""
    everything = FakeDirectory(exports=[DISK, ODD, SECRET])
    if column == "none":
        return Script()
    if column == "forced":
        return Script(everything, tls=REQUIRE)
    if column == "allowed":
        return Script(NeedsTls(), tls=ALLOW)
    script = Script(NeedsTls(), tls=REQUIRE if column == "over forced" else ALLOW)
    script.start_tls(everything)
    return script


@pytest.mark.parametrize(
    ("column", "row"),
    list(itertools.product(COLUMNS, MATRIX)),
    ids=lambda part: part.replace(" ", "-"),
)
def test_matrix(column: str, row: str) -> None:
    number, data, answers = MATRIX[row]
    expected = answers[min(COLUMNS.index(column), 3)]
    script = arrive(column)

    answer = script.raw(wire.option(number, data))

    if expected is CLOSED:
        assert answer == b""
        assert not script.closed.quiet
    elif number == c.NBD_OPT_EXPORT_NAME:
        assert script.transmission.export.name == data.decode()
    else:
        assert parse_replies(number, answer)[-1][0] == expected
        if expected == TLS_REQD:
            assert len(parse_replies(number, answer)) == 1  # nothing is told before
        check_it_goes_on(script, number, expected)


def check_it_goes_on(script: Script, number: int, reply: int) -> None:
    """Check that the connection is where the reply says."""
    if number == c.NBD_OPT_ABORT:
        assert script.closed.quiet
    elif number == c.NBD_OPT_GO and reply == ACK:
        assert script.transmission
    elif number == c.NBD_OPT_STARTTLS and reply == ACK:
        assert script.server.wants_tls
    else:
        assert script.is_haggling
        assert script.outcome_type(c.NBD_OPT_ABORT) == ACK  # the next option parses


# --- modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, c.NBD_FLAG_C_NO_ZEROES])
def test_forced_tls_needs_fixed_newstyle(flags: int) -> None:
    script = Script(tls=REQUIRE, client_flags=None)

    assert script.raw(wire.CLIENT_FLAGS.pack(flags)) == b""
    assert "TLS" in script.closed.reason


def test_client_without_fixed_newstyle_gets_no_tls_where_it_is_allowed() -> None:
    """The server acts as one without TLS: what needs TLS is not to be had."""
    asks = Script(NeedsTls(), tls=ALLOW, client_flags=0)
    secret = Script(NeedsTls(), tls=ALLOW, client_flags=0)
    ordinary = Script(NeedsTls(), tls=ALLOW, client_flags=0)

    assert asks.raw(wire.option(c.NBD_OPT_STARTTLS)) == b""
    assert asks.closed
    assert secret.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"secret")) == b""
    assert secret.closed
    ordinary.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk"))
    assert ordinary.transmission.export == DISK


@pytest.mark.parametrize("number", [c.NBD_OPT_INFO, c.NBD_OPT_GO, c.NBD_OPT_LIST_META_CONTEXT])
def test_hidden_and_unknown_exports_look_the_same(number: int) -> None:
    data = meta if number == c.NBD_OPT_LIST_META_CONTEXT else info
    script = Script(NeedsTls(), tls=ALLOW)

    assert script.option(number, data("secret")) == script.option(number, data("no"))


@pytest.mark.parametrize("number", [c.NBD_OPT_SET_META_CONTEXT, c.NBD_OPT_LIST_META_CONTEXT])
def test_meta_contexts_never_ask_for_tls_where_it_is_allowed(number: int) -> None:
    script = Script(NeedsTls(), tls=ALLOW)
    script.option(c.NBD_OPT_STRUCTURED_REPLY)

    assert script.outcome_type(number, meta("secret")) == UNKNOWN


@pytest.mark.parametrize("number", [c.NBD_OPT_INFO, c.NBD_OPT_GO])
@pytest.mark.parametrize("mode", list(TlsMode))
def test_tls_is_never_asked_for_over_tls_nor_where_there_is_none(
    number: int, mode: TlsMode
) -> None:
    """Even by a directory that is wrong about it."""
    script = Script(NeedsTls(), tls=mode)
    if mode is not OFF:
        script.start_tls(NeedsTls())

    assert script.outcome_type(number, info("no")) == UNKNOWN


def test_forced_tls_looks_nothing_up_before_tls() -> None:
    class Untouchable(FakeDirectory):
        def find(self, name: str):
            raise AssertionError("looked up too early")

        def list(self):
            raise AssertionError("listed too early")

    script = Script(Untouchable(), tls=REQUIRE)
    flood = Script(Untouchable(), tls=REQUIRE)

    flood.raw(wire.option(c.NBD_OPT_LIST) * (MAX_OPTIONS + 1))
    assert "options" in flood.closed.reason
    for number, data, answers in MATRIX.values():
        if answers[1] == TLS_REQD:
            assert script.outcome_type(number, data) == TLS_REQD
    script.start_tls()
    assert script.outcome_type(c.NBD_OPT_GO, info("disk")) == ACK


def test_data_of_options_refused_for_want_of_tls_is_consumed_and_not_kept() -> None:
    """Nbdkit before 1.33.2 did not consume it."""
    script = Script(tls=REQUIRE)
    looks_like_go = wire.option(c.NBD_OPT_GO, info("disk"))
    for number in (c.NBD_OPT_INFO, c.NBD_OPT_SET_META_CONTEXT, c.NBD_OPT_LIST, 77):
        assert script.outcome_type(number, looks_like_go) == TLS_REQD

    script.raw(wire.OPTION_HEADER.pack(c.IHAVEOPT, c.NBD_OPT_SET_META_CONTEXT, MAX_OPTION_LENGTH))
    script.raw(bytes(MAX_OPTION_LENGTH - 1))
    assert len(script.server._conversation.leftover) < MiB // 4
    script.raw(b"\0")
    script.start_tls()


@PIECES
def test_info_then_starttls_then_go(piece: int) -> None:
    """The order that desynchronised nbdkit before 1.33.2."""

    def talk() -> Talk[RemoteExport]:
        yield from client.greet(no_zeroes=True)
        refused = []
        for option in (client.info("disk"), client.list_meta_context("disk", [BASE])):
            try:
                yield from option
            except OptionRefused as error:
                refused.append(error.reply)
        assert refused == [TLS_REQD, TLS_REQD]
        yield from client.ask(c.NBD_OPT_STARTTLS)
        return (yield from client.go("secret"))

    server = Handshake(FakeDirectory(), tls=REQUIRE)
    export = join(talk(), server, piece=piece, over_tls=FakeDirectory(exports=[SECRET]))

    assert export.description == "over TLS only"


def test_options_before_tls_count() -> None:
    """TLS does not give a client a second set of options."""
    script = Script(tls=REQUIRE)
    for _ in range(MAX_OPTIONS - 1):
        script.option(c.NBD_OPT_LIST)
    script.start_tls(FakeDirectory(exports=[]))

    assert script.raw(wire.option(c.NBD_OPT_LIST)) == b""
    assert "options" in script.closed.reason


# --- what is agreed on before TLS is gone (CVE-2021-3716) ------------------------------------

AGREED = {
    "structured": [(c.NBD_OPT_STRUCTURED_REPLY, b"")],
    "extended": [(c.NBD_OPT_EXTENDED_HEADERS, b"")],
    "contexts": [(c.NBD_OPT_STRUCTURED_REPLY, b""), (c.NBD_OPT_SET_META_CONTEXT, meta("disk"))],
    "all": [
        (c.NBD_OPT_STRUCTURED_REPLY, b""),
        (c.NBD_OPT_EXTENDED_HEADERS, b""),
        (c.NBD_OPT_SET_META_CONTEXT, meta("disk")),
        (c.NBD_OPT_INFO, info("disk")),
    ],
}


@pytest.mark.parametrize("agreed", AGREED.values(), ids=AGREED.keys())
@pytest.mark.parametrize("again", [False, True], ids=["as it is", "with structured replies again"])
def test_cve_2021_3716_nothing_survives_starttls(
    agreed: list[tuple[int, bytes]], again: bool
) -> None:
    script = Script(tls=ALLOW)
    for number, data in agreed:
        assert script.outcome_type(number, data) == ACK
    script.start_tls()
    if again:
        assert script.outcome_type(c.NBD_OPT_STRUCTURED_REPLY) == ACK
    script.option(c.NBD_OPT_GO, info("disk"))

    found = script.transmission
    assert (found.structured, found.extended, found.contexts) == (again, False, ())
    assert found.flags == FLAGS | (c.NBD_FLAG_SEND_DF if again else 0)


def test_extended_headers_may_be_asked_for_again_over_tls() -> None:
    script = Script(tls=ALLOW)
    script.option(c.NBD_OPT_EXTENDED_HEADERS)
    script.start_tls()

    assert script.outcome_type(c.NBD_OPT_STRUCTURED_REPLY) == ACK
    assert script.outcome_type(c.NBD_OPT_EXTENDED_HEADERS) == ACK


def test_info_before_tls_promises_nothing_over_tls() -> None:
    """The export behind a name may be another one for who has shown a certificate."""
    bigger = dataclasses.replace(DISK, size=2 * DISK.size)
    script = Script(tls=ALLOW)
    script.option(c.NBD_OPT_INFO, info("disk"))
    script.start_tls(FakeDirectory(exports=[bigger]))

    assert script.outcome_type(c.NBD_OPT_GO, info("disk")) == ACK
    assert script.transmission.export == bigger


@pytest.mark.parametrize(("flags", "zeroes"), [(FIXED, 124), (FIXED | 2, 0)])
def test_client_flags_hold_over_tls(flags: int, zeroes: int) -> None:
    """They are sent once, before the options."""
    script = Script(tls=REQUIRE, client_flags=flags)
    script.start_tls()

    answer = script.raw(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk"))

    assert len(answer) == wire.EXPORT_NAME_REPLY.size + zeroes


# --- plain text behind STARTTLS --------------------------------------------------------------

BEHIND = {
    "a byte": b"\x16",
    "LIST": wire.option(c.NBD_OPT_LIST),
    "half an option": wire.option(c.NBD_OPT_GO, info("disk"))[:9],
    "another STARTTLS": wire.option(c.NBD_OPT_STARTTLS),
}


@WITH_TLS
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
def test_plain_text_behind_starttls_closes_before_the_ack(mode: TlsMode, behind: bytes) -> None:
    """As CVE-2024-34083 of aiosmtpd: what came before TLS was heard as if it came over TLS."""
    script = Script(tls=mode)

    assert script.raw(wire.option(c.NBD_OPT_STARTTLS) + behind) == b""
    assert "plain text" in script.closed.reason
    assert not script.closed.quiet
    assert not script.server.wants_tls


@WITH_TLS
@pytest.mark.parametrize("first", [1, 2, 7, 15, 17, 31])
def test_plain_text_behind_a_starttls_in_pieces(mode: TlsMode, first: int) -> None:
    script = Script(tls=mode)
    sent = wire.option(c.NBD_OPT_STARTTLS) + wire.option(c.NBD_OPT_LIST)

    assert script.raw(sent[:first]) == b""
    assert script.raw(sent[first:]) == b""
    assert script.closed


def test_plain_text_behind_a_refused_starttls_is_the_next_option() -> None:
    script = Script(tls=OFF)

    answers = script.raw(wire.option(c.NBD_OPT_STARTTLS) + wire.option(c.NBD_OPT_ABORT))

    assert answers.endswith(wire.option_reply(c.NBD_OPT_ABORT, ACK))


@WITH_TLS
@PIECES
def test_machine_stops_at_the_ack_until_tls_has_begun(mode: TlsMode, piece: int) -> None:
    script = Script(tls=mode)
    heard = b""
    for part in pieces(wire.option(c.NBD_OPT_STARTTLS), piece):
        assert not script.server.wants_tls
        heard += script.raw(part)

    assert heard == wire.option_reply(c.NBD_OPT_STARTTLS, ACK)
    assert script.server.wants_tls
    assert script.is_haggling
    with pytest.raises(AssertionError, match="TLS comes first"):
        script.raw(wire.option(c.NBD_OPT_LIST))


def test_wish_for_tls_is_there_before_the_ack_is_sent() -> None:
    script = Script(tls=ALLOW)
    steps = script.server.feed(wire.option(c.NBD_OPT_STARTTLS))

    next(steps)
    assert script.server.wants_tls


def test_tls_may_not_begin_unasked() -> None:
    script = Script(tls=ALLOW)

    with pytest.raises(AssertionError, match="nobody asked"):
        script.server.tls_begun(FakeDirectory())


def test_client_that_leaves_before_tls_did_nothing_wrong() -> None:
    script = Script(tls=REQUIRE)
    script.raw(wire.option(c.NBD_OPT_STARTTLS))

    assert script.server.end_of_stream().quiet


# --- shutdown --------------------------------------------------------------------------------


def test_shutdown_is_told_to_who_wants_tls_and_tls_to_the_others() -> None:
    """TLS_REQD is a must; a client that follows it hears of the shutdown next."""
    script = Script(tls=REQUIRE)
    script.server.is_shutting_down = True

    assert script.outcome_type(c.NBD_OPT_LIST) == TLS_REQD
    assert script.outcome_type(c.NBD_OPT_STARTTLS) == c.NBD_REP_ERR_SHUTDOWN
    assert not script.server.wants_tls
    assert script.outcome_type(c.NBD_OPT_ABORT) == ACK


def test_shutdown_is_told_over_tls() -> None:
    script = Script(tls=REQUIRE)
    script.start_tls()
    script.server.is_shutting_down = True

    assert script.outcome_type(c.NBD_OPT_GO, info("disk")) == c.NBD_REP_ERR_SHUTDOWN
    assert script.outcome_type(c.NBD_OPT_ABORT) == ACK


# --- both machines, joined -------------------------------------------------------------------


@PIECES
@WITH_TLS
@pytest.mark.parametrize("extended", [True, False])
def test_whole_handshake_over_tls(piece: int, mode: TlsMode, extended: bool) -> None:
    def talk() -> Talk[RemoteExport]:
        yield from client.greet(no_zeroes=True)
        yield from client.ask(c.NBD_OPT_STARTTLS)
        if extended:
            yield from client.ask(c.NBD_OPT_EXTENDED_HEADERS)
        else:
            yield from client.structured_reply()
        yield from client.set_meta_context("secret", [BASE])
        return (yield from client.go("secret"))

    server = Handshake(NeedsTls(), tls=mode)
    export = join(talk(), server, piece=piece, over_tls=FakeDirectory(exports=[SECRET]))

    flags = FLAGS | c.NBD_FLAG_SEND_DF
    assert export.flags == (flags | c.NBD_FLAG_BLOCK_STATUS_PAYLOAD if extended else flags)
    assert server.outcome is not None
    assert server.outcome.contexts == ((0, BASE),)
    assert server.outcome.extended is extended
