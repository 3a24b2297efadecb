"""The kernel's own NBD client, in a virtual machine: attached in every way that people use.

Each way gets a disk of its own. In each, a file system is made and written under load, and two
snapshots are taken meanwhile; the second while the first is there. Each is read twice from outside,
at once and after the guest has overwritten, removed and trimmed much of what it holds, and must be
the same both times, a sound file system, and whole in every file that was synced before its
instant. At the end all that was synced is on the disk, and the kernel has said nothing of errors.
"""

from __future__ import annotations

import filecmp
import hashlib
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import guest_load, virtual_machine
from tests.support.daemon_process import ROOT, Daemon, nbdfleece
from tests.support.documents import blocks_run_by
from tests.support.live import MiB, blocks, eventually, run, serving
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
# qemu-nbd says that it is ready a moment before the kernel has the disk.
QEMU_READY = (
    " && d={device} && until [ $(cat /sys/class/block/${{d##*/}}/size) != 0 ]"
    "; do usleep 20000; done"
)
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
        "qemu-nbd --fork -f raw -c {device} nbd://10.0.2.2:{plain}/{disk}" + QEMU_READY,
        "qemu-nbd -d {device}",
    ),
    "qemutls": Way("qemu-nbd --fork -c {device} " + QEMU_TLS + QEMU_READY, "qemu-nbd -d {device}"),
}


@dataclass(frozen=True)
class Place:
    """A guest and a daemon beside it.

    Attributes:
        daemon: The daemon; it listens on TCP without TLS, and may do so with it.
        guest: The machine.
    """

    daemon: Daemon
    guest: VirtualMachine

    def words(self, text: str, disk: str, device: str) -> str:
        """Fill in ports, disk and device."""
        said = re.findall(
            r"listening on tcp:127\.0\.0\.1:(\d+)(,tls=require)?$", self.daemon.errors(), re.M
        )
        ports = {"tls" if tls else "plain": port for port, tls in said}
        return text.format(**ports, disk=disk, device=device)

    def run(self, text: str, disk: str, device: str, *, code: int | None = 0) -> str:
        """Run a command in the guest."""
        return self.guest.run(self.words(text, disk, device), code=code)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, made as a user makes them."""
    folder = tmp_path_factory.mktemp("tls") / "tls"
    assert nbdfleece("pki", "init", folder, "--host", "localhost").code == 0
    assert nbdfleece("pki", "client", folder, "guest").code == 0
    return folder


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, tls: Path) -> Iterator[VirtualMachine]:
    folder = tmp_path_factory.mktemp("kernel")
    base = virtual_machine.base_initramfs(folder / "base", "nbd-client", "qemu-nbd", "mkfs.ext4")
    extra = Initramfs()
    guest_load.add_programs(extra)
    extra.add_tree(tls / "clients" / "guest", "/tls")
    archives = [base, extra.write(folder / "extra")]
    with virtual_machine.started(folder, archives, "-nic", "user,model=virtio-net-pci") as machine:
        yield machine


@pytest.fixture
def quiet(guest: VirtualMachine) -> Iterator[None]:
    """The guest's kernel says nothing of errors in this test."""
    before = len(guest.log())
    yield
    said = guest.log()[before:]
    assert "error" not in said.lower(), said


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tls: Path, guest: VirtualMachine
) -> Iterator[Place]:
    """The daemon with a disk for each way."""
    folder = tmp_path_factory.mktemp("daemon")
    disks = [sparse(folder / f"{name}.raw", SIZE) for name in WAYS]
    listen = ["--listen", "tcp:127.0.0.1:0,tls=off", "--listen", "tcp:127.0.0.1:0,tls=require"]
    with serving(folder, *listen, "--tls-creds", tls, *disks, disks=len(WAYS)) as daemon:
        yield Place(daemon, guest)


def sparse(path: Path, size: int) -> Path:
    """Make an empty disk."""
    with path.open("xb") as file:
        file.truncate(size)
    return path


@contextmanager
def serving_here(folder: Path, guest: VirtualMachine, *args: str | Path) -> Iterator[Place]:
    """A daemon of one test's own; each argument is a disk."""
    with serving(folder, "--listen", "tcp:127.0.0.1:0", *args, disks=len(args)) as daemon:
        yield Place(daemon, guest)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("disk", WAYS)
def test_snapshots_of_a_disk_that_the_kernel_writes(
    place: Place, disk: str, tmp_path: Path, program: Program
) -> None:
    way, device = WAYS[disk], f"/dev/nbd{list(WAYS).index(disk)}"
    place.run(way.attach, disk, device)
    check_device(place, disk, device, way)
    place.guest.run(f"mkfs.ext4 -q -E lazy_itable_init=0 {device} && mkdir -p /mnt/{disk}")
    place.guest.run(f"mount -o discard {device} /mnt/{disk}")
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
        place.guest.run(f"fstrim /mnt/{disk}")
        load.wait(1)
        for name, image, promised in images:
            again = tmp_path / f"{name}-again"
            copy(program, place.daemon, f"{disk}@{name}", again)
            assert filecmp.cmp(image, again, shallow=False), f"{name} has changed"
            assert guest_load.needs_replay(image)  # as of a running guest
            guest_load.check_snapshot(image, tmp_path / f"{name}-files", promised)
            assert place.daemon.run("snapshot", "delete", f"{disk}@{name}").code == 0
    synced = load.synced()
    place.guest.run(f"umount /mnt/{disk}")
    place.run(way.detach, disk, device)
    last = tmp_path / "last"
    copy(program, place.daemon, disk, last)
    assert not guest_load.needs_replay(last)
    guest_load.check_snapshot(last, tmp_path / "last-files", synced, all_whole=True)


def check_device(place: Place, disk: str, device: str, way: Way) -> None:
    """What the kernel has understood of the export, and how many connections it holds."""
    told = place.guest.run(
        f"cd /sys/class/block/{Path(device).name} && cat size queue/logical_block_size queue/fua"
        " queue/write_cache queue/discard_max_bytes ro"
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


# --- snapshots as disks of the guest, odd disks, old ways ----------------------------------------


def sha256(guest: VirtualMachine, device: str) -> str:
    """Return the checksum of a device as it is now, past the guest's page cache."""
    return guest.run(f"dd if={device} bs=1M iflag=direct 2>/dev/null | sha256sum").split()[0]


@pytest.mark.usefixtures("quiet")
def test_a_snapshot_in_the_guest_is_read_only_and_stays_what_it_was(
    guest: VirtualMachine, short_tmp: Path
) -> None:
    content = blocks(8 * MiB, 4096)
    disk = short_tmp / "vda.raw"
    disk.write_bytes(content)
    live, old = "/dev/nbd8", "/dev/nbd9"
    with serving_here(short_tmp, guest, disk) as here:
        assert here.daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        here.run(f"{CLIENT} {{plain}} {{device}} -N {{disk}}", "vda", live)
        here.run(f"{CLIENT} {{plain}} {{device}} -N {{disk}} -C 2", "vda@one", old)
        try:
            assert guest.run("cat /sys/class/block/nbd9/ro").strip() == "1"
            guest.run(f"dd if=/dev/zero of={live} bs=64k oflag=direct conv=fsync 2>&1", code=1)
            assert sha256(guest, old) == hashlib.sha256(content).hexdigest()
            assert sha256(guest, live) == hashlib.sha256(bytes(len(content))).hexdigest()
            said = guest.run(f"dd if=/dev/zero of={old} bs=4k count=1 conv=fsync", code=1)
            assert "not permitted" in said
            guest.run(f"blockdev --flushbufs {old} && sync {old}")
        finally:
            guest.run(f"nbd-client -d {live}; nbd-client -d {old}")


@pytest.mark.usefixtures("quiet")
def test_a_disk_of_5_tib_is_written_at_its_end_and_discarded_whole(
    guest: VirtualMachine, short_tmp: Path
) -> None:
    disk = sparse(short_tmp / "vda.raw", 5 << 40)
    with serving_here(short_tmp, guest, disk) as here:
        here.run(f"{CLIENT} {{plain}} {{device}} -N {{disk}}", "vda", "/dev/nbd8")
        try:
            assert guest.run("blockdev --getsize64 /dev/nbd8").strip() == str(5 << 40)
            last = (5 << 40) // MiB - 1
            guest.run(
                f"dd if=/dev/urandom of=/tmp/m bs=1M count=1 2>/dev/null && dd if=/tmp/m"
                f" of=/dev/nbd8 bs=1M seek={last} oflag=direct conv=fsync 2>/dev/null"
            )
            same = f"dd if=/dev/nbd8 bs=1M skip={last} iflag=direct 2>/dev/null | cmp - /tmp/m"
            guest.run(same)
            assert disk.stat().st_blocks * 512 >= MiB
            guest.run("blkdiscard /dev/nbd8")
            assert disk.stat().st_blocks == 0
            assert guest.code(same) == 1
        finally:
            guest.run("nbd-client -d /dev/nbd8")


@pytest.mark.usefixtures("quiet")
def test_a_size_that_is_no_multiple_of_a_sector_loses_its_tail_in_the_guest_only(
    guest: VirtualMachine, short_tmp: Path
) -> None:
    disk = short_tmp / "vda.raw"
    disk.write_bytes(b"\1" * (MiB + 100))
    with serving_here(short_tmp, guest, disk) as here:
        here.run(f"{CLIENT} {{plain}} {{device}} -N {{disk}} -g", "vda", "/dev/nbd8")
        try:
            assert guest.run("blockdev --getsize64 /dev/nbd8").strip() == str(MiB)
            guest.run("dd if=/dev/zero of=/dev/nbd8 bs=64k count=16 oflag=direct conv=fsync")
        finally:
            guest.run("nbd-client -d /dev/nbd8")
    assert disk.read_bytes() == bytes(MiB) + b"\1" * 100


def test_nbd_client_lists_the_exports(guest: VirtualMachine, short_tmp: Path) -> None:
    disks = [sparse(short_tmp / f"{name}.raw", MiB) for name in ("vda", "vdb")]
    with serving_here(short_tmp, guest, *disks) as here:
        listed = here.run("nbd-client -l 10.0.2.2 {plain}", "", "").splitlines()
        assert {"vda", "vdb"} <= {line.strip().split("[")[0] for line in listed}


# --- the guide -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
def test_what_virtual_machines_md_says_of_the_kernels_client(
    guest: VirtualMachine, short_tmp: Path
) -> None:
    """It has a mounted disk first, then its snapshot, then qemu-nbd."""
    guide = ROOT / "docs" / "guides" / "virtual-machines.md"
    disk = sparse(short_tmp / "vda.raw", SIZE)
    guest.run("mkdir -p /media && echo 10.0.2.2 storage.example.org >>/etc/hosts")
    with serving_here(short_tmp, guest, disk) as here:
        port = here.words("{plain}", "", "")
        ran = 0
        for commands in blocks_run_by("test_kernel_client.py", guide):
            for command in commands:
                guest.run(command.replace("10809", port))
            ran += 1
            if ran == 1:
                guest.run("echo kept >/mnt/file && sync /mnt/file")
                assert here.daemon.run("snapshot", "create", "vda", "--name", "monday").code == 0
                guest.run("echo changed >/mnt/file && umount /mnt && nbd-client -d /dev/nbd0")
        assert ran == 3


# --- the daemon stops ----------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
async def test_a_reload_drops_no_kernel_client(place: Place) -> None:
    way, device = WAYS["tls4"], "/dev/nbd8"
    place.run(way.attach, "tls4", device)
    try:
        place.daemon.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "SIGHUP: " in place.daemon.errors())
        assert "read again" in place.daemon.errors()
        place.guest.run(f"dd if=/dev/zero of={device} bs=64k count=16 oflag=direct conv=fsync")
        rows = place.daemon.run("client", "list", "--json").json
        assert sum(row["export"] == "tls4" for row in rows) == way.connections
    finally:
        place.run(way.detach, "tls4", device)


def restarted(folder: Path, here: Place, disk: Path) -> Daemon:
    """Kill a daemon and start one on the same port."""
    port = here.words("{plain}", "", "")
    here.daemon.stop(signal.SIGKILL)
    return Daemon(folder, "--listen", f"tcp:127.0.0.1:{port}", disk)


def test_without_a_daemon_the_kernel_gives_errors_and_attaches_again(
    guest: VirtualMachine, short_tmp: Path
) -> None:
    disk = sparse(short_tmp / "vda.raw", MiB)
    attach = f"{CLIENT} {{plain}} {{device}} -N {{disk}} -C 2 -timeout 10"
    write = "dd if=/dev/zero of=/dev/nbd8 bs=4k count=1 oflag=direct conv=fsync"
    with Daemon(short_tmp, "--listen", "tcp:127.0.0.1:0", disk) as daemon:
        daemon.ready()
        here = Place(daemon, guest)
        here.run(attach, "vda", "/dev/nbd8")
        guest.run(write)
        with restarted(short_tmp, here, disk) as second:
            second.ready()
            guest.run(write, code=1)  # its connections are gone for good
            guest.run("nbd-client -d /dev/nbd8")
            here = Place(second, guest)
            here.run(attach, "vda", "/dev/nbd8")
            guest.run(write)
            guest.run("nbd-client -d /dev/nbd8")


@pytest.mark.usefixtures("quiet")
def test_qemu_nbd_in_between_waits_for_the_next_daemon(
    guest: VirtualMachine, short_tmp: Path
) -> None:
    disk = sparse(short_tmp / "vda.raw", MiB)
    attach = (
        "qemu-nbd --fork -c {device} --image-opts driver=raw,file.driver=nbd,file.host=10.0.2.2"
        ",file.port={plain},file.export={disk},file.reconnect-delay=60" + QEMU_READY
    )
    write = "yes {} | dd of=/dev/nbd8 bs=4k count=1 seek={} iflag=fullblock oflag=direct conv=fsync"
    with Daemon(short_tmp, "--listen", "tcp:127.0.0.1:0", disk) as daemon:
        daemon.ready()
        here = Place(daemon, guest)
        here.run(attach, "vda", "/dev/nbd8")
        guest.run(write.format("before", 0))
        with restarted(short_tmp, here, disk) as second:
            second.ready()
            guest.run(write.format("after", 1))
            guest.run("qemu-nbd -d /dev/nbd8")
    found = disk.read_bytes()
    assert found[:4096] == (b"before\n" * 586)[:4096]
    assert found[4096:8192] == (b"after\n" * 683)[:4096]
