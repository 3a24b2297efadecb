"""Driver `file`: the kit over it, and what only regular files do."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import HOLE, ZERO, Extent
from nbdfleece.base.limits import FILE_THREADS
from nbdfleece.block.drivers import _direct, _posix
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.datapath.fileio import FileIo
from nbdfleece.datapath.step import background
from tests.support.driver_kit import (
    DriverKit,
    make_image,
    open_descriptors,
    read,
    remove_all,
    stepped,
)
from tests.support.waiting import until

KiB, MiB = 1 << 10, 1 << 20


def driver(
    path: Path | str,
    *,
    locking: Locking = Locking.AUTO,
    cache_direct: bool = False,
    new_and_sparse: bool = False,
) -> FileDriver:
    return FileDriver(
        filename=str(path),
        locking=locking,
        cache_direct=cache_direct,
        new_and_sparse=new_and_sparse,
    )


class TestKit(DriverKit):
    cache_direct = False

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        path = make_image(folder / f"{size}.img", size)
        return await graph.add(
            None,
            driver(path, cache_direct=self.cache_direct),
            read_only=read_only,
            discard_enabled=True,
        )


@pytest.fixture(scope="module")
def _has_direct_io(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = make_image(tmp_path_factory.mktemp("direct") / "probe", 8192)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder has no O_DIRECT")


@pytest.mark.usefixtures("_has_direct_io")
class TestKitDirect(TestKit):
    cache_direct = True


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


@pytest.fixture
async def node(graph: Graph, tmp_path: Path) -> Node:
    path = make_image(tmp_path / "image", 4 * MiB)
    return await graph.add("disk", driver(path), read_only=False, discard_enabled=True)


async def zero(
    node: Node, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
) -> None:
    await node.write_zeroes(1 * MiB, 1 * MiB, fua=fua, may_unmap=may_unmap, no_fallback=no_fallback)


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
async def test_what_is_no_regular_file_is_refused(kind: str, graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    before = open_descriptors()

    with pytest.raises(CommandError, match=r"'file' driver requires '.*' to be a regular file"):
        await graph.add("disk", driver(path), read_only=False, discard_enabled=True)

    assert open_descriptors() <= before + 1  # the loop's own way back from threads
    assert list(graph) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none/such", "No such file or directory"), ("zero\0byte", "not a file name")],
)
async def test_a_file_that_cannot_be_opened_is_one_clear_error(
    name: str, reason: str, graph: Graph, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=f"Could not open .*: {reason}"):
        await graph.add("x", driver(f"{tmp_path}/{name}"), read_only=False, discard_enabled=True)


async def test_read_only_nodes_open_the_file_for_reading_only(graph: Graph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", 1000)
    node = await graph.add("disk", driver(path), read_only=True, discard_enabled=True)
    file = node.driver.plain_file()

    assert file is not None
    assert not os.get_inheritable(file.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(file.fd, b"x", 0)
    assert node.plain_file() is None  # nothing may be saved and written through it


# --- zeroes and discards -----------------------------------------------------------------------


async def test_unmapping_gives_space_back_and_zeroing_keeps_it(node: Node) -> None:
    await node.write(0, memoryview(b"x" * 4 * MiB), fua=True)
    full = await node.driver.allocated_size()
    assert full is not None
    assert full >= 4 * MiB

    await zero(node, may_unmap=False)
    assert await node.driver.allocated_size() == full
    await zero(node, may_unmap=True)

    assert (await node.driver.allocated_size() or 0) <= full - 1 * MiB
    assert await node.block_status(1 * MiB, 1 * MiB) == [Extent(MiB, MiB, HOLE | ZERO)]
    assert await read(node, 0, 4 * MiB) == b"x" * MiB + bytes(MiB) + b"x" * 2 * MiB


async def test_discard_punches_a_hole(node: Node) -> None:
    await node.write(0, memoryview(b"x" * 4 * MiB), fua=True)

    await node.discard(1 * MiB, 2 * MiB)

    assert await read(node, 0, 4 * MiB) == b"x" * MiB + bytes(2 * MiB) + b"x" * MiB
    assert (await node.driver.allocated_size() or 0) <= 2 * MiB + 64 * KiB


class Refusing:
    """Makes operations of FileIo fail, and counts how often they are tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[str] = []
        self._monkeypatch = monkeypatch

    def refuse(self, name: str, number: int) -> None:
        async def operation(_io: FileIo, _offset: int = 0, _length: int = 0) -> None:
            self.tried.append(name)
            if number:
                raise IoError(number, name)

        self._monkeypatch.setattr(FileIo, name, operation)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    return Refusing(monkeypatch)


async def test_without_holes_unmapping_zeroes_the_range_and_asks_once(
    node: Node, refusing: Refusing
) -> None:
    refusing.refuse("punch_hole", errno.EOPNOTSUPP)
    refusing.refuse("zero_range", 0)

    await zero(node, may_unmap=True)
    await zero(node, may_unmap=True)
    await node.discard(0, 4096)

    assert refusing.tried == ["punch_hole", "zero_range", "zero_range"]


async def test_without_any_fast_way_the_node_writes_zeroes(node: Node, refusing: Refusing) -> None:
    await node.write(0, memoryview(b"x" * 4 * MiB), fua=False)
    refusing.refuse("punch_hole", errno.EOPNOTSUPP)
    refusing.refuse("zero_range", errno.ENOSYS)

    await zero(node, may_unmap=True)
    await zero(node, may_unmap=False)
    with pytest.raises(IoError) as caught:
        await zero(node, no_fallback=True)

    assert caught.value.errno == errno.ENOTSUP
    assert refusing.tried == ["punch_hole", "zero_range"]
    assert await read(node, 1 * MiB - 1, MiB + 2) == b"x" + bytes(MiB) + b"x"


async def test_einval_is_for_this_range_only(node: Node, refusing: Refusing) -> None:
    refusing.refuse("zero_range", errno.EINVAL)
    for _ in range(2):
        await zero(node)
    assert refusing.tried == ["zero_range", "zero_range"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_real_errors_are_told_and_not_worked_around(
    number: int, node: Node, refusing: Refusing
) -> None:
    refusing.refuse("punch_hole", number)
    refusing.refuse("zero_range", 0)

    for failing in (zero(node, may_unmap=True), node.discard(0, 4096)):
        with pytest.raises(IoError) as caught:
            await failing
        assert caught.value.errno == number

    assert refusing.tried == ["punch_hole", "punch_hole"]


async def test_discard_where_there_are_no_holes_succeeds(node: Node, refusing: Refusing) -> None:
    refusing.refuse("punch_hole", errno.EOPNOTSUPP)
    await node.discard(0, 4096)
    await node.discard(0, 4096)
    assert refusing.tried == ["punch_hole"]


@pytest.mark.parametrize("fua", [False, True])
async def test_fua_syncs_behind_fast_zeroes(fua: bool, node: Node, refusing: Refusing) -> None:
    refusing.refuse("zero_range", 0)
    refusing.refuse("sync", 0)
    await zero(node, fua=fua)
    assert refusing.tried == ["zero_range", "sync"][: 1 + fua]


async def test_the_allocation_is_told_while_all_threads_of_the_file_are_stuck(node: Node) -> None:
    file = node.driver.plain_file()
    assert file is not None
    go = threading.Event()
    stuck = [background(file.run(go.wait, "wait", 0, 0)) for _ in range(FILE_THREADS + 1)]

    assert await node.driver.allocated_size() == 0

    go.set()
    for each in stuck:
        await each


# --- new files -------------------------------------------------------------------------------


async def test_a_new_file_reads_as_zeroes_when_the_maker_says_so(
    graph: Graph, tmp_path: Path
) -> None:
    path = make_image(tmp_path / "temp", 1 * MiB)
    for promised in (False, True):
        node = await graph.add(
            "temp", driver(path, new_and_sparse=promised), read_only=False, discard_enabled=True
        )
        assert node.driver.reads_zero_when_new() is promised
        await graph.remove(node)


async def test_a_file_with_data_is_not_believed_to_be_new(graph: Graph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "temp", 1 * MiB)
    path.write_bytes(b"x")
    os.truncate(path, 1 * MiB)

    node = await graph.add(
        "temp", driver(path, new_and_sparse=True), read_only=False, discard_enabled=True
    )

    assert not node.driver.reads_zero_when_new()


# --- cache=none ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_has_direct_io")
async def test_direct_writes_that_share_a_page_lose_nothing(graph: Graph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", 64 * KiB)
    node = await graph.add(
        "disk", driver(path, cache_direct=True), read_only=False, discard_enabled=True
    )
    for round_ in range(20):
        model = bytearray(64 * KiB)
        running = []
        at, step = 0, 333 + round_ * 97
        while at < 64 * KiB:
            data = bytes((at // step % 255 + 1,)) * min(step, 64 * KiB - at)
            model[at : at + len(data)] = data
            running.append(background(node.write(at, memoryview(data), fua=False)))
            at += len(data)
        for each in running:
            await each
        assert await read(node, 0, 64 * KiB) == model
    await node.flush()
    assert path.read_bytes() == model


@pytest.mark.usefixtures("_has_direct_io")
async def test_direct_writes_to_one_page_go_one_after_another(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(tmp_path / "image", 64 * KiB)
    node = await graph.add(
        "disk", driver(path, cache_direct=True), read_only=False, discard_enabled=True
    )
    real = _direct._write
    begun: list[int] = []
    go = threading.Event()

    def write(
        fd: int, buffered_fd: int, alignment: int, offset: int, data: memoryview, flags: int
    ) -> None:
        begun.append(offset)
        if offset == 0:
            assert go.wait(30)
        real(fd, buffered_fd, alignment, offset, data, flags)

    monkeypatch.setattr(_direct, "_write", write)
    first = background(node.write(0, memoryview(b"a" * 100), fua=False))
    same_page = background(node.write(200, memoryview(b"b" * 100), fua=False))
    await stepped(node.write(8192, memoryview(b"c" * 100), fua=False))
    await until(lambda: len(begun) == 2)
    assert sorted(begun) == [0, 8192]  # of two threads, either may be the first

    go.set()
    await first
    await same_page
    assert begun[2:] == [200]
    assert await read(node, 0, 300) == b"a" * 100 + bytes(100) + b"b" * 100


@pytest.mark.usefixtures("_has_direct_io")
async def test_direct_nodes_go_past_the_page_cache(graph: Graph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", 64 * KiB)
    node = await graph.add(
        "disk", driver(path, cache_direct=True), read_only=False, discard_enabled=True
    )
    await node.write(0, memoryview(b"d" * 64 * KiB), fua=False)

    assert node.plain_file() is None
    assert not node.read_now(0, memoryview(bytearray(10)))
    assert path.read_bytes() == b"d" * 64 * KiB


@pytest.mark.usefixtures("_has_direct_io")
@pytest.mark.parametrize("length", [4096, 100], ids=["a page", "less"])
async def test_a_flush_that_failed_may_succeed_when_all_went_past_the_page_cache(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """As in QEMU; what is less than a page goes through the cache, which may have lost it."""
    path = make_image(tmp_path / "image", 64 * KiB)
    node = await graph.add(
        "disk", driver(path, cache_direct=True), read_only=False, discard_enabled=True
    )
    await node.write(0, memoryview(bytes(length)), fua=False)

    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, "away for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(IoError):
            await node.flush()
    if length == 4096:
        await node.flush()
    else:
        with pytest.raises(IoError):
            await node.flush()


async def test_a_file_system_without_direct_io_is_told(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(tmp_path / "image", 64 * KiB)
    await graph.remove(await graph.add("disk", driver(path), read_only=False, discard_enabled=True))
    before = open_descriptors()

    def probe(_fd: int, _alignment: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(_posix, "probe", probe)
    with pytest.raises(CommandError, match="may not support O_DIRECT"):
        await graph.add(
            "disk", driver(path, cache_direct=True), read_only=False, discard_enabled=True
        )

    assert open_descriptors() == before
