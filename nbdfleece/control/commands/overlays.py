"""Overlays: external snapshots, the images for them, and what those say is behind them.

::

    users -> node          users -> overlay --backing--> node

Words of errors are QEMU's (blockdev.c: external_snapshot_prepare, qmp_change_backing_file).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse, IoError
from nbdfleece.block.create import create_overlay
from nbdfleece.block.drain import flush_in_time
from nbdfleece.block.graph import check_not_backing
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.control.blockdev import CREATE, OPTIONS
from nbdfleece.control.command import Command
from nbdfleece.control.devices import find_block
from nbdfleece.control.transaction import Action, ActionKind
from nbdfleece.jobs.create import start_create
from nbdfleece.protocol.qmp.schema import Enum, String, Struct
from nbdfleece.server.export import Export

if TYPE_CHECKING:
    from nbdfleece.block.graph import GraphChange
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json


# --- external snapshots ------------------------------------------------------------------------


class _Append(Action):
    """What both ways to put an overlay above a node have in common.

    Attributes:
        found: The node and the overlay, in `prepare`.
    """

    found: tuple[Node, ...] = ()
    _change: GraphChange | None = None

    async def begin(self) -> None:
        """See Action.begin."""
        # A snapshot of ours that is being made counts on the top of its disk.
        await self.transaction.lock(self.context.fleece.changing)

    def nodes(self) -> tuple[Node, ...]:
        """See Action.nodes."""
        return self.found

    async def append(self, node: Node, overlay: Node) -> None:
        """Put `overlay` above `node`, in the drained section.

        Raises:
            CommandError: It cannot be there, or the graph has been changed meanwhile.
        """
        self._check(node, overlay)
        await _flush(node)
        self.found = (node, overlay)
        await self.transaction.quieten(self)
        for name in (node.name, overlay.name):
            self.context.graph.find(name)  # it may have been removed meanwhile
        self._check(node, overlay)
        await _flush(node)
        self._change = self.context.graph.append(overlay, node)

    def _check(self, node: Node, overlay: Node) -> None:
        self.context.jobs.check_not_busy(node)
        check_not_backing(node)
        if any(isinstance(edge.parent, Export) for edge in overlay.parents):
            raise InUse("The overlay is already in use")
        self.context.jobs.check_not_busy(overlay)
        check_not_backing(overlay)
        if overlay.backing is not None:
            raise CommandError("The overlay already has a backing image")
        if not overlay.driver.can_have_backing():
            raise CommandError("The overlay does not support backing images")
        if overlay.size != node.size and overlay is not node:
            raise CommandError(
                f"Nodes '{node.name}' and '{overlay.name}' have different sizes "
                f"({node.size} and {overlay.size} bytes)"
            )

    async def abort(self) -> None:
        """See Action.abort."""
        if self._change is not None:
            self.context.graph.take_back(self._change, self.found)
            self._change = None


class _Snapshot(_Append):
    """Put an overlay above a node: whoever uses the node uses the overlay from now on."""

    def nodes(self) -> tuple[Node, ...]:
        """See Action.nodes."""
        names = (self.arguments.string("node"), self.arguments.string("overlay"))
        there = (self.context.graph.get(name) for name in names)
        return self.found or tuple(node for node in there if node is not None)

    async def prepare(self) -> None:
        """See Action.prepare."""
        name, overlay_name = self.arguments.string("node"), self.arguments.string("overlay")
        node = find_block(self.context, name, name)
        overlay = self.context.graph.get(overlay_name)
        if overlay is None:
            where = f"device='{overlay_name}' nor node-name='{overlay_name}'"
            raise CommandError(f"Cannot find {where}")
        await self.append(node, overlay)


class _SnapshotSync(_Append):
    """As blockdev-snapshot, with an overlay in a file that is made for it, or that is there.

    The overlay belongs to the user, as one of blockdev-add does. A file that was made stays when
    the transaction is refused.
    """

    _overlay: Node | None = None

    async def prepare(self) -> None:
        """See Action.prepare."""
        arguments, graph = self.arguments, self.context.graph
        node_name = arguments.optional_string("node-name") or ""
        node = find_block(self.context, arguments.optional_string("device") or "", node_name)
        name = arguments.optional_string("snapshot-node-name")
        if node_name and name is None:
            raise CommandError("New overlay node-name missing")
        if name is not None and graph.get(name) is not None:
            raise CommandError("New overlay node-name already in use")
        if name is not None:
            graph.check_new_name(name)
        filename = arguments.string("snapshot-file")
        driver = arguments.optional_string("format") or "qcow2"
        if driver not in OPTIONS.variants:
            raise CommandError(f"Invalid snapshot format '{driver}'")
        self.context.jobs.check_not_busy(node)
        check_not_backing(node)
        if arguments.optional_string("mode") != "existing":
            await self._make_file(node, driver, filename)
        options: dict[str, object] = {
            "driver": driver,
            "file": {"driver": "file", "filename": filename},
            "backing": None,
        }
        if name is not None:
            options["node-name"] = name
        self._overlay = await add_from_options(graph, options, needs_name=False)
        try:
            await self.append(node, self._overlay)
        except BaseException:
            await graph.remove(self._overlay)
            raise

    async def _make_file(self, node: Node, driver: str, filename: str) -> None:
        image = node
        while image.driver.is_filter and image.file is not None:
            image = image.file.node  # a filter is in no file
        backing = image.driver.image_name(), image.driver.name
        try:
            await create_overlay(self.context.graph, driver, filename, node.size, backing)
        except IoError as error:
            raise CommandError(f"Could not create '{filename}': {error}") from error

    async def abort(self) -> None:
        """See Action.abort."""
        await super().abort()
        if self._overlay is not None:
            await self.context.graph.remove(self._overlay)


async def _flush(node: Node) -> None:
    if node.read_only:
        return
    try:
        await flush_in_time(node)
    except IoError as error:
        raise CommandError("An IO error has occurred") from error


# --- images ------------------------------------------------------------------------------------


async def _create(context: Context, arguments: Arguments) -> Json:
    """Make an image in the background: a file, or a format in a node that is there."""
    options = arguments.members["options"]
    assert isinstance(options, Mapping), "as declared"
    of_format = {name: value for name, value in options.items() if name != "driver"}
    job_id = arguments.string("job-id")
    start_create(context.graph, context.jobs, job_id, str(options["driver"]), of_format)
    return {}


async def _change_backing_file(context: Context, arguments: Arguments) -> Json:
    """Write into an image what is behind it; nothing changes for those who have it open."""
    device = arguments.string("device")
    root = find_block(context, device, device)
    for edge in root.parents:
        if isinstance(edge.parent, Node) and not edge.parent.is_implicit:
            raise CommandError("Need a root block node")
    image = find_block(context, "", arguments.string("image-node-name"))
    if image.backing is None:
        raise CommandError("not allowing backing file change on an image without a backing file")
    if image not in _chain(root):
        raise CommandError(f"'{device}' and image file are not in the same chain")
    context.jobs.check_not_busy(image)
    behind = image.backing.node
    while behind.driver.is_filter and behind.file is not None:
        behind = behind.file.node
    name = arguments.string("backing-file")
    try:
        await image.driver.change_backing_file(name, behind.driver.name)
    except IoError as error:
        raise CommandError(f"Could not change backing file to '{name}': {error}") from error
    return {}


def _chain(node: Node) -> list[Node]:
    """Return what a node shows: through filters, and through what is behind images."""
    found = [node]
    while True:
        edge = node.file if node.driver.is_filter else node.backing
        if edge is None:
            return found
        node = edge.node
        found.append(node)


_NOTHING: Final = Struct()
SNAPSHOT: Final = ActionKind(
    "blockdev-snapshot", Struct({"node": String(), "overlay": String()}), _Snapshot
)
SNAPSHOT_SYNC: Final = ActionKind(
    "blockdev-snapshot-sync",
    Struct(
        {"snapshot-file": String()},
        {
            "device": String(),
            "node-name": String(),
            "snapshot-node-name": String(),
            "format": String(),
            "mode": Enum(("existing", "absolute-paths")),
        },
    ),
    _SnapshotSync,
)
ACTIONS: Final = (SNAPSHOT, SNAPSHOT_SYNC)

COMMANDS: Final = (
    *(kind.command(_NOTHING) for kind in ACTIONS),
    Command(
        "blockdev-create",
        Struct({"job-id": String(), "options": CREATE}),
        _create,
        returns=_NOTHING,
    ),
    Command(
        "change-backing-file",
        Struct({"device": String(), "image-node-name": String(), "backing-file": String()}),
        _change_backing_file,
        returns=_NOTHING,
    ),
)
