"""docs/backup.md: what it tells people to type is typed, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon_process import ROOT
from tests.support.documents import Shell, run_document


@pytest.mark.deadline(180)
@pytest.mark.slow
@pytest.mark.interop("qemu-io", "qemu-img", "zstd")
def test_the_tutorial_does_what_it_says(short_tmp: Path) -> None:
    with Shell(short_tmp) as shell:
        run_document(ROOT / "docs" / "backup.md", shell)
        assert (shell.folder / "first.raw").read_bytes()[1 << 20] == 1  # before the second write
        assert (shell.folder / "restored.raw").read_bytes()[1 << 20] == 2
