"""Opening a qcow2 image: its header, the L1 and refcount tables, and what a crash has left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import ImageError
from nbdfleece.base.units import ceil_div
from nbdfleece.block.drivers.qcow2.image import CacheSizes, Image
from nbdfleece.block.drivers.qcow2.repair import repair
from nbdfleece.formats.qcow2 import header as h
from nbdfleece.formats.qcow2.refcounts import block_bits
from nbdfleece.formats.qcow2.tables import load_entries

if TYPE_CHECKING:
    from nbdfleece.block.node import Node


async def read_header(file: Node) -> h.Header:
    """Return the header of the image in a node.

    Raises:
        ImageError: It is no qcow2 image, or one that is not understood.
        IoError: It cannot be read.
    """
    first = await _read(file, 0, min(h.FIRST_READ, file.size))
    return h.parse_header(await _read(file, 0, min(h.header_area(bytes(first)), file.size)))


async def open_image(node: Node, caches: CacheSizes) -> Image:
    """Read what has to be in memory of an image.

    Args:
        node: The qcow2 node, with its children.
        caches: How much to keep of the rest.

    Raises:
        ImageError: The image is damaged, or its children are not those that it needs.
        IoError: It cannot be read.
    """
    assert node.file is not None, "qcow2 has a file child"
    file = node.file.node
    header = await read_header(file)
    has_data_child = any(edge.name == "data-file" for edge in node.children)
    if header.has_data_file and not has_data_child:
        raise ImageError("'data-file' is required for this image")
    if has_data_child and not header.has_data_file:
        raise ImageError("'data-file' can only be set for images with an external data file")
    if header.is_data_file_raw and node.backing is not None:
        raise ImageError("an image with a raw external data file cannot have a backing")
    if header.l1_table_offset + 8 * header.l1_size > file.size:
        raise ImageError("the L1 table is not in the image's file, which has been cut")
    length = header.refcount_table_clusters << header.cluster_bits
    bits = header.cluster_bits + block_bits(header.cluster_bits, header.refcount_order)
    telling = min(length, 8 * ceil_div(file.size, 1 << bits))  # bytes, of what is in the file
    if header.refcount_table_offset + telling > file.size:
        raise ImageError("the refcount table is not in the image's file, which has been cut")
    l1 = load_entries(await _read(file, header.l1_table_offset, 8 * header.l1_size))
    table = load_entries(await _read(file, header.refcount_table_offset, length))
    return Image(node, header, l1, table, caches=caches)


def check_writable(header: h.Header, *, may_repair: bool = True) -> None:
    """Check that an image may be opened for writing.

    Args:
        header: Of the image.
        may_repair: It is all right if its refcounts have to be counted anew.

    Raises:
        ImageError: It is marked as corrupt, or as dirty.
    """
    if header.incompatible & h.DIRTY and not may_repair:
        raise ImageError("Image is dirty; it has to be opened read/write to be repaired")
    if header.incompatible & h.CORRUPT:
        raise ImageError("Image is corrupt; cannot be opened read/write")


async def make_writable(image: Image) -> None:
    """Get an image ready to be written: mend its refcounts, if they are not to be trusted.

    Raises:
        ImageError: It is damaged beyond that.
        IoError: It cannot be read or written.
    """
    check_writable(image.header)
    if image.header.incompatible & h.DIRTY:
        await repair(image)


async def _read(file: Node, offset: int, length: int) -> bytes:
    """Read from the image's file; zeroes behind its end."""
    data = bytearray(length)
    inside = min(length, file.size - offset)
    if inside > 0:
        await file.read(offset, memoryview(data)[:inside])
    return bytes(data)
