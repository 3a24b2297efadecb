"""An image of qemu-img with a bitmap: it says if it was not closed properly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path


def image_with_a_bitmap(folder: Path) -> tuple[Path, Callable[[], list[tuple[str, list[str]]]]]:
    """Return an image, and what tells the names and flags of its bitmaps."""
    image = folder / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b0"], check=True)

    def names() -> list[tuple[str, list[str]]]:
        command = ["qemu-img", "info", "--output=json", image]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        bitmaps = found["format-specific"]["data"]["bitmaps"]
        return [(each["name"], each["flags"]) for each in bitmaps]

    return image, names
