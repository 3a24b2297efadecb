"""Put a point back: into a raw file, a block device, or an export of an NBD server, with holes.

A file is written under its `.partial` name and gets its own when it is complete, synced and, if
that was asked for, checked; an existing one is as it was until then. A device or an export is
written in place.

Everything about the backup's own files blocks, and runs in a thread beside the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.backup import chain
from nbdfleece.backup.errors import BackupError, NoBackup, WouldOverwrite
from nbdfleece.backup.files import Files, allow_open
from nbdfleece.backup.folder import DiskFolder, disks
from nbdfleece.backup.image import Image
from nbdfleece.backup.layers import Layers
from nbdfleece.backup.names import MANIFEST, PARTIAL, time_prefix
from nbdfleece.backup.prune import check_hashes
from nbdfleece.backup.verify import check_image
from nbdfleece.base.disk_argument import is_nbd_uri
from nbdfleece.base.errors import ConfigError, IoError
from nbdfleece.base.extent import ZERO
from nbdfleece.base.limits import BACKUP_WRITES, JOB_STATUS_PIECE
from nbdfleece.block import permissions
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.host_device import HostDeviceDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.nbd.driver import NbdDriver
from nbdfleece.block.drivers.nbd.uri import parse_nbd_uri
from nbdfleece.block.graph import Graph

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from nbdfleece.backup.manifest import Point
    from nbdfleece.block.child import Child
    from nbdfleece.block.driver import Driver
    from nbdfleece.block.node import Node

_FILE_MODE: Final = 0o600
_OPEN_TIMEOUT_S: Final = 0.0  # an NBD server is there, or it is not


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be restored: DIR[/DISK][@INSTANT], understood.

    Attributes:
        folder: DIR/DISK.
        instant: What the point's name begins with; empty: the newest.
    """

    folder: Path
    instant: str


def parse_source(text: str) -> Source:
    """Understand DIR[/DISK][@INSTANT].

    Raises:
        ConfigError: The instant makes no sense, or there are several disks and none is named.
        NoBackup: There is no backup.
    """
    path, instant = Path(text), ""
    if not path.exists() and "@" in text:
        before, _, after = text.rpartition("@")
        path, instant = Path(before), time_prefix(after)
    if not (path / MANIFEST).exists():
        found = disks(path)
        if len(found) > 1:
            raise ConfigError(f"'{path}' has several disks ({', '.join(found)}): say {path}/DISK")
        path = path / found[0]
    return Source(path, instant)


def find_point(folder: DiskFolder, instant: str) -> Point:
    """Return the newest point, or the one that `instant` means.

    Raises:
        NoBackup: There is none, or there are several.
    """
    found = [point for point in folder.manifest.points if point.name.startswith(instant)]
    exact = [point for point in found if point.name == instant]
    if not found:
        known = ", ".join(point.name for point in folder.manifest.points[-3:]) or "none"
        what = f"no point {instant}" if instant else "no point in time"
        raise NoBackup(f"'{folder.path}' has {what} (the newest: {known})")
    if instant and len(found) > 1 and not exact:
        raise NoBackup(f"'{folder.path}' has {len(found)} points that begin with {instant}")
    return exact[0] if exact else found[-1]


async def restore(
    source: Source, destination: str, *, force: bool, check: bool, tell: Callable[[int, int], None]
) -> Point:
    """Put a point back.

    Args:
        source: Which one.
        destination: A path, or an NBD URI.
        force: Overwrite what is there.
        check: Read and hash all of each file of the point; fail unless all are as written.
        tell: Told of (bytes of the disk that are done, bytes of the disk).

    Returns:
        The point.

    Raises:
        NoBackup: There is no such point.
        WouldOverwrite: Something is there, and no `force`.
        Damaged: A file of the backup is. A destination in place holds part of the point.
        BackupError, IoError, CommandError: Reading or writing failed; likewise.

    Cancel: as a failure.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(DiskFolder(source.folder, for_change=False))
        point = find_point(folder, source.instant)
        lineage = chain.lineage(folder.manifest, point)
        allow_open(len(lineage))
        images = []
        for below in lineage:
            images.append(stack.enter_context(Image(folder.file(below))))
            check_image(folder, below, images[-1])
        layers = Layers(images, check=check)
        async with _opened(destination, point.size, force=force) as target:
            await _copy(layers, target, point.size, tell)
            if check:
                check_hashes(folder, tuple(lineage), layers.hashes())
        return point


@dataclass(frozen=True, slots=True)
class _Target:
    """Where to write. `is_zero`: it reads as zeroes where nothing has been written."""

    node: Node
    is_zero: bool


class _Owner:
    """The parent of the target's node: keeps other programs from writing."""

    def describe_parent(self) -> str:
        return "restore"

    def child_attached(self, edge: Child) -> None: ...

    def child_detached(self, edge: Child) -> None: ...

    def drained_begin(self) -> None: ...

    def drained_end(self) -> None: ...

    def is_idle(self) -> bool:
        return True

    async def wait_idle(self) -> None: ...


@contextlib.asynccontextmanager
async def _opened(destination: str, size: int, *, force: bool) -> AsyncIterator[_Target]:
    """Open the destination; complete it when the block ends well."""
    if is_nbd_uri(destination):
        driver = NbdDriver(
            parse_nbd_uri(destination), reconnect_delay_s=0, open_timeout_s=_OPEN_TIMEOUT_S
        )
        async with _node(driver) as node:
            _check_size(destination, node.size, size)
            is_zero = await _reads_zero(node, size)
            if not force and not is_zero:
                raise WouldOverwrite(f"'{destination}' is not empty; --force overwrites it")
            yield _Target(node, is_zero)
            await node.flush()
        return
    path = Path(destination)
    status = _status(path)
    if status is not None and stat.S_ISBLK(status.st_mode):
        if not force:
            raise WouldOverwrite(f"'{path}' is a block device; --force overwrites it")
        device = HostDeviceDriver(filename=destination, locking=Locking.AUTO, cache_direct=False)
        async with _node(device) as node:
            _check_size(destination, node.size, size)
            yield _Target(node, is_zero=False)
            await node.flush()
        return
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"'{path}' is neither a file nor a block device")
    if status is not None and not force:
        raise WouldOverwrite(f"'{path}' exists; --force overwrites it")
    async with _new_file(path, size, status) as target:
        yield target


@contextlib.asynccontextmanager
async def _new_file(path: Path, size: int, old: os.stat_result | None) -> AsyncIterator[_Target]:
    """Make a file that takes its name when it is complete; mode and owner are those of `old`.

    It is locked before it is emptied, and until it has its name: another restore may be at it.
    """
    partial = _beside(path)
    if old is not None:
        await _check_unused(path)
    _make(partial)
    driver = FileDriver(
        filename=str(partial), locking=Locking.AUTO, cache_direct=False, new_and_sparse=True
    )
    async with _node(driver) as node:
        _check_same(partial, driver)
        try:
            for length in (0, size):
                await node.truncate(length)
            yield _Target(node, is_zero=True)
            await node.flush()
            _complete(partial, path, old)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _check_same(path: Path, driver: FileDriver) -> None:
    """Check that a name still leads to the open file.

    Raises:
        BackupError: The file got another name before it was locked here.
    """
    opened = driver.plain_file()
    assert opened is not None, "just opened"
    found = _status(path)
    if found is None or not os.path.samestat(found, os.fstat(opened.fd)):
        raise BackupError(f"'{path}' is being written by another restore")


def _beside(path: Path) -> Path:
    """Return where the file is made: in the folder that its name leads to."""
    final = path.resolve()
    return final.with_name(final.name + PARTIAL)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BackupError(f"'{path}': {error.strerror}") from error


def _complete(partial: Path, path: Path, old: os.stat_result | None) -> None:
    """Give a complete file its name; where that is a symbolic link, the name it leads to."""
    final = path.resolve()
    try:
        if old is not None:
            partial.chmod(stat.S_IMODE(old.st_mode))
            with contextlib.suppress(PermissionError):
                os.chown(partial, old.st_uid, old.st_gid)
        partial.replace(final)
        Files().sync_folder(final.parent)
    except OSError as error:
        raise BackupError(f"'{path}': {error.strerror}") from error


async def _check_unused(path: Path) -> None:
    """Check that nobody serves or runs the file that is to be replaced.

    Raises:
        InUse: Somebody does.
    """
    driver = FileDriver(
        filename=str(path), locking=Locking.AUTO, cache_direct=False, new_and_sparse=False
    )
    async with _node(driver):
        pass


def _make(path: Path) -> None:
    """Make a file, unless it is there."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE))
    except OSError as error:
        raise BackupError(f"create '{path}': {error.strerror}") from error


@contextlib.asynccontextmanager
async def _node(driver: Driver) -> AsyncIterator[Node]:
    """Open a driver in a graph of its own, for this program alone."""
    graph = Graph()
    node = await graph.add(None, driver, read_only=False, discard_enabled=True)
    try:
        edge = graph.attach_root(
            "destination", _Owner(), node, perm=permissions.WRITE, shared=permissions.NONE
        )
    except BaseException:
        await graph.remove(node)
        raise
    try:
        yield node
    except BaseException:
        graph.detach_root(edge)
        await graph.remove(node)
        raise
    graph.detach_root(edge)
    await graph.remove(node)


def _check_size(destination: str, found: int, size: int) -> None:
    if found < size:
        raise BackupError(f"'{destination}' has {found} bytes, and the disk needs {size}")


async def _reads_zero(node: Node, size: int) -> bool:
    """Tell whether the start of a node is known to read as zeroes."""
    offset = 0
    while offset < size:
        try:
            found = await node.block_status(offset, min(JOB_STATUS_PIECE, size - offset))
        except IoError:
            return False
        if not all(extent.flags & ZERO for extent in found):
            return False
        offset = found[-1].end
    return True


# --- copying -------------------------------------------------------------------------------------


async def _copy(
    layers: Layers, target: _Target, size: int, tell: Callable[[int, int], None]
) -> None:
    """Write what the files hold, and zeroes where they hold nothing.

    Raises:
        BackupError, IoError: It failed.
    """
    source = _with_gaps(layers, size)
    free = asyncio.Semaphore(BACKUP_WRITES)
    try:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await free.acquire()
                piece = await asyncio.to_thread(next, source, None)
                if piece is None:
                    return
                tasks.create_task(_write(target, *piece, free), name="restoring")
                tell(piece[0] + piece[1], size)
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


async def _write(
    target: _Target, offset: int, length: int, data: bytes | None, free: asyncio.Semaphore
) -> None:
    try:
        if data is not None:
            await target.node.write(offset, memoryview(data), fua=False)
        elif not target.is_zero:
            await target.node.write_zeroes(
                offset, length, fua=False, may_unmap=True, no_fallback=False
            )
    finally:
        free.release()


def _with_gaps(layers: Layers, size: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (offset, length, data or None for zeroes) of the whole disk; zeroes are joined."""
    at = 0  # what is before this has been yielded
    for offset, length, data in layers.pieces():
        if data is None:
            continue
        yield from _zeroes(at, offset)
        at = min(offset + length, size)
        yield offset, at - offset, bytes(data[: at - offset])
    yield from _zeroes(at, size)


def _zeroes(start: int, end: int) -> Iterator[tuple[int, int, None]]:
    while start < end:
        length = min(JOB_STATUS_PIECE, end - start)
        yield start, length, None
        start += length
