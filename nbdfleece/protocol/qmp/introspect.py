"""Declared types -> what `query-qmp-schema` answers, so that programs can ask what there is.

Names of types say nothing and may change, as in QEMU: a number, or `[number]` for a list. What is
built in has QEMU's names (`str`, `int`, ...). A type that is used twice is described once.

Follows: QEMU qapi/introspect.json.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from nbdfleece.protocol.qmp.schema import (
    Alternate,
    Anything,
    Array,
    Boolean,
    Enum,
    Integer,
    Later,
    Null,
    Number,
    String,
    Struct,
    Union,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbdfleece.protocol.qmp.schema import Type
    from nbdfleece.protocol.qmp.values import Json

_BUILT_IN: Final = (
    (String, "str", "string"),
    (Integer, "int", "int"),
    (Number, "number", "number"),
    (Boolean, "bool", "boolean"),
    (Null, "null", "null"),
    (Anything, "any", "value"),
)


class Introspection:
    """Collects commands and events, and describes them with all types that they use.

    Attributes:
        entries: What `query-qmp-schema` returns.
    """

    def __init__(self) -> None:
        self.entries: list[Json] = []
        self._names: dict[str, str] = {}  # content of a type -> its name
        self._reserved: dict[Callable[[], Type], str] = {}  # of types that contain themselves
        self._count = 0

    def add_command(
        self, name: str, arguments: Type, returns: Type | None, features: Sequence[str] = ()
    ) -> None:
        """Describe a command; `returns` is None when that is not declared."""
        entry: dict[str, Json] = {
            "name": name,
            "meta-type": "command",
            "arg-type": self._type(arguments),
            "ret-type": self._type(Anything() if returns is None else returns),
        }
        if features:
            entry["features"] = list(features)
        self.entries.append(entry)

    def add_event(self, name: str, data: Type) -> None:
        """Describe an event."""
        self.entries.append({"name": name, "meta-type": "event", "arg-type": self._type(data)})

    def _type(self, kind: Type) -> str:
        """Return the name of `kind`, and describe it if that has not been done."""
        if isinstance(kind, Later):
            return self._later(kind)
        for built_in, name, json_type in _BUILT_IN:
            if isinstance(kind, built_in):
                return self._name({"meta-type": "builtin", "json-type": json_type}, name)
        if isinstance(kind, Array):
            item = self._type(kind.item)
            return self._name({"meta-type": "array", "element-type": item}, f"[{item}]")
        return self._name(self._content(kind), None)

    def _content(self, kind: Type) -> dict[str, Json]:
        if isinstance(kind, Enum):
            members = [{"name": word} for word in kind.words]
            return {"meta-type": "enum", "members": members, "values": list(kind.words)}
        if isinstance(kind, Struct):
            return {"meta-type": "object", "members": self._members(kind)}
        if isinstance(kind, Alternate):
            choices = [{"type": self._type(choice)} for choice in kind.choices]
            return {"meta-type": "alternate", "members": choices}
        assert isinstance(kind, Union), kind
        tag: Json = {"name": kind.tag, "type": self._type(Enum(tuple(kind.variants)))}
        return {
            "meta-type": "object",
            "members": [tag, *self._members(kind.base)],
            "tag": kind.tag,
            "variants": [
                {"case": word, "type": self._type(variant)}
                for word, variant in kind.variants.items()
            ],
        }

    def _members(self, struct: Struct) -> list[Json]:
        members: list[Json] = [
            {"name": name, "type": self._type(kind)} for name, kind in struct.required.items()
        ]
        # That the default is null says: without it something happens that has no name here.
        members += [
            {"name": name, "type": self._type(kind), "default": None}
            for name, kind in struct.optional.items()
        ]
        return members

    def _later(self, kind: Later) -> str:
        name = self._reserved.get(kind.make)
        if name is None:
            name = self._reserved[kind.make] = self._next()
            made = kind.make()
            assert isinstance(made, Struct | Union | Alternate), made
            self.entries.append({"name": name, **self._content(made)})
        return name

    def _name(self, content: Mapping[str, Json], name: str | None) -> str:
        key = json.dumps(content)
        if key not in self._names:
            self._names[key] = name or self._next()
            self.entries.append({"name": self._names[key], **content})
        return self._names[key]

    def _next(self) -> str:
        self._count += 1
        return str(self._count - 1)
