"""External snapshots, images made by jobs, and backing files that are changed while in use."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import make_disk
from tests.support.images import FORMATS, add_overlay, create, make_image, options
from tests.support.live import blocks, run
from tests.support.nbd_client import NbdClient, connected
from tests.support.qcow2 import check_qcow2
from tests.support.storage_daemon import StorageDaemon

MIB = 1 << 20
OLD = blocks(MIB, 64 << 10)
SERVER = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[StorageDaemon]:
    (short_tmp / "base.raw").write_bytes(OLD)
    base = "file,node-name=base,filename=base.raw,discard=unmap"
    live = "nbd,id=live,node-name=base,name=live,writable=on"
    with StorageDaemon(short_tmp, "--blockdev", base, *SERVER, "--export", live) as running:
        yield running


@pytest.fixture(params=FORMATS)
def driver(request: pytest.FixtureRequest) -> str:
    return request.param


def edges(daemon: StorageDaemon) -> list[tuple[str, str, str]]:
    found = daemon.ask("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in found["nodes"]}
    return sorted((names[e["parent"]], e["name"], names[e["child"]]) for e in found["edges"])


def guest(daemon: StorageDaemon):
    return connected(str(daemon.folder / "nbd.sock"), "live")


def node_of(daemon: StorageDaemon) -> str:
    rows = daemon.ask("query-block-exports")
    return next(row["node-name"] for row in rows if row["id"] == "live")


def reopen_error(daemon: StorageDaemon, *given: dict) -> str:
    before = edges(daemon)
    text = daemon.error("blockdev-reopen", {"options": list(given)})
    assert edges(daemon) == before
    return text


# --- blockdev-snapshot ---------------------------------------------------------------------------


async def test_guests_write_to_the_overlay_from_the_instant_on(
    daemon: StorageDaemon, driver: str
) -> None:
    add_overlay(daemon, driver, "ov", MIB)
    async with guest(daemon) as one:
        await one.write(0, b"\xaa" * 4096)
        assert daemon.ask("blockdev-snapshot", {"node": "base", "overlay": "ov"}) == {}
        assert node_of(daemon) == "ov"
        await one.write(4096, b"\xbb" * 4096)
        await one.zero(MIB - 4096, 4096)
        await one.flush()
        expected = b"\xaa" * 4096 + b"\xbb" * 4096 + OLD[8192:-4096] + bytes(4096)
        assert await one.read(0, MIB) == expected
    assert (daemon.folder / "base.raw").read_bytes() == b"\xaa" * 4096 + OLD[4096:]
    assert daemon.error("blockdev-del", {"node-name": "base"}) == (
        "Node 'base' is busy: node is used as backing hd of 'ov'"
    )
    assert daemon.error("block_resize", {"node-name": "base", "size": 512}).startswith(
        "Node 'base' is busy"
    )


def test_what_is_no_overlay_is_refused(daemon: StorageDaemon, driver: str) -> None:
    add_overlay(daemon, driver, "ov", MIB)
    add_overlay(daemon, driver, "used", MIB, "base")
    add_overlay(daemon, driver, "small", 65536)
    daemon.ask("blockdev-add", {"driver": "null-co", "node-name": "null", "size": MIB})
    daemon.ask("blockdev-del", {"node-name": "used"})
    daemon.ask("blockdev-add", options(driver, "used", "null"))
    before = edges(daemon)
    for node, overlay, error in (
        ("nope", "ov", "Cannot find device='nope' nor node-name='nope'"),
        ("base", "nope", "Cannot find device='nope' nor node-name='nope'"),
        ("base", "null", "Node 'null' is busy: node is used as backing hd of 'used'"),
        ("base", "base", "The overlay is already in use"),
        ("base", "used", "The overlay already has a backing image"),
        ("ov", "ov", "Making 'ov' a backing child of 'ov' would create a cycle"),
        ("null", "ov", "Node 'null' is busy: node is used as backing hd of 'used'"),
        ("base", "small", "Nodes 'base' and 'small' have different sizes (1048576 and 65536"),
    ):
        arguments = {"node": node, "overlay": overlay}
        assert daemon.error("blockdev-snapshot", arguments).startswith(error), arguments
        assert edges(daemon) == before
    daemon.ask("blockdev-add", {"driver": "null-co", "node-name": "plain", "size": MIB})
    assert daemon.error("blockdev-snapshot", {"node": "base", "overlay": "plain"}) == (
        "The overlay does not support backing images"
    )


def test_a_node_under_a_job_is_busy(daemon: StorageDaemon, driver: str) -> None:
    add_overlay(daemon, driver, "ov", MIB)
    daemon.ask("blockdev-add", {"driver": "null-co", "node-name": "t", "size": MIB})
    backup = {"device": "base", "target": "t", "sync": "none", "job-id": "j"}
    daemon.ask("blockdev-backup", backup)
    for node, overlay in (("t", "ov"), ("ov", "t")):
        text = daemon.error("blockdev-snapshot", {"node": node, "overlay": overlay})
        assert "block device is in use by block job: backup" in text
    daemon.ask("job-cancel", {"id": "j"})


async def test_a_transaction_that_fails_takes_the_overlay_back(
    daemon: StorageDaemon, driver: str
) -> None:
    add_overlay(daemon, driver, "ov", MIB)
    before = edges(daemon)
    sync = {
        "node-name": "ov",
        "snapshot-file": str(daemon.folder / "sync"),
        "snapshot-node-name": "sync",
        "format": driver,
    }
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": "base", "overlay": "ov"}},
        {"type": "blockdev-snapshot-sync", "data": sync},
        {"type": "abort", "data": {}},
    ]
    async with guest(daemon) as one:
        text = daemon.error("transaction", {"actions": actions})
        assert text == "Transaction aborted using Abort action"
        assert edges(daemon) == before
        await one.write(0, b"\xaa" * 4096)
        assert daemon.ask("transaction", {"actions": actions[:2]}) == {}
        assert node_of(daemon) == "sync"
        await one.write(4096, b"\xbb" * 4096)
        assert await one.read(0, 12288) == b"\xaa" * 4096 + b"\xbb" * 4096 + OLD[8192:12288]
    assert (daemon.folder / "base.raw").read_bytes() == b"\xaa" * 4096 + OLD[4096:]


async def test_a_snapshot_of_the_right_instant_survives_an_overlay_below_it(
    daemon: StorageDaemon, driver: str
) -> None:
    """The filter of copy-before-write stays in the path, whatever is put between."""
    for name in ("below", "above"):
        add_overlay(daemon, driver, name, MIB)
    daemon.ask(
        "blockdev-add",
        {
            "driver": "file",
            "node-name": "temp",
            "filename": str(make_disk(daemon.folder / "temp", MIB)),
        },
    )
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "base", "target": "temp"}
    daemon.ask("blockdev-add", cbw)
    path = daemon.ask("query-block")[0]["qdev"]
    daemon.ask("qom-set", {"path": path, "property": "drive", "value": "cbw"})
    access = {"driver": "snapshot-access", "node-name": "access", "file": "cbw"}
    daemon.ask("blockdev-add", access)
    snap = {"type": "nbd", "id": "snap", "name": "snap", "node-name": "access"}
    daemon.ask("block-export-add", snap)
    async with guest(daemon) as one, connected(str(daemon.folder / "nbd.sock"), "snap") as reader:
        await one.write(0, b"\x01" * 70000)
        daemon.ask("blockdev-snapshot", {"node": "base", "overlay": "below"})
        assert ("cbw", "file", "below") in edges(daemon)
        await one.write(65536, b"\x02" * 70000)
        assert await reader.read(0, MIB) == OLD
        daemon.ask("blockdev-snapshot", {"node": "cbw", "overlay": "above"})
        assert node_of(daemon) == "above"
        assert ("access", "file", "cbw") in edges(daemon)
        await one.write(131072, b"\x03" * 70000)
        assert await reader.read(0, MIB) == OLD
        expected = b"\x01" * 65536 + b"\x02" * 65536 + b"\x03" * 70000
        assert await one.read(0, len(expected)) == expected


async def test_requests_of_a_guest_do_not_fail_under_overlays(
    daemon: StorageDaemon, driver: str, rng: random.Random
) -> None:
    """T-N8: large requests run on the export while overlays are put on top."""
    model = bytearray(OLD)

    async def write(one: NbdClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            offset = rng.randrange(MIB)
            data = rng.randbytes(MIB - offset)
            await one.write(offset, data)
            model[offset:] = data
            assert await one.read(0, MIB) == model

    stop = asyncio.Event()
    async with guest(daemon) as one, asyncio.TaskGroup() as tasks:
        tasks.create_task(write(one, stop))
        for number in range(6):
            name = f"ov{number}"
            await asyncio.to_thread(add_overlay, daemon, driver, name, MIB)
            arguments = {"node": node_of(daemon), "overlay": name}
            assert await asyncio.to_thread(daemon.ask, "blockdev-snapshot", arguments) == {}
        stop.set()
    assert node_of(daemon) == "ov5"


# --- blockdev-snapshot-sync --------------------------------------------------------------------


@pytest.mark.interop("qemu-img")
async def test_an_overlay_in_a_new_file(
    daemon: StorageDaemon, program: Callable[[str], str]
) -> None:
    path = daemon.folder / "new.qcow2"
    arguments = {
        "node-name": "base",
        "snapshot-file": str(path),
        "snapshot-node-name": "new",
    }
    async with guest(daemon) as one:
        assert daemon.ask("blockdev-snapshot-sync", arguments) == {}
        await one.write(512, b"\xaa" * 512)
        await one.flush()
    daemon.ask("block-export-del", {"id": "live", "mode": "hard"})
    daemon.event("BLOCK_EXPORT_DELETED")
    daemon.ask("blockdev-del", {"node-name": "new"})
    daemon.ask("blockdev-del", {"node-name": "base"})
    told = run(program("qemu-img"), "info", "--output=json", path).stdout
    assert '"backing-filename": "base.raw"' in told
    flat = daemon.folder / "flat"
    run(program("qemu-img"), "convert", "-O", "raw", path, flat)
    assert flat.read_bytes() == OLD[:512] + b"\xaa" * 512 + OLD[1024:]


def test_files_that_cannot_be_overlays(daemon: StorageDaemon) -> None:
    file = str(daemon.folder / "new")
    sync, base = {"snapshot-file": file}, {"node-name": "base", "snapshot-node-name": "n"}
    (daemon.folder / "not").write_bytes(OLD)
    for arguments, error in (
        (sync, "Cannot find device='' nor node-name=''"),
        ({**sync, "device": "no"}, "Cannot find device='no' nor node-name=''"),
        ({**sync, "node-name": "no"}, "Cannot find device='' nor node-name='no'"),
        ({**sync, "node-name": "base"}, "New overlay node-name missing"),
        ({**sync, **base, "snapshot-node-name": "base"}, "New overlay node-name already in use"),
        ({**sync, **base, "snapshot-node-name": "1"}, "Invalid node-name: '1'"),
        ({**sync, **base, "format": "nope"}, "Invalid snapshot format 'nope'"),
        ({**sync, **base, "format": "raw"}, "Driver does not support blockdev-create"),
        ({**sync, **base, "format": "file"}, "Format driver 'file' does not support backing"),
        ({**base, "snapshot-file": "/nope/x"}, "Could not create '/nope/x': No such file"),
        ({**base, "snapshot-file": file, "mode": "existing"}, "Could not open"),
        ({**base, "snapshot-file": str(daemon.folder / "not"), "mode": "existing"}, "Could not"),
        ({**base, "snapshot-file": str(daemon.folder / "base.raw")}, "Failed to get"),
    ):
        before = edges(daemon), [row["node-name"] for row in daemon.ask("query-named-block-nodes")]
        assert daemon.error("blockdev-snapshot-sync", arguments).startswith(error), arguments
        assert edges(daemon) == before[0]
        nodes = [row["node-name"] for row in daemon.ask("query-named-block-nodes")]
        assert nodes == before[1]
    assert not (daemon.folder / "new").exists()
    assert (daemon.folder / "base.raw").read_bytes() == OLD


def test_the_name_of_what_is_behind_is_changed(daemon: StorageDaemon) -> None:
    make_image(daemon, "qcow2", "ov", MIB, backing_file="base.raw", backing_fmt="raw")
    daemon.ask("blockdev-add", options("qcow2", "ov", "base"))
    add_overlay(daemon, "qcow2", "top", MIB, "ov")

    def change(device: str, image: str, name: str = "other.raw") -> dict:
        arguments = {"device": device, "image-node-name": image, "backing-file": name}
        return daemon.answer("change-backing-file", arguments)

    for device, image, error in (
        ("nope", "ov", "Cannot find device='nope' nor node-name='nope'"),
        ("top", "nope", "Cannot find device='' nor node-name='nope'"),
        ("ov", "ov", "Need a root block node"),
        ("top", "base", "not allowing backing file change on an image without a backing file"),
        ("top", "top", "Could not change backing file to"),
    ):
        name = "x" * 70000 if error.startswith("Could") else "other.raw"
        assert change(device, image, name)["error"]["desc"].startswith(error)
    assert change("top", "top") == {"return": {}}
    image = (daemon.folder / "top.qcow2").read_bytes()[:65536]
    assert b"other.raw" in image


# --- blockdev-create ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_a_file_is_made(daemon: StorageDaemon, mode: str) -> None:
    path = daemon.folder / "made"
    path.write_bytes(b"\xff" * 9000)
    size = {"filename": str(path), "size": 5001, "preallocation": mode}
    assert create(daemon, "file", **size) is None
    assert path.read_bytes() == bytes(5001)
    assert (path.stat().st_blocks > 0) == (mode != "off")


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_an_image_is_made_with_its_space(
    daemon: StorageDaemon, program: Callable[[str], str], mode: str
) -> None:
    path = daemon.folder / "made"
    path.write_bytes(b"\xff" * 9000)
    file = {"driver": "file", "filename": str(path)}
    assert create(daemon, "qcow2", file=file, size=3 * MIB, preallocation=mode) is None
    run(program("qemu-img"), "check", "-f", "qcow2", path)
    mapped = json.loads(run(program("qemu-img"), "map", "--output=json", path).stdout)
    assert all(extent["data"] for extent in mapped) == (mode != "off")
    flat = daemon.folder / "flat"
    run(program("qemu-img"), "convert", "-O", "raw", path, flat)
    assert flat.read_bytes() == bytes(3 * MIB)
    assert (512 * path.stat().st_blocks >= 3 * MIB) == (mode in ("falloc", "full"))


def test_files_that_are_not_made(daemon: StorageDaemon) -> None:
    made = str(daemon.folder / "made")
    assert create(daemon, "file", filename="/nope/x", size=1) == (
        "Could not create '/nope/x': No such file or directory"
    )
    assert create(daemon, "file", filename=made, size=1, preallocation="metadata") == (
        "Unsupported preallocation mode: metadata"
    )
    assert "Could not resize" in str(create(daemon, "file", filename=made, size=(1 << 63) - 1))
    assert not os.path.exists(made)
    assert "Is another process using" in str(
        create(daemon, "file", filename=str(daemon.folder / "base.raw"), size=5)
    )
    assert (daemon.folder / "base.raw").read_bytes() == OLD
    assert "regular file" in str(create(daemon, "file", filename="/dev/null", size=5))
    assert create(daemon, "qcow2", file="nope", size=5) == (
        "Cannot find device='nope' nor node-name='nope'"
    )
    assert "Permission conflict" in str(create(daemon, "qcow2", file="base", size=5))
    assert "Cluster size must be" in str(
        create(daemon, "qcow2", file="base", size=5, cluster_size=5)
    )
    assert daemon.error("blockdev-create", {"job-id": "j", "options": {"driver": "raw"}}) == (
        "Driver does not support blockdev-create"
    )
    file = {"driver": "file", "filename": made, "size": 0}
    assert daemon.error("blockdev-create", {"job-id": "1", "options": file}) == (
        "Invalid job ID '1'"
    )


def test_a_job_create_is_no_block_job(daemon: StorageDaemon) -> None:
    file = {"driver": "file", "filename": str(daemon.folder / "made"), "size": 5}
    daemon.ask("blockdev-create", {"job-id": "j", "options": file})
    while daemon.ask("query-jobs")[0]["status"] != "concluded":
        pass
    assert daemon.ask("query-jobs") == [
        {
            "id": "j",
            "type": "create",
            "status": "concluded",
            "current-progress": 1,
            "total-progress": 1,
        }
    ]
    assert daemon.ask("query-block-jobs") == []
    answer = daemon.answer("block-job-dismiss", {"id": "j"})
    assert answer["error"] == {"class": "DeviceNotActive", "desc": "Block job 'j' not found"}
    daemon.ask("job-dismiss", {"id": "j"})
    assert {event["event"] for event in daemon.events} == {"JOB_STATUS_CHANGE"}


# --- blockdev-reopen of what is behind (T-R2, T-R4, T-R7, T-R10, T-R14) --------------------


def test_backing_by_name_null_and_missing(daemon: StorageDaemon, driver: str) -> None:
    """T-R2, T-R4."""
    add_overlay(daemon, driver, "ov", MIB, "base")
    daemon.ask("blockdev-add", {"driver": "null-co", "node-name": "null", "size": MIB})
    given = options(driver, "ov", "base")
    missing = {name: value for name, value in given.items() if name != "backing"}
    for wrong, error in (
        (missing, "backing is missing for 'ov'"),
        ({**given, "backing": "nope"}, "Cannot find device='' nor node-name='nope'"),
        ({**given, "backing": ""}, "Cannot find device='' nor node-name=''"),
        ({**given, "backing": "ov"}, "Making 'ov' a backing child of 'ov' would create a cycle"),
        ({**given, "backing": {"driver": "null-co"}}, "Cannot change the option 'backing.driver'"),
    ):
        assert reopen_error(daemon, wrong) == error
    daemon.ask("blockdev-reopen", {"options": [given]})
    assert ("ov", "backing", "base") in edges(daemon)
    assert daemon.error("blockdev-del", {"node-name": "base"}).startswith("Node base is in use")

    daemon.ask("blockdev-reopen", {"options": [{**given, "backing": None}]})
    assert not any(edge[1] == "backing" for edge in edges(daemon))
    assert reopen_error(daemon, {**given, "backing": {"driver": "null-co"}}) == (
        "Cannot change the option 'backing.driver'"
    )
    daemon.ask("blockdev-reopen", {"options": [{**given, "backing": "null"}]})
    assert daemon.error("blockdev-del", {"node-name": "null"}) == (
        "Node 'null' is busy: node is used as backing hd of 'ov'"
    )
    for name in ("ov", "null"):
        daemon.ask("blockdev-del", {"node-name": name})


def test_a_nested_backing_goes_when_it_is_replaced(daemon: StorageDaemon, driver: str) -> None:
    inline = {"driver": "null-co", "node-name": "inline", "size": MIB, "read-only": True}
    add_overlay(daemon, driver, "ov", MIB, inline)
    given = options(driver, "ov", inline)
    assert reopen_error(daemon, {**given, "backing": {**inline, "size": 5}}) == (
        "Cannot change the option 'size'"
    )
    daemon.ask("blockdev-reopen", {"options": [given]})
    daemon.ask("blockdev-reopen", {"options": [{**given, "backing": "base"}]})
    names = [row["node-name"] for row in daemon.ask("query-named-block-nodes")]
    assert "inline" not in names


def test_a_backing_by_name_keeps_its_own_options(daemon: StorageDaemon, driver: str) -> None:
    """T-R10."""
    options_of_null = {"driver": "null-co", "node-name": "null", "size": MIB, "read-only": True}
    daemon.ask("blockdev-add", options_of_null)
    add_overlay(daemon, driver, "ov", MIB, "null")
    given = options(driver, "ov", "null")
    daemon.ask("blockdev-reopen", {"options": [{**given, "discard": "unmap"}]})
    daemon.ask("blockdev-reopen", {"options": [given]})
    rows = {row["node-name"]: row for row in daemon.ask("query-named-block-nodes")}
    assert rows["null"]["ro"]
    assert not rows["ov"]["ro"]


async def test_every_chain_of_three_gives_the_expected_bytes(
    daemon: StorageDaemon, driver: str
) -> None:
    """T-R7 and T-R14: three images with a third of the disk each, in every order; no cycle."""
    names, third = ("x", "y", "z"), 1 << 16
    for number, name in enumerate(names):
        add_overlay(daemon, driver, name, 3 * third)
        export = {"type": "nbd", "id": name, "name": name, "node-name": name, "writable": True}
        daemon.ask("block-export-add", export)
        async with connected(str(daemon.folder / "nbd.sock"), name) as one:
            await one.write(number * third, name.encode() * third)
            await one.flush()
        daemon.ask("block-export-del", {"id": name, "mode": "hard"})
        daemon.event("BLOCK_EXPORT_DELETED")
    chain: dict[str, str | None] = dict.fromkeys(names)
    rng = random.Random(7)
    refused = 0
    for _ in range(60):
        chosen = rng.sample(names, rng.randrange(3) + 1)
        wanted = {name: rng.choice((None, *names)) for name in chosen}
        given = [options(driver, name, behind) for name, behind in wanted.items()]
        if _has_cycle({**chain, **wanted}):
            assert "would create a cycle" in reopen_error(daemon, *given)
            refused += 1
            continue
        daemon.ask("blockdev-reopen", {"options": given})
        assert "Failed to find node" in reopen_error(
            daemon, *(options(driver, name) for name in names), options(driver, "nope")
        )
        chain |= wanted
        for name in names:
            daemon.ask(
                "block-export-add", {"type": "nbd", "id": "e", "name": "e", "node-name": name}
            )
            async with connected(str(daemon.folder / "nbd.sock"), "e") as one:
                found = await one.read(0, 3 * third)
            daemon.ask("block-export-del", {"id": "e", "mode": "hard"})
            daemon.event("BLOCK_EXPORT_DELETED")
            parts = [found[n * third : (n + 1) * third] for n in range(3)]
            reached = _reached(chain, name)
            assert parts == [
                each.encode() * third if each in reached else bytes(third) for each in names
            ]
    assert 0 < refused < 60


@pytest.mark.interop("qemu-img")
async def test_a_guest_does_not_notice_what_is_put_behind_and_below_its_disk(
    daemon: StorageDaemon, driver: str, rng: random.Random
) -> None:
    """T-R2, T-R4, T-R7, T-R10, T-R12, T-R13 under load: the guest has half of the disk."""
    half = MIB // 2
    for name, behind in (("mid", "base"), ("top", "mid")):
        add_overlay(daemon, driver, name, MIB, behind)
    daemon.ask("block-export-del", {"id": "live", "mode": "hard"})
    daemon.event("BLOCK_EXPORT_DELETED")
    daemon.ask("object-add", {"qom-type": "iothread", "id": "io"})
    export = {"type": "nbd", "id": "top", "name": "top", "node-name": "top", "writable": True}
    daemon.ask("block-export-add", {**export, "iothread": "io"})
    path = str(daemon.folder / "nbd.sock")
    chain: dict[str, str | None] = {"top": "mid", "mid": "base"}
    files = {"top": "top-file", "mid": "mid-file"}
    for name in files:
        raw = {"driver": "raw", "node-name": f"{name}-raw", "file": f"{name}-file"}
        daemon.ask("blockdev-add", raw)
    model = bytearray(rng.randbytes(half))
    requests = 0

    async def load(one: NbdClient, stop: asyncio.Event) -> None:
        nonlocal requests
        while not stop.is_set():
            offset = rng.randrange(half)
            length = min(rng.randrange(1, 100_000), half - offset)
            data = rng.randbytes(length)
            await one.write(offset, data)
            model[offset : offset + length] = data
            assert await one.read(0, half) == model
            requests += 1

    def given(name: str) -> dict:
        return {**options(driver, name, chain[name]), "file": files[name]}

    async with connected(path, "top") as one, connected(path, "top") as other:
        await one.write(0, bytes(model))
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(one, stop))
            for turn in range(40):
                before, files_before = dict(chain), dict(files)
                if rng.random() < 0.5:
                    chain[rng.choice(["top", "mid"])] = rng.choice([None, "base"])
                elif rng.random() < 0.5:
                    chain["top"] = "mid"
                else:
                    name = rng.choice(["top", "mid"])
                    files[name] = f"{name}-{'raw' if files[name].endswith('file') else 'file'}"
                wanted = [given("mid"), given("top")]
                wrong = [wanted, [given("top"), {**given("mid"), "backing": "nope"}]][turn % 2]
                if turn % 2:
                    error = await asyncio.to_thread(
                        daemon.error, "blockdev-reopen", {"options": wrong}
                    )
                    assert "nope" in error
                    chain, files = before, files_before
                else:
                    await asyncio.to_thread(daemon.ask, "blockdev-reopen", {"options": wanted})
                seen = chain["top"] == "base" or (chain["top"] == "mid" and chain["mid"] == "base")
                expected = OLD[half:] if seen else bytes(half)
                assert await other.read(half, half) == expected, chain
            another = [{**given("top"), "file": "mid-file"}]
            if chain["top"] == "mid":
                chain["top"] = None
                await asyncio.to_thread(daemon.ask, "blockdev-reopen", {"options": [given("top")]})
            error = await asyncio.to_thread(daemon.error, "blockdev-reopen", {"options": another})
            assert error == "Cannot change the option 'file': it is another image"
            stop.set()
        assert requests > 10
        assert await one.read(0, half) == model
        await one.flush()
    daemon.ask("block-export-del", {"id": "top", "mode": "hard"})
    daemon.event("BLOCK_EXPORT_DELETED")
    daemon.ask("blockdev-del", {"node-name": "top"})
    check_qcow2(daemon.folder / "top.qcow2")


def _reached(chain: dict[str, str | None], name: str | None) -> list[str]:
    found: list[str] = []
    while name is not None and name not in found:
        found.append(name)
        name = chain[name]
    return found


def _has_cycle(chain: dict[str, str | None]) -> bool:
    return any(name in _reached(chain, behind) for name, behind in chain.items())
