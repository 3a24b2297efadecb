"""A daemon whose disk is an export of another server, named by URI."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import nbd_peers
from tests.support.daemon_process import Daemon
from tests.support.live import KiB, MiB, blocks, client, program_run, scribble, serving, snapshot
from tests.support.nbd_peers import Peer
from tests.support.pki import Pki

Programs = Callable[[str], str]

SIZE = 8 * MiB
OLD = blocks(SIZE, 64 * KiB)


async def test_snapshot_of_a_disk_on_qemu_nbd(
    short_tmp: Path, program: Programs, rng: random.Random
) -> None:
    image, path = short_tmp / "image", short_tmp / "up"
    image.write_bytes(OLD)
    peer = nbd_peers.qemu_nbd(program("qemu-nbd"), image, path, "--export-name=x y")
    location = f"vda=nbd+unix:///x%20y?socket={path},open-timeout=20"
    try:
        with serving(short_tmp, location) as daemon:
            await snapshot(daemon, "vda", name="s")
            async with client(daemon, "vda") as guest:
                for _ in range(200):
                    await scribble(guest, rng)
                await guest.flush()
                live = bytes(await guest.read(0, SIZE))
            copy = short_tmp / "copy"
            await program_run(program("nbdcopy"), daemon.uri("vda@s"), copy)
            assert copy.read_bytes() == OLD
            assert daemon.stop() == 0
        assert image.read_bytes() == live != OLD
    finally:
        peer.stop()


async def test_disk_behind_tls(short_tmp: Path, program: Programs, pki: Pki) -> None:
    image, port = short_tmp / "image", nbd_peers.free_port()
    image.write_bytes(OLD)
    peer = Peer(
        *(program("nbdkit"), "-f", "-p", str(port), "-i", "127.0.0.1", "--tls=require"),
        *("--tls-verify-peer", f"--tls-certificates={pki.server}", "file", image),
    )
    uri = f"nbds://localhost:{port}/x?tls-certificates={pki.client('upstream')}"
    try:
        with serving(short_tmp, f"vda={uri},open-timeout=20") as daemon:
            async with client(daemon, "vda") as guest:
                assert await guest.read(0, SIZE) == OLD
    finally:
        peer.stop()


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("vda=nbd+unix:///x?socket=/nowhere/at/all", "No such file or directory"),
        ("vda=nbd+unix:///x?socket=/nowhere&x=y", "unknown parameter 'x'"),
        ("nbd+unix:///a%40b?socket=/nowhere", "give one as NAME=LOCATION"),
    ],
)
def test_mistakes_are_told_in_one_line(short_tmp: Path, location: str, text: str) -> None:
    with Daemon(short_tmp, location) as daemon:
        assert daemon.process.wait(20) != 0
    (line,) = [line for line in daemon.errors().splitlines() if text in line]
    assert "Traceback" not in daemon.errors()
    assert "nowhere" in line


def test_image_format_on_another_server_is_no_raw_disk(short_tmp: Path, program: Programs) -> None:
    image, path = short_tmp / "image", short_tmp / "up"
    image.write_bytes(b"QFI\xfb" + bytes(MiB))
    peer = nbd_peers.nbdkit(program("nbdkit"), image, path)
    location = f"vda=nbd+unix:///x?socket={path},open-timeout=20"
    try:
        with Daemon(short_tmp, location) as daemon:
            assert daemon.process.wait(30) != 0
        assert "looks like a qcow2 image" in daemon.errors()
        with serving(short_tmp, location + ",format=raw"):
            pass
    finally:
        peer.stop()
