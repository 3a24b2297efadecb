"""A qcow2 image as tests see it: whole in memory, read plainly, and checked like `qemu-img check`.

It shares no code with the product. `Image(data).check()` counts what refers to each cluster and
compares that with the refcounts; `Image(data).content()` is what the disk holds. It is for images
of a few MiB, of which a test looks at thousands; tests/block/qcow2/test_checker.py holds it to
qemu-img.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00
DIRTY, CORRUPT, DATA_FILE, EXTENDED = 1, 2, 4, 16


class Broken(Exception):
    """The image cannot be read here."""


@dataclass
class Found:
    """What is wrong with an image.

    Attributes:
        corruptions: In words; also of what a dirty image may have.
        leaks: Clusters with a refcount above what refers to them.
        dirty: The dirty bit is set: refcounts are to be made anew by who opens it.
    """

    corruptions: list[str] = field(default_factory=list)
    leaks: int = 0
    dirty: bool = False


class Image:
    """See the module.

    Args:
        data: The file.
        backing: What a backing file reads as; zeroes behind its end.
        data_file: The external data file.
    """

    def __init__(self, data: bytes, backing: bytes = b"", data_file: bytes | None = None) -> None:
        self.data = data
        self.backing = backing
        self.data_file = data_file
        if len(data) < 72 or data[:4] != b"QFI\xfb":
            raise Broken("no qcow2 image")
        (self.version, _, _, self.bits, self.size, _, self.l1_size, self.l1_at) = (
            struct.unpack_from(">IQIIQIIQ", data, 4)
        )
        self.table_at, self.table_clusters, self.snapshot_count, self.snapshots_at = (
            struct.unpack_from(">QIIQ", data, 48)
        )
        self.incompatible = self.autoclear = 0
        self.order, self.header_length = 4, 72
        if self.version == 3:
            self.incompatible, _, self.autoclear, self.order, self.header_length = (
                struct.unpack_from(">QQQII", data, 72)
            )
        self.cluster = 1 << self.bits
        self.extended = bool(self.incompatible & EXTENDED)
        self.entry_size = 16 if self.extended else 8
        self.per_l2 = self.cluster // self.entry_size
        self.compressed_shift = 62 - (self.bits - 8)

    # --- tables --------------------------------------------------------------------------------

    def words(self, offset: int, count: int) -> tuple[int, ...]:
        """Big-endian u64 of the file; zeroes behind its end."""
        raw = self.data[offset : offset + 8 * count]
        return struct.unpack(f">{count}Q", raw + bytes(8 * count - len(raw)))

    def snapshots(self) -> list[dict[str, int | str]]:
        found = []
        at = self.snapshots_at
        for _ in range(self.snapshot_count):
            if at + 40 > len(self.data):
                raise Broken("the snapshot table ends too early")
            l1_at, l1_size, id_length, name_length = struct.unpack_from(">QIHH", self.data, at)
            extra = struct.unpack_from(">I", self.data, at + 36)[0]
            size = struct.unpack_from(">Q", self.data, at + 48)[0] if extra >= 16 else self.size
            texts = at + 40 + extra
            name = self.data[texts + id_length : texts + id_length + name_length]
            found.append(
                {
                    "l1_at": l1_at,
                    "l1_size": l1_size,
                    "id": self.data[texts : texts + id_length].decode(),
                    "name": name.decode(),
                    "size": size,
                }
            )
            at += -(-(40 + extra + id_length + name_length) // 8) * 8
        self.snapshots_length = at - self.snapshots_at
        return found

    def l2_entries(self, entry: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index, entry, bitmap of subclusters) of an L2 table, those that are not 0."""
        words = self.words(entry & OFFSET, self.cluster // 8)
        step = self.entry_size // 8
        for index in range(self.per_l2):
            value = words[index * step]
            bitmap = words[index * step + 1] if self.extended else 0
            if value or bitmap:
                yield index, value, bitmap

    # --- check -----------------------------------------------------------------------------------

    def check(self) -> Found:
        found = Found(dirty=bool(self.incompatible & DIRTY))
        self._found = found
        self._refs: Counter[int] = Counter()
        self._refer(0, self.cluster, "header")
        self._refer(self.table_at, self.table_clusters << self.bits, "refcount table")
        self._refer_l1(self.l1_at, self.l1_size, "active")
        if self.snapshot_count:
            try:
                snapshots = self.snapshots()
            except (Broken, struct.error) as error:
                found.corruptions.append(str(error))
                return found
            self._refer(self.snapshots_at, self.snapshots_length, "snapshot table")
            for each in snapshots:
                self._refer_l1(int(each["l1_at"]), int(each["l1_size"]), f"snapshot {each['id']}")
        self._refer_bitmaps()
        counts = self._refcounts()
        self._compare(counts)
        if not found.dirty:
            self._check_copied(counts)
        return found

    def _bad(self, text: str) -> None:
        self._found.corruptions.append(text)

    def _refer(self, offset: int, length: int, what: str, *, aligned: bool = True) -> None:
        if length == 0:
            return
        if aligned and offset % self.cluster:
            self._bad(f"{what}: {offset:#x} is not aligned")
            return
        if offset == 0 and what != "header":
            self._bad(f"{what}: is in the header")
        if offset + length - len(self.data) >= self.cluster:
            self._bad(f"{what}: {offset:#x}+{length:#x} is behind the end of the file")
            return
        for cluster in range(offset >> self.bits, (offset + length - 1 >> self.bits) + 1):
            self._refs[cluster] += 1

    def _refer_l1(self, at: int, count: int, what: str) -> None:
        self._refer(at, count * 8, f"{what} L1 table")
        for index, entry in enumerate(self.words(at, count)):
            if not entry:
                continue
            if entry & ~(OFFSET | COPIED):
                self._bad(f"{what} L1 entry {index} has reserved bits: {entry:#x}")
            self._refer(entry & OFFSET, self.cluster, f"{what} L2 table {index}")
            if (entry & OFFSET) + self.cluster > len(self.data) + self.cluster:
                continue
            for number, value, bitmap in self.l2_entries(entry):
                self._refer_data(value, bitmap, f"{what} entry {index}.{number}")

    def _refer_data(self, value: int, bitmap: int, what: str) -> None:
        if value & COMPRESSED:
            if value & COPIED:
                self._bad(f"{what}: a compressed cluster says it is not shared")
            start, length = self._compressed_range(value)
            self._refer(start & ~511, length + (start & 511), what, aligned=False)
            return
        offset = value & OFFSET
        # With subclusters bit 0 is reserved, and qemu-img does not mind.
        if value & ~(OFFSET | COPIED | 1):
            self._bad(f"{what} has reserved bits: {value:#x}")
        if self.extended and bitmap & bitmap >> 32 & 0xFFFF_FFFF:
            self._bad(f"{what} has subclusters that are both allocated and zero: {bitmap:#x}")
        if self.extended and not offset and bitmap & 0xFFFF_FFFF and self.data_file is None:
            self._bad(f"{what} has subclusters without a cluster")
        if offset and self.data_file is None:
            self._refer(offset, self.cluster, what)

    def _refer_bitmaps(self) -> None:
        if not self.autoclear & 1:
            return
        at = self.header_length
        while True:
            kind, length = struct.unpack_from(">II", self.data, at)
            if kind == 0:
                return
            if kind == 0x23852875:
                break
            at += 8 + -(-length // 8) * 8
        count, _, size, offset = struct.unpack_from(">IIQQ", self.data, at + 8)
        self._refer(offset, size, "bitmap directory")
        at = offset
        for _ in range(count):
            table_at, entries, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", self.data, at)
            self._refer(table_at, entries * 8, "bitmap table")
            for entry in self.words(table_at, entries):
                if entry & OFFSET:
                    self._refer(entry & OFFSET, self.cluster, "bitmap")
            at += -(-(24 + name + extra) // 8) * 8

    def _refcounts(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        bits = 1 << self.order
        per_block = self.cluster * 8 // bits
        for number, at in enumerate(
            self.words(self.table_at, self.table_clusters << self.bits - 3)
        ):
            if not at:
                continue
            self._refer(at, self.cluster, f"refcount block {number}")
            block = self.data[at : at + self.cluster]
            block += bytes(self.cluster - len(block))
            for index in range(per_block):
                if bits >= 8:
                    width = bits // 8
                    count = int.from_bytes(block[index * width : (index + 1) * width], "big")
                else:
                    count = block[index * bits // 8] >> index * bits % 8 & (1 << bits) - 1
                if count:
                    counts[number * per_block + index] = count
        return counts

    def _compare(self, counts: dict[int, int]) -> None:
        for cluster, refs in self._refs.items():
            if counts.get(cluster, 0) < refs and not self._found.dirty:
                self._bad(f"cluster {cluster:#x} has refcount {counts.get(cluster, 0)}, not {refs}")
        end = -(-len(self.data) // self.cluster)  # qemu-img looks no further either
        self._found.leaks = sum(
            count > self._refs[cluster] for cluster, count in counts.items() if cluster < end
        )
        if self._found.dirty and not self.snapshot_count:
            shared = [cluster for cluster, refs in self._refs.items() if refs > 1]
            if shared and not self._has_compressed():
                self._bad(f"clusters are used twice: {shared[:5]}")

    def _has_compressed(self) -> bool:
        return any(
            value & COMPRESSED
            for entry in self.words(self.l1_at, self.l1_size)
            if entry
            for _, value, _ in self.l2_entries(entry)
        )

    def _check_copied(self, counts: dict[int, int]) -> None:
        for index, entry in enumerate(self.words(self.l1_at, self.l1_size)):
            if not entry:
                continue
            count = counts.get((entry & OFFSET) >> self.bits, 0)
            if (count == 1) != bool(entry & COPIED):
                self._bad(f"L1 entry {index} ({entry:#x}): refcount {count}")
            if self.data_file is not None:
                continue
            for number, value, _ in self.l2_entries(entry):
                if value & COMPRESSED or not value & OFFSET:
                    continue
                count = counts.get((value & OFFSET) >> self.bits, 0)
                if (count == 1) != bool(value & COPIED):
                    self._bad(f"L2 entry {index}.{number} ({value:#x}): refcount {count}")

    # --- content -----------------------------------------------------------------------------

    def content(self, snapshot: str | None = None) -> bytes:
        """All bytes of the disk, or of the snapshot with that id or name."""
        l1_at, l1_size, size = self.l1_at, self.l1_size, self.size
        if snapshot is not None:
            each = next(s for s in self.snapshots() if snapshot in (s["id"], s["name"]))
            l1_at, l1_size, size = int(each["l1_at"]), int(each["l1_size"]), int(each["size"])
        base = self.backing[:size]
        disk = bytearray(base + bytes(size - len(base)))
        for l1_index, entry in enumerate(self.words(l1_at, l1_size)):
            if not entry & 0x00FFFFFFFFFFFE00:  # its other bits say nothing
                continue
            for number, value, bitmap in self.l2_entries(entry):
                at = (l1_index * self.per_l2 + number) << self.bits
                if at < size:
                    self._place(disk, at, value, bitmap)
        return bytes(disk[:size])

    def _place(self, disk: bytearray, at: int, value: int, bitmap: int) -> None:
        if value & COMPRESSED:
            start, length = self._compressed_range(value)
            try:
                unpacked = zlib.decompressobj(-15).decompress(
                    self.data[start : start + length], self.cluster
                )
            except zlib.error as error:
                raise Broken(str(error)) from None
            self._put(disk, at, unpacked, self.cluster)
        elif not self.extended:
            if value & 1:
                self._put(disk, at, b"", self.cluster)
            elif value & OFFSET or (self.data_file is not None and value & COPIED):
                self._put(disk, at, self._host(value & OFFSET, self.cluster), self.cluster)
        else:
            sub = self.cluster // 32
            for index in range(32):
                if bitmap >> index & 1:
                    offset = (value & OFFSET) + index * sub
                    self._put(disk, at + index * sub, self._host(offset, sub), sub)
                elif bitmap >> (32 + index) & 1:
                    self._put(disk, at + index * sub, b"", sub)

    def _host(self, offset: int, length: int) -> bytes:
        source = self.data if self.data_file is None else self.data_file
        return source[offset : offset + length]

    @staticmethod
    def _put(disk: bytearray, at: int, data: bytes, length: int) -> None:
        length = min(length, len(disk) - at)
        if length > 0:
            disk[at : at + length] = (data + bytes(length))[:length]

    def _compressed_range(self, value: int) -> tuple[int, int]:
        start = value & (1 << self.compressed_shift) - 1
        sectors = ((value & COMPRESSED - 1) >> self.compressed_shift) + 1
        return start, sectors * 512 - (start & 511)
