"""The syntax of disk arguments."""

from __future__ import annotations

import pytest

from nbdfleece.base.disk_argument import split_disk_argument, without_secrets
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


_TOKEN = "AbCd-_0123456789AbCd-_0123456789"
_HIDDEN = "token-9cf127c0"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"nbd://h/vda@s:{_TOKEN}", f"nbd://h/vda@s:{_HIDDEN}"),
        (f"nbd://h/vda%40s%3A{_TOKEN}", f"nbd://h/vda@s:{_HIDDEN}"),
        (f"nbd://h/vda@s:%41{_TOKEN[1:]}", f"nbd://h/vda@s:{_HIDDEN}"),
        (f"x=nbd+unix:///a@s:{_TOKEN}?socket=/s,y", f"x=nbd+unix:///a@s:{_HIDDEN}?socket=/s,y"),
        ("nbds://me:secret@h:1/x?tls-hostname=n", "nbds://***@h:1/x?tls-hostname=n"),
        ("nbd://h/x:1%20y", "nbd://h/x:1%20y"),
        ("nbd://h", "nbd://h"),
        ("nbd://me:secret@h", "nbd://***@h"),
        (f"/srv/a@s:{_TOKEN}", f"/srv/a@s:{_TOKEN}"),
    ],
)
def test_tokens_and_passwords_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
