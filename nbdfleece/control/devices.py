"""Served disks, as a program written for a virtual machine takes them for its drives.

A served disk is the live export of a disk (`fleece-disk-add`, the command line of `serve`), or any
writable export that a command has made: a guest's data are written there. Read-only exports, those
of snapshots among them, are none.

::

    /machine/peripheral/ID                  virtio-blk-pci       ID: of the export; a disk's name
    /machine/peripheral/ID/virtio-backend   virtio-blk-device    property `drive`: the node below it
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import NotFound
from nbdfleece.fleece.drive import drive

if TYPE_CHECKING:
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.server.export import Export

MACHINE: Final = "/machine"
PERIPHERAL: Final = "/machine/peripheral"
BACKEND: Final = "virtio-backend"
PROXY_TYPE: Final = "virtio-blk-pci"
BACKEND_TYPE: Final = "virtio-blk-device"

_PATH: Final = re.compile(rf"{PERIPHERAL}/([^/]+)(/{BACKEND})?")


class DeviceNotFound(NotFound):
    """There is no device of that name, or nothing at that path."""

    qmp_class = "DeviceNotFound"


def device_path(export_id: str) -> str:
    """Return the path under which a program written for QEMU finds the device of an export."""
    return f"{PERIPHERAL}/{export_id}/{BACKEND}"


def id_of_path(path: str) -> tuple[str, bool] | None:
    """Return the export id in a device's path, and whether it is the backend's path; or None."""
    found = _PATH.fullmatch(path)
    return None if found is None else (found[1], found[2] is not None)


def served_disks(context: Context) -> list[Export]:
    """Return the exports that are served disks, those of disks first."""
    disks = [disk.export for disk in context.fleece.disks()]
    return disks + [
        export for export in context.exports if export.options.writable and export not in disks
    ]


def find_block(context: Context, device: str, node_name: str) -> Node:
    """Return the node that a served disk `device` is, or the node of either name.

    Raises:
        NotFound: There is neither.
    """
    for export in served_disks(context):
        top = drive(export)
        if device and export.options.id == device and top is not None:
            return top
    node = context.graph.get(node_name)
    if node is None:
        raise NotFound(f"Cannot find device='{device}' nor node-name='{node_name}'")
    return node


def find_device(context: Context, name: str) -> Export | Node:
    """Return the export with this id or path (query-block's `qdev`), else the node with this name.

    Raises:
        DeviceNotFound: There is neither.
    """
    path = id_of_path(name)
    export_id = name if path is None else path[0]
    for export in context.exports:
        if export.options.id == export_id and export.root is not None:
            return export
    node = context.graph.get(name)
    if node is None:
        raise DeviceNotFound(f"Device '{name}' not found")
    return node
