"""docs/guides/virtual-machines.md is true: its commands run, and its XML is what it seems.

What needs a guest is run in one, by test_kernel_client.py and test_qemu_guest.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.support.console_blocks import console_blocks
from tests.support.daemon_process import ROOT, environment

GUIDE = ROOT / "docs" / "guides" / "virtual-machines.md"


@pytest.mark.slow
@pytest.mark.deadline(180)
@pytest.mark.interop("qemu-system-x86_64", "qemu-img", "nbdcopy")
def test_its_commands_run_one_after_another(short_tmp: Path) -> None:
    """The machine there has an empty disk: it ends in the boot menu, which is enough here."""
    blocks = [block for block in console_blocks(GUIDE) if not block.mark]
    commands = [command for block in blocks for command in block.commands]
    # Whatever was started in the background ends with the shell; the machine has its own process.
    script = "\n".join(["set -eu", "trap 'kill $(jobs -p)' EXIT", *commands])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=short_tmp,
            env=environment(PATH=path),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((short_tmp / "vm.pid").read_text()), signal.SIGKILL)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    for block in blocks:
        assert set(block.expected) <= set(printed), done.stdout + done.stderr


def test_what_it_does_not_run_itself_another_test_runs() -> None:
    for mark in {block.mark for block in console_blocks(GUIDE)} - {""}:
        found = re.match(r"run by: (\S+\.py)", mark)
        assert found is not None, mark
        assert "virtual-machines.md" in (ROOT / found[1]).read_text()


def test_its_xml_is_disks_that_reconnect() -> None:
    texts = re.findall(r"```xml\n(.*?)```", GUIDE.read_text(), re.S)
    disks = [ElementTree.fromstring(text) for text in texts]
    assert [disk.tag for disk in disks] == ["disk", "disk"]
    for disk in disks:
        assert disk.attrib["type"] == "network"
        source = disk.find("source")
        assert source is not None
        assert source.attrib["protocol"] == "nbd"
        assert source.find("reconnect") is not None
