"""qom-get, qom-set and qom-list: what objects are there, and the limits of throttle groups.

The tree is `/objects` with what `object-add` has made. Only throttle groups have properties here;
QEMU shows those of every object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.block.throttle_group import ThrottleGroup, get_property, properties, set_property
from nbdfleece.control.command import Command
from nbdfleece.protocol.qmp.schema import Anything, Array, String, Struct

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.control.objects import Object
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json

_ROOT: Final = "/objects"
_TYPE: Final = "type"


class DeviceNotFound(NotFound):
    """There is nothing at that path."""

    qmp_class = "DeviceNotFound"


async def _get(context: Context, arguments: Arguments) -> Json:
    """Return a property of an object."""
    found, name = _find(context, arguments.string("path")), arguments.string("property")
    if name == _TYPE:
        return found.kind
    if isinstance(found.value, ThrottleGroup):
        return get_property(found.value, name)
    raise _no_property(found, name)


async def _set(context: Context, arguments: Arguments) -> Json:
    """Change a property of an object: the limits of a throttle group."""
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
        rows[_ROOT.removeprefix("/")] = "child<container>"
    elif path == _ROOT:
        rows |= {found.id: f"child<{found.kind}>" for found in context.objects}
    elif isinstance(_find(context, path).value, ThrottleGroup):
        rows |= properties()
    return [{"name": name, "type": kind} for name, kind in rows.items()]


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
