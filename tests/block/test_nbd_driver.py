"""Driver `nbd`: the kit against the servers of others and our own, and what it makes of replies."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent, merge
from nbdfleece.base.units import KiB, MiB
from nbdfleece.block.child import Child, Role
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from nbdfleece.datapath.step import background
from nbdfleece.protocol.nbd import constants as c
from tests.support import nbd_peers
from tests.support.driver_kit import (
    DriverKit,
    fails,
    make_image,
    open_descriptors,
    read,
    remove_all,
)
from tests.support.memory import MemoryDriver
from tests.support.nbd_peers import Peer, add, upstream
from tests.support.nbd_script import Backend, export
from tests.support.nbd_server import serving
from tests.support.waiting import turns, until

Programs = Callable[[str], str]


class Kit(DriverKit):
    """The kit over a server process for each size."""

    @pytest.fixture(autouse=True)
    def _peers(self, short_tmp: Path, program: Programs) -> Iterator[None]:
        self.peers: dict[int, Peer] = {}
        self.short = short_tmp
        self.program = program
        yield
        for peer in self.peers.values():
            peer.stop()

    def start(self, image: Path, path: Path) -> Peer:
        raise NotImplementedError

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        path = self.short / str(size)
        if size not in self.peers:
            image = make_image(folder / f"{size}.raw", size)
            self.peers[size] = self.start(image, path)
        return await add(graph, upstream(path), read_only=read_only)


class TestQemuNbd(Kit):
    sizes: ClassVar[tuple[int, ...]] = (512, 1 * MiB, 3 * MiB + 512)  # others it rounds up

    def start(self, image: Path, path: Path) -> Peer:
        return nbd_peers.qemu_nbd(self.program("qemu-nbd"), image, path, "--export-name=x")


class TestNbdkit(Kit):
    def start(self, image: Path, path: Path) -> Peer:
        return nbd_peers.nbdkit(self.program("nbdkit"), image, path)


class TestNbdkitThatIsSlow(Kit):
    """Replies come late and out of order."""

    sizes: ClassVar[tuple[int, ...]] = (511, 300_001)

    def start(self, image: Path, path: Path) -> Peer:
        delays = ("rdelay=1ms", "wdelay=2ms", "delay-extents=1ms")
        return nbd_peers.nbdkit(self.program("nbdkit"), image, path, "--filter=delay", *delays)


class TestNbdkitThatTakesLittle(Kit):
    """A maximum of 16 KiB, which it insists on; blocks of 512 bytes, which it rounds to itself."""

    sizes: ClassVar[tuple[int, ...]] = (512, 4096, 1 * MiB + 512)

    def start(self, image: Path, path: Path) -> Peer:
        filters = ("--filter=blocksize-policy", "--filter=blocksize")
        policy = ("blocksize-maximum=16K", "blocksize-error-policy=error")
        return nbd_peers.nbdkit(
            self.program("nbdkit"), image, path, *filters, *policy, "minblock=512"
        )


class TestNbdServer(Kit):
    sizes: ClassVar[tuple[int, ...]] = (1024, 1 * MiB, 3 * MiB + 1024)

    def start(self, image: Path, path: Path) -> Peer:
        return nbd_peers.nbd_server(self.program("nbd-server"), image, path)


class TestOurselves(DriverKit):
    """Our own server, in this process: both ends of the protocol are ours, extended headers too."""

    @pytest.fixture(autouse=True)
    async def _server(self, short_tmp: Path) -> AsyncIterator[None]:
        async with serving(short_tmp) as served:
            self.served = served
            yield

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        name = f"d{size}"
        if name not in self.served.drivers:
            await self.served.add(name, bytes(size))
        node = await add(graph, upstream(self.served.path, name), read_only=read_only)
        assert isinstance(self.served.drivers[name], MemoryDriver)
        return node

    async def test_closing_leaves_no_descriptor(self, typical: int) -> None:
        """As in the kit; the server's end of each connection is in this process too."""
        await self.build(typical)
        await remove_all(self.graph)
        await until(lambda: not self.served.server.sessions)
        before = open_descriptors()
        for _ in range(3):
            await read(await self.build(typical), 0, 10)
            await remove_all(self.graph)

        await until(lambda: open_descriptors() == before)


# --- nbdkit's faults -----------------------------------------------------------------------------


@pytest.fixture
def graph() -> Graph:
    return Graph()


async def test_errors_of_the_server_are_errors_of_the_request(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs
) -> None:
    image = make_image(tmp_path / "image", 1 * MiB)
    path = short_tmp / "s"
    peer = nbd_peers.nbdkit(
        *(program("nbdkit"), image, path, "--filter=error"),
        *("error-pread=EIO", "error-pwrite=ENOSPC", "error-trim=EPERM", "error-rate=100%"),
    )
    try:
        node = await add(graph, upstream(path))
        assert await fails(node.read(0, memoryview(bytearray(10)))) == errno.EIO
        assert await fails(node.write(0, memoryview(b"x"), fua=False)) == errno.ENOSPC
        assert await fails(node.discard(0, 4096)) == errno.EPERM
        assert await fails(node.block_status(0, 4096)) == errno.EIO
    finally:
        await remove_all(graph)
        peer.stop()


async def test_errors_at_times_never_give_wrong_bytes(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs, rng: random.Random
) -> None:
    content = rng.randbytes(1 * MiB)
    image = tmp_path / "image"
    image.write_bytes(content)
    peer = nbd_peers.nbdkit(
        program("nbdkit"), image, short_tmp / "s", "--filter=error", "error-pread-rate=30%"
    )
    failed = 0
    try:
        node = await add(graph, upstream(short_tmp / "s"))

        async def reader(choice: random.Random) -> None:
            nonlocal failed
            for _ in range(60):
                offset = choice.randrange(len(content))
                view = memoryview(bytearray(1 + choice.randrange(len(content) - offset)))
                if await fails(background(node.read(offset, view))):
                    failed += 1
                else:
                    assert view == content[offset : offset + len(view)]

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(reader(random.Random(rng.random())))
    finally:
        await remove_all(graph)
        peer.stop()
    assert 0 < failed < 480


async def test_server_that_insists_on_a_block_size_is_told_of_none(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs
) -> None:
    """qemu-nbd serves unaligned ranges to who has not promised otherwise."""
    image = make_image(tmp_path / "image", 1 * MiB)
    options = f"driver=blkdebug,align=512,image.driver=file,image.filename={image}"
    command = (
        program("qemu-nbd"),
        "-t",
        "-e8",
        "-x",
        "x",
        "-k",
        short_tmp / "s",
        "--image-opts",
        options,
    )
    peer = Peer(*command)
    try:
        node = await add(graph, upstream(short_tmp / "s"))
        await node.write(5, memoryview(b"unaligned"), fua=False)
        assert await read(node, 3, 13) == b"\0\0unaligned\0\0"
    finally:
        await remove_all(graph)
        peer.stop()


# --- what goes over the wire: a scripted server --------------------------------------------------


async def sent_by(
    short_tmp: Path, flags: int, do: Callable[[Node], object], **more: int
) -> list[tuple[int, int, int, int]]:
    """Return (command, flags, offset, length) of the requests that `do` with the node makes."""
    backend = Backend(export(size=8 << 30, flags=c.NBD_FLAG_HAS_FLAGS | flags, **more))
    graph = Graph()
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s"))
        result = do(node)
        if asyncio.iscoroutine(result):
            await result
        await remove_all(graph)
    return [request for request in backend.requests if request[0] != c.NBD_CMD_DISC]


def zero(length: int, *, fua: bool = False, unmap: bool = True, fast: bool = False):
    return lambda node: node.driver.write_zeroes(
        0, length, fua=fua, may_unmap=unmap, no_fallback=fast
    )


FLUSH, FUA, TRIM = c.NBD_FLAG_SEND_FLUSH, c.NBD_FLAG_SEND_FUA, c.NBD_FLAG_SEND_TRIM
ZEROES, FAST = c.NBD_FLAG_SEND_WRITE_ZEROES, c.NBD_FLAG_SEND_FAST_ZERO
WRITE = c.NBD_CMD_WRITE


@pytest.mark.parametrize(
    ("flags", "do", "expected"),
    [
        (0, lambda node: node.flush(), []),
        (FLUSH, lambda node: node.flush(), [(c.NBD_CMD_FLUSH, 0, 0, 0)]),
        (FUA, lambda node: node.write(1, memoryview(b"x"), fua=True), [(WRITE, 1, 1, 1)]),
        (FUA, lambda node: node.write(1, memoryview(b"x"), fua=False), [(WRITE, 0, 1, 1)]),
        (
            FLUSH,
            lambda node: node.write(1, memoryview(b"x"), fua=True),
            [(WRITE, 0, 1, 1), (c.NBD_CMD_FLUSH, 0, 0, 0)],
        ),
        (0, lambda node: node.discard(0, 5), []),
        (TRIM, lambda node: node.discard(0, 5), [(c.NBD_CMD_TRIM, 0, 0, 5)]),
        (
            TRIM,
            lambda node: node.discard(1, 3 << 29),
            [(c.NBD_CMD_TRIM, 0, 1, 1 << 30), (c.NBD_CMD_TRIM, 0, 1 + (1 << 30), 1 << 29)],
        ),
        (ZEROES, zero(5), [(c.NBD_CMD_WRITE_ZEROES, 0, 0, 5)]),
        (ZEROES, zero(5, unmap=False), [(c.NBD_CMD_WRITE_ZEROES, 2, 0, 5)]),
        (ZEROES | FAST, zero(5, fast=True), [(c.NBD_CMD_WRITE_ZEROES, 16, 0, 5)]),
        (ZEROES | FUA, zero(5, fua=True), [(c.NBD_CMD_WRITE_ZEROES, 1, 0, 5)]),
        (
            ZEROES | FLUSH,
            zero(5, fua=True),
            [(c.NBD_CMD_WRITE_ZEROES, 0, 0, 5), (c.NBD_CMD_FLUSH, 0, 0, 0)],
        ),
    ],
)
async def test_verbs_use_what_is_offered(
    short_tmp: Path,
    flags: int,
    do: Callable[[Node], object],
    expected: list[tuple[int, int, int, int]],
) -> None:
    assert await sent_by(short_tmp, flags, do) == expected


@pytest.mark.parametrize(("flags", "fast"), [(0, False), (FAST, True), (ZEROES, True)])
async def test_zeroing_that_is_not_offered_is_enotsup(
    short_tmp: Path, flags: int, fast: bool
) -> None:
    async def do(node: Node) -> None:
        assert await fails(zero(5, fast=fast)(node)) == errno.ENOTSUP

    assert await sent_by(short_tmp, flags, do) == []


async def test_requests_are_cut_to_the_servers_maximum(short_tmp: Path) -> None:
    async def do(node: Node) -> None:
        await node.write(1, memoryview(bytes(10_000)), fua=False)
        assert await read(node, 0, 4097) == bytes(4097)

    requests = await sent_by(short_tmp, 0, do, maximum=4096)

    assert requests == [
        *((WRITE, 0, 1, 4096), (WRITE, 0, 4097, 4096), (WRITE, 0, 8193, 1808)),
        *((c.NBD_CMD_READ, 0, 0, 4096), (c.NBD_CMD_READ, 0, 4096, 1)),
    ]


async def test_text_of_the_server_is_shown_without_its_control_characters(
    graph: Graph, short_tmp: Path
) -> None:
    backend = Backend(export(), error=(c.NBD_ESHUTDOWN, b"go\x1b[2Jaway"))
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s"))
        with pytest.raises(IoError, match=r"go\\x1b\[2Jaway") as caught:
            await node.flush()
        assert caught.value.errno == errno.ESHUTDOWN
        assert caught.value.wire_errno == errno.EIO, "that it goes away is no news of us"
        assert "go" not in caught.value.public
        await remove_all(graph)


# --- block status --------------------------------------------------------------------------------


@pytest.mark.parametrize("extended", [False, True])
async def test_status_is_that_of_the_server(graph: Graph, short_tmp: Path, extended: bool) -> None:
    status = [(10, 0), (20, 1), (30, 2), (1 << 20, 3)]
    backend = Backend(export(size=1 << 20), extended=extended, status=status)
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s"))
        found = await node.block_status(100, 1000)
        await remove_all(graph)

    assert found == [
        *(Extent(100, 10, DATA), Extent(110, 20, HOLE), Extent(130, 30, ZERO)),
        Extent(160, (1 << 20) - 160, HOLE | ZERO),  # the node ends there, whatever the server says
    ]


async def test_status_of_more_than_32_bits(graph: Graph, short_tmp: Path) -> None:
    size = 1 << 50
    for extended, asked in ((True, size), (False, (4 << 30) - 64 * KiB)):
        backend = Backend(export(size=size), extended=extended, status=[(asked, 3)])
        async with backend.serving(short_tmp / "s"):
            node = await add(graph, upstream(short_tmp / "s"))
            assert await node.block_status(0, size) == [Extent(0, asked, HOLE | ZERO)]
            await remove_all(graph)
        assert backend.requests[0] == (c.NBD_CMD_BLOCK_STATUS, 0, 0, asked)


async def test_without_metadata_contexts_all_is_data(graph: Graph, short_tmp: Path) -> None:
    backend = Backend(export(size=1 << 20), contexts=())
    async with backend.serving(short_tmp / "s"):
        node = await add(graph, upstream(short_tmp / "s"))
        assert await node.block_status(5, 100) == [Extent(5, 100, DATA)]
        await remove_all(graph)


async def test_dirty_bitmap_takes_the_place_of_allocation(
    graph: Graph, tmp_path: Path, short_tmp: Path, program: Programs
) -> None:
    """Against qemu-nbd: what is dirty is called a hole, as QEMU's own driver does."""
    image = tmp_path / "image.qcow2"
    run(program("qemu-img"), "create", "-f", "qcow2", image, "1M")
    run(program("qemu-img"), "bitmap", "--add", "-g", "64K", image, "b0")
    run(program("qemu-io"), "-c", "write 128k 64k", image)
    peer = Peer(
        *(program("qemu-nbd"), "-t", "-e8", "-r", "-f", "qcow2", "-B", "b0", "-x", "x"),
        *("-k", short_tmp / "s", image),
    )
    try:
        bitmap = "qemu:dirty-bitmap:b0"
        node = await add(graph, upstream(short_tmp / "s", bitmap=bitmap), read_only=True)
        assert merge(await node.block_status(0, 1 * MiB)) == [
            *(Extent(0, 128 * KiB, DATA), Extent(128 * KiB, 64 * KiB, HOLE)),
            Extent(192 * KiB, 832 * KiB, DATA),
        ]
        other = upstream(short_tmp / "s", bitmap="qemu:dirty-bitmap:none")
        with pytest.raises(CommandError, match=r"x-dirty-bitmap .* not found"):
            await add(graph, other, read_only=True)
    finally:
        await remove_all(graph)
        peer.stop()


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=30)


# --- opening -------------------------------------------------------------------------------------


async def test_read_only_export_needs_a_read_only_node(graph: Graph, short_tmp: Path) -> None:
    backend = Backend(export(flags=c.NBD_FLAG_HAS_FLAGS | c.NBD_FLAG_READ_ONLY))
    async with backend.serving(short_tmp / "s"):
        with pytest.raises(CommandError, match="the export is read-only"):
            await add(graph, upstream(short_tmp / "s"))
        node = await add(graph, upstream(short_tmp / "s"), read_only=True)
        assert len(await read(node, 0, 10)) == 10
        await remove_all(graph)
    assert not list(graph)


async def test_read_only_export_stays_so_when_its_node_is_reopened(
    graph: Graph, short_tmp: Path
) -> None:
    options = {
        "driver": "nbd",
        "node-name": "n",
        "server": {"type": "unix", "path": str(short_tmp / "s")},
        "read-only": True,
    }
    backend = Backend(export(flags=c.NBD_FLAG_HAS_FLAGS | c.NBD_FLAG_READ_ONLY))
    async with backend.serving(short_tmp / "s"):
        node = await add_from_options(graph, options)
        await reopen(graph, [options])
        with pytest.raises(CommandError, match="the export is read-only"):
            await reopen(graph, [{**options, "read-only": False}])
        assert node.read_only


async def test_there_are_no_children() -> None:
    driver = upstream("/x")
    with pytest.raises(AssertionError):
        driver.child_permissions(Child("file", Role.DATA, None, None, perm=0, shared=0), 0, 0)  # type: ignore[arg-type]


async def test_many_requests_are_in_flight_at_once(graph: Graph, short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = await add(graph, upstream(served.path, "disk"))
        served.disk.hold.add("write")
        running = [
            background(node.write(at * 4096, memoryview(bytes(4096)), fua=False))
            for at in range(40)
        ]
        await until(lambda: served.disk.waiting.get("write", 0) == 40)
        await turns(5)
        assert node.in_flight == 40
        served.disk.held.set()
        for each in running:
            await each
        await remove_all(graph)
