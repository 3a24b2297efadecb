"""TLS over a real socket: what the machine's own tests cannot see. The matrix of modes is there."""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base.units import KiB, MiB
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.tls import TlsCredentials
from tests.support.nbd_server import Served, pattern, serving
from tests.support.pki import Pki
from tests.support.raw_nbd import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    DISC,
    EINVAL,
    EXPORT_NAME,
    EXTENDED,
    GO,
    INVALID,
    LIST,
    LIST_META,
    NO_ZEROES,
    OPT_INFO,
    PEEK,
    READ,
    SET_META,
    STARTTLS,
    STRUCTURED,
    TLS_REQD,
    UNKNOWN,
    WRITE,
    RawClient,
    TlsLine,
    haggling,
    info,
    meta,
    option,
    request,
)

MODES = pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
BASE = b"base:allocation"


def context(pki: Pki, folder: Path | None = None) -> ssl.SSLContext:
    """What a careful client uses, with the certificate in `folder`."""
    folder = folder or pki.client()
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(folder / "ca-cert.pem")
    if (folder / "client-cert.pem").exists():
        made.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return made


@asynccontextmanager
async def serving_tls(
    folder: Path, pki: Pki, mode: TlsMode = TlsMode.REQUIRE, **limits: float
) -> AsyncIterator[Served]:
    options = ServerOptions(**limits)
    credentials = TlsCredentials(pki.server)
    async with serving(folder, options=options, credentials=credentials, tls=mode) as served:
        yield served


@asynccontextmanager
async def over_tls(served: Served, pki: Pki) -> AsyncIterator[RawClient]:
    """A client that haggles over TLS."""
    async with haggling(served.path) as client:
        await client.start_tls(context(pki))
        yield client


async def still_serves(served: Served, pki: Pki) -> bool:
    async with over_tls(served, pki) as client:
        await client.go()
        await client.send(request(READ, 0, 4))
        return await client.simple(4) == (0, 7, pattern(4))


async def test_options_before_and_over_tls(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki) as served, haggling(served.path) as client:
        for number in (LIST, PEEK, OPT_INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED, 77):
            ((kind, text),) = await client.option(number, info(b"disk"))
            assert kind == TLS_REQD
            assert b"disk" not in text
        assert await client.outcome(STARTTLS, b"x") == INVALID
        await client.start_tls(context(pki))
        assert await client.outcome(STARTTLS) == INVALID
        assert await client.outcome(LIST) == ACK
        assert (await client.go())[0] == MiB
        await client.send(request(READ, 0, 4))
        assert await client.simple(4) == (0, 7, pattern(4))


async def test_tls_may_be_left_out_where_it_is_allowed(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki, TlsMode.ALLOW) as served:
        async with haggling(served.path) as client:
            assert await client.outcome(LIST) == ACK
            assert await client.outcome(GO, info(b"nowhere")) in (UNKNOWN, TLS_REQD)
            assert await client.outcome(LIST_META, meta(b"nowhere")) == UNKNOWN
            await client.go()
            await client.send(request(READ, 0, 4))
            assert await client.simple(4) == (0, 7, pattern(4))
        assert await still_serves(served, pki)


async def test_abort_before_tls_is_acknowledged(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki) as served, haggling(served.path) as client:
        assert await client.option(ABORT) == [(ACK, b"")]
        assert await client.receive_to_end() == b""


async def test_abort_over_tls_is_acknowledged_and_ended_properly(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki) as served, over_tls(served, pki) as client:
        assert await client.option(ABORT) == [(ACK, b"")]
        assert await client.receive_to_end() == b""
        assert isinstance(client.line, TlsLine)
        assert client.line.ended_properly


@pytest.mark.parametrize("name", [b"disk", b"nowhere", b""])
async def test_export_name_without_tls_closes(short_tmp: Path, pki: Pki, name: bytes) -> None:
    async with serving_tls(short_tmp, pki) as served, haggling(served.path) as client:
        await client.send(option(EXPORT_NAME, name))
        assert await client.receive_to_end() == b""
        assert await still_serves(served, pki)


async def test_client_without_fixed_newstyle_is_closed(short_tmp: Path, pki: Pki) -> None:
    async with (
        serving_tls(short_tmp, pki) as served,
        haggling(served.path, client_flags=NO_ZEROES) as client,
    ):
        assert await client.receive_to_end() == b""


# --- nothing of before TLS -------------------------------------------------------------------


async def test_cve_2021_3716_nothing_survives_starttls(short_tmp: Path, pki: Pki) -> None:
    async with (
        serving_tls(short_tmp, pki, TlsMode.ALLOW) as served,
        haggling(served.path) as client,
    ):
        assert await client.outcome(STRUCTURED) == ACK
        assert await client.outcome(SET_META, meta(b"disk", BASE)) == ACK
        assert await client.outcome(EXTENDED) == ACK
        await client.start_tls(context(pki))
        _, flags = await client.go()
        assert not flags & (1 << 7 | 1 << 12)
        await client.send(request(READ, 0, 4))
        assert await client.simple(4) == (0, 7, pattern(4))
        assert await client.error_of(BLOCK_STATUS, 0, 4) == EINVAL


@MODES
@pytest.mark.parametrize(
    "behind", [option(LIST), option(GO, info(b"disk")) + request(WRITE, 0, 4) + b"evil", b"\x16"]
)
async def test_plain_text_behind_starttls_is_never_heard(
    short_tmp: Path, pki: Pki, mode: TlsMode, behind: bytes
) -> None:
    """T3, CVE-2024-34083: in one segment with the option, it closes the connection."""
    async with serving_tls(short_tmp, pki, mode) as served, haggling(served.path) as client:
        await client.send(option(STARTTLS) + behind)
        assert await client.receive_to_end() == b""
        assert served.disk.data == pattern(MiB)
        assert await still_serves(served, pki)


async def test_plain_text_after_the_ack_is_never_heard(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki) as served, haggling(served.path) as client:
        assert await client.option(STARTTLS) == [(ACK, b"")]
        await client.send(option(LIST) + option(GO, info(b"disk")))
        heard = await client.receive_to_end()
        assert b"IHAVEOPT" not in heard
        assert struct.pack(">Q", 0x0003E889045565A9) not in heard  # an alert of TLS at most
        assert await still_serves(served, pki)


async def test_plain_text_within_tls_ends_the_connection(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki) as served, over_tls(served, pki) as client:
        assert isinstance(client.line, TlsLine)
        await client.go()
        await client.line.send_plain(request(WRITE, 0, 4) + b"evil")
        assert await client.receive_to_end() == b""
        assert served.disk.data == pattern(MiB)


# --- who gets in, and how it ends ------------------------------------------------------------


async def gets_in(client: RawClient, how: ssl.SSLContext) -> bool:
    """Tell whether the server talks to a client; with TLS 1.3 a refusal shows at the next read."""
    try:
        await client.start_tls(how)
        return await client.outcome(LIST) == ACK
    except (ssl.SSLError, EOFError, ConnectionError):
        return False


@pytest.mark.parametrize("who", ["foreign", "expired", "early", "revoked", "anonymous"])
async def test_failed_tls_handshake_ends_the_session(
    short_tmp: Path, pki: Pki, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_tls(short_tmp, pki) as served:
        async with haggling(served.path) as client:
            assert not await gets_in(client, context(pki, getattr(pki, f"{who}_client")()))
        assert await still_serves(served, pki)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_tls_handshake_is_under_the_deadline_and_delays_nobody(
    short_tmp: Path, pki: Pki
) -> None:
    """T5: neither silence after the acknowledgement nor half a hello holds anything up."""
    async with (
        serving_tls(short_tmp, pki, handshake_timeout_s=0.2) as served,
        haggling(served.path) as silent,
        haggling(served.path) as half,
    ):
        assert await silent.option(STARTTLS) == [(ACK, b"")]
        assert await half.option(STARTTLS) == [(ACK, b"")]
        await half.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")
        async with asyncio.timeout(5):
            assert await still_serves(served, pki)
            assert await silent.receive_to_end() == b""
            await half.receive_to_end()


async def test_disc_is_followed_by_a_proper_end_of_tls(short_tmp: Path, pki: Pki) -> None:
    """T6: close_notify comes before the end, and behind the last reply."""
    async with serving_tls(short_tmp, pki) as served, over_tls(served, pki) as client:
        assert isinstance(client.line, TlsLine)
        await client.go()
        await client.send(request(READ, 0, 256 * KiB) + request(DISC))
        assert (await client.simple(256 * KiB))[2] == pattern(256 * KiB)
        assert await client.receive_to_end() == b""
        assert client.line.ended_properly


async def test_client_that_leaves_without_close_notify_after_disc_is_no_error(
    short_tmp: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_tls(short_tmp, pki) as served:
        async with over_tls(served, pki) as client:
            await client.go()
            await client.send(request(DISC))
        assert await still_serves(served, pki)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_shutdown_ends_tls_properly(short_tmp: Path, pki: Pki) -> None:
    async with serving_tls(short_tmp, pki) as served, over_tls(served, pki) as client:
        assert isinstance(client.line, TlsLine)
        await client.go()
        async with asyncio.timeout(5):
            assert await served.server.shutdown(timeout_s=30) is True
            assert await client.receive_to_end() == b""
        assert client.line.ended_properly
