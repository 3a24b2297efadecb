"""QEMU's image locks: among our own nodes, and with QEMU's real programs.

Whatever a program may do beside qemu-storage-daemon it may do beside us, and the other way round.
Not all that one would think is refused: QEMU 7.2 lets readers in where the writer shares
consistent-read, and lets two NBD exports write, as each of them shares write.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import permissions as perms
from nbdfleece.block.child import Child, Role
from nbdfleece.block.drivers import locks
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.locks import ImageLocks, Locking
from nbdfleece.block.drivers.raw import RawDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from tests.support.driver_kit import Owner, remove_all

READ, WRITE, RESIZE = perms.CONSISTENT_READ, perms.WRITE, perms.RESIZE
UNCHANGED, ALL, NONE = perms.WRITE_UNCHANGED, perms.ALL, perms.NONE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.touch()
    os.truncate(path, 1 << 20)
    return path


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    for node in graph:
        for edge in list(node.parents):
            if isinstance(edge.parent, Owner):
                graph.detach_root(edge)
    await remove_all(graph)


async def open_image(
    graph: Graph, image: Path, *, locking: Locking = Locking.AUTO, read_only: bool = False
) -> Node:
    driver = FileDriver(
        filename=str(image), locking=locking, cache_direct=False, new_and_sparse=False
    )
    return await graph.add(None, driver, read_only=read_only, discard_enabled=True)


def hold(graph: Graph, node: Node, perm: int, shared: int) -> Child:
    return graph.attach_root("root", Owner(), node, perm=perm, shared=shared)


def open_and_close(image: Path) -> None:
    image.read_bytes()


def locked_bytes(image: Path) -> set[int]:
    """Return the bytes of the image that anybody holds a lock on, as the kernel tells it."""
    inode = f":{os.stat(image).st_ino} "
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        if inode in line and "OFDLCK" in line:
            first, last = line.split()[-2:]
            found.update(range(int(first), int(last) + 1))
    return found


# --- the bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("perm", "shared", "expected"),
    [
        (NONE, ALL, set[int]()),
        (READ, ALL, {100}),
        (WRITE, ALL, {101}),
        (UNCHANGED, ALL, {102}),
        (RESIZE, ALL, {103}),
        (NONE, ALL & ~READ, {200}),
        (NONE, ALL & ~WRITE, {201}),
        (NONE, ALL & ~UNCHANGED, {202}),
        (NONE, ALL & ~RESIZE, {203}),
        (READ | WRITE, READ | UNCHANGED, {100, 101, 201, 203}),
        (ALL, NONE, {100, 101, 102, 103, 200, 201, 202, 203}),
    ],
)
async def test_permissions_lock_the_bytes_of_qemu(
    perm: int, shared: int, expected: set[int], graph: Graph, image: Path
) -> None:
    node = await open_image(graph, image)
    assert locked_bytes(image) == set()

    edge = hold(graph, node, perm, shared)
    assert locked_bytes(image) == expected

    graph.detach_root(edge)
    assert locked_bytes(image) == set()


async def test_closing_drops_the_locks_and_closing_another_descriptor_does_not(
    graph: Graph, image: Path
) -> None:
    node = await open_image(graph, image)
    edge = hold(graph, node, READ | WRITE, READ)
    open_and_close(image)  # classic POSIX locks would be gone now
    assert locked_bytes(image) == {100, 101, 201, 202, 203}

    graph.detach_root(edge)
    await graph.remove(node)
    assert locked_bytes(image) == set()


async def test_read_only_nodes_lock_too(graph: Graph, image: Path) -> None:
    node = await open_image(graph, image, read_only=True)
    hold(graph, node, READ, READ | UNCHANGED)
    assert locked_bytes(image) == {100, 201, 203}


async def test_locking_off_takes_none(graph: Graph, image: Path) -> None:
    hold(graph, await open_image(graph, image, locking=Locking.OFF), ALL, NONE)
    hold(graph, await open_image(graph, image, locking=Locking.OFF), ALL, NONE)
    assert locked_bytes(image) == set()


# --- conflicts among ourselves: two nodes are like two processes ---------------------------------

NAMES = {READ: "consistent-read", WRITE: "write", UNCHANGED: "write-unchanged", RESIZE: "resize"}


@pytest.mark.parametrize("bit", list(NAMES), ids=list(NAMES.values()))
async def test_what_others_do_not_share_cannot_be_got(bit: int, graph: Graph, image: Path) -> None:
    first, second = await open_image(graph, image), await open_image(graph, image)
    edge = hold(graph, first, NONE, ALL & ~bit)
    before = locked_bytes(image)

    with pytest.raises(CommandError) as caught:
        hold(graph, second, bit, ALL)

    assert str(caught.value) == (
        f'Failed to get "{NAMES[bit]}" lock\nIs another process using the image [{image}]?'
    )
    assert locked_bytes(image) == before
    assert second.parents == []
    graph.detach_root(edge)
    hold(graph, second, bit, ALL)


@pytest.mark.parametrize("bit", list(NAMES), ids=list(NAMES.values()))
async def test_what_others_do_cannot_be_unshared(bit: int, graph: Graph, image: Path) -> None:
    first, second = await open_image(graph, image), await open_image(graph, image)
    hold(graph, first, bit, ALL)
    before = locked_bytes(image)

    with pytest.raises(CommandError) as caught:
        hold(graph, second, NONE, ALL & ~bit)

    assert str(caught.value).startswith(f'Failed to get shared "{NAMES[bit]}" lock\n')
    assert locked_bytes(image) == before


async def test_readers_that_bear_each_other_share(graph: Graph, image: Path) -> None:
    for _ in range(3):
        hold(graph, await open_image(graph, image, read_only=True), READ, READ | UNCHANGED)


async def test_a_change_that_fails_elsewhere_gives_the_new_locks_back(
    graph: Graph, image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(512))
    node, inner = await open_image(graph, image), await open_image(graph, other)
    rival = await open_image(graph, other)
    hold(graph, node, READ, ALL)
    hold(graph, rival, NONE, ALL & ~WRITE)
    before = locked_bytes(image)

    class Both(RawDriver):
        """Writes a second child, too."""

        def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
            return perm, shared

    above = await graph.add(
        None,
        Both(offset=None, size=None),
        {"file": (node, Role.FILTERED | Role.PRIMARY), "data": (inner, Role.DATA)},
        read_only=False,
        discard_enabled=False,
    )
    with pytest.raises(CommandError, match='Failed to get "write" lock'):
        hold(graph, above, WRITE, READ)

    assert locked_bytes(image) == before


async def test_permissions_move_without_a_moment_in_between(image: Path) -> None:
    """From check to commit or abort the bytes of both are held (L2)."""
    fd = os.open(image, os.O_RDWR)
    ours = ImageLocks(fd, str(image))
    ours.check(READ, ALL)
    ours.commit(READ, ALL)

    ours.check(WRITE, ALL & ~RESIZE)
    assert locked_bytes(image) == {100, 101, 203}
    ours.abort()
    assert locked_bytes(image) == {100}

    ours.check(WRITE, ALL & ~RESIZE)
    ours.commit(WRITE, ALL & ~RESIZE)
    assert locked_bytes(image) == {101, 203}
    os.close(fd)


async def test_a_failed_check_gives_back_what_it_took(image: Path) -> None:
    """L3, without the abort that the graph adds."""
    fd, rival_fd = os.open(image, os.O_RDWR), os.open(image, os.O_RDWR)
    ours, rival = ImageLocks(fd, str(image)), ImageLocks(rival_fd, str(image))
    ours.check(READ, ALL)
    ours.commit(READ, ALL)
    rival.check(NONE, ALL & ~WRITE)
    rival.commit(NONE, ALL & ~WRITE)

    with pytest.raises(CommandError):
        ours.check(READ | WRITE, ALL & ~RESIZE)

    assert locked_bytes(image) == {100, 201}
    os.close(fd)
    os.close(rival_fd)


async def test_permissions_in_force_are_not_asked_for_again(image: Path) -> None:
    fd, rival_fd = os.open(image, os.O_RDWR), os.open(image, os.O_RDWR)
    ours = ImageLocks(fd, str(image))
    ours.check(READ | WRITE, ALL)
    ours.commit(READ | WRITE, ALL)
    # Somebody ruthless comes and does not ask.
    locks._call(rival_fd, locks.fcntl.F_OFD_SETLK, locks.fcntl.F_RDLCK, 201)

    ours.check(READ | WRITE, ALL)
    ours.commit(READ, ALL)
    with pytest.raises(CommandError):
        ours.check(READ | WRITE, ALL)
    os.close(fd)
    os.close(rival_fd)


async def test_an_exclusive_lock_of_some_other_program_is_a_conflict(image: Path) -> None:
    fd, rival_fd = os.open(image, os.O_RDWR), os.open(image, os.O_RDWR)
    locks._call(rival_fd, locks.fcntl.F_OFD_SETLK, locks.fcntl.F_WRLCK, 100)
    with pytest.raises(CommandError, match="Failed to lock byte 100\nIs another process"):
        ImageLocks(fd, str(image)).check(READ, ALL)
    os.close(fd)
    os.close(rival_fd)


# --- file systems without locks ------------------------------------------------------------------


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(_fd: int, _command: int, _kind: int, _byte: int) -> int:
        raise OSError(errno.EINVAL, "no such locks here")

    monkeypatch.setattr(locks, "_call", call)


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize("read_only", [False, True])
async def test_auto_goes_without_locks_where_there_are_none(
    read_only: bool, graph: Graph, image: Path
) -> None:
    node = await open_image(graph, image, locking=Locking.AUTO, read_only=read_only)
    hold(graph, node, READ, READ)


@pytest.mark.usefixtures("_no_locks")
async def test_on_insists_on_locks(graph: Graph, image: Path) -> None:
    with pytest.raises(CommandError, match="its file system has no image locks"):
        await open_image(graph, image, locking=Locking.ON)
    assert list(graph) == []


# --- with QEMU's programs ----------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """How an image is held while others come."""

    perm: int
    shared: int
    read_only: bool = False


# As qemu-storage-daemon holds it under an NBD export; and as under a copy-before-write filter with
# a writable export, or under a guest's disk.
SHARED_READER = Use(READ, ALL & ~RESIZE, read_only=True)
SHARED_WRITER = Use(READ | WRITE, ALL & ~RESIZE)
CAREFUL_READER = Use(READ, READ | UNCHANGED, read_only=True)  # as qemu-img convert
ONLY_WRITER = Use(READ | WRITE, READ | UNCHANGED)

COMMANDS = {
    "read": ["qemu-io", "-f", "raw", "-r", "-c", "read 0 512", "IMAGE"],
    "write": ["qemu-io", "-f", "raw", "-c", "write 0 512", "IMAGE"],
    "truncate": ["qemu-io", "-f", "raw", "-c", "truncate 1M", "IMAGE"],
    "info": ["qemu-img", "info", "-f", "raw", "IMAGE"],
    "info-U": ["qemu-img", "info", "-U", "-f", "raw", "IMAGE"],
    "convert": ["qemu-img", "convert", "-f", "raw", "-O", "raw", "IMAGE", "OUT"],
    "convert-U": ["qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", "IMAGE", "OUT"],
    "convert-onto": ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "SPARE", "IMAGE"],
    "resize": ["qemu-img", "resize", "-f", "raw", "IMAGE", "1M"],
    "compare": ["qemu-img", "compare", "-f", "raw", "-F", "raw", "IMAGE", "SPARE"],
}

# What QEMU 7.2 refuses beside each use.
REFUSED = {
    SHARED_READER: {"truncate", "resize"},
    SHARED_WRITER: {"truncate", "resize", "convert"},
    ONLY_WRITER: {"truncate", "resize", "convert", "convert-onto", "write"},
}


@pytest.fixture
def run(
    program: Callable[[str], str], image: Path, tmp_path: Path
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    spare = tmp_path / "spare.raw"
    spare.write_bytes(bytes(1 << 20))

    def run_command(name: str) -> subprocess.CompletedProcess[str]:
        words = {"IMAGE": str(image), "SPARE": str(spare), "OUT": str(tmp_path / "out.raw")}
        command = [words.get(word, word) for word in COMMANDS[name]]
        command[0] = program(command[0])
        return call(command)

    return run_command


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def refused(done: subprocess.CompletedProcess[str]) -> bool:
    """Tell whether a program failed because of a lock (and not because of anything else)."""
    said = done.stdout + done.stderr
    has_lock_error = "Failed to get " in said
    if has_lock_error:
        assert "Is another process using the image" in said
    assert (done.returncode != 0) == has_lock_error, said
    return has_lock_error


@pytest.mark.parametrize(
    "use", list(REFUSED), ids=["shared-reader", "shared-writer", "only-writer"]
)
async def test_programs_of_qemu_see_our_locks(
    use: Use,
    run: Callable[[str], subprocess.CompletedProcess[str]],
    graph: Graph,
    image: Path,
) -> None:
    node = await open_image(graph, image, read_only=use.read_only)
    hold(graph, node, use.perm, use.shared)

    assert {name for name in COMMANDS if refused(run(name))} == REFUSED[use]


@pytest.mark.interop("qemu-nbd")
async def test_qemu_nbd_refuses_what_we_alone_write(
    program: Callable[[str], str],
    graph: Graph,
    image: Path,
    short_tmp: Path,
) -> None:
    hold(graph, await open_image(graph, image), ONLY_WRITER.perm, ONLY_WRITER.shared)
    done = call([program("qemu-nbd"), "-f", "raw", "-k", str(short_tmp / "s"), str(image)])
    assert done.returncode != 0
    assert refused(done)


def call_quietly(command: list[str]) -> int:
    """Run a program that leaves a child behind, which would keep pipes open."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=30).returncode


@contextlib.contextmanager
def storage_daemon(
    program: Callable[[str], str], image: Path, folder: Path, commands: list[dict[str, object]]
) -> Iterator[None]:
    """Run qemu-storage-daemon with the image as node `f`, and QMP commands that all succeed."""
    process = subprocess.Popen(
        [program("qemu-storage-daemon"), "--chardev", "stdio,id=m", "--monitor", "chardev=m"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    with process:
        try:
            assert "QMP" in process.stdout.readline()
            nbd = {"addr": {"type": "unix", "data": {"path": str(folder / "s")}}}
            before: list[dict[str, object]] = [
                {"execute": "qmp_capabilities"},
                {"execute": "nbd-server-start", "arguments": nbd},
            ]
            for command in before + commands:
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
                while "return" not in (reply := json.loads(process.stdout.readline())):
                    assert "error" not in reply, reply
            yield
        finally:
            process.terminate()


def qemu_holds(image: Path, use: Use) -> list[dict[str, object]]:
    """Return the QMP commands that make the daemon hold the image like that."""

    def add(**options: object) -> dict[str, object]:
        return {"execute": "blockdev-add", "arguments": options}

    file = {"driver": "file", "filename": str(image), "read-only": use.read_only}
    commands = [add(**file, **{"node-name": "f"})]
    top = "f"
    if use.shared == ONLY_WRITER.shared:  # what a copy-before-write filter does to its file
        top = "cbw"
        target = {"driver": "null-co", "size": 1 << 20}
        cbw = {"driver": "copy-before-write", "node-name": top, "file": "f", "target": target}
        commands.append(add(**cbw))
    export = {"type": "nbd", "id": "e", "node-name": top, "writable": not use.read_only}
    return [*commands, {"execute": "block-export-add", "arguments": export}]


@pytest.mark.parametrize(
    "use", list(REFUSED), ids=["shared-reader", "shared-writer", "only-writer"]
)
async def test_we_see_the_locks_of_qemu_and_programs_treat_us_like_it(
    use: Use,
    run: Callable[[str], subprocess.CompletedProcess[str]],
    program: Callable[[str], str],
    graph: Graph,
    image: Path,
    short_tmp: Path,
) -> None:
    with storage_daemon(program, image, short_tmp, qemu_holds(image, use)):
        theirs = locked_bytes(image)
        refused_beside_qemu = {name for name in COMMANDS if refused(run(name))}

        for other, allowed in (
            (SHARED_READER, True),
            (CAREFUL_READER, use is SHARED_READER),
            (SHARED_WRITER, use is not ONLY_WRITER),
            (ONLY_WRITER, use is SHARED_READER),
            (Use(NONE, ALL), True),
            (Use(RESIZE, ALL), False),
        ):
            node = await open_image(graph, image, read_only=other.read_only)
            if allowed:
                graph.detach_root(hold(graph, node, other.perm, other.shared))
            else:
                with pytest.raises(CommandError, match="Is another process using the image"):
                    hold(graph, node, other.perm, other.shared)
            await graph.remove(node)
        assert locked_bytes(image) == theirs

    # The same bytes as we lock for the same use, and so the same refusals.
    hold(graph, await open_image(graph, image, read_only=use.read_only), use.perm, use.shared)
    assert locked_bytes(image) == theirs
    assert {name for name in COMMANDS if refused(run(name))} == refused_beside_qemu


@pytest.mark.interop("qemu-nbd")
async def test_we_refuse_to_write_alone_what_qemu_nbd_writes(
    program: Callable[[str], str], graph: Graph, image: Path, short_tmp: Path
) -> None:
    pid_file = short_tmp / "pid"
    command = [program("qemu-nbd"), "--fork", "-f", "raw", "-t", "-k", str(short_tmp / "s")]
    assert call_quietly([*command, f"--pid-file={pid_file}", str(image)]) == 0
    try:
        node = await open_image(graph, image)
        with pytest.raises(CommandError, match='Failed to get shared "write" lock'):
            hold(graph, node, ONLY_WRITER.perm, ONLY_WRITER.shared)
    finally:
        os.kill(int(pid_file.read_text()), 15)
