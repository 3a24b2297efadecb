"""The ledger of the fleecing document: scenarios and known defects have tests, or a reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.conformance.test_ledger import Entry, known_tests

ROOT = Path(__file__).parents[2]
HOW_MANY = dict(F=8, C=8, D=2, J=13, B=26, N=12, G=5, R=15, T=3, A=2, W=1, S=1)  # noqa: C408
DEFECTS = 16

SCENARIOS = {
    f"T-{family}{number}" for family, last in HOW_MANY.items() for number in range(1, last + 1)
}
SPOKEN_OF = re.compile(r"\bT-[A-Z]\d+\b")


def entries() -> dict[str, Entry]:
    table = tomllib.loads((ROOT / "tests/conformance/scenarios.toml").read_text())
    assert set(table) == {"scenario"}
    found = {str(entry["id"]): entry for entry in table["scenario"]}
    assert len(found) == len(table["scenario"]), "an id stands there twice"
    return found


def test_every_scenario_and_defect_has_an_entry() -> None:
    assert entries().keys() == SCENARIOS | {f"defect-{n}" for n in range(1, DEFECTS + 1)}


def test_every_entry_has_tests_that_are_there_or_a_reason() -> None:
    known = known_tests()
    for name, entry in entries().items():
        assert entry.keys() <= {"id", "words", "tests", "reason"}, name
        assert entry["words"], name
        assert entry.get("tests") or entry.get("reason"), f"{name}: neither tests nor a reason"
        tests = entry.get("tests", [])
        assert isinstance(tests, list)
        assert len(set(tests)) == len(tests), name
        assert not set(tests) - known.keys(), name


def test_what_tests_speak_of_is_there() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != Path(__file__):
            astray = set(SPOKEN_OF.findall(path.read_text())) - SCENARIOS
            assert not astray, f"{path.name} speaks of {astray}"
