"""Our client's handshake, against our server in memory and against servers that misbehave."""

from __future__ import annotations

import random

import pytest

from nbdfleece.base.errors import OptionRefused, PeerViolation
from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import client, wire
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client import Connected, RemoteExport
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import GREETING, Handshake, Transmission
from nbdfleece.protocol.nbd.talk import Conversation, Talk
from tests.support.nbd_machines import DISK, FLAGS, FakeDirectory, join, pieces

PIECES = pytest.mark.parametrize("piece", [0, 1, 2, 7])
BASE = "base:allocation"


def remote_disk(flags: int = FLAGS) -> RemoteExport:
    return RemoteExport(DISK.size, flags, "disk", "a disk", 1, 4096, 32 * MiB)


# --- both machines, joined -------------------------------------------------------------------


@PIECES
@pytest.mark.parametrize("structured", [True, False])
def test_connect_reaches_transmission(piece: int, structured: bool) -> None:
    server = Handshake(FakeDirectory(), extended=False)

    connected = join(
        client.connect("disk", structured=structured, contexts=[BASE, "x:y"], extended=True)
        if structured
        else client.connect("disk", structured=False, contexts=[BASE]),
        server,
        piece=piece,
    )

    flags = FLAGS | c.NBD_FLAG_SEND_DF if structured else FLAGS
    contexts = {BASE: 0} if structured else {}
    assert connected == Connected(remote_disk(flags), structured, contexts)
    assert isinstance(server.outcome, Transmission)
    assert server.outcome.export == DISK
    assert server.outcome.flags == flags
    assert dict(server.outcome.contexts) == {number: name for name, number in contexts.items()}


@PIECES
def test_extended_headers_where_the_server_has_them(piece: int) -> None:
    server = Handshake(FakeDirectory())

    connected = join(
        client.connect("disk", structured=False, contexts=[BASE], extended=True),
        server,
        piece=piece,
    )

    assert connected.extended
    assert connected.structured
    assert connected.contexts == {BASE: 0}
    assert isinstance(server.outcome, Transmission)
    assert server.outcome.extended


@PIECES
def test_everything_again_over_tls(piece: int) -> None:
    server = Handshake(FakeDirectory([]), tls=TlsMode.REQUIRE)

    def talk() -> Talk[Connected]:
        no_zeroes = yield from client.begin_tls(no_zeroes=True)
        return (
            yield from client.haggle(
                "disk", no_zeroes=no_zeroes, structured=True, contexts=[BASE], extended=True
            )
        )

    connected = join(talk(), server, piece=piece, over_tls=FakeDirectory())

    assert connected.export.size == DISK.size
    assert connected.contexts == {BASE: 0}


@PIECES
def test_haggling_about_everything(piece: int) -> None:
    def talk() -> Talk[list[object]]:
        heard: list[object] = [(yield from client.greet(no_zeroes=True))]
        heard.append((yield from client.list_exports()))
        heard.append((yield from client.list_meta_context("disk", [])))
        heard.append((yield from client.structured_reply()))
        heard.append((yield from client.set_meta_context("disk", [BASE])))
        heard.append((yield from client.info("disk")))
        try:
            yield from client.go("nowhere")
        except OptionRefused as refused:
            heard.append(refused.reply)
        yield from client.abort()
        return heard

    heard = join(talk(), Handshake(FakeDirectory()), piece=piece)

    assert heard == [
        True,
        [("disk", "a disk"), ("odd", "")],
        [BASE],
        True,
        {BASE: 0},
        remote_disk(FLAGS | c.NBD_FLAG_SEND_DF),
        c.NBD_REP_ERR_UNKNOWN,
    ]


@PIECES
@pytest.mark.parametrize("no_zeroes", [True, False])
def test_export_name(piece: int, no_zeroes: bool) -> None:
    def talk() -> Talk[RemoteExport]:
        agreed = yield from client.greet(no_zeroes=no_zeroes)
        assert agreed is no_zeroes
        return (yield from client.export_name("disk", no_zeroes=agreed))

    assert join(talk(), Handshake(FakeDirectory()), piece=piece) == RemoteExport(DISK.size, FLAGS)


def test_refusal_carries_the_servers_text() -> None:
    with pytest.raises(OptionRefused, match='there is no export "nowhere"'):
        join(
            client.connect("nowhere", structured=True, contexts=[]),
            Handshake(FakeDirectory()),
            piece=0,
        )


def test_default_export() -> None:
    connected = join(
        client.connect("", structured=False, contexts=[]),
        Handshake(FakeDirectory(default=DISK)),
        piece=0,
    )

    assert connected.export.name == "disk"


# --- other servers ---------------------------------------------------------------------------


def hear(talk: Talk[object], *answers: bytes) -> tuple[object, bytes]:
    """Feed a talk the answers of a server; return (result, all that was sent)."""
    conversation = Conversation(talk)
    sent = b"".join(conversation.feed(b""))
    for answer in answers:
        sent += b"".join(conversation.feed(answer))
    assert conversation.is_over
    return conversation.result, sent


STARTTLS_ACK = wire.option_reply(c.NBD_OPT_STARTTLS, c.NBD_REP_ACK)


def begin_tls(*answers: bytes) -> Conversation[bool]:
    conversation = Conversation(client.begin_tls(no_zeroes=True))
    for answer in (b"", *answers):
        list(conversation.feed(answer))
    return conversation


@pytest.mark.parametrize("piece", [0, 1, 2, 7])
def test_plaintext_behind_the_ack_of_starttls_is_a_violation(piece: int) -> None:
    """Whoever sits between could make it look as if it had come over TLS (CVE-2021-3716)."""
    early = wire.option_reply(c.NBD_OPT_GO, c.NBD_REP_ACK)
    conversation = begin_tls(*pieces(GREETING + STARTTLS_ACK + early, piece))

    assert conversation.is_over
    with pytest.raises(PeerViolation, match="plaintext"):
        client.check_tls_may_begin(conversation)


def test_tls_may_begin_right_behind_the_ack() -> None:
    client.check_tls_may_begin(begin_tls(GREETING + STARTTLS_ACK))


def test_server_without_tls_is_not_talked_to_in_plaintext() -> None:
    refusal = wire.option_reply(c.NBD_OPT_STARTTLS, c.NBD_REP_ERR_UNSUP)

    with pytest.raises(OptionRefused):
        begin_tls(GREETING + refusal)


@pytest.mark.parametrize(
    "answer",
    [
        wire.option_reply(c.NBD_OPT_STARTTLS, c.NBD_REP_ACK, b"x"),
        wire.option_reply(c.NBD_OPT_STARTTLS, c.NBD_REP_INFO, b"xx") + STARTTLS_ACK,
    ],
    ids=["ack with data", "data before the ack"],
)
def test_option_without_data_has_an_answer_without_data(answer: bytes) -> None:
    with pytest.raises(PeerViolation):
        begin_tls(GREETING + answer)


@pytest.mark.parametrize(
    "error", [c.NBD_REP_ERR_UNSUP, c.NBD_REP_ERR_INVALID, c.NBD_REP_ERR_POLICY, 0x80000099]
)
def test_any_error_to_extended_headers_falls_back_to_structured_replies(error: int) -> None:
    result, sent = hear(
        client.connect("disk", structured=True, contexts=[], extended=True),
        GREETING,
        wire.option_reply(c.NBD_OPT_EXTENDED_HEADERS, error),
        wire.option_reply(c.NBD_OPT_STRUCTURED_REPLY, c.NBD_REP_ACK),
        wire.option_reply(c.NBD_OPT_INFO, c.NBD_REP_ERR_UNSUP),
        wire.info_export_reply(c.NBD_OPT_GO, size=5, flags=1),
        wire.option_reply(c.NBD_OPT_GO, c.NBD_REP_ACK),
    )

    assert result == Connected(RemoteExport(5, 1), structured=True, contexts={}, extended=False)
    assert wire.option(c.NBD_OPT_EXTENDED_HEADERS) in sent


def test_server_with_a_minimum_block_is_promised_nothing() -> None:
    """GO with NBD_INFO_BLOCK_SIZE would promise to keep to the minimum; our guests do not."""
    number = c.NBD_OPT_INFO
    result, sent = hear(
        client.connect("disk", structured=False, contexts=[]),
        GREETING,
        wire.info_export_reply(number, size=512, flags=1)
        + wire.info_block_size_reply(number, minimum=512, preferred=4096, maximum=65536)
        + wire.option_reply(number, c.NBD_REP_ACK),
        wire.info_export_reply(c.NBD_OPT_GO, size=512, flags=1)
        + wire.option_reply(c.NBD_OPT_GO, c.NBD_REP_ACK),
    )

    assert isinstance(result, Connected)
    assert result.export == RemoteExport(512, 1, None, None, 1, 4096, 65536)
    wanted = wire.info_request(b"disk", (c.NBD_INFO_NAME, c.NBD_INFO_DESCRIPTION))
    assert sent.endswith(wire.option(c.NBD_OPT_GO, wanted))


BITMAP = "qemu:dirty-bitmap:b"


def set_context(*replies: tuple[int, str]) -> bytes:
    number = c.NBD_OPT_SET_META_CONTEXT
    parts = [wire.meta_context_reply(number, context, name.encode()) for context, name in replies]
    return b"".join(parts) + wire.option_reply(number, c.NBD_REP_ACK)


@pytest.mark.parametrize(
    "replies",
    [[(0, "x:y")], [(0, BASE), (0, BITMAP)], [(0, BASE), (1, BASE)]],
    ids=["not asked for", "one id twice", "one name twice"],
)
def test_contexts_other_than_asked_for_are_a_violation(replies: list[tuple[int, str]]) -> None:
    with pytest.raises(PeerViolation):
        hear(client.set_meta_context("disk", [BASE, BITMAP]), set_context(*replies))


def test_a_context_may_be_told_twice() -> None:
    """As nbdkit does for two equal queries."""
    talk = client.set_meta_context("disk", [BASE, BASE])

    assert hear(talk, set_context((1, BASE), (1, BASE)))[0] == {BASE: 1}


def test_old_server_without_go_is_met_with_export_name() -> None:
    """Any error but UNSUP to GO is final; on UNSUP the client falls back."""
    result, sent = hear(
        client.connect("disk", structured=True, contexts=[BASE]),
        GREETING,
        wire.option_reply(c.NBD_OPT_STRUCTURED_REPLY, c.NBD_REP_ERR_UNSUP),
        wire.option_reply(c.NBD_OPT_INFO, c.NBD_REP_ERR_UNSUP),
        wire.option_reply(c.NBD_OPT_GO, c.NBD_REP_ERR_UNSUP),
        wire.export_name_reply(size=5, flags=1, no_zeroes=True),
    )

    assert result == Connected(RemoteExport(5, 1), structured=False, contexts={})
    assert sent.endswith(wire.option(c.NBD_OPT_EXPORT_NAME, b"disk"))


def test_server_without_contexts_is_used_without() -> None:
    result, _ = hear(
        client.connect("disk", structured=True, contexts=[BASE]),
        GREETING,
        wire.option_reply(c.NBD_OPT_STRUCTURED_REPLY, c.NBD_REP_ACK),
        wire.option_reply(c.NBD_OPT_SET_META_CONTEXT, c.NBD_REP_ERR_UNSUP),
        wire.info_export_reply(c.NBD_OPT_INFO, size=0, flags=1)  # as nbd-server: the size is wrong
        + wire.option_reply(c.NBD_OPT_INFO, c.NBD_REP_ACK),
        wire.info_export_reply(c.NBD_OPT_GO, size=5, flags=1),
        wire.option_reply(c.NBD_OPT_GO, c.NBD_REP_ACK),
    )

    assert result == Connected(RemoteExport(5, 1), structured=True, contexts={})


def test_zeroes_are_awaited_from_a_server_that_does_not_know_no_zeroes() -> None:
    def talk() -> Talk[RemoteExport]:
        no_zeroes = yield from client.greet(no_zeroes=True)
        return (yield from client.export_name("d", no_zeroes=no_zeroes))

    result, _ = hear(
        talk(), wire.greeting(1), wire.export_name_reply(size=5, flags=1, no_zeroes=False)
    )

    assert result == RemoteExport(5, 1)


GO = c.NBD_OPT_GO
ACK = wire.option_reply(GO, c.NBD_REP_ACK)
EXPORT = wire.info_export_reply(GO, size=5, flags=1)
BAD_GO = {
    "no export": ACK,
    "bad magic": bytes(20),
    "other option": wire.option_reply(c.NBD_OPT_LIST, c.NBD_REP_ACK),
    "too long": wire.OPTION_REPLY_HEADER.pack(
        c.NBD_OPTION_REPLY_MAGIC, GO, c.NBD_REP_INFO, 1 << 20
    ),
    "two exports": EXPORT + EXPORT + ACK,
    "short export": wire.option_reply(GO, c.NBD_REP_INFO, b"\0\0\0\0") + ACK,
    "short block size": EXPORT + wire.option_reply(GO, c.NBD_REP_INFO, b"\0\3\0\0") + ACK,
    "ack with data": EXPORT + wire.option_reply(GO, c.NBD_REP_ACK, b"x"),
    "wrong type": wire.server_reply(GO, b"x", b"") + ACK,
    "empty info": wire.option_reply(GO, c.NBD_REP_INFO) + ACK,
    "size of 2^63": wire.info_export_reply(GO, size=1 << 63, flags=1) + ACK,
    "no flags": wire.info_export_reply(GO, size=5, flags=0) + ACK,
    "minimum 3": EXPORT
    + wire.info_block_size_reply(GO, minimum=3, preferred=4096, maximum=1 << 25)
    + ACK,
    "minimum above preferred": EXPORT
    + wire.info_block_size_reply(GO, minimum=8192, preferred=4096, maximum=1 << 25)
    + ACK,
    "maximum 0": EXPORT + wire.info_block_size_reply(GO, minimum=1, preferred=512, maximum=0) + ACK,
}


@pytest.mark.parametrize("answer", BAD_GO.values(), ids=BAD_GO.keys())
def test_bad_answer_to_go_is_a_violation(answer: bytes) -> None:
    with pytest.raises(PeerViolation):
        hear(client.go("disk"), answer)


@pytest.mark.parametrize(
    "greeting",
    [
        bytes(18),
        wire.GREETING.pack(c.NBDMAGIC, c.NBD_OLDSTYLE_MAGIC, 3),
        wire.greeting(c.NBD_FLAG_NO_ZEROES),
    ],
    ids=["noise", "oldstyle", "not fixed"],
)
def test_other_than_fixed_newstyle_is_a_violation(greeting: bytes) -> None:
    with pytest.raises(PeerViolation):
        hear(client.greet(no_zeroes=True), greeting)


def test_cve_2017_2630_list_item_that_is_longer_than_its_reply() -> None:
    item = wire.option_reply(c.NBD_OPT_LIST, c.NBD_REP_SERVER, b"\0\0\0\x05abcd")

    with pytest.raises(PeerViolation):
        hear(client.list_exports(), item + wire.option_reply(c.NBD_OPT_LIST, c.NBD_REP_ACK))


def test_endless_list_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_OPTION_REPLIES", 10)
    item = wire.server_reply(c.NBD_OPT_LIST, b"x", b"")

    with pytest.raises(PeerViolation):
        hear(client.list_exports(), item * 11)


def test_long_list_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_OPTION_REPLY_BYTES", 5000)
    item = wire.server_reply(c.NBD_OPT_LIST, b"x" * 4096, b"")

    with pytest.raises(PeerViolation):
        hear(client.list_exports(), item * 2)


def good_stream() -> bytes:
    """All that a server says to `connect`, with the options in this order."""
    parts = [GREETING, wire.option_reply(c.NBD_OPT_EXTENDED_HEADERS, c.NBD_REP_ACK)]
    parts.append(set_context((0, BASE)))
    for number in (c.NBD_OPT_INFO, c.NBD_OPT_GO):
        parts.append(wire.info_export_reply(number, size=1 << 20, flags=0x0D))
        parts.append(wire.info_text_reply(number, c.NBD_INFO_NAME, b"disk"))
        parts.append(wire.info_block_size_reply(number, minimum=1, preferred=512, maximum=1 << 25))
        parts.append(wire.option_reply(number, c.NBD_REP_ACK))
    return b"".join(parts)


def new_connect() -> Conversation[Connected]:
    conversation = Conversation(
        client.connect("disk", structured=True, contexts=[BASE], extended=True)
    )
    list(conversation.feed(b""))
    return conversation


@PIECES
def test_whole_stream_in_pieces(piece: int) -> None:
    conversation = new_connect()
    for part in pieces(good_stream(), piece):
        list(conversation.feed(part))

    assert conversation.result is not None
    assert conversation.result.extended
    assert conversation.leftover == b""


def test_mutated_streams_end_in_a_violation_or_a_refusal_or_wait(
    rng: random.Random, *, long_run: bool
) -> None:
    good = good_stream()
    for _ in range(100_000 if long_run else 3000):
        answer = mutated(good, rng)
        conversation = new_connect()
        try:
            for part in pieces(answer, rng.choice([0, 1, 2, 7])):
                list(conversation.feed(part))
        except (PeerViolation, OptionRefused):
            continue
        result = conversation.result
        assert result is None or 0 <= result.export.size < 1 << 63


def mutated(good: bytes, rng: random.Random) -> bytes:
    """Change, take out or put in some bytes, and perhaps cut the end off."""
    answer = bytearray(good)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(answer))
        kind = rng.randrange(4)
        if kind == 0:
            answer[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 1:
            answer[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del answer[at : at + rng.randrange(1, 9)]
        else:
            answer[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(answer[: rng.choice([len(answer), rng.randrange(len(answer) + 1)])])
