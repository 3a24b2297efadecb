from __future__ import annotations

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.protocol.nbd.haggle import TlsMode
from nbdfleece.server.addresses import (
    VSOCK_ANY,
    FdAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    inherited,
    parse_listen,
    split_tls,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/nbd.sock", UnixAddress("/run/nbd.sock")),
        ("unix:a:b", UnixAddress("a:b")),
        ("unix:/run/\udcff.sock", UnixAddress("/run/\udcff.sock")),
        ("tcp:localhost:10809", TcpAddress("localhost", 10809)),
        ("tcp:127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
        ("tcp:[::1]:10809", TcpAddress("::1", 10809)),
        ("tcp::10809", TcpAddress("", 10809)),
        ("tcp:*:10809", TcpAddress("", 10809)),
        ("vsock:2:10809", VsockAddress(2, 10809)),
        ("vsock:any:10809", VsockAddress(VSOCK_ANY, 10809)),
        ("fd:3", FdAddress(3)),
    ],
)
def test_listen_address(text: str, address: object) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix",
        "unix:",
        "unix:" + "x" * 108,
        "unix:a\0b",
        "/run/nbd.sock",
        "tcp:localhost",
        "tcp:10809",
        "tcp:localhost:",
        "tcp:localhost:70000",
        "tcp:localhost:-1",
        "tcp:localhost:1x",
        "tcp:::1:10809",
        "vsock:2",
        "vsock:x:1",
        "vsock:4294967296:1",
        "fd:x",
        "fd:2147483648",
        "fd:" + "9" * 5000,
        "fd:",
        "udp:localhost:1",
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_listen(text)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["unix:/run/nbd.sock", "tcp:[::1]:10809", "tcp:h:1", "vsock:any:5", "fd:3"]
)
def test_address_is_described_as_it_was_written(text: str) -> None:
    assert parse_listen(text).describe() == text


@pytest.mark.parametrize(
    ("text", "export", "uri"),
    [
        ("unix:/run/n b.sock", "vda@s1", "nbd+unix:///vda@s1?socket=/run/n%20b.sock"),
        ("unix:/run/\udcff", "vda", "nbd+unix:///vda?socket=/run/%FF"),
        ("tcp:example.org:10809", "a/b ä", "nbd://example.org:10809/a%2Fb%20%C3%A4"),
        ("tcp:[::1]:1", "", "nbd://[::1]:1/"),
        ("tcp::10809", "vda", "nbd://localhost:10809/vda"),
        ("tcp:0.0.0.0:10809", "vda", "nbd://localhost:10809/vda"),
        ("vsock:2:10809", "vda", "nbd+vsock://2:10809/vda"),
        ("vsock:any:10809", "vda", "nbd+vsock://2:10809/vda"),
    ],
)
def test_uri_of_an_export(text: str, export: str, uri: str) -> None:
    address = parse_listen(text)

    assert not isinstance(address, FdAddress)
    assert address.uri(export) == uri


def test_inherited_sockets_begin_at_three() -> None:
    environ = {"LISTEN_PID": "42", "LISTEN_FDS": "2"}

    assert inherited(environ, 42) == [FdAddress(3), FdAddress(4)]


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": "41", "LISTEN_FDS": "2"}])
def test_sockets_for_others_are_not_ours(environ: dict[str, str]) -> None:
    assert inherited(environ, 42) == []


def test_inherited_sockets_must_be_counted() -> None:
    with pytest.raises(ConfigError):
        inherited({"LISTEN_PID": "42", "LISTEN_FDS": "many"}, 42)


@pytest.mark.parametrize(
    ("text", "place", "mode"),
    [
        ("unix:/run/s", "unix:/run/s", None),
        ("unix:/run/s,tls=allow", "unix:/run/s", TlsMode.ALLOW),
        ("tcp::1,tls=require", "tcp::1", TlsMode.REQUIRE),
        ("fd:3,tls=off", "fd:3", TlsMode.OFF),
        ("unix:/a,,b", "unix:/a,b", None),
        ("unix:/a,,,tls=off", "unix:/a,", TlsMode.OFF),
        ("unix:/a,,tls=off", "unix:/a,tls=off", None),
    ],
)
def test_tls_stands_behind_the_address(text: str, place: str, mode: TlsMode | None) -> None:
    assert split_tls(text) == (place, mode)


@pytest.mark.parametrize(
    "text",
    [
        *("unix:/a,b", "unix:/a,tls", "unix:/a,tls=", "unix:/a,tls=on", "unix:/a,", "unix:/a\0b"),
        *("unix:/a,tls=off,tls=off", "unix:/a,tls=off,colour=red"),
    ],
)
def test_what_else_stands_behind_an_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        split_tls(text)


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        (UnixAddress("/run/s"), "nbds+unix:///vda?socket=/run/s"),
        (TcpAddress("::1", 10809), "nbds://[::1]:10809/vda"),
        (VsockAddress(2, 5), "nbds+vsock://2:5/vda"),
    ],
)
def test_uri_with_tls(address: UnixAddress | TcpAddress | VsockAddress, uri: str) -> None:
    assert address.uri("vda", tls=True) == uri
    assert address.uri("vda") == uri.replace("nbds", "nbd")
