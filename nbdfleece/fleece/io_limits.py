"""I/O limits of exports and nodes (block_set_io_throttle): a throttle filter that comes and goes.

::

    export -> [throttle filter] -> node      only this export is limited
    all parents -> [throttle filter] -> node  where a node is named

The filter of an export stays right below it: what is put above the node later, such as the filter
of a snapshot, comes between the two. Otherwise a reader of the snapshot would use up what is the
guest's.

Follows: QEMU blockdev.c (qmp_block_set_io_throttle).
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.block.child import Role
from nbdfleece.block.drain import quiet
from nbdfleece.block.drivers.throttle import ThrottleDriver
from nbdfleece.block.graph import GraphChange

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator

    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.block.throttle import Limits
    from nbdfleece.server.export import Export
    from nbdfleece.server.exports import Exports

_log = logging.getLogger(__name__)


def below_limit(node: Node) -> Node:
    """Return the node below the I/O limits that `node` may be."""
    while _is_limit(node):
        assert node.file is not None, "a throttle node has a file child"
        node = node.file.node
    return node


def describe_limit(node: Node) -> dict[str, int | str]:
    """Return what QMP's BlockDeviceInfo tells of the I/O limits that an export's node may be."""
    driver = node.driver
    if not (isinstance(driver, ThrottleDriver) and driver.is_io_limit):
        return {}
    limits = driver.group.limits
    found: dict[str, int | str] = {"group": driver.group.name}
    for member, limit in limits.all().items():
        name = member.replace("-total", "").replace("-read", "_rd").replace("-write", "_wr")
        found[name] = limit.avg
        if limit.max:
            found |= {f"{name}_max": limit.max, f"{name}_max_length": limit.length}
    if limits.iops_size:
        found["iops_size"] = limits.iops_size
    return found


async def limit_export(
    graph: Graph, export: Export, limits: Limits, group: str | None, default_group: str
) -> None:
    """Limit what clients of one export do to its node; other users of the node are not limited.

    Args:
        graph: The nodes.
        export: It is attached.
        limits: Checked ones; when none is set, the export is limited no more.
        group: Whose members share the limits: a group made by object-add, or any name. None: stay
            in the group, or begin with `default_group`.
        default_group: See `group`.

    Raises:
        CommandError: It cannot be done now. The export is as it was, but its limits may have
            changed.

    Cancel: as after an error.
    """
    top = export.node
    if _is_limit(top):
        await _change(graph, top, limits, group)
    elif limits.are_set:
        async with _making(graph, top, limits, group or default_group) as made, quiet(top):
            if export.root is None:
                raise CommandError(f"export '{export.options.id}' is being removed")
            change = GraphChange()
            change.repoint(export.root, made)
            change.commit([top, made])


async def limit_node(
    graph: Graph, node: Node, limits: Limits, group: str | None, default_group: str
) -> None:
    """Limit what all users of a node do to it; else as `limit_export`."""
    above = [edge.parent for edge in node.parents if edge.name == "file"]
    limiting = [parent for parent in graph if parent in above and _is_limit(parent)]
    if _is_limit(node):
        limiting = [node]
    if limiting:
        await _change(graph, limiting[0], limits, group)
    elif limits.are_set:
        if not node.parents:
            raise CommandError(f"Node '{node.name}' is not in use")
        async with _making(graph, node, limits, group or default_group) as made, quiet(node):
            graph.insert_filter(made)


async def drop_unused_limits(graph: Graph) -> None:
    """Remove the filters of I/O limits whose export is gone; return when they are gone.

    Cancel: not cancelled.
    """
    async with graph.dropping:
        for node in graph:
            if _is_limit(node) and not node.parents:
                with suppress(NotFound):
                    await graph.remove(node)


def watch_limits(graph: Graph, exports: Exports, tasks: asyncio.TaskGroup) -> None:
    """Have the filters of I/O limits go when their export has gone, whoever removed that."""

    async def drop() -> None:
        try:
            await drop_unused_limits(graph)
        except CommandError as error:
            _log.error("I/O limits that nobody uses: %s", error)

    def removed(_export_id: str) -> None:
        if any(_is_limit(node) and not node.parents for node in graph):
            tasks.create_task(drop(), name="drop unused limits")

    exports.removed.subscribe(removed)


def _is_limit(node: Node) -> bool:
    return isinstance(node.driver, ThrottleDriver) and node.driver.is_io_limit


@asynccontextmanager
async def _making(graph: Graph, below: Node, limits: Limits, name: str) -> AsyncIterator[Node]:
    """Make a filter that the body puts into its place; if it does not, the filter is removed."""
    groups = graph.throttle_groups
    group = groups.find(name) if name in groups else groups.add(name, limits, is_object=False)
    driver = ThrottleDriver(groups, group)
    try:
        node = await graph.add(
            None,
            driver,
            {"file": (below, Role.FILTERED | Role.PRIMARY)},
            read_only=below.read_only,
            discard_enabled=True,
        )
    finally:
        groups.drop_unused(group)
    node.is_implicit = True
    try:
        yield node
    except BaseException:
        await graph.remove(node)
        raise
    driver.is_io_limit = True  # from now on `drop_unused_limits` takes care of it
    group.set_limits(limits)


async def _change(graph: Graph, limiting: Node, limits: Limits, name: str | None) -> None:
    driver = limiting.driver
    assert isinstance(driver, ThrottleDriver), "a filter of I/O limits"
    if not limits.are_set:
        async with quiet(below_limit(limiting)):
            graph.remove_filter(limiting)
        await drop_unused_limits(graph)
        return
    groups = graph.throttle_groups
    if name is not None and name != driver.group.name:
        known = name in groups
        driver.change_group(
            groups.find(name) if known else groups.add(name, limits, is_object=False)
        )
    driver.group.set_limits(limits)
