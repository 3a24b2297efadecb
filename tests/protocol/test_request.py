"""Which requests are legal, and the one right answer to each that is not."""

from __future__ import annotations

import itertools

import pytest

from nbdfleece.base.errors import PeerViolation
from nbdfleece.base.limits import MAX_DRAINED_PAYLOAD, MAX_PAYLOAD, MAX_STRUCTURED_READ
from nbdfleece.base.units import GiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.request import (
    check,
    max_status_filter,
    parse_status_filter,
    payload_length,
)

SIZE = 8 * GiB
READ_WRITE = (
    c.NBD_FLAG_HAS_FLAGS
    | c.NBD_FLAG_SEND_FLUSH
    | c.NBD_FLAG_SEND_FUA
    | c.NBD_FLAG_SEND_TRIM
    | c.NBD_FLAG_SEND_WRITE_ZEROES
    | c.NBD_FLAG_SEND_FAST_ZERO
    | c.NBD_FLAG_SEND_CACHE
    | c.NBD_FLAG_CAN_MULTI_CONN
)
READ_ONLY = (
    c.NBD_FLAG_HAS_FLAGS | c.NBD_FLAG_READ_ONLY | c.NBD_FLAG_SEND_FLUSH | c.NBD_FLAG_SEND_FUA
)
BARE = c.NBD_FLAG_HAS_FLAGS

COMMANDS = {
    c.NBD_CMD_READ, c.NBD_CMD_WRITE, c.NBD_CMD_FLUSH, c.NBD_CMD_TRIM,
    c.NBD_CMD_CACHE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_BLOCK_STATUS,
}  # fmt: skip
RANGED = COMMANDS - {c.NBD_CMD_FLUSH}
UNBOUNDED = {
    c.NBD_CMD_TRIM, c.NBD_CMD_CACHE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_BLOCK_STATUS,
}  # fmt: skip
CHANGING = {c.NBD_CMD_WRITE, c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES}


def answer(
    command: int,
    *,
    flags: int = 0,
    offset: int = 0,
    length: int = 4096,
    export_flags: int = READ_WRITE,
    structured: bool = True,
    has_contexts: bool = True,
    extended: bool = False,
) -> int:
    return check(
        command, flags, offset, length, SIZE, export_flags, structured, has_contexts, extended
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("flags", [0, c.NBD_CMD_FLAG_FUA])
def test_plain_request_is_legal(command: int, flags: int) -> None:
    assert answer(command, flags=flags) == c.NBD_SUCCESS


@pytest.mark.parametrize("command", [c.NBD_CMD_RESIZE, 9, 77, 0xFFFF])
def test_unknown_command_is_einval_whatever_else_is_wrong(command: int) -> None:
    assert answer(command, offset=1 << 63, export_flags=READ_ONLY) == c.NBD_EINVAL


def test_disc_is_never_at_fault() -> None:
    assert answer(c.NBD_CMD_DISC, flags=0xFFFF, offset=1 << 63) == c.NBD_SUCCESS


ALLOWED = {
    c.NBD_CMD_READ: {c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_DF},
    c.NBD_CMD_WRITE: {c.NBD_CMD_FLAG_FUA},
    c.NBD_CMD_FLUSH: {c.NBD_CMD_FLAG_FUA},
    c.NBD_CMD_TRIM: {c.NBD_CMD_FLAG_FUA},
    c.NBD_CMD_CACHE: {c.NBD_CMD_FLAG_FUA},
    c.NBD_CMD_WRITE_ZEROES: {
        c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_NO_HOLE, c.NBD_CMD_FLAG_FAST_ZERO,
    },
    c.NBD_CMD_BLOCK_STATUS: {c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_REQ_ONE},
}  # fmt: skip


@pytest.mark.parametrize(("command", "bit"), list(itertools.product(sorted(COMMANDS), range(16))))
def test_each_flag_goes_with_its_commands_only(command: int, bit: int) -> None:
    flag = 1 << bit
    expected = c.NBD_SUCCESS if flag in ALLOWED[command] else c.NBD_EINVAL

    assert answer(command, flags=flag) == expected


def test_flags_must_have_been_advertised_or_negotiated() -> None:
    fua, df, fast = c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_DF, c.NBD_CMD_FLAG_FAST_ZERO
    without_fast = READ_WRITE & ~c.NBD_FLAG_SEND_FAST_ZERO

    assert answer(c.NBD_CMD_READ, flags=fua, export_flags=BARE) == c.NBD_EINVAL
    assert answer(c.NBD_CMD_READ, flags=df, structured=False) == c.NBD_EINVAL
    assert answer(c.NBD_CMD_WRITE_ZEROES, flags=fast, export_flags=without_fast) == c.NBD_EINVAL


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_read_only_export_refuses_exactly_what_changes_it(command: int) -> None:
    expected = c.NBD_EPERM if command in CHANGING else c.NBD_SUCCESS

    assert answer(command, export_flags=READ_ONLY) == expected


@pytest.mark.parametrize("command", sorted(CHANGING))
def test_read_only_counts_before_range_and_length(command: int) -> None:
    refused = answer(command, offset=SIZE, length=0xFFFFFFFF, export_flags=READ_ONLY)

    assert refused == c.NBD_EPERM


@pytest.mark.parametrize("command", [c.NBD_CMD_FLUSH, c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES])
def test_command_that_was_not_advertised_is_einval(command: int) -> None:
    assert answer(command, export_flags=BARE) == c.NBD_EINVAL


def test_cache_may_be_tried_without_being_advertised() -> None:
    assert answer(c.NBD_CMD_CACHE, export_flags=BARE) == c.NBD_SUCCESS


def test_flush_has_no_range() -> None:
    assert answer(c.NBD_CMD_FLUSH, offset=SIZE, length=77) == c.NBD_SUCCESS


@pytest.mark.parametrize("command", sorted(RANGED))
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (1 << 63, 1), ((1 << 64) - 1, 1), ((1 << 64) - 1, 0xFFFFFFFF)],
)
def test_range_past_the_end(command: int, offset: int, length: int) -> None:
    outgrows = command in (c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES)
    expected = c.NBD_ENOSPC if outgrows else c.NBD_EINVAL

    assert answer(command, offset=offset, length=length) == expected


@pytest.mark.parametrize("command", sorted(RANGED))
def test_last_byte_is_inside(command: int) -> None:
    assert answer(command, offset=SIZE - 1, length=1) == c.NBD_SUCCESS


@pytest.mark.parametrize("command", sorted(RANGED))
@pytest.mark.parametrize("offset", [0, SIZE])
def test_zero_length_is_legal_but_for_block_status(command: int, offset: int) -> None:
    expected = c.NBD_EINVAL if command == c.NBD_CMD_BLOCK_STATUS else c.NBD_SUCCESS

    assert answer(command, offset=offset, length=0) == expected


def test_block_status_needs_contexts() -> None:
    assert answer(c.NBD_CMD_BLOCK_STATUS, has_contexts=False) == c.NBD_EINVAL


@pytest.mark.parametrize("command", sorted(UNBOUNDED))
def test_requests_without_payload_may_be_4_gib_long(command: int) -> None:
    assert answer(command, length=0xFFFFFFFF) == c.NBD_SUCCESS


@pytest.mark.parametrize(
    ("command", "structured", "flags", "length", "expected"),
    [
        (c.NBD_CMD_READ, False, 0, MAX_PAYLOAD, c.NBD_SUCCESS),
        (c.NBD_CMD_READ, False, 0, MAX_PAYLOAD + 1, c.NBD_EINVAL),
        (c.NBD_CMD_READ, True, 0, MAX_PAYLOAD + 1, c.NBD_SUCCESS),
        (c.NBD_CMD_READ, True, 0, MAX_STRUCTURED_READ, c.NBD_SUCCESS),
        (c.NBD_CMD_READ, True, 0, MAX_STRUCTURED_READ + 1, c.NBD_EOVERFLOW),
        (c.NBD_CMD_READ, True, c.NBD_CMD_FLAG_DF, MAX_PAYLOAD, c.NBD_SUCCESS),
        (c.NBD_CMD_READ, True, c.NBD_CMD_FLAG_DF, MAX_PAYLOAD + 1, c.NBD_EOVERFLOW),
        (c.NBD_CMD_READ, True, 0, 0xFFFFFFFF, c.NBD_EOVERFLOW),
        (c.NBD_CMD_WRITE, True, 0, MAX_PAYLOAD, c.NBD_SUCCESS),
        (c.NBD_CMD_WRITE, True, 0, MAX_PAYLOAD + 1, c.NBD_EINVAL),
        (c.NBD_CMD_WRITE, False, 0, 0xFFFFFFFF, c.NBD_EINVAL),
    ],
)
def test_payload_cap(
    command: int, structured: bool, flags: int, length: int, expected: int
) -> None:
    assert answer(command, structured=structured, flags=flags, length=length) == expected


def test_range_counts_before_the_payload_cap() -> None:
    assert answer(c.NBD_CMD_WRITE, offset=SIZE, length=MAX_PAYLOAD + 1) == c.NBD_ENOSPC


def test_random_requests_get_an_error_of_the_spec(rng) -> None:
    errors = {c.NBD_SUCCESS, c.NBD_EINVAL, c.NBD_EPERM, c.NBD_ENOSPC, c.NBD_EOVERFLOW}
    for _ in range(5000):
        found = check(
            rng.randrange(12),
            rng.getrandbits(16) & rng.getrandbits(16) & rng.getrandbits(16),
            rng.choice([0, SIZE, rng.getrandbits(64), rng.randrange(SIZE)]),
            rng.choice([0, 1, 4096, rng.getrandbits(32), rng.getrandbits(64)]),
            SIZE,
            rng.choice([READ_WRITE, READ_ONLY, BARE]),
            rng.random() < 0.5,
            rng.random() < 0.5,
            rng.random() < 0.5,
        )
        assert found in errors


# --- extended headers ------------------------------------------------------------------------

PAYLOAD = c.NBD_CMD_FLAG_PAYLOAD_LEN


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("extended", [False, True])
def test_payload_flag_goes_with_write_and_block_status_of_extended_headers(
    command: int, extended: bool
) -> None:
    is_legal = extended and command in (c.NBD_CMD_WRITE, c.NBD_CMD_BLOCK_STATUS)
    expected = c.NBD_SUCCESS if is_legal else c.NBD_EINVAL

    assert answer(command, flags=PAYLOAD, extended=extended) == expected
    assert answer(command, flags=PAYLOAD | c.NBD_CMD_FLAG_FUA, extended=extended) == expected


def test_payload_flag_does_not_excuse_other_flags() -> None:
    flags = PAYLOAD | c.NBD_CMD_FLAG_DF

    assert answer(c.NBD_CMD_WRITE, flags=flags, extended=True) == c.NBD_EINVAL
    assert answer(c.NBD_CMD_BLOCK_STATUS, flags=flags, extended=True) == c.NBD_EINVAL


@pytest.mark.parametrize("command", sorted(UNBOUNDED))
def test_extended_request_may_be_as_long_as_the_export(command: int) -> None:
    assert answer(command, length=SIZE, extended=True) == c.NBD_SUCCESS


@pytest.mark.parametrize("command", sorted(RANGED))
@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE + 1), (1, SIZE), (0, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1)]
)
def test_extended_range_past_the_end(command: int, offset: int, length: int) -> None:
    outgrows = command in (c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES)
    expected = c.NBD_ENOSPC if outgrows else c.NBD_EINVAL

    assert answer(command, offset=offset, length=length, extended=True) == expected


def test_extended_read_beyond_32_bits_overflows() -> None:
    assert answer(c.NBD_CMD_READ, length=5 * GiB, extended=True) == c.NBD_EOVERFLOW


@pytest.mark.parametrize("command", [*sorted(COMMANDS), c.NBD_CMD_DISC, c.NBD_CMD_RESIZE, 77])
@pytest.mark.parametrize("flags", [0, PAYLOAD, 0xFFFF])
def test_compact_payload_is_that_of_write_alone(command: int, flags: int) -> None:
    expected = 4096 if command == c.NBD_CMD_WRITE else 0

    assert payload_length(command, flags, 4096, extended=False) == expected


@pytest.mark.parametrize("command", [*sorted(COMMANDS), c.NBD_CMD_RESIZE, 77])
@pytest.mark.parametrize("length", [0, 1, MAX_PAYLOAD])
def test_extended_payload_is_what_the_flag_says_for_any_command(command: int, length: int) -> None:
    assert payload_length(command, PAYLOAD, length, extended=True) == length


@pytest.mark.parametrize("command", [*sorted(COMMANDS - {c.NBD_CMD_WRITE}), 77])
def test_extended_length_without_the_flag_is_no_payload(command: int) -> None:
    assert payload_length(command, 0, (1 << 64) - 1, extended=True) == 0


@pytest.mark.parametrize("flags", [0, c.NBD_CMD_FLAG_FUA, PAYLOAD])
def test_extended_write_has_its_payload_with_and_without_the_flag(flags: int) -> None:
    assert payload_length(c.NBD_CMD_WRITE, flags, MAX_PAYLOAD, extended=True) == MAX_PAYLOAD


def test_nothing_follows_a_disconnect() -> None:
    assert payload_length(c.NBD_CMD_DISC, PAYLOAD, 1 << 63, extended=True) == 0


@pytest.mark.parametrize(
    ("command", "flags", "length", "extended"),
    [
        (c.NBD_CMD_WRITE, 0, MAX_DRAINED_PAYLOAD + 1, False),
        (c.NBD_CMD_WRITE, 0, 0xFFFFFFFF, False),
        (c.NBD_CMD_WRITE, PAYLOAD, MAX_PAYLOAD + 1, True),
        (c.NBD_CMD_READ, PAYLOAD, MAX_PAYLOAD + 1, True),
        (c.NBD_CMD_BLOCK_STATUS, PAYLOAD, (1 << 64) - 1, True),
        (77, PAYLOAD, 1 << 32, True),
        (c.NBD_CMD_WRITE, 0, MAX_PAYLOAD + 1, True),
        (c.NBD_CMD_WRITE, c.NBD_CMD_FLAG_FUA, (1 << 64) - 1, True),
    ],
)
def test_payload_that_is_too_long_ends_the_connection(
    command: int, flags: int, length: int, extended: bool
) -> None:
    with pytest.raises(PeerViolation):
        payload_length(command, flags, length, extended=extended)


def test_longest_compact_payload_that_is_drained() -> None:
    found = payload_length(c.NBD_CMD_WRITE, 0, MAX_DRAINED_PAYLOAD, extended=False)

    assert found == MAX_DRAINED_PAYLOAD


def test_empty_extended_write_needs_no_flag() -> None:
    assert payload_length(c.NBD_CMD_WRITE, 0, 0, extended=True) == 0
    assert answer(c.NBD_CMD_WRITE, length=0, extended=True) == c.NBD_SUCCESS


@pytest.mark.parametrize("effect", [0, 4096, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("ids", [[0], [7], [7, 0]])
def test_status_filter_is_read_back(effect: int, ids: list[int]) -> None:
    payload = wire.status_filter(effect, ids)

    assert parse_status_filter(payload, {0, 2, 7}) == (effect, frozenset(ids))


FILTERS = {
    "empty": b"",
    "half a length": bytes(4),
    "no context": wire.status_filter(4096, []),
    "half a context": wire.status_filter(4096, [0]) + b"\0\0",
    "unknown": wire.status_filter(4096, [0, 1]),
    "twice": wire.status_filter(4096, [2, 2]),
    "more than there are": wire.status_filter(4096, [0, 2, 7, 0]),
    "huge": wire.status_filter(4096, range(100_000)),
}


@pytest.mark.parametrize("payload", FILTERS.values(), ids=FILTERS.keys())
def test_bad_status_filter_is_told(payload: bytes) -> None:
    assert parse_status_filter(payload, {0, 2, 7}) is None


def test_longest_status_filter_names_each_context_once() -> None:
    payload = wire.status_filter(1, [0, 2, 7])

    assert len(payload) == max_status_filter(3)
    assert parse_status_filter(payload, {0, 2, 7}) is not None


def test_status_filter_without_contexts_is_bad() -> None:
    assert parse_status_filter(wire.status_filter(1, [0]), ()) is None
