"""A snapshot: the point in time of one disk, readable under an export name of its own.

::

    live export ---> [copy-before-write] --file----> what was the top before
                          ^      `-----target---> temp.raw
    DISK@NAME ---> [snapshot-access]

A snapshot is built and taken apart in steps. Each step undoes nothing but itself, and `take_apart`
goes on wherever an earlier attempt stopped.

Invariants
  S1  The filter is in the guest's path exactly while `is_engaged`.
  S2  The access node hangs on the filter only while that is engaged: anywhere else it would show
      the live disk.
  S3  A bitmap that goes with it is frozen from the instant until the snapshot has been taken apart.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.block.child import Role
from nbdfleece.block.drain import quiet
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.snapshot_access import SnapshotAccess
from nbdfleece.fleece.change import remove_export
from nbdfleece.fleece.disk import connections
from nbdfleece.fleece.io_limits import drop_unused_limits
from nbdfleece.fleece.store import SnapshotFiles, StateFolder, remove_files
from nbdfleece.server.export import Export, ExportOptions

if TYPE_CHECKING:
    from nbdfleece.base.errors import IoError
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.fleece.bitmaps import TiedBitmap
    from nbdfleece.fleece.store import Value
    from nbdfleece.server.exports import Exports, RemoveMode


@dataclass(frozen=True, slots=True)
class SnapshotOptions:
    """How a snapshot behaves.

    Attributes:
        on_error: What gives way when old data cannot be saved.
        timeout_s: Seconds that a guest write waits for its copies; None: for ever.
        temp_limit: Bytes of old data that may be saved; None: what the file system has.
        bitmap: Name of the bitmap that is frozen at the instant; None: none is.
        internal: It is made inside the disk's image; the others mean nothing then.
    """

    on_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    timeout_s: float | None = None
    temp_limit: int | None = None
    bitmap: str | None = None
    internal: bool = False


def on_error_policy(text: str) -> OnCbwError:
    """Return the policy that is called `text` (break-snapshot, break-guest-write)."""
    return OnCbwError(text)


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """What there is to say of a snapshot; sizes in bytes, `error` is None while it is whole."""

    disk: str
    snapshot: str
    export: str
    node_name: str
    instant: str
    size: int
    saved_bytes: int
    temp_bytes: int
    error: str | None
    readers: int
    durability: str
    on_error: str
    timeout_s: float | None
    temp_limit: int | None
    bitmap: str | None


class Snapshot:
    """One snapshot of one disk.

    Args:
        disk: Name of the disk.
        name: Its own name.
        options: How it behaves.
        tied: The bitmap that goes with it, or None.

    Attributes:
        disk: Name of the disk.
        name: Its own name.
        options: How it behaves.
        tied: The bitmap that goes with it, or None.
        instant: The point in time, in RFC 3339 UTC; empty until it is taken.
        cbw: The driver of its filter.
        filter: The filter node; None before it is made and after it is gone.
        is_engaged: See S1.
        outlives: It stays where it is when the process ends.
    """

    outlives = False

    def __init__(
        self, disk: str, name: str, options: SnapshotOptions, tied: TiedBitmap | None = None
    ) -> None:
        self.disk = disk
        self.name = name
        self.options = options
        self.tied = tied
        self.instant = ""
        self.cbw = CopyBeforeWrite(
            on_cbw_error=options.on_error,
            cbw_timeout_s=options.timeout_s,
            temp_limit=options.temp_limit,
        )
        self.filter: Node | None = None
        self.is_engaged = False
        self._files: SnapshotFiles | None = None
        self._temp: Node | None = None
        self._access: Node | None = None
        self._export: Export | None = None
        self.cbw.broken.subscribe(self._refuse_clients)

    @property
    def export_name(self) -> str:
        """Name, and id, of the snapshot's export."""
        return f"{self.disk}@{self.name}"

    @property
    def node_name(self) -> str:
        """Name of the access node; empty while there is none."""
        return "" if self._access is None else self._access.name

    @property
    def size(self) -> int:
        """Bytes; 0 before it is prepared and after it is taken apart."""
        return 0 if self.filter is None else self.filter.size

    @property
    def access(self) -> Node:
        """The node whose content is the point in time; while `error` is None."""
        assert self._access is not None, "the snapshot is not exposed"
        return self._access

    @property
    def readers(self) -> int:
        """Connections to the snapshot's export."""
        return 0 if self._export is None else connections(self._export)

    @property
    def error(self) -> str | None:
        """Why the snapshot cannot be read any more, or None."""
        if self.cbw.error is not None:
            return str(self.cbw.error)
        if self._export is None:
            return "it is only partly there: an attempt to delete it failed"
        return None

    def meta(self) -> dict[str, Value]:
        """Return what meta.json says."""
        return {
            "disk": self.disk,
            "snapshot": self.name,
            "instant": self.instant,
            "durability": "process",
            "on-error": self.options.on_error.value,
            "timeout": self.options.timeout_s,
            "temp-limit": self.options.temp_limit,
            "bitmap": self.options.bitmap,
        }

    async def facts(self) -> SnapshotFacts:
        """Return what there is to say of the snapshot now.

        Cancel: safe.
        """
        held = None if self._temp is None else await self._temp.driver.allocated_size()
        return SnapshotFacts(
            disk=self.disk,
            snapshot=self.name,
            export=self.export_name,
            node_name=self.node_name,
            instant=self.instant,
            size=self.size,
            saved_bytes=self.cbw.saved_bytes,
            temp_bytes=held or 0,
            error=self.error,
            readers=self.readers,
            durability="process",
            on_error=self.options.on_error.value,
            timeout_s=self.options.timeout_s,
            temp_limit=self.options.temp_limit,
            bitmap=self.options.bitmap,
        )

    # --- building --------------------------------------------------------------------------------

    async def prepare(self, graph: Graph, state: StateFolder, top: Node) -> None:
        """Make the files, the temporary image's node, and the filter over `top`, beside the guest.

        Raises:
            CommandError: It cannot be; `take_apart` is due.
        """
        if self.tied is not None:
            await self.tied.prepare()
        self._files = await self._make_files(state, top.size)
        self._temp = await graph.add(
            None,
            FileDriver(
                filename=str(self._files.temp),
                locking=Locking.AUTO,
                cache_direct=False,
                new_and_sparse=True,
            ),
            read_only=False,
            discard_enabled=True,
        )
        self.filter = await graph.add(
            None,
            self.cbw,
            {"file": (top, Role.FILTERED | Role.PRIMARY), "target": (self._temp, Role.DATA)},
            read_only=top.read_only,
            discard_enabled=True,
        )

    async def _make_files(self, state: StateFolder, size: int) -> SnapshotFiles:
        """Make the files; nobody is left with any when this is cancelled while the disk hangs."""
        wanted = [True]

        def make() -> SnapshotFiles:
            files = state.make_snapshot(self.disk, self.name, size, self.meta())
            if not wanted:
                remove_files(files)
            return files

        try:
            return await asyncio.to_thread(make)
        except asyncio.CancelledError:
            wanted.clear()
            raise

    def engage(self, graph: Graph, instant: str) -> None:
        """Take the instant: put the filter into the guest's path. The top is drained by the caller.

        Raises:
            CommandError: The permissions conflict, or the bitmap is in use. Nothing has changed.
        """
        assert self.filter is not None, "the snapshot is not prepared"
        if self.tied is not None:
            self.tied.freeze()
        try:
            graph.insert_filter(self.filter)
        except CommandError:
            if self.tied is not None:
                self.tied.thaw()
            raise
        self.instant = instant
        self.is_engaged = True

    async def make(self) -> None:
        """Do what of `engage` may take time, in the same drained section.

        Raises:
            CommandError: It cannot be done; `disengage` is due.
        """

    def disengage(self, graph: Graph) -> None:
        """Take the filter out of the guest's path; drained by the caller, without access node.

        Raises:
            CommandError: An edge is frozen. Nothing has changed.
        """
        assert self.filter is not None, "the snapshot is not prepared"
        assert self._access is None, "the access node would show the live disk"
        graph.remove_filter(self.filter)
        self.is_engaged = False

    async def keep(self, state: StateFolder) -> None:
        """Write down what the snapshot is, now that the instant is known.

        Raises:
            CommandError: It cannot be written.
        """
        assert self._files is not None, "the snapshot is not prepared"
        await asyncio.to_thread(state.write_snapshot, self._files, self.meta())

    async def expose(self, graph: Graph, exports: Exports) -> None:
        """Make the point in time readable: access node and export.

        Raises:
            CommandError: It cannot be; `take_apart` is due.
        """
        assert self.filter is not None, "the snapshot is not prepared"
        assert self.is_engaged, "the access node would show the live disk"
        if self._access is None:
            self._access = await graph.add(
                None,
                SnapshotAccess(),
                {"file": (self.filter, Role.DATA | Role.PRIMARY)},
                read_only=True,
                discard_enabled=True,
            )
        name = self.export_name
        text = f"disk {self.disk} as of {self.instant}, crash-consistent"
        bitmaps = [] if self.tied is None else [self.tied.bitmap]
        self._export = exports.add(self._access, ExportOptions(name, name, False, text), bitmaps)
        if self.cbw.error is not None:
            self._refuse_clients(self.cbw.error)

    def _refuse_clients(self, error: IoError) -> None:
        """Tell whoever asks for a broken snapshot so, rather than give it errors to read."""
        if self._export is not None:
            self._export.refusal = f"the snapshot is broken: {error.public}"

    # --- taking apart ----------------------------------------------------------------------------

    async def hide(self, graph: Graph, exports: Exports, mode: RemoveMode) -> None:
        """Undo `expose`.

        Raises:
            InUse: With SAFE: it is being read. Nothing has changed.
            CommandError: With HARD: reads that had begun do not end. Nobody can connect any more.

        Cancel: safe; `hide` may be called again.
        """
        if self._export is not None:
            if self._export.root is not None:  # at the daemon's end, all exports may have gone
                await remove_export(exports, self._export, mode)
            self._export = None
        if self._access is not None:
            await drop_unused_limits(graph)
            await graph.remove(self._access)
            self._access = None

    def leave(self) -> None:
        """Have `take_apart` leave what outlives the process."""

    async def take_apart(self, graph: Graph) -> None:
        """Undo `engage` and `prepare`, and remove the files; behind `hide`.

        Raises:
            CommandError: The guest's requests do not end, an edge is frozen, or a file cannot be
                removed. What is left can be taken apart by another call.

        Cancel: safe; `take_apart` may be called again.
        """
        if self.filter is not None:
            if self.is_engaged:
                assert self.filter.file is not None
                async with quiet(self.filter, self.filter.file.node):
                    self.disengage(graph)
            await graph.remove(self.filter)
            self.filter = None
        if self._temp is not None:
            await graph.remove(self._temp)
            self._temp = None
        if self._files is not None:
            await asyncio.to_thread(remove_files, self._files)
            self._files = None
