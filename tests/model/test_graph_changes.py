"""Random changes of the graph while guests write and read, byte for byte.

Four guests use two disks. One disk is an export over nodes made by QMP, whose chain of filters is
added to, re-pointed, reopened and deleted from; by `qom-set` the export moves to another node of
it, or to the filter of a fleecing by hand; a few times an overlay comes on top. The other is a disk
of ours, above which the filters of snapshots come and go. Limits, fault nodes, exports of single
nodes come and go too. Every change either succeeds, or is refused and changes nothing. A
guest notices neither: all its requests succeed, and what it reads is what it wrote.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.cli.client import Client, CommandFailed
from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import client, descriptors, eventually, read_export, serving
from tests.support.nbd_client import NbdClient

SIZE = 1 << 20
PART = SIZE // 2  # each guest has half a disk of its own
NORMAL, LONG = 300, 10_000
MOST_NODES, MOST_SNAPSHOTS, MOST_OVERLAYS, MOST_EXPORTS = 6, 3, 3, 2
LIVE = "/machine/peripheral/live/virtio-backend"
NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


class Guest:
    """Writes and reads at random in its part of a disk until told to stop."""

    def __init__(self, one: NbdClient, start: int, rng: random.Random) -> None:
        self.one = one
        self.start = start
        self.rng = rng
        self.model = bytearray(PART)
        self.requests = 0

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            offset = self.rng.randrange(PART)
            length = min(PART - offset, self.rng.choice((1, 512, 4096, 65536, 100_001)))
            place = slice(offset, offset + length)
            match self.rng.randrange(6):
                case 0 | 1 | 2:
                    data = self.rng.randbytes(length)
                    await self.one.write(self.start + offset, data)
                    self.model[place] = data
                case 3:
                    await self.one.zero(self.start + offset, length)
                    self.model[place] = bytes(length)
                case 4:
                    await self.one.flush()
                case _:
                    found = await self.one.read(self.start + offset, length)
                    assert found == self.model[place], f"{length} bytes at {self.start + offset}"
            self.requests += 1


class NothingToDo(Exception):
    """The change that was drawn makes no sense now."""


class Changes:
    """Makes random changes over one monitor."""

    def __init__(self, monitor: Client, image: Path, rng: random.Random) -> None:
        self.monitor = monitor
        self.image = image
        self.rng = rng
        self.files: dict[str, object] = {"top": "file"}  # of nodes of driver raw, by node
        self.faults: dict[str, object] = {}  # what is below nodes of driver blkdebug, by node
        self.overlays: dict[str, object] = {}  # what is behind each
        self.exports: list[str] = []
        self.by_hand: list[str] = []  # what a fleecing by hand has made, in order
        self.may_overlay = False  # what comes after an overlay can no more be by hand, or moved
        self.drive = "top"  # of the live export
        self.drive_before = "top"  # below the filter of the fleecing by hand
        self.snapshots: list[str] = []
        self.made = 0
        self.done: dict[str, int] = {}
        self.refused = 0

    async def ask(self, command: str, **arguments: object) -> Any:
        dash = "_" if command == "block_set_io_throttle" else "-"
        spelled = {name.replace("_", dash): value for name, value in arguments.items()}
        return await asyncio.to_thread(self.monitor.execute, command, spelled)

    async def set_up(self) -> None:
        await self.ask("blockdev-add", **self.file_options())
        await self.ask("blockdev-add", **self.raw_options("top", "file"))
        await self.ask(
            "block-export-add", type="nbd", id="live", name="live", node_name="top", writable=True
        )

    async def take_down(self) -> None:
        while self.by_hand:
            await self.fleece_by_hand()
        await self.ask("block_set_io_throttle", id="vda", **NO_LIMITS)
        for export in ("live", *self.exports):
            await self.ask("block-export-del", id=export, mode="hard")
        await eventually(self.exports_are_gone)
        for snapshot in self.snapshots:
            await self.ask("fleece-snapshot-delete", disk="vda", snapshot=snapshot, force=True)
        self.files |= self.faults | self.overlays
        while self.files:
            used = set(self.files.values())
            for name in [name for name in self.files if name not in used]:
                await self.ask("blockdev-del", node_name=name)
                del self.files[name]
        for name in self.overlays:
            await self.ask("blockdev-del", node_name=f"{name}-file")
        await self.ask("blockdev-del", node_name="file")

    def file_options(self) -> dict[str, object]:
        return {
            "driver": "file",
            "node-name": "file",
            "filename": str(self.image),
            "discard": self.rng.choice(("ignore", "unmap")),
        }

    def raw_options(self, name: str, file: object) -> dict[str, object]:
        discard = self.rng.choice(("ignore", "unmap"))
        return {"driver": "raw", "node-name": name, "file": file, "discard": discard}

    async def one(self) -> None:
        kinds = (self.add, self.delete, self.rewire, self.rewire, self.reopen_file, self.snapshot)
        more = (self.move, self.fleece_by_hand, self.limit, self.fault, self.export, self.overlay)
        change = self.rng.choice((*kinds, *more, self.transact, self.transact, self.wrong))
        try:
            await change()
        except NothingToDo:
            pass
        except CommandFailed as error:
            text = str(error)
            assert "internal error" not in text, text
            assert any(part in text for part in EXPECTED), text
            self.refused += 1
        else:
            self.done[change.__name__] = self.done.get(change.__name__, 0) + 1

    async def add(self) -> None:
        if len(self.files) >= MOST_NODES:
            raise NothingToDo
        self.made += 1
        name, file = f"n{self.made}", self.rng.choice(["file", *self.files, *self.faults])
        await self.ask("blockdev-add", **self.raw_options(name, file))
        self.files[name] = file

    async def delete(self) -> None:
        if not self.files:
            raise NothingToDo
        name = self.rng.choice(sorted(self.files))
        await self.ask("blockdev-del", node_name=name)
        del self.files[name]

    async def rewire(self) -> None:
        """Reopen one to three nodes with files chosen at random: often a cycle."""
        if not self.files:
            raise NothingToDo
        names = self.rng.sample(sorted(self.files), self.rng.randrange(min(3, len(self.files))) + 1)
        files = {name: self.rng.choice(["file", *sorted(self.files)]) for name in names}
        options = [self.raw_options(name, file) for name, file in files.items()]
        if self.rng.random() < 0.2:
            options.append(self.raw_options("nobody", "file"))
        await self.ask("blockdev-reopen", options=options)
        self.files.update(files)

    async def reopen_file(self) -> None:
        options = self.file_options()
        options["cache"] = {"direct": self.rng.random() < 0.3}
        options["read-only"] = self.rng.random() < 0.2
        await self.ask("blockdev-reopen", options=[options])
        assert self.overlays or not options["read-only"], "somebody writes it"

    async def snapshot(self) -> None:
        if len(self.snapshots) < MOST_SNAPSHOTS and self.rng.random() < 0.6:
            self.made += 1
            await self.ask("fleece-snapshot-create", disks=["vda"], name=f"s{self.made}")
            self.snapshots.append(f"s{self.made}")
        elif self.snapshots:
            name = self.snapshots.pop(self.rng.randrange(len(self.snapshots)))
            await self.ask("fleece-snapshot-delete", disk="vda", snapshot=name)
        else:
            raise NothingToDo

    async def transact(self) -> None:
        """Snapshot, backup and new nodes at once, in any order that can be; half are refused."""
        if len(self.snapshots) >= MOST_SNAPSHOTS:
            oldest = self.snapshots.pop(0)
            await self.ask("fleece-snapshot-delete", disk="vda", snapshot=oldest)
        self.made += 1
        name, target, job = (f"{kind}{self.made}" for kind in "stj")
        source = next(iter(self.files), "file")
        null = {"driver": "null-co", "node-name": target, "size": SIZE}
        backup = {"job-id": job, "device": "vda", "target": target, "sync": "full"}
        on_top = {"job-id": f"{job}x", "device": source, "target": f"{target}x", "sync": "none"}
        actions = [
            ("blockdev-add", null),
            ("blockdev-backup", backup),
            ("blockdev-add", {**null, "node-name": f"{target}x"}),
            ("blockdev-backup", on_top),
        ]
        snapshot = ("fleece-snapshot-create", {"disks": ["vda"], "name": name})
        actions.insert(self.rng.randrange(5), snapshot)
        is_refused = self.rng.random() < 0.5
        if is_refused:
            actions.insert(self.rng.randrange(6), ("abort", {}))
        asked = [{"type": kind, "data": data} for kind, data in actions]
        before = await names(self)
        try:
            await self.ask("transaction", actions=asked)
        except CommandFailed:
            assert await names(self) == before
            raise
        assert not is_refused
        self.snapshots.append(name)
        await self.ask("job-cancel", id=f"{job}x")
        while await self.ask("query-jobs"):
            pass
        for node in (target, f"{target}x"):
            await self.ask("blockdev-del", node_name=node)

    async def move(self) -> None:
        """Put another node under the live export, which shows the same."""
        wanted = self.rng.choice(["file", *self.files, *self.faults])
        if self.overlays or self.by_hand or wanted == self.drive:
            raise NothingToDo
        await self.ask("qom-set", path=LIVE, property="drive", value=wanted)
        self.drive = wanted

    async def fleece_by_hand(self) -> None:
        """Set up or take down a point in time of the live disk, step by step as with QEMU."""
        if not self.by_hand:
            await self.begin_by_hand()
            return
        if self.drive == "cbw":
            await self.ask("block-export-del", id="snap", mode="hard")
            await eventually(self.snap_is_gone)
            await self.ask("blockdev-del", node_name="access")
            await self.ask("qom-set", path=LIVE, property="drive", value=self.drive_before)
            self.drive = self.drive_before
        while self.by_hand:
            await self.ask("blockdev-del", node_name=self.by_hand[-1])
            self.by_hand.pop()

    async def begin_by_hand(self) -> None:
        if self.may_overlay:
            raise NothingToDo
        self.drive_before = self.drive
        await self.ask("blockdev-add", driver="null-co", size=SIZE, node_name="temp")
        self.by_hand.append("temp")
        cbw = {"driver": "copy-before-write", "node_name": "cbw", "file": self.drive}
        await self.ask("blockdev-add", **cbw, target="temp")
        self.by_hand.append("cbw")
        await self.ask("qom-set", path=LIVE, property="drive", value="cbw")
        self.drive = "cbw"
        await self.ask("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        await self.ask("block-export-add", type="nbd", id="snap", name="snap", node_name="access")

    async def snap_is_gone(self) -> bool:
        return "snap" not in [row["id"] for row in await self.ask("query-block-exports")]

    async def exports_are_gone(self) -> bool:
        rows = await self.ask("query-block-exports")
        return all(row["id"].startswith("vda") for row in rows)

    async def limit(self) -> None:
        limits = NO_LIMITS | {"iops": self.rng.choice((0, 0, 100_000, 1_000_000))}
        await self.ask("block_set_io_throttle", id=self.rng.choice(("vda", "live")), **limits)

    async def fault(self) -> None:
        """Put a fault node, which does no harm, above a node, or take one away."""
        if len(self.faults) < 2 and self.rng.random() < 0.5:
            self.made += 1
            name, image = f"f{self.made}", self.rng.choice(["file", *self.files])
            await self.ask("blockdev-add", driver="blkdebug", node_name=name, image=image)
            self.faults[name] = image
        elif self.faults:
            name = self.rng.choice(sorted(self.faults))
            await self.ask("blockdev-del", node_name=name)
            del self.faults[name]
        else:
            raise NothingToDo

    async def export(self) -> None:
        """Offer a node to readers, or no more."""
        if len(self.exports) < MOST_EXPORTS and self.rng.random() < 0.6:
            self.made += 1
            name, node = f"e{self.made}", self.rng.choice(["file", *self.files, *self.faults])
            await self.ask("block-export-add", type="nbd", id=name, name=name, node_name=node)
            self.exports.append(name)
        elif self.exports:
            await self.ask("block-export-del", id=self.exports.pop())
        else:
            raise NothingToDo

    async def overlay(self) -> None:
        """Put an overlay above the live disk, a few times in all; guests never leave it."""
        if len(self.overlays) == MOST_OVERLAYS or not self.may_overlay:
            raise NothingToDo
        if self.by_hand:
            await self.fleece_by_hand()
        name, path = f"ov{len(self.overlays)}", f"{self.image}.ov{len(self.overlays)}"
        await self.make(driver="file", filename=path, size=0)
        await self.ask("blockdev-add", driver="file", node_name=f"{name}-file", filename=path)
        await self.make(driver="qcow2", file=f"{name}-file", size=SIZE)
        options = {"driver": "qcow2", "node_name": name, "file": f"{name}-file", "backing": None}
        await self.ask("blockdev-add", **options)
        await self.ask("blockdev-snapshot", node=self.drive, overlay=name)
        for above in (self.files, self.faults):
            above |= {upper: name for upper, below in above.items() if below == self.drive}
        self.overlays[name] = self.drive
        self.drive = name

    async def make(self, **options: object) -> None:
        await self.ask("blockdev-create", job_id="make", options=options)

        async def is_made() -> bool:
            (row,) = await self.ask("query-jobs")
            assert "error" not in row, row
            return row["status"] == "concluded"

        await eventually(is_made)
        await self.ask("job-dismiss", id="make")

    async def wrong(self) -> None:
        command, arguments = self.rng.choice(WRONG)
        await self.ask(command, **arguments)
        raise AssertionError(f"{command} {arguments} was not refused")


WRONG: tuple[tuple[str, dict[str, object]], ...] = (
    ("blockdev-add", {"driver": "null-co", "node-name": "file"}),
    ("blockdev-add", {"driver": "raw", "node-name": "x", "file": "nobody"}),
    ("blockdev-add", {"driver": "raw", "node-name": "x", "file": {"driver": "raw", "file": "no"}}),
    ("blockdev-del", {"node_name": "vda"}),
    ("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "top", "file": "top"}]}),
    (
        "blockdev-reopen",
        {"options": [{"driver": "raw", "node-name": "top", "file": "file", "size": 9 << 20}]},
    ),
    ("block_resize", {"node_name": "file", "size": 512}),
)

EXPECTED = (
    "Abort action",
    "Duplicate nodes",
    "Cannot find device=",
    "Failed to find node",
    "is in use",
    "would create a cycle",
    "Permission conflict",
    "cannot support read-write users",
    "has no other value",
    "may not support O_DIRECT",
    "is not owned by the monitor",
    "node is used as backing hd of",
    "has to be smaller or equal to the actual size",
)


async def names(changes: Changes) -> list[str]:
    found = await changes.ask("query-named-block-nodes", flat=True)
    assert isinstance(found, list)
    return sorted(row["node-name"] for row in found)


async def load(daemon: Daemon, changes: Changes, rng: random.Random, count: int) -> None:
    """Run the guests and make `count` changes meanwhile; then look at both disks."""
    async with (
        client(daemon, "live") as a,
        client(daemon, "live") as b,
        client(daemon, "vda") as d,
        client(daemon, "vda") as e,
    ):
        guests = [
            Guest(one, start, random.Random(rng.random()))
            for one, start in ((a, 0), (b, PART), (d, 0), (e, PART))
        ]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for guest in guests:
                tasks.create_task(guest.run(stop))
            try:
                for number in range(count):
                    changes.may_overlay = number > count * 2 // 3
                    await changes.one()
            finally:
                stop.set()
        assert min(guest.requests for guest in guests) > 0
    for export, (first, second) in (("live", guests[:2]), ("vda", guests[2:])):
        assert await read_export(daemon, export) == first.model + second.model, export


@pytest.mark.deadline(1500)
async def test_guests_do_not_notice(
    short_tmp: Path, rng: random.Random, long_run: bool, seed: int
) -> None:
    disk, image = (make_disk(short_tmp / name, SIZE) for name in ("vda.raw", "image.raw"))
    for path in (disk, image):
        path.write_bytes(bytes(SIZE))
    with serving(short_tmp, disk) as daemon, Client(str(daemon.control)) as monitor:
        changes = Changes(monitor, image, rng)
        before, open_before = await names(changes), descriptors(daemon)
        await changes.set_up()
        await load(daemon, changes, rng, LONG if long_run else NORMAL)
        await changes.take_down()

        print(f"done {changes.done}, refused {changes.refused}")
        wanted = {"add", "delete", "rewire", "reopen_file", "snapshot", "transact"}
        wanted |= {"move", "fleece_by_hand", "limit", "fault", "export", "overlay"}
        assert set(changes.done) == wanted
        assert await names(changes) == before
        await eventually(lambda: len(descriptors(daemon)) <= len(open_before))
        assert daemon.stop() == 0
