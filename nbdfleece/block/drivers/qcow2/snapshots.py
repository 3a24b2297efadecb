"""Internal snapshots of a qcow2 node: made, deleted and gone back to, while the node is drained.

A snapshot is a copy of the L1 table as it was, and one reference more to whatever that leads to.
What the disk shares with a snapshot is not written in place any more, so a snapshot can be read
while the disk is written (`reader.py`).

Order, for a crash at any moment. While anything here is under way the dirty bit is set (version 3),
so that whoever opens the image then counts its references anew; and in every version

- a reference is on disk only when its count is: counts go up, then tables and header change;
- counts go down only when neither tables nor header on disk lead to the cluster;
- the header tells of another snapshot table, or L1 table, in one sector, when that is on disk.

A count, and the flag that a cluster is the disk's own, are in two places, and cannot change at one
moment. Version 2 has no bit to say so, and what a crash left would be damage to every checker: so
there snapshots are read, and not changed.
"""

from __future__ import annotations

import logging
import struct
import sys
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ImageError, InUse, IoError, NotFound
from nbdfleece.base.limits import MAX_QCOW2_FREES, MAX_QCOW2_SNAPSHOT_TABLE
from nbdfleece.base.units import KiB
from nbdfleece.block.drivers.qcow2.counts import OTHER, SNAPSHOT
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2 import snapshots as table_of
from nbdfleece.formats.qcow2 import tables as t

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from nbdfleece.block.drivers.qcow2.image import Image
    from nbdfleece.formats.qcow2.snapshots import Snapshot
    from nbdfleece.formats.qcow2.tables import Entries

_log: Final = logging.getLogger(__name__)

_FIRST_READ: Final = 64 * KiB  # bytes of a snapshot table; more of it as needed
_ACTIVE: Final = struct.Struct(">QIIQ")  # size, crypt method, l1_size, l1_table_offset
_ACTIVE_AT: Final = 24


class Snapshots:
    """The internal snapshots of one image.

    Args:
        image: Of which.

    Attributes:
        entries: In the order of the table.
    """

    def __init__(self, image: Image) -> None:
        self._image: Final = image
        self.entries: list[Snapshot] = []
        self._readers: dict[str, int] = {}
        self._dying: Snapshot | None = None  # is being deleted

    async def load(self) -> None:
        """Read the table.

        Raises:
            ImageError: It is damaged.
            IoError: It cannot be read.
        """
        header, file = self._image.header, self._image.file
        length = _FIRST_READ
        while header.nb_snapshots:
            inside = max(0, min(length, file.size - header.snapshots_offset))
            data = await self._image.read_file(header.snapshots_offset, inside)
            try:
                self.entries = table_of.parse_table(
                    bytes(data), header.nb_snapshots, header.cluster_size
                )
            except table_of.TableEndsError:
                if inside < length or length > MAX_QCOW2_SNAPSHOT_TABLE:
                    raise
                length *= 4
                continue
            return

    def all(self) -> list[Snapshot]:
        """See InternalSnapshots.all."""
        return self.entries

    def find(self, wanted: str) -> Snapshot:
        """Return a snapshot by its id or, where none has that, by its name.

        Raises:
            NotFound: There is none.
        """
        found = table_of.find(self.entries, wanted)
        if found is None:
            raise NotFound(f"Node '{self._image.node.name}' has no snapshot '{wanted}'")
        return found

    # --- in use ------------------------------------------------------------------------------

    def hold(self, snapshot: Snapshot) -> None:
        """Keep a snapshot from being deleted until the matching `release`.

        Raises:
            InUse: It is being deleted.
        """
        if snapshot is self._dying:
            raise InUse(f"Snapshot '{snapshot.name}' (id {snapshot.id}) is being deleted")
        self._readers[snapshot.id] = self._readers.get(snapshot.id, 0) + 1

    def release(self, snapshot: Snapshot) -> None:
        """Undo one `hold`."""
        self._readers[snapshot.id] -= 1
        if not self._readers[snapshot.id]:
            del self._readers[snapshot.id]

    # --- changes -------------------------------------------------------------------------------

    async def create(self, name: str, date_s: int, date_ns: int) -> Snapshot:
        """See InternalSnapshots.create."""
        return await self._image.alone(lambda: self._create(name, date_s, date_ns))

    async def delete(self, wanted: str) -> None:
        """See InternalSnapshots.delete; a failure may leave leaks."""
        await self._image.alone(lambda: self._delete(wanted))

    async def apply(self, wanted: str) -> None:
        """See InternalSnapshots.apply; the disk has the size of then."""
        await self._image.alone(lambda: self._apply(wanted))

    async def _create(self, name: str, date_s: int, date_ns: int) -> Snapshot:
        image = self._image
        self._check_changeable()
        snapshot = table_of.Snapshot(
            id=table_of.new_id(self.entries),
            name=name,
            l1_offset=0,
            l1_entries=len(image.tables.l1),
            date_s=date_s,
            date_ns=date_ns,
            disk_size=image.header.size,
        )
        table_of.encode_table([*self.entries, snapshot])  # too many, or too long?
        await self._begin()
        try:
            await self._raise(image.tables.l1)
            try:
                await image.commit.run(with_refcounts=True)
                await self._unflag()
                at = await image.write_new(t.dump_entries(image.tables.l1) or bytes(8))
                snapshot = snapshot.moved(at, len(image.tables.l1))
                table = await image.write_new(table_of.encode_table([*self.entries, snapshot]))
            except (CommandError, IoError):
                await self._sink(image.tables.l1)
                raise
            await self._switch_table([*self.entries, snapshot], table)
        except (CommandError, IoError):
            await self._end_failed()
            raise
        await image.settle_all()
        return snapshot

    async def _delete(self, wanted: str) -> None:
        snapshot = self.find(wanted)
        self._check_changeable()
        if snapshot.id in self._readers:
            raise InUse(f"Snapshot '{snapshot.name}' (id {snapshot.id}) is in use")
        self._dying = snapshot
        try:
            await self._delete_unused(snapshot)
        finally:
            self._dying = None

    async def _delete_unused(self, snapshot: Snapshot) -> None:
        image = self._image
        l1 = await read_l1(image, snapshot)
        left = [each for each in self.entries if each is not snapshot]
        await self._begin()
        try:
            table = await image.write_new(table_of.encode_table(left)) if left else 0
            await self._switch_table(left, table)
            await self._lower(l1, SNAPSHOT)
            if len(l1):
                image.frees.add(snapshot.l1_offset, 8 * len(l1), SNAPSHOT)
            await flag_own(self._image)
        except (CommandError, IoError):
            await self._end_failed()
            raise
        await image.settle_all()

    async def _apply(self, wanted: str) -> None:
        image = self._image
        snapshot = self.find(wanted)
        self._check_changeable()
        size = image.header.size if snapshot.disk_size is None else snapshot.disk_size
        needed = image.header.l1_needed(size)
        saved = await read_l1(image, snapshot)
        if needed > len(saved):
            raise CommandError(f"Snapshot '{snapshot.name}' has an L1 table too small for its disk")
        l1 = array("Q", (entry & ~t.COPIED for entry in saved[:needed]))
        await self._begin()
        try:
            await self._raise(l1)
            try:
                at = await image.write_new(t.dump_entries(l1) or bytes(8))
                await image.commit.run(with_refcounts=True)
            except (CommandError, IoError):
                await self._sink(l1)
                raise
            await self._switch_active(size, l1, at)
            for bitmap in image.node.bitmaps.values():
                bitmap.resize(size)
                bitmap.mark(0, size)
        except (CommandError, IoError):
            await self._end_failed()
            raise
        await image.settle_all()

    async def _switch_active(self, size: int, l1: Entries[int], at: int) -> None:
        """Have the header tell of another L1 table, and let go of what the old one led to."""
        image = self._image
        before, old = image.header, image.tables.l1
        await image.write_fields(_ACTIVE_AT, _ACTIVE.pack(size, 0, len(l1), at))
        image.header = replace(image.header, size=size, l1_size=len(l1), l1_table_offset=at)
        image.node.size = size
        image.tables.forget_from(0)
        image.tables.l1 = l1
        await self._lower(old, OTHER)
        if before.l1_size:
            image.forget_metadata(before.l1_table_offset, 8 * before.l1_size)
            image.frees.add(before.l1_table_offset, 8 * before.l1_size, OTHER)
        image.note_metadata()
        await flag_own(self._image)

    def _check_changeable(self) -> None:
        check_no_data_file(self._image)
        if self._image.header.version < 3:
            raise CommandError(
                f"Internal snapshots of node '{self._image.node.name}' cannot be changed: a crash "
                "could damage an image of version 2 (`qemu-img amend -o compat=1.1` makes it 3)"
            )

    # --- steps -----------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Have everything on disk, nothing to free, no L2 table in memory, and the dirty bit."""
        image = self._image
        await image.settle_all()
        await image.begin_changes()
        image.tables.forget_from(0)
        header = image.header
        if header.version >= 3 and not header.incompatible & h.DIRTY:
            await image.write_features(replace(header, incompatible=header.incompatible | h.DIRTY))

    async def _end_failed(self) -> None:
        """Clean up as far as that goes; otherwise the dirty bit stays, and the next open does."""
        try:
            await flag_own(self._image)
            await self._image.settle_all()
        except (CommandError, IoError) as error:
            _log.error("node '%s': behind a failed snapshot: %s", self._image.node.name, error)

    async def _switch_table(self, entries: list[Snapshot], at: int) -> None:
        """Have the header tell of another snapshot table; the counts are on disk then, too."""
        image = self._image
        before = image.header
        await image.commit.run(with_refcounts=True)
        await image.write_fields(h.SNAPSHOTS_AT, h.SNAPSHOTS_FIELDS.pack(len(entries), at))
        if before.nb_snapshots:
            length = len(table_of.encode_table(self.entries))
            image.frees.add(before.snapshots_offset, length, OTHER)
        image.header = replace(image.header, nb_snapshots=len(entries), snapshots_offset=at)
        self.entries = entries

    async def _raise(self, l1: Entries[int]) -> None:
        """Count one reference more to everything that an L1 table leads to.

        Raises:
            CommandError: A refcount would be too large. Nothing has changed.
            IoError: A table cannot be read, or is damaged. Nothing has changed.
        """
        done = 0
        try:
            async for first, count in self._reached(l1):
                await self._image.counts.increase(first, count)
                done += 1
        except (CommandError, IoError):
            await self._sink(l1, done)
            raise

    async def _sink(self, l1: Entries[int], most: int = sys.maxsize) -> None:
        """Undo `_raise`, of which only so many steps may have been done; nothing refers to it."""
        async for first, count in self._reached(l1):
            if not most:
                return
            most -= 1
            await self._image.counts.decrease(first, count)

    async def _lower(self, l1: Entries[int], why: int) -> None:
        """Let go of everything that an L1 table leads to, of which nothing on disk tells now."""
        image = self._image
        async for first, count in self._reached(l1):
            bits = image.header.cluster_bits
            image.frees.add(first << bits, count << bits, why)
            if len(image.frees.waiting) > MAX_QCOW2_FREES:
                await image.commit.run(with_refcounts=True)

    async def _reached(self, l1: Entries[int]) -> AsyncIterator[tuple[int, int]]:
        """Yield (first, count) of the host clusters that an L1 table leads to.

        Each L2 table comes behind what it leads to: it has been read by then.
        """
        bits = self._image.header.cluster_bits
        for entry in l1:
            at = _table_offset(self._image, entry)
            if at:
                for first, count in _host_runs(self._image, await _read_table(self._image, at)):
                    yield first, count
                yield at >> bits, 1

    async def _unflag(self) -> None:
        """Have the disk call no cluster its own any more."""
        tables = self._image.tables
        for index, entry in enumerate(tables.l1):
            at = _table_offset(self._image, entry)
            if not at:
                continue
            table = await _read_table(self._image, at)
            if _clear_flags(self._image, table):
                await self._image.write_file(at, t.dump_entries(table))
            tables.l1[index] = entry & ~t.COPIED
            tables.l1_dirty.add(index)


def check_no_data_file(image: Image) -> None:
    """Check that an image keeps the data of its snapshots itself: in another file it is shared.

    Raises:
        CommandError: It does not.
    """
    if image.header.has_data_file:
        raise CommandError("Internal snapshots cannot be used with an external data file")


async def flag_own(image: Image) -> None:
    """Have the disk call those clusters its own that nobody else refers to.

    Nothing is in flight, and no L2 table in memory. Other flags than those of clusters that may
    be called so do not change.

    Raises:
        IoError: It failed; the rest are not called so, which is right, too.
    """
    tables = image.tables
    await image.commit.run(with_refcounts=True)
    while image.frees.waiting:
        await image.commit.run(with_refcounts=True)
    for index, entry in enumerate(tables.l1):
        at = _table_offset(image, entry)
        if not at:
            continue
        table = await _read_table(image, at)
        if await _set_flags(image, table):
            await image.write_file(at, t.dump_entries(table))
        if await image.counts.count(at >> image.header.cluster_bits) == 1:
            tables.l1[index] = entry | t.COPIED
            tables.l1_dirty.add(index)


async def _set_flags(image: Image, table: Entries[int]) -> bool:
    """Set the flags of an L2 table; tell whether there was one to set."""
    has_changed = False
    for index in range(0, len(table), 2 if image.geometry.is_extended else 1):
        entry = table[index]
        host = entry & t.OFFSET_MASK
        if not host or entry & (t.COMPRESSED_FLAG | t.COPIED):
            continue
        if await image.counts.count(host >> image.header.cluster_bits) == 1:
            table[index] = entry | t.COPIED
            has_changed = True
    return has_changed


def _table_offset(image: Image, entry: int) -> int:
    try:
        return t.table_offset(entry, image.header.cluster_bits)
    except ImageError as error:
        raise image.damaged(error) from error


async def _read_table(image: Image, at: int) -> Entries[int]:
    if at + image.header.cluster_size > image.file.size:
        raise image.damaged(ImageError(f"L2 table at {at:#x} is behind the end of the file"))
    return t.load_entries(await image.read_file(at, image.header.cluster_size))


async def read_l1(image: Image, snapshot: Snapshot) -> Entries[int]:
    """Return the L1 table of a snapshot.

    Raises:
        IoError: It cannot be read, or is not in the file.
    """
    length = 8 * snapshot.l1_entries
    if snapshot.l1_offset + length > image.file.size:
        raise image.damaged(ImageError(f"L1 table of snapshot '{snapshot.id}' is not in the file"))
    return t.load_entries(await image.read_file(snapshot.l1_offset, length))


def _host_runs(image: Image, table: Entries[int]) -> Iterable[tuple[int, int]]:
    """Yield (first, count) of the host clusters that an L2 table refers to, as often as it does."""
    bits = image.header.cluster_bits
    first = count = 0
    for entry in table[:: 2 if image.geometry.is_extended else 1]:
        if entry & t.COMPRESSED_FLAG:
            at, length = t.compressed_range(entry, bits)
            start = at >> bits
            here = (at + length - 1 >> bits) - start + 1
        elif entry & t.OFFSET_MASK and not entry & t.OFFSET_MASK & image.geometry.inside_mask:
            start, here = (entry & t.OFFSET_MASK) >> bits, 1
        else:
            continue
        if start == first + count:
            count += here
            continue
        if count:
            yield first, count
        first, count = start, here
    if count:
        yield first, count


def _clear_flags(image: Image, table: Entries[int]) -> bool:
    """Clear the flags of an L2 table; tell whether there was one to clear."""
    has_changed = False
    for index in range(0, len(table), 2 if image.geometry.is_extended else 1):
        if table[index] & t.COPIED:
            table[index] &= ~t.COPIED
            has_changed = True
    return has_changed
