"""Past defects of NBD servers that no other test holds off by name; the list is practice.toml."""

from __future__ import annotations

import ast
import asyncio
import struct
from pathlib import Path

import pytest

import nbdfleece
from nbdfleece.base.units import KiB, MiB
from tests.support.nbd_server import Served, pattern, serving
from tests.support.raw_nbd import (
    ACK,
    FIXED,
    LIST,
    NO_ZEROES,
    READ,
    RawClient,
    haggling,
    option,
    request,
    transmitting,
)

PACKAGE = Path(nbdfleece.__file__).parent


async def still_serves(served: Served) -> bool:
    async with transmitting(served.path, structured=False) as client:
        await client.send(request(READ, 0, 16))
        return await client.simple(16) == (0, 7, pattern(16))


def test_cve_2015_0847_signals_are_handled_between_two_turns_of_the_loop() -> None:
    """Nbd-server: handlers called what is not re-entrant. Here no handler runs between any two
    lines: nothing but the loop's own mechanism is used. Commands and the guard of hooks are
    processes of their own, which serve nobody."""
    apart = {PACKAGE / "backup/guard.py", *(PACKAGE / "cli").rglob("*.py")}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in set(PACKAGE.rglob("*.py")) - apart
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "signal"
        and node.attr in ("signal", "siginterrupt", "set_wakeup_fd", "setitimer", "alarm")
    ]
    assert found == []


async def test_cve_2017_9524_client_that_says_nothing(short_tmp: Path) -> None:
    """Qemu-nbd <= 2.9: talked to a client before it was set up; a silent one crashed it."""
    async with serving(short_tmp) as served:
        silent = [await RawClient.open(served.path, client_flags=None) for _ in range(10)]
        for _ in range(50):
            client = await RawClient.open(served.path, client_flags=None)
            await client.line.close()
        assert await still_serves(served)
        for client in silent:
            await client.line.close()


async def test_cve_2017_7539_any_first_bytes(short_tmp: Path, rng) -> None:
    """Qemu-nbd < 2.10.1: unexpected data in negotiation hit an assertion."""
    async with serving(short_tmp) as served:
        for number in range(200):
            client = await RawClient.open(served.path, client_flags=None)
            flags = struct.pack(">I", FIXED | NO_ZEROES) if number % 2 else b""
            await client.send(flags + rng.randbytes(64))
            client.line.half_close()
            await client.receive_to_end()
            await client.line.close()
        assert await still_serves(served)


async def test_cve_2017_15119_a_huge_claim_costs_nobody_else_anything(short_tmp: Path) -> None:
    """Qemu < 2.11: an option of 4 GiB was read to its end, and starved the others."""
    async with serving(short_tmp) as served, transmitting(served.path, structured=False) as other:
        client = await RawClient.open(served.path)
        await client.send(b"IHAVEOPT" + struct.pack(">II", LIST, 0xFFFFFFFF))
        assert await client.receive_to_end() == b""
        await client.line.close()
        await other.send(request(READ, 0, 16))
        assert (await other.simple(16))[2] == pattern(16)


@pytest.mark.parametrize("size", [255, 256, 257, 4095, 4096])
async def test_cve_2017_15118_names_around_every_buffer(short_tmp: Path, size: int) -> None:
    """Qemu 2.10: names of up to 4096 bytes were copied into 256."""
    name = "n" * size
    async with serving(short_tmp) as served:
        await served.add(name, pattern(MiB))
        async with transmitting(served.path, name.encode(), structured=False) as client:
            await client.send(request(READ, 0, 16))
            assert (await client.simple(16))[2] == pattern(16)
        async with haggling(served.path) as client:
            assert await client.outcome(LIST) == ACK


async def test_nbdkit_1_34_replies_of_a_client_that_hung_up_reach_nobody(short_tmp: Path) -> None:
    """Nbdkit: an assertion, and a window in which replies went to another client's socket."""
    async with serving(short_tmp) as served:
        for _ in range(10):
            async with transmitting(served.path, structured=False) as client:
                await client.send(request(READ, 0, 256 * KiB, cookie=1) * 64)
                client.line.reset()
            async with transmitting(served.path, structured=False) as other:
                await other.send(request(READ, 512, 16, cookie=2))
                async with asyncio.timeout(5):
                    assert await other.simple(16) == (0, 2, pattern(528)[512:])


async def test_cve_2013_7441_reset_in_the_middle_of_an_answer(short_tmp: Path) -> None:
    """Nbd-server < 3.4: negotiation ran in the root process, and SIGPIPE ended it."""
    async with serving(short_tmp) as served:
        for number in range(60):
            await served.add(f"export {number}", b"x", description="d" * 4096)
        for _ in range(20):
            client = await RawClient.open(served.path)
            await client.send(option(LIST) * 50)
            client.line.reset()
            await client.line.close()
        assert await still_serves(served)
