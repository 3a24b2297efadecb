"""The kernel's own NBD client, in a virtual machine: attached in every way that people use.

Each way gets a disk of its own. In each, a file system is made and written under load, and two
snapshots are taken meanwhile; the second while the first is there. Each is read twice from outside,
at once and after the guest has overwritten, removed and trimmed much of what it holds, and must be
the same both times, a sound file system, and whole in every file that was synced before its
instant. At the end all that was synced is on the disk, and the kernel has said nothing of errors.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import guest_load, virtual_machine
from tests.support.daemon_process import Daemon, nbdfleece
from tests.support.live import MiB, run
from tests.support.virtual_machine import Initramfs, VirtualMachine

Program = Callable[[str], str]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deadline(180),
    pytest.mark.interop(
        "qemu-system-x86_64", "linux-image", "busybox", "nbd-client", "e2fsck", "debugfs", "nbdcopy"
    ),
]

SIZE = 64 * MiB
CLIENT = "nbd-client 10.0.2.2"
CERTIFICATES = (
    "-certfile /tls/client-cert.pem -keyfile /tls/client-key.pem -cacertfile /tls/ca-cert.pem"
    " -tlshostname localhost"
)
QEMU_TLS = (
    "--object tls-creds-x509,id=tls,endpoint=client,dir=/tls --image-opts driver=raw"
    ",file.driver=nbd,file.host=10.0.2.2,file.port={tls},file.export={disk},file.tls-creds=tls"
    ",file.tls-hostname=localhost,file.reconnect-delay=30"
)


@dataclass(frozen=True)
class Way:
    """A way to attach a disk in the guest.

    Attributes:
        attach: The command; {plain} and {tls} are the ports, {disk} the export, {device} where to.
        detach: Its opposite.
        connections: How many connections the daemon must see.
        block_size: The logical block size that the guest must see.
    """

    attach: str
    detach: str = "nbd-client -d {device}"
    connections: int = 1
    block_size: int = 512


WAYS = {
    "plain": Way(f"{CLIENT} {{plain}} {{device}} -N {{disk}}"),
    "four": Way(f"{CLIENT} {{plain}} {{device}} -N {{disk}} -C 4", connections=4),
    "blocks": Way(
        f"{CLIENT} {{plain}} {{device}} -N {{disk}} -b 4096 -C 2 -timeout 30",
        connections=2,
        block_size=4096,
    ),
    "ioctl": Way(f"{CLIENT} {{plain}} {{device}} -N {{disk}} -nonetlink"),
    "tls": Way(f"{CLIENT} {{tls}} {{device}} -N {{disk}} {CERTIFICATES}"),
    "tls4": Way(f"{CLIENT} {{tls}} {{device}} -N {{disk}} {CERTIFICATES} -C 4", connections=4),
    "qemu": Way(
        "qemu-nbd --fork -f raw -c {device} nbd://10.0.2.2:{plain}/{disk}", "qemu-nbd -d {device}"
    ),
    "qemutls": Way(f"qemu-nbd --fork -c {{device}} {QEMU_TLS}", "qemu-nbd -d {device}"),
}


@dataclass(frozen=True)
class Place:
    """A daemon with a disk for each way, and the guest beside it."""

    daemon: Daemon
    guest: VirtualMachine
    folder: Path

    def words(self, text: str, disk: str) -> str:
        """Fill in ports, disk and device."""
        device = f"/dev/nbd{list(WAYS).index(disk)}"
        said = re.findall(
            r"listening on tcp:127\.0\.0\.1:(\d+)(,tls=require)?$", self.daemon.errors(), re.M
        )
        found = {"tls" if tls else "plain": port for port, tls in said}
        return text.format(**found, disk=disk, device=device)

    def run(self, text: str, disk: str, *, code: int | None = 0) -> str:
        """Run a command in the guest."""
        return self.guest.run(self.words(text, disk), code=code)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kernel")
    tls = folder / "tls"
    assert nbdfleece("pki", "init", tls, "--host", "localhost").code == 0
    assert nbdfleece("pki", "client", tls, "guest").code == 0
    disks = []
    for name in WAYS:
        disks.append(folder / f"{name}.raw")
        with disks[-1].open("xb") as file:
            file.truncate(SIZE)
    base = virtual_machine.base_initramfs(folder / "base", "nbd-client", "qemu-nbd", "mkfs.ext4")
    extra = Initramfs()
    guest_load.add_programs(extra)
    extra.add_tree(tls / "clients" / "guest", "/tls")
    listen = ["--listen", "tcp:127.0.0.1:0,tls=off", "--listen", "tcp:127.0.0.1:0,tls=require"]
    archives = [base, extra.write(folder / "extra")]
    network = ("-nic", "user,model=virtio-net-pci")
    with (
        Daemon(folder, *listen, "--tls-creds", tls, *disks) as daemon,
        virtual_machine.started(folder, archives, *network) as guest,
    ):
        daemon.ready(len(WAYS))
        yield Place(daemon, guest, folder)
        assert "Traceback" not in daemon.errors(), daemon.errors()


@pytest.mark.parametrize("disk", WAYS)
def test_snapshots_of_a_disk_that_the_kernel_writes(
    place: Place, disk: str, tmp_path: Path, program: Program
) -> None:
    way = WAYS[disk]
    place.run(way.attach, disk)
    check_device(place, disk, way)
    place.run("mkfs.ext4 -q -E lazy_itable_init=0 {device} && mkdir -p /mnt/{disk}", disk)
    place.run("mount -o discard {device} /mnt/{disk}", disk)
    with guest_load.running(place.guest, f"/mnt/{disk}") as load:
        images = []
        for name in ("one", "two"):
            load.wait(3)
            promised = load.synced()
            taken = place.daemon.run("snapshot", "create", disk, "--name", name)
            assert taken.code == 0, taken.err
            image = tmp_path / name
            copy(program, place.daemon, f"{disk}@{name}", image)
            images.append((name, image, promised))
            old = sorted(promised)[: len(promised) // 2]
            load.remove_old(f"/mnt/{disk}", set(old))
        load.wait(3)
        place.run("fstrim /mnt/{disk}", disk)
        load.wait(1)
        for name, image, promised in images:
            again = tmp_path / f"{name}-again"
            copy(program, place.daemon, f"{disk}@{name}", again)
            assert filecmp.cmp(image, again, shallow=False), f"{name} has changed"
            assert guest_load.needs_replay(image)  # as of a running guest
            guest_load.check_snapshot(image, tmp_path / f"{name}-files", promised)
            assert place.daemon.run("snapshot", "delete", f"{disk}@{name}").code == 0
    synced = load.synced()
    place.run("umount /mnt/{disk}", disk)
    place.run(way.detach, disk)
    last = tmp_path / "last"
    copy(program, place.daemon, disk, last)
    assert not guest_load.needs_replay(last)
    guest_load.check_snapshot(last, tmp_path / "last-files", synced, all_whole=True)
    assert "error" not in place.guest.log().lower(), place.guest.log()


def check_device(place: Place, disk: str, way: Way) -> None:
    """What the kernel has understood of the export, and how many connections it holds."""
    queue = f"/sys/class/block/{place.words('{device}', disk).removeprefix('/dev/')}"
    told = place.guest.run(
        f"cd {queue} && cat size queue/logical_block_size queue/fua queue/write_cache"
        " queue/discard_max_bytes ro"
    ).splitlines()
    size, block_size, fua, cache, discard, read_only = (line.strip() for line in told)
    assert (int(size) * 512, int(block_size)) == (SIZE, way.block_size)
    assert (fua, cache, read_only) == ("1", "write back", "0")
    assert int(discard) > 0
    rows = place.daemon.run("client", "list", "--json").json
    assert sum(row["export"] == disk for row in rows) == way.connections


def copy(program: Program, daemon: Daemon, export: str, image: Path) -> None:
    """Read an export by nbdcopy, over the unix socket, where TLS is off as the kernel vouches."""
    run(program("nbdcopy"), daemon.uri(export), image)
