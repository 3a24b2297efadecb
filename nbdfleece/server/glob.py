r"""Patterns with `*` (any characters) and `?` (one character), matched in bounded time.

No brackets, as in QEMU's glob. A backslash takes the meaning from `*`, `?` and itself. A match
takes at most (length of pattern) x (length of text) steps: what stands between two `*` is taken
where it is found first, for good. So no pattern and no name makes it slow.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import MAX_PATTERN

if TYPE_CHECKING:
    from collections.abc import Sequence

# A pattern as one character each; ANY_ONE stands for one of any kind, None for any number of them.
Characters: TypeAlias = "Sequence[str | None]"
ANY_ONE: Final = ""

_ESCAPED: Final = "*?\\"


class Glob:
    """A pattern of texts."""

    def __init__(self, characters: Characters) -> None:
        parts = [""]
        for character in characters:
            if character is None:
                parts.append("")
            else:
                parts[-1] += re.escape(character) if character else "."
        first, *others = parts
        *middle, last = [f".*?{part}" for part in others] or [""]
        text = first + "".join(f"(?>{part})" for part in middle if part != ".*?") + last
        self._compiled = re.compile(text, re.DOTALL)

    def matches(self, text: str) -> bool:
        """Tell whether the whole of `text` matches."""
        return self._compiled.fullmatch(text) is not None


def parse_glob(text: str) -> Glob:
    """Return the pattern that `text` stands for.

    Raises:
        ConfigError: It is empty, too long, or has a backslash before an ordinary character.
    """
    check_pattern(text)
    characters: list[str | None] = []
    rest = iter(text)
    for character in rest:
        if character == "\\":
            escaped = next(rest, "")
            if not escaped or escaped not in _ESCAPED:
                raise ConfigError(f"'{text}': a backslash stands before *, ? or \\ only")
            characters.append(escaped)
        else:
            characters.append({"*": None, "?": ANY_ONE}.get(character, character))
    return Glob(characters)


def check_pattern(text: str) -> None:
    """Check what all patterns must be.

    Raises:
        ConfigError: It is empty, too long, or contains a NUL.
    """
    if not text:
        raise ConfigError("a pattern is empty")
    if len(text) > MAX_PATTERN:
        raise ConfigError(f"a pattern is longer than {MAX_PATTERN} characters")
    if "\0" in text:
        raise ConfigError("a pattern contains a NUL")
