"""The power is cut while a guest writes to a qcow2 image: it stays good, with all that was flushed.

The image's file is in memory and remembers each write and flush (tests/support/power_cut.py). After
a history, the power is cut at many of its moments, and each time the disk is left with another
choice of what had not been flushed. Of each such file
  - the plain checker finds no corruption (leaks are allowed), and qemu-img the same in samples;
  - every sector of the disk holds what a guest may expect: what it has flushed, or something it has
    written since.
"""

from __future__ import annotations

import asyncio
import random
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdfleece.block import internal_snapshots
from nbdfleece.block.bitmap import new_bitmap
from nbdfleece.block.create import create
from nbdfleece.block.drain import quiet
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.formats.qcow2.header import EXT_BITMAPS, parse_header
from tests.support.driver_kit import remove_all
from tests.support.power_cut import NEVER, SECTOR, Acknowledged, Clock, Crashes, RecordingDriver
from tests.support.qcow2_history import read_all
from tests.support.qcow2_image import Image

pytestmark = [pytest.mark.interop("qemu-img", "qemu-io"), pytest.mark.slow]

Program = Callable[[str], str]
KiB, MiB = 1 << 10, 1 << 20


@dataclass
class Kind:
    """An image to cut the power of."""

    options: str
    size: int
    prepare: list[str] = field(default_factory=list)  # by qemu-io
    snapshot: bool = False
    backed: bool = False
    open: dict[str, object] = field(default_factory=dict)


KINDS = {
    "empty": Kind("cluster_size=4096", 256 * KiB),
    "small tables": Kind("cluster_size=512", 128 * KiB),
    "shared": Kind("cluster_size=4096", 256 * KiB, ["write -P 5 0 200k"], snapshot=True),
    "compressed": Kind(
        "cluster_size=4096", 256 * KiB, ["write -c -P 5 0 4k", "write -c -P 6 8k 4k"]
    ),
    "backed": Kind("cluster_size=4096", 256 * KiB, backed=True),
    "lazy": Kind("cluster_size=4096,lazy_refcounts=on", 256 * KiB),
    "extended": Kind("cluster_size=16k,extended_l2=on", 512 * KiB, backed=True),
    "narrow": Kind("cluster_size=512,refcount_bits=64", 128 * KiB),
    "v2": Kind("cluster_size=4096,compat=0.10", 256 * KiB, ["write -P 5 0 100k"], snapshot=True),
}


class Guest:
    """Several requests at a time to one disk, none of which overlap."""

    def __init__(self, node: Node, acknowledged: Acknowledged, cluster: int, rng: random.Random):
        self.node = node
        self.acknowledged = acknowledged
        self.cluster = cluster
        self.rng = rng
        self.busy: list[tuple[int, int]] = []
        self.count = 0

    async def run(self, requests: int, depth: int) -> None:
        self.left = requests
        async with asyncio.TaskGroup() as group:
            for _ in range(depth):
                group.create_task(self._one_after_another())

    async def _one_after_another(self) -> None:
        while self.left > 0:
            self.left -= 1
            verb = self.rng.choice(["write"] * 5 + ["zeroes", "unmap", "discard", "flush", "fua"])
            if verb == "flush":
                start = self.acknowledged.clock.tick()
                await self.node.flush()
                self.acknowledged.flushed(start)
                continue
            place = self._place()
            if place is None:
                continue
            self.busy.append(place)
            try:
                await self._change(verb, *place)
            finally:
                self.busy.remove(place)

    def _place(self) -> tuple[int, int] | None:
        size = self.node.size
        unit = self.rng.choice([SECTOR, self.cluster])
        offset = self.rng.randrange(size // unit) * unit
        length = self.rng.choice([SECTOR, self.cluster, 3 * self.cluster, 8 * SECTOR])
        length = min(length, size - offset)
        for at, taken in self.busy:
            if at < offset + length and offset < at + taken:
                return None
        return offset, length

    async def _change(self, verb: str, offset: int, length: int) -> None:
        node = self.node
        if verb in ("write", "fua"):
            self.count += 1
            data = b"".join(
                struct.pack(">QQ", self.count, at) * (SECTOR // 16)
                for at in range(offset, offset + length, SECTOR)
            )
            begun = self.acknowledged.begin(offset, data)
            await node.write(offset, memoryview(data), fua=verb == "fua")
        else:
            begun = self.acknowledged.begin(offset, bytes(length), maybe=verb == "discard")
            if verb == "discard":
                await node.discard(offset, length)
            else:
                unmap = verb == "unmap"
                await node.write_zeroes(
                    offset, length, fua=False, may_unmap=unmap, no_fallback=False
                )
        self.acknowledged.end(begun, fua=verb == "fua")


class Run:
    """A history on an image whose file is recorded, and the cuts of it."""

    def __init__(self, program: Program, folder: Path, kind: Kind, rng: random.Random) -> None:
        self.program = program
        self.folder = folder
        self.kind = kind
        self.rng = rng
        self.base = rng.randbytes(kind.size * 3 // 4 // 512 * 512) if kind.backed else b""
        self.image = self._make()
        self.before = Image(self.image, self.base).content()
        self.snapshot = Image(self.image).content("one") if kind.snapshot else None
        self.clock = Clock()
        self.file = RecordingDriver(self.image, rng, self.clock)
        self.acknowledged = Acknowledged(self.clock, self.before)

    def _make(self) -> bytes:
        path, base = self.folder / "image.qcow2", self.folder / "base.raw"
        base.write_bytes(self.base)

        def run(name: str, *arguments: object) -> None:
            command = [self.program(name), *map(str, arguments)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        over = ("-b", "base.raw", "-F", "raw") if self.kind.backed else ()
        size = self.kind.size
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.kind.options, *over, path, size)
        commands = [part for command in self.kind.prepare for part in ("-c", command)]
        if commands:
            run("qemu-io", "-f", "qcow2", *commands, path)
        if self.kind.snapshot:
            run("qemu-img", "snapshot", "-c", "one", path)
        return path.read_bytes()

    async def history(self, requests: int, depth: int) -> None:
        graph = Graph()
        try:
            await graph.add("file", self.file, {}, read_only=False, discard_enabled=True)
            backing = None
            if self.kind.backed:
                base = RecordingDriver(self.base, self.rng)
                await graph.add("base", base, {}, read_only=True, discard_enabled=False)
                backing = "base"
            options: dict[str, object] = {"driver": "qcow2", "node-name": "disk", "file": "file"}
            options |= {"discard": "unmap", "backing": backing} | self.kind.open
            node = await add_from_options(graph, options)
            cluster = node.driver.cluster_size()
            guest = Guest(node, self.acknowledged, cluster, self.rng)
            await self.live(guest, requests, depth)
        finally:
            await remove_all(graph)

    async def live(self, guest: Guest, requests: int, depth: int) -> None:
        """What happens between opening and closing."""
        await guest.run(requests, depth)

    def cut(self, most: int, samples: int) -> int:
        """Cut the power at that many moments, and return how many files were looked at."""
        crashes = Crashes(self.file)
        moments = crashes.moments(self.rng, most)
        sampled = set(self.rng.sample(moments, min(samples, len(moments))))
        looked = 0
        for moment in moments:
            for how, data in crashes.at(moment, self.rng):
                looked += 1
                self._look(data, moment, f"cut at {moment} of {self.clock.now}, {how} was written")
            if moment in sampled:
                self._ask_qemu(data, moment)
        return looked

    def _look(self, data: bytes, moment: int, what: str) -> None:
        image = Image(data, self.base)
        found = image.check()
        wrong = [] if found.corruptions else self.acknowledged.wrong(image.content(), moment)
        lost = self.snapshot is not None and image.content("one") != self.snapshot
        if found.corruptions or wrong or lost:
            (self.folder / "cut.qcow2").write_bytes(data)
            print(f"see {self.folder}/cut.qcow2")
        assert not found.corruptions, what
        assert not wrong, f"{what}: wrong sectors {wrong[:20]}"
        assert not lost, f"{what}: the snapshot has changed"

    def _ask_qemu(self, data: bytes, moment: int) -> None:
        path = self.folder / "cut.qcow2"
        path.write_bytes(data)
        repair = ["-r", "all"] if Image(data).check().dirty else []
        done = subprocess.run(
            [self.program("qemu-img"), "check", "-f", "qcow2", *repair, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 3), done.stdout + done.stderr
        image = Image(path.read_bytes(), self.base)
        assert not self.acknowledged.wrong(image.content(), moment)

    def end(self) -> None:
        """Look at the file as it is at the end: clean, without a leak, and all is there."""
        image = Image(bytes(self.file.content), self.base)
        found = image.check()
        assert (found.corruptions, found.leaks, found.dirty) == ([], 0, False)
        assert not self.acknowledged.wrong(image.content(), self.clock.now)


@dataclass
class Taken:
    """An internal snapshot: the disk at its instant, and the moments of its life."""

    name: str
    content: bytes
    begun: int
    made: int = NEVER
    dying: int = NEVER
    gone: int = NEVER


class SnapshotRun(Run):
    """As Run, and between the guest's requests internal snapshots come and go."""

    taken: list[Taken]

    async def live(self, guest: Guest, requests: int, depth: int) -> None:
        self.taken = []
        node = guest.node
        for number in range(4):
            await guest.run(requests, depth)
            alive = [each for each in self.taken if each.dying == NEVER]
            if alive and self.rng.random() < 0.4:
                dying = self.rng.choice(alive)
                dying.dying = self.clock.tick()
                await internal_snapshots.delete(node, None, dying.name)
                dying.gone = self.clock.tick()
                continue
            taken = Taken(f"s{number}", await read_all(node), self.clock.tick())
            start = self.clock.tick()
            self.taken.append(taken)
            await internal_snapshots.create(node, taken.name)
            taken.made = self.clock.tick()
            self.acknowledged.flushed(start)  # a snapshot is on stable storage, the disk with it

    def _look(self, data: bytes, moment: int, what: str) -> None:
        super()._look(data, moment, what)
        image = Image(data)
        there = {str(each["name"]) for each in image.snapshots()}
        for each in self.taken:
            if each.name in there:
                assert each.begun <= moment, what
                assert image.content(each.name) == each.content, f"{what}: {each.name}"
            else:
                assert not each.made <= moment < each.dying, f"{what}: {each.name} is lost"
            assert moment < each.gone or each.name not in there, f"{what}: {each.name} is back"

    async def reopen(self, data: bytes, what: str) -> None:
        """Open what a cut has left, which mends it, and close it: it is clean then."""
        graph = Graph()
        file = RecordingDriver(data, self.rng, turns=0)
        try:
            await graph.add("file", file, {}, read_only=False, discard_enabled=True)
            options = {"driver": "qcow2", "node-name": "disk", "file": "file"}
            node = await add_from_options(graph, options)
            assert await read_all(node) == Image(data).content(), what
            await node.write(0, memoryview(b"w" * 512), fua=False)
        finally:
            await remove_all(graph)
        found = Image(bytes(file.content)).check()
        assert (found.corruptions, found.dirty) == ([], False), what


@pytest.mark.deadline(3000)
@pytest.mark.parametrize("options", ["cluster_size=4096", "cluster_size=512", "lazy_refcounts=on"])
async def test_a_power_cut_while_snapshots_come_and_go(
    tmp_path: Path, program: Program, rng: random.Random, options: str, *, long_run: bool
) -> None:
    for _ in range(20 if long_run else 1):
        kind = Kind(options, 128 * KiB, ["write -P 5 0 60k"])
        run = SnapshotRun(program, tmp_path, kind, rng)
        await run.history(requests=15, depth=4)
        run.end()
        assert run.cut(most=600 if long_run else 60, samples=20 if long_run else 2)
        crashes = Crashes(run.file)
        for moment in crashes.moments(rng, 60 if long_run else 10):
            for how, data in crashes.at(moment, rng):
                await run.reopen(data, f"{how} at {moment}")


class BitmapRun(Run):
    """As Run, in several sessions, with persistent bitmaps that come and go.

    What is left of a bitmap is complete or says that it is not, and the name of the backing file,
    which is in the way of the directory's place in the header, is never torn.
    """

    def _make(self) -> bytes:
        super()._make()
        path = self.folder / "image.qcow2"
        add = [self.program("qemu-img"), "bitmap", "--add", "-g", "4096", str(path), "b"]
        subprocess.run(add, check=True)
        return path.read_bytes()

    async def history(self, requests: int, depth: int) -> None:
        for _ in range(3):
            await super().history(requests, depth)

    async def live(self, guest: Guest, requests: int, depth: int) -> None:
        node = guest.node
        guest.count = self.clock.now  # data of its own in each session
        await guest.run(requests, depth)
        self.made = getattr(self, "made", 0) + 1
        bitmap = new_bitmap(node, f"b{self.made}", 4096, enabled=True)
        bitmap.set(0, node.size)  # its first content: nothing is known
        assert node.bitmap_keeper is not None
        async with quiet(node):
            await node.bitmap_keeper.keep(bitmap)
            node.bitmaps[bitmap.name] = bitmap
        if self.made == 3:
            async with quiet(node):
                await node.bitmap_keeper.forget(node.bitmaps.pop("b1"))
        await guest.run(requests, depth)

    def _look(self, data: bytes, moment: int, what: str) -> None:
        super()._look(data, moment, what)
        name = "base.raw" if self.kind.backed else None
        assert parse_header(data).backing_file == name, what

    async def reopen(self, data: bytes, what: str) -> int:
        """Look at the bitmaps of what a cut has left; return how many can be used."""
        graph = Graph()
        file = RecordingDriver(data, self.rng, turns=0)
        try:
            await graph.add("file", file, {}, read_only=False, discard_enabled=True)
            options = {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": None}
            node = await add_from_options(graph, options)
            disk = Image(data, self.base).content()
            usable = [one for one in node.bitmaps.values() if not one.inconsistent]
            for bitmap in usable:
                dirty = bytearray(len(disk))
                for offset, length in bitmap.dirty_ranges():
                    dirty[offset : offset + length] = bytes([1]) * length
                for at in range(0, len(disk), SECTOR):
                    if disk[at : at + SECTOR] != self.before[at : at + SECTOR]:
                        assert dirty[at], f"{what}: bitmap {bitmap.name} misses {at}"
            return len(usable)
        finally:
            await remove_all(graph)


@pytest.mark.deadline(3000)
@pytest.mark.parametrize("name", ["empty", "small tables", "backed", "extended"])
async def test_a_power_cut_leaves_bitmaps_complete_or_inconsistent(
    tmp_path: Path, program: Program, rng: random.Random, name: str, *, long_run: bool
) -> None:
    for _ in range(20 if long_run else 1):
        run = BitmapRun(program, tmp_path, KINDS[name], rng)
        await run.history(requests=12, depth=4)
        run.end()
        assert run.cut(most=400 if long_run else 60, samples=20 if long_run else 2)
        crashes = Crashes(run.file)
        for moment in crashes.moments(rng, 60 if long_run else 20):
            for how, data in crashes.at(moment, rng):
                await run.reopen(data, f"{how} at {moment}")
        assert await run.reopen(bytes(run.file.content), "the end") == 3


class NameRun(Run):
    """As Run, and the name and the format of the backing file change, together."""

    NAMES = (
        *(("base.raw", "raw"), ("b", "host_device"), ("x" * 700, "qcow2"), ("y" * 701, "raw")),
        *(("base.raw", "host_device"), ("", ""), ("z", "nbd"), ("x" * 700, "qcow2")),
    )

    async def live(self, guest: Guest, requests: int, depth: int) -> None:
        self.told: list[tuple[int, int, tuple[str | None, str | None]]] = []
        for name, format_ in self.NAMES:
            await guest.run(requests, depth)
            begun = self.clock.tick()
            await guest.node.driver.change_backing_file(name, format_)
            self.told.append((begun, self.clock.tick(), (name or None, format_ or None)))

    def _look(self, data: bytes, moment: int, what: str) -> None:
        super()._look(data, moment, what)
        header = parse_header(data)
        allowed: set[tuple[str | None, str | None]] = {("base.raw", "raw")}
        for begun, done, names in self.told:
            if done <= moment:
                allowed = {names}
            elif begun <= moment:
                allowed.add(names)
        assert (header.backing_file, header.backing_format) in allowed, what
        if moment <= self.told[-1][1]:  # behind that the bitmap is stored
            assert header.autoclear == self.autoclear, what
            assert header.extension(EXT_BITMAPS) is not None, what

    def _make(self) -> bytes:
        super()._make()
        path = self.folder / "image.qcow2"
        add = [self.program("qemu-img"), "bitmap", "--add", str(path), "b"]
        subprocess.run(add, check=True)
        data = path.read_bytes()
        self.autoclear = parse_header(data).autoclear
        return data

    def _ask_qemu(self, data: bytes, moment: int) -> None:
        """It would look for the backing file."""


@pytest.mark.deadline(3000)
@pytest.mark.parametrize("cluster_size", [4096, 65536])
async def test_a_power_cut_leaves_a_name_with_its_format(
    tmp_path: Path, program: Program, rng: random.Random, cluster_size: int, *, long_run: bool
) -> None:
    for _ in range(20 if long_run else 1):
        kind = Kind(f"cluster_size={cluster_size}", 256 * KiB, backed=True)
        run = NameRun(program, tmp_path, kind, rng)
        await run.history(requests=3, depth=2)
        run.end()
        run.cut(most=1000 if long_run else 60, samples=0)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "full"])
async def test_a_power_cut_while_an_image_is_made_leaves_a_whole_one_or_none(
    rng: random.Random, preallocation: str
) -> None:
    graph, file = Graph(), RecordingDriver(rng.randbytes(300 * KiB), rng)
    await graph.add("file", file, {}, read_only=False, discard_enabled=True)
    options: dict[str, object] = {"file": "file", "size": MiB, "cluster-size": 4096}
    await create(graph, "qcow2", options | {"preallocation": preallocation})
    await remove_all(graph)
    crashes, found = Crashes(file), 0
    for moment in crashes.moments(rng, 40):
        for how, data in crashes.at(moment, rng):
            if data[:4] == b"QFI\xfb":
                found += 1
                image = Image(data)
                assert not image.check().corruptions, f"{how} at {moment}"
                assert not any(image.content()), f"{how} at {moment}"
    assert found


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows by little, so that there is less to copy for each cut."""
    monkeypatch.setattr("nbdfleece.block.drivers.qcow2.image.QCOW2_GROW", 64 * KiB)


@pytest.mark.deadline(3000)
@pytest.mark.parametrize("name", KINDS)
async def test_a_power_cut_leaves_a_good_image_with_all_that_was_flushed(
    tmp_path: Path, program: Program, rng: random.Random, name: str, *, long_run: bool
) -> None:
    for _ in range(20 if long_run else 1):
        run = Run(program, tmp_path, KINDS[name], rng)
        await run.history(requests=rng.choice([30, 80, 150]), depth=rng.choice([1, 4, 8]))
        run.end()
        assert run.cut(most=1000 if long_run else 60, samples=20 if long_run else 2)
