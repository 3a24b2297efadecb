"""qcow2 images for tests."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from nbdfleece.formats.qcow2.create import NewImage, image_length, image_pieces


def make_qcow2(path: Path, image: NewImage, *, size: int | None = None) -> Path:
    """Make an image, unless it is there."""
    if path.exists():
        return path
    image = image if size is None else replace(image, size=size)
    with path.open("wb") as file:
        file.truncate(image_length(image))
        for offset, data in image_pieces(image):
            file.seek(offset)
            file.write(data)
    return path


def check_qcow2(path: Path, *, leaks: bool = False) -> None:
    """Let qemu-img look for damage, and for leaks unless they are allowed."""
    found = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False
    )
    allowed = (0, 3) if leaks else (0,)
    assert found.returncode in allowed, found.stdout + found.stderr
