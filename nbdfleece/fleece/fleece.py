"""Fleece: the disks that are served, and snapshots of any number of them at one instant.

Invariants
  F1  Changes are made one at a time. Each is done as a whole, or undone as a whole.
  F2  Everything slow about a snapshot (files, opening, nodes) happens beside the guest; inside the
      drained section, which spans all disks of the group, filters are inserted and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, InUse, IoError
from nbdfleece.base.limits import MAX_NODE_NAME, MAX_SIZE
from nbdfleece.base.notify import Notifier
from nbdfleece.block.bitmap import find_bitmap
from nbdfleece.block.bitmap_files import BothKeepers, DiskBitmaps, identity_of
from nbdfleece.block.drain import flush_in_time, in_time, started
from nbdfleece.block.graph import above
from nbdfleece.block.node import Node
from nbdfleece.fleece.backup_bitmaps import own
from nbdfleece.fleece.change import remove_export
from nbdfleece.fleece.disk import Disk, add_node, identity, last_change
from nbdfleece.fleece.drive import set_drive
from nbdfleece.fleece.errors import DiskNotFound, NameTaken, SnapshotBroken, SnapshotNotFound
from nbdfleece.fleece.internal import export_found
from nbdfleece.fleece.io_limits import drop_unused_limits
from nbdfleece.fleece.location import (
    PROBE_LENGTH,
    check_is_raw,
    check_snapshot_name,
    is_block_device,
)
from nbdfleece.fleece.map import map_node
from nbdfleece.fleece.news import (
    News,
    SnapshotCreated,
    SnapshotDeleted,
)
from nbdfleece.fleece.taking import Taking
from nbdfleece.fleece.watch import watch
from nbdfleece.server.export import Export, ExportOptions
from nbdfleece.server.exports import Exports, RemoveMode
from nbdfleece.server.tokens import Tokens, check_lifetime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdfleece.block.graph import Graph
    from nbdfleece.fleece.location import Location
    from nbdfleece.fleece.map import Map
    from nbdfleece.fleece.snapshot import Snapshot, SnapshotOptions
    from nbdfleece.fleece.store import StateFolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TempSpace:
    """The file system that holds the temporary images; sizes in bytes."""

    path: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that has just been taken.

    Attributes:
        snapshot: It.
        token_export: The name with a token that opens it too, where one was asked for. Nobody else
            knows it: for whoever asked, and for no log.
    """

    snapshot: Snapshot
    token_export: str | None


class Fleece:
    """Disks, their snapshots, and the changes to both.

    Args:
        graph: Where the nodes go.
        exports: Where the exports go.
        state: The state folder, opened.
        tokens: Where names with tokens go.

    Attributes:
        news: What happens to snapshots.
        changing: Held during every change (F1).
    """

    def __init__(self, graph: Graph, exports: Exports, state: StateFolder, tokens: Tokens) -> None:
        self.news: Notifier[News] = Notifier()
        self._graph = graph
        self._exports = exports
        self._state = state
        self._tokens = tokens
        self._disks: dict[str, Disk] = {}
        self.changing = asyncio.Lock()  # never held by requests

    # --- looking -------------------------------------------------------------------------------

    def disks(self) -> list[Disk]:
        """Return the disks, in the order in which they were added."""
        return list(self._disks.values())

    def disk(self, name: str) -> Disk:
        """Return a disk by name.

        Raises:
            DiskNotFound: There is none.
        """
        disk = self._disks.get(name)
        if disk is None:
            raise DiskNotFound(f"there is no disk '{name}'")
        return disk

    def snapshots(self, disk: str | None = None) -> list[Snapshot]:
        """Return the snapshots of one disk, or of all, oldest first for each disk.

        Raises:
            DiskNotFound: There is no such disk.
        """
        disks = self.disks() if disk is None else [self.disk(disk)]
        return [snapshot for found in disks for snapshot in found.snapshots.values()]

    async def map(self, disk: str, snapshot: str | None, bitmap: str | None, *, offset: int) -> Map:
        """Tell what a disk, or a snapshot of it, holds where, from `offset` (bytes) on.

        Args:
            disk: Name of the disk.
            snapshot: Name of the snapshot; None: the disk as it is now.
            bitmap: Name of a bitmap of the disk, to tell of that too; None: of none.
            offset: Where to begin.

        Raises:
            NotFound: One of them is not there.
            CommandError: It cannot be told: the snapshot is broken, or the disk fails.

        Cancel: safe.
        """
        found = self.disk(disk)
        recorded = None if bitmap is None else find_bitmap(found.node, bitmap)
        if snapshot is None:
            return await map_node(found.top, None, recorded, offset)
        taken = found.snapshots.get(snapshot)
        if taken is None:
            raise SnapshotNotFound(f"disk '{disk}' has no snapshot '{snapshot}'")
        if taken.error is not None:
            raise SnapshotBroken(f"snapshot {taken.export_name} is broken: {taken.error}")
        held_by = None if taken.outlives else taken.cbw  # an image tells of its own
        return await map_node(taken.access, held_by, recorded, offset)

    async def temp_space(self) -> TempSpace:
        """Return how full the file system of the temporary images is.

        Cancel: safe.
        """
        path = self._state.temp_dir or self._state.path
        found = await asyncio.to_thread(os.statvfs, path)
        return TempSpace(
            str(path), found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        )

    # --- disks ---------------------------------------------------------------------------------

    async def add_disk(self, location: Location) -> Disk:
        """Serve one more disk under its name.

        Raises:
            CommandError: It cannot be opened, or the name is taken. Nothing has changed.

        Cancel: undone.
        """
        try:
            return await self._add_disk(location)
        except InUse as error:
            for disk in self._disks.values():
                if disk.location.path == location.path and disk.name != location.disk:
                    raise InUse(
                        f"'{location.path}' is served as disk '{disk.name}' already"
                    ) from error
            raise

    async def _add_disk(self, location: Location) -> Disk:
        """See add_disk; of a file that is locked, whoever locked it, it only says that."""
        self._check_new(location)
        is_device = await asyncio.to_thread(is_block_device, location)
        # Its file system, or server, may hang: others' changes do not wait for that.
        node = await add_node(
            self._graph, self._node_name(location.disk), location, is_device=is_device
        )
        try:
            _check_size(location, node.size)
            if location.remote is not None:
                await _check_remote_is_raw(location, node)
            async with self.changing:
                self._check_new(location)
                disk = await self._serve(location, node, is_device=is_device)
        except BaseException:
            if not node.parents:
                await self._graph.remove(node)
            raise
        return disk

    async def _serve(self, location: Location, node: Node, *, is_device: bool) -> Disk:
        """Make a node a disk; what of that fails before it has its export is undone."""
        await asyncio.to_thread(self._write_disk, location, node.size, is_stopped=False)
        kept = await self._open_bitmaps(location, node, is_device=is_device)
        try:
            name = location.disk
            options = ExportOptions(name, name, not location.read_only, "")
            export = self._exports.add(node, options)
        except BaseException:
            await asyncio.to_thread(lambda: kept.finish(last_change(location)))
            raise
        disk = self._disks[location.disk] = Disk(location, node, export, kept)
        await export_found(disk, self._graph, self._exports)
        _log.info("disk %s: %s, %d bytes", disk.name, location.path, node.size)
        return disk

    def _check_new(self, location: Location) -> None:
        if location.disk in self._disks:
            raise NameTaken(f"there is a disk '{location.disk}' already")

    async def set_drive(self, export: Export, node: Node) -> None:
        """Put another node under an export; see fleece.drive.

        Raises:
            CommandError: It cannot be. Nothing has changed.

        Cancel: undone.
        """
        async with self.changing:  # a snapshot that is being made counts on the disk's top
            await set_drive(self._graph, export, node)

    async def remove_disk(self, name: str, *, force: bool) -> None:
        """Serve a disk no more.

        Args:
            name: Its name.
            force: Also while clients are connected, and with its snapshots.

        Raises:
            DiskNotFound: There is none.
            InUse: Without `force`: it has clients or snapshots. Nothing has changed.
            CommandError: Something cannot be taken away; what is left can be removed by a further
                call.

        Cancel: what is left can be removed by a further call.
        """
        disk = self._removable(name, force=force)
        if disk.location.remote is None and not disk.location.read_only:
            # The last flush is short then: others' changes wait for it.
            with suppress(IoError):  # that one tells of it
                await (flush_in_time(disk.node) if force else _flush(disk))
        async with self.changing:
            disk = self._removable(name, force=force)
            if force:
                await self._close_whatever_it_takes(disk)
            else:
                for snapshot in list(disk.snapshots.values()):
                    snapshot.leave()
                    await self._delete(disk, snapshot, RemoveMode.SAFE)
                await self._close(disk, RemoveMode.SAFE)

    def _removable(self, name: str, *, force: bool) -> Disk:
        """Return a disk that may be removed; see `remove_disk`."""
        disk = self.disk(name)
        transient = [each for each in disk.snapshots.values() if not each.outlives]
        if not force and transient:
            names = ", ".join(each.name for each in transient)
            raise InUse(f"disk '{name}' has snapshots: {names}")
        if not force and disk.clients:
            raise InUse(f"disk '{name}' is in use by {disk.clients} connections")
        self._check_not_used_by_others(disk)
        return disk

    def _check_not_used_by_others(self, disk: Disk) -> None:
        """Check that all above the disk goes with it.

        Raises:
            InUse: There is what a command has made: a node, a job, an export.
        """
        own = {disk.name, *(snapshot.export_name for snapshot in disk.snapshots.values())}
        for node in above(disk.node):
            if node.owned_by_monitor:  # by blockdev-add: only blockdev-del takes it away
                raise InUse(f"disk '{disk.name}' is in use by node '{node.name}'")
            for edge in node.parents:
                user = edge.parent
                is_own = isinstance(user, Export) and user.options.id in own
                if not is_own and not isinstance(user, Node):
                    raise InUse(f"disk '{disk.name}' is in use by {user.describe_parent()}")

    async def _close_whatever_it_takes(self, disk: Disk) -> None:
        """Take a disk with its snapshots away; a server that does not answer is given up."""
        try:
            await self._close_all(disk)
        except CommandError as error:
            if not disk.node.driver.yank():
                raise
            _log.error("disk %s: %s; its server is given up", disk.name, error)
            await self._close_all(disk)

    async def _close_all(self, disk: Disk) -> None:
        for snapshot in reversed(list(disk.snapshots.values())):
            snapshot.leave()
            await self._delete(disk, snapshot, RemoveMode.HARD)
        await self._close(disk, RemoveMode.HARD)

    async def _close(self, disk: Disk, mode: RemoveMode) -> None:
        """Take a disk without snapshots away: export, data to the disk, node."""
        if disk.export.root is not None:
            await remove_export(self._exports, disk.export, mode)
        if not disk.location.read_only:
            try:
                await _flush(disk)
            except IoError as error:
                _log.error("disk %s: last flush failed: %s", disk.name, error)
        await drop_unused_limits(self._graph)
        changed_ns = await self._remove_node(disk)
        del self._disks[disk.name]
        await asyncio.to_thread(disk.kept.finish, changed_ns)
        await asyncio.to_thread(self._write_disk, disk.location, disk.node.size, is_stopped=True)
        _log.info("disk %s: removed", disk.name)

    async def _remove_node(self, disk: Disk) -> int:
        """Remove a disk's node; return when the disk was last changed (see `last_change`).

        An image writes to its file until its node is closed, strangers may from when the file is.
        """
        edge = disk.node.file
        if edge is None:
            changed_ns = await asyncio.to_thread(last_change, disk.location)
            await self._graph.remove(disk.node)
            return changed_ns
        below = edge.node
        goes_with_it, below.goes_with_parent = below.goes_with_parent, False
        try:
            await self._graph.remove(disk.node)
        finally:
            below.goes_with_parent = goes_with_it
        changed_ns = await asyncio.to_thread(last_change, disk.location)
        await self._graph.remove_if_left(below)
        return changed_ns

    async def _open_bitmaps(
        self, location: Location, node: Node, *, is_device: bool
    ) -> DiskBitmaps:
        """Give a disk's node the bitmaps that are kept for it.

        Raises:
            CommandError: A file of one cannot be read.
        """
        folder = self._state.bitmap_folder(location.disk)
        is_file = location.remote is None and not is_device
        facts = await asyncio.to_thread(identity, location, node.size, is_stopped=False)
        kept = DiskBitmaps(folder, node, identity_of(facts, is_file=is_file))
        loaded = await asyncio.to_thread(lambda: kept.load(last_change(location)))
        for found in loaded:
            is_twice = found.name in node.bitmaps
            bitmap = await asyncio.to_thread(kept.replaced, found) if is_twice else found
            node.bitmaps[bitmap.name] = bitmap
            own(bitmap)
            if bitmap.inconsistent:
                _log.warning(
                    "disk %s: bitmap '%s' is inconsistent: %s",
                    location.disk,
                    bitmap.name,
                    bitmap.reason,
                )
        image = node.bitmap_keeper
        node.bitmap_keeper = kept if image is None else BothKeepers(image, kept)
        return kept

    def _write_disk(self, location: Location, size: int, *, is_stopped: bool) -> None:
        """Keep what is known of a disk; in a thread."""
        self._state.write_disk(location.disk, identity(location, size, is_stopped=is_stopped))

    def _node_name(self, disk: str) -> str | None:
        """Return the disk's name as that of its node, where a node may be called so."""
        return disk if len(disk) <= MAX_NODE_NAME else None

    # --- snapshots -----------------------------------------------------------------------------

    async def create_snapshots(
        self,
        disks: Sequence[str],
        name: str | None,
        options: SnapshotOptions,
        *,
        token_s: float | None,
    ) -> list[Taken]:
        """Take the point in time of some disks, the same for all.

        Args:
            disks: Names of disks.
            name: Name of the snapshots; None: the time, `YYYYmmddTHHMMSSZ`.
            options: How they behave.
            token_s: Seconds for which a token opens each; None: no tokens.

        Raises:
            DiskNotFound: A disk is not there.
            NameTaken: One has a snapshot of that name.
            CommandError: It cannot be done. Nothing has changed.

        Cancel: undone.
        """
        if token_s is not None:
            check_lifetime(token_s)
        async with self.changing:
            taking = self.take(disks, name, options)
            try:
                await taking.prepare()
                async with taking.quiet():
                    await taking.engage()
                await taking.expose()
                await taking.keep()
                taken = [
                    Taken(snapshot, self._grant(snapshot, token_s)) for snapshot in taking.made
                ]
            except BaseException:
                for snapshot in taking.made:
                    self._tokens.revoke(snapshot.export_name)
                await taking.discard()
                raise
            self.adopt(taking)
            return taken

    def take(self, disks: Sequence[str], name: str | None, options: SnapshotOptions) -> Taking:
        """Begin what `create_snapshots` does in one go; the caller holds `changing` to the end.

        Returns:
            What `adopt` makes snapshots of the disks, when all its steps are done.

        Raises:
            CommandError: As `create_snapshots`, as far as that can be known. Nothing has changed.
        """
        assert self.changing.locked(), "changes are made one at a time"
        if not disks:
            raise CommandError("no disk is named")
        if len(set(disks)) < len(disks):
            raise CommandError("a disk is named twice")
        if name is not None:
            check_snapshot_name(name)
        group = [self.disk(disk) for disk in disks]
        name = self._free_name(group) if name is None else self._check_free(group, name)
        return Taking(
            group, name, options, graph=self._graph, exports=self._exports, state=self._state
        )

    def adopt(self, taking: Taking) -> None:
        """Count finished snapshots among those of their disks, and tell of them."""
        for disk, snapshot in zip(taking.group, taking.made, strict=True):
            disk.snapshots[snapshot.name] = snapshot
            self.news.publish(SnapshotCreated(disk.name, snapshot.name, snapshot.instant))
            watch(snapshot, self.news)
            _log.info("snapshot %s: taken at %s", snapshot.export_name, snapshot.instant)

    async def delete_snapshot(
        self, disk: str, name: str, *, force: bool, succeeded: bool = False
    ) -> None:
        """Give up a snapshot.

        Args:
            disk: Its disk.
            name: Its name.
            force: Also while it is being read.
            succeeded: What its bitmap says has changed has been copied; see TiedBitmap.settle.

        Raises:
            DiskNotFound: There is no such disk.
            SnapshotNotFound: It has no such snapshot.
            InUse: It is being read, and no `force`. Nothing has changed.
            CommandError: It cannot be taken apart now; it can be read on, or deleted by a further
                call.

        Cancel: it can be deleted by a further call.
        """
        snapshot = self._deletable(disk, name, force=force)
        found = self.disk(disk)
        if succeeded and snapshot.tied is not None and not found.location.read_only:
            # A crash may take back what nobody has flushed; none of that may be in the copy and in
            # no bitmap any more, or the next copy would lack what it was taken back to. Others'
            # changes do not wait for it.
            try:
                await _flush(found)
            except IoError as error:
                raise CommandError(f"disk '{disk}' cannot be flushed: {error}") from error
        async with self.changing:
            if self._deletable(disk, name, force=force) is not snapshot:
                raise InUse(f"snapshot {snapshot.export_name} has just been replaced")
            mode = RemoveMode.HARD if force else RemoveMode.SAFE
            await self._delete(self.disk(disk), snapshot, mode, succeeded=succeeded)

    def _deletable(self, disk: str, name: str, *, force: bool) -> Snapshot:
        """Return a snapshot that may be deleted; see `delete_snapshot`."""
        snapshot = self.disk(disk).snapshots.get(name)
        if snapshot is None:
            raise SnapshotNotFound(f"disk '{disk}' has no snapshot '{name}'")
        if not force and snapshot.readers:
            raise InUse(
                f"snapshot {snapshot.export_name} is being read by {snapshot.readers} connections"
            )
        return snapshot

    def _grant(self, snapshot: Snapshot, token_s: float | None) -> str | None:
        """Return a new name that opens the snapshot by a token, where one is wanted."""
        if token_s is None:
            return None
        name = self._tokens.add(snapshot.export_name, token_s)
        _log.info("snapshot %s: a token opens it for %g seconds", snapshot.export_name, token_s)
        return name

    async def _delete(
        self, disk: Disk, snapshot: Snapshot, mode: RemoveMode, *, succeeded: bool = False
    ) -> None:
        await snapshot.hide(self._graph, self._exports, mode)
        self._tokens.revoke(snapshot.export_name)
        try:
            await snapshot.take_apart(self._graph)
        except CommandError:
            if snapshot.is_engaged:
                await snapshot.expose(self._graph, self._exports)
            raise
        if snapshot.tied is not None:
            snapshot.tied.settle(succeeded=succeeded)
        del disk.snapshots[snapshot.name]
        self.news.publish(SnapshotDeleted(disk.name, snapshot.name))
        _log.info("snapshot %s: deleted", snapshot.export_name)

    def _check_free(self, group: list[Disk], name: str) -> str:
        for disk in group:
            if self._is_taken(disk, name):
                raise NameTaken(f"disk '{disk.name}' has a snapshot '{name}' already")
        return name

    def _free_name(self, group: list[Disk]) -> str:
        """Return the time as a name, with a number where that is taken."""
        base = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        name, number = base, 1
        while any(self._is_taken(disk, name) for disk in group):
            number += 1
            name = f"{base}-{number}"
        return name

    def _is_taken(self, disk: Disk, name: str) -> bool:
        return name in disk.snapshots or self._state.snapshot_exists(disk.name, name)

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> bool:
        """Give up all snapshots, which last no longer than the process, and close the disks.

        All at a time: one that does not answer keeps no other from being closed.

        Returns:
            Whether all could be closed; what could not is logged.

        Cancel: the rest stays open.
        """
        async with self.changing:
            if self._has_what_users_made():
                await self._remove_what_users_made()
            async with asyncio.TaskGroup() as tasks:
                closing = [tasks.create_task(self._can_close(disk)) for disk in self.disks()]
        return all(task.result() for task in closing)

    async def _can_close(self, disk: Disk) -> bool:
        """Close a disk at the end, or say why not."""
        try:
            await self._close_whatever_it_takes(disk)
        except CommandError as error:
            _log.error("disk %s: %s", disk.name, error)
            return False
        return True

    def _has_what_users_made(self) -> bool:
        """Tell whether commands have made nodes or exports beside those of disks and snapshots."""
        snapshots = [each for disk in self.disks() for each in disk.snapshots.values()]
        own = {*self._disks, *(snapshot.export_name for snapshot in snapshots)}
        return any(node.owned_by_monitor for node in self._graph) or any(
            export.options.id not in own for export in self._exports
        )

    async def _remove_what_users_made(self) -> None:
        """Take away what commands have put above, below and beside the disks; at the end only."""
        for disk in self.disks():
            try:
                for snapshot in reversed(list(disk.snapshots.values())):
                    snapshot.leave()
                    await self._delete(disk, snapshot, RemoveMode.HARD)
            except CommandError as error:
                _log.debug("disk %s: %s", disk.name, error)  # it is tried again
        for export in list(self._exports):
            try:
                await remove_export(self._exports, export, RemoveMode.HARD)
            except CommandError as error:
                _log.error("%s", error)
        await self._graph.remove_made_by_monitor()


async def _check_remote_is_raw(location: Location, node: Node) -> None:
    start = bytearray(min(PROBE_LENGTH, node.size))
    try:
        async with in_time(f"the first read of disk '{location.disk}'"):
            await node.read(0, memoryview(start))  # of nobody else yet: it may be cancelled
    except IoError as error:
        raise CommandError(f"disk '{location.disk}': {error}") from error
    check_is_raw(location, bytes(start))


async def _flush(disk: Disk) -> None:
    """Flush a disk; another server may take only so long.

    Raises:
        IoError: It failed.
        CommandError: A server does not answer.
    """
    if disk.location.remote is None:
        await started(disk.node.flush())  # as long as it takes; at the daemon's end no longer
        return
    async with in_time(f"the last flush of disk '{disk.name}'"):
        await started(disk.node.flush())


def _check_size(location: Location, size: int) -> None:
    if not 0 < size <= MAX_SIZE:
        raise CommandError(
            f"disk '{location.disk}': '{location.path}' has {size} bytes, which cannot be served"
        )
