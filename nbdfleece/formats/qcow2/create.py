"""A new qcow2 image, as the pieces to write into an empty file.

::

    header | refcount table | refcount blocks | L1 table | L2 tables, data (preallocation only)

Every cluster up to the end has the refcount 1.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.base.errors import ImageError
from nbdfleece.base.limits import MAX_QCOW2_L1, MAX_QCOW2_REFCOUNT_TABLE, MAX_SIZE
from nbdfleece.base.units import ceil_div, is_power_of_2
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2 import refcounts, tables

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK: Final = 64 * 1024  # bytes of metadata made at once


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage:
    """What a new image is to be.

    Attributes:
        size: Bytes of the disk.
        cluster_size: A power of two from 512 to 2 MiB.
        version: 2 or 3.
        refcount_bits: A power of two from 1 to 64; 16 in version 2.
        extended_l2: Have subclusters.
        lazy_refcounts: Let refcounts be written late.
        compression_type: ZLIB or ZSTD.
        backing_file: Name of the backing file, or None.
        backing_format: Its driver.
        data_file: Name of the external data file, or None.
        data_file_raw: That file is the disk as it is.
        preallocate: Map every cluster of the disk, without writing data.
    """

    size: int
    cluster_size: int = 65536
    version: int = 3
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: int = h.ZLIB
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    preallocate: bool = False


class _Plan(NamedTuple):
    """How many clusters there are of each, in the order of the file."""

    table: int
    blocks: int
    l1: int
    l2: int
    data: int
    l1_entries: int

    @property
    def total(self) -> int:
        """All clusters, with the header's."""
        return 1 + self.table + self.blocks + self.l1 + self.l2 + self.data


def image_length(image: NewImage) -> int:
    """Return the bytes of the image's file; what `image_pieces` leaves out is to read as zeroes.

    Raises:
        ImageError: There can be no such image.
    """
    return _plan(image).total * image.cluster_size


def image_pieces(image: NewImage) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) to write into a file of zeroes.

    Raises:
        ImageError: There can be no such image.
    """
    plan = _plan(image)
    cluster = image.cluster_size
    order = image.refcount_bits.bit_length() - 1
    table_at = cluster
    blocks_at = table_at + plan.table * cluster
    l1_at = blocks_at + plan.blocks * cluster
    l2_at = l1_at + plan.l1 * cluster
    yield 0, h.encode_header(_header(image, plan, table_at, l1_at))
    offsets = (blocks_at + index * cluster for index in range(plan.blocks))
    yield table_at, tables.dump_entries(array("Q", offsets))
    per_block = 1 << refcounts.block_bits(image.cluster_size.bit_length() - 1, order)
    for index in range(plan.blocks):
        used = min(per_block, plan.total - index * per_block)
        whole = used + -used % 8  # an even number of bytes, whatever the width
        counts = refcounts.ones(used, order) + refcounts.zeroes(whole - used, order)
        yield blocks_at + index * cluster, refcounts.dump_counts(counts, order)
    if image.preallocate:
        l1 = array("Q", (l2_at + n * cluster | tables.COPIED for n in range(plan.l2)))
        yield l1_at, tables.dump_entries(l1)
        yield from _mapping(image, l2_at, l2_at + plan.l2 * cluster)


def _mapping(image: NewImage, l2_at: int, data_at: int) -> Iterator[tuple[int, bytes]]:
    """Yield L2 tables that map the disk to clusters in a row."""
    first = 0 if image.data_file is not None else data_at
    cluster = image.cluster_size
    words = 2 if image.extended_l2 else 1
    at_once = _BLOCK // 8 // words
    clusters = ceil_div(image.size, cluster)
    bitmap = 0 if image.backing_file is not None else tables.ALL_ALLOCATED
    for start in range(0, clusters, at_once):
        entries = array("Q")
        for index in range(start, min(clusters, start + at_once)):
            entries.append(first + index * cluster | tables.COPIED)
            if image.extended_l2:
                entries.append(bitmap)
        yield l2_at + start * 8 * words, tables.dump_entries(entries)


def _plan(image: NewImage) -> _Plan:
    _check(image)
    cluster = image.cluster_size
    per_l2 = cluster // (16 if image.extended_l2 else 8)
    l1_entries = ceil_div(image.size, cluster * per_l2)
    l1 = ceil_div(l1_entries * 8, cluster)
    if l1_entries * 8 > MAX_QCOW2_L1:
        raise ImageError("Image size too large for file format: use a larger cluster size")
    l2 = l1_entries if image.preallocate else 0
    data = ceil_div(image.size, cluster) if image.preallocate and image.data_file is None else 0
    table, blocks = 1, 1
    while True:
        plan = _Plan(table, blocks, l1, l2, data, l1_entries)
        need = ceil_div(plan.total * image.refcount_bits, cluster * 8)
        if need <= blocks and ceil_div(blocks * 8, cluster) <= table:
            break
        blocks = max(blocks, need)
        table = max(table, ceil_div(blocks * 8, cluster))
    if plan.table * cluster > MAX_QCOW2_REFCOUNT_TABLE:
        raise ImageError("Image too large for its refcounts: use a larger cluster size")
    return plan


def _check(image: NewImage) -> None:
    if not 0 <= image.size <= MAX_SIZE:
        raise ImageError(f"Image size {image.size} is impossible")
    cluster = image.cluster_size
    if not is_power_of_2(cluster) or not 512 <= cluster <= 1 << h.MAX_CLUSTER_BITS:
        raise ImageError("Cluster size must be a power of two between 512 and 2048k")
    if not is_power_of_2(image.refcount_bits) or not 1 <= image.refcount_bits <= 64:
        raise ImageError("Refcount width must be a power of two and may not exceed 64 bits")
    if image.version not in (2, 3):
        raise ImageError(f"Unsupported qcow2 version {image.version}")
    if image.version == 2:
        _check_version_2(image)
    if image.extended_l2 and cluster < 1 << h.MIN_CLUSTER_BITS_EXTENDED:
        raise ImageError("Extended L2 entries are only supported with clusters of 16384 and more")
    _check_other_files(image)


def _check_other_files(image: NewImage) -> None:
    if image.data_file_raw and image.data_file is None:
        raise ImageError("data-file-raw requires data-file")
    if image.data_file_raw and image.backing_file is not None:
        raise ImageError("Backing file and data-file-raw cannot be used at the same time")
    if image.backing_file is not None and image.backing_format is None:
        raise ImageError("Backing format must be specified")
    if image.preallocate and image.backing_file is not None and not image.extended_l2:
        raise ImageError(
            "Backing file and preallocation can only be used at the same time if extended_l2 "
            "is enabled"
        )


def _check_version_2(image: NewImage) -> None:
    for wanted, what in (
        (image.refcount_bits != 16, "Different refcount widths than 16 bits"),
        (image.lazy_refcounts, "Lazy refcounts"),
        (image.extended_l2, "Extended L2 entries"),
        (image.data_file is not None, "External data files"),
        (image.compression_type != h.ZLIB, "Non-zlib compression types"),
    ):
        if wanted:
            raise ImageError(f"{what} are only supported with compatibility level v3")


def _header(image: NewImage, plan: _Plan, table_at: int, l1_at: int) -> h.Header:
    incompatible = autoclear = 0
    if image.data_file is not None:
        incompatible |= h.DATA_FILE
        autoclear |= h.DATA_FILE_RAW if image.data_file_raw else 0
    if image.compression_type != h.ZLIB:
        incompatible |= h.COMPRESSION
    if image.extended_l2:
        incompatible |= h.EXTENDED_L2
    header = h.Header(
        version=image.version,
        cluster_bits=image.cluster_size.bit_length() - 1,
        size=image.size,
        l1_size=plan.l1_entries,
        l1_table_offset=l1_at if plan.l1 else 0,
        refcount_table_offset=table_at,
        refcount_table_clusters=plan.table,
        incompatible=incompatible,
        compatible=h.LAZY_REFCOUNTS if image.lazy_refcounts else 0,
        autoclear=autoclear,
        refcount_order=image.refcount_bits.bit_length() - 1,
        compression_type=image.compression_type,
        header_length=h.LENGTH_NOW if image.version == 3 else h.LENGTH_V2,
        backing_file=image.backing_file,
    )
    if image.backing_format is not None and image.backing_file is not None:
        header = header.with_extension(h.EXT_BACKING_FORMAT, _encoded(image.backing_format))
    if image.data_file is not None:
        header = header.with_extension(h.EXT_DATA_FILE, _encoded(image.data_file))
    if image.version == 3:
        named = header.with_extension(h.EXT_FEATURE_NAMES, h.encode_feature_names())
        try:
            h.encode_header(named)
        except ImageError:  # the table is for people; in a cluster of 512 bytes there is no room
            return header
        return named
    return header


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
