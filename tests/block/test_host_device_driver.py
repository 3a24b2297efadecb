"""Driver `host_device` over loop devices: the kit, and what only block devices do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import DATA, Extent
from nbdfleece.block.drivers import host_device
from nbdfleece.block.drivers.host_device import HostDeviceDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.datapath.fileio import FileIo
from tests.support.driver_kit import DriverKit, read, remove_all
from tests.support.loop_device import loop_device

KiB, MiB = 1 << 10, 1 << 20


def driver(path: Path, *, cache_direct: bool = False) -> HostDeviceDriver:
    return HostDeviceDriver(filename=str(path), locking=Locking.AUTO, cache_direct=cache_direct)


class TestKit(DriverKit):
    sizes: ClassVar[tuple[int, ...]] = (512, 4096 + 512, 1 * MiB, 3 * MiB + 512 * 7)
    cache_direct = False
    sector_size = 512

    @pytest.fixture(autouse=True)
    async def _graph(self, tmp_path: Path) -> AsyncIterator[None]:
        self.graph = Graph()
        self.folder = tmp_path
        self.devices: dict[int, Path] = {}
        with contextlib.ExitStack() as self.stack:
            yield
            await remove_all(self.graph)  # before the devices go

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        if size not in self.devices:
            image = folder / f"{size}.img"
            image.write_bytes(bytes(size))
            self.devices[size] = self.stack.enter_context(
                loop_device(image, sector_size=self.sector_size)
            )
        return await graph.add(
            None,
            driver(self.devices[size], cache_direct=self.cache_direct),
            read_only=read_only,
            discard_enabled=True,
        )


class TestKitDirect(TestKit):
    cache_direct = True


class TestKitLargeBlocks(TestKit):
    sizes: ClassVar[tuple[int, ...]] = (4096, 1 * MiB + 4096)
    sector_size = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4 * MiB)
    return path


@pytest.fixture
async def node(image: Path) -> AsyncIterator[Node]:
    with loop_device(image) as device:
        graph = Graph()
        yield await graph.add("disk", driver(device), read_only=False, discard_enabled=True)
        await remove_all(graph)


def content(image: Path) -> bytes:
    return image.read_bytes()


def allocated(image: Path) -> int:
    return image.stat().st_blocks * 512


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "character device"])
async def test_what_is_no_block_device_is_refused(kind: str, tmp_path: Path) -> None:
    path = {"file": tmp_path / "f", "folder": tmp_path, "character device": Path("/dev/null")}[kind]
    if kind == "file":
        path.write_bytes(bytes(512))
    graph = Graph()

    with pytest.raises(CommandError, match=r"'host_device' driver requires .* a block device"):
        await graph.add("disk", driver(path), read_only=False, discard_enabled=True)


async def test_status_is_data_and_the_allocation_unknown(node: Node) -> None:
    assert await node.block_status(1000, 2 * MiB) == [Extent(1000, 2 * MiB, DATA)]
    assert await node.driver.allocated_size() is None
    assert not node.driver.reads_zero_when_new()


# --- zeroes ----------------------------------------------------------------------------------


async def test_unmapping_zeroes_reach_the_device_and_free_its_space(
    node: Node, image: Path
) -> None:
    full = allocated(image)

    await node.write_zeroes(100, 2 * MiB, fua=True, may_unmap=True, no_fallback=False)

    assert await read(node, 0, 4 * MiB) == b"x" * 100 + bytes(2 * MiB) + b"x" * (2 * MiB - 100)
    assert allocated(image) < full
    await node.flush()
    assert content(image) == await read(node, 0, 4 * MiB)


async def test_zeroes_without_unmapping_are_never_promised_fast(node: Node) -> None:
    with pytest.raises(IoError) as caught:
        await node.write_zeroes(0, MiB, fua=False, may_unmap=False, no_fallback=True)
    assert caught.value.errno == errno.ENOTSUP
    assert await read(node, 0, MiB) == b"x" * MiB

    await node.write_zeroes(0, MiB, fua=False, may_unmap=False, no_fallback=False)
    assert await read(node, 0, MiB + 1) == bytes(MiB) + b"x"


async def test_less_than_a_block_is_zeroed_by_writing(node: Node) -> None:
    await node.write_zeroes(10, 20, fua=True, may_unmap=True, no_fallback=True)
    await node.write_zeroes(500, 30, fua=True, may_unmap=True, no_fallback=True)
    assert await read(node, 0, 600) == (b"x" * 10 + bytes(20) + b"x" * 470 + bytes(30) + b"x" * 70)


async def test_a_device_without_unmapping_is_zeroed_by_the_kernel_and_asked_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    async def punch_hole(_io: FileIo, offset: int, _length: int) -> None:
        tried.append(offset)
        raise IoError(errno.EOPNOTSUPP, "punch hole")

    monkeypatch.setattr(FileIo, "punch_hole", punch_hole)
    for offset in (MiB, 2 * MiB):
        await node.write_zeroes(offset, MiB, fua=False, may_unmap=True, no_fallback=False)

    assert tried == [MiB]
    assert await read(node, 0, 4 * MiB) == b"x" * MiB + bytes(2 * MiB) + b"x" * MiB


async def test_a_device_that_cannot_zero_gets_zeroes_written(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = host_device.fcntl.ioctl
    tried: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        tried.append(request)
        if request in (host_device._BLKZEROOUT, host_device._BLKDISCARD):
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(fd, request, argument)

    monkeypatch.setattr(host_device.fcntl, "ioctl", ioctl)
    for offset in (MiB + 7, 2 * MiB + 7):
        await node.write_zeroes(offset, MiB, fua=False, may_unmap=False, no_fallback=False)
        await node.discard(offset, MiB)  # cannot, which is no failure

    assert tried == [host_device._BLKZEROOUT, host_device._BLKDISCARD]
    assert await read(node, 0, 4 * MiB) == (b"x" * (MiB + 7) + bytes(2 * MiB) + b"x" * (MiB - 7))


# --- discards --------------------------------------------------------------------------------


async def test_discard_rounds_inwards_and_frees_space(node: Node, image: Path) -> None:
    full = allocated(image)

    await node.discard(MiB - 100, 2 * MiB + 200)

    assert allocated(image) <= full - 2 * MiB + 64 * KiB
    assert await read(node, 0, MiB) == b"x" * MiB
    assert await read(node, 3 * MiB, MiB) == b"x" * MiB


async def test_discard_of_less_than_a_block_does_nothing(node: Node) -> None:
    await node.discard(1, 511)
    await node.discard(100, 900)
    assert await read(node, 0, 1024) == b"x" * 1024


async def test_a_failing_discard_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(_fd: int, _request: int, _argument: bytes) -> bytes:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(host_device.fcntl, "ioctl", ioctl)
    with pytest.raises(IoError) as caught:
        await node.discard(0, MiB)
    assert caught.value.errno == errno.EIO
    assert "discard of 1048576 bytes at 0" in str(caught.value)


async def test_read_only_nodes_open_the_device_for_reading_only(image: Path) -> None:
    with loop_device(image) as device:
        graph = Graph()
        node = await graph.add("disk", driver(device), read_only=True, discard_enabled=True)
        assert await read(node, 0, 10) == b"x" * 10
        file = node.driver.plain_file()
        assert file is not None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(file.fd, b"y", 0)
        await remove_all(graph)
