"""The one package that nbdfleece needs, and only where certificates are read or made.

A checkout serves, snapshots and backs up with the standard library alone; so that the package is
lacking, or is too old, comes out when it is used first. It is then told in one line.
"""

from __future__ import annotations

from typing import Final

from nbdfleece.base.errors import ConfigError

CRYPTOGRAPHY: Final = 42  # pyproject.toml says so too; older ones know no times in UTC


def check_cryptography() -> None:
    """Do nothing where `cryptography` is there, and new enough.

    Raises:
        ConfigError: It is not; the text says what to do.
    """
    try:
        import cryptography
    except ModuleNotFoundError as error:
        raise ConfigError(_told("this Python has none")) from error
    version = cryptography.__version__
    if int(version.partition(".")[0]) < CRYPTOGRAPHY:
        raise ConfigError(_told(f"this Python has {version}"))


def _told(why: str) -> str:
    return (
        f"certificates need the package cryptography, {CRYPTOGRAPHY} or newer; {why}"
        " (pip install . in an environment of its own brings it: docs/install.md)"
    )
