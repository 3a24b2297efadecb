"""docs/backup.md: what it tells people to type is typed, in order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon_process import environment

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "backup.md"


@pytest.mark.deadline(180)
@pytest.mark.slow
@pytest.mark.interop("qemu-io", "qemu-img", "zstd")
def test_the_tutorial_does_what_it_says(short_tmp: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
    folder = short_tmp / "bin"
    folder.mkdir()
    command = folder / "nbdfleece"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdfleece "$@"\n')
    command.chmod(0o755)
    here = short_tmp / "here"
    here.mkdir()
    script = "\n".join(
        ["set -euo pipefail", "trap 'kill %1; wait' EXIT", f'PATH="{folder}:$PATH"', *blocks]
    )

    done = subprocess.run(
        ["bash", "-c", script],
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (here / "first.raw").read_bytes()[1 << 20] == 1  # before the second write
    assert (here / "restored.raw").read_bytes()[1 << 20] == 2
