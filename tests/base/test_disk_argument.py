"""The syntax of disk arguments."""

from __future__ import annotations

import pytest

from nbdfleece.base.disk_argument import split_disk_argument
from nbdfleece.base.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("/srv/a.raw", (None, "/srv/a.raw", {})),
        ("vda=/srv/a=b.raw,locking=off", ("vda", "/srv/a=b.raw", {"locking": "off"})),
        ("./a=b", (None, "./a=b", {})),
        ("x=/a,,b,cache=none", ("x", "/a,b", {"cache": "none"})),
        ("x=", ("x", "", {})),
        ("v=nbd://h/e?a=1,open-timeout=3s", ("v", "nbd://h/e?a=1", {"open-timeout": "3s"})),
    ],
)
def test_the_parts_of_an_argument(text: str, parts: tuple[object, ...]) -> None:
    assert split_disk_argument(text) == parts


@pytest.mark.parametrize("text", ["a,b", "a,format=raw,format=raw"])
def test_what_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="disk 'a,"):
        split_disk_argument(text)
