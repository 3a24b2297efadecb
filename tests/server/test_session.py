"""One client at a time against a real server: handshake, transmission, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_DRAINED_PAYLOAD, MAX_OPTION_LENGTH, MAX_OPTIONS, MAX_PAYLOAD
from nbdfleece.base.units import KiB, MiB
from nbdfleece.datapath.stream import Stream
from nbdfleece.protocol.nbd import client as talks
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.handshake import GREETING
from nbdfleece.server import session as session_module
from nbdfleece.server.export import WRITABLE_FLAGS
from nbdfleece.server.exports import Exports
from nbdfleece.server.options import ServerOptions
from nbdfleece.server.tokens import Tokens
from tests.support.nbd_client import NbdClient, RequestFailed, connected
from tests.support.nbd_server import Served, pattern, serving
from tests.support.waiting import until

FLAGS = wire.CLIENT_FLAGS.pack(c.NBD_FLAG_C_FIXED_NEWSTYLE | c.NBD_FLAG_C_NO_ZEROES)
GO_DISK = wire.option(c.NBD_OPT_GO, wire.info_request(b"disk", []))
READ_4 = wire.request(c.NBD_CMD_READ, flags=0, cookie=7, offset=0, length=4)
DISC = wire.request(c.NBD_CMD_DISC, flags=0, cookie=0, offset=0, length=0)


async def greeted(served: Served, client_flags: bytes = FLAGS) -> NbdClient:
    client = await served.open()
    assert await client.receive(len(GREETING)) == GREETING
    await client.send(client_flags)
    return client


async def sessions_end(served: Served) -> None:
    """Return when the server has forgotten all clients."""
    await until(lambda: not served.server.sessions)


async def still_serves(served: Served) -> bool:
    async with connected(served.path) as client:
        return await client.read(0, 16) == pattern(16)


# --- handshake -------------------------------------------------------------------------------


async def test_everything_may_be_asked_on_one_connection(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        client = await served.open()
        await client.run(talks.greet(no_zeroes=True))

        assert await client.run(talks.list_exports()) == [("disk", "a disk"), ("frozen", "")]
        assert await client.run(talks.list_meta_context("disk", [])) == [
            "base:allocation",
            "qemu:allocation-depth",
        ]
        assert await client.run(talks.structured_reply())
        export = await client.run(talks.info("disk"))
        assert (export.size, export.name) == (MiB, "disk")
        assert export.flags == WRITABLE_FLAGS | c.NBD_FLAG_SEND_DF
        with pytest.raises(OptionRefused):
            await client.run(talks.go("unknown"))
        assert await client.run(talks.go("disk")) == export

        client.begin_transmission(export, structured=True)
        assert await client.read(4, 4) == pattern(8)[4:]
        await client.close()


@pytest.mark.parametrize("no_zeroes", [True, False])
async def test_export_name_with_and_without_zeroes(short_tmp: Path, no_zeroes: bool) -> None:
    """Xen Orchestra's client: EXPORT_NAME, 124 zeroes, simple replies."""
    async with serving(short_tmp) as served:
        client = await served.open()
        agreed = await client.run(talks.greet(no_zeroes=no_zeroes))
        export = await client.run(talks.export_name("frozen", no_zeroes=agreed))
        client.begin_transmission(export, structured=False)

        assert await client.read(0, 8) == pattern(8)
        assert not export.flags & c.NBD_FLAG_SEND_DF
        await client.disconnect()


@pytest.mark.parametrize(
    ("option", "reply"),
    [
        (wire.option(77, b"x" * 100), c.NBD_REP_ERR_UNSUP),
        (wire.option(c.NBD_OPT_STARTTLS), c.NBD_REP_ERR_POLICY),
        (wire.option(c.NBD_OPT_LIST, b"x"), c.NBD_REP_ERR_INVALID),
        (wire.option(c.NBD_OPT_GO, b"x"), c.NBD_REP_ERR_INVALID),
        (wire.option(c.NBD_OPT_GO, wire.info_request(b"no", [])), c.NBD_REP_ERR_UNKNOWN),
        (wire.option(77, bytes(MAX_OPTION_LENGTH)), c.NBD_REP_ERR_UNSUP),
    ],
    ids=["unknown", "starttls", "list data", "bad go", "no export", "8 MiB"],
)
async def test_refused_option_leaves_the_client_haggling(
    short_tmp: Path, option: bytes, reply: int
) -> None:
    async with serving(short_tmp) as served:
        client = await greeted(served)
        await client.send(option)
        header = await client.receive(wire.OPTION_REPLY_HEADER.size)
        _, _, kind, length = wire.OPTION_REPLY_HEADER.unpack(header)
        await client.receive(length)

        assert kind == reply
        assert (await client.run(talks.go("disk"))).size == MiB
        await client.close()


async def test_others_get_their_turn_between_options_that_come_at_once(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(short_tmp) as served:
        client = await greeted(served)
        loop, turn, asked = asyncio.get_running_loop(), 0, []

        def tick() -> None:
            nonlocal turn
            turn += 1
            if len(asked) < 100:
                loop.call_soon(tick)

        def listed(exports: Exports) -> list[object]:
            asked.append(turn)
            return []

        monkeypatch.setattr(Exports, "list", listed)
        await client.send(wire.option(c.NBD_OPT_LIST) * 100)
        tick()
        await until(lambda: len(asked) == 100)
        assert len(set(asked)) == 100
        await client.close()


async def test_options_that_do_not_end_are_no_way_round_the_time_limit(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, at, received = wire.option(77, bytes(MAX_OPTION_LENGTH)), 0, 0

    async def endless(_stream: Stream, limit: int) -> bytes:
        """A client that is faster than we are has always sent more."""
        nonlocal at, received
        data = option[at : at + limit]
        at = (at + limit) % len(option) if len(data) == limit else 0
        received += len(data)
        return data

    async with serving(short_tmp, options=ServerOptions(handshake_timeout_s=0.05)) as served:
        client = await greeted(served)
        monkeypatch.setattr(session_module, "receive", endless)
        await client.send(wire.option(77))  # what is being waited for
        await sessions_end(served)
        assert received < MAX_OPTIONS * len(option) // 2
        await client.close()


@pytest.mark.parametrize(
    "sent",
    [
        wire.CLIENT_FLAGS.pack(1 << 31 | 1),
        wire.CLIENT_FLAGS.pack(0) + wire.option(c.NBD_OPT_LIST),
        FLAGS + bytes(16),
        FLAGS + wire.option(c.NBD_OPT_EXPORT_NAME, b"unknown"),
        FLAGS + wire.OPTION_HEADER.pack(c.IHAVEOPT, c.NBD_OPT_LIST, 0xFFFFFFFF),
        FLAGS + wire.OPTION_HEADER.pack(c.IHAVEOPT, c.NBD_OPT_EXPORT_NAME, 4097),
    ],
    ids=["client flags", "not fixed", "option magic", "export name", "4 GiB", "long name"],
)
async def test_violation_closes_the_connection_and_is_logged(
    short_tmp: Path, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_tmp) as served:
        client = await served.open()
        await client.receive(len(GREETING))
        await client.send(sent)

        assert await client.receive_to_end() == b""
        await client.close()
        await sessions_end(served)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert await still_serves(served)


async def test_port_probe_is_quiet(short_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(short_tmp) as served:
        caplog.clear()
        for wait_for_greeting in (True, False):
            client = await served.open()
            if wait_for_greeting:
                await client.receive(len(GREETING))
            await client.close()
            await asyncio.sleep(0)
            await sessions_end(served)

        assert caplog.records == []


async def test_abort_is_acknowledged_and_closed_quietly(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_tmp) as served:
        client = await greeted(served)
        await client.run(talks.abort())

        assert await client.receive_to_end() == b""
        await client.close()
        assert caplog.records == []


async def test_disconnect_at_each_byte_of_the_handshake(short_tmp: Path) -> None:
    """CVE-2011-1925, CVE-2013-7441: it may end this client's session and nothing else."""
    sent = FLAGS + wire.option(c.NBD_OPT_LIST) + GO_DISK + READ_4
    async with serving(short_tmp) as served:
        for count in range(len(sent) + 1):
            for end in (NbdClient.close, NbdClient.half_close):
                client = await served.open()
                await client.send(sent[:count])
                if end is NbdClient.half_close:
                    client.half_close()
                    await client.receive_to_end()
                await client.close()
        await sessions_end(served)

        assert await still_serves(served)
        await sessions_end(served)
        assert not any(export.is_used for export in served.exports)


async def test_handshake_has_a_deadline(short_tmp: Path) -> None:
    options = ServerOptions(handshake_timeout_s=0.05)
    async with serving(short_tmp, options=options) as served:
        silent, slow = await served.open(), await greeted(served)
        await slow.send(wire.option(c.NBD_OPT_LIST)[:5])

        assert await silent.receive_to_end() == GREETING
        assert await slow.receive_to_end() == b""
        await silent.close()
        await slow.close()


async def test_deadline_is_of_the_handshake_alone(short_tmp: Path) -> None:
    options = ServerOptions(handshake_timeout_s=0.05)
    async with serving(short_tmp, options=options) as served, connected(served.path) as client:
        await asyncio.sleep(0.1)

        assert await client.read(0, 4) == pattern(4)


async def test_deadline_counts_for_a_client_that_reads_no_answers(short_tmp: Path) -> None:
    options = ServerOptions(handshake_timeout_s=0.1, max_connections=1)
    async with serving(short_tmp, options=options) as served:
        for number in range(50):
            await served.add(f"export {number}", b"x", description="d" * 4096)
        client = await greeted(served)
        await client.send(wire.option(c.NBD_OPT_LIST) * 100)  # 20 MB of answers

        await sessions_end(served)
        await client.close()


async def test_no_deadline_when_it_is_zero(short_tmp: Path) -> None:
    async with serving(short_tmp, options=ServerOptions(handshake_timeout_s=0)) as served:
        client = await greeted(served)
        await asyncio.sleep(0.05)

        assert await client.run(talks.list_exports())
        await client.close()


async def test_export_that_goes_while_the_client_is_told_of_it(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_all = session_module.send_all
    async with serving(short_tmp) as served:
        client = await greeted(served)
        export = served.exports.get("disk")

        async def closing(stream: Stream, data: bytes) -> None:
            await send_all(stream, data)
            if export.holders:
                export.is_closing = export.is_cut_off = True

        monkeypatch.setattr(session_module, "send_all", closing)
        await client.send(GO_DISK)
        await client.receive_to_end()

        await client.close()
        await sessions_end(served)
        assert not export.is_used


# --- transmission ----------------------------------------------------------------------------


async def test_requests_sent_with_the_last_option_are_carried_out(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        client = await greeted(served)
        await client.send(GO_DISK + READ_4 * 3 + DISC)

        received = await client.receive_to_end()
        assert received.endswith((wire.simple_reply(0, 7) + pattern(4)) * 3)
        await client.close()


@pytest.mark.parametrize("structured", [True, False])
async def test_all_commands(short_tmp: Path, structured: bool) -> None:
    async with (
        serving(short_tmp) as served,
        connected(served.path, structured=structured) as client,
    ):
        expected = bytearray(pattern(MiB))
        await client.write(1000, b"x" * 5000, flags=c.NBD_CMD_FLAG_FUA)
        expected[1000:6000] = b"x" * 5000
        await client.zero(20000, 30000, flags=c.NBD_CMD_FLAG_NO_HOLE)
        expected[20000:50000] = bytes(30000)
        await client.trim(100 * KiB, 10 * KiB)
        await client.flush()
        assert await client.error_of(c.NBD_CMD_CACHE, 0, MiB) == 0
        expected[100 * KiB : 110 * KiB] = served.disk.data[100 * KiB : 110 * KiB]

        assert served.disk.data == expected
        assert await client.read(0, MiB) == expected
        assert await client.read(MiB, 0) == b""
        if structured:
            assert sum(length for length, _ in await client.status(0, MiB)) == MiB
        else:
            assert await client.error_of(c.NBD_CMD_BLOCK_STATUS, 0, MiB) == c.NBD_EINVAL
        await client.disconnect()


@pytest.mark.parametrize("structured", [True, False])
async def test_read_only_export_refuses_to_be_changed(short_tmp: Path, structured: bool) -> None:
    async with (
        serving(short_tmp) as served,
        connected(served.path, "frozen", structured=structured) as client,
    ):
        assert await client.error_of(c.NBD_CMD_WRITE, 0, 4, data=b"evil") == c.NBD_EPERM
        assert await client.error_of(c.NBD_CMD_TRIM, 0, 4) == c.NBD_EPERM
        assert await client.error_of(c.NBD_CMD_WRITE_ZEROES, 0, 4) == c.NBD_EPERM
        await client.flush()

        assert await client.read(0, MiB) == pattern(MiB)


@pytest.mark.parametrize("structured", [True, False])
async def test_requests_out_of_range(short_tmp: Path, structured: bool) -> None:
    async with (
        serving(short_tmp) as served,
        connected(served.path, structured=structured) as client,
    ):
        assert await client.error_of(c.NBD_CMD_READ, MiB, 1) == c.NBD_EINVAL
        assert await client.error_of(c.NBD_CMD_WRITE, MiB - 1, 2, data=b"ab") == c.NBD_ENOSPC
        assert await client.error_of(c.NBD_CMD_TRIM, (1 << 64) - 1, 1) == c.NBD_EINVAL
        assert await client.error_of(c.NBD_CMD_WRITE_ZEROES, 0, MiB + 1) == c.NBD_ENOSPC
        assert await client.error_of(c.NBD_CMD_RESIZE, 0, 0) == c.NBD_EINVAL
        assert await client.error_of(c.NBD_CMD_READ, 0, 4, flags=1 << 15) == c.NBD_EINVAL

        assert await client.read(0, 4) == pattern(4)


@pytest.mark.parametrize("size", [MAX_PAYLOAD, MAX_PAYLOAD + 1, MAX_DRAINED_PAYLOAD])
async def test_cve_2005_3534_largest_payloads(short_tmp: Path, size: int) -> None:
    """Nbd-server: the length check forgot the header that shared the buffer."""
    async with serving(short_tmp) as served:
        big = await served.add("big", bytes(MAX_DRAINED_PAYLOAD))
        async with connected(served.path, "big", structured=False) as client:
            expected = 0 if size <= MAX_PAYLOAD else c.NBD_EINVAL
            data = b"x" * size

            assert await client.error_of(c.NBD_CMD_READ, 0, size) == expected
            assert await client.error_of(c.NBD_CMD_WRITE, 0, size, data=data) == expected
            written = data if expected == 0 else b""
            content = served.drivers["big"].data
            assert content == written + bytes(big.node.size - len(written))
            assert await client.read(0, 4) == content[:4]


async def test_refused_write_is_answered_behind_its_payload(short_tmp: Path) -> None:
    """Clients do not expect the reply to a request that they are still sending."""
    async with serving(short_tmp) as served, connected(served.path, "frozen") as client:
        reply = await client.submit(c.NBD_CMD_WRITE, 0, MiB, data=bytes(MiB - 1))
        await asyncio.sleep(0.05)
        assert not reply.done()

        await client.send(b"x")
        assert (await reply).error == c.NBD_EPERM
        assert await client.read(0, 4) == pattern(4)


@pytest.mark.parametrize("size", [MAX_DRAINED_PAYLOAD + 1, 0xFFFFFFFF])
async def test_write_that_is_too_long_to_drain_closes(short_tmp: Path, size: int) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        await client.submit(c.NBD_CMD_WRITE, 0, size)

        await client.wait_closed()
        assert served.disk.data == pattern(MiB)


async def test_structured_read_above_the_payload_cap_comes_in_chunks(short_tmp: Path) -> None:
    content = pattern(MiB) * (MAX_PAYLOAD // MiB + 1)
    async with serving(short_tmp) as served:
        await served.add("big", content)
        async with connected(served.path, "big") as client:
            reply = await client.ask(c.NBD_CMD_READ, 0, len(content))

        assert reply.data == content
        assert len(reply.chunks) > 1


async def test_bad_request_magic_closes(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        await client.send(bytes(28))

        await client.wait_closed()
        assert await still_serves(served)


async def test_half_close_is_answered_to_the_end(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        replies = [await client.submit(c.NBD_CMD_READ, 4 * i, 4) for i in range(30)]
        client.half_close()

        await client.wait_closed()
        data = b"".join(reply.result().data for reply in replies)
        assert data == pattern(120)


async def test_write_that_ends_inside_its_payload_writes_nothing(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        await client.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"x" * 4095)
        client.half_close()

        await client.wait_closed()
        assert served.disk.data == pattern(MiB)


async def test_failed_read_carries_no_paths_and_leaves_the_connection(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        served.disk.fail["read"] = 5
        with pytest.raises(RequestFailed) as caught:
            await client.read(0, 4)
        served.disk.fail.clear()

        assert caught.value.error == c.NBD_EIO
        assert "node" not in caught.value.reply.text
        assert await client.read(0, 4) == pattern(4)


# --- the line in the log -----------------------------------------------------------------------


async def test_each_connection_leaves_one_line(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(short_tmp) as served:
        caplog.clear()
        lister = await greeted(served)
        await lister.run(talks.list_exports())
        await lister.close()
        await sessions_end(served)
        async with connected(served.path) as client:
            await client.read(0, 4096)
            await client.disconnect()
        await sessions_end(served)
        async with connected(served.path) as client:
            (session,) = served.server.sessions.values()
            session.abort("kicked")
            await client.wait_closed()
        async with connected(served.path) as client:
            await client.write(0, b"abcd")
            await served.server.shutdown(timeout_s=5)
            await client.wait_closed()
        await sessions_end(served)
    lines = [record.message for record in caplog.records if " ends: " in record.message]
    assert [line.partition(" how=")[2] for line in lines] == [
        '"client left during the handshake"',
        '"disconnects"',
        '"kicked"',
        '"the server shuts down"',
    ]
    assert 'export="disk" read=4096 written=0 requests=1' in lines[1]
    assert 'export="disk" read=0 written=4 requests=1' in lines[3]


async def test_tokens_are_not_in_the_log(short_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither right nor wrong ones, however they are asked for."""
    caplog.set_level(logging.DEBUG)
    tokens = Tokens(lambda: 0.0)
    async with serving(short_tmp, tokens=tokens) as served:
        await served.add("vda@one", pattern(4096), writable=False)
        name = tokens.add("vda@one", 60.0)
        async with connected(served.path, name) as client:
            assert await client.read(0, 4) == pattern(4)
        wrong = await greeted(served)
        with pytest.raises(OptionRefused):
            await wrong.run(talks.go(name + "x"))
        await wrong.send(wire.option(c.NBD_OPT_EXPORT_NAME, (name + "y").encode()))
        assert await wrong.receive_to_end() == b""
        await wrong.close()
        await sessions_end(served)
    assert 'export="vda@one"' in caplog.text
    assert name.partition(":")[2] not in caplog.text
    assert "vda@one:***" in caplog.text
