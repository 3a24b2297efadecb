"""QEMU's authorization objects: who may use a server at all.

They look at the name that TLS has proved: the distinguished name of a verified certificate, in
either spelling (see `distinguished_name`), or the user of a pre-shared key, which QEMU does not
look at. Who has proved no name is refused, whatever the rules say.

Invariants
  Z1  A rule is understood or refused: one that could be meant for a distinguished name and cannot
      be read as such is an error, because a deny rule that never matches lets everybody in.
  Z2  A file that breaks after it was read once changes nothing.

Follows: QEMU qapi/authz.json, docs/system/authz.rst. (`authz-listfile` is another spelling of
`authz-list-file`; authz-pam is not offered.)
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.distinguished_name import NamePattern
from nbdfleece.server.glob import Glob, check_pattern, parse_glob
from nbdfleece.server.rule_file import (
    RuleFile,
    Stamp,
    Table,
    build_rules,
    check_members,
    switch_of,
    text_of,
    word_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdfleece.server.identity import Identity

_log = logging.getLogger(__name__)


class Authz(Protocol):
    """Decides who may use a server."""

    def is_allowed(self, identity: Identity) -> bool:
        """Tell whether a client may go on, once the TLS handshake is done."""


class Verdict(enum.Enum):
    """What a rule says; values as in QEMU."""

    ALLOW = "allow"
    DENY = "deny"


class NameMatch:
    """What the name must be that TLS has proved.

    Args:
        text: A distinguished name in either spelling, or the user of a pre-shared key.
        globs: It is a pattern.

    Raises:
        ConfigError: It is empty, too long, or looks like a distinguished name and is none (Z1).
    """

    def __init__(self, text: str, *, globs: bool) -> None:
        check_pattern(text)
        self._user = parse_glob(text) if globs else Glob(text)
        is_name = "=" in text or (globs and text.strip(" *,") == "")
        self._subject = NamePattern(text, globs=globs) if is_name else None

    def matches(self, identity: Identity) -> bool:
        """Tell whether the client has proved this name."""
        if identity.certificate is not None:
            return self._subject is not None and self._subject.matches(identity.certificate.subject)
        return identity.psk is not None and self._user.matches(identity.psk)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a list."""

    match: NameMatch
    verdict: Verdict


class AuthzSimple:
    """authz-simple: one name.

    Args:
        identity: The name.

    Raises:
        ConfigError: See NameMatch.
    """

    def __init__(self, identity: str) -> None:
        self._match = NameMatch(identity, globs=False)

    def is_allowed(self, identity: Identity) -> bool:
        """See Authz.is_allowed."""
        return self._match.matches(identity)


class AuthzList:
    """authz-list: the first rule that matches decides.

    Args:
        policy: What holds where none does.
        rules: The rules.
    """

    def __init__(self, policy: Verdict, rules: tuple[Rule, ...]) -> None:
        self._policy = policy
        self._rules = rules

    def is_allowed(self, identity: Identity) -> bool:
        """See Authz.is_allowed."""
        if identity.certificate is None and identity.psk is None:
            return False
        for rule in self._rules:
            if rule.match.matches(identity):
                return rule.verdict is Verdict.ALLOW
        return self._policy is Verdict.ALLOW


class AuthzListFile:
    """authz-list-file: an authz-list in a file.

    Args:
        path: The file, `{"policy": ..., "rules": [...]}`.
        refresh: Look before every use whether it has changed, and read it again if so.

    Raises:
        ConfigError: It is missing or wrong.
    """

    def __init__(self, path: Path, *, refresh: bool) -> None:
        self._path = path
        self._refresh = refresh
        self._stamp = Stamp.of(path)
        self._list = _read_list(path)

    def is_allowed(self, identity: Identity) -> bool:
        """See Authz.is_allowed. May read the file: it should be on a local file system."""
        if self._refresh:
            self._look_again()
        return self._list.is_allowed(identity)

    def _look_again(self) -> None:
        """Read the file if it has changed since it was looked at last (Z2)."""
        stamp = Stamp.of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # also when it is broken: then it is said once, not for every client
        try:
            self._list = _read_list(self._path)
        except ConfigError as error:
            _log.error("authz-list-file: %s; the rules of before stay in force", error)
        else:
            _log.info("authz-list-file: %s: read again", self._path)


def make_authz(kind: str, properties: Table) -> Authz:
    """Return the object that QEMU would make of `-object KIND,...`.

    Args:
        kind: authz-simple, authz-list, authz-list-file or authz-listfile.
        properties: Of the object, but for its `id`.

    Raises:
        ConfigError: There is no such kind, or a property is wrong.
    """
    make = _KINDS.get(kind)
    if make is None:
        raise ConfigError(f"there is no '{kind}' (known: {', '.join(_KINDS)})")
    try:
        return make(properties)
    except ConfigError as error:
        raise ConfigError(f"{kind}: {error}") from error


def _make_simple(properties: Table) -> Authz:
    check_members(properties, ("identity",), "the object")
    return AuthzSimple(text_of(properties.get("identity"), "'identity'"))


def _make_list(properties: Table) -> Authz:
    check_members(properties, _LIST_MEMBERS, "the object")
    return AuthzList(_policy(properties), build_rules(properties.get("rules", []), _rule))


def _make_list_file(properties: Table) -> Authz:
    check_members(properties, ("filename", "refresh"), "the object")
    path = Path(text_of(properties.get("filename"), "'filename'"))
    return AuthzListFile(path, refresh=switch_of(properties.get("refresh", True), "'refresh'"))


_LIST_MEMBERS: Final = ("policy", "rules")
_KINDS: Final[Mapping[str, Callable[[Table], Authz]]] = {
    "authz-simple": _make_simple,
    "authz-list": _make_list,
    "authz-list-file": _make_list_file,
    "authz-listfile": _make_list_file,
}


def _read_list(path: Path) -> AuthzList:
    file = RuleFile(path)
    try:
        check_members(file.table, _LIST_MEMBERS, "the list")
        policy = _policy(file.table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return AuthzList(policy, file.rules("rules", _rule))


def _policy(table: Table) -> Verdict:
    return Verdict(word_of(table.get("policy", "deny"), _VERDICTS, "'policy'"))


_VERDICTS: Final = tuple(verdict.value for verdict in Verdict)


def _rule(table: Table) -> Rule:
    check_members(table, ("match", "policy", "format"), "a rule")
    how = word_of(table.get("format", "exact"), ("exact", "glob"), "'format'")
    match = NameMatch(text_of(table.get("match"), "'match'"), globs=how == "glob")
    return Rule(match, Verdict(word_of(table.get("policy"), _VERDICTS, "'policy'")))
