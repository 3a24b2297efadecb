"""Options, over a raw socket: what the three common servers get right or wrong, one row each."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from nbdfleece.base.units import MiB
from tests.support.nbd_server import Served, pattern, serving
from tests.support.raw_nbd import (
    ABORT,
    ACK,
    EXPORT_NAME,
    EXTENDED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    OPT_INFO,
    PEEK,
    POLICY,
    SERVER,
    SET_META,
    STARTTLS,
    STRUCTURED,
    TLS_REQD,
    UNKNOWN,
    UNSUP,
    RawClient,
    export_info,
    haggling,
    info,
    meta,
    option,
)

GO_AND_INFO = pytest.mark.parametrize("number", [OPT_INFO, GO])


async def still_serves(served: Served) -> bool:
    async with haggling(served.path) as client:
        await client.go()
        return True


ROWS: dict[str, tuple[int, bytes, int]] = {
    "LIST with data": (LIST, b"x", INVALID),
    "LIST that looks like an option": (LIST, option(ABORT), INVALID),
    "STARTTLS without TLS": (STARTTLS, b"", POLICY),
    "STARTTLS with data": (STARTTLS, b"x", INVALID),
    "STRUCTURED_REPLY with data": (STRUCTURED, b"x", INVALID),
    "EXTENDED_HEADERS with data": (EXTENDED, b"x", INVALID),
    "PEEK_EXPORT": (PEEK, b"disk", UNSUP),
    "option 0": (0, b"", UNSUP),
    "unknown": (77, b"", UNSUP),
    "unknown with 1 MiB": (0xFFFFFFFF, bytes(MiB), UNSUP),
    "SET_META too early": (SET_META, meta(b"disk", b"base:allocation"), INVALID),
}
for _name, _number in (("INFO", OPT_INFO), ("GO", GO)):
    ROWS |= {
        f"{_name} empty": (_number, b"", INVALID),
        f"{_name} short": (_number, info(b"disk")[:-1], INVALID),
        f"{_name} name longer than the option": (
            _number, struct.pack(">I", 5) + b"disk" + bytes(2), INVALID,
        ),
        f"{_name} name length of 4 GiB": (_number, b"\xff" * 4 + b"disk" + bytes(2), INVALID),
        f"{_name} trailing byte": (_number, info(b"disk") + b"x", INVALID),
        f"{_name} fewer types than counted": (_number, info(b"disk", 1, 2)[:-2], INVALID),
        f"{_name} NUL": (_number, info(b"di\0sk"), INVALID),
        f"{_name} not UTF-8": (_number, info(b"\xff"), INVALID),
        f"{_name} name of 4097 bytes": (_number, info(b"x" * 4097), INVALID),
        f"{_name} name of 4096 bytes": (_number, info(b"x" * 4096), UNKNOWN),
        f"{_name} bad with 1 MiB": (_number, struct.pack(">I", 1 << 20) + bytes(MiB), INVALID),
        f"{_name} unknown": (_number, info(b"nowhere"), UNKNOWN),
        f"{_name} no default export": (_number, info(b""), UNKNOWN),
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
async def test_refused_option_and_the_next_one_parses(short_tmp: Path, row: str) -> None:
    number, data, expected = ROWS[row]
    async with serving(short_tmp) as served:
        await served.add("second", b"x")  # else the only export would be the default one
        async with haggling(served.path) as client:
            replies = await client.option(number, data)
            assert [kind for kind, _ in replies] == [expected]
            assert replies[0][1], "an error has a text"
            assert (await client.go())[0] == MiB


@pytest.mark.parametrize("length", [8 * MiB + 1, 40 * MiB, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [LIST, OPT_INFO, SET_META, 77])
async def test_claimed_length_beyond_every_option_closes_at_once(
    short_tmp: Path, number: int, length: int
) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.send(b"IHAVEOPT" + struct.pack(">II", number, length))
        assert await client.receive_to_end() == b""
        assert await still_serves(served)


async def test_abort_is_acknowledged_whatever_data_it_has(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        for data in (b"", b"x", bytes(MiB)):
            async with haggling(served.path) as client:
                assert await client.option(ABORT, data) == [(ACK, b"")]
                assert await client.receive_to_end() == b""


async def test_abort_of_a_client_that_does_not_wait_for_the_ack(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(short_tmp) as served:
        for _ in range(20):
            client = await RawClient.open(served.path)
            await client.send(option(ABORT))
            client.line.reset()
            await client.line.close()
        assert await still_serves(served)
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


async def test_list_tells_each_export_with_its_description(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        replies = await client.option(LIST)
        assert replies == [
            (SERVER, struct.pack(">I", 4) + b"disk" + b"a disk"),
            (SERVER, struct.pack(">I", 6) + b"frozen"),
            (ACK, b""),
        ]
        assert await client.option(LIST) == replies


@GO_AND_INFO
async def test_information_is_whole_and_comes_once(short_tmp: Path, number: int) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        replies = await client.option(number, info(b"disk", 1, 2, 3, 1, 0, 77, 0xFFFF, 3))
        kinds = [struct.unpack_from(">H", data)[0] for kind, data in replies if kind == INFO]
        by_kind = {struct.unpack_from(">H", data)[0]: data[2:] for _, data in replies[:-1]}
        assert sorted(kinds) == [0, 1, 2, 3]
        assert replies[-1] == (ACK, b"")
        assert (by_kind[1], by_kind[2]) == (b"disk", b"a disk")
        assert len(by_kind[3]) == 12
        minimum, preferred, maximum = struct.unpack(">III", by_kind[3])
        assert minimum == 1
        assert preferred >= max(minimum, 512)
        assert preferred & (preferred - 1) == 0
        assert maximum >= max(MiB, preferred)


async def test_block_sizes_are_told_to_who_does_not_ask(short_tmp: Path) -> None:
    """I7, and ovirt-imageio: it asks for nothing and uses what is told."""
    async with serving(short_tmp) as served, haggling(served.path) as client:
        replies = await client.option(GO, info(b"disk"))
        assert [data[:2] for _, data in replies[:-1]] == [b"\0\0", b"\0\3"]


@pytest.mark.parametrize("size", [1, 511, 512, 1048577])
async def test_size_is_told_to_the_byte_by_every_option(short_tmp: Path, size: int) -> None:
    async with serving(short_tmp) as served:
        await served.add("odd", b"x" * size)
        async with haggling(served.path) as client:
            assert export_info(await client.option(OPT_INFO, info(b"odd")))[0] == size
            assert (await client.go(b"odd"))[0] == size
        async with haggling(served.path) as client:
            await client.send(option(EXPORT_NAME, b"odd"))
            assert struct.unpack(">QH", await client.receive(10))[0] == size


async def test_info_and_go_tell_the_same(short_tmp: Path) -> None:
    """I6, in every state that changes the flags."""
    async with serving(short_tmp) as served:
        for agreed in ([], [STRUCTURED], [STRUCTURED, SET_META]):
            async with haggling(served.path) as client:
                for number in agreed:
                    data = meta(b"disk", b"base:allocation") if number == SET_META else b""
                    assert await client.outcome(number, data) == ACK
                told = await client.option(OPT_INFO, info(b"disk", 3))
                assert await client.option(GO, info(b"disk", 3)) == told


async def test_df_is_advertised_with_structured_replies_alone(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        _, before = export_info(await client.option(OPT_INFO, info(b"disk")))
        await client.option(STRUCTURED)
        _, after = export_info(await client.option(OPT_INFO, info(b"disk")))
        assert (before & 1 << 7, after & 1 << 7) == (0, 1 << 7)


async def test_failed_go_leaves_the_client_haggling(short_tmp: Path) -> None:
    """CVE-2019-14851: an unusual order of options."""
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await client.outcome(OPT_INFO, info(b"disk")) == ACK
        assert await client.outcome(OPT_INFO, info(b"frozen")) == ACK
        assert await client.outcome(LIST_META, meta(b"disk")) == ACK
        assert await client.outcome(GO, info(b"nowhere")) == UNKNOWN
        assert await client.outcome(GO, info(b"nowhere")) == UNKNOWN
        await client.go(b"frozen")
        await client.send(struct.pack(">IHHQQI", 0x25609513, 0, 0, 9, 0, 4))
        assert await client.simple(4) == (0, 9, pattern(4))


async def test_structured_replies_may_be_asked_for_twice(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await client.option(STRUCTURED) == [(ACK, b"")]
        assert await client.option(STRUCTURED) == [(ACK, b"")]


async def test_go_sends_no_zeroes(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path, client_flags=1) as client:
        await client.go()
        await client.send(struct.pack(">IHHQQI", 0x25609513, 0, 0, 9, 0, 4))
        assert await client.simple(4) == (0, 9, pattern(4))


@pytest.mark.parametrize("name", [b"nowhere", b"x" * 4096, b"di\0sk", b"\xff"])
async def test_export_name_that_cannot_be_met_closes(short_tmp: Path, name: bytes) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        await client.send(option(EXPORT_NAME, name))
        assert await client.receive_to_end() == b""
        assert await still_serves(served)


async def test_tls_is_never_asked_for_without_tls(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        for number in (LIST, STARTTLS, OPT_INFO, GO, STRUCTURED, LIST_META, SET_META, 77):
            assert await client.outcome(number, info(b"nowhere")) != TLS_REQD


async def test_cve_2020_10761_error_texts_are_short_and_clean(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        await served.add("second", b"x")
        async with haggling(served.path) as client:
            for name in (b"x" * 4096, b"\x1b[2J\r\n\x07" * 100, "\u202e".encode() * 1000):
                for number, data in ((GO, info(name)), (LIST_META, meta(name))):
                    ((kind, text),) = await client.option(number, data)
                    assert kind == UNKNOWN
                    assert len(text) < 1000
                    assert text.decode().isprintable()


async def test_whole_option_is_read_before_it_is_answered(short_tmp: Path) -> None:
    """H9: a client that sends queries and reads nothing meanwhile is not answered into."""
    async with serving(short_tmp) as served, haggling(served.path) as client:
        queries = [b"base:allocation"] * 1024
        sent = option(LIST_META, meta(b"disk", *queries))
        await client.send(sent[:-1])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.receive(1)
        await client.send(sent[-1:])
        assert len(await client.replies(LIST_META)) == 2


async def test_cve_2019_14850_no_export_is_used_before_go(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        for number, data in (
            (LIST, b""), (STRUCTURED, b""), (OPT_INFO, info(b"disk", 3)),
            (LIST_META, meta(b"disk")), (SET_META, meta(b"disk", b"base:allocation")),
        ):  # fmt: skip
            assert await client.outcome(number, data) == ACK
        assert not any(export.is_used for export in served.exports)
        assert not served.disk.waiting
