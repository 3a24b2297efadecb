"""Compressed clusters."""

from __future__ import annotations

import os
import random

import pytest

from nbdfleece.base.errors import ImageError
from nbdfleece.formats.qcow2 import compress
from nbdfleece.formats.qcow2.header import ZLIB, ZSTD


def test_a_cluster_survives() -> None:
    cluster = bytes(range(256)) * 256
    packed = compress.deflate(cluster)
    assert packed is not None
    assert compress.decompressor(ZLIB)(packed + bytes(300), len(cluster)) == cluster
    assert compress.deflate(os.urandom(4096)) is None


def test_damaged_clusters_are_an_error_and_take_no_more_memory_than_a_cluster(
    rng: random.Random,
) -> None:
    inflate = compress.decompressor(ZLIB)
    packed = compress.deflate(bytes(1 << 20))
    assert packed is not None
    assert len(inflate(packed, 65536)) == 65536
    for _ in range(300):
        try:
            assert len(inflate(rng.randbytes(rng.randrange(100)), 4096)) == 4096
        except ImageError:
            continue


def test_zstd_is_refused_by_name_where_it_is_not_built_in() -> None:
    if compress._zstd is None:
        with pytest.raises(ImageError, match=r"zstd needs Python 3\.14"):
            compress.decompressor(ZSTD)
    else:
        with pytest.raises(ImageError, match="damaged"):
            compress.decompressor(ZSTD)(b"no zstd", 4096)
