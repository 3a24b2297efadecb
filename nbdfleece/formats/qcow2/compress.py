"""Compressed clusters of a qcow2 image.

zstd needs a Python that has it (3.14); an image that uses it is refused by others when it is
opened.
"""

from __future__ import annotations

import importlib
import zlib
from typing import TYPE_CHECKING, Final, Protocol, cast

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2.header import COMPRESSION_NAMES, ZLIB

if TYPE_CHECKING:
    from collections.abc import Callable

    Decompress = Callable[[bytes | bytearray | memoryview, int], bytes]

_WINDOW: Final = -12  # raw deflate with a window of 4 KiB is what QEMU writes; readers need no less


class _Decompressor(Protocol):
    def decompress(self, data: bytes | bytearray | memoryview, max_length: int, /) -> bytes: ...


class _Zstd(Protocol):
    """What is used of the module `compression.zstd`, which this Python may not have."""

    ZstdError: type[Exception]

    def ZstdDecompressor(self) -> _Decompressor: ...  # noqa: N802


def _find_zstd() -> _Zstd | None:
    try:
        return cast("_Zstd", importlib.import_module("compression.zstd"))
    except ImportError:
        return None


_zstd: Final = _find_zstd()


def decompressor(compression_type: int) -> Decompress:
    """Return a function from (stored bytes, cluster size) to the cluster.

    It raises ImageError when the bytes are damaged.

    Raises:
        ImageError: This Python cannot decompress it.
    """
    if compression_type == ZLIB:
        return _inflate
    if _zstd is None:
        name = COMPRESSION_NAMES.get(compression_type, str(compression_type))
        raise ImageError(f"qcow2: compression type {name} needs Python 3.14")
    return _unzstd


def _inflate(data: bytes | bytearray | memoryview, size: int) -> bytes:
    try:
        cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as error:
        raise ImageError(f"damaged compressed cluster: {error}") from error
    return _whole(cluster, size)


def _unzstd(data: bytes | bytearray | memoryview, size: int) -> bytes:
    assert _zstd is not None, "decompressor() has looked"
    try:
        cluster = _zstd.ZstdDecompressor().decompress(data, size)
    except _zstd.ZstdError as error:
        raise ImageError(f"damaged compressed cluster: {error}") from error
    return _whole(cluster, size)


def _whole(cluster: bytes, size: int) -> bytes:
    if len(cluster) != size:
        raise ImageError(f"damaged compressed cluster: {len(cluster)} bytes of {size}")
    return cluster


def deflate(cluster: bytes | bytearray | memoryview) -> bytes | None:
    """Return the cluster compressed by raw deflate, or None where that does not make it smaller."""
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW)
    packed = packer.compress(cluster) + packer.flush()
    return packed if len(packed) < len(cluster) else None
