"""A disk: a file, block device or another server's export; its node, live export and snapshots."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.block import permissions
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.host_device import HostDeviceDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.nbd.driver import NbdDriver
from nbdfleece.block.registry import add_from_options
from nbdfleece.fleece.io_limits import below_limit

if TYPE_CHECKING:
    from nbdfleece.block.bitmap_files import DiskBitmaps
    from nbdfleece.block.driver import Driver
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.fleece.location import Location
    from nbdfleece.fleece.snapshot import Snapshot
    from nbdfleece.fleece.store import Value
    from nbdfleece.server.export import Export


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What there is to say of a disk; sizes in bytes, `clients` use its live export."""

    disk: str
    location: str
    size: int
    read_only: bool
    export: str
    node_name: str
    snapshots: int
    clients: int


class Disk:
    """A disk that is served.

    ::

        live export -> [I/O limits] -> [filter of the newest snapshot] -> ... -> [oldest] -> node

    Attributes:
        location: Where it is and how it was asked for.
        node: The node of the file or device, or of the image in it: what the guest's disk is.
        export: The live export, at the top.
        kept: Where its persistent bitmaps are.
        snapshots: By name, oldest first.
    """

    def __init__(self, location: Location, node: Node, export: Export, kept: DiskBitmaps) -> None:
        self.location = location
        self.kept = kept
        self.node = node
        self.export = export
        self.snapshots: dict[str, Snapshot] = {}

    @property
    def name(self) -> str:
        """The disk's name, which is its live export's too."""
        return self.location.disk

    @property
    def top(self) -> Node:
        """What the guest writes to, below its I/O limits: the next filter goes above it.

        Raises:
            CommandError: The disk is on its way out.
        """
        if self.export.root is None or self.export.is_closing:
            raise CommandError(f"disk '{self.name}' is being removed")
        return below_limit(self.export.node)

    @property
    def is_in_place(self) -> bool:
        """Whether `node` is what the guest writes, through filters, and so its bitmaps tell of all.

        It is not while the export shows an overlay of it, or another drive (blockdev-snapshot,
        qom-set).

        Raises:
            CommandError: The disk is on its way out.
        """
        found = self.top
        while found is not self.node:
            edge = found.file
            if edge is None or not edge.role & Role.FILTERED:
                return False
            found = edge.node
        return True

    @property
    def clients(self) -> int:
        """Connections to the live export."""
        return connections(self.export)

    def facts(self) -> DiskFacts:
        """Return what there is to say of the disk now."""
        return DiskFacts(
            disk=self.name,
            location=self.location.path,
            size=self.node.size,
            read_only=self.location.read_only,
            export=self.export.options.name,
            node_name=self.node.name,
            snapshots=len(self.snapshots),
            clients=self.clients,
        )


def connections(export: Export) -> int:
    """Return how many clients use the export; who left counts until its requests have ended."""
    return max(export.holders, len(export.pumps))


class _OwnFile(FileDriver):
    """A file whose image locks tell other programs that nobody else may write."""

    def check_permissions(self, perm: int, shared: int) -> None:
        """See Driver.check_permissions."""
        super().check_permissions(perm, _unshared(perm, shared))

    def set_permissions(self, perm: int, shared: int) -> None:
        """See Driver.set_permissions."""
        super().set_permissions(perm, _unshared(perm, shared))


class _OwnDevice(HostDeviceDriver):
    """As _OwnFile, for a block device."""

    def check_permissions(self, perm: int, shared: int) -> None:
        """See Driver.check_permissions."""
        super().check_permissions(perm, _unshared(perm, shared))

    def set_permissions(self, perm: int, shared: int) -> None:
        """See Driver.set_permissions."""
        super().set_permissions(perm, _unshared(perm, shared))


def _unshared(perm: int, shared: int) -> int:
    """Return what other programs may do to a disk that we write.

    Exports share a node with other writers, as QEMU's do. Another program is no such writer: what
    it writes is saved by no filter, so every snapshot of the disk would be wrong.
    """
    if perm & permissions.WRITE:
        return shared & ~(permissions.WRITE | permissions.RESIZE)
    return shared


def make_driver(location: Location, *, is_device: bool) -> Driver:
    """Return the driver for a disk, not opened."""
    if location.remote is not None:
        return NbdDriver(
            location.remote,
            reconnect_delay_s=location.reconnect_delay_s,
            open_timeout_s=location.open_timeout_s,
        )
    locking = Locking.AUTO if location.locking else Locking.OFF
    if is_device:
        return _OwnDevice(filename=location.path, locking=locking, cache_direct=location.direct)
    return _OwnFile(
        filename=location.path,
        locking=locking,
        cache_direct=location.direct,
        new_and_sparse=False,
    )


async def add_node(graph: Graph, name: str | None, location: Location, *, is_device: bool) -> Node:
    """Open a disk; return its node, which takes those below it along when it goes.

    Raises:
        CommandError: It cannot be opened. Nothing is left of it.
    """
    bottom = await graph.add(
        None if location.is_qcow2 else name,
        make_driver(location, is_device=is_device),
        read_only=location.read_only,
        discard_enabled=location.discard,
    )
    if not location.is_qcow2:
        return bottom
    options: dict[str, object] = {
        "driver": "qcow2",
        "file": bottom.name,
        "read-only": location.read_only,
        "discard": "unmap" if location.discard else "ignore",
        "cache": {"direct": location.direct},
    }
    if name is not None:
        options["node-name"] = name
    try:
        node = await add_from_options(graph, options, needs_name=False)
    except BaseException:
        await graph.remove(bottom)
        raise
    node.owned_by_monitor = False
    bottom.goes_with_parent = True
    return node


def identity(location: Location, size: int, *, is_stopped: bool) -> dict[str, Value]:
    """Return what disk.json says: where the disk is and how to know it again. May block.

    Args:
        location: The disk.
        size: Bytes.
        is_stopped: Nobody writes any more, so the time of the last change tells of strangers.
    """
    facts: dict[str, Value] = {"disk": location.disk, "location": location.path, "size": size}
    if location.remote is not None:
        return facts
    try:
        status = os.stat(location.path)
    except OSError:  # removed while it was served
        return facts
    facts |= {"device": status.st_dev, "inode": status.st_ino, "rdev": status.st_rdev}
    facts["mtime-ns"] = status.st_mtime_ns if is_stopped else None
    return facts


def last_change(location: Location) -> int:
    """Return when a disk was last changed, in ns of the epoch; 0: nobody knows. May block.

    Only files tell: the time of a block device is not that of its content.
    """
    if location.remote is not None:
        return 0
    try:
        status = os.stat(location.path)
    except OSError:  # removed while it was served
        return 0
    return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0
