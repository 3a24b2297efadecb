"""`key=value,...` of QEMU's command lines, as nested objects and lists.

::

    driver=raw,node-name=a,file.driver=file,file.filename=x,,y
        -> {"driver": "raw", "node-name": "a", "file": {"driver": "file", "filename": "x,y"}}

A comma in a value is doubled. Keys with dots are members of members; where all keys of an object
are numbers it is a list. The last of several equal keys counts. All values are texts, of class
`Spelled`: what number or truth value one stands for is known to whoever takes it.

Follows: QEMU util/keyval.c.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdfleece.base.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Keyval: TypeAlias = "Spelled | Sequence[Keyval] | Mapping[str, Keyval]"
_Tree: TypeAlias = "Spelled | dict[str, _Tree]"

_FRAGMENT: Final = re.compile(r"[A-Za-z0-9_-]+")
_INTEGER: Final = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|[0-9]+)")
_WORDS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
_MAX_DIGITS: Final = 128  # of a number; leading zeroes are digits
_MAX_FRAGMENTS: Final = 64  # nested objects of one key
_MAX_FRAGMENT: Final = 127  # characters, as in QEMU


class Spelled(str):
    """A value from a command line, before it is known what it is."""

    __slots__ = ()

    def boolean(self, path: str) -> bool:
        """Return the truth value.

        Raises:
            CommandError: It is none.
        """
        found = _WORDS.get(self)
        if found is None:
            raise CommandError(f"Parameter '{path}' expects 'on' or 'off'")
        return found

    def integer(self, path: str) -> int:
        """Return the number.

        Raises:
            CommandError: It is none.
        """
        if _INTEGER.fullmatch(self) is None or len(self) > _MAX_DIGITS:
            raise CommandError(f"Parameter '{path}' expects integer")
        return int(self, 16 if "x" in self.lower() else 10)


def parse(text: str, implied: str | None = None) -> dict[str, Keyval]:
    """Return the object that `text` stands for.

    Args:
        text: As on the command line.
        implied: The key of a first value that has none.

    Raises:
        CommandError: It is not well-formed, or contradicts itself.
    """
    tree: dict[str, _Tree] = {}
    for number, (key, value) in enumerate(split(text)):
        if value is None:
            if number or implied is None:
                raise CommandError(f"Expected '=' after parameter '{key}'")
            _put(tree, implied, Spelled(key))
        else:
            _put(tree, key, Spelled(value))
    return {name: _with_lists(value, name) for name, value in tree.items()}


def split(text: str) -> list[tuple[str, str | None]]:
    """Return the (key, value) pairs of a text; a value is None where there is no `=`."""
    pairs: list[tuple[str, str | None]] = []
    for part in re.findall(r"((?:[^,]|,,)+),?", text):
        key, equals, value = part.partition("=")
        # A key has no comma: what looks like one belongs to a value without key.
        if equals and "," not in key:
            pairs.append((key, value.replace(",,", ",")))
        else:
            pairs.append((part.replace(",,", ","), None))
    return pairs


def _put(tree: dict[str, _Tree], key: str, value: Spelled) -> None:
    *parents, last = fragments = key.split(".")
    is_good = len(fragments) <= _MAX_FRAGMENTS and all(
        _FRAGMENT.fullmatch(fragment) and len(fragment) <= _MAX_FRAGMENT for fragment in fragments
    )
    if not is_good:
        raise CommandError(f"Invalid parameter '{key}'")
    place = tree
    for depth, fragment in enumerate(parents, start=1):
        below = place.setdefault(fragment, {})
        if not isinstance(below, dict):
            raise _inconsistent(fragments[:depth])
        place = below
    if isinstance(place.get(last), dict):
        raise _inconsistent(fragments)
    place[last] = value


def _inconsistent(fragments: list[str]) -> CommandError:
    return CommandError(f"Parameters '{'.'.join(fragments)}.*' used inconsistently")


def _with_lists(value: _Tree, path: str) -> Keyval:
    """Return `value` with lists in place of objects whose keys are numbers."""
    if isinstance(value, Spelled):
        return value
    indices = [name for name in value if name.isascii() and name.isdigit()]
    if not indices:
        return {name: _with_lists(member, f"{path}.{name}") for name, member in value.items()}
    if len(indices) != len(value):
        raise CommandError(f"Parameters '{path}.*' used inconsistently")
    for index in range(len(value)):
        if str(index) not in value:
            raise CommandError(f"Parameter '{path}.{index}' missing")
    return [_with_lists(value[str(index)], f"{path}.{index}") for index in range(len(value))]
