"""The policy: first match wins, nothing matches means nothing allowed, broken means refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.distinguished_name import parse_name
from nbdfleece.server.identity import Identity, PeerCertificate, peer_address
from nbdfleece.server.policy import Policy, Rights

READ = Rights.LIST | Rights.READ
STRANGER = Identity(address=peer_address("203.0.113.1"))
ROOT = Identity(uid=0, gid=0, pid=1)
BACKUP = Identity(tls=True, certificate=PeerCertificate(parse_name("CN=backup1,O=Example")))

RULES = """\
# for the guests
[[rule]]
who = { uid = 0 }
exports = ["vda", "vdb"]
allow = "all"

[[rule]]
who = { cert = "CN=backup*,O=Example" }
exports = ["vda@*", "vdb@*"]
allow = ["list", "read"]

[[rule]]
who = { address = "10.0.0.0/8" }
exports = ["vda@secret"]
deny = true

[[rule]]
who = { address = ["10.0.0.0/8", "fd00::/8"] }
exports = ["vd?@*"]
allow = ["read"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy"


def load(path: Path, text: str) -> Policy:
    path.write_text(text)
    return Policy.load(path)


@pytest.mark.parametrize(
    ("identity", "export", "rights"),
    [
        (ROOT, "vda", Rights.ALL),
        (ROOT, "vda@nightly", Rights.NONE),
        (ROOT, "vdc", Rights.NONE),
        (BACKUP, "vda@nightly", READ),
        (BACKUP, "vda", Rights.NONE),
        (BACKUP, "xvda@nightly", Rights.NONE),
        (BACKUP, "", Rights.NONE),
        (Identity(address=peer_address("::ffff:10.0.0.1")), "vda@a", Rights.READ),
        (Identity(address=peer_address("10.0.0.1")), "vda@secret", Rights.NONE),
        (Identity(address=peer_address("10.0.0.1")), "vdb@secret", Rights.READ),
        (Identity(address=peer_address("fd00::1")), "vda@secret", Rights.READ),
        (STRANGER, "vda@a", Rights.NONE),
        (Identity(), "vda", Rights.NONE),
    ],
)
def test_first_rule_that_fits_decides(
    path: Path, identity: Identity, export: str, rights: Rights
) -> None:
    assert load(path, RULES).rights(identity, export) == rights


def test_json_of_the_same_shape_says_the_same(path: Path) -> None:
    rules = [
        {"who": {"cert": "CN=backup*,O=Example"}, "exports": ["vda@*"], "allow": ["read"]},
        {"who": {"any": True}, "exports": "*", "deny": True},
    ]
    policy = load(path, json.dumps({"rule": rules}))
    assert policy.rights(BACKUP, "vda@a") == Rights.READ
    assert policy.rights(BACKUP, "vdb@a") == Rights.NONE
    assert policy.rights(STRANGER, "vda@a") == Rights.NONE


def test_earlier_denial_beats_later_permission_and_the_other_way_round(path: Path) -> None:
    deny = '[[rule]]\nwho = { any = true }\nexports = ["a*"]\ndeny = true\n'
    allow = '[[rule]]\nwho = { any = true }\nexports = ["*"]\nallow = ["read"]\n'
    assert load(path, deny + allow).rights(STRANGER, "ab") == Rights.NONE
    assert load(path, deny + allow).rights(STRANGER, "b") == Rights.READ
    assert load(path, allow + deny).rights(STRANGER, "ab") == Rights.READ


@pytest.mark.parametrize(
    ("allow", "rights"),
    [
        ('"all"', Rights.ALL),
        ('["all"]', Rights.ALL),
        ('["list"]', Rights.LIST),
        ('["read", "write"]', Rights.READ | Rights.WRITE),
        ('["trim", "write", "read"]', Rights.READ | Rights.WRITE | Rights.TRIM),
    ],
)
def test_rights_as_written(path: Path, allow: str, rights: Rights) -> None:
    text = f'[[rule]]\nwho = {{ any = true }}\nexports = "x"\nallow = {allow}\n'
    assert load(path, text).rights(STRANGER, "x") == rights


# --- broken files ------------------------------------------------------------------------------


GOOD_RULE = '[[rule]]\nwho = { any = true }\nexports = ["x"]\nallow = ["read"]\n'


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ('exports = ["x"]\nallow = ["read"]', "'who' is missing"),
        ('who = { any = true }\nallow = ["read"]', "'exports' is missing"),
        ('who = { any = true }\nexports = ["x"]', "has either 'allow' or 'deny = true'"),
        ('who = { any = true }\nexports = ["x"]\ndeny = false', "has either 'allow' or 'deny"),
        ('who = { any = true }\nexports = ["x"]\ndeny = 1', "'deny' must be true or false"),
        (
            'who = { any = true }\nexports = ["x"]\nallow = ["read"]\ndeny = true',
            "has either 'allow' or 'deny",
        ),
        ('who = { any = true }\nexports = []\nallow = "all"', "'exports' must have 1 to"),
        ('who = { any = true }\nexports = [1]\nallow = "all"', "must be a text"),
        ('who = { any = true }\nexports = [""]\nallow = "all"', "must be a text"),
        ('who = { any = true }\nexports = ["x"]\nallow = []', "'allow' must have 1 to"),
        ('who = { any = true }\nexports = ["x"]\nallow = "Read"', "must be one of list, read,"),
        ('who = { any = true }\nexports = ["x"]\nallow = ["write"]', "'allow': write needs read"),
        (
            'who = { any = true }\nexports = ["x"]\nallow = ["read", "trim"]',
            "'allow': trim needs write",
        ),
        ('who = { any = true }\nexports = ["x"]\nallow = "all"\nwhen = 1', "unknown key 'when'"),
        ('who = { cert = "x" }\nexports = ["x"]\nallow = "all"', "cert: 'x' is not a dist"),
        ('who = { }\nexports = ["x"]\nallow = "all"', "'who' is empty"),
    ],
)
def test_wrong_rule_is_refused_with_file_line_and_number(path: Path, rule: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load(path, f"{GOOD_RULE}\n[[rule]]\n{rule}\n")
    assert str(caught.value).startswith(f"{path}:6: rule 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", ": there is no 'rule' in it"),
        ("# nothing\n", ": there is no 'rule' in it"),
        ("rule = 3", ": the rules must be a list"),
        ("rule = [3]", ": rule 1: a rule must be a table"),
        ("[[rules]]\n", ": unknown key 'rules'"),
        (GOOD_RULE + "[other]\n", ": unknown key 'other'"),
        (GOOD_RULE + "oops\n", ":5: "),
        (GOOD_RULE + "allow = 'all'\n", ":5: "),
        ("x = " + "[" * 5000, "nested too deeply"),
        ('{"rule": [\n}', ":2: Expecting value"),
        ('{"rule": [], "rule": []}', ": 'rule' stands twice in one object"),
        ('{"rule": [{"who": {"uid": 1, "uid": 2}}]}', ": 'uid' stands twice"),
        ('{"rule": ' + "[" * 100_000, "nested too deeply"),
        ('{"rule": ' + "1" * 5000 + "}", ": "),
        ('{"rule": [{}]}', ": rule 1: 'who' is missing"),
        ("\ufeff" + GOOD_RULE, ":1: "),
    ],
    ids=range(16),
)
def test_what_is_no_policy_is_refused(path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load(path, text)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_policy_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Policy.load(path)


def test_empty_list_of_rules_denies_everything(path: Path) -> None:
    assert load(path, "rule = []").rights(ROOT, "vda") == Rights.NONE


# --- reloading -----------------------------------------------------------------------------------


def test_reload_takes_the_new_rules(path: Path) -> None:
    policy = load(path, RULES)
    path.write_text(RULES.replace("vda@secret", "vdb@secret"))
    policy.reload()
    assert policy.rights(Identity(address=peer_address("10.0.0.1")), "vda@secret") == Rights.READ


@pytest.mark.parametrize(
    "broken", ["", "[[rule]]", "{", None], ids=["empty", "cut", "json", "gone"]
)
def test_reload_of_a_broken_file_changes_nothing(path: Path, broken: str | None) -> None:
    policy = load(path, RULES)
    path.unlink()
    if broken is not None:
        path.write_text(broken)
    with pytest.raises(ConfigError):
        policy.reload()
    assert policy.rights(ROOT, "vda") == Rights.ALL
    assert policy.rights(STRANGER, "vda") == Rights.NONE
