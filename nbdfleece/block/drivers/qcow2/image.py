"""What the parts of the driver share of one open image.

Invariants
  I1  A host cluster that the disk lets go of is free again only when nothing on disk tells of it,
      and no request is on its way to it (frees.py).
  I2  From `fresh` on, the image's file has never held data: it reads as zeroes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.base.limits import QCOW2_GROW
from nbdfleece.base.units import align_up, ceil_div
from nbdfleece.block.drivers.qcow2.bitmaps import StoredBitmaps
from nbdfleece.block.drivers.qcow2.commit import Commit
from nbdfleece.block.drivers.qcow2.counts import RefcountCache
from nbdfleece.block.drivers.qcow2.frees import Frees
from nbdfleece.block.drivers.qcow2.tables import L2Cache
from nbdfleece.block.ranges import RangeList
from nbdfleece.datapath.step import background
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.tables import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from nbdfleece.block.node import Node
    from nbdfleece.formats.qcow2.tables import Entries

T = TypeVar("T")

_log: Final = logging.getLogger(__name__)

# Autoclear features that stay right whatever is written here.
KEPT_AUTOCLEAR: Final = h.DATA_FILE_RAW | h.BITMAPS


_MOST_TOLD: Final = 16  # lines in the log: a client can read the same damage for ever


class CacheSizes(NamedTuple):
    """Bytes of tables and of refcounts that are kept in memory."""

    l2: int
    refcounts: int


class Image:
    """One open image.

    Args:
        node: The qcow2 node; its `file` child is attached.
        header: Parsed.
        l1: The active L1 table.
        refcount_table: As it is.
        caches: How much to keep in memory.

    Attributes:
        header: As it is on disk, but for L1 and refcount table that `commit` has not written yet.
        geometry: Derived from it.
        tables: L1 and L2.
        counts: Refcounts.
        commit: Writes both.
        lazy: Refcounts are written late.
        writing: Guest clusters whose entries somebody is about to change.
        frees: Host clusters that the disk lets go of (I1).
        bitmaps: Persistent ones.
        fresh: See I2.
        is_changing: `begin_changes` has been done.
        decompressed: Compressed clusters that were read last, by their L2 entry.
        metadata: Host clusters of metadata that is in memory: nothing else may be written there,
            and they are not free, whatever an entry says.
    """

    lazy = False
    is_changing = False
    _are_features_sure = True  # those on disk are those of `header`
    _doubt = ""  # why nobody knows what the header on disk says
    _told = 0  # damage that requests have met
    _beginning: asyncio.Future[None] | None = None
    _growing: asyncio.Future[None] | None = None

    def __init__(
        self,
        node: Node,
        header: h.Header,
        l1: Entries[int],
        refcount_table: Entries[int],
        *,
        caches: CacheSizes,
    ) -> None:
        self.node: Final = node
        self.header = header
        self.geometry: Final = _geometry(header)
        self.metadata: set[int] = set()
        self.tables: Final = L2Cache(self, l1, caches.l2)
        self.counts: Final = RefcountCache(self, refcount_table, caches.refcounts)
        self.commit: Final = Commit(self)
        self.writing: Final = RangeList()
        self._commanding: Final = asyncio.Lock()  # never held by requests
        self.frees: Final = Frees(self)
        self.fresh = align_up(self.file.size, header.cluster_size)
        self.decompressed: dict[int, bytes] = {}
        self.bitmaps: Final = StoredBitmaps(self)
        self.note_metadata()

    # --- where -----------------------------------------------------------------------------

    @property
    def file(self) -> Node:
        """The node with the metadata."""
        edge = self.node.file
        assert edge is not None, "qcow2 has a file child"
        return edge.node

    @property
    def data(self) -> Node:
        """The node with the data of the disk."""
        return self.node.child("data-file").node if self.geometry.has_data_file else self.file

    def damaged(self, error: ImageError) -> IoError:
        """Return what a request that has met a damaged table fails with; the first are logged."""
        self._told += 1
        if self._told <= _MOST_TOLD:
            _log.error("node '%s': %s", self.node.name, error)
        if self._told == _MOST_TOLD:
            _log.error("node '%s': more damage is not logged", self.node.name)
        return IoError(errno.EIO, f"node '{self.node.name}': damaged qcow2 image: {error}")

    def note_metadata(self) -> None:
        """List the clusters of header, L1 and refcount table as metadata."""
        bits = self.header.cluster_bits
        for offset, length in (
            (0, 1),
            (self.header.l1_table_offset, 8 * self.header.l1_size),
            (
                self.header.refcount_table_offset,
                self.header.refcount_table_clusters << bits,
            ),
        ):
            self.metadata.update(range(offset >> bits, (offset + length - 1 >> bits) + 1))

    def forget_metadata(self, offset: int, length: int) -> None:
        """Note that a table is no longer there."""
        bits = self.header.cluster_bits
        self.metadata.difference_update(range(offset >> bits, (offset + length - 1 >> bits) + 1))

    def note_used(self, cluster: int, count: int) -> bool:
        """Learn that host clusters are in use now; tell whether they read as zeroes (I2)."""
        bits = self.header.cluster_bits
        is_fresh = cluster << bits >= self.fresh
        self.fresh = max(self.fresh, (cluster + count) << bits)
        return is_fresh

    def check_in_file(self, host: int, length: int) -> None:
        """Insist that each cluster of a range of data begins in the image's file.

        Raises:
            IoError: One does not: the file has been cut, and zeroes are not what was there.
        """
        last = (host + length - 1) >> self.header.cluster_bits << self.header.cluster_bits
        if last >= self.file.size and not self.header.has_data_file:
            raise self.damaged(ImageError(f"data at {last:#x} is behind the end of the file"))

    def check_no_metadata(self, host: int, length: int) -> None:
        """Insist that data may be written to a range of the image's file.

        Raises:
            IoError: Metadata is there, or nothing has ever been: the image is damaged.
        """
        if self.header.has_data_file:
            return
        if host + length > self.fresh:
            # What was allocated since the image was opened has moved `fresh` on.
            raise self.damaged(ImageError(f"data at {host:#x} is behind the end of the file"))
        bits = self.header.cluster_bits
        first, last = host >> bits, (host + length - 1) >> bits
        for cluster in range(first, last + 1):
            if cluster in self.metadata:
                raise self.damaged(
                    ImageError(f"data at {cluster << bits:#x} would overwrite metadata")
                )

    # --- changes by commands ---------------------------------------------------------------

    async def alone(
        self, change: Callable[[], Coroutine[object, None, T]], *, is_last: bool = False
    ) -> T:
        """Carry out a change that a command makes, with no other one beside it.

        A drained section does not see to that: several may be open at a time.

        Args:
            change: Makes it.
            is_last: The image is of no use behind it: a disk that is stuck must not keep the
                program from ending.

        Raises:
            What `change` does.

        Cancel: before it has begun, or when it is the last. Else it is of no effect: what is in
            memory would not be what is on disk, nor what others have been told.
        """
        async with self._commanding:
            running = background(change())
            while not running.done():
                try:
                    await asyncio.wait([running])
                except asyncio.CancelledError:
                    if is_last:
                        raise
            return running.result()

    # --- the image's file ------------------------------------------------------------------

    async def read_file(self, offset: int, length: int) -> bytearray:
        """Return bytes of the image's file; zeroes behind its end."""
        data = bytearray(length)
        node = self.file
        inside = min(length, node.size - offset)
        if inside > 0:
            await node.read(offset, memoryview(data)[:inside])
        return data

    async def write_file(self, offset: int, data: bytes) -> None:
        """Write metadata."""
        await self.reach(offset + len(data))
        await self.file.write(offset, memoryview(data), fua=False)

    async def write_new(self, data: bytes) -> int:
        """Write metadata into new clusters in a row, and return where; the node is drained."""
        clusters = ceil_div(len(data), self.header.cluster_size)
        first = await self.counts.allocate_whole(clusters)
        try:
            await self.write_file(first << self.header.cluster_bits, data)
        except IoError:
            self.counts.give_back(first, clusters)
            raise
        return first << self.header.cluster_bits

    async def reach(self, end: int) -> None:
        """Make the image's file so long, and some more, that its end is seldom in the way."""
        if self.file.size < end:
            await self._grow(end, in_data_file=False)

    async def reach_data(self, end: int) -> None:
        """As `reach`, for the external data file, which gets no longer than the disk."""
        if self.data.size < end:
            await self._grow(end, in_data_file=True)

    async def _grow(self, end: int, *, in_data_file: bool) -> None:
        """Make a file longer; one at a time, so that none is made shorter by an older request."""
        while (node := self.data if in_data_file else self.file).size < end:
            if self._growing is not None:
                await self._growing
                continue
            self._growing = asyncio.get_running_loop().create_future()
            wanted = end if in_data_file else align_up(end, self.header.cluster_size) + QCOW2_GROW
            try:
                await node.truncate(wanted)
            except CommandError as error:
                raise IoError(
                    errno.ENOSPC, f"node '{self.node.name}': growing to {end} bytes: {error}"
                ) from error
            finally:
                growing, self._growing = self._growing, None
                growing.set_result(None)

    async def trim(self) -> None:
        """Give back what `reach` has added and nobody uses."""
        if self.fresh < self.file.size:
            await self.file.truncate(self.fresh)

    def set_lazy(self, lazy: bool | None) -> None:
        """Write refcounts late, or at once; None: as the image says. Nothing is dirty now."""
        if lazy is None:
            lazy = bool(self.header.compatible & h.LAZY_REFCOUNTS)
        self.lazy = lazy and self.header.version >= 3

    # --- the first change --------------------------------------------------------------------

    async def begin_changes(self) -> None:
        """Say in the header what has to be said before anything else changes.

        Autoclear features that are not kept right here are cleared; with lazy refcounts the dirty
        bit is set.
        """
        while not self.is_changing:
            self.check_no_doubt()
            if self._beginning is not None:
                await self._beginning
                continue
            self._beginning = asyncio.get_running_loop().create_future()
            try:
                await self.bitmaps.begin()
                wanted = replace(
                    self.header,
                    autoclear=self.header.autoclear & KEPT_AUTOCLEAR,
                    incompatible=self.header.incompatible | (h.DIRTY if self.lazy else 0),
                )
                if wanted != self.header or not self._are_features_sure:
                    await self.write_features(wanted)
                self.is_changing = True
            finally:
                beginning, self._beginning = self._beginning, None
                beginning.set_result(None)

    async def write_features(self, wanted: h.Header) -> None:
        """Write the feature bits, to stable storage."""
        data = h.FEATURES_FIELDS.pack(wanted.incompatible, wanted.compatible, wanted.autoclear)
        self._are_features_sure = False
        await self.write_file(h.FEATURES_AT, data)
        await self.file.flush()
        self._are_features_sure = True
        self.header = wanted

    async def write_fields(self, at: int, data: bytes) -> None:
        """Have fields of the header, in one sector, tell of other tables, which are on disk.

        Raises:
            IoError: They tell of those of before, or the header is in doubt.
        """
        before = await self.read_file(at, len(data))
        try:
            await self.write_file(at, data)
            await self.file.flush()
        except IoError:
            await self._put_back(at, bytes(before))
            raise

    async def _put_back(self, at: int, data: bytes) -> None:
        """Have the header again that was there; or nothing is written or flushed any more.

        Somebody who opens the image then may find other tables than those that would be written.
        """
        try:
            await self.write_file(at, data)
            await self.file.flush()
        except IoError as error:
            self._doubt = f"node '{self.node.name}': its header is in doubt: {error}"
            self.is_changing = False

    def check_no_doubt(self) -> None:
        """Insist that the header on disk is `header`.

        Raises:
            IoError: It may be another one.
        """
        if self._doubt:
            raise IoError(errno.EIO, self._doubt)

    async def write_header(self, wanted: h.Header) -> None:
        """Write all of the header, to stable storage; what it tells of is on disk.

        It is longer than a sector, and a crash may leave any of its sectors as they were: so a name
        that moves is there before it is told of, another name comes with its format, and an
        extension in two sectors is not in force.

        Raises:
            ImageError: It is longer than its cluster. Nothing has changed.
            IoError: It could not be written. Nothing has changed, or the header is in doubt.
        """
        try:
            await self._write_header(wanted)
        except IoError:
            await self._put_back(0, h.encode_header(self.header))
            raise

    async def _write_header(self, wanted: h.Header) -> None:
        before = self.header
        if (before.backing_file, before.backing_format) != (
            wanted.backing_file,
            wanted.backing_format,
        ):
            apart = h.placed_apart(wanted, before)
            if apart is not None and h.is_in_first_sector(h.without_feature_names(apart)):
                await self._write_header_by_sectors(apart)
                return
        wanted = h.placed(wanted)
        data = h.encode_header(wanted)
        if before.backing_file == wanted.backing_file and (
            before.backing_offset != wanted.backing_offset
        ):
            await self.write_file(wanted.backing_offset, data[wanted.backing_offset :])
            await self.file.flush()
            moved = replace(before, backing_offset=wanted.backing_offset)
            await self.write_file(0, h.encode_header(moved)[: h.SECTOR])
            await self.file.flush()
            self.header = before = moved
        features, old = wanted.autoclear, before.extension(h.EXT_BITMAPS)
        if old != wanted.extension(h.EXT_BITMAPS) and (
            h.is_torn_easily(before, h.EXT_BITMAPS) or h.is_torn_easily(wanted, h.EXT_BITMAPS)
        ):
            wanted = replace(wanted, autoclear=features & ~h.BITMAPS)
            await self.write_features(replace(before, autoclear=before.autoclear & ~h.BITMAPS))
            data = h.encode_header(wanted)
        await self.write_file(0, data)
        await self.file.flush()
        self.header = wanted
        if features != wanted.autoclear:
            await self.write_features(replace(wanted, autoclear=features))

    async def _write_header_by_sectors(self, wanted: h.Header) -> None:
        """Write the header so that one sector makes all of it count.

        Only the names of features, which are for people, may be in others: a crash may lose them.
        """
        data = h.encode_header(wanted)
        name_at = wanted.backing_offset or len(data)
        behind = max(name_at, h.SECTOR)
        if behind < len(data):
            await self.write_file(behind, data[behind:])
            await self.file.flush()
        if not h.is_in_first_sector(wanted):
            without_names = h.without_feature_names(wanted)
            await self.write_file(0, h.encode_header(without_names)[: h.SECTOR])
            await self.file.flush()
            self.header = without_names
            await self.write_file(h.SECTOR, data[h.SECTOR : name_at])
            await self.file.flush()
        await self.write_file(0, data[: h.SECTOR])
        await self.file.flush()
        self.header = wanted

    async def settle_all(self) -> None:
        """Write out everything, refcounts too, and clear the dirty bit. Nothing is in flight."""
        self.check_no_doubt()
        if not self.is_changing:
            return
        await self.commit.run(with_refcounts=True)
        while self.frees.waiting or self.counts.is_dirty:
            await self.commit.run(with_refcounts=True)
        self.is_changing = False  # whatever comes of this, the next change says it again
        if self.header.incompatible & h.DIRTY:
            await self.write_features(
                replace(self.header, incompatible=self.header.incompatible & ~h.DIRTY)
            )
        await self.trim()


def _geometry(header: h.Header) -> Geometry:
    return Geometry(
        header.cluster_bits,
        is_extended=header.has_extended_l2,
        has_zero_flag=header.version >= 3,
        has_data_file=header.has_data_file,
    )
