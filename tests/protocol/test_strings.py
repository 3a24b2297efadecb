from __future__ import annotations

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import strings
from nbdfleece.protocol.nbd.constants import NBD_REP_ERR_INVALID


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4095, 4096])
def test_strings_up_to_4096_bytes_are_taken(size: int) -> None:
    assert strings.decode(b"x" * size, "name") == "x" * size


@pytest.mark.parametrize("data", [b"x" * 4097, b"a\0b", b"\0", b"\xff\xfe", "ä".encode("latin-1")])
def test_what_is_no_string_of_the_spec_is_refused(data: bytes) -> None:
    with pytest.raises(OptionRefused) as caught:
        strings.decode(data, "name")

    assert caught.value.reply == NBD_REP_ERR_INVALID
    assert caught.value.text.startswith("name ")


def test_encode_cuts_at_a_character() -> None:
    assert strings.encode("x" * 5000) == b"x" * 4096
    assert strings.encode("x" + "ä" * 2048) == b"x" + "ä".encode() * 2047


def test_shown_names_are_quoted_short_and_harmless() -> None:
    assert strings.shown("disk") == '"disk"'
    assert strings.shown("a\r\n\x1b[31m") == '"a\\x0d\\x0a\\x1b[31m"'
    assert len(strings.shown("x" * 4096)) < 100
