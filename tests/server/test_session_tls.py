"""Sessions over TLS: who gets in, as whom, in time, and what is in the log."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base.errors import OptionRefused, PeerViolation
from nbdfleece.base.units import KiB, MiB
from nbdfleece.protocol.nbd import client as talks
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.protocol.nbd.handshake import GREETING
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.policy import Policy
from nbdfleece.server.tls import TlsCredentials
from tests.support.nbd_client import NbdClient, connected
from tests.support.nbd_server import Served, pattern, serving
from tests.support.pki import Pki
from tests.support.waiting import until

REQUIRE, ALLOW = TlsMode.REQUIRE, TlsMode.ALLOW


def client_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca-cert.pem")
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


def policy(folder: Path, text: str) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    return Policy(path)


@asynccontextmanager
async def over_tls(served: Served, folder: Path, name: str = "disk") -> AsyncIterator[NbdClient]:
    """A client in transmission, over TLS."""
    one = await served.open()
    try:
        await one.run(talks.begin_tls(no_zeroes=True))
        await one.start_tls(client_context(folder))
        await haggled(one, name)
        yield one
    finally:
        await one.close()


async def haggled(one: NbdClient, name: str) -> None:
    done = await one.run(
        talks.haggle(
            name, no_zeroes=True, structured=True, contexts=["base:allocation"], extended=False
        )
    )
    one.contexts = done.contexts
    one.begin_transmission(done.export, structured=done.structured)


async def sessions_end(served: Served) -> None:
    await until(lambda: not served.server.sessions)


def endings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if " ends: " in record.message]


# --- who gets in -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [REQUIRE, ALLOW])
async def test_client_with_a_certificate_is_served_and_named(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture, mode: TlsMode
) -> None:
    caplog.set_level(logging.INFO)
    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, tls=mode, credentials=credentials) as served:
        async with over_tls(served, pki.client("backup1", org="Example")) as client:
            assert await client.read(0, MiB) == pattern(MiB)
            await client.write(4 * KiB, b"x" * 100 * KiB)
            assert await client.read(4 * KiB, 100 * KiB) == b"x" * 100 * KiB
            assert await client.status(0, MiB)
            (session,) = served.server.sessions.values()
            assert session.tls == "TLSv1.3"
            assert "backup1" in session.identity_name
        await sessions_end(served)
    (line,) = endings(caplog)
    assert 'tls="TLSv1.3"' in line.message
    assert "CN=backup1" in line.message
    assert 'export="disk"' in line.message
    assert f"read={MiB + 100 * KiB} written={100 * KiB}" in line.message


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("anonymous_client", "certificate"),
        ("expired_client", "expired"),
        ("early_client", "not yet valid"),
        ("revoked_client", "revoked"),
        ("foreign_client", "issuer"),
        ("server_as_client", "purpose"),
    ],
)
async def test_others_are_refused_each_with_its_line(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture, who: str, why: str
) -> None:
    async with serving(short_tmp, tls=REQUIRE, credentials=TlsCredentials(pki.server)) as served:
        with pytest.raises((OSError, PeerViolation, EOFError)):
            async with over_tls(served, getattr(pki, who)()):
                pass
        await sessions_end(served)
        (line,) = endings(caplog)
        assert line.levelno == logging.WARNING
        assert why in line.message
        async with over_tls(served, pki.client()) as client:
            assert await client.read(0, 4) == pattern(4)


async def test_without_tls_nothing_is_told_where_it_is_required(short_tmp: Path, pki: Pki) -> None:
    async with serving(short_tmp, tls=REQUIRE, credentials=TlsCredentials(pki.server)) as served:
        client = await served.open()
        await client.run(talks.greet(no_zeroes=True))
        for talk in (talks.list_exports(), talks.go("disk"), talks.info("unknown")):
            with pytest.raises(OptionRefused) as caught:
                await client.run(talk)
            assert caught.value.reply == c.NBD_REP_ERR_TLS_REQD
        with pytest.raises(EOFError):
            await client.run(talks.export_name("disk", no_zeroes=True))
        await client.close()


async def test_allowed_by_the_ca_but_not_by_the_policy(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    rules = policy(
        short_tmp,
        '[[rule]]\nwho = { cert = "CN=backup1" }\nexports = ["frozen"]\nallow = ["list", "read"]\n',
    )
    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, tls=REQUIRE, credentials=credentials, policy=rules) as served:
        async with over_tls(served, pki.client("backup1"), "frozen") as client:
            assert await client.read(0, 4) == pattern(4)
        for name in ("frozen", "unknown"):
            with pytest.raises(OptionRefused) as caught:
                async with over_tls(served, pki.client("mallory"), name):
                    pass
            assert caught.value.reply == c.NBD_REP_ERR_UNKNOWN
            assert caught.value.text == f'there is no export "{name}"'
        await sessions_end(served)
    (line,) = endings(caplog)  # the others are no warnings
    assert 'refused="frozen"' in line.message
    assert "CN=mallory" in line.message


async def test_tls_gives_what_a_local_user_does_not_get(short_tmp: Path, pki: Pki) -> None:
    rules = policy(
        short_tmp,
        '[[rule]]\nwho = { cert = "CN=backup1" }\nexports = ["*"]\nallow = ["all"]\n'
        '[[rule]]\nwho = { any = true }\nexports = ["frozen"]\nallow = ["list", "read"]\n',
    )
    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, tls=ALLOW, credentials=credentials, policy=rules) as served:
        client = await served.open()
        await client.run(talks.greet(no_zeroes=True))
        assert await client.run(talks.list_exports()) == [("frozen", "")]
        for name in ("disk", "unknown"):
            with pytest.raises(OptionRefused) as caught:
                await client.run(talks.go(name))
            assert caught.value.reply == c.NBD_REP_ERR_TLS_REQD
        await client.run(talks.agree(c.NBD_OPT_STARTTLS))
        await client.start_tls(client_context(pki.client("backup1")))
        assert len(await client.run(talks.list_exports())) == 2
        with pytest.raises(OptionRefused) as caught:
            await client.run(talks.go("unknown"))
        assert caught.value.reply == c.NBD_REP_ERR_UNKNOWN
        await haggled(client, "disk")
        assert await client.read(0, 4) == pattern(4)
        await client.close()


async def test_cve_2021_3716_nothing_agreed_before_tls_holds_after_it(
    short_tmp: Path, pki: Pki
) -> None:
    async with serving(short_tmp, tls=ALLOW, credentials=TlsCredentials(pki.server)) as served:
        client = await served.open()
        await client.run(talks.greet(no_zeroes=True))
        assert await client.run(talks.structured_reply())
        await client.run(talks.set_meta_context("disk", ["base:allocation"]))
        await client.run(talks.agree(c.NBD_OPT_STARTTLS))
        await client.start_tls(client_context(pki.client()))
        export = await client.run(talks.go("disk"))
        assert not export.flags & c.NBD_FLAG_SEND_DF
        client.begin_transmission(export, structured=False)
        assert await client.read(0, 4) == pattern(4)
        assert await client.error_of(c.NBD_CMD_BLOCK_STATUS, 0, 4) == c.NBD_EINVAL
        await client.close()


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [wire.option(c.NBD_OPT_LIST), b"\x16\x03\x01", b"\0"])
async def test_cve_2024_34083_plain_text_behind_starttls_closes(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture, behind: bytes
) -> None:
    async with serving(short_tmp, tls=ALLOW, credentials=TlsCredentials(pki.server)) as served:
        client = await served.open()
        await client.receive(len(GREETING))
        await client.send(wire.CLIENT_FLAGS.pack(3) + wire.option(c.NBD_OPT_STARTTLS) + behind)
        assert await client.receive_to_end() == b""
        await client.close()
        await sessions_end(served)
    (line,) = endings(caplog)
    assert "plain text behind" in line.message


@pytest.mark.parametrize("behind", [wire.option(c.NBD_OPT_LIST), bytes(1000), b"\x16\x03\x01\xff"])
async def test_what_comes_after_the_acknowledgement_is_tls_or_nothing(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture, behind: bytes
) -> None:
    async with serving(short_tmp, tls=ALLOW, credentials=TlsCredentials(pki.server)) as served:
        client = await served.open()
        await client.run(talks.begin_tls(no_zeroes=True))
        await client.send(behind)
        client.half_close()
        answer = await client.receive_to_end()
        assert wire.option_reply(c.NBD_OPT_LIST, c.NBD_REP_ACK) not in answer
        await client.close()
        await sessions_end(served)
        async with over_tls(served, pki.client()) as other:
            assert await other.read(0, 4) == pattern(4)


async def test_the_deadline_counts_tls_too_and_nobody_waits(short_tmp: Path, pki: Pki) -> None:
    options = ServerOptions(handshake_timeout_s=0.5)
    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, tls=REQUIRE, credentials=credentials, options=options) as served:
        silent = []
        for _ in range(20):
            client = await served.open()
            await client.run(talks.begin_tls(no_zeroes=True))
            silent.append(client)
        async with over_tls(served, pki.client()) as other:
            assert await other.read(0, 4) == pattern(4)
            for client in silent:
                assert await client.receive_to_end() == b""
                await client.close()
            await asyncio.sleep(0)
            assert await other.read(0, 4) == pattern(4)


async def test_disconnect_at_each_step_of_tls(short_tmp: Path, pki: Pki) -> None:
    """What a client sends first is cut off at several places."""
    async with serving(short_tmp, tls=REQUIRE, credentials=TlsCredentials(pki.server)) as served:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        hello = client_context(pki.client()).wrap_bio(
            incoming, outgoing, server_hostname="localhost"
        )
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        sent = outgoing.read()
        for count in range(0, len(sent) + 1, 37):
            client = await served.open()
            await client.run(talks.begin_tls(no_zeroes=True))
            await client.send(sent[:count])
            await client.close()
        await sessions_end(served)
        async with over_tls(served, pki.client()) as other:
            assert await other.read(0, 4) == pattern(4)


# --- reloading -------------------------------------------------------------------------------


async def test_new_credentials_are_for_new_clients(short_tmp: Path, pki: Pki) -> None:
    folder = short_tmp / "creds"
    shutil.copytree(pki.server, folder)
    credentials = TlsCredentials(folder)
    async with (
        serving(short_tmp, tls=REQUIRE, credentials=credentials) as served,
        over_tls(served, pki.client()) as before,
    ):
        (folder / "ca-cert.pem").write_bytes(pki.stranger.pem)
        (folder / "ca-crl.pem").unlink()
        credentials.reload()
        async with over_tls(served, pki.foreign_client()) as after:
            assert await after.read(0, 4) == pattern(4)
            assert await before.read(0, 4) == pattern(4)
        with pytest.raises((OSError, PeerViolation, EOFError)):
            async with over_tls(served, pki.client()):
                pass


# --- limits ----------------------------------------------------------------------------------


async def test_one_identity_has_only_so_many_connections(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    options = ServerOptions(max_per_identity=2)
    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, tls=ALLOW, credentials=credentials, options=options) as served:
        one, other = pki.client("backup1"), pki.client("backup2")
        async with over_tls(served, one), over_tls(served, one), over_tls(served, other) as third:
            for _ in range(2):
                with pytest.raises(OptionRefused) as caught:
                    async with over_tls(served, one):
                        pass
                assert caught.value.reply == c.NBD_REP_ERR_SHUTDOWN
                assert caught.value.text == "you have 2 connections: no more"
            assert await third.read(0, 4) == pattern(4)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        await sessions_end(served)
        async with over_tls(served, one) as again:
            assert await again.read(0, 4) == pattern(4)


async def test_local_users_are_identities_too(short_tmp: Path) -> None:
    async with (
        serving(short_tmp, options=ServerOptions(max_per_identity=1)) as served,
        connected(served.path) as client,
    ):
        late = await served.open()
        with pytest.raises(OptionRefused) as caught:
            await late.connect("disk")
        assert caught.value.reply == c.NBD_REP_ERR_SHUTDOWN
        await late.close()
        assert await client.read(0, 4) == pattern(4)


# --- exports that TLS alone opens --------------------------------------------------------------


async def test_of_what_tls_alone_opens_nothing_is_told_before_it(short_tmp: Path, pki: Pki) -> None:
    """By any option: an export that is there, the default one, and one that is not, look alike."""
    rules = policy(
        short_tmp,
        '[[rule]]\nwho = { cert = "CN=backup1" }\nexports = ["disk"]\nallow = ["list", "read"]\n'
        '[[rule]]\nwho = { any = true }\nexports = ["frozen"]\nallow = ["list", "read"]\n',
    )
    credentials = TlsCredentials(pki.server)
    async with serving(short_tmp, tls=ALLOW, credentials=credentials, policy=rules) as served:
        served.exports.default_name = "disk"
        client = await served.open()
        await client.run(talks.greet(no_zeroes=True))
        await client.run(talks.structured_reply())
        told = set()
        for name in ("disk", "unknown", "", "DISK", "disk@x:token"):
            for talk in (
                talks.go(name),
                talks.info(name),
                talks.set_meta_context(name, ["base:allocation"]),
                talks.list_meta_context(name, ["base:"]),
            ):
                with pytest.raises(OptionRefused) as caught:
                    await client.run(talk)
                told.add((talk.__name__, caught.value.reply))
        assert told == {
            ("go", c.NBD_REP_ERR_TLS_REQD),
            ("info", c.NBD_REP_ERR_TLS_REQD),
            ("set_meta_context", c.NBD_REP_ERR_UNKNOWN),  # the spec has no other for these
            ("list_meta_context", c.NBD_REP_ERR_UNKNOWN),
        }
        assert await client.run(talks.list_exports()) == [("frozen", "")]
        with pytest.raises(EOFError):
            await client.run(talks.export_name("disk", no_zeroes=True))
        await client.close()

        async with over_tls(served, pki.client("backup1"), "") as inside:
            assert await inside.read(0, 4) == pattern(4)
            assert inside.export is not None
            assert inside.export.flags & c.NBD_FLAG_READ_ONLY
            assert await inside.error_of(c.NBD_CMD_WRITE, 0, 4, data=b"evil") == c.NBD_EPERM
        for name in ("disk", "unknown", ""):
            with pytest.raises(OptionRefused) as caught:
                async with over_tls(served, pki.client("mallory"), name):
                    pass
            assert caught.value.reply == c.NBD_REP_ERR_UNKNOWN
        assert served.disk.data == pattern(MiB)
