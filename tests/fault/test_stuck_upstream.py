"""A disk on another server that stops answering harms its own export alone, and can be removed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece.protocol.nbd import constants as c
from tests.support import nbd_peers
from tests.support.live import (
    KiB,
    MiB,
    ask,
    blocks,
    cli,
    client,
    eventually,
    has_in_flight,
    read_export,
    serving,
    snapshot,
    soon,
)
from tests.support.nbd_peers import Peer

SIZE = 4 * MiB
OLD = blocks(SIZE, 64 * KiB)
END_S = 50.0  # waits of a forced removal: requests, snapshots, then once more


@pytest.fixture
def peer(short_tmp: Path, program: Callable[[str], str]) -> Iterator[Peer]:
    (short_tmp / "image").write_bytes(OLD)
    peer = nbd_peers.nbdkit(program("nbdkit"), short_tmp / "image", short_tmp / "up")
    yield peer
    peer.stop()


def stop_answering(peer: Peer) -> None:
    assert peer.process is not None
    os.killpg(peer.process.pid, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.deadline(120)
@pytest.mark.parametrize("with_snapshot", [False, True])
async def test_other_disks_do_not_notice_and_the_stuck_one_can_be_removed(
    short_tmp: Path, peer: Peer, *, with_snapshot: bool
) -> None:
    good = short_tmp / "good.raw"
    good.write_bytes(OLD)
    location = f"bad=nbd+unix:///x?socket={short_tmp / 'up'},open-timeout=20,reconnect-delay=1000"
    with serving(short_tmp, location, good, disks=2) as daemon:
        if with_snapshot:
            await snapshot(daemon, "bad", name="one")
        async with client(daemon, "bad") as victim, client(daemon, "good") as guest:
            stop_answering(peer)
            for number in range(20):
                await victim.submit(c.NBD_CMD_WRITE, number * 4096, 4096, data=b"\xee" * 4096)
            await eventually(lambda: has_in_flight(daemon, 20))

            await soon(guest.write(100, b"\xaa" * MiB))
            await soon(guest.flush())
            assert len(await soon(read_export(daemon, "good"))) == SIZE
            await soon(snapshot(daemon, "good", name="two"))
            assert (await soon(cli(daemon, "status"))).code == 0

            removal = ask(daemon, "fleece-disk-remove", {"disk": "bad", "force": True})
            await soon(removal, END_S)
            assert [row["disk"] for row in await ask(daemon, "query-fleece-disks")] == ["good"]
            await soon(guest.write(100, b"\xbb" * MiB))
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.deadline(120)
async def test_idle_disk_on_a_stuck_server_does_not_keep_the_daemon(
    short_tmp: Path, peer: Peer
) -> None:
    """The last flush gets no answer: that is said, and the end comes."""
    location = f"bad=nbd+unix:///x?socket={short_tmp / 'up'},open-timeout=20"
    with serving(short_tmp, location) as daemon:
        stop_answering(peer)
        daemon.stop()
        assert "the last flush of disk 'bad': no answer" in daemon.errors()
