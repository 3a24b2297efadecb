"""The header of a qcow2 image and its extensions: parsed whole, written back whole.

::

    0           header_length                              backing file name    cluster size
    | fields    | extension | extension | ... | end | gap | name | gap          |

Invariants
  H1  What is not understood (fields behind the known ones, extensions, names of features) is kept,
      in its order, and written back by `encode_header`.
  H2  A parsed header is in bounds: tables are aligned to clusters and no longer than their limits;
      features that must be understood are.

The names of fields are those of the format document.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import (
    MAX_QCOW2_BACKING_NAME,
    MAX_QCOW2_EXTENSIONS,
    MAX_QCOW2_L1,
    MAX_QCOW2_REFCOUNT_TABLE,
    MAX_QCOW2_SNAPSHOTS,
    MAX_SIZE,
)
from nbdfleece.base.units import align_up, ceil_div

MAGIC: Final = b"QFI\xfb"
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_CLUSTER_BITS_EXTENDED: Final = 14
SUBCLUSTERS: Final = 32  # of a cluster, with extended L2 entries
MAX_REFCOUNT_ORDER: Final = 6

LENGTH_V2: Final = 72
LENGTH_V3: Final = 104
LENGTH_NOW: Final = 112  # with the compression type and its padding
FIRST_READ: Final = LENGTH_NOW  # bytes that `header_area` needs

# Incompatible features
DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
KNOWN_INCOMPATIBLE: Final = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
# Compatible features
LAZY_REFCOUNTS: Final = 1 << 0
# Autoclear features
BITMAPS: Final = 1 << 0
DATA_FILE_RAW: Final = 1 << 1
KNOWN_AUTOCLEAR: Final = BITMAPS | DATA_FILE_RAW

# Types of header extensions
EXT_END: Final = 0x00000000
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_CRYPTO: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441

# Compression types
ZLIB: Final = 0
ZSTD: Final = 1
COMPRESSION_NAMES: Final = {ZLIB: "zlib", ZSTD: "zstd"}

_CRYPT_NAMES: Final = {1: "AES", 2: "LUKS"}

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
SECTOR: Final = 512  # what a disk writes as a whole
_EXTENSION: Final = struct.Struct(">II")
_FEATURE: Final = struct.Struct(">BB46s")

# Where single fields lie, for who changes them in place: each change fits into one sector.
L1_SIZE_AT: Final = 36
L1_FIELDS: Final = struct.Struct(">IQ")  # l1_size, l1_table_offset
SIZE_AT: Final = 24
SIZE_FIELD: Final = struct.Struct(">Q")
REFCOUNT_TABLE_AT: Final = 48
REFCOUNT_TABLE_FIELDS: Final = struct.Struct(">QI")  # offset, clusters
SNAPSHOTS_AT: Final = 60
SNAPSHOTS_FIELDS: Final = struct.Struct(">IQ")  # nb_snapshots, snapshots_offset
FEATURES_AT: Final = 72
FEATURES_FIELDS: Final = struct.Struct(">QQQ")  # incompatible, compatible, autoclear


class Extension(NamedTuple):
    """A header extension: its type and its bytes, without padding."""

    type: int
    data: bytes


class FeatureName(NamedTuple):
    """An entry of the feature name table.

    Attributes:
        kind: 0: incompatible, 1: compatible, 2: autoclear.
        bit: 0 to 63.
        name: For people.
    """

    kind: int
    bit: int
    name: str


FEATURE_NAMES: Final = (
    FeatureName(0, 0, "dirty bit"),
    FeatureName(0, 1, "corrupt bit"),
    FeatureName(0, 2, "external data file"),
    FeatureName(0, 3, "compression type"),
    FeatureName(0, 4, "extended L2 entries"),
    FeatureName(1, 0, "lazy refcounts"),
    FeatureName(2, 0, "bitmaps"),
    FeatureName(2, 1, "raw external data"),
)
"""What every image of version 3 says of the features that are known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of an image. Offsets and sizes are bytes, but where the name says otherwise.

    Attributes:
        version: 2 or 3.
        cluster_bits: 9 to 21.
        size: Of the virtual disk.
        l1_size: Entries of the active L1 table.
        l1_table_offset: Where it is.
        refcount_table_offset: Where the refcount table is.
        refcount_table_clusters: How long it is.
        nb_snapshots: Number of internal snapshots.
        snapshots_offset: Where their table is; of no meaning without any.
        incompatible: Features that must be understood.
        compatible: Features that may be ignored.
        autoclear: Features that a writer who does not know them must clear.
        refcount_order: A refcount has 1 << this bits.
        compression_type: ZLIB or ZSTD.
        header_length: As stored; 72 in version 2.
        more: Fields behind the known ones, kept as they are.
        extensions: In their order, without the end marker.
        backing_file: The name of the backing file as stored; None: there is none.
        backing_offset: Where it is; when that is not free any more, `placed` finds another place.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = ZLIB
    header_length: int = LENGTH_NOW
    more: bytes = b""
    extensions: tuple[Extension, ...] = ()
    backing_file: str | None = None
    backing_offset: int = 0

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes and tell of subclusters."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.has_extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in another file."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def is_data_file_raw(self) -> bool:
        """Whether that file is the disk as it is, without these tables."""
        return bool(self.autoclear & DATA_FILE_RAW)

    @property
    def refcount_bits(self) -> int:
        """Bits of a refcount."""
        return 1 << self.refcount_order

    def extension(self, type_: int) -> bytes | None:
        """Return the bytes of the first extension of a type, or None."""
        for extension in self.extensions:
            if extension.type == type_:
                return extension.data
        return None

    def with_extension(self, type_: int, data: bytes | None) -> Header:
        """Return this header with an extension set in its place, added at the end, or removed."""
        kept: list[Extension] = []
        for extension in self.extensions:
            if extension.type != type_:
                kept.append(extension)
            elif data is not None:
                kept.append(Extension(type_, data))
                data = None
        if data is not None:
            kept.append(Extension(type_, data))
        return replace(self, extensions=tuple(kept))

    @property
    def backing_format(self) -> str | None:
        """The driver of the backing file, if the header says it."""
        return _text(self.extension(EXT_BACKING_FORMAT))

    @property
    def data_file_name(self) -> str | None:
        """The name of the external data file, if the header says it."""
        return _text(self.extension(EXT_DATA_FILE))

    def l1_needed(self, size: int) -> int:
        """Return how many L1 entries a disk of `size` bytes needs."""
        return ceil_div(size, self.cluster_size * self.l2_entries)


def header_area(data: bytes) -> int:
    """Return how many bytes from the start of the image `parse_header` needs: its first cluster.

    Args:
        data: The first FIRST_READ bytes, or all when the image is shorter.

    Raises:
        ImageError: This is no qcow2 image, or one whose clusters have an impossible size.
    """
    if data[:4] != MAGIC or len(data) < LENGTH_V2:
        raise ImageError("Image is not in qcow2 format")
    version, _, _, cluster_bits = struct.unpack_from(">IQII", data, 4)
    if version not in (2, 3):
        raise ImageError(f"Unsupported qcow2 version {version}")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ImageError(f"Unsupported cluster size: 2^{cluster_bits}")
    return 1 << int(cluster_bits)


def parse_header(data: bytes) -> Header:
    """Return the header of an image.

    Args:
        data: As many bytes from its start as `header_area` said, or all when it is shorter.

    Raises:
        ImageError: It is damaged, or asks for what is not understood.
    """
    area = data[: header_area(data[:FIRST_READ])]
    (
        _,
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        nb_snapshots,
        snapshots_offset,
    ) = _V2.unpack_from(area)
    incompatible = compatible = autoclear = 0
    refcount_order, header_length = 4, LENGTH_V2
    compression_type, more = ZLIB, b""
    if version == 3:
        if len(area) < LENGTH_V3:
            raise ImageError("qcow2 header is too short")
        incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(
            area, LENGTH_V2
        )
        if header_length < LENGTH_V3 or header_length % 8:
            raise ImageError(f"qcow2 header length {header_length} is impossible")
        if header_length > len(area):
            raise ImageError("qcow2 header exceeds cluster size")
        if header_length > LENGTH_V3:
            compression_type = area[LENGTH_V3]
            more = area[LENGTH_NOW:header_length]
    extensions_end = backing_offset if backing_offset else len(area)
    if backing_offset > len(area):
        raise ImageError("Invalid backing file offset")
    extensions = _parse_extensions(area, header_length, extensions_end)
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        compression_type=compression_type,
        header_length=header_length,
        more=more,
        extensions=extensions,
        backing_file=_parse_backing(area, backing_offset, backing_size),
        backing_offset=backing_offset,
    )
    _check_features(header, crypt_method)
    _check_tables(header)
    return header


def placed(header: Header) -> Header:
    """Return the header with its backing file name in a place that is free.

    That is where it was, if the extensions leave it; otherwise far enough behind them, and behind
    the old place, to stay there when they get longer. So a name seldom moves, and when it does, the
    new one can be written before the header tells of it.
    """
    if header.backing_file is None:
        return replace(header, backing_offset=0)
    size = len(_name(header))
    end, area = _length(header) + len(_extensions(header)), header.cluster_size
    before = header.backing_offset
    if before >= end and before + size <= area:
        return header
    roomy = align_up(max(end, before + size if before else 0), SECTOR) + SECTOR
    at = roomy if roomy + size <= area else max(end, (area - size) & ~7)
    return replace(header, backing_offset=at)


def placed_apart(header: Header, before: Header) -> Header | None:
    """Return the header with its name where `before` has neither its own nor an extension.

    So it can be written before the header tells of it. None: there is no such place.
    """
    if header.backing_file is None:
        return placed(header)
    size, area = len(_name(header)), header.cluster_size
    end = max(_length(each) + len(_extensions(each)) for each in (header, before))
    old, old_size = before.backing_offset, len(_name(before))
    roomy = align_up(max(end, old + old_size), SECTOR) + SECTOR
    for at, stop in ((roomy, area), (end, old if old_size else area)):
        if at + size <= stop:
            return replace(header, backing_offset=at)
    return None


def without_feature_names(header: Header) -> Header:
    """Return the header without what is only for people."""
    return header.with_extension(EXT_FEATURE_NAMES, None)


def is_in_first_sector(header: Header) -> bool:
    """Tell whether the fields and all extensions are in one sector."""
    return _length(header) + len(_extensions(header)) <= SECTOR


def is_torn_easily(header: Header, type_: int) -> bool:
    """Tell whether an extension is in two sectors, of which a crash may leave one."""
    at = _length(header)
    for extension in header.extensions:
        end = at + _EXTENSION.size + len(extension.data)
        if extension.type == type_:
            return at // SECTOR != (end - 1) // SECTOR
        at = align_up(end, 8)
    return False


def encode_header(header: Header) -> bytes:
    """Return the bytes of the header, its extensions and the backing file name (see `placed`).

    Raises:
        ImageError: They do not fit into the first cluster.
    """
    header = placed(header)
    extensions, length, name = _extensions(header), _length(header), _name(header)
    backing_offset, backing_size = header.backing_offset, len(name)
    fields = _V2.pack(
        MAGIC,
        header.version,
        backing_offset,
        backing_size,
        header.cluster_bits,
        header.size,
        0,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    )
    if header.version == 3:
        fields += _V3.pack(
            header.incompatible,
            header.compatible,
            header.autoclear,
            header.refcount_order,
            length,
        )
        if length > LENGTH_V3:
            fields += bytes((header.compression_type,)) + bytes(LENGTH_NOW - LENGTH_V3 - 1)
        fields += header.more
        assert len(fields) == length, "header_length fits the fields"
    whole = fields + extensions
    if name:
        whole = whole.ljust(backing_offset, b"\0") + name
    if len(name) > MAX_QCOW2_BACKING_NAME:
        raise ImageError(f"Backing file name is longer than {MAX_QCOW2_BACKING_NAME} bytes")
    if len(whole) > header.cluster_size:
        raise ImageError("qcow2 header, its extensions and the backing file name exceed a cluster")
    return whole


def parse_feature_names(data: bytes) -> list[FeatureName]:
    """Return the entries of a feature name table; a torn one at its end is left out."""
    whole = len(data) - len(data) % _FEATURE.size
    return [
        FeatureName(kind, bit, name.rstrip(b"\0").decode("utf-8", "replace"))
        for kind, bit, name in _FEATURE.iter_unpack(data[:whole])
    ]


def encode_feature_names(names: tuple[FeatureName, ...] = FEATURE_NAMES) -> bytes:
    """Return the bytes of a feature name table."""
    return b"".join(_FEATURE.pack(kind, bit, name.encode()) for kind, bit, name in names)


# --- private ----------------------------------------------------------------------------------


def _length(header: Header) -> int:
    return header.header_length if header.version == 3 else LENGTH_V2


def _extensions(header: Header) -> bytes:
    return b"".join(
        _EXTENSION.pack(type_, len(data)) + data + bytes(-len(data) % 8)
        for type_, data in (*header.extensions, Extension(EXT_END, b""))
    )


def _name(header: Header) -> bytes:
    return (header.backing_file or "").encode("utf-8", "surrogateescape")


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogateescape")


def _parse_extensions(area: bytes, offset: int, end: int) -> tuple[Extension, ...]:
    found: list[Extension] = []
    while offset + _EXTENSION.size <= end:
        type_, length = _EXTENSION.unpack_from(area, offset)
        offset += _EXTENSION.size
        if type_ == EXT_END:
            break
        if length > end - offset:
            raise ImageError(f"Header extension {type_:#010x} is too large: {length} bytes")
        if len(found) == MAX_QCOW2_EXTENSIONS:
            raise ImageError(f"More than {MAX_QCOW2_EXTENSIONS} header extensions")
        found.append(Extension(type_, area[offset : offset + length]))
        offset += length + -length % 8
    return tuple(found)


def _parse_backing(area: bytes, offset: int, size: int) -> str | None:
    if offset == 0:
        return None
    if size > MAX_QCOW2_BACKING_NAME or offset + size > len(area):
        raise ImageError("Backing file name is too long")
    return area[offset : offset + size].decode("utf-8", "surrogateescape") if size else None


def _check_features(header: Header, crypt_method: int) -> None:
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        table = parse_feature_names(header.extension(EXT_FEATURE_NAMES) or b"")
        names = {bit: name for kind, bit, name in table if kind == 0 and name}
        words = [
            names.get(bit, f"Unknown incompatible feature: {1 << bit:x}")
            for bit in range(64)
            if unknown >> bit & 1
        ]
        raise ImageError(f"Unsupported qcow2 feature(s): {', '.join(words)}")
    if crypt_method:
        name = _CRYPT_NAMES.get(crypt_method, f"method {crypt_method}")
        raise ImageError(f"qcow2 images encrypted with {name} are not supported")
    if bool(header.incompatible & COMPRESSION) != (header.compression_type != ZLIB):
        raise ImageError("qcow2: compression type and its feature bit contradict each other")
    if header.compression_type not in COMPRESSION_NAMES:
        raise ImageError(f"qcow2: unknown compression type {header.compression_type}")
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise ImageError("Reference count entry width too large; may not exceed 64 bits")
    if header.has_extended_l2 and header.cluster_bits < MIN_CLUSTER_BITS_EXTENDED:
        raise ImageError("Unsupported cluster size: extended L2 entries need 16 KiB at least")
    if header.is_data_file_raw and not header.has_data_file:
        raise ImageError("qcow2: raw external data without an external data file")
    if header.is_data_file_raw and header.backing_file is not None:
        raise ImageError("qcow2: a raw external data file excludes a backing file")


def _check_tables(header: Header) -> None:
    cluster = header.cluster_size
    if header.size > MAX_SIZE:
        raise ImageError(f"Image size {header.size} is too large")
    if header.l1_size * 8 > MAX_QCOW2_L1:
        raise ImageError("Active L1 table too large")
    if header.l1_needed(header.size) > header.l1_size:
        raise ImageError("L1 table is too small")
    if header.refcount_table_clusters * cluster > MAX_QCOW2_REFCOUNT_TABLE:
        raise ImageError("Image too large: its refcount table is")
    if header.refcount_table_clusters == 0:
        raise ImageError("Image does not contain a reference count table")
    if header.nb_snapshots > MAX_QCOW2_SNAPSHOTS:
        raise ImageError("Too many snapshots")
    tables = [
        ("Active L1 table", header.l1_table_offset, header.l1_size * 8),
        (
            "Reference count table",
            header.refcount_table_offset,
            header.refcount_table_clusters * cluster,
        ),
    ]
    if header.nb_snapshots:
        tables.append(("Snapshot table", header.snapshots_offset, 40))
    for name, offset, length in tables:
        is_empty = length == 0
        if offset % cluster or offset + length > MAX_SIZE or (offset == 0 and not is_empty):
            raise ImageError(f"{name} offset invalid")
    end = 0  # in the order of the file; each begins behind the one before
    for name, offset, length in sorted(tables, key=lambda table: table[1]):
        if length and offset < end:
            raise ImageError(f"{name} overlaps another table")
        end = max(end, offset + length)
