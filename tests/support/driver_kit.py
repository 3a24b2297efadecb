"""One suite that every driver has to pass.

A driver's test file makes a subclass::

    class TestKit(DriverKit):
        async def make(self, graph, folder, size, *, read_only): ...return the node under test

and says by the class attributes what is special about the driver. Each verb is called through the
node, as in real life, and stepped by hand as the transmission phase does it.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Coroutine
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.base.extent import ZERO, Extent
from nbdfleece.base.units import is_power_of_2
from nbdfleece.block.child import Child
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.datapath.step import background

T = TypeVar("T")

MiB = 1 << 20


class DriverKit(ABC):
    """The suite; see the module.

    Attributes:
        sizes: Sizes to try: odd ones, where the driver can have them.
        keeps_data: Reads give what was written last.
        can_write: The driver has the writing verbs.
        leaves_content: Before the first write the node reads as zeroes.
    """

    sizes: ClassVar[tuple[int, ...]] = (1, 511, 4097, 1 * MiB, 3 * MiB + 12345)
    keeps_data: ClassVar[bool] = True
    can_write: ClassVar[bool] = True
    graph: Graph
    folder: Path

    @abstractmethod
    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        """Return a new node of `size` bytes; all read-only nodes have `discard` too."""

    @pytest.fixture(autouse=True)
    async def _graph(self, tmp_path: Path) -> AsyncIterator[None]:
        self.graph = Graph()
        self.folder = tmp_path
        yield
        await remove_all(self.graph)

    async def build(self, size: int, *, read_only: bool = False) -> Node:
        return await self.make(self.graph, self.folder, size, read_only=read_only)

    @pytest.fixture
    def typical(self) -> int:
        return max(self.sizes)

    # --- size and bounds ---------------------------------------------------------------------

    async def test_size_is_exact(self) -> None:
        for size in self.sizes:
            node = await self.build(size)
            assert node.size == size
            await remove_all(self.graph)

    async def test_last_byte_is_read_and_none_behind_it(self) -> None:
        for size in self.sizes:
            node = await self.build(size)
            assert len(await read(node, size - 1, 1)) == 1
            for offset, length in ((size - 1, 2), (size, 1), (-1, 1), (0, size + 1), (1 << 62, 1)):
                with pytest.raises(IoError) as caught:
                    await read(node, offset, length)
                assert caught.value.errno == errno.EINVAL
            await remove_all(self.graph)

    async def test_writing_verbs_refuse_what_is_outside(self, typical: int) -> None:
        node = await self.build(typical)
        before = await read(node, 0, typical)
        for offset, length in ((typical - 1, 2), (typical, 1), (-1, 1)):
            for refused in (
                node.write(offset, memoryview(b"x" * length), fua=False),
                node.write_zeroes(offset, length, fua=False, may_unmap=True, no_fallback=False),
                node.discard(offset, length),
            ):
                with pytest.raises(IoError) as caught:
                    await refused
                assert caught.value.errno == errno.ENOSPC
        assert await read(node, 0, typical) == before

    async def test_empty_ranges_are_refused(self, typical: int) -> None:
        node = await self.build(typical)
        for refused in (
            node.read(0, memoryview(b"")),
            node.write(0, memoryview(b""), fua=False),
            node.write_zeroes(0, 0, fua=False, may_unmap=False, no_fallback=False),
            node.discard(0, 0),
            node.block_status(0, 0),
        ):
            with pytest.raises(IoError):
                await refused

    async def test_read_only_node_refuses_writing_verbs(self, typical: int) -> None:
        node = await self.build(typical, read_only=True)
        await read(node, 0, typical)
        for refused in (
            node.write(0, memoryview(b"x"), fua=False),
            node.write_zeroes(0, 1, fua=False, may_unmap=True, no_fallback=False),
            node.discard(0, 1),
        ):
            with pytest.raises(IoError) as caught:
                await refused
            assert caught.value.errno == errno.EROFS

    # --- content -----------------------------------------------------------------------------

    async def test_random_history_equals_a_bytearray(
        self, rng: random.Random, *, long_run: bool
    ) -> None:
        if not self.can_write or not self.keeps_data:
            pytest.skip("the driver keeps no data")
        for size in self.sizes:
            node = await self.build(size)
            model = bytearray(await read(node, 0, size))
            for _ in range(300 if long_run else 25):
                await random_change(node, model, rng)
                offset = rng.randrange(size)
                length = rng.randrange(size - offset) + 1
                assert await read(node, offset, length) == model[offset : offset + length]
            assert await read(node, 0, size) == model
            await check_status(node, model)
            await remove_all(self.graph)

    async def test_unaligned_pieces_meet(self, typical: int) -> None:
        if not self.can_write or not self.keeps_data:
            pytest.skip("the driver keeps no data")
        node = await self.build(typical)
        model = bytearray(await read(node, 0, typical))
        for offset, length in ((1, 1), (511, 2), (4095, 2), (5000, 10_000), (typical - 3, 3)):
            data = os.urandom(length)
            await node.write(offset, memoryview(data), fua=False)
            model[offset : offset + length] = data
        assert await read(node, 0, typical) == model

    async def test_zeroed_ranges_read_as_zeroes_and_their_neighbours_stay(
        self, typical: int
    ) -> None:
        if not self.can_write or not self.keeps_data:
            pytest.skip("the driver keeps no data")
        node = await self.build(typical)
        for fua in (False, True):
            for may_unmap in (False, True):
                for offset, length in ((0, 1), (100, 1000), (4000, 5000), (65536, 65536)):
                    await node.write(0, memoryview(b"\xff" * typical), fua=False)
                    await node.write_zeroes(
                        offset, length, fua=fua, may_unmap=may_unmap, no_fallback=False
                    )
                    got = await read(node, 0, typical)
                    assert got == b"\xff" * offset + bytes(length) + b"\xff" * (
                        typical - offset - length
                    )

    async def test_zeroing_without_fallback_is_done_or_enotsup(self, typical: int) -> None:
        if not self.can_write:
            pytest.skip("the driver cannot write")
        node = await self.build(typical)
        for may_unmap in (False, True):
            await node.write(0, memoryview(b"\xff" * typical), fua=False)
            before = await read(node, 0, typical)
            done = await fails(
                node.write_zeroes(0, 65536, fua=False, may_unmap=may_unmap, no_fallback=True)
            )
            assert done in (0, errno.ENOTSUP)
            after = before if done else bytes(65536) + before[65536:]
            assert await read(node, 0, typical) == after

    async def test_discard_leaves_the_neighbours(self, typical: int) -> None:
        if not self.can_write or not self.keeps_data:
            pytest.skip("the driver keeps no data")
        node = await self.build(typical)
        await node.write(0, memoryview(b"\xff" * typical), fua=False)
        for offset, length in ((5, 100), (3000, 200_000)):
            await node.discard(offset, length)
            got = await read(node, 0, typical)
            assert got[:offset] + got[offset + length :] == b"\xff" * (typical - length)

            await node.write(0, memoryview(b"\xff" * typical), fua=False)

    async def test_flush_and_fua_succeed(self, typical: int) -> None:
        node = await self.build(typical)
        if self.can_write:
            await node.write(3, memoryview(b"durable"), fua=True)
        await node.flush()
        if self.can_write and self.keeps_data:
            assert await read(node, 3, 7) == b"durable"

    async def test_read_now_is_right_or_refuses(self, typical: int) -> None:
        node = await self.build(typical)
        if self.can_write:
            await node.write(0, memoryview(os.urandom(typical)), fua=False)
        expected = await read(node, 0, typical)
        for offset, length in ((0, 1), (4095, 2), (typical - 5, 5), (0, typical)):
            view = memoryview(bytearray(length))
            if node.read_now(offset, view):
                assert view == expected[offset : offset + length]

    # --- status ------------------------------------------------------------------------------

    async def test_status_covers_the_node_and_makes_progress(self, rng: random.Random) -> None:
        for size in self.sizes:
            node = await self.build(size)
            if self.can_write:
                for _ in range(5):
                    offset = rng.randrange(size)
                    piece = memoryview(rng.randbytes(rng.randrange(size - offset) % 5000 + 1))
                    await node.write(offset, piece[: size - offset], fua=False)
            await check_status(node, await read(node, 0, size))
            for offset in {0, size // 2, size - 1}:
                first = (await node.block_status(offset, 1))[0]
                assert first.offset == offset
                assert first.length >= 1
            await remove_all(self.graph)

    # --- in flight, stepping -------------------------------------------------------------------

    async def test_many_requests_at_once(self, rng: random.Random) -> None:
        size = 3 * MiB if 3 * MiB <= max(self.sizes) else max(self.sizes)
        node = await self.build(size)
        model = bytearray(await read(node, 0, size))
        borders = [0, *sorted(rng.sample(range(1, size), 40)), size]
        running = []
        for first, last in itertools.pairwise(borders):
            if self.can_write:
                data = rng.randbytes(last - first)
                running.append(background(node.write(first, memoryview(data), fua=False)))
                if self.keeps_data:
                    model[first:last] = data
            running.append(background(node.flush()))
        assert node.in_flight <= len(running)
        for each in running:
            await each
        assert node.in_flight == 0
        assert await read(node, 0, size) == model

    async def test_no_verb_needs_a_task(self, typical: int) -> None:
        node = await self.build(typical)
        await read(node, 1, 100)
        await stepped(node.block_status(0, typical))
        await stepped(node.flush())
        if self.can_write:
            data = memoryview(bytes(100))
            await stepped(node.write(1, data, fua=False))
            await stepped(node.write(1, data, fua=True))
            await stepped(
                node.write_zeroes(0, typical, fua=True, may_unmap=True, no_fallback=False)
            )
            await stepped(node.discard(0, typical))

    # --- refusals and facts --------------------------------------------------------------------

    async def test_points_in_time_are_kept_or_refused(self, typical: int) -> None:
        node = await self.build(typical)
        if node.driver.has_point_in_time():
            return
        view = memoryview(bytearray(1))
        assert not node.driver.snapshot_read_now(0, view)
        for refused in (
            node.snapshot_read(0, view),
            node.snapshot_block_status(0, 1),
            node.snapshot_discard(0, 1),
        ):
            with pytest.raises(IoError) as caught:
                await refused
            assert caught.value.errno == errno.ENOTSUP

    async def test_facts_are_plausible(self, typical: int) -> None:
        node = await self.build(typical)
        allocated = await node.driver.allocated_size()

        assert is_power_of_2(node.driver.cluster_size())
        assert allocated is None or allocated >= 0
        if node.driver.reads_zero_when_new():
            assert await read(node, 0, typical) == bytes(typical)

    async def test_a_plain_file_is_the_node(self, typical: int) -> None:
        node = await self.build(typical)
        file = node.plain_file()
        if file is None:
            return
        await node.write(5, memoryview(b"through the node"), fua=False)
        assert os.pread(file.fd, 16, 5) == b"through the node"
        os.pwrite(file.fd, b"to the file", 5)
        assert await read(node, 5, 11) == b"to the file"

    # --- life --------------------------------------------------------------------------------

    async def test_content_survives_closing_and_opening(self, typical: int) -> None:
        if not self.can_write or not self.keeps_data:
            pytest.skip("the driver keeps no data")
        node = await self.build(typical)
        await node.write(1000, memoryview(b"survives"), fua=False)
        await remove_all(self.graph)

        node = await self.build(typical)
        assert await read(node, 1000, 8) == b"survives"

    async def test_closing_leaves_no_descriptor(self, typical: int) -> None:
        await self.build(typical)
        await remove_all(self.graph)
        before = open_descriptors()
        for _ in range(3):
            await read(await self.build(typical), 0, 10)
            await remove_all(self.graph)

        assert open_descriptors() == before


# --- what tests of single drivers use too --------------------------------------------------------


class Owner:
    """A parent that holds nodes as an export does; give it the permissions."""

    def __init__(self, name: str = "test") -> None:
        self.name = name
        self.drains = 0

    def describe_parent(self) -> str:
        return f"owner '{self.name}'"

    def child_attached(self, edge: Child) -> None:
        pass

    def child_detached(self, edge: Child) -> None:
        pass

    def drained_begin(self) -> None:
        self.drains += 1

    def drained_end(self) -> None:
        self.drains -= 1

    def is_idle(self) -> bool:
        return True

    async def wait_idle(self) -> None:
        pass


def make_image(path: Path, size: int) -> Path:
    """Make a file of holes, unless it is there."""
    if not path.exists():
        path.touch()
        os.truncate(path, size)
    return path


async def file_node(graph: Graph, path: Path, size: int, *, read_only: bool = False) -> Node:
    """Return a node over a file, made when it is not there."""
    make_image(path, size)
    file = FileDriver(
        filename=str(path), locking=Locking.AUTO, cache_direct=False, new_and_sparse=False
    )
    return await graph.add(None, file, read_only=read_only, discard_enabled=True)


async def null_node(graph: Graph, size: int) -> Node:
    """Return a node of zeroes that keeps nothing."""
    return await graph.add(
        None,
        NullDriver(size=size, read_zeroes=True, latency_ns=0),
        read_only=False,
        discard_enabled=True,
    )


async def fails(request: Awaitable[object]) -> int:
    """Return the errno that a request fails with, or 0."""
    try:
        await request
    except IoError as error:
        return error.errno
    return 0


async def stepped(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a request as the transmission phase does: without a task of its own."""
    return await background(coroutine)


async def read(node: Node, offset: int, length: int) -> bytes:
    """Return bytes of a node; a buffer full of rubbish shows what was not filled."""
    buffer = bytearray(b"\xa5" * max(length, 0))
    await stepped(node.read(offset, memoryview(buffer)))
    return bytes(buffer)


async def remove_all(graph: Graph) -> None:
    """Remove every node, parents first."""
    while nodes := list(graph):
        for node in nodes:
            if not node.parents:
                await graph.remove(node)


async def check_status(node: Node, content: bytes | bytearray) -> None:
    """Walk block status over the node: no gap, no end of progress, and no false zeroes."""
    offset = 0
    while offset < node.size:
        extents = await stepped(node.block_status(offset, node.size - offset))
        check_extents(extents, offset)
        for extent in extents:
            if extent.flags & ZERO:
                part = content[extent.offset : extent.end]
                assert not any(part), f"{extent} is said to be zero"
        offset = extents[-1].end


def check_extents(extents: list[Extent], offset: int) -> None:
    """At least one extent, from `offset` on, none empty, without gaps."""
    assert extents
    for extent in extents:
        assert extent.offset == offset
        assert extent.length > 0
        offset = extent.end


async def random_change(node: Node, model: bytearray, rng: random.Random) -> None:
    """Do one random change to a node and to its model."""
    offset = rng.randrange(node.size)
    length = rng.randrange(min(node.size - offset, rng.choice([1, 600, 70_000, MiB]))) + 1
    verb = rng.choice(["write", "write", "write_zeroes", "discard", "flush"])
    if verb == "write":
        data = rng.randbytes(length)
        await node.write(offset, memoryview(data), fua=rng.random() < 0.2)
        model[offset : offset + length] = data
    elif verb == "write_zeroes":
        flags = [rng.random() < 0.5 for _ in range(3)]
        number = await fails(
            node.write_zeroes(
                offset, length, fua=flags[0], may_unmap=flags[1], no_fallback=flags[2]
            )
        )
        assert number in ((0, errno.ENOTSUP) if flags[2] else (0,))
        if number == 0:
            model[offset : offset + length] = bytes(length)
    elif verb == "discard":
        await node.discard(offset, length)
        model[offset : offset + length] = await read(node, offset, length)  # may be anything
    else:
        await node.flush()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
