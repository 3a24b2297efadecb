"""QEMU's image locks: whose image it is, everybody can tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import MiB, eventually, run, serving, started

pytestmark = pytest.mark.interop("qemu-img", "qemu-io", "qemu-nbd")

Program = Callable[[str], str]


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    return make_disk(short_tmp / "vda.raw", MiB)


def refused(program: Program, tool: str, *args: str | Path) -> None:
    done = run(program(tool), *args, code=1)
    assert "lock" in done.stderr
    assert "Is another process using the image" in done.stderr


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_qemu_tools_refuse_a_disk_that_we_serve(
    short_tmp: Path, disk: Path, program: Program, *, with_snapshot: bool
) -> None:
    other = make_disk(short_tmp / "other.raw", MiB)
    with serving(short_tmp, disk) as daemon:
        if with_snapshot:
            assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        refused(program, "qemu-io", "-f", "raw", "-c", "write 0 1", disk)
        refused(program, "qemu-img", "convert", "-f", "raw", "-O", "raw", disk, short_tmp / "c")
        refused(program, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", other, disk)
        refused(program, "qemu-img", "resize", "-f", "raw", disk, "2M")
        refused(program, "qemu-nbd", "-f", "raw", "-k", short_tmp / "q", disk)
        assert daemon.run("status").code == 0
        # qemu-io reads a raw image beside a writer, whoever that is.
        run(program("qemu-io"), "-r", "-f", "raw", "-c", "read 0 1", disk)
    assert disk.read_bytes() == b"\1" * MiB
    run(program("qemu-io"), "-f", "raw", "-c", "write -P 1 0 1", disk)


def test_qemu_tools_refuse_the_temporary_image(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        (temp,) = daemon.state.glob("vda/snapshots/one/temp.raw")
        refused(program, "qemu-io", "-f", "raw", "-c", "write 0 1", temp)


def test_readers_may_share_a_disk_that_is_read_only(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    with serving(short_tmp, f"{disk},read-only=on") as daemon:
        run(program("qemu-io"), "-r", "-f", "raw", "-c", "read 0 1", disk)
        run(program("qemu-img"), "compare", "-f", "raw", "-F", "raw", disk, daemon.uri("vda"))


async def test_a_disk_of_qemu_nbd_is_refused_in_one_line(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    sock = short_tmp / "q.sock"
    with started(program("qemu-nbd"), "-t", "-f", "raw", "-k", sock, disk):
        await eventually(sock.exists)
        assert_refused(short_tmp, disk)
        with serving(short_tmp, f"{disk},locking=off"):
            pass  # the one who asks for it may
    with serving(short_tmp, disk):
        pass


@pytest.mark.interop("qemu-storage-daemon")
async def test_a_disk_of_qemu_storage_daemon_is_refused_in_one_line(
    short_tmp: Path, disk: Path, program: Program
) -> None:
    sock = short_tmp / "q.sock"
    options = ("--blockdev", f"driver=file,node-name=a,filename={disk}")
    options += ("--nbd-server", f"addr.type=unix,addr.path={sock}")
    options += ("--export", "type=nbd,id=a,node-name=a,writable=on")
    with started(program("qemu-storage-daemon"), *options) as other:
        await eventually(lambda: accepts(program, sock) or other.poll() is not None)
        assert other.poll() is None
        assert_refused(short_tmp, disk)


def accepts(program: Program, sock: Path) -> bool:
    uri = f"nbd+unix:///a?socket={sock}"
    return run(program("qemu-img"), "info", uri, code=None).returncode == 0


def assert_refused(folder: Path, disk: Path) -> None:
    with Daemon(folder, disk) as daemon:
        assert daemon.process.wait(20) in (1, 4)
        said = [line for line in daemon.errors().splitlines() if line.startswith("nbdfleece:")]
        assert len(said) == 1, daemon.errors()
        assert str(disk) in said[0]
        assert "lock" in said[0]
        assert "Traceback" not in daemon.errors()


def test_locking_off_lets_others_in(short_tmp: Path, disk: Path, program: Program) -> None:
    with serving(short_tmp, f"{disk},locking=off"):
        run(program("qemu-io"), "-f", "raw", "-c", "write -P 7 0 4k", disk)
    assert disk.read_bytes()[:4096] == b"\7" * 4096
