"""Damaged qcow2 images: what is wrong is an error, and nothing that is there is overwritten."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.graph import Graph
from nbdfleece.block.registry import add_from_options
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.create import NewImage
from nbdfleece.formats.qcow2.writer import ImageWriter
from tests.block.test_qcow2_driver import qcow2_node
from tests.support.driver_kit import fails, read, remove_all
from tests.support.qcow2 import check_qcow2, make_qcow2

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


async def test_a_refcount_table_that_was_cut_within_is_refused(
    graph: Graph, tmp_path: Path
) -> None:
    """What its lost entries told of would be free."""
    path, writer = tmp_path / "x.qcow2", ImageWriter(MiB, cluster_bits=9)
    with path.open("wb") as file:
        for offset, piece in (*writer.data(0, b"d" * MiB), *writer.finish()):
            file.seek(offset)
            file.write(piece)
    await graph.remove(await qcow2_node(graph, path))
    os.truncate(path, header_of(path).refcount_table_offset + 16)
    with pytest.raises(CommandError, match="refcount table"):
        await qcow2_node(graph, path)


async def test_data_that_was_cut_off_is_an_error_and_never_zeroes(
    graph: Graph, tmp_path: Path
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE))
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"a" * MiB), fua=False)
    await graph.remove(node)
    os.truncate(path, path.stat().st_size - MiB // 2)
    for read_only in (True, False):
        node = await qcow2_node(graph, path, read_only=read_only)
        assert await read(node, 0, MiB // 2) == b"a" * (MiB // 2)
        assert await fails(node.read(MiB - 512, memoryview(bytearray(512)))) == errno.EIO
        assert await fails(node.read(0, memoryview(bytearray(MiB)))) == errno.EIO
        await graph.remove(node)


async def test_nothing_is_shown_of_what_lies_behind_the_window_of_the_image(
    graph: Graph, tmp_path: Path
) -> None:
    """An image inside another file, which a stranger may have made: an OVA, say."""
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE))
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"a" * MiB), fua=False)
    await graph.remove(node)
    size, header = path.stat().st_size, header_of(path)
    table = int.from_bytes(path.read_bytes()[header.l1_table_offset :][:8], "big") & ~(1 << 63)
    patch(path, table + 8, (size | 1 << 63).to_bytes(8, "big"))
    patch(path, size, b"secret" * header.cluster_size)
    node = await add_from_options(
        graph,
        {
            "driver": "qcow2",
            "node-name": "disk",
            "read-only": True,
            "file": {
                "driver": "raw",
                "offset": 0,
                "size": size,
                "file": {"driver": "file", "filename": str(path)},
            },
        },
    )
    assert await read(node, 0, 512) == b"a" * 512  # the table is in memory now
    there = memoryview(bytearray(512))
    assert not node.read_now(header.cluster_size, there)
    assert await fails(node.read(header.cluster_size, there)) == errno.EIO


async def test_a_cluster_of_a_data_file_that_says_nothing_of_its_owner_is_zeroed(
    graph: Graph, tmp_path: Path
) -> None:
    image = NewImage(size=SIZE, data_file="data", preallocate=True)
    path, data = make_qcow2(tmp_path / "x.qcow2", image), tmp_path / "data"
    data.write_bytes(b"d" * SIZE)
    l2 = int.from_bytes(path.read_bytes()[header_of(path).l1_table_offset :][:8], "big")
    patch(path, (l2 & ~(1 << 63)) + 8, (65536).to_bytes(8, "big"))  # without COPIED
    options = {"driver": "qcow2", "node-name": "disk", "discard": "unmap"}
    options |= {"file": {"driver": "file", "filename": str(path)}}
    node = await add_from_options(graph, options)
    await node.write_zeroes(0, 4 * 65536, fua=False, may_unmap=True, no_fallback=False)
    assert await read(node, 0, 4 * 65536) == bytes(4 * 65536)


@pytest.mark.parametrize("dirty", [False, True])
async def test_an_l2_table_that_was_cut_within_is_an_error_and_never_zeroes(
    graph: Graph, tmp_path: Path, *, dirty: bool
) -> None:
    path, writer = tmp_path / "x.qcow2", ImageWriter(MiB)
    with path.open("wb") as file:
        for offset, piece in (*writer.data(0, b"d" * MiB), *writer.finish()):
            file.seek(offset)
            file.write(piece)
    header = header_of(path)
    l1 = bytearray(path.read_bytes()[header.l1_table_offset :][:8])
    l2 = int.from_bytes(l1, "big") & ~(1 << 63)
    end = (path.stat().st_size + 65535) & ~65535
    patch(path, end, path.read_bytes()[l2 : l2 + 64])  # the table is at the end, as far as it goes
    patch(path, header.l1_table_offset, end.to_bytes(8, "big"))
    if dirty:
        patch(path, h.FEATURES_AT, h.FEATURES_FIELDS.pack(h.DIRTY, 0, 0))
        with pytest.raises(CommandError, match="L2 table"):
            await qcow2_node(graph, path)
        return
    node = await qcow2_node(graph, path)
    assert await fails(node.read(MiB // 2, memoryview(bytearray(512)))) == errno.EIO


@pytest.mark.parametrize("entry", ["refcount table", "unaligned"])
async def test_what_a_damaged_entry_says_is_not_given_away_when_it_goes(
    graph: Graph, tmp_path: Path, entry: str
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", NewImage(size=SIZE))
    node = await qcow2_node(graph, path)
    await node.write(0, memoryview(b"a" * 131072), fua=False)
    await graph.remove(node)
    header = header_of(path)
    l1 = path.read_bytes()[header.l1_table_offset :][:8]
    l2 = int.from_bytes(l1, "big") & ~(1 << 63)
    first = int.from_bytes(path.read_bytes()[l2 : l2 + 8], "big")
    wrong = header.refcount_table_offset if entry == "refcount table" else first | 512
    patch(path, l2 + 8, (wrong | 1 << 63).to_bytes(8, "big"))
    node = await qcow2_node(graph, path)
    await node.discard(65536, 65536)
    await node.flush()
    await node.flush()
    await node.write(MiB, memoryview(b"b" * MiB), fua=False)
    await graph.remove(node)
    node = await qcow2_node(graph, path)
    assert await read(node, 0, 65536) == b"a" * 65536
    assert await read(node, MiB, MiB) == b"b" * MiB
    await graph.remove(node)
    check_qcow2(path, leaks=True)
