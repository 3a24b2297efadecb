"""Nodes: added, removed, reopened, resized, asked about.

Words of errors, members and the order of lists are QEMU's. An entry of `query-block` is a served
disk (control.devices): what a program written for a virtual machine takes for one of its drives.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, cast

from nbdfleece.base.errors import CommandError, InUse, IoError, NotFound
from nbdfleece.block import permissions
from nbdfleece.block.graph import check_not_backing
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from nbdfleece.control.blockdev import OPTIONS
from nbdfleece.control.command import Command
from nbdfleece.control.commands.throttle import export_stats, node_stats
from nbdfleece.control.devices import device_path, find_block, served_disks
from nbdfleece.control.transaction import Action, ActionKind
from nbdfleece.fleece.drive import drive
from nbdfleece.fleece.io_limits import describe_limit, drop_unused_limits
from nbdfleece.jobs.job import Job
from nbdfleece.protocol.qmp.schema import Array, Boolean, Integer, String, Struct
from nbdfleece.server.export import Export

if TYPE_CHECKING:
    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.child import Child
    from nbdfleece.block.internal_snapshots import SnapshotInfo
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json

_NOTHING: Final = Struct()
_SECOND_NS: Final = 10**9
_UINT64: Final = Integer(0, (1 << 64) - 1, "uint64")
# Drivers of whose images QEMU knows nothing more than the size.
_NO_INFO: Final = frozenset({"nbd", "null-co", "snapshot-access"})
_LIMITS: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


# --- changes -------------------------------------------------------------------------------------


async def _add(context: Context, arguments: Arguments) -> Json:
    """Make a node, with the children whose options are nested in its own."""
    await add_from_options(context.graph, _resolved(context, arguments))
    return {}


def _resolved(context: Context, arguments: Arguments) -> Mapping[str, Json]:
    """Return the arguments with what they name among the objects.

    Raises:
        CommandError: It is not there.
    """
    options = context.objects.resolved(dict(arguments.members))
    assert isinstance(options, Mapping), "it was"
    return options


class _Add(Action):
    """As `_add`, in a transaction."""

    _node: Node

    async def prepare(self) -> None:
        """See Action.prepare."""
        self._node = await add_from_options(
            self.context.graph, _resolved(self.context, self.arguments)
        )

    async def abort(self) -> None:
        """See Action.abort."""
        graph = self.context.graph
        if graph.get(self._node.name) is self._node:  # blockdev-del may have been quicker
            await graph.remove(self._node)


async def _del(context: Context, arguments: Arguments) -> Json:
    """Remove a node that blockdev-add made and nobody uses, with the children made for it."""
    await drop_unused_limits(context.graph)
    node = _find(context, arguments.string("node-name"))
    for edge in node.parents:
        if isinstance(edge.parent, Export):
            raise InUse(f"Node {node.name} is in use")
    context.jobs.check_not_busy(node)
    check_not_backing(node)
    if not node.owned_by_monitor:
        raise CommandError(f"Node {node.name} is not owned by the monitor")
    if node.parents:
        raise InUse(f"Block device {node.name} is in use")
    await context.graph.remove(node)
    return {}


async def _reopen(context: Context, arguments: Arguments) -> Json:
    """Give nodes other options: all of them, or none when anything is refused."""
    options = _resolved(context, arguments)["options"]
    assert isinstance(options, list), "as declared"
    await reopen(context.graph, options)
    return {}


async def _resize(context: Context, arguments: Arguments) -> Json:
    """Make an image longer, by zeroes, or shorter."""
    node = _lookup(context, arguments)
    size = arguments.integer("size")
    if size < 0:
        raise CommandError("Parameter 'size' expects a >0 size")
    context.jobs.check_not_busy(node)
    check_not_backing(node)
    await context.graph.resize(node, size)
    return {}


async def _set_write_threshold(context: Context, arguments: Arguments) -> Json:
    """Have the first write that ends behind a threshold told by BLOCK_WRITE_THRESHOLD; 0: none."""
    name = arguments.string("node-name")
    node = context.graph.get(name)
    if node is None:
        raise NotFound(f"Device '{name}' not found")

    def tell(node: Node, exceeded: int) -> None:
        context.events.emit(
            "BLOCK_WRITE_THRESHOLD",
            {
                "node-name": node.name,
                "amount-exceeded": exceeded,
                "write-threshold": node.write_threshold,
            },
        )

    node.threshold_exceeded = tell
    node.write_threshold = arguments.integer("write-threshold")
    return {}


def _find(context: Context, name: str) -> Node:
    node = context.graph.get(name)
    if node is None:
        raise NotFound(f"Failed to find node with node-name='{name}'")
    return node


def _lookup(context: Context, arguments: Arguments) -> Node:
    """Return the node that `device` (a served disk) or `node-name` names."""
    device = arguments.optional_string("device") or ""
    return find_block(context, device, arguments.optional_string("node-name") or "")


# --- nodes as they are ---------------------------------------------------------------------------


async def _query_nodes(context: Context, arguments: Arguments) -> Json:
    """Describe all nodes, the newest first; with `flat`, each without what is behind it."""
    flat = arguments.boolean("flat", default=False)
    return [
        await describe(node, flat=flat)
        for node in reversed(list(context.graph))
        if context.graph.get(node.name) is node  # not gone while others were looked at
    ]


async def describe(node: Node, *, flat: bool = False) -> Mapping[str, Json]:
    """Return what QEMU calls BlockDeviceInfo."""
    driver = node.driver
    answer: dict[str, Json] = {
        "node-name": node.name,
        "drv": driver.name,
        "file": driver.image_name(),
        "ro": node.read_only,
        "encrypted": False,
        "detect_zeroes": "off" if node.spec is None else node.spec.detect_zeroes,
        "write_threshold": node.write_threshold,
        "cache": {
            "writeback": True,
            "direct": driver.bypasses_cache(),
            "no-flush": node.spec is not None and node.spec.no_flush,
        },
        **dict.fromkeys(_LIMITS, 0),
    }
    if node.bitmaps:
        answer["dirty-bitmaps"] = _bitmaps(node)
    if node.backing is not None:
        answer["backing_file"] = node.backing.node.driver.image_name()
    behind = [] if flat else _behind(node)
    images = [(_image(found), found.driver) for found in (node, *behind)]
    answer["backing_file_depth"] = len(behind)
    answer["image"] = images[0][0]
    for (upper, _), (lower, _) in itertools.pairwise(images):
        upper["backing-image"] = lower
    for image, storing in images:
        try:
            size = await storing.allocated_size()
        except IoError:
            continue
        if size is not None:
            image["actual-size"] = size
    return answer


def _behind(node: Node) -> list[Node]:
    """Return what a filter shows, and its backing file, and so on."""
    edge = node.file if node.driver.is_filter else node.backing
    return [] if edge is None else [edge.node, *_behind(edge.node)]


def _image(node: Node) -> dict[str, Json]:
    about: dict[str, Json] = {
        "filename": node.driver.image_name(),
        "format": node.driver.name,
        "virtual-size": node.size,
    }
    if _has_info(node):
        about["dirty-flag"] = False
    snapshots = node.driver.internal_snapshots()
    if snapshots is not None and snapshots.all():
        about["snapshots"] = [describe_snapshot(each) for each in snapshots.all()]
    return about | cast("dict[str, Json]", node.driver.image_info())


def describe_snapshot(snapshot: SnapshotInfo) -> Mapping[str, Json]:
    """Return what QEMU calls SnapshotInfo."""
    about: dict[str, Json] = {"id": snapshot.id, "name": snapshot.name}
    about |= {
        "vm-state-size": snapshot.state_size,
        "date-sec": snapshot.date_s,
        "date-nsec": snapshot.date_ns,
        "vm-clock-sec": snapshot.clock_ns // _SECOND_NS,
        "vm-clock-nsec": snapshot.clock_ns % _SECOND_NS,
    }
    if snapshot.instructions is not None:
        about["icount"] = snapshot.instructions
    return about


def _has_info(node: Node) -> bool:
    """Tell whether QEMU knows more of such an image than the size."""
    if node.driver.name in _NO_INFO:
        return False
    return node.file is None or _has_info(node.file.node)


def _bitmaps(node: Node) -> list[Json]:
    """Describe the bitmaps of a node, the newest first; those without name are successors."""
    return [describe_bitmap(bitmap) for bitmap in reversed(list(node.bitmaps.values()))]


def describe_bitmap(bitmap: DirtyBitmap) -> Mapping[str, Json]:
    """Return what QEMU calls BlockDirtyInfo, and why a bitmap is inconsistent."""
    about: dict[str, Json] = {"name": bitmap.name} if bitmap.name else {}
    about |= {
        "count": bitmap.count(),
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    }
    if bitmap.inconsistent:
        about["inconsistent"] = True
        if bitmap.reason:
            about["reason"] = bitmap.reason
    return about


async def _query_graph(context: Context, _arguments: Arguments) -> Json:
    """Show all nodes and all edges, with their permissions."""
    seen = _Numbered()
    for node in context.graph:
        for edge in node.parents:
            if not isinstance(edge.parent, Node):
                seen.add_edge(edge)
    for node in context.graph:
        seen.add_node(node, node.name, "block-driver")
        for edge in node.children:
            seen.add_edge(edge)
    return {"nodes": seen.nodes[::-1], "edges": seen.edges[::-1]}


class _Numbered:
    """Numbers whatever stands in the graph, in the order in which it is met."""

    def __init__(self) -> None:
        self.nodes: list[Json] = []
        self.edges: list[Json] = []
        self._ids: dict[object, int] = {}
        self._described: set[object] = set()

    def number(self, what: object) -> int:
        """Return the number of a node or parent."""
        return self._ids.setdefault(what, len(self._ids) + 1)

    def add_node(self, what: object, name: str, kind: str) -> None:
        """Take in a node or parent, unless it is there."""
        if what not in self._described:
            self._described.add(what)
            self.nodes.append({"id": self.number(what), "name": name, "type": kind})

    def add_edge(self, edge: Child) -> None:
        """Take in an edge, and its parent if that is not a node."""
        parent = edge.parent
        if isinstance(parent, Job):
            self.add_node(parent, parent.id, "block-job")
        elif not isinstance(parent, Node):
            self.add_node(parent, "", "block-backend")
        self.edges.append(
            {
                "parent": self.number(parent),
                "child": self.number(edge.node),
                "name": edge.name,
                "perm": permissions.names(edge.perm)[::-1],  # in QEMU's order
                "shared-perm": permissions.names(edge.shared)[::-1],
            }
        )


# --- disks as devices ----------------------------------------------------------------------------


async def _query_block(context: Context, _arguments: Arguments) -> Json:
    """Describe all disks that are served, as if each were a drive of a virtual machine."""
    found: list[Json] = []
    for export in served_disks(context):
        about: dict[str, Json] = {
            "device": export.options.id,
            "qdev": device_path(export.options.id),
            "type": "unknown",
            "removable": False,
            "locked": False,
            "io-status": "ok",
        }
        top = drive(export)
        if top is not None:
            limits = describe_limit(export.node)
            about["inserted"] = {**await describe(top), **limits}
        found.append(about)
    return found


async def _query_stats(context: Context, arguments: Arguments) -> Json:
    """Give the counters of all served disks or, with `query-nodes`, of all nodes."""
    if arguments.boolean("query-nodes", default=False):
        return [_node_stats(node) for node in context.graph]
    found: list[Json] = []
    for export in served_disks(context):
        top = drive(export)
        if top is not None:
            name = export.options.id
            about = {"device": name, "qdev": device_path(name)}
            stats: dict[str, Json] = {"stats": export_stats(export)}
            found.append({**about, **_node_stats(top), **stats})
    return found


def _node_stats(node: Node) -> Mapping[str, Json]:
    about: dict[str, Json] = {"node-name": node.name, "stats": node_stats(node)}
    if node.file is not None:
        about["parent"] = _node_stats(node.file.node)
    return about


# A transaction of its own would make others wait for a server that does not answer.
ADD: Final = ActionKind("blockdev-add", OPTIONS, _Add)

COMMANDS: Final = (
    Command("blockdev-add", OPTIONS, _add, returns=_NOTHING),
    Command("blockdev-del", Struct({"node-name": String()}), _del, returns=_NOTHING),
    Command("blockdev-reopen", Struct({"options": Array(OPTIONS)}), _reopen, returns=_NOTHING),
    Command(
        "block_resize",
        Struct({"size": Integer()}, {"device": String(), "node-name": String()}),
        _resize,
        returns=_NOTHING,
    ),
    Command(
        "block-set-write-threshold",
        Struct({"node-name": String(), "write-threshold": _UINT64}),
        _set_write_threshold,
        returns=_NOTHING,
    ),
    Command("query-named-block-nodes", Struct(optional={"flat": Boolean()}), _query_nodes),
    Command("query-block", _NOTHING, _query_block),
    Command("query-blockstats", Struct(optional={"query-nodes": Boolean()}), _query_stats),
    Command("x-debug-query-block-graph", _NOTHING, _query_graph, features=("unstable",)),
)
