"""Driver `qcow2`: see the package.

Children: `file` with the metadata, and the data unless there is a `data-file`; `backing` for what
the image does not hold.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent, clip, merge
from nbdfleece.base.limits import QCOW2_L2_CACHE, QCOW2_REFCOUNT_CACHE
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Child, Role
from nbdfleece.block.drain import quiet
from nbdfleece.block.driver import Driver, Reopening
from nbdfleece.block.drivers.qcow2 import opening, resize
from nbdfleece.block.drivers.qcow2.commit import all_of, ended
from nbdfleece.block.drivers.qcow2.counts import OTHER, REQUEST, SNAPSHOT
from nbdfleece.block.drivers.qcow2.image import CacheSizes, Image
from nbdfleece.block.drivers.qcow2.reader import SnapshotReader, open_reader
from nbdfleece.block.drivers.qcow2.snapshots import Snapshots, check_no_data_file
from nbdfleece.block.drivers.qcow2.writer import Writer
from nbdfleece.datapath.step import background
from nbdfleece.datapath.workers import Lane
from nbdfleece.formats.qcow2 import compress
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2 import tables as t
from nbdfleece.formats.qcow2.header import EXT_BACKING_FORMAT

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping
    from typing import TypeAlias

    from nbdfleece.block.driver import Place
    from nbdfleece.block.node import Node
    from nbdfleece.datapath.route import EarlyReply
    from nbdfleece.formats.qcow2.tables import Run

    Look: TypeAlias = Callable[[int, int], Awaitable[list[Extent]]]

_log: Final = logging.getLogger(__name__)

_DECOMPRESSED: Final = 16  # clusters that are kept, for reads in small pieces
_DECOMPRESS_THREADS: Final = 2
_STATUS_EXTENTS: Final = 4096  # most extents found by one call
_STATUS_ENTRIES: Final = 1 << 18  # most L2 entries looked at by one call, which others wait for


@dataclass(frozen=True, slots=True)
class Qcow2Options:
    """Options of a node, by their QMP names.

    Attributes:
        lazy_refcounts: None: as the image says.
        pass_discard_request: None: as the node's `discard`.
        pass_discard_snapshot: Give the space of deleted snapshots back.
        pass_discard_other: And that of what was overwritten or moved.
        l2_cache_size: Bytes.
        refcount_cache_size: Bytes.
    """

    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False
    l2_cache_size: int = QCOW2_L2_CACHE
    refcount_cache_size: int = QCOW2_REFCOUNT_CACHE

    @classmethod
    def from_qmp(cls, options: Mapping[str, object]) -> Qcow2Options:
        """Return the options of a node, which the registry has checked.

        Raises:
            CommandError: They contradict each other.
        """
        return cls(
            lazy_refcounts=_optional_bool(options.get("lazy-refcounts")),
            pass_discard_request=_optional_bool(options.get("pass-discard-request")),
            pass_discard_snapshot=options.get("pass-discard-snapshot") is not False,
            pass_discard_other=options.get("pass-discard-other") is True,
            **_cache_sizes(options),
        )


class Qcow2Driver(Driver):
    """A qcow2 image.

    Args:
        options: See there.
    """

    name: ClassVar[str] = "qcow2"
    changeable: ClassVar[frozenset[str]] = frozenset(
        {
            *("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot"),
            *("pass-discard-other", "overlap-check", "cache-size", "l2-cache-size"),
            *("l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval"),
        }
    )
    repointable: ClassVar[frozenset[str]] = frozenset({"file", "backing"})

    def __init__(self, options: Qcow2Options) -> None:
        self._options = options
        self._before = options
        self._was_read_only = False
        self._image: Image | None = None
        self._writer: Writer | None = None
        self._snapshots: Snapshots | None = None
        self._decompress: compress.Decompress | None = None
        self._decompressing: Lane | None = None

    @property
    def image(self) -> Image:
        """What is in memory of the open image."""
        assert self._image is not None, f"node '{self.node.name}' is open"
        return self._image

    # --- life ------------------------------------------------------------------------------

    async def open(self) -> int:
        """Read the header, and mend what a crash has left; see Driver.open."""
        options = self._options
        sizes = CacheSizes(options.l2_cache_size, options.refcount_cache_size)
        try:
            image = await opening.open_image(self.node, sizes)
            self._decompress = compress.decompressor(image.header.compression_type)
            self._image = image
            self._take_over(options)
            self._writer = Writer(image, self.read, self.reads_zero)
            self.node.size = image.header.size
            self._snapshots = Snapshots(image)
            await self._snapshots.load()
            if not self.node.read_only:
                await opening.make_writable(image)
            await image.bitmaps.load()
            if not self.node.read_only:
                await image.bitmaps.begin()
            if image.header.version >= 3:
                self.node.bitmap_keeper = image.bitmaps
        except ImageError as error:
            self._image = None
            raise CommandError(f"Could not open node '{self.node.name}': {error}") from error
        except IoError as error:
            self._image = None
            raise CommandError(f"Could not open node '{self.node.name}': {error}") from error
        return image.header.size

    def _take_over(self, options: Qcow2Options) -> None:
        image = self.image
        self._options = options
        image.tables.set_size(options.l2_cache_size)
        image.counts.set_size(options.refcount_cache_size)
        request = options.pass_discard_request
        image.frees.pass_discard[REQUEST] = (
            self.node.discard_enabled if request is None else request
        )
        image.frees.pass_discard[SNAPSHOT] = options.pass_discard_snapshot
        image.frees.pass_discard[OTHER] = options.pass_discard_other
        image.set_lazy(options.lazy_refcounts)

    async def close(self) -> None:
        """Write everything out; see Driver.close."""
        if self._decompressing is not None:
            self._decompressing.close()
            self._decompressing = None
        image = self.image
        # The one need not be possible for the other; as after a crash the image is whole, and lacks
        # what was not written.
        for write_out in (image.bitmaps.store, image.settle_all):
            try:
                await image.alone(write_out, is_last=True)
            except (IoError, CommandError, ImageError) as error:
                _log.error("node '%s': closing: %s", self.node.name, error)

    async def truncate(self, size: int) -> None:
        """Make the disk longer or shorter; see Driver.truncate."""
        image, writer = self.image, self._written()
        try:
            await image.alone(lambda: resize.resize(image, writer, size, self.reads_zero))
        except ImageError as error:
            raise CommandError(str(error)) from error

    async def reopen_prepare(self, to: Reopening) -> None:
        """Write everything out, where nobody may write soon; see Driver.reopen_prepare."""
        image = self.image
        Qcow2Options.from_qmp(to.options)
        try:
            if not self.node.read_only:
                if to.read_only:
                    await image.alone(image.bitmaps.store)
                await image.alone(image.settle_all)
            if self.node.read_only and not to.read_only:
                opening.check_writable(image.header, may_repair=False)
        except IoError as error:
            raise CommandError(f"Could not reopen node '{self.node.name}': {error}") from error
        except ImageError as error:
            raise CommandError(f"Could not reopen node '{self.node.name}': {error}") from error

    def reopen_apply(self, to: Reopening) -> None:
        """Take over the options; see Driver.reopen_apply."""
        self._before = self._options
        self._was_read_only = self.node.read_only
        self._take_over(Qcow2Options.from_qmp(to.options))
        self.image.bitmaps.set_readonly(readonly=to.read_only)

    def reopen_undo(self) -> None:
        """Take over those of before; see Driver.reopen_undo."""
        self._take_over(self._before)
        self.image.bitmaps.set_readonly(readonly=self._was_read_only)

    async def reopen_finish(self) -> None:
        """Have the bitmaps in use where the node is written; see Driver.reopen_finish."""
        if not self.node.read_only:
            try:
                await self.image.bitmaps.begin()
            except IoError as error:  # the first write tries again, and fails
                _log.error("node '%s': bitmaps: %s", self.node.name, error)

    def size_now(self) -> int:
        """Return the size of the disk; see Driver.size_now."""
        return self.image.header.size

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """Of the file with the metadata: nobody else may write, whether or not the guest does."""
        if not edge.role & Role.METADATA:
            return super().child_permissions(edge, perm, shared)
        perm = perms.CONSISTENT_READ | (perm & ~perms.WRITE_UNCHANGED)
        if not self.node.read_only:
            perm |= perms.WRITE | perms.RESIZE
        return perm, shared & ~(perms.WRITE | perms.RESIZE)

    def can_have_backing(self) -> bool:
        """Say yes, unless a raw data file holds the whole disk."""
        return not self.image.header.is_data_file_raw

    def backing_file(self) -> str:
        """Return what the header names; see Driver.backing_file."""
        return self.image.header.backing_file or ""

    async def change_backing_file(self, name: str, driver: str) -> None:
        """Write another name into the header; see Driver.change_backing_file."""
        if self.node.read_only:
            raise CommandError(f"Could not change backing file to '{name}': Image is read-only")
        image = self.image
        try:
            async with quiet(self.node):
                await image.alone(lambda: _name_backing(image, name, driver))
        except ImageError as error:
            raise CommandError(f"Could not change backing file to '{name}': {error}") from error

    # --- reading ---------------------------------------------------------------------------

    def reads_zero(self, offset: int, length: int) -> bool:
        """Tell whether a range that the image does not hold reads as zeroes."""
        backing = self.node.backing
        return backing is None or backing.node.size <= offset

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Read what the tables in memory and the page cache know; see Driver.read_now."""
        image = self._image
        if image is None:
            return False
        geometry = image.geometry
        table = image.tables.loaded.get(offset >> geometry.span_bits)
        if table is not None:
            host = t.plain_host(table.entries, geometry, offset, len(view))
            if host >= 0:
                table.used = True
                return image.data.read_now(host, view)
        return self._read_runs_now(offset, view)

    def _read_runs_now(self, offset: int, view: memoryview) -> bool:
        image, length = self.image, len(view)
        geometry = image.geometry
        while True:
            run = self._run_now(offset, length)
            if run is None:
                return False
            is_last = run.length == length
            part = view if is_last else view[: run.length]
            if run.kind == t.DATA:
                if not image.data.read_now(run.host, part):
                    return False
            elif run.kind == t.UNALLOCATED:
                if not self._read_backing_now(offset, part):
                    return False
            elif run.kind == t.COMPRESSED:
                cluster = image.decompressed.get(run.host)
                if cluster is None:
                    return False
                inside = offset & (geometry.cluster_size - 1)
                part[:] = cluster[inside : inside + run.length]
            else:
                part[:] = bytes(run.length)
            if is_last:
                return True
            offset, length, view = offset + run.length, length - run.length, view[run.length :]

    def _run_now(self, offset: int, length: int) -> Run | None:
        """As `_run`, where that needs no waiting and meets no error; else None."""
        image = self.image
        geometry = image.geometry
        index = offset >> geometry.span_bits
        table = image.tables.loaded.get(index)
        if table is not None:
            table.used = True
            try:
                return t.find_run(table.entries, geometry, offset, length)
            except ImageError:
                return None
        if image.tables.l1[index] & t.OFFSET_MASK:
            return None
        span = 1 << geometry.span_bits
        return t.Run(t.UNALLOCATED, min(length, span - (offset & (span - 1))), 0, False)

    def _read_backing_now(self, offset: int, view: memoryview) -> bool:
        backing = self.node.backing
        if backing is not None and backing.guard is not None:
            try:
                backing.guard(offset, len(view))
            except IoError:
                return False
        if backing is None or backing.node.size <= offset:
            view[:] = bytes(len(view))
            return True
        inside = backing.node.size - offset
        if inside >= len(view):
            return backing.node.read_now(offset, view)
        view[inside:] = bytes(len(view) - inside)
        return backing.node.read_now(offset, view[:inside])

    async def read(self, offset: int, view: memoryview) -> None:
        """See Driver.read."""
        image = self.image
        epoch = image.frees.epoch
        epoch.count += 1
        try:
            await self._read_runs(offset, view)
        finally:
            epoch.count -= 1

    async def _read_runs(self, offset: int, view: memoryview) -> None:
        running: list[asyncio.Future[None]] = []
        try:
            while view:
                run = await self._run(offset, len(view))
                part, view = view[: run.length], view[run.length :]
                if run.kind in (t.ZERO_PLAIN, t.ZERO_HOST):
                    part[:] = bytes(run.length)
                elif not view and not running:
                    await self._read_active_run(run, offset, part)
                else:
                    running.append(background(self._read_active_run(run, offset, part)))
                offset += run.length
        except IoError:
            await ended(running)  # they write to a buffer of the caller
            raise
        await all_of(running)

    async def _run(self, offset: int, length: int) -> Run:
        """Return what the tables say of the disk from `offset` on."""
        image = self.image
        geometry = image.geometry
        table = await image.tables.get(offset >> geometry.span_bits)
        if table is None:
            span = 1 << geometry.span_bits
            return t.Run(t.UNALLOCATED, min(length, span - offset % span), 0, False)
        try:
            return t.find_run(table.entries, geometry, offset, length)
        except ImageError as error:
            raise image.damaged(error) from error

    async def _read_active_run(self, run: Run, offset: int, view: memoryview) -> None:
        """As `_read_run`, of the disk as it is now; see block.fleeced_backing, F2."""
        await self._read_run(run, offset, view)
        if run.kind != t.UNALLOCATED or not self._is_backing_guarded():
            return
        while view:
            again = await self._run(offset, len(view))
            if again.kind != t.UNALLOCATED:
                await self._read_runs(offset, view[: again.length])
            offset, view = offset + again.length, view[again.length :]

    def _is_backing_guarded(self) -> bool:
        backing = self.node.backing
        return backing is not None and backing.guard is not None

    async def _read_run(self, run: Run, offset: int, view: memoryview) -> None:
        if run.kind == t.DATA:
            self.image.check_in_file(run.host, len(view))
            await _read_padded(self.image.data, run.host, view)
        elif run.kind == t.UNALLOCATED:
            backing = self.node.backing
            if backing is None:
                view[:] = bytes(len(view))
            else:
                await _read_padded(backing.node, offset, view)
                if backing.guard is not None:
                    backing.guard(offset, len(view))
        else:
            cluster = await self._read_compressed(run.host)
            inside = offset % self.image.geometry.cluster_size
            view[:] = cluster[inside : inside + len(view)]

    async def _read_compressed(self, entry: int) -> bytes:
        image, decompress = self.image, self._decompress
        kept = image.decompressed.get(entry)
        if kept is not None:
            return kept
        assert decompress is not None, "set when the image was opened"
        offset, length = t.compressed_range(entry, image.header.cluster_bits)
        data = await image.read_file(offset, length)
        if self._decompressing is None:
            self._decompressing = Lane(f"decompressing {self.node.name}", _DECOMPRESS_THREADS)
        size = image.header.cluster_size
        try:
            cluster = await self._decompressing.submit(lambda: decompress(data, size))
        except ImageError as error:
            raise image.damaged(error) from error
        if len(image.decompressed) >= _DECOMPRESSED:
            del image.decompressed[next(iter(image.decompressed))]
        image.decompressed[entry] = cluster
        return cluster

    # --- points in time ----------------------------------------------------------------------

    def internal_snapshots(self) -> Snapshots:
        """See Driver.internal_snapshots."""
        assert self._snapshots is not None, f"node '{self.node.name}' is open"
        return self._snapshots

    async def open_snapshot(self, wanted: str) -> SnapshotReader:
        """See Driver.open_snapshot."""
        snapshots = self.internal_snapshots()
        snapshot = snapshots.find(wanted)
        check_no_data_file(self.image)
        snapshots.hold(snapshot)
        try:
            return await open_reader(
                self.image, snapshots, snapshot, self._read_saved_run, self._saved_backing_status
            )
        except BaseException:
            snapshots.release(snapshot)
            raise

    async def _read_saved_run(self, run: Run, offset: int, view: memoryview) -> None:
        """As `_read_run`, for an internal snapshot."""
        if run.kind == t.UNALLOCATED:
            self._check_backing_stands_still(offset, len(view))
        await self._read_run(run, offset, view)
        if run.kind == t.UNALLOCATED:
            self._check_backing_stands_still(offset, len(view))

    async def _saved_backing_status(self, offset: int, length: int) -> list[Extent]:
        found = await self._backing_status(offset, length)
        self._check_backing_stands_still(offset, length)
        return found

    def _check_backing_stands_still(self, offset: int, length: int) -> None:
        """Insist that nobody overwrites what is behind: what is saved of it is not in snapshots.

        Raises:
            IoError: Somebody does.
        """
        if self._is_backing_guarded():
            where = self._where("snapshot read", offset, length)
            raise IoError(errno.EIO, f"{where}: its backing is a disk in use")

    # --- status ----------------------------------------------------------------------------

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See Driver.block_status."""
        found: list[Extent] = []
        end, bits, looked_at = offset + length, self.image.geometry.cluster_bits, 0
        while offset < end and len(found) < _STATUS_EXTENTS and looked_at < _STATUS_ENTRIES:
            run = await self._run(offset, end - offset)
            looked_at += 0 if run.kind == t.UNALLOCATED else run.length >> bits
            if run.kind == t.UNALLOCATED:
                behind = await self._look_behind(self._backing_status, offset, run.length)
                if not behind:
                    continue  # written meanwhile
                found += behind
            elif run.kind == t.ZERO_PLAIN:
                found.append(Extent(offset, run.length, HOLE | ZERO))
            else:
                found.append(Extent(offset, run.length, ZERO if run.kind == t.ZERO_HOST else DATA))
            offset = found[-1].end
        return merge(found)

    async def _look_behind(self, look: Look, offset: int, length: int) -> list[Extent]:
        """Return what is told of the backing, as far as the image still holds nothing there."""
        found = await look(offset, length)
        backing = self.node.backing
        if backing is None or backing.guard is None:
            return found
        length = found[-1].end - offset
        backing.guard(offset, length)
        again = await self._run(offset, length)
        return clip(found, offset, again.length) if again.kind == t.UNALLOCATED else []

    async def _backing_status(self, offset: int, length: int) -> list[Extent]:
        backing = self.node.backing
        if backing is None or backing.node.size <= offset:
            return [Extent(offset, length, HOLE | ZERO)]
        length = min(length, backing.node.size - offset)
        return clip(await backing.node.block_status(offset, length), offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """See Driver.allocation_depth."""
        found: list[Extent] = []
        end, bits, looked_at = offset + length, self.image.geometry.cluster_bits, 0
        while offset < end and len(found) < _STATUS_EXTENTS and looked_at < _STATUS_ENTRIES:
            run = await self._run(offset, end - offset)
            looked_at += 0 if run.kind == t.UNALLOCATED else run.length >> bits
            if run.kind == t.UNALLOCATED:
                behind = await self._look_behind(self._backing_depth, offset, run.length)
                if not behind:
                    continue  # written meanwhile
                found += behind
            else:
                found.append(Extent(offset, run.length, 1))
            offset = found[-1].end
        return merge(found)

    async def _backing_depth(self, offset: int, length: int) -> list[Extent]:
        backing = self.node.backing
        if backing is None:
            return [Extent(offset, length, 0)]
        if backing.node.size <= offset:
            return [Extent(offset, length, 2)]  # its end is its own, and all zeroes behind it
        length = min(length, backing.node.size - offset)
        below = clip(await backing.node.allocation_depth(offset, length), offset, length)
        return [Extent(at, size, depth and depth + 1) for at, size, depth in below]

    # --- writing ---------------------------------------------------------------------------

    def _written(self) -> Writer:
        assert self._writer is not None, f"node '{self.node.name}' is open"
        return self._writer

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """See Driver.write."""
        image = self.image
        if not image.is_changing:
            await image.begin_changes()
        epoch = image.frees.epoch
        epoch.count += 1
        # Data that is stable is of use only where the way to it is stable, too.
        is_clean = fua and image.commit.is_clean()
        try:
            await self._written().write(offset, data, fua=is_clean)
        finally:
            epoch.count -= 1
        if fua and not (is_clean and image.commit.is_clean()):
            await image.commit.run()

    def place(self, offset: int, length: int) -> Place | None:
        """Return where a write in place goes: it changes no table; see Driver.place."""
        writer, image = self._writer, self._image
        if writer is None or image is None or not image.is_changing:
            return None
        return writer.place(offset, length)

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        """See Driver.write_replying: a write in place changes no table."""
        image = self.image
        host, length = self._written().direct(offset, len(data)) if image.is_changing else (0, 0)
        if length < len(data):
            await self.write(offset, data, fua=False)
            return
        epoch = image.frees.epoch
        epoch.count += 1
        try:
            await self._written().write_in_place(host, data, reply)
        finally:
            epoch.count -= 1

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """See Driver.write_zeroes; fast but for the ends of the range."""
        image = self.image
        if not image.is_changing:
            await image.begin_changes()
        epoch = image.frees.epoch
        epoch.count += 1
        try:
            await self._written().write_zeroes(offset, length, may_unmap=may_unmap)
        finally:
            epoch.count -= 1
        if fua:
            await image.commit.run()

    async def discard(self, offset: int, length: int) -> None:
        """See Driver.discard."""
        image = self.image
        if not image.is_changing:
            await image.begin_changes()
        epoch = image.frees.epoch
        epoch.count += 1
        try:
            await self._written().discard(offset, length)
        finally:
            epoch.count -= 1

    async def flush(self) -> None:
        """See Driver.flush."""
        if not self.node.read_only:
            await self.image.commit.run()

    # --- facts -----------------------------------------------------------------------------

    def cluster_size(self) -> int:
        """See Driver.cluster_size."""
        return self.image.geometry.cluster_size

    def image_name(self) -> str:
        """Return the name of the image's file, unless its children were told otherwise."""
        spec, edge = self.node.spec, self.node.file
        told = {} if spec is None else {**spec.children, "file": None}
        is_plain = not any(told.values()) and (
            "backing" not in told or self.image.header.backing_file is None
        )
        return edge.node.driver.image_name() if edge and is_plain else super().image_name()

    def image_info(self) -> dict[str, object]:
        """See Driver.image_info."""
        header = self.image.header
        about: dict[str, object] = {"cluster-size": header.cluster_size}
        if header.backing_file is not None:
            about["backing-filename"] = header.backing_file
            if self.node.backing is not None:
                about["full-backing-filename"] = self.node.backing.node.driver.image_name()
            if header.backing_format is not None:
                about["backing-filename-format"] = header.backing_format
        about["dirty-flag"] = bool(header.incompatible & h.DIRTY)
        about["format-specific"] = {"type": "qcow2", "data": _format_specific(header)}
        return about

    async def allocated_size(self) -> int | None:
        """Return what the image's file takes; see Driver.allocated_size."""
        return await self.image.file.driver.allocated_size()


async def _name_backing(image: Image, name: str, driver: str) -> None:
    await image.begin_changes()
    await image.commit.run(with_refcounts=True)
    wanted = replace(image.header, backing_file=name or None)
    wanted = wanted.with_extension(EXT_BACKING_FORMAT, driver.encode() if name else None)
    await image.write_header(wanted)


async def _read_padded(node: Node, offset: int, view: memoryview) -> None:
    """Read from a node; zeroes behind its end."""
    inside = max(0, min(len(view), node.size - offset))
    if inside < len(view):
        view[inside:] = bytes(len(view) - inside)
    if inside:
        await node.read(offset, view[:inside])


def _format_specific(header: h.Header) -> dict[str, object]:
    """Return what QEMU calls ImageInfoSpecificQCow2."""
    compression = h.COMPRESSION_NAMES[header.compression_type]
    if header.version == 2:
        return {
            "compat": "0.10",
            "compression-type": compression,
            "refcount-bits": header.refcount_bits,
        }
    data: dict[str, object] = {
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": bool(header.compatible & h.LAZY_REFCOUNTS),
        "refcount-bits": header.refcount_bits,
        "corrupt": bool(header.incompatible & h.CORRUPT),
        "extended-l2": header.has_extended_l2,
    }
    if header.has_data_file:
        data |= {"data-file": header.data_file_name, "data-file-raw": header.is_data_file_raw}
    return data


def _optional_bool(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _cache_sizes(options: Mapping[str, object]) -> dict[str, int]:
    """Return the sizes of the caches; `cache-size` is both together.

    Raises:
        CommandError: They contradict each other.
    """

    def size(name: str) -> int | None:
        value = options.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    both, l2, refcounts = size("cache-size"), size("l2-cache-size"), size("refcount-cache-size")
    if both is not None:
        if l2 is not None and refcounts is not None:
            raise CommandError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        if (l2 or 0) > both:
            raise CommandError("l2-cache-size may not exceed cache-size")
        if (refcounts or 0) > both:
            raise CommandError("refcount-cache-size may not exceed cache-size")
        if refcounts is not None:
            l2 = both - refcounts
        elif l2 is not None:
            refcounts = both - l2
        else:
            l2, refcounts = both * 4 // 5, both // 5
    return {
        "l2_cache_size": QCOW2_L2_CACHE if l2 is None else l2,
        "refcount_cache_size": QCOW2_REFCOUNT_CACHE if refcounts is None else refcounts,
    }
