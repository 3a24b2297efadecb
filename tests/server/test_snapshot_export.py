"""A point in time over the wire: what clients are told when it cannot be read, trimmed, written.

T-C1, T-C2, T-C4, T-C7, T-F4 and T-N12 of the fleecing document, seen by an NBD client.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.block.bitmap import DirtyBitmap
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.server.export import ExportOptions
from tests.support.fleecing import add_access, add_filter
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import NbdClient
from tests.support.nbd_server import Served, serving

KIB, MIB = 1024, 1 << 20


@dataclass
class Setup:
    """`live` and `snap` exports over one disk of the letter a."""

    served: Served
    driver: CopyBeforeWrite
    temp: MemoryDriver

    async def client(self, name: str, *, structured: bool = True) -> NbdClient:
        client = await self.served.open()
        await client.connect(name, structured=structured)
        return client


async def set_up(served: Served, driver: CopyBeforeWrite) -> Setup:
    source = await served.add_node(MemoryDriver(bytearray(b"a" * MIB)))
    temp = MemoryDriver(bytearray(MIB), new=True)
    cbw = await add_filter(served.graph, source, await served.add_node(temp), driver)
    access = await add_access(served.graph, cbw)
    served.exports.add(cbw, ExportOptions("live", "live", writable=True, description=""))
    served.exports.add(access, ExportOptions("snap", "snap", writable=True, description=""))
    return Setup(served, driver, temp)


@pytest.fixture
async def served(short_tmp: Path) -> AsyncIterator[Served]:
    async with serving(short_tmp) as one:
        yield one


both = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


@both
async def test_a_broken_snapshot_is_eio_for_every_request_and_the_guest_goes_on(
    served: Served, structured: bool
) -> None:
    setup = await set_up(served, CopyBeforeWrite(on_cbw_error=OnCbwError.BREAK_SNAPSHOT))
    live, snap = await setup.client("live"), await setup.client("snap", structured=structured)
    assert await snap.read(0, 10) == b"a" * 10
    setup.temp.fail["write"] = errno.ENOSPC
    await live.write(0, b"b" * 4096)
    for _ in range(2):
        assert await snap.error_of(c.NBD_CMD_READ, 0, 4096) == c.NBD_EIO
        assert await snap.error_of(c.NBD_CMD_READ, MIB - 1, 1) == c.NBD_EIO
        assert await snap.error_of(c.NBD_CMD_CACHE, 0, 4096) == c.NBD_EIO
        if structured:
            assert await snap.error_of(c.NBD_CMD_BLOCK_STATUS, 0, MIB) == c.NBD_EIO
            reply = await snap.ask(c.NBD_CMD_READ, 0, 4096)
            assert "the snapshot is broken" in reply.text
    assert await live.read(0, 4096) == b"b" * 4096
    await live.write(8192, b"c" * 4096)
    await live.disconnect()
    await snap.disconnect()


async def test_a_failed_copy_under_break_guest_write_is_the_guests_error(served: Served) -> None:
    setup = await set_up(served, CopyBeforeWrite())
    live, snap = await setup.client("live"), await setup.client("snap")
    setup.temp.fail["write"] = errno.ENOSPC
    assert await live.error_of(c.NBD_CMD_WRITE, 0, 512, data=b"b" * 512) == c.NBD_ENOSPC
    assert await snap.read(0, MIB) == b"a" * MIB
    setup.temp.fail.clear()
    await live.write(0, b"b" * 512)
    assert await snap.read(0, MIB) == b"a" * MIB
    await live.disconnect()
    await snap.disconnect()


async def test_a_timeout_is_einval_for_the_guest_as_with_qemu(served: Served) -> None:
    setup = await set_up(served, CopyBeforeWrite(cbw_timeout_s=0.02))
    live = await setup.client("live")
    setup.temp.hold.add("write")
    assert await live.error_of(c.NBD_CMD_WRITE, 0, 512, data=b"b" * 512) == c.NBD_EINVAL
    setup.temp.held.set()
    await live.disconnect()


@both
async def test_what_lies_outside_the_bitmap_is_einval(served: Served, structured: bool) -> None:
    """T-F4: qemu-io prints "Invalid argument"."""
    bitmap = DirtyBitmap("b", size=MIB, granularity=64 * KIB, enabled=True)
    bitmap.set(0, 64 * KIB)
    setup = await set_up(served, CopyBeforeWrite(bitmap=bitmap))
    snap = await setup.client("snap", structured=structured)
    assert await snap.read(0, 64 * KIB) == b"a" * 64 * KIB
    assert await snap.error_of(c.NBD_CMD_READ, 64 * KIB - 1, 2) == c.NBD_EINVAL
    assert await snap.error_of(c.NBD_CMD_CACHE, 64 * KIB, 512) == c.NBD_EINVAL
    await snap.disconnect()


async def test_a_partial_trim_of_the_snapshot_takes_whole_clusters_and_harms_nothing(
    served: Served,
) -> None:
    """T-C7 and T-N12: this aborts the daemon of QEMU 7.2."""
    setup = await set_up(served, CopyBeforeWrite(min_cluster_size=64 * KIB))
    snap = await setup.client("snap")
    await snap.trim(512, 4096)
    await snap.trim(1, 1)
    assert await snap.read(0, MIB) == b"a" * MIB
    await snap.trim(64 * KIB - 512, 128 * KIB)
    assert await snap.read(0, 64 * KIB) == b"a" * 64 * KIB
    assert await snap.read(128 * KIB, 64 * KIB) == b"a" * 64 * KIB
    assert await snap.error_of(c.NBD_CMD_READ, 64 * KIB, 512) == c.NBD_EINVAL
    await snap.disconnect()


async def test_a_writable_snapshot_export_takes_no_writes(served: Served) -> None:
    setup = await set_up(served, CopyBeforeWrite())
    snap, live = await setup.client("snap"), await setup.client("live")
    assert await snap.error_of(c.NBD_CMD_WRITE, 0, 512, data=b"x" * 512) != 0
    assert await snap.error_of(c.NBD_CMD_WRITE_ZEROES, 0, 512) != 0
    await snap.flush()
    assert await snap.read(0, MIB) == await live.read(0, MIB) == b"a" * MIB
    await snap.disconnect()
    await live.disconnect()


async def test_an_export_with_a_refusal_is_listed_and_not_opened(served: Served) -> None:
    served.exports.get("disk").refusal = "the snapshot is broken: No space left on device"
    client = await served.open()
    with pytest.raises(OptionRefused, match="is broken"):
        await client.connect("disk")
    await client.close()
    assert "disk" in [info.name for info in served.exports.list()]
