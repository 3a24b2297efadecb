"""Loop devices: real block devices over files, where the machine lets us make them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def loop_device(image: Path, *, sector_size: int = 512) -> Iterator[Path]:
    """Attach a file to a loop device; skips the test where that cannot be done."""
    tool = shutil.which("losetup", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if os.geteuid() != 0 or tool is None:
        pytest.skip("loop devices need root and losetup (apt-get install util-linux)")
    made = subprocess.run(
        [tool, "--find", "--show", "--sector-size", str(sector_size), str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"this machine gives no loop device: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run([tool, "--detach", str(device)], check=True)
