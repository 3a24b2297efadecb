from __future__ import annotations

import ast
from pathlib import Path

import nbdfleece
from nbdfleece.control.event_table import EVENTS

PACKAGE = Path(nbdfleece.__file__).parent
TABLE = PACKAGE / "control" / "event_table.py"


def strings() -> set[str]:
    """Every string of the package, but for those of the table itself."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path == TABLE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def emitted() -> set[str]:
    """Names that stand where an event is sent: emit("NAME", ...)."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "emit" and node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def test_every_event_that_is_sent_is_declared() -> None:
    assert emitted() <= set(EVENTS)
    assert "FLEECE_SNAPSHOT_CREATED" in emitted()


def test_every_event_that_is_declared_is_sent() -> None:
    assert set(EVENTS) - strings() == set()
