"""Whom rules are for."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.distinguished_name import parse_name
from nbdfleece.server.identity import Identity, PeerCertificate, peer_address
from nbdfleece.server.who import Who


def from_address(host: str) -> Identity:
    return Identity(address=peer_address(host))


def with_certificate(subject: str = "CN=x", **names: tuple) -> Identity:
    return Identity(tls=True, certificate=PeerCertificate(parse_name(subject), **names))


EVERY_KIND = [
    Identity(),
    Identity(tls=True),
    from_address("10.0.0.1"),
    Identity(uid=0, gid=0, pid=1),
    Identity(cid=0),
    Identity(psk="alice", tls=True),
    with_certificate(dns_names=("a.example",)),
]


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "host", "holds"),
    [
        ("192.168.1.1", "192.168.1.1", True),
        ("192.168.1.1", "192.168.1.10", False),
        ("192.168.1.1", "192.168.1.100", False),
        ("192.168.1.10", "192.168.1.1", False),
        ("192.168.1.1/32", "192.168.1.10", False),
        ("192.168.1.0/24", "192.168.1.10", True),
        ("192.168.1.0/24", "192.168.10.1", False),
        ("10.0.0.0/8", "10.255.255.255", True),
        ("10.0.0.0/8", "11.0.0.0", False),
        ("10.0.0.0/8", "100.0.0.0", False),
        ("10.0.0.0/255.0.0.0", "10.1.2.3", True),
        ("0.0.0.0/0", "8.8.8.8", True),
        ("0.0.0.0/0", "::1", False),
        ("::/0", "8.8.8.8", False),
        ("::/0", "::ffff:8.8.8.8", False),
        ("10.0.0.0/8", "::ffff:10.0.0.1", True),
        ("::ffff:10.0.0.0/104", "10.1.1.1", True),
        ("::ffff:10.0.0.0/104", "::ffff:10.1.1.1", True),
        ("::ffff:10.0.0.0/104", "11.1.1.1", False),
        ("::ffff:192.168.1.1", "192.168.1.1", True),
        ("::ffff:192.168.1.1", "192.168.1.10", False),
        ("::1", "::1", True),
        ("::1", "::10", False),
        ("2001:db8::/32", "2001:db8:1::5", True),
        ("2001:db8::/32", "2001:db80::1", False),
        ("fe80::/10", "fe80::1%eth0", True),
    ],
)
def test_cve_2013_6410_addresses_are_compared_as_numbers(
    network: str, host: str, *, holds: bool
) -> None:
    """Nbd-server < 3.5 compared them as texts: 192.168.1.1 let 192.168.1.10 in."""
    assert Who({"address": network}).matches(from_address(host)) is holds


@pytest.mark.parametrize(
    "network",
    [
        "10.0.0.1/8",
        "10.0.0",
        "10.*",
        "10.0.0.0/33",
        "10.0.0.01",
        "localhost",
        "::1%eth0",
        "fe80::%eth0/64",
        " 10.0.0.1",
        "10.0.0.0-10.0.0.9",
        10,
        "",
    ],
)
def test_what_is_no_network(network: object) -> None:
    with pytest.raises(ConfigError, match="address: "):
        Who({"address": network})


# --- what the kernel says -----------------------------------------------------------------------


def test_users_and_groups_by_number_and_name() -> None:
    user = pwd.getpwuid(os.geteuid())
    group = grp.getgrgid(user.pw_gid)
    peer = Identity(uid=user.pw_uid, gid=group.gr_gid, pid=1)
    for who in ({"uid": user.pw_uid}, {"uid": user.pw_name}, {"gid": group.gr_name}):
        assert Who(who).matches(peer)
        assert not Who(who).matches(Identity(uid=12345, gid=12345, pid=1))
        assert not Who(who).matches(Identity())


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ({"uid": "no-such-user-here"}, "uid: there is no user 'no-such-user-here'"),
        ({"gid": "no-such-group-here"}, "gid: there is no group"),
        ({"uid": "0"}, "there is no user '0'"),
        ({"uid": "root\0"}, "there is no user"),
        ({"uid": -1}, "is not the name or number of a user"),
        ({"uid": 0xFFFFFFFF}, "is not the name or number of a user"),
        ({"uid": True}, "is not the name or number of a user"),
        ({"uid": 1.0}, "is not the name or number of a user"),
        ({"cid": "3"}, "cid: '3' is not the number of a context"),
        ({"cid": 0xFFFFFFFF}, "is not the number of a context"),
    ],
)
def test_what_is_no_user_or_context(who: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Who(who)


def test_context_of_a_machine() -> None:
    assert Who({"cid": 3}).matches(Identity(cid=3))
    assert not Who({"cid": 3}).matches(Identity(cid=30))
    assert not Who({"cid": 3}).matches(Identity(uid=3))


# --- what TLS proves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "holds"),
    [
        ("CN=backup1,O=Example", True),
        ("O=Example,CN=backup1", True),
        ("CN=backup1", False),
        (r"CN=backup1\,O=Example", False),
        ("CN=Backup1,O=Example", False),
    ],
)
def test_subject_of_a_certificate(subject: str, *, holds: bool) -> None:
    assert Who({"cert": "CN=backup*,O=Example"}).matches(with_certificate(subject)) is holds


SAN = with_certificate(
    dns_names=("Backup1.Example.com", "b\u00fccher.example"),
    addresses=(ipaddress.ip_address("10.0.0.1"),),
    uris=("spiffe://example.org/ns/backup",),
    emails=("Ops@Example.com",),
)


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [
        ("DNS:backup1.example.com", True),
        ("dns:BACKUP1.example.COM", True),
        ("DNS:*.example.com", True),
        ("DNS:backup?.example.com", True),
        ("DNS:*.com", False),
        ("DNS:*", False),
        ("DNS:example.com", False),
        ("DNS:backup1.example.com.evil", False),
        ("DNS:*.*.com", True),
        ("IP:10.0.0.1", True),
        ("IP:10.0.0.0/8", True),
        ("IP:10.0.0.10", False),
        ("URI:spiffe://example.org/ns/backup", True),
        ("URI:spiffe://example.org/ns/*", True),
        ("URI:spiffe://example.org/*", False),
        ("URI:*", False),
        ("URI:spiffe://*/ns/backup", True),
        ("URI:SPIFFE://example.org/ns/backup", False),
        ("email:Ops@example.com", True),
        ("email:*@EXAMPLE.com", True),
        ("email:ops@example.com", False),
        ("email:*@*", False),
        ("DNS:Ops@example.com", False),
        ("DNS:10.0.0.1", False),
        ("email:backup1.example.com@*", False),
    ],
)
def test_alternative_names_count_by_their_kind(pattern: str, *, holds: bool) -> None:
    assert Who({"san": pattern}).matches(SAN) is holds
    assert not Who({"san": pattern}).matches(with_certificate("CN=backup1.example.com"))


@pytest.mark.parametrize(
    "pattern",
    [
        *("backup1.example.com", "x:y", "DNS:", "DNS:b\u00fccher.example", "IP:x", "email:x"),
        *("DNS:a\0", "", 3, "DNS:" + "x" * 600),
    ],
)
def test_what_is_no_alternative_name(pattern: object) -> None:
    with pytest.raises(ConfigError, match="san: "):
        Who({"san": pattern})


@pytest.mark.parametrize(
    ("pattern", "user", "holds"),
    [
        ("alice", "alice", True),
        ("alice", "Alice", False),
        ("alice", "alice2", False),
        ("backup-*", "backup-1", True),
        ("alice", "\u0430lice", False),
    ],
)
def test_users_of_pre_shared_keys(pattern: str, user: str, *, holds: bool) -> None:
    assert Who({"psk": pattern}).matches(Identity(tls=True, psk=user)) is holds


def test_name_of_one_kind_is_none_of_another() -> None:
    subject = with_certificate("CN=alice")
    assert not Who({"psk": "*"}).matches(subject)
    assert not Who({"cert": "*"}).matches(Identity(tls=True, psk="CN=alice"))
    assert not Who({"san": "DNS:alice"}).matches(subject)


# --- together -----------------------------------------------------------------------------------


def test_all_keys_must_hold() -> None:
    who = Who({"cert": "CN=x", "address": "10.0.0.0/8"})
    both = Identity(address=peer_address("10.1.1.1"), certificate=SAN.certificate, tls=True)
    assert who.matches(both)
    assert not who.matches(SAN)
    assert not who.matches(from_address("10.1.1.1"))


def test_one_of_several_values_is_enough() -> None:
    who = Who({"address": ["10.0.0.1", "10.0.0.2"], "any": True})
    assert who.matches(from_address("10.0.0.2"))
    assert not who.matches(from_address("10.0.0.3"))


@pytest.mark.parametrize(
    "who",
    [
        {"cert": "*"},
        {"san": "DNS:*"},
        {"psk": "*"},
        {"uid": [0, 1]},
        {"gid": 0},
        {"address": "10.0.0.0/8"},
        {"cid": 0},
    ],
    ids=lambda who: next(iter(who)),
)
def test_key_does_not_hold_of_what_is_not_known(who: dict) -> None:
    field = {"cert": "certificate", "san": "certificate"}.get(next(iter(who)), next(iter(who)))
    for identity in EVERY_KIND:
        if getattr(identity, field) is None:
            assert not Who(who).matches(identity), identity


def test_any_is_everybody() -> None:
    assert all(Who({"any": True}).matches(identity) for identity in EVERY_KIND)


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ({}, "'who' is empty"),
        ({"any": False}, "any: it can be true only"),
        ({"any": 1}, "any: it can be true only"),
        ({"nobody": 1}, "unknown key 'nobody' in 'who'"),
        ({"Cert": "CN=x"}, "unknown key 'Cert'"),
        ({"cert": "backup"}, "cert: 'backup' is not a distinguished name"),
        ({"cert": []}, "cert must have 1 to"),
        ({"cert": {"CN": "x"}}, "cert: it must be a text"),
        ({"psk": [""]}, "psk: it must be a text"),
        ("any", "'who' must be a table"),
        (None, "'who' must be a table"),
        ([{"any": True}], "'who' must be a table"),
    ],
)
def test_what_is_not_understood_is_refused(who: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Who(who)
