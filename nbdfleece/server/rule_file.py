"""Files of rules, TOML or JSON: read whole and checked, member by member, or refused.

A file whose text begins with `{` is JSON. Nothing is guessed: members that nobody asks for, members
that stand twice, and values of another type are errors, which name the file and, where that is
known, the line.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import MAX_RULE_FILE, MAX_RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

T = TypeVar("T")

Table: TypeAlias = "Mapping[str, object]"

_RULE_HEADER: Final = re.compile(r"\s*\[\[\s*[\"']?rules?[\"']?\s*\]\]")
_TOML_LINE: Final = re.compile(r"at line (\d+)")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file has changed: another file at the path, another time or size."""

    device: int
    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """Return the stamp of what is at `path` now; None when nothing can be found there."""
        try:
            return cls._of(os.stat(path))
        except (OSError, ValueError):  # a NUL in the path
            return None

    @classmethod
    def _of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


class RuleFile:
    """One file, as it was when it was read.

    Args:
        path: Where it is. Reading may block.

    Attributes:
        table: What it says.

    Raises:
        ConfigError: It is missing, not a regular file, too big, or neither TOML nor JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text = _read(path)
        self.table = _parse(path, self._text)

    def rules(self, member: str, build: Callable[[Table], T]) -> tuple[T, ...]:
        """Return what `build` makes of each rule in the list `member`.

        Raises:
            ConfigError: There is no such list, it is too long, or a rule is wrong; with file, line
                and number. A file that was cut off at its start must not count as "no rules".
        """
        if member not in self.table:
            raise ConfigError(f"{self.path}: there is no '{member}' in it")
        return build_rules(self.table[member], build, f"{self.path}: ", self._place)

    def _place(self, number: int, count: int) -> str:
        """Return `FILE:LINE: ` of a rule, or `FILE: ` where rules cannot be told from the text."""
        lines = [
            line
            for line, text in enumerate(self._text.splitlines(), start=1)
            if _RULE_HEADER.match(text)
        ]
        line = f"{lines[number - 1]}:" if len(lines) == count else ""
        return f"{self.path}:{line} "


def build_rules(
    value: object,
    build: Callable[[Table], T],
    where: str = "",
    place: Callable[[int, int], str] = lambda number, count: "",
) -> tuple[T, ...]:
    """Return what `build` makes of each rule in a list.

    Args:
        value: The list.
        build: Makes a rule of a table.
        where: What errors of the list as a whole begin with.
        place: Returns what errors of one rule begin with, from its number and that of all.

    Raises:
        ConfigError: It is not a list, too long, or a rule is wrong; with its number.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{where}the rules must be a list")
    if len(value) > MAX_RULES:
        raise ConfigError(f"{where}{len(value)} rules, at most {MAX_RULES}")
    built: list[T] = []
    for number, rule in enumerate(value, start=1):
        try:
            built.append(build(table_of(rule, "a rule")))
        except ConfigError as error:
            raise ConfigError(f"{place(number, len(value))}rule {number}: {error}") from error
    return tuple(built)


def _read(path: Path) -> str:
    """Return the text of a regular file; a pipe or device is not even waited for."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: not a regular file")
            data = file.read(MAX_RULE_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in it, or half of a surrogate pair
        raise ConfigError(f"{str(path)!a} is not a file name") from error
    if len(data) > MAX_RULE_FILE:
        raise ConfigError(f"{path}: longer than {MAX_RULE_FILE} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _parse(path: Path, text: str) -> Table:
    """Return what a text says, TOML or JSON."""
    try:
        if text.lstrip().startswith("{"):
            return table_of(json.loads(text, object_pairs_hook=_no_duplicates), "the file")
        return tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    except tomllib.TOMLDecodeError as error:
        found = _TOML_LINE.search(str(error))
        line = found[1] if found else str(max(len(text.splitlines()), 1))
        raise ConfigError(f"{path}:{line}: {error}") from error
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error


def _no_duplicates(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"'{name}' stands twice in one object")
        found[name] = value
    return found


# --- members -----------------------------------------------------------------------------------


def table_of(value: object, what: str) -> Table:
    """Return a table.

    Raises:
        ConfigError: `value` is something else.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a table")
    return value


def check_members(table: Table, known: Iterable[str], what: str) -> None:
    """Refuse what nobody would look at.

    Raises:
        ConfigError: A member is unknown.
    """
    names = list(known)
    for name in table:
        if name not in names:
            raise ConfigError(f"unknown key '{name}' in {what} (known: {', '.join(names)})")


def text_of(value: object, what: str) -> str:
    """Return a text that is not empty.

    Raises:
        ConfigError: `value` is something else.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what} must be a text")
    return value


def list_of(value: object, what: str) -> list[object]:
    """Return a list with something in it; a single value is a list of one.

    Raises:
        ConfigError: It is empty or too long.
    """
    found = list(value) if isinstance(value, list) else [value]
    if not 0 < len(found) <= MAX_RULES:
        raise ConfigError(f"{what} must have 1 to {MAX_RULES} values")
    return found


def word_of(value: object, words: Iterable[str], what: str) -> str:
    """Return one of `words`.

    Raises:
        ConfigError: `value` is something else.
    """
    known = list(words)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{what} must be one of {', '.join(known)}")
    return value


def switch_of(value: object, what: str) -> bool:
    """Return true or false.

    Raises:
        ConfigError: `value` is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false")
    return value
