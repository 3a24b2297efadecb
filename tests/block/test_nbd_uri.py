"""NBD URIs: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from nbdfleece.base.disk_argument import is_nbd_uri
from nbdfleece.base.errors import ConfigError
from nbdfleece.block.drivers.nbd.target import ClientTls, InetServer, Target, UnixServer
from nbdfleece.block.drivers.nbd.uri import parse_nbd_uri

GOOD = {
    "nbd://h": Target(InetServer("h", 10809), ""),
    "nbd://h/": Target(InetServer("h", 10809), ""),
    "NBD://H/X": Target(InetServer("h", 10809), "X"),
    "nbd://h:1/a/b": Target(InetServer("h", 1), "a/b"),
    "nbd://h//a": Target(InetServer("h", 10809), "/a"),
    "nbd:///x": Target(InetServer("localhost", 10809), "x"),
    "nbd://[::1]:5/x": Target(InetServer("::1", 5), "x"),
    "nbd://h/a%20b%2Fc%25+d": Target(InetServer("h", 10809), "a b/c%+d"),
    "nbd://h/vda@s1:tok": Target(InetServer("h", 10809), "vda@s1:tok"),
    "nbd+unix:///x?socket=/run/s%2Cs": Target(UnixServer("/run/s,s"), "x"),
    "nbd+unix://?socket=s": Target(UnixServer("s"), ""),
    "nbds://h/x": Target(InetServer("h", 10809), "x", ClientTls(None, "h")),
    "nbds://h/x?tls-certificates=/p&tls-hostname=n": Target(
        InetServer("h", 10809), "x", ClientTls("/p", "n")
    ),
    "nbds://h/x?tls-type=x509&tls-verify-peer=1": Target(
        InetServer("h", 10809), "x", ClientTls(None, "h")
    ),
    "nbds+unix:///x?tls-hostname=n&socket=/s": Target(UnixServer("/s"), "x", ClientTls(None, "n")),
}


@pytest.mark.parametrize(("text", "target"), GOOD.items())
def test_what_uris_mean(text: str, target: Target) -> None:
    assert is_nbd_uri(text)
    assert parse_nbd_uri(text) == target


@pytest.mark.parametrize(
    "text",
    [
        *("nbd+vsock://1:2/x", "nbd+ssh://h/x", "nbd://h:0/x", "nbd://h:70000/x", "nbd://h:a/x"),
        *("nbd://u@h/x", "nbd://h/x#y", "nbd://h/x?socket=/s", "nbd://h/x?a=b", "nbd://h/x?a"),
        *("nbd+unix:///x", "nbd+unix://h/x?socket=/s", "nbd+unix:///x?socket="),
        *("nbd+unix:///x?socket=/a&socket=/b", "nbd+unix:///x?Socket=/a"),
        "nbd+unix:///x?socket=/" + "s" * 107,
        *("nbd://h/%zz", "nbd://h/%ff", "nbd://h/a%00b", "nbd://h/" + "x" * 4097),
        *("nbd://h/x?tls-certificates=/p", "nbd://h/x?tls-hostname=n"),
        *("nbds://h/x?tls-verify-peer=0", "nbds://h/x?tls-type=psk", "nbds://h/x?tls-psk-file=/p"),
        "nbds+unix:///x?socket=/s",
        "nbd://[::1/x",
    ],
)
def test_what_is_refused(text: str) -> None:
    assert is_nbd_uri(text)
    with pytest.raises(ConfigError):
        parse_nbd_uri(text)


_TOKEN = "AbCd-_0123456789AbCd-_0123456789"
_HIDDEN = "token-9cf127c0"


def test_errors_and_names_of_targets_show_no_token_and_no_password() -> None:
    target = parse_nbd_uri(f"nbd://h/vda@s:{_TOKEN}")
    assert target.export.endswith(_TOKEN)
    assert str(target) == f'NBD server h:10809, export "vda@s:{_HIDDEN}"'
    for text in (f"nbd://h/a@s:{_TOKEN}?x=y", "nbd://me:secret@h/x", f"nbd://h/%zz:{_TOKEN}"):
        with pytest.raises(ConfigError) as refused:
            parse_nbd_uri(text)
        assert _TOKEN not in str(refused.value)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["/nbd://x", "nbd", "./nbd:", "nbdx://h", "nbd/a", "http://h/x"])
def test_what_is_no_nbd_uri(text: str) -> None:
    assert not is_nbd_uri(text)
