"""Arguments of a command as a command line spells them, made the JSON that the schema asks for.

Follows: QEMU qapi/qobject-input-visitor.c (its keyval flavour).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nbdfleece.base.keyval import Spelled
from nbdfleece.protocol.qmp.schema import Array, Boolean, Integer, Number, Struct, Union

if TYPE_CHECKING:
    from nbdfleece.protocol.qmp.schema import Type
    from nbdfleece.protocol.qmp.values import Json


def typed(kind: Type, value: Json, path: str = "") -> Json:
    """Return `value` with truth values and numbers in place of their spellings.

    What does not fit `kind` stays as it is: checking is up to the schema.

    Args:
        kind: What the value is to be.
        value: From base.keyval.
        path: Of the value, for errors.

    Raises:
        CommandError: A number or truth value is spelled wrongly.
    """
    if isinstance(value, Spelled):
        if isinstance(kind, Boolean):
            return value.boolean(path)
        return value.integer(path) if isinstance(kind, Integer | Number) else str(value)
    if isinstance(value, Mapping):
        members = _members(kind, value)
        before = f"{path}." if path else ""
        return {
            name: typed(members[name], member, before + name) if name in members else member
            for name, member in value.items()
        }
    if isinstance(value, Sequence) and isinstance(kind, Array):
        return [typed(kind.item, item, f"{path}[{index}]") for index, item in enumerate(value)]
    return value


def _members(kind: Type, value: Mapping[str, Json]) -> Mapping[str, Type]:
    """Return what the members of an object are to be, as far as that is known."""
    if isinstance(kind, Struct):
        return {**kind.required, **kind.optional}
    if isinstance(kind, Union):
        variant = kind.variants.get(str(value.get(kind.tag)), Struct())
        return {**_members(kind.base, value), **_members(variant, value)}
    return {}
