"""Names and addresses of servers."""

from __future__ import annotations

import socket

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.pki import hosts


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("Disks.Example.ORG", "disks.example.org"),
        ("disks.example.org.", "disks.example.org"),
        ("*.example.org", "*.example.org"),
        ("node_1", "node_1"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[::1]", "::1"),
    ],
)
def test_hosts_are_taken(given: str, made: str) -> None:
    assert [hosts.host_text(host) for host in hosts.parse_hosts([given])] == [made]


@pytest.mark.parametrize(
    "given",
    [
        *("", ".", "a..b", "a b", "-a", "a-", "1.2.3.4.5", "300.1.1.1", "a/b", "*", "*.*.a"),
        *("x" * 64, ".".join(["x" * 50] * 6), "a:80", "a\n"),
    ],
    ids=ascii,
)
def test_what_is_no_host_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an address"):
        hosts.parse_hosts([given])


def test_an_address_with_a_zone_is_refused() -> None:
    with pytest.raises(ConfigError, match="zone"):
        hosts.parse_hosts(["fe80::1%eth0"])


def test_each_host_is_named_once() -> None:
    assert len(hosts.parse_hosts(["a", "A", "::1", "0::1", "a."])) == 2


def test_own_hosts_are_this_machine_and_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "disks")
    monkeypatch.setattr(socket, "getfqdn", lambda: "disks.example.org")
    found = [hosts.host_text(host) for host in hosts.own_hosts()]
    assert found == ["disks", "disks.example.org", "localhost", "127.0.0.1", "::1"]


def test_a_machine_with_a_strange_name_has_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my machine")
    monkeypatch.setattr(socket, "getfqdn", lambda: "localhost")
    found = [hosts.host_text(host) for host in hosts.own_hosts()]
    assert found == ["localhost", "127.0.0.1", "::1"]
