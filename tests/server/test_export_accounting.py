"""Accounting of an export: in the way of its requests while it is on, and only then."""

from __future__ import annotations

import errno
from pathlib import Path

from nbdfleece.block.accounting import Accounting
from nbdfleece.protocol.nbd import constants as c
from tests.support.nbd_client import connected
from tests.support.nbd_server import Served, pattern, serving


def counted(accounting: Accounting) -> dict[str, object]:
    """What is not zero, without times and flags."""
    found = accounting.stats().items()
    return {
        name: value for name, value in found if value and not name.endswith(("_ns", "t_failed"))
    }


def is_direct(served: Served) -> bool:
    """Tell whether connections go to the node itself, and cached reads to its driver."""
    export = served.exports.get("disk")
    return all(
        pump.route.io is export.node
        and pump.route.read_now == served.disk.read_now
        and pump.route.refused is None
        for pump in export.pumps
    )


async def test_nothing_is_in_the_way_until_accounting_is_on_and_after_it_is_off(
    short_tmp: Path,
) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        export = served.exports.get("disk")
        assert is_direct(served)
        accounting = Accounting()
        accounting.account_invalid = False
        export.account(accounting)
        assert not is_direct(served)
        assert await client.read(0, 512) == pattern(512)
        assert counted(accounting) == {"rd_operations": 1, "rd_bytes": 512}
        async with connected(served.path) as late:
            await late.write(0, b"late")
        assert accounting.stats()["wr_bytes"] == 4

        export.account(None)

        assert is_direct(served)
        await client.read(0, 512)
        assert accounting.stats()["rd_operations"] == 1


async def test_failed_and_refused_requests_are_told_apart(short_tmp: Path) -> None:
    async with serving(short_tmp, size=4096) as served, connected(served.path) as client:
        accounting = Accounting()
        accounting.account_invalid = False
        served.exports.get("disk").account(accounting)
        served.disk.fail["read"] = errno.EIO
        assert (await (await client.submit(c.NBD_CMD_READ, 0, 512))).error == c.NBD_EIO
        for command in (c.NBD_CMD_READ, c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES, 77):
            assert (await (await client.submit(command, 4096, 512))).error != 0
        reply = await client.submit(c.NBD_CMD_WRITE, 4096, 3, data=b"abc")
        assert (await reply).error == c.NBD_ENOSPC

        assert counted(accounting) == {
            "failed_rd_operations": 1,
            "invalid_rd_operations": 1,
            "invalid_wr_operations": 2,
            "invalid_unmap_operations": 1,
        }


async def test_accounting_of_the_node_is_taken_up(short_tmp: Path) -> None:
    """Cached reads go past the node itself, so the export has to be told."""
    async with serving(short_tmp) as served, connected(served.path) as client:
        export = served.exports.get("disk")
        accounting = Accounting()
        export.node.account(accounting)
        export.renew_routes()
        await client.read(0, 512)
        await client.write(0, b"x")
        await client.flush()
        assert accounting.stats()["rd_operations"] == 1
        assert accounting.stats()["wr_operations"] == 1
        assert accounting.stats()["flush_operations"] == 1
        export.node.account(None)
        export.renew_routes()
        assert is_direct(served)
