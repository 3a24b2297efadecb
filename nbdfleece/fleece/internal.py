"""A snapshot inside a disk's qcow2 image, exported as DISK@NAME like all others.

It needs neither filter nor temporary image, costs the guest the copies that the image makes anyway,
and outlives the process: `Fleece` exports those that it finds in an image. It is deleted on demand
only.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, ConfigError
from nbdfleece.block import internal_snapshots
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.snapshot_access import SnapshotAccess
from nbdfleece.fleece.location import check_snapshot_name
from nbdfleece.fleece.snapshot import Snapshot, SnapshotFacts, SnapshotOptions
from nbdfleece.server.export import ExportOptions

if TYPE_CHECKING:
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.internal_snapshots import SnapshotInfo
    from nbdfleece.block.node import Node
    from nbdfleece.fleece.disk import Disk
    from nbdfleece.fleece.store import StateFolder
    from nbdfleece.server.exports import Exports

_log = logging.getLogger(__name__)


class InternalSnapshot(Snapshot):
    """One of them; `is_engaged` while it is in the image.

    Args:
        disk: Name of the disk.
        name: Its own name.
        options: Of which none but the defaults mean anything here.
        node: The disk's node, with the image.
    """

    outlives = True

    def __init__(self, disk: str, name: str, options: SnapshotOptions, node: Node) -> None:
        super().__init__(disk, name, options)
        self._node = node
        self._id: str | None = None
        self._is_left = False

    @property
    def size(self) -> int:
        """Bytes; 0 while it is not exported."""
        return 0 if self._access is None else self._access.size

    async def facts(self) -> SnapshotFacts:
        """See Snapshot.facts."""
        return replace(await super().facts(), durability="power")

    def found(self, info: SnapshotInfo) -> None:
        """Be one that is in the image already."""
        self._id = info.id
        self.is_engaged = True
        instant = datetime.fromtimestamp(info.date_s, UTC).replace(
            microsecond=min(info.date_ns // 1000, 999_999)
        )
        self.instant = instant.isoformat().replace("+00:00", "Z")

    async def prepare(self, graph: Graph, state: StateFolder, top: Node) -> None:
        """Check that the image can have it; see Snapshot.prepare."""
        internal_snapshots.check_new(self._node, self.name)

    def engage(self, graph: Graph, instant: str) -> None:
        """Note the instant, at which `make` follows."""
        self.instant = instant

    async def make(self) -> None:
        """Take the instant: make it in the image. The top is drained by the caller.

        Raises:
            CommandError: It cannot be made. Nothing has changed.
        """
        info = await internal_snapshots.create(self._node, self.name)
        self._id = info.id
        self.is_engaged = True

    def disengage(self, graph: Graph) -> None:
        """Do nothing: there is no filter in the guest's path."""

    async def keep(self, state: StateFolder) -> None:
        """Do nothing: the image keeps it."""

    async def expose(self, graph: Graph, exports: Exports) -> None:
        """See Snapshot.expose."""
        assert self._id is not None, "it is in the image"
        if self._access is None:
            self._access = await graph.add(
                None,
                SnapshotAccess(self._id),
                {"file": (self._node, Role.DATA | Role.PRIMARY)},
                read_only=True,
                discard_enabled=False,
            )
        name = self.export_name
        text = f"disk {self.disk} as of {self.instant}, crash-consistent, inside its image"
        self._export = exports.add(self._access, ExportOptions(name, name, False, text), [])

    def leave(self) -> None:
        """See Snapshot.leave."""
        self._is_left = True

    async def take_apart(self, graph: Graph) -> None:
        """Delete it from the image, unless it was left there; see Snapshot.take_apart."""
        if self._id is not None and not self._is_left:
            await internal_snapshots.delete(self._node, self._id, None)
        self._id = None
        self.is_engaged = False


async def export_found(disk: Disk, graph: Graph, exports: Exports) -> None:
    """Export the snapshots that a disk has in its image; what cannot be is logged.

    Cancel: some are exported.
    """
    snapshots = disk.node.driver.internal_snapshots()
    for info in [] if snapshots is None else snapshots.all():
        try:
            check_snapshot_name(info.name)
        except ConfigError as error:
            _log.warning("disk %s: snapshot %s in its image: %s", disk.name, info.id, error)
            continue
        if info.name in disk.snapshots:
            _log.warning("disk %s: two snapshots '%s' in its image", disk.name, info.name)
            continue
        snapshot = InternalSnapshot(disk.name, info.name, SnapshotOptions(), disk.node)
        snapshot.found(info)
        try:
            await snapshot.expose(graph, exports)
        except CommandError as error:
            _log.error("snapshot %s: %s", snapshot.export_name, error)
        disk.snapshots[info.name] = snapshot
