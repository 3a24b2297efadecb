"""Globs, against the obvious recursive definition of what they mean."""

from __future__ import annotations

import random
import time

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import MAX_PATTERN, MAX_STRING
from nbdfleece.server.glob import ANY_ONE, Glob, parse_glob


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("vda", "vda", True),
        ("vda", "vdab", False),
        ("vda", "xvda", False),
        ("vda", "VDA", False),
        ("vda@*", "vda@", True),
        ("vda@*", "vda@nightly", True),
        ("vda@*", "vdab@nightly", False),
        ("vd?", "vda", True),
        ("vd?", "vd", False),
        ("*", "", True),
        ("**", "any", True),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "a-c-b", False),
        ("*.img", "x.img", True),
        ("*.img", "x.imgs", False),
        ("[ab]", "a", False),
        ("[ab]", "[ab]", True),
        (r"a\*", "a*", True),
        (r"a\*", "ab", False),
        (r"a\\", "a\\", True),
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
        ("a*", "a\nb", True),
        ("a", "a\n", False),
    ],
)
def test_patterns(pattern: str, text: str, *, fits: bool) -> None:
    assert parse_glob(pattern).matches(text) is fits


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("", "empty"),
        ("x" * (MAX_PATTERN + 1), "longer than"),
        ("a\0", "NUL"),
        ("a\\", "backslash"),
        ("a\\b", "backslash"),
    ],
)
def test_what_is_no_pattern(pattern: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_glob(pattern)


def plainly(pattern: list[str | None], text: str) -> bool:
    """The definition."""
    if not pattern:
        return not text
    first, rest = pattern[0], pattern[1:]
    if first is None:
        return any(plainly(rest, text[cut:]) for cut in range(len(text) + 1))
    return bool(text) and first in (ANY_ONE, text[0]) and plainly(rest, text[1:])


def test_random_patterns_mean_what_the_definition_says(rng: random.Random) -> None:
    matched = 0
    for _ in range(3000):
        pattern = [
            rng.choice(["a", "b", ".", ANY_ONE, None, None]) for _ in range(rng.randrange(7))
        ]
        text = "".join(rng.choice("ab.") for _ in range(rng.randrange(9)))
        expected = plainly(pattern, text)
        assert Glob(pattern).matches(text) is expected, (pattern, text)
        matched += expected
    assert matched > 100


def test_no_pattern_takes_long() -> None:
    """The classic that takes a backtracking matcher for ever."""
    worst = parse_glob("a*" * (MAX_PATTERN // 2 - 1) + "b")
    begun = time.process_time()
    assert not worst.matches("a" * MAX_STRING)
    assert not parse_glob("*" * 200 + "b").matches("a" * MAX_STRING)
    assert time.process_time() - begun < 5
