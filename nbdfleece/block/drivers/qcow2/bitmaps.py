"""The persistent bitmaps of a qcow2 node: loaded when it is opened, stored when it is closed.

In between they are in memory alone, and the image says so: `in_use` is set in their entries before
anything else changes, and cleared when they have been stored. So a bitmap that a crash has left is
found in use, and is inconsistent from then on.

Invariants
  B1  While the directory on disk does not say `in_use`, nothing of the image changes but by `store`
      (`begin` comes before the first change: image.begin_changes).
  B2  The header tells of another directory only when that, the tables and the bits it leads to, and
      their refcounts are on disk.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.base.limits import (
    MAX_QCOW2_BITMAP_BYTES,
    MAX_QCOW2_BITMAP_NAME,
    MAX_QCOW2_BITMAPS,
)
from nbdfleece.block.bitmap import DirtyBitmap
from nbdfleece.block.drain import quiet
from nbdfleece.block.drivers.qcow2.counts import OTHER
from nbdfleece.formats.qcow2 import bitmaps as b
from nbdfleece.formats.qcow2 import header as h

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable

    from nbdfleece.block.drivers.qcow2.image import Image

_log: Final = logging.getLogger(__name__)

_MAX_GRANULARITY: Final = 1 << 31
_STATES: Final = tuple(bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256))


class StoredBitmaps:
    """Persistent bitmaps of one image; see block.bitmap.BitmapKeeper.

    Args:
        image: Of which.
    """

    def __init__(self, image: Image) -> None:
        self._image: Final = image
        self._entries: dict[str, b.Entry] = {}  # as on disk
        self._is_begun = False

    # --- opening -------------------------------------------------------------------------------

    async def load(self) -> None:
        """Make the bitmaps of the node that the image has.

        Raises:
            ImageError: They are damaged.
            IoError: They cannot be read.
        """
        image = self._image
        header, node = image.header, image.node
        data = header.extension(h.EXT_BITMAPS)
        if data is None or not header.autoclear & h.BITMAPS:
            return
        extension = b.parse_extension(data, header.cluster_size)
        if extension.offset + extension.size > image.file.size:
            raise ImageError("the bitmap directory is not in the image's file")
        directory = await image.read_file(extension.offset, extension.size)
        entries = b.parse_directory(
            bytes(directory), extension.count, header.cluster_size, header.size
        )
        made: list[DirtyBitmap] = []
        for entry in entries:
            self._entries[entry.name] = entry
            if entry.usable:
                made.append(await self._make(entry))
        node.bitmaps.update((bitmap.name, bitmap) for bitmap in made)

    async def _make(self, entry: b.Entry) -> DirtyBitmap:
        node = self._image.node
        bitmap = DirtyBitmap(
            entry.name,
            size=self._image.header.size,
            granularity=1 << entry.granularity_bits,
            enabled=entry.auto and not entry.in_use,
        )
        bitmap.persistent = True
        bitmap.readonly = node.read_only
        if entry.in_use:
            bitmap.inconsistent = True
            bitmap.reason = "the image was not closed properly"
            return bitmap
        table = await self._read_table(entry)
        per_cluster = self._image.header.cluster_size * 8
        for index, at in enumerate(table):
            first = index * per_cluster
            if at == b.ALL_SET:
                self._set(bitmap, first, first + per_cluster)
            elif at != b.ALL_CLEAR:
                bits = await self._image.read_file(at, self._image.header.cluster_size)
                for start, end in _runs(bits):
                    self._set(bitmap, first + start, first + end)
        return bitmap

    @staticmethod
    def _set(bitmap: DirtyBitmap, first: int, last: int) -> None:
        offset = first * bitmap.granularity
        length = min(last * bitmap.granularity, bitmap.size) - offset
        if length > 0:
            bitmap.set(offset, length)

    async def _read_table(self, entry: b.Entry) -> array[int]:
        image = self._image
        length = 8 * entry.table_entries
        if entry.table_offset + length > image.file.size:
            raise ImageError(f"the table of bitmap '{entry.name}' is not in the image's file")
        data = await image.read_file(entry.table_offset, length)
        table = b.parse_table(bytes(data), image.header.cluster_size, entry.name)
        if max(table) > b.ALL_SET and max(table) + image.header.cluster_size > image.file.size:
            raise ImageError(f"bits of bitmap '{entry.name}' are not in the image's file")
        return table

    # --- in use (B1) -----------------------------------------------------------------------------

    async def begin(self) -> None:
        """Say on disk that the bitmaps are in use.

        Raises:
            IoError: It cannot be said; nothing may be changed.
        """
        if self._is_begun:
            return
        entries = [replace(entry, in_use=True) for entry in self._entries.values()]
        if entries:
            image = self._image
            data = image.header.extension(h.EXT_BITMAPS)
            assert data is not None, "it tells of them"
            at = b.parse_extension(data, image.header.cluster_size).offset
            await image.write_file(at, b.encode_directory(entries))
            await image.file.flush()
            self._entries = {entry.name: entry for entry in entries}
        self._is_begun = True

    def set_readonly(self, *, readonly: bool) -> None:
        """Follow the node, which is reopened."""
        for bitmap in self._persistent():
            bitmap.readonly = readonly

    def _persistent(self) -> list[DirtyBitmap]:
        found = self._image.node.bitmaps.values()
        # One with a store is kept elsewhere (beside the disk).
        return [one for one in found if one.persistent and one.name and one.store is None]

    # --- storing -------------------------------------------------------------------------------

    async def store(self) -> None:
        """Write the bitmaps, and clear `in_use`. Nothing is in flight.

        Raises:
            CommandError, IoError: It failed; on disk they are in use.
        """
        bitmaps = self._persistent()
        if not self._is_begun:
            new = [bitmap.name for bitmap in bitmaps if bitmap.name not in self._entries]
            if new:
                _log.error("node '%s': new bitmaps are lost: %s", self._image.node.name, new)
            return
        if bitmaps or self._entries:
            await self._image.begin_changes()
            wanted: dict[str, b.Entry] = {
                name: entry for name, entry in self._entries.items() if not entry.usable
            }
            for bitmap in bitmaps:
                if not bitmap.inconsistent:
                    wanted[bitmap.name] = await self._write(bitmap)
                elif bitmap.name in self._entries:
                    wanted[bitmap.name] = self._entries[bitmap.name]
            await self._switch(wanted)
        self._is_begun = False

    async def _write(self, bitmap: DirtyBitmap) -> b.Entry:
        """Write the bits and the table of a bitmap to new places."""
        image = self._image
        size = image.header.cluster_size
        bits = bitmap.granularity.bit_length() - 1
        if bitmap.successor is not None:
            bitmap.unite(bitmap.successor)
        table = [b.ALL_CLEAR] * b.table_entries(image.header.size, bits, size)
        cluster, index = bytearray(size), -1
        for first, data in bitmap.packed():
            done = 0
            while done < len(data):
                number, at = divmod(first // 8 + done, size)
                if number != index:
                    await self._write_bits(table, index, cluster)
                    cluster, index = bytearray(size), number
                part = data[done : done + size - at]
                cluster[at : at + len(part)] = part
                done += len(part)
        await self._write_bits(table, index, cluster)
        return b.Entry(
            name=bitmap.name,
            granularity_bits=bits,
            table_offset=await image.write_new(b.encode_table(table)),
            table_entries=len(table),
            auto=bitmap.recording,
        )

    async def _write_bits(self, table: list[int], index: int, cluster: bytearray) -> None:
        if index >= 0 and any(cluster):
            table[index] = await self._image.write_new(bytes(cluster))

    async def _switch(self, wanted: dict[str, b.Entry]) -> None:
        """Have the header tell of a new directory (B2), and let go of what the old one led to."""
        image = self._image
        before, old = image.header, self._entries
        data = b.encode_directory(wanted.values())
        extension = None
        if data:
            at = await image.write_new(data)
            extension = b.encode_extension(b.Extension(len(wanted), len(data), at))
        await image.commit.run(with_refcounts=True)
        header = before.with_extension(h.EXT_BITMAPS, extension)
        autoclear = before.autoclear & ~h.BITMAPS | (h.BITMAPS if data else 0)
        header = replace(
            header,
            autoclear=autoclear,
            refcount_table_offset=image.header.refcount_table_offset,
            refcount_table_clusters=image.header.refcount_table_clusters,
        )
        await image.write_header(header)
        self._entries = wanted
        kept = {entry.table_offset for entry in wanted.values()}
        gone = [entry for entry in old.values() if entry.table_offset not in kept]
        told = before.extension(h.EXT_BITMAPS)
        if told is not None and before.autoclear & h.BITMAPS:
            place = b.parse_extension(told, before.cluster_size)
            image.frees.add(place.offset, place.size, OTHER)
        await self._let_go(gone)

    async def _let_go(self, gone: Iterable[b.Entry]) -> None:
        image = self._image
        for entry in gone:
            try:
                table = await self._read_table(entry)
            except ImageError as error:
                _log.warning("node '%s': %s", image.node.name, error)
                continue
            for at in table:
                if at > b.ALL_SET:
                    image.frees.add(at, 1, OTHER)
            image.frees.add(entry.table_offset, 8 * entry.table_entries, OTHER)

    # --- changes (BitmapKeeper) ------------------------------------------------------------------

    async def keep(self, bitmap: DirtyBitmap) -> None:
        """Make a bitmap persistent: it is stored when the node is closed; see BitmapKeeper.keep."""
        image = self._image
        name, where = bitmap.name, f"Can't make bitmap '{bitmap.name}' persistent in"
        node = f"{where} '{image.node.name}'"
        if image.node.read_only:
            raise CommandError(f"{node}: Image is read-only")
        if image.header.version < 3:
            raise CommandError("Cannot store dirty bitmaps in qcow2 v2 files")
        if len(name.encode(errors="surrogateescape")) > MAX_QCOW2_BITMAP_NAME:
            raise CommandError(f"{node}: Name length exceeds {MAX_QCOW2_BITMAP_NAME} characters")
        if bitmap.granularity > _MAX_GRANULARITY:
            raise CommandError(f"{node}: Granularity exceeds maximum ({_MAX_GRANULARITY} bytes)")
        bits = bitmap.granularity.bit_length() - 1
        if b.bits_length(bitmap.size, bits) > MAX_QCOW2_BITMAP_BYTES:
            raise CommandError(f"{node}: Too much space will be occupied by the bitmap")
        if len(self._persistent()) >= MAX_QCOW2_BITMAPS:
            raise CommandError(f"{node}: Maximum number of persistent bitmaps is already reached")
        if name in self._entries:
            raise CommandError(f"{node}: Bitmap with the same name is already stored")
        extension = b.encode_extension(b.Extension(1, 0, 0))
        try:
            h.encode_header(image.header.with_extension(h.EXT_BITMAPS, extension))
        except ImageError as error:
            raise CommandError(f"{node}: {error}") from error
        bitmap.persistent = True

    def check_size(self, size: int) -> None:
        """Check that all that is kept can be stored when the disk has another size.

        Raises:
            CommandError: The image could not be opened any more.
        """
        for bitmap in self._persistent():
            bits = bitmap.granularity.bit_length() - 1
            if not bitmap.inconsistent and b.bits_length(size, bits) > MAX_QCOW2_BITMAP_BYTES:
                raise CommandError(
                    f"Too much space would be occupied by the bitmap '{bitmap.name}'"
                )

    async def forget(self, bitmap: DirtyBitmap) -> None:
        """Delete what is stored of a bitmap; see BitmapKeeper.forget."""
        if bitmap.name not in self._entries:
            return
        image = self._image
        try:
            async with quiet(image.node):
                await image.alone(lambda: self._forget(bitmap.name))
        except (ImageError, IoError) as error:
            raise CommandError(f"Failed to remove bitmap '{bitmap.name}': {error}") from error

    async def _forget(self, name: str) -> None:
        wanted = {each: entry for each, entry in self._entries.items() if each != name}
        if len(wanted) < len(self._entries):  # it may be gone by now
            await self._image.begin_changes()
            await self._switch(wanted)
            await self._image.commit.run()


def _runs(bits: bytes | bytearray) -> Iterable[tuple[int, int]]:
    """Yield (first, behind the last) of the runs of set bits, the lowest of a byte being first."""
    if not any(bits):
        return
    states = b"".join([_STATES[byte] for byte in bits])
    first = states.find(1)
    while first >= 0:
        last = states.find(0, first)
        if last < 0:
            last = len(states)
        yield first, last
        first = states.find(1, last)
