"""A small virtual machine: Debian's kernel, a file system in memory made here, and a shell in it.

The kernel comes unpacked from its package (``find_kernel`` in tests/check.py): no boot loader, no
disk. The file system (an initramfs) is written by ``Initramfs``: busybox, programs of this machine
with their libraries, and the modules asked for with all that they depend on. What runs in the
machine is therefore what is installed here, so it must be of the same architecture.

The test talks to the machine over two virtio ports and never waits by the clock: on ``commands`` it
sends a line of shell and gets the output and the exit code; ``news`` are lines that background
programs of the guest say when something has happened (a load: "this file is on the disk now"). The
kernel's console goes to a file, which is shown when anything fails.

The processor is emulated (TCG), as most places where tests run have no KVM, or one that is broken
when nested; NBDFLEECE_ACCEL=kvm takes KVM instead.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.check import Kernel, find_kernel, find_program

BOOT_S = 150.0  # 8 s on an idle machine; only what hangs must end here
COMMAND_S = 100.0

_END = "\x04="  # begins the line that ends an answer; no program says this

# What the machine runs first; it ends only with the machine.
_INIT = """\
#!/bin/sh
export PATH=/bin HOME=/tmp
mkdir -p /proc /sys /dev /tmp /run /mnt /etc /var/lock
ln -s /run /var/run
ln -s /proc/mounts /etc/mtab
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; fi
for port in /sys/class/virtio-ports/*; do ln -s /dev/${port##*/} /dev/$(cat $port/name); done
exec 3<>/dev/commands 4<>/dev/news
echo ready >&4
while read -r line <&3; do
    (eval "$line") </dev/null >/tmp/said 2>&1 3>&-
    code=$?
    cat /tmp/said >&3
    printf '\\n\\004=%d\\n' $code >&3
done
"""


class MachineError(AssertionError):
    """The machine has died, or does not answer; the text holds the end of its console."""


# --- the file system it starts with --------------------------------------------------------------


class Initramfs:
    """Collects files and writes them as a cpio archive ("newc"), which the kernel unpacks.

    Several archives behind one another make one file system: the large one is built once, small
    ones with what a test adds stand behind it.
    """

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, bytes]] = {}

    def add(self, name: str, data: bytes, mode: int = 0o755) -> None:
        """Add a file under its absolute name, with the folders above it."""
        for folder in list(Path(name).parents)[-2::-1]:
            self._files.setdefault(str(folder), (0o040755, b""))
        self._files[name] = (0o100000 | mode, data)

    def add_busybox(self) -> None:
        """Add busybox, with a link for each command that it is."""
        path = find_program("busybox")
        assert path is not None, "busybox is not installed"
        self.add_program(path)
        applets = subprocess.run([path, "--list"], capture_output=True, text=True, check=True)
        for name in applets.stdout.split():
            self._files.setdefault(f"/bin/{name}", (0o120777, b"busybox"))

    def add_tree(self, folder: Path, name: str) -> None:
        """Add all files under a folder of this machine, under another name."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.add(f"{name}/{path.relative_to(folder)}", path.read_bytes(), 0o600)

    def add_program(self, path: str) -> None:
        """Add a program in /bin, with the shared libraries that it needs."""
        self.add(f"/bin/{Path(path).name}", Path(path).read_bytes())
        told = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
        for found in re.finditer(r"(?:=> )?(/\S+) \(0x", told.stdout):
            self.add(found[1], Path(found[1]).read_bytes())

    def add_modules(self, kernel: Kernel, *names: str) -> None:
        """Add kernel modules and what they depend on, and say in which order to load them."""
        order: list[str] = []
        files = {_module_name(path): path for path in kernel.modules.rglob("*.ko*")}

        def visit(name: str) -> None:
            path = files.get(name)
            if path is None or name in order:  # none: it is built in
                return
            data = path.read_bytes()
            data = lzma.decompress(data) if path.suffix == ".xz" else data
            needs = re.search(rb"\0depends=([^\0]*)\0", data)
            for need in needs[1].decode().split(",") if needs else ():
                visit(need.replace("-", "_"))
            order.append(name)
            self.add(f"/modules/{name}", data)

        for name in names:
            visit(name)
        self.add("/modules/order", "\n".join(order).encode())

    def write(self, path: Path) -> Path:
        """Write the archive; return its path."""
        parts = []
        for inode, (name, (mode, data)) in enumerate(
            [*self._files.items(), ("TRAILER!!!", (0, b""))]
        ):
            label = name.lstrip("/").encode() + b"\0"
            numbers = (inode + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(label), 0)
            head = b"070701" + b"".join(b"%08X" % number for number in numbers) + label
            parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
        path.write_bytes(b"".join(parts))
        return path


def _module_name(path: Path) -> str:
    return path.name.split(".")[0].replace("-", "_")


def base_initramfs(path: Path, *programs: str) -> Path:
    """Write the file system with busybox, the named programs and the modules of virtio and nbd."""
    kernel = find_kernel()
    assert kernel is not None
    built = Initramfs()
    built.add("/init", _INIT.encode())
    for name in programs:
        found = find_program(name)
        assert found is not None, f"{name} is not installed"
        built.add_program(found)
    built.add_busybox()
    modules = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_console", "nbd")
    built.add_modules(kernel, *modules, "ext4", "crc32c_generic")
    return built.write(path)


# --- the machine ---------------------------------------------------------------------------------


class VirtualMachine:
    """A machine that runs; `started` makes one. Used by one thread of the test.

    Attributes:
        console: The file that gets what the kernel says.
        news: What background programs have said, oldest first; grows.
    """

    def __init__(self, process: subprocess.Popen[bytes], console: Path, ports: list[socket.socket]):
        self.process = process
        self.console = console
        self.news: list[str] = []
        self._commands, news = ports
        self._unread = b""
        self._arrived = threading.Condition()
        self._is_over = False
        self._listener = threading.Thread(target=self._listen, args=(news,), daemon=True)
        self._listener.start()

    def run(self, command: str, *, code: int | None = 0, seconds: float = COMMAND_S) -> str:
        """Run one line of shell in the machine; return what it said, on stdout and stderr.

        Raises:
            MachineError: the machine died, or the command took longer than `seconds`.
            AssertionError: the command's exit code is not `code` (None: any).
        """
        assert "\n" not in command
        said, found = self._exchange(command, seconds)
        if code is not None and found != code:
            raise AssertionError(f"in the guest: {command}: exit {found}\n{said}\n{self._tail()}")
        return said

    def code(self, command: str) -> int:
        """Run one line of shell in the machine; return its exit code."""
        return self._exchange(command, COMMAND_S)[1]

    def wait_news(self, condition: Callable[[], object], seconds: float = COMMAND_S) -> None:
        """Wait until a condition over `news` is true; it is asked again after each arrival."""
        with self._arrived:
            came = self._arrived.wait_for(lambda: condition() or self._is_over, seconds)
            if not came or not condition():
                raise MachineError(f"waited in vain; last news: {self.news[-5:]}\n{self._tail()}")

    def log(self) -> str:
        """Return what the kernel has said."""
        return self.console.read_text(errors="replace")

    def close(self) -> None:
        """End the machine at once, as by a power cut."""
        self.process.kill()
        self.process.wait(20)
        self._commands.close()
        self._listener.join(20)

    def _exchange(self, command: str, seconds: float) -> tuple[str, int]:
        self._commands.sendall(command.encode() + b"\n")
        ends = time.monotonic() + seconds
        while True:
            found = re.search(rb"(?s)(.*)\n\x04=(\d+)\r?\n", self._unread)
            if found is not None:
                self._unread = b""
                return found[1].decode(errors="replace"), int(found[2])
            self._commands.settimeout(max(0.001, ends - time.monotonic()))
            try:
                data = self._commands.recv(1 << 16)
            except TimeoutError:
                data = b""
            if not data:
                raise MachineError(f"no answer from the guest to: {command}\n{self._tail()}")
            self._unread += data

    def _listen(self, port: socket.socket) -> None:
        with port, port.makefile("r", errors="replace") as lines, contextlib.suppress(OSError):
            for line in lines:
                with self._arrived:
                    self.news.append(line.strip())
                    self._arrived.notify_all()
        with self._arrived:
            self._is_over = True
            self._arrived.notify_all()

    def _tail(self) -> str:
        state = f"qemu: exit code {self.process.poll()}; the end of its console:"
        return "\n".join([state, *self.log().splitlines()[-25:]])


@contextlib.contextmanager
def started(
    folder: Path, archives: Sequence[Path], *options: str, memory_mib: int = 512
) -> Iterator[VirtualMachine]:
    """Boot a machine with the archives as its file system; it is killed at the end.

    Args:
        folder: Gets the console and the archive that qemu reads.
        archives: What `Initramfs.write` has made, in order.
        options: Further options of qemu, for instance its network card or its disk.
        memory_mib: Its memory.
    """
    kernel, qemu = find_kernel(), find_program("qemu-system-x86_64")
    assert kernel is not None, "there is no kernel"
    assert qemu is not None, "qemu is not installed"
    whole, console = folder / "initramfs", folder / "console"
    whole.write_bytes(b"".join(path.read_bytes() for path in archives))
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    accel = os.environ.get("NBDFLEECE_ACCEL", "tcg,thread=multi")
    command = [qemu, "-accel", accel, "-cpu", "max", "-smp", "2", "-m", str(memory_mib)]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(kernel.image), "-initrd", str(whole)]
    command += ["-append", "console=ttyS0 quiet panic=-1 nokaslr mitigations=off cryptomgr.notests"]
    command += ["-serial", f"file:{console}", "-device", "virtio-serial"]
    for port, name in zip(theirs, ("commands", "news"), strict=True):
        command += ["-chardev", f"socket,id={name},fd={port.fileno()}"]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    console.touch()
    with open(folder / "qemu.log", "ab") as log:
        fds = [port.fileno() for port in theirs]
        process = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds
        )
    for port in theirs:
        port.close()
    machine = VirtualMachine(process, console, list(ours))
    try:
        try:
            machine.wait_news(lambda: "ready" in machine.news, BOOT_S)
        except MachineError as error:
            told = (folder / "qemu.log").read_text(errors="replace")
            raise MachineError(f"it did not boot: {error}\n{told}") from None
        yield machine
    finally:
        machine.close()
