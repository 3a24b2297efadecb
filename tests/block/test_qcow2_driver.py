"""The qcow2 driver."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest

from nbdfleece.block.child import Role
from nbdfleece.block.drivers.qcow2.driver import Qcow2Driver, Qcow2Options
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.formats.qcow2.create import NewImage
from tests.support.driver_kit import DriverKit, file_node, remove_all
from tests.support.qcow2 import check_qcow2, make_qcow2


async def qcow2_node(
    graph: Graph,
    path: Path,
    *,
    read_only: bool = False,
    options: Qcow2Options | None = None,
    backing: Node | None = None,
) -> Node:
    """Return a node over an image that is there."""
    file = await file_node(graph, path, 0, read_only=read_only)
    file.goes_with_parent = True
    children = {"file": (file, Role.DATA | Role.METADATA | Role.PRIMARY)}
    if backing is not None:
        children["backing"] = (backing, Role.COW)
    return await graph.add(
        None,
        Qcow2Driver(options or Qcow2Options()),
        children,
        read_only=read_only,
        discard_enabled=True,
    )


def check_all(folder: Path) -> None:
    """Let qemu-img, where it is there, look at all images of a folder."""
    if shutil.which("qemu-img"):
        for path in folder.glob("*.qcow2"):
            check_qcow2(path)


class Qcow2Kit(DriverKit):
    """The kit over one kind of image."""

    image: ClassVar[NewImage] = NewImage(size=0)
    options: ClassVar[Qcow2Options] = Qcow2Options()

    @pytest.fixture(autouse=True)
    async def _graph(self, tmp_path: Path) -> AsyncIterator[None]:
        self.graph = Graph()
        self.folder = tmp_path
        yield
        await remove_all(self.graph)
        check_all(tmp_path)

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        path = make_qcow2(folder / f"{size}.qcow2", self.image, size=size)
        return await qcow2_node(graph, path, read_only=read_only, options=self.options)


class TestPlain(Qcow2Kit):
    pass


class TestVersion2(Qcow2Kit):
    image = NewImage(size=0, version=2)


class TestSmallestClusters(Qcow2Kit):
    image = NewImage(size=0, cluster_size=512, refcount_bits=64)


class TestLargestClusters(Qcow2Kit):
    image = NewImage(size=0, cluster_size=1 << 21, refcount_bits=1)


class TestSubclusters(Qcow2Kit):
    image = NewImage(size=0, extended_l2=True, refcount_bits=2)


class TestSmallSubclusters(Qcow2Kit):
    image = NewImage(size=0, cluster_size=1 << 14, extended_l2=True, refcount_bits=32)


class TestLazyRefcounts(Qcow2Kit):
    image = NewImage(size=0, cluster_size=4096, lazy_refcounts=True, refcount_bits=4)


class TestSmallCaches(Qcow2Kit):
    image = NewImage(size=0, cluster_size=512, refcount_bits=8)
    options = Qcow2Options(l2_cache_size=0, refcount_cache_size=0, pass_discard_other=True)


class TestPreallocated(Qcow2Kit):
    image = NewImage(size=0, preallocate=True)


class WithBacking(Qcow2Kit):
    """The kit over an overlay whose backing is full of data, and shorter."""

    async def make(self, graph: Graph, folder: Path, size: int, *, read_only: bool) -> Node:
        base = folder / f"{size}.base"
        if not base.exists():
            base.write_bytes(os.urandom(max(1, size * 3 // 4)))
        backing = await file_node(graph, base, 0, read_only=True)
        backing.goes_with_parent = True
        path = make_qcow2(folder / f"{size}.qcow2", self.image, size=size)
        return await qcow2_node(
            graph, path, read_only=read_only, options=self.options, backing=backing
        )


class TestOverlay(WithBacking):
    pass


class TestOverlayOfVersion2(WithBacking):
    image = NewImage(size=0, version=2, cluster_size=1024)


class TestOverlayOfSubclusters(WithBacking):
    image = NewImage(size=0, extended_l2=True)


class TestOverlayOfSmallSubclusters(WithBacking):
    image = NewImage(size=0, cluster_size=1 << 14, extended_l2=True, refcount_bits=16)


class TestOverlayOfLargeClusters(WithBacking):
    image = NewImage(size=0, cluster_size=1 << 20)
