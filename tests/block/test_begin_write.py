"""Writes that are one system call (Node.begin_write): where there are any, and how they end."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.block.accounting import Accounting
from nbdfleece.block.bitmap import new_bitmap
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.drivers.qcow2.driver import Qcow2Driver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.formats.qcow2.create import NewImage
from tests.block.test_qcow2_driver import qcow2_node
from tests.block.test_raw_driver import raw_over
from tests.support.driver_kit import file_node, read, remove_all
from tests.support.fleecing import (
    add_access,
    add_filter,
    add_plain,
    file_driver,
    read_all,
    temp_driver,
)
from tests.support.qcow2 import check_qcow2, make_qcow2
from tests.support.waiting import turns

MiB = 1 << 20
CLUSTER = 65536


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


def begin(node: Node, offset: int, data: bytes) -> asyncio.Future[None] | None:
    """Begin a write; None where it is not of this kind."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(error: BaseException | None) -> None:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    return future if node.begin_write(offset, memoryview(bytearray(data)), None, ended) else None


async def written(node: Node, offset: int, data: bytes) -> bool:
    """Write in this way and see that it is there; False where there is no such way."""
    future = begin(node, offset, data)
    if future is None:
        assert node.in_flight == 0
        return False
    assert node.in_flight == 1
    await future
    assert node.in_flight == 0
    assert await read(node, offset, len(data)) == data
    return True


async def test_a_file_and_a_window_of_it(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "image"
    below = await file_node(graph, path, MiB)
    assert await written(below, 100, b"file")
    window = await raw_over(graph, below, offset=1001, size=50_000)
    assert await written(window, 7, b"window")
    assert path.read_bytes()[1008:1014] == b"window"


async def test_where_something_else_is_to_be_done_there_is_no_such_write(
    graph: Graph, tmp_path: Path
) -> None:
    below = await file_node(graph, tmp_path / "image", MiB)
    node = await raw_over(graph, below)
    for each in (below, node):  # the node itself, and the one above it
        each.write_threshold = 1000
        assert not await written(node, 0, b"x")
        each.write_threshold = 0
        each.account(Accounting())
        assert not await written(node, 0, b"x")
        each.account(None)
    below.bitmaps["b"] = new_bitmap(below, "b", 4096, enabled=True)
    assert not await written(node, 0, b"x")
    assert await written(below, 0, b"x")
    del below.bitmaps["b"]
    assert await written(node, 0, b"x")
    assert not await written(node, MiB - 1, b"over the end")
    read_only = await file_node(graph, tmp_path / "other", MiB, read_only=True)
    assert not await written(read_only, 0, b"x")
    null = await add_plain(graph, NullDriver(size=MiB, read_zeroes=True, latency_ns=0))
    assert not await written(null, 0, b"x")


async def test_bitmaps_are_marked_before_the_reply_may_leave(graph: Graph, tmp_path: Path) -> None:
    node = await file_node(graph, tmp_path / "image", MiB)
    bitmap = node.bitmaps["b"] = new_bitmap(node, "b", 4096, enabled=True)
    future = begin(node, 4096, b"x" * 5000)
    assert bitmap.count() == 2 * 4096
    assert future is not None
    await future
    assert bitmap.count() == 2 * 4096


async def test_a_failed_write_is_an_io_error_that_names_the_file(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await file_node(graph, tmp_path / "image", MiB)

    def full(_fd: int, _data: memoryview, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    future = begin(node, 512, b"x")
    assert future is not None
    with pytest.raises(IoError, match=r"image': write of 1 bytes at 512") as caught:
        await future
    assert caught.value.errno == errno.ENOSPC
    assert node.in_flight == 0


async def test_a_drain_waits_for_it(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = await file_node(graph, tmp_path / "image", MiB)
    node = await raw_over(graph, below)
    go, real = threading.Event(), os.pwrite

    def stuck(fd: int, data: memoryview, offset: int) -> int:
        go.wait(30)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", stuck)
    future = begin(node, 0, b"x")
    idle = asyncio.ensure_future(below.wait_idle())
    await turns(5)
    assert not idle.done()
    go.set()
    await idle
    assert future is not None
    assert future.done()


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize(
    "image",
    [
        NewImage(size=4 * MiB),
        NewImage(size=4 * MiB, version=2),
        NewImage(size=4 * MiB, extended_l2=True),
        NewImage(size=4 * MiB, cluster_size=4096),
    ],
    ids=["plain", "version 2", "subclusters", "small clusters"],
)
async def test_qcow2_where_the_disk_has_the_cluster_for_itself(
    graph: Graph, tmp_path: Path, image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", image)
    node = await qcow2_node(graph, path)
    driver, cluster = node.driver, image.cluster_size
    assert isinstance(driver, Qcow2Driver)
    assert not await written(node, 0, b"new")
    await node.write(0, memoryview(b"a" * 2 * cluster), fua=False)
    usual = not image.extended_l2
    assert await written(node, 100, b"in place") == usual
    assert not await written(node, cluster - 4, b"two clusters")
    assert not await written(node, 8 * cluster, b"new")

    await node.write_zeroes(0, cluster, fua=False, may_unmap=False, no_fallback=False)
    assert await written(node, 100, b"zeroes") == (image.version == 2)

    if usual:  # what it lets go of while the write runs is not free before its end
        go, real = threading.Event(), os.pwrite

        def stuck(fd: int, data: memoryview, offset: int) -> int:
            go.wait(30)
            return real(fd, data, offset)

        epoch = driver.image.frees.epoch
        before = epoch.count
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", stuck)
            future = begin(node, cluster, b"held")
            assert epoch.count == before + 1
            await turns(3)
            go.set()
            assert future is not None
            await future
        assert epoch.count == before
    await graph.remove(node)
    check_qcow2(path)


async def test_under_a_filter_only_where_nothing_is_to_be_saved(
    graph: Graph, tmp_path: Path, rng: random.Random
) -> None:
    disk = rng.randbytes(MiB)
    (tmp_path / "active").write_bytes(disk)
    active = await add_plain(graph, file_driver(tmp_path / "active"))
    temp = await add_plain(graph, temp_driver(tmp_path / "temp", MiB))
    cbw = await add_filter(graph, active, temp, CopyBeforeWrite())
    access = await add_access(graph, cbw)
    model = bytearray(disk)
    ways = {True: 0, False: 0}
    for _ in range(400):
        length = rng.randrange(1, 9000)
        offset = rng.randrange(MiB // 4 - length)
        data = rng.randbytes(length)
        if not (found := await written(cbw, offset, data)):
            await cbw.write(offset, memoryview(data), fua=False)
        ways[found] += 1
        model[offset : offset + length] = data
    assert min(ways.values()) > 10
    assert await read_all(cbw) == model
    assert await read_all(access) == disk
