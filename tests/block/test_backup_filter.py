"""The filter of a backup job: what is still to copy, what is left out, zeroes, and progress."""

from __future__ import annotations

import errno

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.block.drivers.backup_filter import BackupFilter, SourceError
from nbdfleece.block.drivers.copy_before_write import OnCbwError
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from tests.support.fleecing import add_filter, add_plain
from tests.support.memory import MemoryDriver

CLUSTER = 64 * 1024
SIZE = 5 * CLUSTER + 100


class Bench:
    """A filter over two disks in memory."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.source = MemoryDriver(bytearray(b"s" * SIZE))
        self.target = MemoryDriver(bytearray(b"t" * SIZE))
        self.filter = BackupFilter(on_cbw_error=OnCbwError.BREAK_SNAPSHOT)

    async def start(self) -> Node:
        source = await add_plain(self.graph, self.source)
        target = await add_plain(self.graph, self.target)
        return await add_filter(self.graph, source, target, self.filter)


@pytest.fixture
async def bench() -> Bench:
    bench = Bench()
    await bench.start()
    return bench


async def test_pieces_are_whole_clusters_up_to_the_limit_and_the_end(bench: Bench) -> None:
    ask = bench.filter.next_unsaved
    assert ask(0, 2 * CLUSTER) == (0, 2 * CLUSTER)
    assert ask(4 * CLUSTER, 8 * CLUSTER) == (4 * CLUSTER, CLUSTER + 100)
    assert ask(SIZE, CLUSTER) == (0, 0)
    await bench.filter.save(CLUSTER, 1)
    assert ask(0, 8 * CLUSTER) == (0, CLUSTER)
    assert ask(CLUSTER, 8 * CLUSTER) == (2 * CLUSTER, 3 * CLUSTER + 100)


async def test_what_is_skipped_is_whole_clusters_and_never_copied(bench: Bench) -> None:
    bench.filter.skip(CLUSTER - 1, 2 * CLUSTER)
    bench.filter.skip(5 * CLUSTER, 100)
    await bench.filter.node.write(CLUSTER, memoryview(b"n"), fua=False)
    await bench.filter.save(0, SIZE)
    left_out = bytes(bench.target.data[CLUSTER : 2 * CLUSTER])
    assert left_out == b"t" * CLUSTER
    assert bytes(bench.target.data[5 * CLUSTER :]) == b"t" * 100
    assert bench.target.data.count(b"s") == 4 * CLUSTER
    assert bench.filter.progress() == (4 * CLUSTER, 4 * CLUSTER)


async def test_zeroes_are_written_as_zeroes_whatever_was_in_the_target(bench: Bench) -> None:
    bench.source.data[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    await bench.filter.save(0, SIZE)
    assert bench.target.data == bench.source.data
    assert bench.target.copied == SIZE - 2 * CLUSTER


async def test_who_failed_is_told_apart(bench: Bench) -> None:
    bench.source.fail["read"] = errno.EIO
    with pytest.raises(SourceError):
        await bench.filter.save(0, CLUSTER)
    bench.source.fail = {"block_status": errno.EIO}
    await bench.filter.save(0, CLUSTER)
    bench.target.fail["write"] = errno.ENOSPC
    with pytest.raises(IoError) as caught:
        await bench.filter.save(CLUSTER, CLUSTER)
    assert not isinstance(caught.value, SourceError)
    assert bench.filter.progress() == (CLUSTER, 6 * CLUSTER)


async def test_once_broken_nothing_is_copied_any_more(bench: Bench) -> None:
    bench.target.fail["write"] = errno.EIO
    await bench.filter.node.write(0, memoryview(b"n"), fua=False)
    bench.target.fail.clear()
    with pytest.raises(IoError):
        await bench.filter.save(CLUSTER, CLUSTER)
    assert bytes(bench.target.data) == b"t" * SIZE


async def test_a_cluster_larger_than_what_is_copied_at_once_is_copied_whole() -> None:
    bench = Bench()
    size = 4 << 20
    bench.source.data[:] = bytearray(b"s" * size)
    bench.target.data[:] = bytearray(b"t" * size)
    bench.target.cluster = 2 << 20
    node = await bench.start()
    await node.write(5, memoryview(b"n"), fua=False)
    assert bytes(bench.target.data) == b"s" * (2 << 20) + b"t" * (2 << 20)
    # In two writes, the cluster would count as saved after the first.
    assert bench.target.writes == 1
