"""New images (blockdev-create): a file, or a format inside of a node that is there already.

A new format needs a function that takes the options of QEMU's BlockdevCreateOptions, without
`driver`, and a line in CREATORS.

Follows: QEMU qapi/block-core.json (BlockdevCreateOptions), block/create.c, block/file-posix.c.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.base.limits import JOB_STATUS_PIECE, MAX_SIZE, ZERO_PIECE
from nbdfleece.block import permissions as perms
from nbdfleece.block.drivers.locks import ImageLocks, can_lock
from nbdfleece.block.graph import truncate
from nbdfleece.block.registry import add_from_options
from nbdfleece.datapath.workers import Lane
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.create import NewImage, image_length, image_pieces

if TYPE_CHECKING:
    from nbdfleece.block.child import Child
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node

T = TypeVar("T")
Creator = Callable[["Graph", Mapping[str, object]], Awaitable[None]]

_MODE: Final = 0o644  # as QEMU; the umask takes from it


async def create(graph: Graph, driver: str, options: Mapping[str, object]) -> None:
    """Make an image.

    Args:
        graph: Where nodes that the options name are.
        driver: The format.
        options: Checked against the declared types.

    Raises:
        CommandError: It cannot be made, or nothing makes such images. A file that there was may
            have lost its content; one that there was not is gone again.
        IoError: Writing it failed; as above.

    Cancel: as after an error; a file goes on being filled until its piece is done.
    """
    creator = find_creator(driver)
    await creator(graph, options)


def find_creator(driver: str) -> Creator:
    """Return what makes images of a format.

    Raises:
        CommandError: Nothing does.
    """
    creator = CREATORS.get(driver)
    if creator is None:
        raise CommandError("Driver does not support blockdev-create")
    return creator


async def create_overlay(
    graph: Graph, driver: str, filename: str, size: int, backing: tuple[str, str]
) -> None:
    """Make an image in a new file that names what is behind it, as blockdev-snapshot-sync does.

    Args:
        graph: The nodes.
        driver: The format.
        filename: The new file.
        size: Bytes of the disk.
        backing: Its file name, and its format.

    Raises:
        CommandError: It cannot be made. A new file is gone again.
        IoError: Writing it failed; as above.
    """
    creator = find_creator(driver)
    if driver == "file":
        raise CommandError(f"Format driver '{driver}' does not support backing images")
    is_new = not await _in_thread(lambda: os.path.lexists(filename))
    await _file(graph, {"filename": filename, "size": 0})
    try:
        await creator(
            graph,
            {
                "file": {"driver": "file", "filename": filename},
                "size": size,
                "backing-file": backing[0],
                "backing-fmt": backing[1],
            },
        )
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                await _in_thread(lambda: os.unlink(filename))
        raise


# --- files -------------------------------------------------------------------------------------


async def _file(_graph: Graph, options: Mapping[str, object]) -> None:
    """Make a file of zeroes, or make one that there is a file of zeroes."""
    filename, size = str(options["filename"]), _size(options)
    mode = str(options.get("preallocation", "off"))
    if mode == "metadata":
        raise CommandError("Unsupported preallocation mode: metadata")
    await _in_thread(lambda: _make_file(filename, size, mode))


async def _in_thread(call: Callable[[], T]) -> T:
    """Await a call in a thread of its own: a dead file system, or a large file, may keep it."""
    lane = Lane("creating an image", 1)
    try:
        return await lane.submit(call)
    finally:
        lane.close()


def _make_file(filename: str, size: int, mode: str) -> None:
    is_new = not os.path.lexists(filename)
    try:
        fd = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise CommandError(f"Could not create '{filename}': {error.strerror}") from error
    except ValueError as error:  # a zero byte, or no valid text
        raise CommandError(f"Could not create {filename!a}: not a file name") from error
    try:
        _fill_file(fd, filename, size, mode)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                os.unlink(filename)
        raise
    finally:
        os.close(fd)


def _fill_file(fd: int, filename: str, size: int, mode: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise CommandError(f"'file' driver requires '{filename}' to be a regular file")
    if can_lock(fd):
        # Nobody who counts on the content, or on the size, may have it open.
        ImageLocks(fd, filename).check(perms.WRITE | perms.RESIZE, perms.ALL & ~perms.RESIZE)
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        if mode != "off" and size:
            os.posix_fallocate(fd, 0, size)
        if mode == "full":
            _write_zeroes(fd, size)
    except OSError as error:
        raise CommandError(f"Could not resize file '{filename}': {error.strerror}") from error


def _write_zeroes(fd: int, size: int) -> None:
    zeroes = bytes(min(size, ZERO_PIECE))
    offset = 0
    while offset < size:
        offset += os.pwrite(fd, zeroes[: size - offset], offset)
    os.fsync(fd)


# --- formats in nodes --------------------------------------------------------------------------


class _Maker:
    """Who makes an image in a node, as a parent of that node (block.child.Parent)."""

    def describe_parent(self) -> str:
        return "an image that is being made"

    def child_attached(self, edge: Child) -> None: ...

    def child_detached(self, edge: Child) -> None: ...

    def drained_begin(self) -> None: ...

    def drained_end(self) -> None: ...

    def is_idle(self) -> bool:
        return True

    async def wait_idle(self) -> None: ...


@asynccontextmanager
async def _storage(graph: Graph, reference: object) -> AsyncIterator[Node]:
    """Hold the node that an image is to be made in: by name, or by options for the time being.

    Raises:
        CommandError: There is no such node, or others use it.
    """
    if not isinstance(reference, Mapping):
        found = graph.get(str(reference))
        if found is None:
            raise CommandError(f"Cannot find device='{reference}' nor node-name='{reference}'")
        with _held(graph, found):
            yield found
        return
    node = await add_from_options(graph, reference, needs_name=False)
    try:
        with _held(graph, node):
            yield node
    except BaseException:
        await graph.remove(node)
        raise
    await graph.remove(node)


@contextlib.contextmanager
def _held(graph: Graph, node: Node) -> Iterator[None]:
    """Let nobody else write the node, or count on its size."""
    perm = perms.CONSISTENT_READ | perms.WRITE | perms.RESIZE
    shared = perms.ALL & ~(perms.WRITE | perms.RESIZE)
    edge = graph.attach_root("root", _Maker(), node, perm=perm, shared=shared)
    try:
        yield
    finally:
        graph.detach_root(edge)


async def _write_image(
    node: Node, length: int, pieces: Iterator[tuple[int, bytes]], mode: str
) -> None:
    """Make a node a file of zeroes but for some pieces; the first, with the header, comes last.

    Of a preallocated image there are too many to have them in memory.
    """
    header_at, header = next(pieces)
    if node.size:
        await truncate(node, 0)
    await truncate(node, length)
    if mode in ("falloc", "full"):
        try:
            await _allocate(node, length, is_full=mode == "full")
        except IoError as error:
            raise CommandError(f"Could not resize underlying file: {error}") from error
    for offset, data in pieces:
        await node.write(offset, memoryview(data), fua=False)
    await node.flush()  # so that there is no image before there is all of it
    await node.write(header_at, memoryview(header), fua=False)
    await node.flush()


async def _allocate(node: Node, length: int, *, is_full: bool) -> None:
    """Give space to all of a node that reads as zeroes; `is_full`: by writing it.

    Raises:
        IoError: There is not so much.
    """
    zeroes = memoryview(bytes(ZERO_PIECE))
    offset = 0
    while offset < length:
        piece = min(ZERO_PIECE if is_full else JOB_STATUS_PIECE, length - offset)
        if is_full:
            await node.write(offset, zeroes[:piece], fua=False)
        else:
            await node.write_zeroes(offset, piece, fua=False, may_unmap=False, no_fallback=False)
        offset += piece


async def _qcow2(graph: Graph, options: Mapping[str, object]) -> None:
    """Make a qcow2 image in a node."""
    backing, compression = options.get("backing-file"), options.get("compression-type", "zlib")
    preallocation = str(options.get("preallocation", "off"))
    image = NewImage(
        size=_size(options),
        cluster_size=_integer(options, "cluster-size", 65536),
        version=2 if options.get("version") == "v2" else 3,
        refcount_bits=_integer(options, "refcount-bits", 16),
        extended_l2=options.get("extended-l2") is True,
        lazy_refcounts=options.get("lazy-refcounts") is True,
        compression_type=h.ZSTD if compression == "zstd" else h.ZLIB,
        backing_file=None if backing is None else str(backing),
        backing_format=str(options["backing-fmt"]) if "backing-fmt" in options else None,
        preallocate=preallocation != "off",
    )
    try:
        length = image_length(image)
        next(image_pieces(image))  # the header: do backing file and all fit into it?
    except ImageError as error:
        raise CommandError(str(error)) from error
    async with _storage(graph, options["file"]) as node:
        try:
            await _write_image(node, length, image_pieces(image), preallocation)
        except IoError as error:
            raise CommandError(f"Could not write qcow2 header: {error}") from error


def _size(options: Mapping[str, object]) -> int:
    size = _integer(options, "size", 0)
    if size > MAX_SIZE:
        raise CommandError("Image size must be less than 8 EiB")
    return size


def _integer(options: Mapping[str, object], name: str, default: int) -> int:
    value = options.get(name, default)
    assert isinstance(value, int), "checked by the schema"
    return value


CREATORS: Final[Mapping[str, Creator]] = MappingProxyType({"file": _file, "qcow2": _qcow2})
