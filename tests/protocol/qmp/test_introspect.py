from __future__ import annotations

from nbdfleece.protocol.qmp.introspect import Introspection
from nbdfleece.protocol.qmp.schema import (
    SIZE,
    Alternate,
    Array,
    Boolean,
    Enum,
    Later,
    Null,
    String,
    Struct,
    Union,
)


def described(*commands, **events):
    """Entries by name; names are unique."""
    made = Introspection()
    for command in commands:
        made.add_command(*command)
    for name, data in events.items():
        made.add_event(name, data)
    by_name = {entry["name"]: entry for entry in made.entries}
    assert len(by_name) == len(made.entries)
    return by_name


def test_a_command_its_arguments_and_features() -> None:
    found = described(("c", Struct({"n": SIZE}, {"on": Boolean()}), Struct(), ("unstable",)))
    command = found["c"]
    assert command["features"] == ["unstable"]
    assert found[command["arg-type"]]["members"] == [
        {"name": "n", "type": "int"},
        {"name": "on", "type": "bool", "default": None},
    ]
    assert found[command["ret-type"]] == {
        "name": command["ret-type"],
        "meta-type": "object",
        "members": [],
    }
    assert found["int"] == {"name": "int", "meta-type": "builtin", "json-type": "int"}


def test_what_is_not_declared_is_any_value() -> None:
    found = described(("c", Struct(), None))
    assert found["c"]["ret-type"] == "any"
    assert found["any"]["json-type"] == "value"


def test_lists_and_enums_are_described_once() -> None:
    mode = Enum(("a", "b"))
    found = described(
        ("c", Struct({"m": mode}), Array(mode)), E=Struct({"m": mode, "l": Array(mode)})
    )
    (enum,) = [entry for entry in found.values() if entry["meta-type"] == "enum"]
    assert enum["values"] == ["a", "b"]
    assert enum["members"] == [{"name": "a"}, {"name": "b"}]
    assert found[f"[{enum['name']}]"]["element-type"] == enum["name"]
    assert found["c"]["ret-type"] == f"[{enum['name']}]"
    assert found["E"]["meta-type"] == "event"


def _options() -> Union:
    ref = Alternate("BlockdevRef", (String(), Later(_options), Null()))
    return Union("driver", Struct(), {"null-co": Struct(), "raw": Struct({"file": ref})})


def test_types_that_contain_themselves() -> None:
    found = described(("c", Later(_options), None))
    options = found[found["c"]["arg-type"]]
    assert options["tag"] == "driver"
    tag = options["members"][0]
    assert found[tag["type"]]["values"] == ["null-co", "raw"]
    raw = found[options["variants"][1]["type"]]
    ref = found[raw["members"][0]["type"]]
    assert ref["meta-type"] == "alternate"
    assert [choice["type"] for choice in ref["members"]] == ["str", options["name"], "null"]


def test_every_type_that_is_named_is_there() -> None:
    found = described(("c", _options(), Array(Array(Struct({"x": SIZE})))))
    used = {
        member["type"]
        for entry in found.values()
        for member in [*entry.get("members", []), *entry.get("variants", [])]
        if "type" in member
    }
    used |= {entry["element-type"] for entry in found.values() if "element-type" in entry}
    assert used <= set(found)
