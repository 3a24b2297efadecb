"""TLS credentials: folders that are right, folders that are not, reloading, who gets in."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import MAX_PSK_FILE
from nbdfleece.server import tls
from nbdfleece.server.tls import TlsCredentials, parse_psk
from tests.support.pki import DAY, Issued, Pki
from tests.support.python313 import python313


def client_context(folder: Path) -> ssl.SSLContext:
    """What a careful client with this folder would use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca-cert.pem")
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """A whole handshake in memory, from both sides; return the server's."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    other = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    done = [False, False]
    while not all(done):
        for index, side in enumerate((other, one)):
            try:
                side.do_handshake()
                done[index] = True
            except ssl.SSLWantReadError:
                pass
    return one


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# --- who gets in -----------------------------------------------------------------------------


def test_client_of_the_ca_is_known_by_its_certificate(pki: Pki) -> None:
    offer = TlsCredentials(pki.server).offer()
    done = shake_hands(offer.context, client_context(pki.client("backup1", org="Example")))

    subject = done.getpeercert()["subject"]
    assert subject == ((("commonName", "backup1"),), (("organizationName", "Example"),))
    assert done.version() == "TLSv1.3"
    assert offer.psk is None


def test_tls_1_2_is_spoken_and_nothing_older(pki: Pki) -> None:
    offer = TlsCredentials(pki.server).offer()
    old = client_context(pki.client())
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(offer.context, old).version() == "TLSv1.2"
    assert offer.context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("anonymous_client", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("expired_client", "certificate has expired"),
        ("early_client", "certificate is not yet valid"),
        ("revoked_client", "certificate revoked"),
        ("foreign_client", "unable to get local issuer certificate"),
        ("server_as_client", "unsuitable certificate purpose"),
    ],
)
def test_others_are_refused(pki: Pki, who: str, why: str) -> None:
    folder = getattr(pki, who)()
    with pytest.raises(ssl.SSLError, match=why):
        shake_hands(TlsCredentials(pki.server).offer().context, client_context(folder))


def test_without_verification_nobody_is_asked(pki: Pki, tmp_path: Path) -> None:
    folder = copied(pki.server, tmp_path / "s")
    (folder / "ca-cert.pem").unlink()
    offer = TlsCredentials(folder, verify_peer=False).offer()
    done = shake_hands(offer.context, client_context(pki.client()))
    assert done.getpeercert(binary_form=True) is None


def test_without_a_list_nobody_is_revoked(pki: Pki) -> None:
    credentials = TlsCredentials(pki.server_for("no-crl", crl=False))
    shake_hands(credentials.offer().context, client_context(pki.revoked_client()))


def test_list_that_has_ended_lets_nobody_in(pki: Pki, tmp_path: Path) -> None:
    own = Pki(tmp_path)
    (own.server / "ca-crl.pem").write_bytes(own.authority.crl(-9 * DAY, -2 * DAY))
    credentials = TlsCredentials(own.server)
    with pytest.raises(ssl.SSLError, match="CRL has expired"):
        shake_hands(credentials.offer().context, client_context(own.client()))
    assert any("ca-crl.pem" in text and "has expired" in text for text in credentials.warnings())


# --- folders that are not right ---------------------------------------------------------------


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_noise(path: Path) -> None:
    path.write_text("-----BEGIN CERTIFICATE-----\nnoise\n-----END CERTIFICATE-----\n")


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize("spoil", [Path.unlink, write_nothing, write_noise])
def test_missing_or_broken_file_is_named(pki: Pki, tmp_path: Path, name: str, spoil) -> None:
    folder = copied(pki.server, tmp_path / "s")
    spoil(folder / name)
    with pytest.raises(ConfigError, match=name):
        TlsCredentials(folder)


@pytest.mark.parametrize("spoil", [write_nothing, write_noise])
def test_broken_list_is_no_missing_list(pki: Pki, tmp_path: Path, spoil) -> None:
    folder = copied(pki.server, tmp_path / "s")
    spoil(folder / "ca-crl.pem")
    with pytest.raises(ConfigError, match=r"ca-crl\.pem"):
        TlsCredentials(folder)


def test_certificates_in_the_list_are_not_trusted(pki: Pki, tmp_path: Path) -> None:
    folder = copied(pki.server, tmp_path / "s")
    with (folder / "ca-crl.pem").open("ab") as file:
        file.write(pki.stranger.pem)
    with pytest.raises(ConfigError, match=r"ca-crl\.pem"):
        TlsCredentials(folder)


def test_key_of_another_certificate(pki: Pki, tmp_path: Path) -> None:
    folder = copied(pki.server, tmp_path / "s")
    shutil.copy(pki.client() / "client-key.pem", folder / "server-key.pem")
    with pytest.raises(ConfigError, match=r"server-key\.pem.*does not go with"):
        TlsCredentials(folder)


def test_encrypted_key_is_refused_and_not_asked_about(pki: Pki, tmp_path: Path) -> None:
    folder = copied(pki.server, tmp_path / "s")
    key = serialization.load_pem_private_key((folder / "server-key.pem").read_bytes(), None)
    (folder / "server-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match=r"server-key\.pem.*encrypted"):
        TlsCredentials(folder)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        TlsCredentials(tmp_path / "nowhere")


def test_both_kinds_in_one_folder_are_refused(pki: Pki, tmp_path: Path) -> None:
    folder = copied(pki.server, tmp_path / "s")
    (folder / "keys.psk").write_text("alice:00ff\n")
    with pytest.raises(ConfigError, match=r"both keys\.psk and server-cert\.pem"):
        TlsCredentials(folder)


# --- reloading, expiry -------------------------------------------------------------------------


def test_reload_takes_new_files_for_new_handshakes(tmp_path: Path) -> None:
    own = Pki(tmp_path)
    credentials = TlsCredentials(own.server)
    before = credentials.offer()
    folder = own.client("mallory")
    client = client_context(folder)
    shake_hands(before.context, client)

    certificate = x509.load_pem_x509_certificate((folder / "client-cert.pem").read_bytes())
    own.authority.revoke(Issued(certificate, own.authority.key))
    (own.server / "ca-crl.pem").write_bytes(own.authority.crl())
    credentials.reload()
    with pytest.raises(ssl.SSLError, match="revoked"):
        shake_hands(credentials.offer().context, client_context(folder))
    shake_hands(before.context, client)  # one that had begun


def test_failed_reload_keeps_what_there_was(pki: Pki, tmp_path: Path) -> None:
    folder = copied(pki.server, tmp_path / "s")
    credentials = TlsCredentials(folder)
    (folder / "server-key.pem").write_bytes(b"")
    with pytest.raises(ConfigError):
        credentials.reload()
    shake_hands(credentials.offer().context, client_context(pki.client()))


def test_expiry_is_told_a_month_ahead(pki: Pki) -> None:
    credentials = TlsCredentials(pki.server_for("ten-days", ends=10 * DAY))
    now = datetime.now(UTC)
    (soon,) = [text for text in credentials.warnings(now) if "server-cert.pem" in text]
    assert "CN=localhost" in soon
    assert "expires in 9 days" in soon
    (late,) = [text for text in credentials.warnings(now + 11 * DAY) if "server-cert.pem" in text]
    assert "has expired" in late
    assert not TlsCredentials(pki.server).warnings(now - timedelta(days=5))


# --- pre-shared keys ---------------------------------------------------------------------------


def test_keys_as_psktool_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text("alice:00ff\n\nbob:with:colons:0a0B\n")
    assert parse_psk(path) == {"alice": b"\0\xff", "bob:with:colons": b"\n\x0b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key"),
        ("alice", "line 1"),
        ("alice:00\nbob:xyz", "line 2"),
        ("alice:", "line 1"),
        (":00", "line 1"),
        ("#616c:00", "line 1"),
        ("alice:00\nalice:01", "line 2"),
        ("alice:" + "00" * 257, "line 1"),
        ("a" * 300 + ":00", "line 1"),
        ("alice:00\n" * (MAX_PSK_FILE // 9 + 1), "longer"),
        (b"\xff:00", "UTF-8"),
    ],
)
def test_broken_keys_are_named_and_not_shown(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        parse_psk(path)
    assert str(path) in str(caught.value)
    assert "xyz" not in str(caught.value)


@pytest.mark.skipif(tls.HAS_PSK, reason="this Python has pre-shared keys")
def test_keys_need_a_python_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:00ff\n")
    with pytest.raises(ConfigError, match=r"keys\.psk.*Python 3\.13"):
        TlsCredentials(tmp_path)


PSK_SCRIPT = """
import ssl, sys
from pathlib import Path
from nbdfleece.server.tls import TlsCredentials
credentials = TlsCredentials(Path(sys.argv[1]))

def attempt(name, key, version):
    offer = credentials.offer()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.minimum_version = client.maximum_version = version
    client.set_ciphers("PSK")
    client.set_psk_client_callback(lambda hint: (name, key))
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(outward, inward), offer.context.wrap_bio(inward, outward, True)]
    done = [False, False]
    while not all(done):
        for index, side in enumerate(sides):
            try:
                side.do_handshake()
                done[index] = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return "refused"
    return offer.psk + " " + sides[1].cipher()[0]

for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
    for name, key in (("alice", b"\\0\\xff"), ("alice", b"\\0\\xfe"), ("mallory", b"\\0\\xff")):
        print(attempt(name, key, version))
"""


def test_who_has_a_key_is_known_by_name(tmp_path: Path) -> None:
    """TLS 1.2 and 1.3; a wrong key and an unknown name get nowhere."""
    program = python313()
    (tmp_path / "keys.psk").write_text("alice:00ff\n")
    done = subprocess.run(
        [program, "-c", PSK_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.splitlines() == [
        *("alice ECDHE-PSK-CHACHA20-POLY1305", "refused", "refused"),
        *("alice TLS_CHACHA20_POLY1305_SHA256", "refused", "refused"),
    ]
