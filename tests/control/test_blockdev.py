"""Declared node options against what the registry takes."""

from __future__ import annotations

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.registry import drivers
from nbdfleece.control.blockdev import OPTIONS


def test_every_driver_is_declared() -> None:
    assert sorted(OPTIONS.variants) == drivers()


def test_nested_options_are_checked_with_their_path() -> None:
    OPTIONS.check({"driver": "raw", "file": {"driver": "raw", "file": "x"}}, "options[0]")
    for wrong, text in (
        ({"driver": "raw", "file": 3}, "'options[0].file', expected: BlockdevRef"),
        ({"driver": "raw", "file": {"driver": "x"}}, "'options[0].file.driver' does not accept"),
        ({"driver": "raw", "file": {"driver": "file"}}, "'options[0].file.filename' is missing"),
        ({"driver": "raw", "file": "x", "size": -1}, "'options[0].size' expects a value from 0"),
        ({"driver": "raw", "file": "x", "filename": ""}, "'options[0].filename' is unexpected"),
    ):
        with pytest.raises(CommandError) as caught:
            OPTIONS.check(wrong, "options[0]")
        assert text in str(caught.value)
