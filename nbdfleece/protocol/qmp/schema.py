"""What arguments a command takes: declared types, and JSON checked against them.

A command declares its arguments as a `Struct`. Checked arguments come as `Arguments`, whose getters
give typed values, so that no command looks at raw JSON. Messages name the wrong member by its whole
path (`options[0].file.driver`) and use QEMU's words.

Follows: QEMU qapi/qobject-input-visitor.c and include/qapi/qmp/qerror.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from nbdfleece.base.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.protocol.qmp.values import Json

INT64: Final = (-(1 << 63), (1 << 63) - 1)


class Type(Protocol):
    """What a value must be."""

    def check(self, value: Json, path: str) -> None:
        """Check `value`, which stands at `path`.

        Raises:
            CommandError: It is of another type, or out of range.
        """


@dataclass(frozen=True, slots=True)
class String:
    """A string."""

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if not isinstance(value, str):
            raise _wrong_type(path, "string")


@dataclass(frozen=True, slots=True)
class Enum:
    """One of some words."""

    words: tuple[str, ...]

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if value not in self.words:
            raise CommandError(f"Parameter '{path}' does not accept value '{value}'")


@dataclass(frozen=True, slots=True)
class Null:
    """The value null."""

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if value is not None:
            raise _wrong_type(path, "null")


@dataclass(frozen=True, slots=True)
class Anything:
    """Any value; the command looks at it itself."""

    def check(self, value: Json, path: str) -> None:
        """See Type.check: nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false."""

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if not isinstance(value, bool):
            raise _wrong_type(path, "boolean")


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number from `low` to `high`; `c_name` is QEMU's name of the range, if it has one."""

    low: int = INT64[0]
    high: int = INT64[1]
    c_name: str | None = None

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._no_integer(path)
        if not self.low <= value <= self.high:
            if (self.low, self.high) == INT64 or not INT64[0] <= value < 1 << 64:
                raise self._no_integer(path)
            if self.c_name is not None:
                raise CommandError(f"Parameter '{path}' expects {self.c_name}")
            raise CommandError(f"Parameter '{path}' expects a value from {self.low} to {self.high}")

    def _no_integer(self, path: str) -> CommandError:
        """Return QEMU's words for what is no integer, or none of 64 bits."""
        if self.c_name is not None:
            return CommandError(f"Parameter '{path}' expects uint64")
        return _wrong_type(path, "integer")


UINT32: Final = Integer(0, (1 << 32) - 1, "uint32_t")
SIZE: Final = Integer(0, (1 << 63) - 1, "uint64")


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `low` on, whole or not."""

    low: float | None = None

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(path, "number")
        if self.low is not None and value < self.low:
            raise CommandError(f"Parameter '{path}' expects a number not below {self.low:g}")


@dataclass(frozen=True, slots=True)
class Array:
    """A list of values of one type."""

    item: Type

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong_type(path, "array")
        for index, item in enumerate(value):
            self.item.check(item, f"{path}[{index}]")


@dataclass(frozen=True, slots=True)
class Struct:
    """An object with known members; those of `optional` may be missing."""

    required: Mapping[str, Type] = field(default_factory=dict)
    optional: Mapping[str, Type] = field(default_factory=dict)

    def check(self, value: Json, path: str) -> None:
        """See Type.check; `path` is empty for the arguments as a whole."""
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "object")
        before = f"{path}." if path else ""
        for name, kind in self.required.items():
            if name not in value:
                raise CommandError(f"Parameter '{before}{name}' is missing")
            kind.check(value[name], before + name)
        for name, kind in self.optional.items():
            if name in value:
                kind.check(value[name], before + name)
        for name in value:
            if name not in self.required and name not in self.optional:
                raise CommandError(f"Parameter '{before}{name}' is unexpected")


@dataclass(frozen=True, slots=True)
class Union:
    """An object whose member `tag` says which further members it has.

    Attributes:
        tag: The member; its value is a name in `variants`.
        base: Members that all have, without `tag`.
        variants: Further members.
    """

    tag: str
    base: Struct
    variants: Mapping[str, Struct]

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "object")
        place = f"{path}.{self.tag}" if path else self.tag
        if self.tag not in value:
            raise CommandError(f"Parameter '{place}' is missing")
        kind = Enum(tuple(self.variants))
        kind.check(value[self.tag], place)
        variant = self.variants[str(value[self.tag])]
        Struct(
            {self.tag: kind, **self.base.required, **variant.required},
            {**self.base.optional, **variant.optional},
        ).check(value, path)


@dataclass(frozen=True, slots=True)
class Alternate:
    """A value of one of several JSON types, told apart by it: a name or an object, for example.

    Attributes:
        name: QEMU's name of it, for messages: `BlockdevRef`.
        choices: At most one for each JSON type.
    """

    name: str
    choices: tuple[Type, ...]

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        for choice in self.choices:
            if _json_type(choice) == _json_type_of(value):
                choice.check(value, path)
                return
        raise _wrong_type(path, self.name)


@dataclass(frozen=True, slots=True)
class Later:
    """A type that is made when it is needed, so that types may contain themselves."""

    make: Callable[[], Type]

    def check(self, value: Json, path: str) -> None:
        """See Type.check."""
        self.make().check(value, path)


class Arguments:
    """Checked members of an object, by typed getters.

    A getter that meets another type than it was asked for is a fault of the command's own schema.

    Args:
        schema: What the members must be.
        values: The object.

    Raises:
        CommandError: `values` does not match `schema`.
    """

    def __init__(self, schema: Struct | Union, values: Mapping[str, Json]) -> None:
        schema.check(values, "")
        self._values = values

    @property
    def members(self) -> Mapping[str, Json]:
        """The whole object as it came, checked."""
        return self._values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def string(self, name: str) -> str:
        """Return the string `name`, which is not optional."""
        value = self._values[name]
        assert isinstance(value, str), name
        return value

    def optional_string(self, name: str) -> str | None:
        """Return the string `name`, or None without it."""
        return self.string(name) if name in self else None

    def integer(self, name: str) -> int:
        """Return the whole number `name`, which is not optional."""
        value = self._values[name]
        assert isinstance(value, int), name
        return value

    def optional_integer(self, name: str) -> int | None:
        """Return the whole number `name`, or None without it."""
        return self.integer(name) if name in self else None

    def optional_number(self, name: str) -> float | None:
        """Return the number `name`, or None without it."""
        value = self._values.get(name)
        assert value is None or isinstance(value, int | float), name
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """Return the truth value `name`, or `default` without it."""
        value = self._values.get(name, default)
        assert isinstance(value, bool), name
        return value

    def strings(self, name: str) -> list[str]:
        """Return the list of strings `name`; empty without it."""
        value = self._values.get(name, ())
        assert isinstance(value, Sequence), name
        return [item for item in value if isinstance(item, str)]


def _json_type(kind: Type) -> str:
    """Return the JSON type that a value of `kind` has."""
    if isinstance(kind, Later):
        return _json_type(kind.make())
    for name, kinds in _JSON_TYPES.items():
        if isinstance(kind, kinds):
            return name
    return "value"


_JSON_TYPES: Final = {
    "string": (String, Enum),
    "null": (Null,),
    "boolean": (Boolean,),
    "number": (Integer, Number),
    "array": (Array,),
    "object": (Struct, Union),
}


def _json_type_of(value: Json) -> str:
    if value is None:
        return "null"
    for name, kind in (("string", str), ("boolean", bool), ("number", int | float)):
        if isinstance(value, kind):
            return name
    return "object" if isinstance(value, Mapping) else "array"


def _wrong_type(path: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{path}', expected: {expected}")
