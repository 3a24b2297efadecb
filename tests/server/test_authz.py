"""QEMU's authorization objects, for certificates and for pre-shared keys."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.authz import make_authz
from nbdfleece.server.distinguished_name import parse_name
from nbdfleece.server.identity import Identity, PeerCertificate


def certified(subject: str) -> Identity:
    return Identity(tls=True, certificate=PeerCertificate(parse_name(subject)))


def user(name: str) -> Identity:
    return Identity(tls=True, psk=name)


LAPTOP = certified("CN=laptop,O=Example,C=GB")


# --- authz-simple --------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["CN=laptop,O=Example,C=GB", "C=GB,O=Example,CN=laptop"])
def test_simple_takes_either_spelling_of_a_name(spelling: str) -> None:
    authz = make_authz("authz-simple", {"identity": spelling})
    assert authz.is_allowed(LAPTOP)
    assert not authz.is_allowed(certified("CN=laptop"))
    assert not authz.is_allowed(certified(r"CN=laptop\,O=Example\,C=GB"))


def test_simple_has_no_globs() -> None:
    authz = make_authz("authz-simple", {"identity": "CN=*"})
    assert not authz.is_allowed(certified("CN=laptop"))
    assert authz.is_allowed(certified(r"CN=\2A"))


def test_authz_counts_for_users_of_pre_shared_keys_too() -> None:
    """QEMU lets alice in where only nobody is allowed."""
    authz = make_authz("authz-simple", {"identity": "nobody"})
    assert authz.is_allowed(user("nobody"))
    assert not authz.is_allowed(user("alice"))
    assert not authz.is_allowed(certified("CN=nobody"))


# --- authz-list ----------------------------------------------------------------------------------


def rule(match: str, policy: str, how: str | None = None) -> dict[str, str]:
    return {"match": match, "policy": policy, **({"format": how} if how else {})}


def test_first_rule_that_matches_wins() -> None:
    rules = [
        rule("CN=evil,O=Example", "deny"),
        rule("CN=*,O=Example", "allow", "glob"),
        rule("CN=late,O=Example", "deny"),
        rule("bob", "allow", "exact"),
    ]
    authz = make_authz("authz-list", {"policy": "deny", "rules": rules})
    assert authz.is_allowed(certified("CN=good,O=Example"))
    assert authz.is_allowed(certified("O=Example,CN=late"))
    assert not authz.is_allowed(certified("CN=evil,O=Example"))
    assert not authz.is_allowed(certified("O=Example,CN=evil"))
    assert not authz.is_allowed(certified("CN=good,O=Other"))
    assert not authz.is_allowed(certified(r"CN=good\,O=Example"))
    assert authz.is_allowed(user("bob"))
    assert not authz.is_allowed(user("bobby"))


@pytest.mark.parametrize(("policy", "expected"), [("allow", True), ("deny", False), (None, False)])
def test_policy_counts_where_no_rule_matches(policy: str | None, *, expected: bool) -> None:
    authz = make_authz("authz-list", {} if policy is None else {"policy": policy})
    assert authz.is_allowed(LAPTOP) is expected
    assert authz.is_allowed(user("alice")) is expected


def test_who_has_proved_no_name_is_refused_whatever_the_policy() -> None:
    everybody = [rule("*", "allow", "glob")]
    authz = make_authz("authz-list", {"policy": "allow", "rules": everybody})
    for identity in (Identity(), Identity(tls=True), Identity(uid=0, gid=0, pid=1)):
        assert not authz.is_allowed(identity)
    assert authz.is_allowed(LAPTOP)
    assert authz.is_allowed(certified("CN=x"))
    assert authz.is_allowed(user("alice"))


def test_star_alone_is_a_glob_only_where_globs_are() -> None:
    authz = make_authz("authz-list", {"rules": [rule("*", "allow")]})
    assert not authz.is_allowed(LAPTOP)
    assert not authz.is_allowed(user("alice"))
    assert authz.is_allowed(user("*"))


def test_glob_of_users() -> None:
    rules = [rule("backup-*", "allow", "glob")]
    authz = make_authz("authz-list", {"rules": rules})
    assert authz.is_allowed(user("backup-1"))
    assert not authz.is_allowed(user("nobackup-1"))
    assert not authz.is_allowed(certified("CN=backup-1"))


@pytest.mark.parametrize(
    ("kind", "properties", "why"),
    [
        ("authz-pam", {"service": "x"}, "there is no 'authz-pam'"),
        ("authz-simple", {}, "authz-simple: 'identity' must be a text"),
        ("authz-simple", {"identity": ""}, "'identity' must be a text"),
        ("authz-simple", {"identity": "x", "id": "a"}, "unknown key 'id'"),
        ("authz-simple", {"identity": "*O=Evil*"}, "no attribute type"),
        ("authz-list", {"policy": "Allow"}, "'policy' must be one of allow, deny"),
        ("authz-list", {"rules": {}}, "must be a list"),
        ("authz-list", {"rules": [{"match": "x"}]}, "rule 1: 'policy' must be one of"),
        ("authz-list", {"rules": [{"policy": "deny"}]}, "rule 1: 'match' must be a text"),
        ("authz-list", {"rules": [rule("x", "deny", "regex")]}, "'format' must be one of"),
        ("authz-list", {"rules": [rule("*O=Evil*", "deny", "glob")]}, "no attribute type"),
        ("authz-list", {"rules": [{**rule("x", "deny"), "x": 1}]}, "rule 1: unknown key 'x'"),
        ("authz-list-file", {}, "'filename' must be a text"),
        ("authz-list-file", {"filename": "/nowhere/at/all"}, "No such file"),
        ("authz-list-file", {"filename": "x", "refresh": "yes"}, "'refresh' must be true or"),
    ],
)
def test_what_is_not_understood_is_refused(kind: str, properties: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make_authz(kind, properties)


# --- authz-list-file -----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "acl.json"


def write(path: Path, *rules: dict[str, str], text: str | None = None) -> None:
    """Write the file anew, as editors do: another inode, so no clock is too coarse to tell."""
    new = path.with_name("new")
    new.write_text(json.dumps({"policy": "deny", "rules": rules}) if text is None else text)
    os.replace(new, path)


@pytest.mark.parametrize("kind", ["authz-list-file", "authz-listfile"])
def test_list_in_a_file_is_reread_when_it_changes(path: Path, kind: str) -> None:
    write(path, rule("alice", "allow"))
    authz = make_authz(kind, {"filename": str(path)})
    assert authz.is_allowed(user("alice"))
    write(path, rule("bob", "allow"))
    assert not authz.is_allowed(user("alice"))
    assert authz.is_allowed(user("bob"))


def test_file_changed_in_place_is_reread(path: Path) -> None:
    write(path, rule("alice", "allow"))
    authz = make_authz("authz-list-file", {"filename": str(path)})
    path.write_text(path.read_text().replace("alice", "carol"))
    os.utime(path, ns=(1, 1))
    assert authz.is_allowed(user("carol"))


def test_without_refresh_the_file_is_read_once(path: Path) -> None:
    write(path, rule("alice", "allow"))
    authz = make_authz("authz-list-file", {"filename": str(path), "refresh": False})
    write(path, rule("bob", "allow"))
    assert authz.is_allowed(user("alice"))
    assert not authz.is_allowed(user("bob"))


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"rules": [{"match": "x"}]}', '{"policy": "deny", "rule": []}']
)
def test_file_that_is_broken_at_the_start_is_refused(path: Path, text: str) -> None:
    write(path, text=text)
    with pytest.raises(ConfigError, match=str(path)):
        make_authz("authz-list-file", {"filename": str(path)})


@pytest.mark.parametrize("is_gone", [False, True], ids=["broken", "gone"])
def test_file_that_breaks_later_changes_nothing_and_is_told_of_once(
    path: Path, caplog: pytest.LogCaptureFixture, *, is_gone: bool
) -> None:
    write(path, rule("alice", "allow"))
    authz = make_authz("authz-list-file", {"filename": str(path)})
    if is_gone:
        path.unlink()
    else:
        write(path, text='{"rules": [')
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert authz.is_allowed(user("alice"))
            assert not authz.is_allowed(user("bob"))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(path) in caplog.text
    write(path, rule("bob", "allow"))
    assert authz.is_allowed(user("bob"))
    assert not authz.is_allowed(user("alice"))
