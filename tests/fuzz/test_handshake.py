"""The handshake machine in memory, fed with mutations of what real clients send.

Whatever comes: it never raises; it answers each option once, in order, with replies that parse; it
ends where a plain reading of the stream says; it makes no difference how the stream is cut; and
there is no transmission without the TLS that a connection must have.
"""

from __future__ import annotations

import gc
import os
import random
import struct
from dataclasses import dataclass, field, replace

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_META_DATA
from nbdfleece.base.units import KiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import GREETING, Closed, Handshake, Outcome, Transmission
from tests.fuzz.captures import load_corpus, mutate
from tests.support.nbd_machines import DISK, ODD, FakeDirectory, NeedsTls

CORPUS = load_corpus()
OPTIONS = [message for capture in CORPUS for message in capture.handshake[1:]]
REQUESTS = [message for capture in CORPUS for message in capture.transmission]

# A million, some minutes of them, and three in a long run; in as many tests as keep each within its
# deadline.
LONG = os.environ.get("NBDFLEECE_LONG") == "1"
SHARDS = 60 if LONG else 20
MUTATIONS = 50_000

STARTTLS = struct.pack(">QI", c.IHAVEOPT, c.NBD_OPT_STARTTLS)
FROZEN = replace(DISK, name="frozen", contexts=(*DISK.contexts, "qemu:allocation-depth"))


@dataclass(frozen=True)
class Case:
    """A handshake to try.

    Attributes:
        stream: What the client sends.
        parts: The same, cut into pieces.
    """

    stream: bytes = field(repr=False)
    parts: list[bytes] = field(repr=False)
    tls: TlsMode
    extended: bool
    directory: FakeDirectory
    shuts_down: bool


def make_case(rng: random.Random) -> Case:
    capture = rng.choice(CORPUS)
    messages = mutate(rng, capture.handshake, OPTIONS)
    messages += rng.choice(((), capture.transmission[:3], REQUESTS[:1]))
    tls = rng.choice(list(TlsMode))
    exports = [DISK, ODD, FROZEN]
    kind = NeedsTls if tls is TlsMode.ALLOW else FakeDirectory
    directory = kind(exports, default=rng.choice((None, DISK)))
    if rng.randrange(20) == 0:
        directory.refusal = OptionRefused(c.NBD_REP_ERR_POLICY, "no")
    stream = b"".join(messages)
    parts = messages if rng.randrange(2) else list(cut(rng, stream))
    return Case(
        *(stream, parts, tls),
        extended=rng.randrange(4) > 0,
        directory=directory,
        shuts_down=rng.randrange(30) == 0,
    )


def cut(rng: random.Random, stream: bytes):
    largest = rng.choice((1, 7, 40, 1000, 100_000)) if len(stream) < 4096 else 100_000
    position = 0
    while position < len(stream):
        size = rng.randrange(largest) + 1
        yield stream[position : position + size]
        position += size


def run(case: Case, parts: list[bytes]) -> tuple[bytes, Outcome | None, int]:
    """Return what the server sent behind the greeting, how it ended, and what it had been fed."""
    machine = Handshake(case.directory, tls=case.tls, extended=case.extended)
    machine.is_shutting_down = case.shuts_down
    sent = b"".join(machine.feed(b""))
    assert sent == GREETING
    replies: list[bytes] = []
    fed = 0
    has_tls = False
    for part in parts:
        if machine.outcome is not None:
            break
        replies += machine.feed(part)
        fed += len(part)
        if machine.outcome is None:
            assert len(machine._conversation.leftover) <= MAX_META_DATA + 64 * KiB
        if machine.wants_tls:
            assert case.tls is not TlsMode.OFF
            assert not has_tls, "TLS inside TLS"
            has_tls = True
            machine.tls_begun(FakeDirectory(case.directory.exports))
    outcome = machine.outcome
    if isinstance(outcome, Transmission):
        assert has_tls or case.tls is not TlsMode.REQUIRE
        assert case.extended or not outcome.extended
        assert outcome.structured or not outcome.extended
    if outcome is None:
        assert isinstance(machine.end_of_stream(), Closed)
    return b"".join(replies), outcome, fed


# --- a plain reading of both streams -------------------------------------------------------------


def options_in(stream: bytes) -> list[tuple[int, int]]:
    """Return the number of each whole option, and where it ends, as far as the stream has sense."""
    found: list[tuple[int, int]] = []
    if len(stream) < 4 or int.from_bytes(stream[:4], "big") & ~3:
        return found
    position = 4
    while position + 16 <= len(stream):
        magic, number, length = struct.unpack_from(">QII", stream, position)
        position += 16 + length
        if magic != c.IHAVEOPT or position > len(stream):
            break
        found.append((number, position))
    return found


def options_answered(replies: bytes, asked: list[int]) -> int:
    """Return how many of the options that were asked are answered to their end.

    All but the last are, each in its turn, and with what a client can parse.
    """
    position = 0
    for index, number in enumerate(asked):
        if position == len(replies):
            return index
        if number == c.NBD_OPT_EXPORT_NAME:  # has a reply of its own, and is the last
            assert len(replies) - position in (10, 134)
            return index + 1
        kind = 0
        while kind != c.NBD_REP_ACK and not kind & (1 << 31):
            magic, option, kind, length = struct.unpack_from(">QIII", replies, position)
            position += 20 + length
            assert (magic, option) == (c.NBD_OPTION_REPLY_MAGIC, number)
            assert position <= len(replies)
    assert position == len(replies), "more was answered than was asked"
    return len(asked)


def check(case: Case) -> None:
    """Run a case whole and in pieces, and hold the results against a plain reading."""
    known = options_in(case.stream)
    results = [run(case, case.parts), run(case, [case.stream])]
    for sent, outcome, fed in results:
        answered = options_answered(sent, [number for number, _ in known])
        assert len(sent) <= 100 * len(case.stream) + 4096
        if outcome is None:
            assert answered == len(known)
        elif isinstance(outcome, Transmission):
            end = known[answered - 1][1]
            assert outcome.leftover == case.stream[end:fed]
    if STARTTLS not in case.stream:  # what lies behind that in one piece closes the connection
        (sent, outcome, _), (whole_sent, whole_outcome, _) = results
        assert sent == whole_sent
        assert type(outcome) is type(whole_outcome)


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.deadline(120)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_stream_breaks_the_handshake(seed: int, shard: int) -> None:
    for number in range(MUTATIONS):
        case = make_case(random.Random(f"{seed} {shard} {number}"))
        try:
            check(case)
        except BaseException:
            print(f"mutation {number} of shard {shard}: {case}")
            print(f"begins with: {case.stream[:2000].hex()}, {len(case.stream)} bytes in all")
            raise


@pytest.mark.parametrize("capture", CORPUS, ids=lambda capture: capture.name)
def test_what_clients_send_comes_to_a_good_end(capture) -> None:
    directory = FakeDirectory([DISK, ODD, FROZEN], default=DISK)
    stream = b"".join(capture.handshake)
    parts = list(capture.handshake)
    case = Case(stream, parts, TlsMode.ALLOW, True, directory, shuts_down=False)
    check(case)
    _, outcome, _ = run(case, parts)
    if capture.transmission:
        assert isinstance(outcome, Transmission)
    else:
        assert outcome is None or isinstance(outcome, Transmission) or outcome.quiet


def test_nothing_is_left_in_memory(seed: int) -> None:
    def several(start: int) -> int:
        for number in range(start, start + 1500):
            check(make_case(random.Random(f"{seed} {number}")))
        gc.collect()
        return len(gc.get_objects())

    several(0)
    before = several(1500)
    after = several(3000)
    assert after - before < 300


def test_the_fuzzer_reaches_every_part_of_the_handshake(rng: random.Random) -> None:
    """A fuzzer that only ever sees the first check would find nothing."""
    kinds: dict[str, int] = {}
    errors: set[int] = set()
    for _ in range(3000):
        case = make_case(rng)
        sent, outcome, _ = run(case, case.parts)
        kind = type(outcome).__name__
        if isinstance(outcome, Transmission):
            kind += " extended" if outcome.extended else " structured" * outcome.structured
        kinds[kind] = kinds.get(kind, 0) + 1
        known = [number for number, _ in options_in(case.stream)]
        if c.NBD_OPT_EXPORT_NAME not in known:
            errors |= error_types(sent)
    print(kinds, sorted(errors))
    assert min(kinds.values()) > 10
    assert set(kinds) == {
        *("NoneType", "Closed", "Transmission", "Transmission structured"),
        "Transmission extended",
    }
    base = 1 << 31
    assert {number - base for number in errors} >= {1, 2, 3, 5, 6, 7, 9}


def error_types(replies: bytes) -> set[int]:
    found = set()
    while replies:
        _, _, kind, length = struct.unpack_from(">QIII", replies)
        replies = replies[20 + length :]
        if kind & (1 << 31):
            found.add(kind)
    return found
