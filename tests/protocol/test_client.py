"""Our client's handshake, against our server in memory and against servers that misbehave."""

from __future__ import annotations

import dataclasses

import pytest

from nbdfleece.base.errors import OptionRefused, PeerViolation
from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import client, wire
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.client import Connected, RemoteExport
from nbdfleece.protocol.nbd.handshake import GREETING, Handshake, Transmission
from nbdfleece.protocol.nbd.talk import Conversation, Talk
from tests.support.nbd_machines import DISK, FLAGS, FakeDirectory, join

PIECES = pytest.mark.parametrize("piece", [0, 1, 2, 7])
BASE = "base:allocation"


def remote_disk(flags: int = FLAGS) -> RemoteExport:
    return RemoteExport(DISK.size, flags, "disk", "a disk", 1, 4096, 32 * MiB)


# --- both machines, joined -------------------------------------------------------------------


@PIECES
@pytest.mark.parametrize("structured", [True, False])
def test_connect_reaches_transmission(piece: int, structured: bool) -> None:
    server = Handshake(FakeDirectory())

    connected = join(
        client.connect("disk", structured=structured, contexts=[BASE, "x:y"]), server, piece=piece
    )

    flags = FLAGS | c.NBD_FLAG_SEND_DF if structured else FLAGS
    contexts = {BASE: 0} if structured else {}
    assert connected == Connected(remote_disk(flags), structured, contexts)
    assert isinstance(server.outcome, Transmission)
    assert server.outcome.export == DISK
    assert server.outcome.flags == flags
    assert dict(server.outcome.contexts) == {number: name for name, number in contexts.items()}


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


def test_old_server_without_go_is_met_with_export_name() -> None:
    """Any error but UNSUP to GO is final; on UNSUP the client falls back."""
    result, sent = hear(
        client.connect("disk", structured=True, contexts=[BASE]),
        GREETING,
        wire.option_reply(c.NBD_OPT_STRUCTURED_REPLY, c.NBD_REP_ERR_UNSUP),
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


def test_random_answers_end_in_a_violation_or_a_refusal_or_wait(rng) -> None:
    good = EXPORT + wire.info_block_size_reply(GO, minimum=1, preferred=512, maximum=512) + ACK
    for _ in range(2000):
        answer = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            answer[rng.randrange(len(answer))] = rng.randrange(256)
        conversation = Conversation(client.go("disk"))
        list(conversation.feed(b""))
        try:
            list(conversation.feed(bytes(answer)))
        except (PeerViolation, OptionRefused):
            continue
        assert conversation.result is None or dataclasses.is_dataclass(conversation.result)
