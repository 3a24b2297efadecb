"""Where to listen, as people write it: `unix:PATH`, `tcp:HOST:PORT`, `vsock:CID:PORT`, `fd:N`.

Behind that may stand `,tls=off`, `,tls=allow` or `,tls=require`; a comma in a path is doubled.

An IPv6 address stands in brackets (`tcp:[::1]:10809`); without a host (`tcp::10809`), or with `*`,
all addresses of the machine are meant. `vsock:any:PORT` is every context id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import quote

from nbdfleece.base.errors import ConfigError
from nbdfleece.protocol.nbd.haggle import TlsMode

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_UNIX_PATH: Final = 107  # bytes: struct sockaddr_un has room for 108 with the NUL
VSOCK_ANY: Final = 0xFFFFFFFF  # VMADDR_CID_ANY
VSOCK_HOST: Final = 2  # VMADDR_CID_HOST: the host, also to itself
VSOCK_LOCAL: Final = 1  # VMADDR_CID_LOCAL: this machine, as loopback

_FIRST_INHERITED_FD: Final = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START
_UNSPECIFIED_HOSTS: Final = ("", "0.0.0.0", "::")  # noqa: S104 - only shown
_MAX_PORT: Final = 0xFFFF
_MAX_U32: Final = 0xFFFFFFFF
_MAX_FD: Final = 0x7FFFFFFF
_TLS_MODES: Final = {"off": TlsMode.OFF, "allow": TlsMode.ALLOW, "require": TlsMode.REQUIRE}
_SHOWN_PLAIN: Final = "@"  # in export names of URIs: DISK@SNAPSHOT stays readable


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket at `path`."""

    path: str

    def describe(self) -> str:
        """Return the address as `parse_listen` takes it."""
        return f"unix:{self.path}"

    def uri(self, export: str, *, tls: bool = False) -> str:
        """Return the NBD URI of an export here."""
        name = quote(export, safe=_SHOWN_PLAIN)
        return f"{_scheme(tls)}+unix:///{name}?socket={quote(os.fsencode(self.path))}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port; `host` is a name or an address, "" for all; port 0 lets the system choose."""

    host: str
    port: int

    def describe(self) -> str:
        """Return the address as `parse_listen` takes it."""
        return f"tcp:{_bracketed(self.host)}:{self.port}"

    def uri(self, export: str, *, tls: bool = False) -> str:
        """Return the NBD URI of an export here, as seen from this machine."""
        host = "localhost" if self.host in _UNSPECIFIED_HOSTS else _bracketed(self.host)
        return f"{_scheme(tls)}://{host}:{self.port}/{quote(export, safe=_SHOWN_PLAIN)}"


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A port between a virtual machine and its host."""

    cid: int
    port: int

    def describe(self) -> str:
        """Return the address as `parse_listen` takes it."""
        return f"vsock:{'any' if self.cid == VSOCK_ANY else self.cid}:{self.port}"

    def uri(self, export: str, *, tls: bool = False) -> str:
        """Return the NBD URI of an export here (an extension of libnbd), as guests see it."""
        cid = VSOCK_HOST if self.cid == VSOCK_ANY else self.cid
        return f"{_scheme(tls)}+vsock://{cid}:{self.port}/{quote(export, safe=_SHOWN_PLAIN)}"


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A listening socket that somebody else opened for us."""

    fd: int

    def describe(self) -> str:
        """Return the address as `parse_listen` takes it."""
        return f"fd:{self.fd}"


Address: TypeAlias = UnixAddress | TcpAddress | VsockAddress | FdAddress


def _scheme(tls: bool) -> str:
    return "nbds" if tls else "nbd"


def split_tls(text: str) -> tuple[str, TlsMode | None]:
    """Return an address without what stands behind it, and the TLS mode if that is said.

    Raises:
        ConfigError: Something else stands there.
    """
    if "\0" in text:
        raise ConfigError(f"{text!r}: contains a NUL byte")
    place, *options = text.replace(",,", "\0").split(",")
    mode: TlsMode | None = None
    for option in options:
        key, _, value = option.partition("=")
        if key != "tls":
            raise ConfigError(f"'{text}': '{option}' is not tls=off, tls=allow or tls=require")
        if mode is not None:
            raise ConfigError(f"'{text}': tls is said twice")
        mode = _TLS_MODES.get(value)
        if mode is None:
            raise ConfigError(f"'{text}': tls is off, allow or require, not '{value}'")
    return place.replace("\0", ","), mode


def parse_listen(text: str) -> Address:
    """Return the address that `text` stands for.

    Raises:
        ConfigError: It stands for none.
    """
    kind, colon, rest = text.partition(":")
    if not colon or not rest:
        raise ConfigError(
            f"'{text}': listen on unix:PATH, tcp:HOST:PORT, vsock:CID:PORT or fd:NUMBER"
        )
    if kind == "unix":
        return _parse_unix(rest)
    if kind == "tcp":
        return _parse_tcp(text, rest)
    if kind == "vsock":
        cid, _, port = rest.partition(":")
        number = VSOCK_ANY if cid == "any" else _number(text, cid, _MAX_U32)
        return VsockAddress(number, _number(text, port, _MAX_U32))
    if kind == "fd":
        return FdAddress(_number(text, rest, _MAX_FD))
    raise ConfigError(f"'{text}': '{kind}' is none of unix, tcp, vsock and fd")


def inherited(environ: Mapping[str, str], pid: int) -> list[Address]:
    """Return the sockets that a service manager has handed to the process `pid`.

    Args:
        environ: With LISTEN_PID and LISTEN_FDS; sockets meant for another process are not ours.
        pid: Our own process id.

    Raises:
        ConfigError: The variables are no numbers.
    """
    if environ.get("LISTEN_PID", "") != str(pid):
        return []
    count = _number("LISTEN_FDS", environ.get("LISTEN_FDS", ""), _MAX_PORT)
    return [FdAddress(_FIRST_INHERITED_FD + index) for index in range(count)]


def _bracketed(host: str) -> str:
    """Return a host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _parse_unix(path: str) -> UnixAddress:
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ConfigError(f"'unix:{path}': the path is longer than {MAX_UNIX_PATH} bytes")
    if "\0" in path:
        raise ConfigError("unix: the path contains a NUL byte")
    return UnixAddress(path)


def _parse_tcp(text: str, rest: str) -> TcpAddress:
    host, colon, port = rest.rpartition(":")
    if not colon:
        raise ConfigError(f"'{text}': no port (tcp:HOST:PORT)")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"'{text}': an IPv6 address stands in brackets (tcp:[::1]:10809)")
    return TcpAddress("" if host == "*" else host, _number(text, port, _MAX_PORT))


def _number(text: str, digits: str, most: int) -> int:
    """Return the number in `digits`, between 0 and `most`."""
    is_number = digits.isascii() and digits.isdigit() and len(digits.lstrip("0")) <= len(str(most))
    if not is_number or int(digits) > most:
        raise ConfigError(f"'{text}': '{digits}' is not a number between 0 and {most}")
    return int(digits)
