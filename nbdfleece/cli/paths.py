"""Where things are when nobody says so: runtime folder, state folder, control socket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nbdfleece.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def runtime_folder(environ: Mapping[str, str], uid: int) -> Path:
    """Return the folder of the sockets.

    Raises:
        ConfigError: There is none for this user.
    """
    if uid == 0:
        return Path("/run/nbdfleece")
    folder = environ.get("XDG_RUNTIME_DIR", "")
    if not folder:
        raise ConfigError(
            "XDG_RUNTIME_DIR is not set, so there is no folder for sockets; say --control PATH "
            "(and serve --listen unix:PATH)"
        )
    return Path(folder) / "nbdfleece"


def state_folder(environ: Mapping[str, str], uid: int) -> Path:
    """Return the folder for what outlives the daemon."""
    if uid == 0:
        return Path("/var/lib/nbdfleece")
    return personal_folder(environ)


def personal_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder for what belongs to the person who types, also to root."""
    base = environ.get("XDG_STATE_HOME", "")
    home = environ.get("HOME", "") or "/"
    return (Path(base) if base else Path(home) / ".local" / "state") / "nbdfleece"


def control_socket(given: str | None) -> str:
    """Return the path of the control socket: `given`, else the environment's, else the usual one.

    Raises:
        ConfigError: There is no usual one for this user.
    """
    found = given or os.environ.get("NBDFLEECE_CONTROL", "")
    if found:
        return found
    return str(runtime_folder(os.environ, os.getuid()) / "control.sock")
