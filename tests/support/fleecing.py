"""Graphs of fleecing for tests: active disk, temporary image, filter, access node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbdfleece.block.child import Role
from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.snapshot_access import SnapshotAccess
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node


@dataclass
class Fleecing:
    """One point in time: `cbw` is the guest's node, `access` the reader's."""

    graph: Graph
    active: Node
    temp: Node
    cbw: Node
    access: Node

    @property
    def filter(self) -> CopyBeforeWrite:
        assert isinstance(self.cbw.driver, CopyBeforeWrite)
        return self.cbw.driver

    async def close(self) -> None:
        for node in (self.access, self.cbw, self.temp, self.active):
            await self.graph.remove(node)


async def add_filter(graph: Graph, source: Node, target: Node, driver: CopyBeforeWrite) -> Node:
    return await graph.add(
        None,
        driver,
        {"file": (source, Role.FILTERED | Role.PRIMARY), "target": (target, Role.DATA)},
        read_only=False,
        discard_enabled=True,
    )


async def add_access(graph: Graph, cbw: Node) -> Node:
    return await graph.add(
        None,
        SnapshotAccess(),
        {"file": (cbw, Role.DATA | Role.PRIMARY)},
        read_only=False,
        discard_enabled=True,
    )


async def add_plain(graph: Graph, driver: Driver) -> Node:
    return await graph.add(None, driver, read_only=False, discard_enabled=True)


async def start_fleecing(active: Driver, temp: Driver, driver: CopyBeforeWrite) -> Fleecing:
    graph = Graph()
    active_node = await add_plain(graph, active)
    temp_node = await add_plain(graph, temp)
    cbw = await add_filter(graph, active_node, temp_node, driver)
    return Fleecing(graph, active_node, temp_node, cbw, await add_access(graph, cbw))


async def read_all(node: Node, piece: int = 1 << 20) -> bytes:
    """Return the whole content of a node, read in pieces, at once where it can be."""
    content = bytearray(node.size)
    view = memoryview(content)
    for offset in range(0, node.size, piece):
        part = view[offset : offset + piece]
        if not node.read_now(offset, part):
            await node.read(offset, part)
    return bytes(content)


def file_driver(path: Path) -> FileDriver:
    return FileDriver(
        filename=str(path), locking=Locking.AUTO, cache_direct=False, new_and_sparse=False
    )


def temp_driver(path: Path, size: int) -> FileDriver:
    """Make a temporary image, empty and sparse, and return its driver."""
    with path.open("xb") as file:
        file.truncate(size)
    return FileDriver(
        filename=str(path), locking=Locking.AUTO, cache_direct=False, new_and_sparse=True
    )
