"""Bitmap commands and actions, beside the reference where real programs are there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import make_disk
from tests.support.live import qemu_io, run
from tests.support.storage_daemon import StorageDaemon

Program = Callable[[str], str]
KiB, MiB = 1 << 10, 1 << 20
SIZE = 4 * MiB


def options(folder: Path) -> list[str]:
    make_disk(folder / "a.raw", SIZE)
    return [
        *("--blockdev", "file,node-name=a,filename=a.raw,discard=unmap"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=live,node-name=a,name=live,writable=on"),
    ]


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[StorageDaemon]:
    with StorageDaemon(short_tmp, *options(short_tmp)) as running:
        yield running


def bitmap(daemon: StorageDaemon, verb: str, name: str = "b", **more: object) -> object:
    return daemon.ask(f"block-dirty-bitmap-{verb}", {"node": "a", "name": name, **more})


def action(verb: str, name: str | None = "b", **more: object) -> dict:
    named = {} if name is None else {"name": name}
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": "a", **named, **more}}


ABORT = {"type": "abort", "data": {}}


def bitmaps(daemon: StorageDaemon, node: str = "a") -> dict[str, dict]:
    rows = daemon.ask("query-named-block-nodes", {"flat": True})
    (about,) = [row for row in rows if row["node-name"] == node]
    return {row.pop("name", ""): row for row in about.get("dirty-bitmaps", [])}


def sha256(daemon: StorageDaemon, name: str = "b") -> str:
    asked = {"node": "a", "name": name}
    return daemon.ask("x-debug-block-dirty-bitmap-sha256", asked)["sha256"]


def test_the_life_of_a_bitmap(daemon: StorageDaemon, program: Program) -> None:
    bitmap(daemon, "add", granularity=4096)
    row = {"granularity": 4096, "recording": True, "busy": False, "persistent": False}
    assert bitmaps(daemon) == {"b": {**row, "count": 0}}
    qemu_io(program, daemon.uri("live"), "write 4095 2", "discard 1M 4k", "write -z 2M 1")
    assert bitmaps(daemon) == {"b": {**row, "count": 16384}}
    bitmap(daemon, "disable")
    qemu_io(program, daemon.uri("live"), "write 3M 4k")
    assert bitmaps(daemon) == {"b": {**row, "count": 16384, "recording": False}}
    bitmap(daemon, "enable")
    bitmap(daemon, "clear")
    assert bitmaps(daemon) == {"b": {**row, "count": 0}}
    bitmap(daemon, "remove")
    assert bitmaps(daemon) == {}


def test_a_transaction_of_bitmap_actions_is_undone_as_a_whole(
    daemon: StorageDaemon, program: Program
) -> None:
    """T-B20."""
    for name in ("b", "a"):
        bitmap(daemon, "add", name)
    qemu_io(program, daemon.uri("live"), "write 1M 1M")
    before, hashes = bitmaps(daemon), (sha256(daemon, "a"), sha256(daemon, "b"))
    actions = [
        action("disable"),
        action("add", "c"),
        action("merge", None, target="c", bitmaps=["b"]),
        action("clear", "a"),
        action("remove", "b"),
        action("add", "b", granularity=512),
    ]
    assert daemon.error("transaction", {"actions": [*actions, ABORT]}) == (
        "Transaction aborted using Abort action"
    )
    assert bitmaps(daemon) == before
    assert (sha256(daemon, "a"), sha256(daemon, "b")) == hashes

    daemon.ask("transaction", {"actions": actions})
    found = bitmaps(daemon)
    assert {name: row["count"] for name, row in found.items()} == {"a": 0, "b": 0, "c": MiB}
    assert sha256(daemon, "c") == hashes[0]
    assert found["b"]["granularity"] == 512


def test_merging_into_a_disabled_bitmap_equals_having_recorded_all_along(
    daemon: StorageDaemon, program: Program
) -> None:
    """T-B20, with different granularities among the sources."""
    bitmap(daemon, "add", "all")
    bitmap(daemon, "add", "first", granularity=512)
    qemu_io(program, daemon.uri("live"), "write 100k 1k", "write 1M 64k")
    daemon.ask("transaction", {"actions": [action("disable", "first"), action("add", "second")]})
    qemu_io(program, daemon.uri("live"), "write 2M 1", "write 100k 1k")
    bitmap(daemon, "add", "union", disabled=True)
    merge = {"node": "a", "target": "union", "bitmaps": ["second", {"node": "a", "name": "first"}]}
    daemon.ask("block-dirty-bitmap-merge", merge)
    assert sha256(daemon, "union") == sha256(daemon, "all")
    before = sha256(daemon, "union")
    assert daemon.error("block-dirty-bitmap-merge", {**merge, "bitmaps": ["all", "nope"]}) == (
        "Dirty bitmap 'nope' not found"
    )
    assert sha256(daemon, "union") == before


@pytest.mark.interop("qemu-storage-daemon", "qemu-io")
def test_the_same_writes_give_the_hash_and_count_of_the_reference(
    short_tmp: Path, program: Program, rng: random.Random
) -> None:
    granularities = (512, 4096, 64 * KiB, 1 << 31)
    writes = []
    for _ in range(40):
        length = rng.choice((1, 512, 4096, 70_000))
        offset = rng.randrange(SIZE - length)
        writes.append(f"{rng.choice(('write', 'write -z', 'discard'))} {offset} {length}")
    # Discards that are not whole sectors are refused by qemu-io's own block layer rules.
    writes = [line for line in writes if not line.startswith("discard")] + ["discard 64k 128k"]
    heard = []
    for name, reference in (("theirs", (program("qemu-storage-daemon"),)), ("ours", ())):
        folder = short_tmp / name
        folder.mkdir()
        with StorageDaemon(folder, *options(folder), program=reference) as daemon:
            for granularity in granularities:
                bitmap(daemon, "add", str(granularity), granularity=granularity)
            found = [sha256(daemon, str(each)) for each in granularities]
            qemu_io(program, daemon.uri("live"), *writes)
            found += [sha256(daemon, str(each)) for each in granularities]
            heard.append((found, bitmaps(daemon)))
    assert heard[0] == heard[1]


def mapped(program: Program, uri: str, name: str) -> list[tuple[int, int]]:
    """What libnbd says is dirty."""
    context = f"qemu:dirty-bitmap:{name}"
    done = run(program("nbdinfo"), f"--map={context}", "--json", uri)
    return [(row["offset"], row["length"]) for row in json.loads(done.stdout) if row["type"] & 1]


@pytest.mark.interop("nbdinfo", "qemu-img", "qemu-io")
def test_real_programs_read_the_bitmaps_of_an_export(
    daemon: StorageDaemon, program: Program
) -> None:
    """T-N2, and T-N1 for what is listed."""
    bitmap(daemon, "add", "coarse", granularity=64 * KiB)
    bitmap(daemon, "add", "fine", granularity=512)
    qemu_io(program, daemon.uri("live"), "write 512 512", "write 2M 2M")
    export = {"type": "nbd", "id": "e", "node-name": "a", "bitmaps": ["coarse", "fine"]}
    assert daemon.error("block-export-add", {**export, "name": "x"}) == (
        "Enabled bitmap 'coarse' incompatible with readonly export"
    )
    for name in ("coarse", "fine"):
        bitmap(daemon, "disable", name)
    daemon.ask("block-export-add", {**export, "name": "x"})
    uri = daemon.uri("x")
    assert mapped(program, uri, "coarse") == [(0, 64 * KiB), (2 * MiB, 2 * MiB)]
    assert mapped(program, uri, "fine") == [(512, 512), (2 * MiB, 2 * MiB)]
    listed = json.loads(run(program("nbdinfo"), "--json", uri).stdout)["exports"][0]["contexts"]
    assert listed == ["base:allocation", "qemu:dirty-bitmap:coarse", "qemu:dirty-bitmap:fine"]

    image = f"driver=nbd,server.type=unix,server.path={daemon.folder / 'nbd.sock'},export=x"
    for name, first in (("coarse", (0, 64 * KiB)), ("fine", (512, 512))):
        opened = f"{image},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        done = run(program("qemu-img"), "map", "--output=json", "--image-opts", opened)
        dirty = [
            (row["start"], row["length"]) for row in json.loads(done.stdout) if not row["data"]
        ]
        assert dirty == [first, (2 * MiB, 2 * MiB)]

    assert daemon.error("block-dirty-bitmap-remove", {"node": "a", "name": "fine"}) == (
        "Bitmap 'fine' is currently in use by another operation and cannot be used"
    )
    assert daemon.error("block-export-add", {**export, "id": "f", "name": "y"}) == (
        "Bitmap 'coarse' is currently in use by another operation and cannot be used"
    )
    daemon.ask("block-export-del", {"id": "e"})
    daemon.event("BLOCK_EXPORT_DELETED")
    bitmap(daemon, "remove", "fine")


@pytest.mark.interop("qemu-io")
def test_our_own_nbd_driver_tells_of_a_bitmap_in_place_of_allocation(
    daemon: StorageDaemon, program: Program
) -> None:
    bitmap(daemon, "add", granularity=64 * KiB)
    qemu_io(program, daemon.uri("live"), "write 1M 64k")
    bitmap(daemon, "disable")
    daemon.ask("nbd-server-add", {"device": "a", "name": "x", "bitmap": "b"})
    server = {"type": "unix", "path": "nbd.sock"}
    node = {"driver": "nbd", "node-name": "n", "server": server, "export": "x", "read-only": True}
    assert 'requested x-dirty-bitmap "qemu:dirty-bitmap:nope" not found' in daemon.error(
        "blockdev-add", {**node, "x-dirty-bitmap": "qemu:dirty-bitmap:nope"}
    )
    daemon.ask("blockdev-add", {**node, "x-dirty-bitmap": "qemu:dirty-bitmap:b"})
    daemon.ask("block-export-add", {"type": "nbd", "id": "n", "node-name": "n"})
    done = run(program("nbdinfo"), "--map", "--json", daemon.uri("n"))
    rows = [(row["offset"], row["length"], row["type"]) for row in json.loads(done.stdout)]
    assert rows == [(0, MiB, 0), (MiB, 64 * KiB, 1), (MiB + 64 * KiB, SIZE - MiB - 64 * KiB, 0)]


@pytest.mark.interop("qemu-io")
def test_two_increments_that_end_together_or_not_at_all(
    daemon: StorageDaemon, program: Program
) -> None:
    """T-B3: one fails, the other is cancelled, no bitmap forgets; the next try is whole."""
    folder = daemon.folder
    for name in ("c.raw", "to-a", "to-c", "bad"):
        (folder / name).write_bytes(bytes(SIZE))
    for name in ("c", "to-a", "to-c"):
        file = {"driver": "file", "filename": "c.raw" if name == "c" else name}
        daemon.ask("blockdev-add", {**file, "node-name": name})
    inject = [{"event": "write_aio", "errno": 5}]
    image = {"driver": "file", "filename": "bad"}
    daemon.ask(
        "blockdev-add",
        {"driver": "blkdebug", "node-name": "bad", "image": image, "inject-error": inject},
    )
    daemon.ask("block-export-add", {"type": "nbd", "id": "c", "node-name": "c", "writable": True})
    adds = [
        {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": "b"}}
        for node in ("a", "c")
    ]
    daemon.ask("transaction", {"actions": adds})
    for name in ("live", "c"):
        qemu_io(program, daemon.uri(name), "write -P 9 1M 128k")

    def increments(*targets: str) -> dict:
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": f"job-{node}",
                    "device": node,
                    "target": target,
                    "sync": "incremental",
                    "bitmap": "b",
                },
            }
            for node, target in zip(("a", "c"), targets, strict=True)
        ]
        return {"actions": actions, "properties": {"completion-mode": "grouped"}}

    daemon.ask("transaction", increments("to-a", "bad"))
    assert daemon.event("BLOCK_JOB_ERROR") == {
        "device": "job-c",
        "operation": "write",
        "action": "report",
    }
    while daemon.ask("query-jobs"):
        pass
    daemon.events.clear()
    for node in ("a", "c"):
        assert bitmaps(daemon, node)["b"]["count"] == 128 * KiB
    daemon.ask("transaction", increments("to-a", "to-c"))
    for _ in range(2):
        assert daemon.event("BLOCK_JOB_COMPLETED")["offset"] == 128 * KiB
    for node, disk in (("a", "a.raw"), ("c", "c.raw")):
        assert bitmaps(daemon, node)["b"]["count"] == 0
        there = (folder / f"to-{node}").read_bytes()[MiB : MiB + 128 * KiB]
        assert there == (folder / disk).read_bytes()[MiB : MiB + 128 * KiB] == b"\t" * 128 * KiB


@pytest.mark.interop("qemu-io", "qemu-img")
def test_two_disks_are_backed_up_fully_and_then_by_increments(
    daemon: StorageDaemon, program: Program
) -> None:
    """T-B26: bitmaps and full backups begin in one transaction; the increments are complete."""
    folder = daemon.folder
    make_disk(folder / "c.raw", SIZE)
    names = [f"{kind}-{node}" for kind in ("full", "inc") for node in ("a", "c")]
    for name in names:
        (folder / name).write_bytes(bytes(SIZE))
    for name in ("c", *names):
        file = {"driver": "file", "filename": "c.raw" if name == "c" else name}
        daemon.ask("blockdev-add", {**file, "node-name": name})
    daemon.ask("block-export-add", {"type": "nbd", "id": "c", "node-name": "c", "writable": True})
    adds = [
        {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": "b"}}
        for node in ("a", "c")
    ]
    fulls = [
        {
            "type": "blockdev-backup",
            "data": {
                "job-id": f"full-{node}",
                "device": node,
                "target": f"full-{node}",
                "sync": "full",
            },
        }
        for node in ("a", "c")
    ]

    daemon.ask("transaction", {"actions": [*adds, *fulls]})
    for name in ("live", "c"):
        qemu_io(program, daemon.uri(name), "write -P 5 2M 100k", "write -P 6 1 1")
    for _ in range(2):
        assert daemon.event("BLOCK_JOB_COMPLETED")["offset"] == SIZE
    while daemon.ask("query-jobs"):
        pass
    for node in ("a", "c"):
        assert bitmaps(daemon, node)["b"]["count"] == 3 * 64 * KiB
        increment = {"device": node, "target": f"inc-{node}", "bitmap": "b"}
        job = {"job-id": f"inc-{node}", "sync": "incremental"}
        daemon.ask("blockdev-backup", {**increment, **job})
    for _ in range(2):
        found = daemon.event("BLOCK_JOB_COMPLETED")
        assert "error" not in found
        assert found["offset"] == 3 * 64 * KiB
    for node, disk in (("a", "a.raw"), ("c", "c.raw")):
        assert bitmaps(daemon, node)["b"]["count"] == 0
        merged = bytearray((folder / f"full-{node}").read_bytes())
        changed = (folder / f"inc-{node}").read_bytes()
        for at in (0, 2 * MiB, 2 * MiB + 64 * KiB):
            merged[at : at + 64 * KiB] = changed[at : at + 64 * KiB]
        assert merged == (folder / disk).read_bytes()
