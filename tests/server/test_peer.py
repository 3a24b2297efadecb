"""Who a client is: from its socket, and from TLS."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nbdfleece.server.identity import Identity
from nbdfleece.server.peer import (
    counted_address,
    describe_peer,
    identify,
    identity_name,
    proved,
)
from tests.support.pki import Pki


@contextmanager
def accepted(family: int, host: str, client: str) -> Iterator[socket.socket]:
    """The server's end of a TCP connection from an address of this machine."""
    kind = socket.AF_INET6 if ":" in client else socket.AF_INET
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, 0))
        listener.listen()
        with socket.socket(kind) as other:
            other.bind((client, 0))
            other.connect((client, listener.getsockname()[1]))
            server, _ = listener.accept()
            with server:
                yield server


def test_unix_peer_is_a_user_and_a_process() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        found = identify(one)
        assert found == Identity(uid=os.getuid(), gid=os.getgid(), pid=os.getpid())
        assert describe_peer(one) == f"unix, uid {os.getuid()}, pid {os.getpid()}"
        assert identity_name(found) == f"uid {os.getuid()}"
        assert counted_address(one) == ""


@pytest.mark.parametrize(
    ("family", "host", "client"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::", "127.0.0.1")],
    ids=["IPv4", "IPv4 at an IPv6 socket"],
)
def test_tcp_peer_is_an_address(family: int, host: str, client: str) -> None:
    with accepted(family, host, client) as server:
        found = identify(server)
        assert found == Identity(address=ipaddress.ip_address("127.0.0.1"))
        assert describe_peer(server).startswith("127.0.0.1, port ")
        assert counted_address(server) == "address 127.0.0.1"
        assert identity_name(found) == ""


def test_peer_that_is_gone_is_nobody() -> None:
    with socket.socket() as unconnected:
        assert describe_peer(unconnected) == "already gone"
        assert identify(unconnected) == Identity()


def test_certificate_comes_on_top_of_what_is_known(pki: Pki) -> None:
    der = pki.authority.issue([("CN", "backup1"), ("O", "Example")]).der
    found = proved(Identity(uid=7), der, None)
    assert (found.uid, found.tls, found.psk) == (7, True, None)
    assert found.certificate is not None
    assert "backup1" in identity_name(found)


def test_name_of_a_key_comes_on_top_of_what_is_known() -> None:
    found = proved(Identity(uid=7), None, "alice")
    assert (found.uid, found.tls, found.psk, found.certificate) == (7, True, "alice", None)
    assert "alice" in identity_name(found)


def test_tls_without_proof_changes_nothing_but_that() -> None:
    found = proved(Identity(uid=7), None, None)
    assert found == Identity(uid=7, tls=True)
    assert identity_name(found) == "uid 7"


def test_vsock_peer_is_a_machine() -> None:
    assert identity_name(Identity(cid=3)) == "cid 3"
