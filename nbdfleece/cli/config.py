"""The settings of `serve`: the command line over the configuration file over what is usual."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import (
    DRAIN_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    MAX_BYTES_IN_FLIGHT,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_ADDRESS,
    MAX_CONNECTIONS_PER_EXPORT,
    MAX_CONNECTIONS_PER_IDENTITY,
    MAX_REQUESTS_IN_FLIGHT,
    WRITE_STALL_S,
)
from nbdfleece.base.units import parse_duration, parse_size
from nbdfleece.cli.paths import control_socket, runtime_folder, state_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Value = str | int | float | bool | list[str]

_CONFIG_LIMIT: Final = 1 << 20  # bytes
_LONGEST_S: Final = 1e9  # what is longer is no time, and 0 says never
_LATER: Final = ("metrics",)


def _text(value: object) -> Value | None:
    return value if isinstance(value, str) and value else None


def _texts(value: object) -> Value | None:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return None
    texts = [item for item in value if isinstance(item, str)]
    return texts if len(texts) == len(value) else None


def _switch(value: object) -> Value | None:
    return value if isinstance(value, bool) else None


def _on_or_off(value: object) -> Value | None:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if value in ("on", "off") and isinstance(value, str) else None


def _size(value: object) -> Value | None:
    if isinstance(value, str):
        return parse_size(value)
    return _count(value)


def _count(value: object) -> Value | None:
    return value if type(value) is int and value >= 0 else None


def _seconds(value: object) -> Value | None:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _LONGEST_S else None  # nor nan, nor inf


_KEYS: Final[Mapping[str, tuple[str, Callable[[object], Value | None]]]] = {
    "disks": ("a list of disk arguments", _texts),
    "listen": ("an address, or a list of them", _texts),
    "control": ("a path", _text),
    "state-dir": ("a path", _text),
    "temp-dir": ("a path", _text),
    "pid-file": ("a path", _text),
    "print-uri": ("true or false", _switch),
    "allow-insecure": ("true or false", _switch),
    "tls-creds": ("a path", _text),
    "tls-verify-peer": ("on or off", _on_or_off),
    "policy": ("a path", _text),
    "extended-headers": ("on or off", _on_or_off),
    "max-connections": ("a whole number", _count),
    "max-connections-per-export": ("a whole number", _count),
    "max-connections-per-identity": ("a whole number", _count),
    "max-connections-per-address": ("a whole number", _count),
    "max-requests": ("a whole number", _count),
    "max-request-bytes": ("a size", _size),
    "handshake-timeout": ("seconds", _seconds),
    "idle-timeout": ("seconds", _seconds),
    "write-stall-timeout": ("seconds", _seconds),
    "drain-timeout": ("seconds", _seconds),
}


_LIMITS: Final[Mapping[str, float]] = {
    "max-connections": MAX_CONNECTIONS,
    "max-connections-per-export": MAX_CONNECTIONS_PER_EXPORT,
    "max-connections-per-identity": MAX_CONNECTIONS_PER_IDENTITY,
    "max-connections-per-address": MAX_CONNECTIONS_PER_ADDRESS,
    "max-requests": MAX_REQUESTS_IN_FLIGHT,
    "max-request-bytes": MAX_BYTES_IN_FLIGHT,
    "handshake-timeout": HANDSHAKE_TIMEOUT_S,
    "idle-timeout": IDLE_TIMEOUT_S,
    "write-stall-timeout": WRITE_STALL_S,
}


class ConfigFile:
    """A configuration file, checked key by key.

    Args:
        path: The file; None: as if it were empty.

    Raises:
        ConfigError: What is wrong, with file and line.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lines: list[str] = []
        self.values: dict[str, Value] = {}
        if path is not None:
            self._read(path)

    def place_of(self, text: str) -> str:
        """Return `FILE:LINE: ` of the first line with `text`, or "" where there is none."""
        for number, line in enumerate(self._lines, start=1):
            if text in line:
                return f"{self._path}:{number}: "
        return ""

    def _read(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                text = file.read(_CONFIG_LIMIT).decode()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text") from error
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found_line = re.search(r"line (\d+)", str(error))
            line = int(found_line[1]) if found_line else max(len(text.splitlines()), 1)
            raise ConfigError(f"{path}:{line}: {error}") from error
        except ValueError as error:  # a number of thousands of digits
            raise ConfigError(f"{path}: {error}") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: nested too deeply") from error
        self._lines = text.splitlines()
        for key, value in found.items():
            self.values[key] = self._check(key, value)

    def _check(self, key: str, value: object) -> Value:
        place = self._place_of_key(key)
        if key in _LATER:
            raise ConfigError(f"{place}'{key}' is not built yet")
        if key not in _KEYS:
            raise ConfigError(f"{place}unknown key '{key}' (known: {', '.join(_KEYS)})")
        expected, convert = _KEYS[key]
        try:
            converted = convert(value)
        except ConfigError as error:
            raise ConfigError(f"{place}{key}: {error}") from error
        if converted is None:
            raise ConfigError(f"{place}{key}: expected {expected}")
        return converted

    def _place_of_key(self, key: str) -> str:
        pattern = re.compile(rf"""\s*(?:\[+\s*)?["']?{re.escape(key)}["']?\s*[=.\]]""")
        for number, line in enumerate(self._lines, start=1):
            if pattern.match(line):
                return f"{self._path}:{number}: "
        return f"{self._path}: "


class ServeOptions:
    """What `serve` was asked for, from wherever it was said.

    Args:
        given: Options of the command line, by their names without dashes; None: not given.
        file: The configuration file.
    """

    def __init__(self, given: Mapping[str, Value | None], file: ConfigFile) -> None:
        self._found = {
            **file.values,
            **{key: value for key, value in given.items() if value is not None and value != []},
        }

    def text(self, key: str) -> str | None:
        """Return a text, or None."""
        value = self._found.get(key)
        return value if isinstance(value, str) else None

    def path(self, key: str) -> Path | None:
        """Return a path, or None."""
        text = self.text(key)
        return None if text is None else Path(text)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self._found.get(key)
        return tuple(value) if isinstance(value, list) else ()

    def number(self, key: str, usual: float) -> float:
        """Return a number, or what is usual."""
        value = self._found.get(key)
        return value if isinstance(value, int | float) else usual

    def is_on(self, key: str) -> bool:
        """Tell whether a switch is on."""
        return self._found.get(key) is True

    @property
    def limits(self) -> dict[str, float]:
        """All numbers that bound what clients may do, by the names of the options."""
        return {name: self.number(name, usual) for name, usual in _LIMITS.items()}

    @property
    def drain_timeout_s(self) -> float:
        """Seconds for requests to end at shutdown."""
        return self.number("drain-timeout", DRAIN_TIMEOUT_S)

    @property
    def control(self) -> str:
        """Path of the control socket."""
        return control_socket(self.text("control"))

    @property
    def default_listen(self) -> str:
        """Path of the usual NBD socket; empty where it is not needed, or there is none."""
        if self.texts("listen"):
            return ""
        try:
            return str(runtime_folder(os.environ, os.getuid()) / "nbd.sock")
        except ConfigError:
            if os.environ.get("LISTEN_FDS"):
                return ""
            raise

    @property
    def state_dir(self) -> Path:
        """The state folder."""
        found = self.path("state-dir") or state_folder(os.environ, os.getuid())
        return found.absolute()
