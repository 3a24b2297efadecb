"""What `pki show` knows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdfleece.pki import authority, certificates, hosts
from nbdfleece.pki.errors import NoAuthority, PkiError
from nbdfleece.pki.listing import show


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tls"
    authority.init(made, hosts.parse_hosts(["a.example", "::1"]))
    return made


def test_all_that_is_there(folder: Path, tmp_path: Path) -> None:
    authority.add_client(folder, "b", "Example")
    authority.add_client(folder, "a", None).rename(tmp_path / "moved")
    authority.revoke(folder, "a")
    found = show(folder)
    assert found.authority.subject.startswith("CN=nbdfleece CA ")
    assert found.server is not None
    assert found.server.hosts == ("a.example", "::1")
    assert [(one.name, one.path, one.subject, one.state) for one in found.clients] == [
        ("a", None, "CN=a", "revoked"),
        ("b", folder / "clients" / "b", "CN=b,O=Example", "ok"),
    ]
    assert found.revocations is not None
    assert found.revocations.count == 1


def test_an_empty_revocation_list_is_one(folder: Path) -> None:
    found = show(folder).revocations
    assert found is not None
    assert found.count == 0


def test_a_servers_copy_without_the_rest(folder: Path) -> None:
    for name in ("ca-key.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"):
        (folder / name).unlink()
    found = show(folder)
    assert (found.server, found.clients, found.revocations) == (None, [], None)


@pytest.mark.parametrize(
    ("age_days", "state"),
    [(0, "ok"), (710, "expires soon"), (800, "expired"), (-10, "not yet valid")],
)
def test_states(folder: Path, age_days: int, state: str) -> None:
    made = authority.add_client(folder, "a", None)
    key = certificates.parse_key((folder / "ca-key.pem").read_bytes())
    then = datetime.now(UTC) - timedelta(days=age_days)
    signer = certificates.make_authority(key, then)
    one = certificates.make_client(signer, key, "a", None, then)
    (made / "client-cert.pem").write_bytes(certificates.certificate_pem(one))
    found = [client for client in show(folder).clients if client.path is not None]
    assert [client.state for client in found] == [state]


def test_without_an_authority(tmp_path: Path) -> None:
    with pytest.raises(NoAuthority):
        show(tmp_path / "none")


def test_a_file_that_is_something_else_is_named(folder: Path) -> None:
    (folder / "server-cert.pem").write_bytes(b"rubbish")
    with pytest.raises(PkiError, match=r"server-cert\.pem"):
        show(folder)
