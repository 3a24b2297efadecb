"""How connections end when the server or an export goes, over a raw socket."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

from tests.support.nbd_server import pattern, serving
from tests.support.raw_nbd import (
    ABORT,
    ACK,
    EXPORT_NAME,
    GO,
    LIST,
    READ,
    SHUTDOWN,
    STRUCTURED,
    WRITE,
    haggling,
    info,
    option,
    request,
    transmitting,
)
from tests.support.waiting import until


async def test_who_haggles_hears_of_the_shutdown_and_may_abort(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await client.outcome(LIST) == ACK
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(served.server.shutdown(timeout_s=30))
            await until(lambda: not served.server.listeners)
            await asyncio.sleep(0)
            for number, data in ((LIST, b""), (STRUCTURED, b""), (GO, info(b"disk")), (77, b"x")):
                assert await client.outcome(number, data) == SHUTDOWN
            assert await client.option(ABORT) == [(ACK, b"")]
            assert await client.receive_to_end() == b""


async def test_export_name_during_the_shutdown_closes(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, haggling(served.path) as client:
        assert await client.outcome(LIST) == ACK
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(served.server.shutdown(timeout_s=30))
            await until(lambda: not served.server.listeners)
            await asyncio.sleep(0)
            await client.send(option(EXPORT_NAME, b"disk"))
            assert await client.receive_to_end() == b""


async def test_shutdown_answers_what_has_begun_and_closes(short_tmp: Path) -> None:
    """1.9: no ESHUTDOWN, which the Linux client takes for a bad disk: a close, which it repairs."""
    async with serving(short_tmp) as served, transmitting(served.path, structured=False) as client:
        served.disk.hold = {"write"}
        await client.send(request(WRITE, 0, 4, cookie=3) + b"abcd")
        await until(lambda: served.disk.waiting)
        async with asyncio.TaskGroup() as tasks:
            shutdown = tasks.create_task(served.server.shutdown(timeout_s=30))
            await until(lambda: not served.server.listeners)
            served.disk.held.set()
            assert await client.receive_to_end() == struct.pack(">IIQ", 0x67446698, 0, 3)
        assert shutdown.result() is True
        assert served.disk.data[:4] == b"abcd"


async def test_idle_client_is_closed_at_once(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, transmitting(served.path, structured=False) as client:
        await client.send(request(READ, 0, 4))
        assert await client.simple(4) == (0, 7, pattern(4))
        async with asyncio.timeout(5):
            assert await served.server.shutdown(timeout_s=30) is True
            assert await client.receive_to_end() == b""
