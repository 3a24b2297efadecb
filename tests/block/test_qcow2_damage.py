"""Damaged qcow2 images: what is wrong is an error, and nothing that is there is overwritten."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.block.graph import Graph
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.create import NewImage
from tests.block.test_qcow2_driver import qcow2_node
from tests.support.driver_kit import fails, read, remove_all
from tests.support.qcow2 import make_qcow2

MiB = 1 << 20
SIZE = 2 * MiB


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


def header_of(path: Path) -> h.Header:
    with path.open("rb") as file:
        return h.parse_header(file.read(1 << 21))


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def test_a_lost_refcount_table_does_not_give_the_header_away(
    graph: Graph, tmp_path: Path
) -> None:
    """Without a block for it, the start of the file would be free, and a block be put there."""
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE))
    patch(path, header_of(path).refcount_table_offset, bytes(8))
    before = path.read_bytes()
    node = await qcow2_node(graph, path)
    assert await fails(node.write(0, memoryview(b"x"), fua=False)) == errno.EIO
    await graph.remove(node)
    assert path.read_bytes() == before


async def test_a_refcount_block_that_was_cut_off_does_not_call_everything_free(
    graph: Graph, tmp_path: Path
) -> None:
    image = NewImage(size=SIZE, cluster_size=512, refcount_bits=64)
    path = make_qcow2(tmp_path / "x.qcow2", image)
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"a" * MiB), fua=False)
    await graph.remove(node)
    end = path.stat().st_size
    patch(path, header_of(path).refcount_table_offset + 8 * 5, end.to_bytes(8, "big"))
    node = await qcow2_node(graph, path)
    assert await fails(node.write(MiB, memoryview(b"b" * 65536), fua=False)) == errno.EIO
    assert await read(node, 0, MiB) == b"a" * MiB
