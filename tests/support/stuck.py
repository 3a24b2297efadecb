"""A Python in which one kind of system call never returns, for one file: a disk that is stuck."""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "stuck.raw"

_SCRIPT = f"""\
#!{sys.executable}
import os, sys, time
import nbdfleece.base.limits
from nbdfleece.cli.main import main

nbdfleece.base.limits.DRAIN_TIMEOUT_S = 0.5  # of the storage daemon, which has no option
real = os.CALL

def stuck(what, *rest, **more):
    path = os.readlink(f"/proc/self/fd/{{what}}") if isinstance(what, int) else os.fspath(what)
    if path.endswith("{NAME}"):
        os.write(2, b"it is stuck\\n")
        time.sleep(1000)
    return real(what, *rest, **more)

os.CALL = stuck
sys.exit(main(sys.argv[3:]))  # behind `-m nbdfleece`
"""


def python_that_is_stuck(folder: Path, call: str) -> str:
    """Return a program that runs `-m nbdfleece`, and hangs in `os.CALL` of a file called NAME."""
    script = folder / f"python-{call}"
    script.write_text(_SCRIPT.replace("CALL", call))
    script.chmod(0o700)
    return str(script)
