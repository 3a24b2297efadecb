"""A qemu guest whose disks are our exports: through restarts of the daemon, and frozen snapshots.

qemu's NBD client gets `reconnect-delay`, so requests wait while there is no daemon. The guest must
see nothing but a pause: no error, and all that was synced before, during and after is there.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import guest_load, virtual_machine
from tests.support.daemon_process import ROOT, Daemon, environment
from tests.support.documents import blocks_run_by
from tests.support.live import MiB, run
from tests.support.virtual_machine import Initramfs, VirtualMachine

Program = Callable[[str], str]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deadline(180),
    pytest.mark.interop(
        "qemu-system-x86_64", "qemu-ga", "linux-image", "busybox", "e2fsck", "debugfs", "nbdcopy"
    ),
]

SIZE = 64 * MiB
DISKS = ("vda", "vdb")
AGENT = ROOT / "examples" / "guest_agent.py"


class Place:
    """A guest with two disks, each attached in another way; its daemon can be started again.

    Attributes:
        guest: The machine; its disks are mounted at /mnt/vda and /mnt/vdb.
        daemon: The daemon that runs now.
        agent: The socket of the guest agent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._disks = [folder / f"{name}.raw" for name in DISKS]
        for disk in self._disks:
            with disk.open("xb") as file:
                file.truncate(SIZE)
        self.agent = folder / "qga.sock"
        self.guest: VirtualMachine
        self.daemon: Daemon

    def start(self) -> None:
        """Start the daemon, as it was started before."""
        self.daemon = Daemon(self._folder, *self._disks)
        self.daemon.ready(len(self._disks))

    def stop(self, number: int) -> int:
        """Stop the daemon by a signal; return its exit code."""
        code = self.daemon.stop(number)
        self.daemon.__exit__()
        assert "Traceback" not in self.daemon.errors(), self.daemon.errors()
        return code

    def qemu_options(self) -> list[str]:
        """Return how the guest gets its disks and the channel of its agent."""
        unix = f"server.type=unix,server.path={self.daemon.socket}"
        return [
            *("-drive", f"file={self.daemon.uri('vda')},file.reconnect-delay=60"
              ",format=raw,if=none,id=a,discard=unmap"),
            *("-blockdev", f"driver=nbd,node-name=b,{unix},export=vdb,reconnect-delay=60"
              ",discard=unmap"),
            *("-device", "virtio-blk-pci,drive=a", "-device", "virtio-blk-pci,drive=b"),
            *("-chardev", f"socket,path={self.agent},server=on,wait=off,id=agent"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
        ]  # fmt: skip

    def snapshot(self, name: str, *options: str) -> None:
        """Take a snapshot of both disks at one instant."""
        taken = self.daemon.run("snapshot", "create", *DISKS, "--name", name, *options)
        assert taken.code == 0, taken.err

    def copy(self, program: Program, export: str, image: Path) -> Path:
        """Copy an export out."""
        run(program("nbdcopy"), self.daemon.uri(export), image)
        return image


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("guest")
    base = virtual_machine.base_initramfs(folder / "base", "qemu-ga", "mkfs.ext4")
    extra = Initramfs()
    guest_load.add_programs(extra)
    place = Place(folder)
    place.start()
    try:
        archives = [base, extra.write(folder / "extra")]
        with virtual_machine.started(folder, archives, *place.qemu_options()) as guest:
            place.guest = guest
            for disk in DISKS:
                guest.run(f"mkfs.ext4 -q -E lazy_itable_init=0 /dev/{disk} && mkdir -p /mnt/{disk}")
                guest.run(f"mount -o discard /dev/{disk} /mnt/{disk}")
            guest.run("qemu-ga -d -m virtio-serial -p /dev/agent")
            yield place
    finally:
        place.daemon.__exit__()


def test_a_guest_goes_on_through_a_crash_and_a_restart_of_the_daemon(
    place: Place, tmp_path: Path, program: Program
) -> None:
    guest = place.guest
    with guest_load.running(guest, "/mnt/vda") as load:
        load.wait(2)
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            assert place.stop(number) == code
            # Written while there is no daemon: it waits for the next one.
            name = f"c.{number:06}"
            late = f"yes {name} | dd of=/mnt/vdb/{name} bs=4k count=1 iflag=fullblock conv=fsync"
            guest.run(f"({late} 2>/dev/null && echo written {name} >&4) >/dev/null 2>&1 3>&- &")
            assert f"written {name}" not in guest.news
            place.start()
            guest.wait_news(lambda name=name: f"written {name}" in guest.news)
            load.wait(2)
        promised = load.synced()
        place.snapshot("after")
        load.wait(1)
    image = place.copy(program, "vda@after", tmp_path / "vda")
    assert guest_load.needs_replay(image)
    guest_load.check_snapshot(image, tmp_path / "files", promised)
    guest.run("sync")
    whole = place.copy(program, "vda", tmp_path / "last")
    guest_load.check_snapshot(whole, tmp_path / "last-files", load.synced(), all_whole=True)
    assert "error" not in guest.log().lower(), guest.log()


def hook(place: Place, word: str) -> str:
    """Return the command by which a hook asks the guest agent."""
    return shlex.join([sys.executable, str(AGENT), str(place.agent), word])


def test_a_snapshot_between_freeze_and_thaw_needs_no_journal_replay(
    place: Place, tmp_path: Path, program: Program
) -> None:
    with guest_load.running(place.guest, "/mnt/vdb") as load:
        load.wait(2)
        place.snapshot("running")
        promised = load.synced()
        # As long as a busy machine may need to write out what the guest has in its memory.
        hooks = ("--pre", hook(place, "freeze"), "--post", hook(place, "thaw"))
        place.snapshot("frozen", *hooks, "--hook-timeout", "60")
        status = run("sh", "-c", hook(place, "status"))
        assert status.stdout.strip() == "thawed"
        load.wait(2)
    for disk in DISKS:
        # Both have journals that were in use when the other snapshot was taken.
        assert guest_load.needs_replay(
            place.copy(program, f"{disk}@running", tmp_path / f"{disk}-running")
        )
        image = place.copy(program, f"{disk}@frozen", tmp_path / disk)
        assert not guest_load.needs_replay(image)
        run(program("e2fsck"), "-f", "-n", image)
    guest_load.check_snapshot(tmp_path / "vdb", tmp_path / "files", promised)
    assert "error" not in place.guest.log().lower(), place.guest.log()


def test_a_snapshot_of_two_disks_is_one_instant_of_both(
    place: Place, tmp_path: Path, program: Program
) -> None:
    """A file is synced on vda, then on vdb, then comes the next: neither may be ahead."""
    with guest_load.running_on_both(place.guest, "/mnt/vda", "/mnt/vdb") as load:
        names = [f"pair{number}" for number in range(3)]
        promised = []
        for name in names:
            load.wait(2)
            promised.append(load.synced())
            place.snapshot(name)
    for name, synced in zip(names, promised, strict=True):
        found = []
        for disk in DISKS:
            image = place.copy(program, f"{disk}@{name}", tmp_path / f"{disk}-{name}")
            files = guest_load.check_snapshot(image, tmp_path / f"{disk}-{name}-files", synced)
            found.append(
                {
                    int(file.removeprefix("p."))
                    for file, data in files.items()
                    if file.startswith("p.") and data == guest_load.content(file)
                }
            )
        first, second = found
        assert second <= first, "vdb has what vda has not yet"
        assert {number - 1 for number in first} - second <= {100000}, "vda is ahead of vdb"


def test_the_hooks_that_virtual_machines_md_shows(
    place: Place, tmp_path: Path, program: Program
) -> None:
    guide = ROOT / "docs" / "guides" / "virtual-machines.md"
    (commands,) = blocks_run_by("test_qemu_guest.py", guide)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = environment(NBDFLEECE_CONTROL=str(place.daemon.control), PATH=path)
    for command in commands:
        here = command.replace("qga.sock", str(place.agent))
        subprocess.run(["bash", "-c", here], cwd=ROOT, env=environ, check=True)
    assert not guest_load.needs_replay(place.copy(program, "vda@tuesday", tmp_path / "vda"))
    assert run("sh", "-c", hook(place, "status")).stdout.strip() == "thawed"
