"""Driver `raw`: the kit with and without a window, its checks and permissions."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.fault import BlkdebugDriver, Injection
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.drivers.raw import RawDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from tests.support.driver_kit import DriverKit, Owner, file_node, null_node, read, remove_all

KiB = 1 << 10


async def raw_over(
    graph: Graph,
    below: Node,
    *,
    offset: int | None = None,
    size: int | None = None,
    read_only: bool = False,
) -> Node:
    role = RawDriver.file_role(offset=offset, size=size)
    return await graph.add(
        None,
        RawDriver(offset=offset, size=size),
        {"file": (below, role)},
        read_only=read_only,
        discard_enabled=True,
    )


class TestKit(DriverKit):
    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        below = await file_node(graph, folder / f"{size}.img", size, read_only=read_only)
        return await raw_over(graph, below, read_only=read_only)


class TestKitWindow(DriverKit):
    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        below = await file_node(graph, folder / f"{size}.img", size + 5000, read_only=read_only)
        return await raw_over(graph, below, offset=3333, size=size, read_only=read_only)


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


async def test_the_window_is_where_it_should_be(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = os.urandom(100_000)
    path.write_bytes(content)
    below = await file_node(graph, path, 100_000)
    node = await raw_over(graph, below, offset=1001, size=50_000)

    assert await read(node, 0, 50_000) == content[1001:51_001]
    await node.write(49_990, memoryview(b"0123456789"), fua=False)
    await node.write_zeroes(0, 10, fua=False, may_unmap=False, no_fallback=False)

    assert path.read_bytes() == (
        content[:1001] + bytes(10) + content[1011:50_991] + b"0123456789" + content[51_001:]
    )


async def test_status_is_moved_and_ends_with_the_window(graph: Graph, tmp_path: Path) -> None:
    below = await file_node(graph, tmp_path / "image", 1024 * KiB)
    await below.write(256 * KiB, memoryview(b"x" * 256 * KiB), fua=True)
    node = await raw_over(graph, below, offset=128 * KiB, size=512 * KiB)

    assert await node.block_status(0, 512 * KiB) == [
        Extent(0, 128 * KiB, HOLE | ZERO),
        Extent(128 * KiB, 256 * KiB, DATA),
        Extent(384 * KiB, 128 * KiB, HOLE | ZERO),
    ]


async def test_what_the_child_says_beyond_the_window_is_cut_off(graph: Graph) -> None:
    class Talkative(NullDriver):
        async def block_status(self, offset: int, length: int) -> list[Extent]:
            return [Extent(offset, 1000 - offset, HOLE | ZERO)]

    below = await graph.add(
        None,
        Talkative(size=1000, read_zeroes=True, latency_ns=0),
        read_only=False,
        discard_enabled=True,
    )
    node = await raw_over(graph, below, offset=100, size=500)

    assert await node.block_status(0, 500) == [Extent(0, 500, HOLE | ZERO)]


async def test_depth_is_moved_and_ends_with_the_window(graph: Graph) -> None:
    class Layered(NullDriver):
        async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
            return [Extent(offset, 150 - offset, 2), Extent(150, 850, 0)]

    below = await graph.add(
        None,
        Layered(size=1000, read_zeroes=True, latency_ns=0),
        read_only=False,
        discard_enabled=True,
    )
    node = await raw_over(graph, below, offset=100, size=500)

    assert await node.allocation_depth(0, 500) == [Extent(0, 50, 2), Extent(50, 450, 0)]


async def test_a_plain_file_holds_all_of_itself_also_its_holes(
    graph: Graph, tmp_path: Path
) -> None:
    below = await file_node(graph, tmp_path / "image", 1024 * KiB)
    assert await below.allocation_depth(0, 1024 * KiB) == [Extent(0, 1024 * KiB, 1)]
    with pytest.raises(IoError):
        await below.allocation_depth(1024 * KiB, 1)


@pytest.mark.parametrize(
    ("offset", "size", "result"),
    [
        (None, None, 1000),
        (0, None, 1000),
        (1, None, 999),
        (1000, None, 0),
        (None, 0, 0),
        (None, 1000, 1000),
        (999, 1, 1),
        (1001, None, r"Offset \(1001\) cannot be greater than size of the containing file"),
        (None, 1001, r"The sum of offset \(0\) and size \(1001\) has to be smaller or equal"),
        (500, 501, r"The sum of offset \(500\) and size \(501\) has to be smaller or equal"),
        (-1, None, "cannot be negative"),
        (None, -1, "cannot be negative"),
        (1 << 70, 1 << 70, "cannot be greater"),
    ],
)
async def test_windows_that_fit_are_taken_and_others_refused(
    offset: int | None, size: int | None, result: int | str, graph: Graph
) -> None:
    below = await null_node(graph, 1000)
    if isinstance(result, int):
        assert (await raw_over(graph, below, offset=offset, size=size)).size == result
    else:
        with pytest.raises(CommandError, match=result):
            await raw_over(graph, below, offset=offset, size=size)


async def test_discards_are_ignored_unless_enabled_on_raw_too(graph: Graph, tmp_path: Path) -> None:
    below = await file_node(graph, tmp_path / "image", 1024 * KiB)
    await below.write(0, memoryview(b"x" * 1024 * KiB), fua=True)
    node = await graph.add(
        None,
        RawDriver(offset=None, size=None),
        {"file": (below, Role.FILTERED | Role.PRIMARY)},
        read_only=False,
        discard_enabled=False,
    )

    await node.discard(0, 1024 * KiB)

    assert await read(node, 0, 10) == b"x" * 10


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, (perms.CONSISTENT_READ | perms.WRITE, perms.ALL)),
        ({"offset": 0}, (perms.CONSISTENT_READ | perms.WRITE, perms.ALL & ~perms.RESIZE)),
    ],
)
async def test_permissions_pass_through_but_for_resizing_under_a_window(
    window: dict[str, int], expected: tuple[int, int], graph: Graph
) -> None:
    below = await null_node(graph, 1000)
    node = await raw_over(graph, below, **window)
    edge = graph.attach_root(
        "root",
        Owner(),
        node,
        perm=perms.CONSISTENT_READ | perms.WRITE,
        shared=perms.ALL,
    )

    assert node.file is not None
    assert (node.file.perm, node.file.shared) == expected
    graph.detach_root(edge)


async def test_errors_of_the_child_pass_through(graph: Graph) -> None:
    below = await null_node(graph, 1000)
    fault = BlkdebugDriver()
    debug = await graph.add(
        None,
        fault,
        {"image": (below, Role.FILTERED | Role.PRIMARY)},
        read_only=False,
        discard_enabled=True,
    )
    node = await raw_over(graph, debug)
    for event in ("none", "block_status"):
        fault.inject(Injection(event, errno=errno.EDQUOT))

    for failing in (
        node.read(0, memoryview(bytearray(1))),
        node.write(0, memoryview(b"x"), fua=False),
        node.write_zeroes(0, 1, fua=False, may_unmap=False, no_fallback=True),
        node.discard(0, 1),
        node.flush(),
        node.block_status(0, 1),
    ):
        with pytest.raises(IoError) as caught:
            await failing
        assert caught.value.errno == errno.EDQUOT
