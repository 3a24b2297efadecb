"""A Python that has pre-shared keys in its ssl module, for tests that run one as a process."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_PROBE = "import ssl, sys; sys.exit(not (sys.version_info >= (3, 13) and ssl.HAS_PSK))"


@functools.cache
def _find() -> str | None:
    managed = sorted(Path.home().glob(".pyenv/versions/3.1[3-9]*/bin/python3"))
    found = [sys.executable, shutil.which("python3.13"), shutil.which("python3.14"), *managed]
    for program in found:
        if program is None:
            continue
        try:
            code = subprocess.run(
                [program, "-c", _PROBE], capture_output=True, timeout=20, check=False
            ).returncode
        except OSError:
            continue
        if code == 0:
            return str(program)
    return None


def python313() -> str:
    """The program; the test is skipped where there is none."""
    program = _find()
    if program is None:
        pytest.skip("no Python 3.13 with pre-shared keys is found")
    return program
