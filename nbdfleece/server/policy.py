"""The policy: who may list, read, write or trim which exports.

A file of rules (TOML, or JSON of the same shape); for each export the first rule counts whose `who`
and `exports` both fit, and where none does, nothing is allowed.

Invariants
  P1  Fail closed: a policy is whole or refused, and one that is refused at a reload leaves the one
      before it in force.
  P2  What may be done is decided by names of exports as the server knows them and by what has been
      proved of the client; never by what a client says of itself.
  P3  Rights make sense together: WRITE comes with READ, and TRIM with WRITE.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.glob import Glob, parse_glob
from nbdfleece.server.rule_file import (
    RuleFile,
    Table,
    check_members,
    list_of,
    switch_of,
    text_of,
    word_of,
)
from nbdfleece.server.who import Who

if TYPE_CHECKING:
    from pathlib import Path

    from nbdfleece.server.identity import Identity


class Rights(enum.Flag):
    """What a client may do with an export."""

    NONE = 0
    LIST = enum.auto()  # see its name in LIST
    READ = enum.auto()  # know that it is there, open it, read it
    WRITE = enum.auto()
    TRIM = enum.auto()
    ALL = LIST | READ | WRITE | TRIM


TOKEN_RIGHTS: Final = Rights.READ  # of whoever knows a token: never shown, never more than read

_WORDS: Final = {
    "list": Rights.LIST,
    "read": Rights.READ,
    "write": Rights.WRITE,
    "trim": Rights.TRIM,
    "all": Rights.ALL,
}
_MEMBERS: Final = ("who", "exports", "allow", "deny")


@dataclass(frozen=True, slots=True)
class _Rule:
    who: Who
    exports: tuple[Glob, ...]
    rights: Rights

    def is_for(self, identity: Identity, export_name: str) -> bool:
        fits = any(pattern.matches(export_name) for pattern in self.exports)
        return fits and self.who.matches(identity)


class Policy:
    """Who may do what.

    Args:
        path: The file. Reading it, and looking up the users it names, may block.

    Raises:
        ConfigError: The file is missing or wrong; one line with file, line and number of the rule.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rules = _read(path)

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Return the policy in a file; see the class."""
        return cls(path)

    def reload(self) -> None:
        """Read the file again. May run in a thread: the rules change in one step.

        Raises:
            ConfigError: The file is missing or wrong. The rules of before stay in force (P1).
        """
        self._rules = _read(self._path)

    def rights(self, identity: Identity, export_name: str) -> Rights:
        """Return what a client may do with an export, be it there or not.

        Args:
            identity: What has been proved of the client.
            export_name: Its canonical name (P2): not "" for the default export, and no token.
        """
        for rule in self._rules:
            if rule.is_for(identity, export_name):
                return rule.rights
        return Rights.NONE


def _read(path: Path) -> tuple[_Rule, ...]:
    file = RuleFile(path)
    try:
        check_members(file.table, ("rule",), "the policy")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return file.rules("rule", _rule)


def _rule(table: Table) -> _Rule:
    """Return a rule as written.

    Raises:
        ConfigError: It is wrong.
    """
    check_members(table, _MEMBERS, "a rule")
    for name in ("who", "exports"):
        if name not in table:
            raise ConfigError(f"'{name}' is missing")
    patterns = list_of(table["exports"], "'exports'")
    return _Rule(
        Who(table["who"]),
        tuple(parse_glob(text_of(pattern, "a name in 'exports'")) for pattern in patterns),
        _rights(table),
    )


def _rights(table: Table) -> Rights:
    """Return what a rule gives: either `allow` or `deny = true` (P3)."""
    if "deny" in table:
        if "allow" in table or not switch_of(table["deny"], "'deny'"):
            raise ConfigError("a rule has either 'allow' or 'deny = true'")
        return Rights.NONE
    if "allow" not in table:
        raise ConfigError("a rule has either 'allow' or 'deny = true'")
    rights = Rights.NONE
    for word in list_of(table["allow"], "'allow'"):
        rights |= _WORDS[word_of(word, _WORDS, "'allow'")]
    for right, needed in ((Rights.WRITE, Rights.READ), (Rights.TRIM, Rights.WRITE)):
        if right in rights and needed not in rights:
            raise ConfigError(f"'allow': {right.name} needs {needed.name}".lower())
    return rights
