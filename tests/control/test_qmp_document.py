from __future__ import annotations

from nbdfleece.control.commands import COMMANDS
from tests.support.qmp_document import PATH, document


def test_the_document_is_fresh() -> None:
    assert PATH.read_text() == document(), "run: python -m tests.support.qmp_document"


def test_every_command_is_in_it() -> None:
    text = document()
    assert all(f"\n### {name}\n" in text for name in COMMANDS)
