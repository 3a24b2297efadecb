"""Names with tokens: found while they are valid, and given away by nothing."""

from __future__ import annotations

import pickle

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import MAX_TOKEN_LIFETIME_S, MAX_TOKENS
from nbdfleece.server.tokens import Tokens, clock, hide


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tokens(time: ManualClock) -> Tokens:
    return Tokens(time)


def test_name_opens_its_export_any_number_of_times(tokens: Tokens) -> None:
    name = tokens.add("vda@nightly", 60)
    assert name.startswith("vda@nightly:")
    assert len(name) == len("vda@nightly:") + 32
    for _ in range(3):
        assert tokens.find(name) == "vda@nightly"


def test_no_two_tokens_are_alike(tokens: Tokens) -> None:
    names = {tokens.add("vda@a", 60) for _ in range(100)}
    assert len(names) == 100
    assert all(tokens.find(name) == "vda@a" for name in names)


def test_nothing_else_opens_it(tokens: Tokens) -> None:
    name = tokens.add("vda@a", 60)
    token = name.partition(":")[2]
    other = tokens.add("vdb@a", 60).partition(":")[2]
    wrong = [
        *("", ":", "vda@a", "vda@a:", token, f":{token}", f"vda@a:{other}", f"vdb@a:{token}"),
        *(f"vda@b:{token}", name[:-1], name + "x", name + "\n", f"vda@a::{token}"),
        *(f" {name}", name.upper(), f"vda@a:{token[::-1]}", "vda@a:*", "vda@a:\udcff"),
    ]
    assert [guess for guess in wrong if tokens.find(guess) is not None] == []


def test_token_expires(tokens: Tokens, time: ManualClock) -> None:
    short, long = tokens.add("vda@a", 60), tokens.add("vda@a", 61)
    time.now += 59.9
    assert tokens.find(short) == "vda@a"
    time.now += 0.1
    assert tokens.find(short) is None
    assert tokens.find(long) == "vda@a"
    time.now -= 50  # expired is expired
    assert tokens.find(short) is None


def test_revoked_with_its_export_and_no_other(tokens: Tokens) -> None:
    first, second, other = (tokens.add(name, 60) for name in ("vda@a", "vda@a", "vdb@a"))
    tokens.revoke("vda@a")
    assert tokens.find(first) is None
    assert tokens.find(second) is None
    assert tokens.find(other) == "vdb@a"
    again = tokens.add("vda@a", 60)
    assert tokens.find(again) == "vda@a"
    assert tokens.find(first) is None


@pytest.mark.parametrize("lifetime", [0, -1, MAX_TOKEN_LIFETIME_S + 1, float("inf"), float("nan")])
def test_lifetime_is_bounded(tokens: Tokens, lifetime: float) -> None:
    with pytest.raises(CommandError, match="up to 366 days"):
        tokens.add("vda@a", lifetime)
    tokens.add("vda@a", MAX_TOKEN_LIFETIME_S)


def test_number_is_bounded_and_expired_ones_do_not_count(tokens: Tokens, time: ManualClock) -> None:
    for _ in range(MAX_TOKENS):
        tokens.add("vda@a", 60)
    with pytest.raises(CommandError, match="no more"):
        tokens.add("vda@b", 60)
    time.now += 60
    assert tokens.find(tokens.add("vda@b", 60)) == "vda@b"


def test_memory_does_not_hold_a_token(tokens: Tokens) -> None:
    """Whatever looks into the object finds the hash."""
    token = tokens.add("vda@a", 60).partition(":")[2]
    held = pickle.dumps(tokens._tokens)
    assert b"vda@a" in held
    assert token.encode() not in held
    assert token not in repr(tokens._tokens)


def test_every_token_is_compared_in_constant_time(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, with hmac.compare_digest, on digests, whatever the name is."""
    import hmac

    names = [tokens.add(f"vda@{number}", 60) for number in range(5)]
    real, compared = hmac.compare_digest, []
    monkeypatch.setattr(
        "nbdfleece.server.tokens.hmac.compare_digest",
        lambda one, other: compared.append((len(one), len(other))) or real(one, other),
    )
    for name in (names[0], names[4], "vda@0:wrong", "nothing", ""):
        compared.clear()
        tokens.find(name)
        assert compared == [(32, 32)] * 5


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("vda", "vda"),
        ("vda@a", "vda@a"),
        ("vda@a:secret", "vda@a:***"),
        ("vda@a:se:cr@et\nx", "vda@a:***"),
        ("vda@a:", "vda@a:***"),
        ('export "vda@a:secret" is', 'export "vda@a:***'),
        ("a:b", "a:b"),
        ("", ""),
    ],
)
def test_tokens_are_hidden_from_logs(name: str, shown: str) -> None:
    assert hide(name) == shown


def test_clock_goes_on() -> None:
    assert 0 < clock() <= clock()
