"""A load on a file system inside a virtual machine, and what it promises of any instant.

Each writer writes file after file, `W.100001`, `W.100002` ..., and says on the machine's news when
one has been synced: the guest's kernel has then been told by the disk that it is on it. So in a
snapshot taken after that, the file is whole. Names say what is in the files, so nothing but names
has to be remembered. Beside the writers one overwrites blocks of a file in place, for ever.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.check import find_program
from tests.support.live import run
from tests.support.virtual_machine import Initramfs, VirtualMachine

# A writer of files: load NAME FOLDER...; the same file into each of the folders, one after the
# other. The length must be the same as in `content`.
_WRITER = r"""#!/bin/sh
writer=$1
shift
n=100000
while [ ! -e /run/stop ]; do
    n=$((n + 1))
    name=$writer.$n
    length=$((n * 7919 % 31 * 4096 + 4096 - n % 3))
    for folder; do
        if ! yes $name | dd of=$folder/$name bs=$length count=1 iflag=fullblock conv=fsync \
                2>/tmp/$writer; then
            echo "failed $name: $(tail -n 1 /tmp/$writer)" >&4
            exit 1
        fi
    done
    echo "synced $name" >&4
done
"""

# Overwrites 8 MiB in place, 16 KiB at a time and past the page cache: scribble FILE.
_SCRIBBLER = r"""#!/bin/sh
dd if=/dev/zero of=$1 bs=1M count=8 conv=fsync 2>/dev/null
n=0
while [ ! -e /run/stop ]; do
    n=$((n + 1))
    if ! dd if=/dev/urandom of=$1 bs=16k count=32 seek=$((n * 211 % 480)) conv=notrunc \
            oflag=direct 2>/tmp/scribble; then
        echo "failed scribble: $(tail -n 1 /tmp/scribble)" >&4
        exit 1
    fi
    usleep 100000
done
"""


def add_programs(archive: Initramfs) -> None:
    """Put the load into the file system that a machine starts with."""
    archive.add("/bin/load", _WRITER.encode())
    archive.add("/bin/scribble", _SCRIBBLER.encode())


def content(name: str) -> bytes:
    """Return what the writer puts into the file of that name."""
    number = int(name.partition(".")[2])
    length = number * 7919 % 31 * 4096 + 4096 - number % 3
    line = name.encode() + b"\n"
    return (line * (length // len(line) + 1))[:length]


class Load:
    """The load that runs; `running` makes one."""

    def __init__(self, machine: VirtualMachine, writers: str) -> None:
        self._machine = machine
        self._writers = writers
        self._begins = len(machine.news)
        self._removed: set[str] = set()

    def synced(self) -> set[str]:
        """Return the files that are on the disk and that nobody has removed.

        Raises:
            AssertionError: a write has failed in the guest.
        """
        said = [line.partition(" ") for line in self._machine.news[self._begins :]]
        failed = [name for word, _, name in said if word == "failed"]
        assert not failed, f"the guest's writes failed: {failed}\n{self._machine.log()[-2000:]}"
        return {name for word, _, name in said if word == "synced"} - self._removed

    def wait(self, count: int) -> None:
        """Wait until so many more files have been synced, by each writer."""

        def has(writer: str, number: int) -> bool:
            return self._newest(writer) >= number

        goals = {writer: self._newest(writer) + count for writer in self._writers}
        self._machine.wait_news(
            lambda: self.synced() and all(has(writer, goal) for writer, goal in goals.items())
        )

    def remove_old(self, folder: str, names: set[str]) -> None:
        """Let the guest remove files, so that new ones get their blocks."""
        self._removed |= names
        self._machine.run(f"cd {folder} && rm {' '.join(sorted(names))} && sync")

    def _newest(self, writer: str) -> int:
        pattern = re.compile(rf"synced {writer}\.(\d+)$")
        found = map(pattern.match, self._machine.news[self._begins :])
        return max((int(match[1]) for match in found if match), default=0)


@contextlib.contextmanager
def running(machine: VirtualMachine, folder: str) -> Iterator[Load]:
    """Run two writers and a scribbler on a file system; stopped at the end, when all went well."""
    programs = f"load a {folder} & load b {folder} & scribble {folder}/scribble &"
    with _running(machine, "ab", programs) as load:
        yield load


@contextlib.contextmanager
def running_on_both(machine: VirtualMachine, first: str, second: str) -> Iterator[Load]:
    """Run a writer `p` that syncs each file on one file system, and then on the other."""
    with _running(machine, "p", f"load p {first} {second} &") as load:
        yield load


@contextlib.contextmanager
def _running(machine: VirtualMachine, writers: str, programs: str) -> Iterator[Load]:
    machine.run("rm -f /run/stop")
    load = Load(machine, writers)
    machine.run(f"({programs}) 3>&- >/dev/null 2>&1")
    yield load
    machine.run("touch /run/stop; while pidof load scribble >/dev/null; do usleep 20000; done")
    load.synced()


# --- file systems seen from outside --------------------------------------------------------------


def needs_replay(image: Path) -> bool:
    """Tell whether the journal of an ext4 image has something to be replayed."""
    with image.open("rb") as file:
        file.seek(1024 + 0x60)  # s_feature_incompat of the superblock
        return bool(file.read(1)[0] & 4)


def check_file_system(image: Path) -> None:
    """Do what a mount does after a power cut, then demand that nothing at all is wrong.

    The first e2fsck replays the journal and settles files that were being removed, as mounting
    does; it mends nothing. The second looks at everything and changes nothing.
    """
    tool = find_program("e2fsck")
    assert tool is not None
    assert run(tool, "-p", image, code=None).returncode in (0, 1)
    run(tool, "-f", "-n", image)


def files_in(image: Path, folder: Path) -> dict[str, bytes]:
    """Return the files of an ext4 image by name, taken out by way of `folder`."""
    folder.mkdir()
    _debugfs(image, f"rdump / {folder}")
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_snapshot(
    image: Path, folder: Path, promised: set[str], *, all_whole: bool = False
) -> dict[str, bytes]:
    """Check an image of one instant: sound, and with every file whole that was synced before it.

    Returns the files in it, by name.

    Args:
        image: The image; the journal in it is replayed.
        folder: Made here, for the files.
        promised: Names of files that were synced before the instant.
        all_whole: No file may be there in part, as after a freeze.
    """
    check_file_system(image)
    found = files_in(image, folder)
    found.pop("scribble", None)
    assert promised, "the load had not written anything"
    assert not promised - found.keys(), f"missing: {sorted(promised - found.keys())}"
    torn = {name for name, data in found.items() if data != content(name)}
    assert not torn & promised, f"not as the guest synced it: {sorted(torn & promised)}"
    if all_whole:
        assert not torn, f"in part: {sorted(torn)}"
    return found


def _debugfs(image: Path, command: str) -> str:
    tool = find_program("debugfs")
    assert tool is not None
    done = subprocess.run(
        [tool, "-R", command, str(image)], capture_output=True, text=True, check=True
    )
    return done.stdout
