"""The authority's folder: what is made, what is refused, what a run that was cut off leaves."""

from __future__ import annotations

import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from nbdfleece.base.errors import ConfigError
from nbdfleece.pki import authority, certificates, hosts
from nbdfleece.pki.errors import AlreadyThere, ClientNotFound, NoAuthority, PkiError
from tests.support.pki import Authority as ForeignAuthority

HOSTS = hosts.parse_hosts(["localhost", "127.0.0.1", "::1"])
SERVER_FILES = ("ca-cert.pem", "ca-crl.pem", "ca-key.pem", "server-cert.pem", "server-key.pem")


class Cut(BaseException):
    """The moment at which a run is cut off."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tls"
    authority.init(made, HOSTS)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def revoked(folder: Path) -> set[int]:
    crl = x509.load_pem_x509_crl((folder / "ca-crl.pem").read_bytes())
    return {entry.serial_number for entry in crl}


def serial(client: Path) -> int:
    return certificate(client / "client-cert.pem").serial_number


def tls_works(folder: Path, client: Path) -> None:
    """Make a handshake in memory, both sides checking all that OpenSSL can check."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    server_context.verify_mode = ssl.CERT_REQUIRED
    server_context.load_verify_locations(folder / "ca-cert.pem")
    server_context.load_verify_locations(folder / "ca-crl.pem")
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
    client_context.load_verify_locations(client / "ca-cert.pem")
    flags = ssl.VerifyFlags.VERIFY_X509_STRICT
    client_context.verify_flags |= flags
    server_context.verify_flags |= flags | ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server_context.wrap_bio(up, down, server_side=True)
    other = client_context.wrap_bio(down, up, server_hostname="localhost")
    for _ in range(4):
        for side in (other, one):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert other.version() is not None
    assert one.getpeercert() is not None


# --- init --------------------------------------------------------------------------------------


def test_init_makes_an_authority_and_a_server(folder: Path) -> None:
    assert names(folder) == sorted(SERVER_FILES)
    server = certificate(folder / "server-cert.pem")
    found = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(found) == HOSTS
    assert revoked(folder) == set()


def test_openssl_takes_what_is_made_at_its_strictest(folder: Path) -> None:
    tls_works(folder, authority.add_client(folder, "backup1", "Example"))


def test_a_revoked_client_is_refused_by_openssl(folder: Path) -> None:
    client = authority.add_client(folder, "backup1", None)
    authority.revoke(folder, "backup1")
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        tls_works(folder, client)


def test_a_second_init_is_refused_and_changes_nothing(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(AlreadyThere, match="already"):
        authority.init(folder, HOSTS)
    assert contents(folder) == before


def test_a_server_is_renewed_under_the_same_authority(folder: Path) -> None:
    client = authority.add_client(folder, "backup1", None)
    authority.revoke(folder, "backup1")
    before = contents(folder)
    (folder / "server-cert.pem").unlink()
    authority.init(folder, hosts.parse_hosts(["other.example"]))
    after = contents(folder)
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed == {"server-cert.pem"}
    assert revoked(folder) == {serial(client)}


@pytest.mark.parametrize("missing", ["ca-key.pem", "ca-cert.pem", "ca-crl.pem", "server-key.pem"])
def test_what_is_missing_before_the_end_is_not_made_up(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    before = contents(folder)
    with pytest.raises(AlreadyThere, match=f"no {missing}"):
        authority.init(folder, HOSTS)
    assert contents(folder) == before


def test_a_lost_revocation_list_is_not_taken_for_an_empty_one(folder: Path) -> None:
    authority.add_client(folder, "backup1", None)
    for name in ("ca-crl.pem", "server-cert.pem", "server-key.pem"):
        (folder / name).unlink()
    with pytest.raises(AlreadyThere, match=r"no ca-crl\.pem"):
        authority.init(folder, HOSTS)
    with pytest.raises(PkiError, match=r"ca-crl\.pem"):
        authority.revoke(folder, "backup1")


def test_an_authority_made_elsewhere_signs_too(tmp_path: Path) -> None:
    other = ForeignAuthority("somebody's CA")
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "ca-cert.pem").write_bytes(other.pem)
    (folder / "ca-key.pem").write_bytes(certificates.key_pem(other.key))
    authority.init(folder, HOSTS)
    assert certificate(folder / "ca-cert.pem") == other.certificate
    tls_works(folder, authority.add_client(folder, "backup1", None))


def test_the_key_of_another_authority_is_refused(folder: Path) -> None:
    key = certificates.key_pem(certificates.new_key())
    (folder / "ca-key.pem").write_bytes(key)
    with pytest.raises(PkiError, match="not that of its certificate"):
        authority.add_client(folder, "backup1", None)


def test_a_certificate_that_is_no_authority_is_refused(folder: Path) -> None:
    for kind in ("cert", "key"):
        server = (folder / f"server-{kind}.pem").read_bytes()
        (folder / f"ca-{kind}.pem").write_bytes(server)
    with pytest.raises(PkiError, match="not one of an authority"):
        authority.add_client(folder, "backup1", None)


def test_an_expired_authority_signs_nothing(folder: Path) -> None:
    old = datetime.now(UTC) - timedelta(days=4000)
    made = certificates.make_authority(certificates.new_key(), old)
    (folder / "ca-cert.pem").write_bytes(certificates.certificate_pem(made.certificate))
    (folder / "ca-key.pem").write_bytes(certificates.key_pem(made.key))
    with pytest.raises(PkiError, match="has expired on"):
        authority.add_client(folder, "backup1", None)


# --- clients -----------------------------------------------------------------------------------


def test_a_client_gets_a_folder_that_programs_take(folder: Path) -> None:
    made = authority.add_client(folder, "backup1", "Example, Inc")
    assert made == folder / "clients" / "backup1"
    assert names(made) == ["ca-cert.pem", "client-cert.pem", "client-key.pem"]
    assert (made / "ca-cert.pem").read_bytes() == (folder / "ca-cert.pem").read_bytes()
    subject = certificate(made / "client-cert.pem").subject
    assert [rdn.rfc4514_string() for rdn in subject.rdns] == ["CN=backup1", "O=Example\\, Inc"]


def test_a_clients_folder_is_not_overwritten(folder: Path) -> None:
    authority.add_client(folder, "backup1", None)
    before = contents(folder)
    with pytest.raises(AlreadyThere):
        authority.add_client(folder, "backup1", None)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "a/b", "../a", "/a", "a b", "a\n", "a\0", "ä", "x" * 65],
    ids=ascii,
)
def test_strange_names_of_clients_are_refused(folder: Path, name: str) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError):
        authority.add_client(folder, name, None)
    with pytest.raises(ConfigError):
        authority.revoke(folder, name)
    assert contents(folder) == before


@pytest.mark.parametrize("org", ["", "  ", "a\nb", "a\0", "x" * 65], ids=ascii)
def test_strange_organizations_are_refused(folder: Path, org: str) -> None:
    with pytest.raises(ConfigError):
        authority.add_client(folder, "backup1", org)


def test_without_an_authority(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(NoAuthority):
            authority.add_client(place, "backup1", None)
        with pytest.raises(NoAuthority):
            authority.revoke(place, "backup1")


def test_without_the_authoritys_key(folder: Path) -> None:
    (folder / "ca-key.pem").unlink()
    with pytest.raises(NoAuthority, match=r"ca-key\.pem"):
        authority.add_client(folder, "backup1", None)


# --- revocation --------------------------------------------------------------------------------


def test_each_revocation_adds_to_the_list(folder: Path) -> None:
    clients = [authority.add_client(folder, name, None) for name in ("a", "b", "a.b")]
    assert authority.revoke(folder, "a") == 1
    assert revoked(folder) == {serial(clients[0])}
    assert authority.revoke(folder, "a.b") == 1
    assert revoked(folder) == {serial(clients[0]), serial(clients[2])}


def test_each_list_has_a_higher_number_and_lasts_as_long_as_the_authority(folder: Path) -> None:
    authority.add_client(folder, "a", None)
    lists = [x509.load_pem_x509_crl((folder / "ca-crl.pem").read_bytes())]
    authority.revoke(folder, "a")
    lists.append(x509.load_pem_x509_crl((folder / "ca-crl.pem").read_bytes()))
    numbers = [one.extensions.get_extension_for_class(x509.CRLNumber).value for one in lists]
    assert [number.crl_number for number in numbers] == [1, 2]
    ends = certificate(folder / "ca-cert.pem").not_valid_after_utc
    assert {one.next_update_utc for one in lists} == {ends}


def test_a_client_whose_folder_was_moved_away_can_be_revoked_and_made_again(
    folder: Path, tmp_path: Path
) -> None:
    first = authority.add_client(folder, "a", None).rename(tmp_path / "elsewhere")
    second = authority.add_client(folder, "a", None)
    assert authority.revoke(folder, "a") == 2
    assert revoked(folder) == {serial(first), serial(second)}
    third = second.rename(tmp_path / "second") and authority.add_client(folder, "a", None)
    assert serial(third) not in revoked(folder)
    assert authority.revoke(folder, "a") == 1


def test_a_second_revocation_changes_nothing(folder: Path) -> None:
    authority.add_client(folder, "a", None)
    authority.revoke(folder, "a")
    before = contents(folder)
    assert authority.revoke(folder, "a") == 0
    assert contents(folder) == before


def test_an_unknown_client_cannot_be_revoked(folder: Path) -> None:
    authority.add_client(folder, "a.b", None)
    with pytest.raises(ClientNotFound):
        authority.revoke(folder, "a")


def test_a_list_of_another_authority_is_refused(folder: Path) -> None:
    authority.add_client(folder, "a", None)
    (folder / "ca-crl.pem").write_bytes(ForeignAuthority().crl())
    with pytest.raises(PkiError, match="not made by the authority"):
        authority.revoke(folder, "a")


# --- modes, and runs that are cut off ----------------------------------------------------------


def test_private_files_are_private_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tls"
    seen: set[str] = set()
    sync = os.fsync

    def look(fd: int) -> None:
        for path in folder.rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            if path.is_dir():
                assert mode == 0o700, path
            elif b"PRIVATE" in path.read_bytes():
                seen.add(path.name)
                assert mode == 0o600, path
        sync(fd)

    monkeypatch.setattr(os, "fsync", look)
    previous = os.umask(0)
    try:
        authority.init(folder, HOSTS)
        authority.add_client(folder, "a", None)
    finally:
        os.umask(previous)
    assert {".ca-key.pem.new", ".server-key.pem.new", ".client-key.pem.new"} <= seen
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "server-cert.pem").stat().st_mode) & 0o444 == 0o444


def cut_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a run be cut off when it syncs for the `count`th time; nothing cleans up after it."""
    left = iter(range(count))

    def cut(_fd: int) -> None:
        if next(left, None) is None:
            raise Cut

    monkeypatch.setattr(os, "fsync", cut)


def is_cut(monkeypatch: pytest.MonkeyPatch, count: int, work, *args: object) -> bool:
    with monkeypatch.context() as patch:
        cut_at(patch, count)
        try:
            work(*args)
        except Cut:
            return True
    return False


def test_init_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    while is_cut(monkeypatch, count, authority.init, tmp_path / str(count), HOSTS):
        folder = tmp_path / str(count)
        kept = {path: data for path, data in contents(folder).items() if path.name[0] != "."}
        if "server-cert.pem" not in names(folder):
            authority.init(folder, HOSTS)
        assert names(folder) == sorted(SERVER_FILES)
        assert kept.items() <= contents(folder).items()
        tls_works(folder, authority.add_client(folder, "a", None))
        count += 1
    assert count == 10  # each of five files, and its name


def test_a_client_can_be_made_after_a_run_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    while True:
        folder = tmp_path / str(count)
        authority.init(folder, HOSTS)
        if not is_cut(monkeypatch, count, authority.add_client, folder, "a", None):
            break
        made = folder / "clients" / "a"
        if not made.exists():
            made = authority.add_client(folder, "a", None)
        assert names(folder / "clients") == ["a"]
        assert [one.serial_number for _, _, one in authority.issued(folder)] == [serial(made)]
        tls_works(folder, made)
        assert authority.revoke(folder, "a") == 1
        count += 1
    assert count > 8


def test_a_revocation_that_was_cut_off_is_either_there_or_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = authority.add_client(folder, "a", None)
    assert is_cut(monkeypatch, 0, authority.revoke, folder, "a")
    assert revoked(folder) == set()
    assert is_cut(monkeypatch, 1, authority.revoke, folder, "a")
    assert authority.revoke(folder, "a") == 0
    assert revoked(folder) == {serial(client)}


def test_a_file_that_cannot_be_written_is_an_error_in_words(folder: Path) -> None:
    (folder / "issued").write_text("")
    with pytest.raises(PkiError, match="issued"):
        authority.add_client(folder, "a", None)
