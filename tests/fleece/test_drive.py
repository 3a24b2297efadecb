"""`qom-set` of `drive`: another node under a live export, whose clients notice nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.cli.client import Client, CommandFailed
from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import blocks, client, eventually, read_export, serving
from tests.support.nbd_client import NbdClient, connected
from tests.support.storage_daemon import StorageDaemon

MIB = 1 << 20
OLD = blocks(MIB, 64 << 10)
VDA = "/machine/peripheral/vda/virtio-backend"
NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    (short_tmp / "vda.raw").write_bytes(OLD)
    with serving(short_tmp, short_tmp / "vda.raw") as running:
        yield running


class Asking:
    """A monitor whose commands do not hold up the test's own clients."""

    def __init__(self, monitor: Client) -> None:
        self._monitor = monitor

    async def __call__(self, command: str, **arguments: object):
        dash = "_" if "_" in command else "-"  # as in the command, so in its arguments
        spelled = {name.replace("_", dash): value for name, value in arguments.items()}
        return await asyncio.to_thread(self._monitor.execute, command, spelled)

    async def refused(self, command: str, **arguments: object) -> str:
        with pytest.raises(CommandFailed) as caught:
            await self(command, **arguments)
        return str(caught.value)

    async def set_drive(self, node: str) -> None:
        assert await self("qom-set", path=VDA, property="drive", value=node) == {}

    async def drive(self) -> str:
        return await self("qom-get", path=VDA, property="drive")

    async def edges(self) -> list[tuple[str, str, str]]:
        found = await self("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in found["nodes"]}
        return sorted(
            (names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in found["edges"]
        )


@pytest.fixture
def ask(daemon: Daemon) -> Iterator[Asking]:
    with Client(str(daemon.control)) as monitor:
        yield Asking(monitor)


async def make_filter(ask: Asking, folder: Path, below: str) -> None:
    temp = make_disk(folder / "temp.raw", MIB, b"\0")
    await ask("blockdev-add", driver="file", node_name="temp", filename=str(temp))
    options = {"driver": "copy-before-write", "node-name": "cbw", "file": below, "target": "temp"}
    await ask("blockdev-add", **options)


async def scribble(
    one: NbdClient, model: bytearray, rng: random.Random, stop: asyncio.Event
) -> None:
    """Write, and read what was written, until told to stop."""
    while not stop.is_set():
        offset = rng.randrange(MIB - 4096)
        data = rng.randbytes(rng.randrange(4096) + 1)
        await one.write(offset, data)
        model[offset : offset + len(data)] = data
        offset = rng.randrange(MIB - 4096)
        assert await one.read(offset, 4096) == model[offset : offset + 4096]


async def test_a_filter_by_hand_comes_and_goes_under_a_busy_guest(
    daemon: Daemon, ask: Asking, rng: random.Random
) -> None:
    """T-F3, with qom-set in place of the device."""

    async def exports_are_gone() -> bool:
        return [row["id"] for row in await ask("query-block-exports")] == ["vda"]

    model = bytearray(OLD)
    stop = asyncio.Event()
    async with client(daemon, "vda") as guest, asyncio.TaskGroup() as tasks:
        tasks.create_task(scribble(guest, model, rng, stop))
        for _ in range(3):
            await make_filter(ask, daemon.folder, "vda")
            await ask.set_drive("cbw")
            await ask("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
            export = {"type": "nbd", "id": "snap", "node-name": "access", "name": "snap"}
            await ask("block-export-add", **export)
            assert await ask.drive() == "cbw"
            first = await read_export(daemon, "snap")
            assert await read_export(daemon, "snap") == first

            text = await ask.refused("qom-set", path=VDA, property="drive", value="vda")
            assert "Permission conflict on node 'vda'" in text
            assert await ask.drive() == "cbw"
            assert await read_export(daemon, "snap") == first

            await ask("block-export-del", id="snap", mode="hard")
            await eventually(exports_are_gone)
            await ask("blockdev-del", node_name="access")
            await ask.set_drive("vda")
            await ask("blockdev-del", node_name="cbw")
            await ask("blockdev-del", node_name="temp")
        stop.set()
    assert await read_export(daemon, "vda") == model


async def test_the_filter_of_a_snapshot_is_never_left_out(daemon: Daemon, ask: Asking) -> None:
    await ask("fleece-snapshot-create", disks=["vda"], name="one")
    top, before = await ask.drive(), await ask.edges()
    assert "Permission conflict" in await ask.refused(
        "qom-set", path=VDA, property="drive", value="vda"
    )
    assert (await ask.drive(), await ask.edges()) == (top, before)
    await make_filter(ask, daemon.folder, top)
    await ask.set_drive("cbw")
    async with client(daemon, "vda") as guest:
        await guest.write(0, b"\xaa" * 4096)
        await ask("fleece-snapshot-create", disks=["vda"], name="two")
        await guest.write(0, b"\xbb" * 4096)
    assert await read_export(daemon, "vda@one") == OLD
    assert await read_export(daemon, "vda@two") == b"\xaa" * 4096 + OLD[4096:]


async def test_the_filter_of_a_running_backup_is_never_left_out(
    daemon: Daemon, ask: Asking
) -> None:
    target = make_disk(daemon.folder / "target.raw", MIB, b"\0")
    await ask("blockdev-add", driver="file", node_name="target", filename=str(target))
    backup = {"device": "vda", "target": "target", "sync": "none", "job-id": "j"}
    await ask("blockdev-backup", **backup)
    assert "Permission conflict" in await ask.refused(
        "qom-set", path=VDA, property="drive", value="vda"
    )
    text = await ask.refused("fleece-disk-remove", disk="vda")
    assert text.startswith("disk 'vda' is in use by job 'j'")
    async with client(daemon, "vda") as guest:  # it is served as before
        await guest.write(0, b"\xaa" * 65536)
    assert target.read_bytes()[:65536] == OLD[:65536]
    await ask("job-cancel", id="j")


async def test_io_limits_stay_with_the_export(daemon: Daemon, ask: Asking) -> None:
    await ask("block_set_io_throttle", id="vda", **(NO_LIMITS | {"iops": 5000}))
    await make_filter(ask, daemon.folder, "vda")
    await ask.set_drive("cbw")
    assert await ask.drive() == "cbw"
    (row,) = await ask("query-block")
    assert (row["inserted"]["node-name"], row["inserted"]["iops"]) == ("cbw", 5000)
    await ask("block_set_io_throttle", id="vda", **NO_LIMITS)
    assert await ask.drive() == "cbw"
    await ask.set_drive("vda")
    assert ("", "root", "vda") in await ask.edges()


async def test_what_is_refused_changes_nothing(daemon: Daemon, ask: Asking) -> None:
    for name, more in (
        ("small", {"size": 4096}),
        ("ro", {"size": MIB, "read-only": True}),
        ("other", {"size": MIB}),
    ):
        await ask("blockdev-add", driver="null-co", node_name=name, **more)
    before = await ask.edges()
    for value, text in (
        ("nope", "Property 'virtio-blk-device.drive' can't find value 'nope'"),
        (5, "Invalid parameter type for 'drive', expected: string"),
        ("small", "Nodes 'vda' and 'small' have different sizes (1048576 and 4096 bytes)"),
        ("ro", "Block node 'ro' is read-only"),
    ):
        assert text in await ask.refused("qom-set", path=VDA, property="drive", value=value)
    for path in ("/machine/peripheral/no", "/machine/peripheral", "vda"):
        assert f"Device '{path}' not found" in await ask.refused(
            "qom-set", path=path, property="drive", value="other"
        )
    assert "Property 'virtio-blk-device.serial' not found" in await ask.refused(
        "qom-get", path=VDA, property="serial"
    )
    await ask("fleece-snapshot-create", disks=["vda"], name="one")
    path = "/machine/peripheral/vda@one/virtio-backend"
    assert "not found" in await ask.refused("qom-set", path=path, property="drive", value="other")
    await ask("fleece-snapshot-delete", disk="vda", snapshot="one")
    assert await ask.edges() == before


async def test_the_tree_of_objects_shows_the_drives(ask: Asking) -> None:
    async def listed(path: str) -> dict[str, str]:
        return {row["name"]: row["type"] for row in await ask("qom-list", path=path)}

    assert (await listed("/"))["machine"] == "child<container>"
    assert (await listed("/machine"))["peripheral"] == "child<container>"
    assert (await listed("/machine/peripheral"))["vda"] == "child<virtio-blk-pci>"
    proxy = await listed("/machine/peripheral/vda")
    assert (proxy["virtio-backend"], proxy["drive"]) == ("child<virtio-blk-device>", "str")
    assert await listed(VDA) == {"type": "string", "drive": "str"}
    assert await ask("qom-get", path=VDA, property="type") == "virtio-blk-device"
    (row,) = await ask("query-block")
    assert row["qdev"] == VDA


async def test_writable_exports_of_a_storage_daemon_are_drives(short_tmp: Path) -> None:
    (short_tmp / "a.raw").write_bytes(OLD)
    with StorageDaemon(
        short_tmp,
        *("--blockdev", "file,node-name=a,filename=a.raw"),
        *("--blockdev", "null-co,node-name=temp,size=1048576"),
        *("--blockdev", "copy-before-write,node-name=cbw,file=a,target=temp"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=live,node-name=a,name=live,writable=on"),
        *("--export", "nbd,id=ro,node-name=temp,name=ro"),
    ) as daemon:
        (row,) = daemon.ask("query-block")
        path = row["qdev"]
        assert (row["device"], row["inserted"]["node-name"]) == ("live", "a")
        async with connected(str(short_tmp / "nbd.sock"), "live") as guest:
            daemon.ask("qom-set", {"path": path, "property": "drive", "value": "cbw"})
            await guest.write(0, b"\xaa" * 4096)
            assert daemon.ask("query-block")[0]["inserted"]["node-name"] == "cbw"
            assert await guest.read(0, 8192) == b"\xaa" * 4096 + OLD[4096:8192]
        path = path.replace("live", "ro")
        text = daemon.error("qom-set", {"path": path, "property": "drive", "value": "a"})
        assert text == f"Device '{path}' not found"
