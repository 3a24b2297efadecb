"""The ledgers of the NBD document: each clause, and each row of practice, has its test or a reason.

A test holds us to an entry when the entry names it, or when it is marked with the entry's id:
``@pytest.mark.spec("no-zeroes")``.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEDGERS = {"clauses.toml": "clause", "practice.toml": "row"}

Entry = dict[str, object]


def entries(ledger: str) -> list[Entry]:
    table = tomllib.loads((ROOT / "tests/conformance/nbd" / ledger).read_text())
    assert set(table) == {LEDGERS[ledger]}
    return table[LEDGERS[ledger]]


def walk(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the tests below `node`, with their pytest ids."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from walk(child, f"{prefix}::{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}::{child.name}", child


@cache
def known_tests() -> dict[str, frozenset[str]]:
    """Return the ids of all tests, each with the spec marks on it."""
    found: dict[str, frozenset[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for name, function in walk(tree, path.relative_to(ROOT).as_posix()):
            if function.name.startswith("test_"):
                found[name] = frozenset(marks_of(function))
    return found


def marks_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if (
            isinstance(decorator, ast.Call)
            and ast.unparse(decorator.func) == "pytest.mark.spec"
            and isinstance(decorator.args[0], ast.Constant)
        ):
            yield str(decorator.args[0].value)


def faults_of(entry: Entry, known: dict[str, frozenset[str]]) -> Iterator[str]:
    """Yield what is wrong with one entry."""
    unknown = set(entry) - {"heading", "id", "words", "tests", "reason"}
    if unknown:
        yield f"unknown keys {sorted(unknown)}"
    for key in ("heading", "id", "words"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            yield f"no {key}"
    named = entry.get("tests", [])
    assert isinstance(named, list)
    marked = any(entry.get("id") in marks for marks in known.values())
    if bool(named or marked) == bool(entry.get("reason")):
        yield "needs a test, or a reason why there is none, and not both"
    for name in named:
        if name not in known:
            yield f"there is no {name}"


@pytest.mark.parametrize("ledger", LEDGERS)
def test_every_entry_has_its_test_or_a_reason(ledger: str) -> None:
    faults = [
        f"{entry.get('id')}: {fault}"
        for entry in entries(ledger)
        for fault in faults_of(entry, known_tests())
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_ids_are_unique_and_marks_name_one() -> None:
    ids = [str(entry["id"]) for ledger in LEDGERS for entry in entries(ledger)]
    twice = {one for one in ids if ids.count(one) > 1}
    astray = {mark for marks in known_tests().values() for mark in marks} - set(ids)

    assert not twice
    assert not astray, "marks that name no entry"


GOOD: Entry = {"heading": "h", "id": "one", "words": "w", "tests": ["tests/a.py::test_b"]}
KNOWN = {"tests/a.py::test_b": frozenset[str](), "tests/a.py::test_c": frozenset({"marked"})}


@pytest.mark.parametrize(
    "change",
    [
        {"tests": []},
        {"tests": ["tests/a.py::test_gone"]},
        {"reason": "and a test"},
        {"words": ""},
        {"heading": None},
        {"note": "x"},
    ],
    ids=str,
)
def test_a_bad_entry_is_found(change: Entry) -> None:
    assert list(faults_of(GOOD | change, KNOWN))


@pytest.mark.parametrize(
    "change", [{}, {"tests": [], "reason": "why"}, {"tests": [], "id": "marked"}], ids=str
)
def test_a_good_entry_is_left_alone(change: Entry) -> None:
    assert not list(faults_of(GOOD | change, KNOWN))
