"""Snapshots in the making: those of some disks, at one instant, in steps.

::

    prepare -> [ engage -> expose ] -> keep            [ ]: the disks' tops are drained
                           `-> withdraw -> discard

The steps are apart so that other changes may share the instant (a transaction). Whoever takes them
holds `Fleece.changing`.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.block.drain import in_time, quiet
from nbdfleece.fleece.bitmaps import TiedBitmap
from nbdfleece.fleece.internal import InternalSnapshot
from nbdfleece.fleece.snapshot import Snapshot
from nbdfleece.server.exports import RemoveMode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.fleece.disk import Disk
    from nbdfleece.fleece.snapshot import SnapshotOptions
    from nbdfleece.fleece.store import StateFolder
    from nbdfleece.server.exports import Exports

_log = logging.getLogger(__name__)


class Taking:
    """Snapshots of some disks, which `Fleece` does not know yet.

    Args:
        group: The disks.
        name: Of the snapshots; free on each disk.
        options: How they behave.
        graph: Where the nodes go.
        exports: Where the exports go.
        state: Where the files go.

    Attributes:
        group: The disks.
        made: Their snapshots, in the same order, as far as they have been begun.
    """

    def __init__(
        self,
        group: Sequence[Disk],
        name: str,
        options: SnapshotOptions,
        *,
        graph: Graph,
        exports: Exports,
        state: StateFolder,
    ) -> None:
        self.group = group
        self.made: list[Snapshot] = []
        self._name = name
        self._options = options
        self._graph = graph
        self._exports = exports
        self._state = state

    def tops(self) -> list[Node]:
        """Return what the guests write to now.

        Raises:
            CommandError: A disk is on its way out.
        """
        return [disk.top for disk in self.group]

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Hold a drained section over the tops, also over what becomes one while guests end.

        Raises:
            CommandError: Requests do not end, or a disk is on its way out.

        Cancel: safe; the section is closed.
        """
        drained: set[Node] = set()
        async with AsyncExitStack() as sections:
            while wanted := [top for top in self.tops() if top not in drained]:
                await sections.enter_async_context(quiet(*wanted))
                drained.update(wanted)
            yield

    async def prepare(self) -> None:
        """Make files and nodes, beside the guests.

        Raises:
            CommandError: It cannot be done; `discard` is due.

        Cancel: `discard` is due.
        """
        for disk in self.group:
            wanted = self._options.bitmap
            tied = None if wanted is None else TiedBitmap(disk.node, wanted)
            snapshot = Snapshot(disk.name, self._name, self._options, tied)
            if self._options.internal:
                snapshot = InternalSnapshot(disk.name, self._name, self._options, disk.node)
            self.made.append(snapshot)
            async with in_time(f"making the files of snapshot {snapshot.export_name}"):
                await snapshot.prepare(self._graph, self._state, disk.top)

    async def engage(self) -> None:
        """Take the instant: put all filters in, or none; the tops are drained by the caller.

        Raises:
            CommandError: The permissions conflict, or what has to be of the disk's own node would
                not be of what the guest writes. No filter is in the guests' paths.
        """
        for disk in self.group if self._options.bitmap or self._options.internal else ():
            if not disk.is_in_place:
                what = f"bitmap '{self._options.bitmap}'" if self._options.bitmap else "the image"
                raise CommandError(
                    f"disk '{disk.name}': what is written goes to node '{disk.top.name}', of which "
                    f"{what} does not know"
                )
        instant = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        try:
            for snapshot in self.made:
                snapshot.engage(self._graph, instant)
            for snapshot in self.made:
                await snapshot.make()
        except CommandError:
            self._disengage()
            raise

    async def expose(self) -> None:
        """Make all readable.

        Raises:
            CommandError: It cannot be done; `withdraw` or `discard` is due.
        """
        for snapshot in self.made:
            await snapshot.expose(self._graph, self._exports)

    async def keep(self) -> None:
        """Write down what the snapshots are.

        Raises:
            CommandError: It cannot be written.
        """
        for snapshot in self.made:
            await snapshot.keep(self._state)

    async def withdraw(self) -> None:
        """Undo `expose` and `engage`; the tops are drained by the caller.

        Raises:
            CommandError: Something is still in the guests' paths, and does no harm there.
        """
        for snapshot in reversed(self.made):
            await snapshot.hide(self._graph, self._exports, RemoveMode.HARD)
        self._disengage()

    async def discard(self) -> None:
        """Take apart what has been made; what stays is logged, and the next start removes it."""
        for snapshot in reversed(self.made):
            try:
                await snapshot.hide(self._graph, self._exports, RemoveMode.HARD)
                async with in_time(f"removing snapshot {snapshot.export_name}"):
                    await snapshot.take_apart(self._graph)
            except CommandError as error:
                _log.error("snapshot %s: %s", snapshot.export_name, error)
            if snapshot.tied is not None:
                snapshot.tied.thaw()
                await snapshot.tied.discard()

    def _disengage(self) -> None:
        for snapshot in reversed(self.made):
            if snapshot.is_engaged:
                snapshot.disengage(self._graph)
                if snapshot.tied is not None:
                    snapshot.tied.thaw()
