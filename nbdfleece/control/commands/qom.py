"""qom-get, qom-set and qom-list: objects, limits of throttle groups, and drives of served disks.

The tree is `/objects` with what `object-add` has made, and `/machine` with the served disks
(control.devices). Only throttle groups and served disks have properties here; QEMU shows those of
every object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.block.throttle_group import ThrottleGroup, get_property, properties, set_property
from nbdfleece.control.command import Command
from nbdfleece.control.devices import (
    BACKEND,
    BACKEND_TYPE,
    MACHINE,
    PERIPHERAL,
    PROXY_TYPE,
    DeviceNotFound,
    id_of_path,
    served_disks,
)
from nbdfleece.fleece.drive import drive
from nbdfleece.protocol.qmp.schema import Anything, Array, String, Struct

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.control.objects import Object
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json
    from nbdfleece.server.export import Export

_ROOT: Final = "/objects"
_TYPE: Final = "type"
_DRIVE: Final = "drive"


async def _get(context: Context, arguments: Arguments) -> Json:
    """Return a property of an object, or the name of the node that a served disk is."""
    device = _device(context, arguments.string("path"))
    if device is not None:
        return _get_of_device(*device, arguments.string("property"))
    found, name = _find(context, arguments.string("path")), arguments.string("property")
    if name == _TYPE:
        return found.kind
    if isinstance(found.value, ThrottleGroup):
        return get_property(found.value, name)
    raise _no_property(found, name)


async def _set(context: Context, arguments: Arguments) -> Json:
    """Change the limits of a throttle group, or put another node under a served disk (`drive`)."""
    device = _device(context, arguments.string("path"))
    if device is not None:
        name, value = arguments.string("property"), arguments.members["value"]
        return await _set_of_device(context, *device, name, value)
    found, name = _find(context, arguments.string("path")), arguments.string("property")
    if not isinstance(found.value, ThrottleGroup):
        raise _no_property(found, name)
    set_property(found.value, name, arguments.members["value"])
    return {}


async def _list(context: Context, arguments: Arguments) -> Json:
    """List what is at a path, and the properties of an object."""
    path = arguments.string("path")
    rows: dict[str, str] = {_TYPE: "string"}
    if path == "/":
        for container in (MACHINE, _ROOT):
            rows[container.removeprefix("/")] = "child<container>"
    elif path == MACHINE:
        rows[PERIPHERAL.removeprefix(f"{MACHINE}/")] = "child<container>"
    elif path == PERIPHERAL:
        rows |= {disk.options.id: f"child<{PROXY_TYPE}>" for disk in served_disks(context)}
    elif (device := _device(context, path)) is not None:
        rows[_DRIVE] = "str"
        if device[1] == PROXY_TYPE:
            rows[BACKEND] = f"child<{BACKEND_TYPE}>"
    elif path == _ROOT:
        rows |= {found.id: f"child<{found.kind}>" for found in context.objects}
    elif isinstance(_find(context, path).value, ThrottleGroup):
        rows |= properties()
    return [{"name": name, "type": kind} for name, kind in rows.items()]


# --- served disks --------------------------------------------------------------------------------


def _device(context: Context, path: str) -> tuple[Export, str] | None:
    """Return the served disk at a path, and its type there; None: there is none."""
    named = id_of_path(path)
    for export in served_disks(context):
        if named is not None and export.options.id == named[0]:
            return export, BACKEND_TYPE if named[1] else PROXY_TYPE
    return None


def _get_of_device(export: Export, kind: str, name: str) -> Json:
    if name == _TYPE:
        return kind
    if name != _DRIVE:
        raise CommandError(f"Property '{kind}.{name}' not found")
    top = drive(export)
    return "" if top is None else top.name


async def _set_of_device(
    context: Context, export: Export, kind: str, name: str, value: Json
) -> Json:
    if name != _DRIVE:
        raise CommandError(f"Property '{kind}.{name}' not found")
    if not isinstance(value, str):
        raise CommandError(f"Invalid parameter type for '{name}', expected: string")
    node = context.graph.get(value)
    if node is None:
        raise CommandError(f"Property '{kind}.{name}' can't find value '{value}'")
    await context.fleece.set_drive(export, node)
    return {}


# --- objects -------------------------------------------------------------------------------------


def _find(context: Context, path: str) -> Object:
    """Return the object at `/objects/ID`, for which `ID` is enough.

    Raises:
        DeviceNotFound: There is none.
    """
    found = context.objects.find(path.removeprefix(f"{_ROOT}/"))
    if found is None:
        raise DeviceNotFound(f"Device '{path}' not found")
    return found


def _no_property(found: Object, name: str) -> CommandError:
    return CommandError(f"Property '{found.kind}.{name}' not found")


_WHICH: Final = {"path": String(), "property": String()}

COMMANDS: Final = (
    Command("qom-get", Struct(_WHICH), _get),
    Command("qom-set", Struct({**_WHICH, "value": Anything()}), _set),
    Command(
        "qom-list",
        Struct({"path": String()}),
        _list,
        returns=Array(Struct({"name": String(), "type": String()})),
    ),
)
