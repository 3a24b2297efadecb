"""docs/guides/virtual-machines.md is true: its commands run, and its XML is what it seems.

What needs a guest is run in one, by test_kernel_client.py and test_qemu_guest.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.support.daemon_process import ROOT
from tests.support.documents import Shell, run_document

GUIDE = ROOT / "docs" / "guides" / "virtual-machines.md"


@pytest.mark.slow
@pytest.mark.deadline(180)
@pytest.mark.interop("qemu-system-x86_64", "qemu-img", "nbdcopy")
def test_its_commands_run_one_after_another(short_tmp: Path) -> None:
    """The machine there has an empty disk: it ends in the boot menu, which is enough here."""
    with Shell(short_tmp) as shell:
        try:
            run_document(GUIDE, shell)
        finally:  # whatever the shell started ends with it; the machine has its own process
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((shell.folder / "vm.pid").read_text()), signal.SIGKILL)


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
