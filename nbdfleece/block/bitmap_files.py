"""Persistent bitmaps of a disk, kept in files beside it: STATE/DISK/bitmaps/NAME.

They survive the death of the process: a bit is in its file before the write that it stands for
begins. They do not survive a power cut, nor a change of the disk by others: then they are
inconsistent, with the reason, and never used.

Invariants (formats.bitmap_file says what is in a file)
  K1  A file in use is not `clean`; that is on stable storage before the first write of a guest.
  K2  What a file holds is never less than the bitmap, united with its successor: `settle` takes out
      of it, in place, what is in neither, and whatever has been done of that when the process dies
      is no error.
  K3  A file that was found inconsistent stays so.
  K4  No guest's write, or flush, begins later than the header says that the disk was last changed.
  K5  A file that is not all there yet, or that lacks a mark, says that it cannot be trusted. If not
      even that can be written it is cut, and found damaged.

Marks are plain writes to the page cache, in the event loop's thread: a microsecond for each granule
that becomes dirty, nothing for one that is.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote, unquote

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import MAX_BITMAP_NAME
from nbdfleece.base.units import ceil_div
from nbdfleece.block.bitmap import DirtyBitmap, default_granularity
from nbdfleece.formats.bitmap_file import (
    HEADER_SIZE,
    BodySum,
    Header,
    UnknownVersion,
    judge,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbdfleece.block.bitmap import BitmapKeeper
    from nbdfleece.block.node import Node

_log = logging.getLogger(__name__)

_PAGE: Final = 16384  # granules that DirtyBitmap.states tells of at a time
_ONES: Final = b"\1" * _PAGE
_NORMAL: Final = bytes(1) + b"\1" * 255  # whatever is not 0 is dirty
_AHEAD_NS: Final = 3_000_000_000  # K4: the header's time is that far in the future,
_RENEW_S: Final = 1.0  # and renewed when it is older than this
_SETTLE_PAGES: Final = 64  # settled in one turn of the loop: a millisecond or two
_LONGEST_NAME: Final = 200  # bytes of a file's name


class _Settling(NamedTuple):
    """A bitmap, and the first granules of the pages of its file that are to be looked at."""

    bitmap: DirtyBitmap
    bases: deque[int]


class BitmapFile:
    """The file of one bitmap, open (block.bitmap.BitmapStore).

    Args:
        path: Where it is.
        fd: It, open; owned.
        header: What it says.

    Attributes:
        path: Where it is.
        renew_at: See BitmapStore.
    """

    def __init__(self, path: Path, fd: int, header: Header) -> None:
        self.path = path
        self._fd = fd
        self._header = header
        self.renew_at = 0.0
        self._settling: _Settling | None = None  # what is left of a `settle`
        self._lock = threading.Lock()  # of that: `finish` is called in a thread

    # --- block.bitmap.BitmapStore ----------------------------------------------------------------

    def renew(self) -> None:
        """Keep K4; see BitmapStore.renew."""
        self.renew_at = time.monotonic() + _RENEW_S
        self._write_header(replace(self._header, mtime_ns=time.time_ns() + _AHEAD_NS))

    def record(self, first: int, last: int) -> None:
        """Make granules dirty; see BitmapStore.record."""
        if self._header.broken or (self._header.all_dirty and self._settling is None):
            return
        if first == 0 and last >= self._count and last > _PAGE:
            self.hold()
            if not self._write_header(replace(self._header, all_dirty=True)):
                self.abandon("its header could not be written")
            return
        try:
            while first < last:
                count = min(last - first, _PAGE)
                _write(self._fd, _ONES[:count], HEADER_SIZE + first)
                first += count
        except OSError as error:
            self.abandon(f"it could not be written: {_says(error)}")

    def settle(self, bitmap: DirtyBitmap) -> None:
        """Take out what is not dirty any more (K2); see BitmapStore.settle.

        The file of a large disk is long: what is not done at once is done little by little in the
        loop, which must be running. Each page becomes what is dirty at that moment.
        """
        if self._header.broken:
            return
        if self._header.recording != bitmap.recording:
            self._write_header(replace(self._header, recording=bitmap.recording))
        try:
            bases = set(self._data_bases())
        except OSError as error:
            self.abandon(f"it could not be read: {_says(error)}")
            return
        if self._header.all_dirty:  # the file need not have what is dirty
            bases.update(bitmap.bases())
            if bitmap.successor is not None:
                bases.update(bitmap.successor.bases())
        with self._lock:
            self._settling = _Settling(bitmap, deque(sorted(bases)))
        self._settle_some()

    def hold(self) -> None:
        """Take nothing out any more; see BitmapStore.hold."""
        with self._lock:
            self._settling = None

    def settle_rest(self) -> None:
        """Do at once what is left of a `settle`; may block."""
        while self._settle_pages():
            pass

    def _settle_some(self) -> None:
        """Settle some pages, and come again for others."""
        if self._settle_pages():
            asyncio.get_running_loop().call_soon(self._settle_some)

    def _settle_pages(self) -> bool:
        """Settle some pages; tell whether others are left."""
        with self._lock:
            settling = self._settling
            if settling is None or self._header.broken:
                return False
            bitmap, bases = settling
            try:
                for _ in range(min(_SETTLE_PAGES, len(bases))):
                    base = bases.popleft()
                    now = _united(bitmap, base)
                    if self._read(base, len(now)) != now:
                        _write(self._fd, now, HEADER_SIZE + base)
            except OSError as error:
                self.abandon(f"it could not be written: {_says(error)}")
                return False
            if bases:
                return True
            self._settling = None
            if self._header.all_dirty:
                self._write_header(replace(self._header, all_dirty=False))
            return False

    def resize(self, bitmap: DirtyBitmap) -> None:
        """Follow the disk; see BitmapStore.resize."""
        header = replace(self._header, size=bitmap.size, mtime_ns=time.time_ns() + _AHEAD_NS)
        try:
            os.ftruncate(self._fd, HEADER_SIZE + ceil_div(header.size, header.granularity))
        except OSError as error:
            self.abandon(f"it could not be resized: {_says(error)}")
            return
        self._write_header(header)
        self.settle(bitmap)

    def abandon(self, why: str) -> None:
        """Say that it cannot be trusted; see BitmapStore.abandon."""
        if not self._header.broken:
            _log.warning("bitmap '%s': %s; after a restart it is lost", self.path, why)
            if self._write_header(self._header.broke(why)):
                return
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                _log.critical("bitmap '%s': remove it: %s", self.path, _says(error))

    # --- the file --------------------------------------------------------------------------------

    def fill(self, bitmap: DirtyBitmap) -> None:
        """Hold what is dirty in a bitmap, whose store this is not yet, and be good from now on.

        Raises:
            OSError: It cannot be written, and cannot be trusted.
        """
        is_full = bitmap.count() == self._count * bitmap.granularity
        for base in [] if is_full else bitmap.bases():
            _write(self._fd, bitmap.page(base), HEADER_SIZE + base)
        header = replace(self._header, broken=False, reason="", all_dirty=is_full)
        _write(self._fd, header.pack(), 0)
        self._header = header

    def take_into_use(self, *, boot_id: bytes) -> None:
        """Make it be in use, on stable storage (K1); may block.

        Raises:
            OSError: It cannot be.
        """
        header = replace(self._header, clean=False, boot_id=boot_id, mtime_ns=0)
        header = replace(header, mtime_ns=time.time_ns() + _AHEAD_NS)
        _write(self._fd, header.pack(), 0)
        os.fsync(self._fd)
        self._header = header

    def finish(self, mtime_ns: int) -> None:
        """Make it clean and close it; nobody writes to the disk any more. May block.

        Args:
            mtime_ns: When the disk was last changed; 0: nobody knows.
        """
        try:
            self.settle_rest()
            if not self._header.broken:
                body = BodySum()
                for base, states in self.pages():
                    body.add(base, states)
                os.fsync(self._fd)
                header = replace(self._header, clean=True, mtime_ns=mtime_ns, body_crc=body.crc)
                _write(self._fd, header.pack(), 0)
            os.fsync(self._fd)
        except OSError as error:
            _log.error("bitmap '%s': %s; after a restart it may be lost", self.path, _says(error))
        finally:
            self.close()

    def close(self) -> None:
        """Close it as it is."""
        self.hold()
        os.close(self._fd)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Yield (first granule, bytes) of what is not a hole, at most _PAGE at a time.

        Raises:
            OSError: It cannot be read.
        """
        index, count = 0, self._count
        while index < count:
            try:
                data = os.lseek(self._fd, HEADER_SIZE + index, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                raise
            index = max(index, (data - HEADER_SIZE) // _PAGE * _PAGE)
            size = min(_PAGE, count - index)
            yield index, self._read(index, size)
            index += size

    def _data_bases(self) -> Iterator[int]:
        """Yield the first granules of the pages that are not holes.

        Raises:
            OSError: It cannot be read.
        """
        index, count = 0, self._count
        while index < count:
            try:
                data = os.lseek(self._fd, HEADER_SIZE + index, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                raise
            hole = os.lseek(self._fd, data, os.SEEK_HOLE)
            index = max(index, (data - HEADER_SIZE) // _PAGE * _PAGE)
            end = min(hole - HEADER_SIZE, count)
            while index < end:
                yield index
                index += _PAGE

    @property
    def _count(self) -> int:
        return ceil_div(self._header.size, self._header.granularity)

    def _read(self, first: int, count: int) -> bytes:
        found = os.pread(self._fd, count, HEADER_SIZE + first)
        return found.ljust(count, b"\0")

    def _write_header(self, header: Header) -> bool:
        """Replace the header; False: the file still has the old one."""
        self._header = header
        try:
            _write(self._fd, header.pack(), 0)
        except OSError as error:
            _log.error("bitmap '%s': %s", self.path, _says(error))
            return False
        return True


class DiskBitmaps:
    """The persistent bitmaps of one disk (block.bitmap.BitmapKeeper).

    Args:
        folder: Where their files are; made when needed.
        node: The disk's node.
        identity: Tells the disk from others; see `identity_of`.
    """

    def __init__(self, folder: Path, node: Node, identity: bytes) -> None:
        self._folder = folder
        self._node = node
        self._identity = identity
        self._boot_id = _boot_id()
        self._paths: dict[str, Path] = {}  # of what was loaded

    async def keep(self, bitmap: DirtyBitmap) -> None:
        """Make a bitmap persistent; see BitmapKeeper.keep.

        Cancel: it may leave a file, which says that it cannot be trusted.
        """
        if self._node.read_only:
            raise CommandError(
                f"Can't store persistent bitmaps to {self._node.name}: it is read-only"
            )
        header = Header(
            name=bitmap.name,
            granularity=bitmap.granularity,
            size=bitmap.size,
            identity=self._identity,
            boot_id=self._boot_id,
            recording=bitmap.recording,
            mtime_ns=time.time_ns() + _AHEAD_NS,
        )
        path = self._path(bitmap.name)
        store = await asyncio.to_thread(_make, path, header.broke("it was not finished"))
        try:
            store.fill(bitmap)
        except OSError as error:
            store.close()
            with suppress(OSError):
                path.unlink()
            raise CommandError(f"'{path}': {_says(error)}") from error
        bitmap.store = store
        bitmap.persistent = True

    async def forget(self, bitmap: DirtyBitmap) -> None:
        """Delete a bitmap's file; see BitmapKeeper.forget."""
        store, path = bitmap.store, self._path(bitmap.name)
        try:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except OSError as error:
            raise CommandError(f"'{path}': {_says(error)}") from error
        self._paths.pop(bitmap.name, None)
        if isinstance(store, BitmapFile):
            bitmap.store = None
            store.close()

    def load(self, mtime_ns: int) -> list[DirtyBitmap]:
        """Return the bitmaps that are kept, those that can be used taken into use; may block.

        Args:
            mtime_ns: When the disk was last changed; 0: nobody knows.

        Raises:
            CommandError: A file cannot be read, or is of another version.
        """
        if not self._folder.is_dir():
            return []
        return [self._load(path, mtime_ns) for path in sorted(self._folder.iterdir())]

    def replaced(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        """Return what stands for a bitmap that was loaded when the image has one of that name, too.

        Each has missed what only the other has recorded, so neither can be trusted, now or later.
        May block.
        """
        why = "there is one in the image, and one beside it"
        store, bitmap.store = bitmap.store, None
        if isinstance(store, BitmapFile):
            store.abandon(why)
            store.close()
        return self._inconsistent(bitmap.name, bitmap.granularity, why)

    def finish(self, mtime_ns: int) -> None:
        """Leave all files clean, at the end of the disk's node; may block.

        Args:
            mtime_ns: When the disk was last changed; 0: nobody knows.
        """
        # A successor has its parent's.
        stores = {bitmap.store for bitmap in self._node.bitmaps.values()}
        for store in stores:
            if isinstance(store, BitmapFile):
                store.finish(mtime_ns)

    # --- private ---------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        if name in self._paths:
            return self._paths[name]
        file_name = quote(name, safe="").replace(".", "%2E")
        if len(file_name) > _LONGEST_NAME:
            file_name = "%" + hashlib.sha256(name.encode()).hexdigest()
        return self._folder / file_name

    def _load(self, path: Path, mtime_ns: int) -> DirtyBitmap:
        read_only = self._node.read_only
        try:
            fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise CommandError(f"'{path}': {_says(error)}") from error
        try:
            header = unpack(os.pread(fd, HEADER_SIZE, 0))
            if header is None:
                return self._damaged(path)
            self._paths[header.name] = path
            bitmap = self._checked(BitmapFile(path, fd, header), header, mtime_ns)
            if bitmap.store is not None:
                fd = -1  # it is the store's
        except UnknownVersion as error:
            raise CommandError(f"'{path}' {error}; it was written by another nbdfleece") from error
        except OSError as error:
            raise CommandError(f"'{path}': {_says(error)}") from error
        finally:
            if fd >= 0:
                os.close(fd)
        return bitmap

    def _checked(self, store: BitmapFile, header: Header, mtime_ns: int) -> DirtyBitmap:
        """Return the bitmap of a file, inconsistent if it has to be (K3).

        Raises:
            OSError: The file cannot be read or written.
        """
        why = judge(
            header,
            size=self._node.size,
            identity=self._identity,
            boot_id=self._boot_id,
            mtime_ns=mtime_ns,
        )
        bitmap = DirtyBitmap(
            header.name,
            size=self._node.size,
            granularity=header.granularity,
            enabled=header.recording,
        )
        if why is None:
            body = BodySum()
            for base, states in store.pages():
                body.add(base, states)
                bitmap.load(base, states.translate(_NORMAL))
            if header.clean and body.crc != header.body_crc:
                why = "its file is damaged"
        if why is not None:
            if not self._node.read_only:
                store.abandon(why)
            return self._inconsistent(header.name, header.granularity, why)
        if header.all_dirty:
            bitmap.set(0, bitmap.size)
        bitmap.persistent = True
        bitmap.readonly = self._node.read_only
        if not bitmap.readonly:
            store.take_into_use(boot_id=self._boot_id)
            bitmap.store = store
        return bitmap

    def _damaged(self, path: Path) -> DirtyBitmap:
        name = unquote(path.name)[:MAX_BITMAP_NAME]
        self._paths[name] = path
        return self._inconsistent(name, default_granularity(self._node), "its file is damaged")

    def _inconsistent(self, name: str, granularity: int, why: str) -> DirtyBitmap:
        bitmap = DirtyBitmap(name, size=self._node.size, granularity=granularity, enabled=False)
        bitmap.persistent = bitmap.inconsistent = True
        bitmap.reason = why
        return bitmap


class BothKeepers:
    """The persistent bitmaps of a disk whose image keeps its own (block.bitmap.BitmapKeeper).

    New ones go into the image. Files there are all the same: those of backups, which a crash must
    not spoil, and those of a time when the disk was no such image.

    Args:
        image: Keeps those in the image.
        files: Keeps the others.
    """

    def __init__(self, image: BitmapKeeper, files: DiskBitmaps) -> None:
        self._image = image
        self._files = files

    async def keep(self, bitmap: DirtyBitmap) -> None:
        """See BitmapKeeper.keep."""
        await self._image.keep(bitmap)

    async def forget(self, bitmap: DirtyBitmap) -> None:
        """Delete it wherever it is: a file that is left would be taken for complete later."""
        await self._files.forget(bitmap)
        await self._image.forget(bitmap)


def identity_of(facts: dict[str, str | int | float | bool | None], *, is_file: bool) -> bytes:
    """Return what tells a disk from others, also after a restart of the machine.

    A file is known by its inode, a block device or another server's export by how it is called.

    Args:
        facts: Of the disk, as in disk.json.
        is_file: It is a file.
    """
    known = f"inode {facts.get('inode')}" if is_file else f"location {facts['location']}"
    return hashlib.sha256(known.encode(errors="surrogateescape")).digest()


def _united(bitmap: DirtyBitmap, base: int) -> bytes:
    """Return the states of a page of a bitmap, united with its successor's."""
    states = bitmap.page(base)
    if bitmap.successor is None:
        return states
    other = bitmap.successor.page(base)
    both = int.from_bytes(states, "little") | int.from_bytes(other, "little")
    return both.to_bytes(len(states), "little")


def _make(path: Path, header: Header) -> BitmapFile:
    """Make the file of a clean bitmap.

    Raises:
        CommandError: There is one, or it cannot be made. Nothing is left.
    """
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError(f"'{path}': {_says(error)}") from error
    try:
        os.ftruncate(fd, HEADER_SIZE + ceil_div(header.size, header.granularity))
        _write(fd, header.pack(), 0)
    except OSError as error:
        os.close(fd)
        with suppress(OSError):
            path.unlink()
        raise CommandError(f"'{path}': {_says(error)}") from error
    return BitmapFile(path, fd, header)


def _write(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data`.

    Raises:
        OSError: It cannot be.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def _says(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)
