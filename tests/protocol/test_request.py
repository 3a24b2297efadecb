"""Which requests are legal, and the one right answer to each that is not."""

from __future__ import annotations

import itertools

import pytest

from nbdfleece.base.limits import MAX_PAYLOAD, MAX_STRUCTURED_READ
from nbdfleece.base.units import GiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd.request import check

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
) -> int:
    return check(command, flags, offset, length, SIZE, export_flags, structured, has_contexts)


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
            rng.choice([0, 1, 4096, rng.getrandbits(32)]),
            SIZE,
            rng.choice([READ_WRITE, READ_ONLY, BARE]),
            rng.random() < 0.5,
            rng.random() < 0.5,
        )
        assert found in errors
