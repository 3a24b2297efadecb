"""Binary units, alignment arithmetic, and sizes and durations as people write them."""

from __future__ import annotations

import re
from typing import Final

from nbdfleece.base.errors import ConfigError

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

_SIZE: Final = re.compile(r"([0-9]+)(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_SIZE_UNITS: Final = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
_DURATION_UNITS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def align_down(value: int, unit: int) -> int:
    """Return the largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def ceil_div(value: int, unit: int) -> int:
    """Return how many units cover `value`."""
    return -(-value // unit)


def is_power_of_2(value: int) -> bool:
    """Tell whether `value` is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str) -> int:
    """Return bytes for `10`, `64K`, `1M`, `2GiB` (binary units).

    Raises:
        ConfigError: `text` is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is not a size (use a number with K, M, G or T)")
    return int(match[1]) * _SIZE_UNITS[(match[2] or "").upper()]


def parse_duration(text: str) -> float:
    """Return seconds for `30`, `30s`, `5m`, `2h`, `7d`.

    Raises:
        ConfigError: `text` is not a duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is not a duration (use a number with s, m, h or d)")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def format_size(size: int) -> str:
    """Return `size` bytes for people: `512 B`, `1.5 MiB`, `16 TiB`."""
    if size < KiB:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}".replace(".0 ", " ")
    return f"{value / 1024:.1f} TiB".replace(".0 ", " ")
