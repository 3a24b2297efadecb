"""`map`: a table, JSON, a bar on a terminal, a drawing."""

from __future__ import annotations

import os
import pty
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from nbdfleece.cli.map import KINDS, Stretch, cells, draw
from tests.support.daemon_process import Daemon, environment
from tests.support.live import client

MiB = 1 << 20
DATA, SAVED, DIRTY = (
    next(rank for rank, kind in enumerate(KINDS) if kind.word == word)
    for word in ("data", "saved", "dirty")
)


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    """16 MiB: data in the second MiB, holes elsewhere."""
    path = short_tmp / "vda.raw"
    with open(path, "wb") as file:
        file.truncate(16 * MiB)
        file.seek(MiB)
        file.write(b"\1" * MiB)
    with Daemon(short_tmp, path) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


def table(text: str) -> list[tuple[int, int, str]]:
    rows = [line.split() for line in text.splitlines()[1:]]
    return [(int(start), int(length), word) for start, length, word in rows]


@pytest.mark.slow
async def test_a_snapshot_shows_what_has_been_overwritten_since(daemon: Daemon) -> None:
    daemon.run("snapshot", "create", "vda", "--name", "one")
    async with client(daemon, "vda") as guest:
        await guest.write(MiB, b"\2" * 8192)
        await guest.write(8 * MiB, b"\2" * 4096)
    assert table(daemon.run("map", "vda@one").out) == [
        (0, MiB, "hole"),
        (MiB, 8192, "saved"),
        (MiB + 8192, MiB - 8192, "data"),
        (2 * MiB, 6 * MiB, "hole"),
        (8 * MiB, 4096, "saved"),
        (8 * MiB + 4096, 8 * MiB - 4096, "hole"),
    ]
    assert table(daemon.run("map", "vda").out) == [
        (0, MiB, "hole"),
        (MiB, MiB, "data"),
        (2 * MiB, 6 * MiB, "hole"),
        (8 * MiB, 4096, "data"),
        (8 * MiB + 4096, 8 * MiB - 4096, "hole"),
    ]
    shown = daemon.run("map", "vda@one", "--json").json
    assert shown["size"] == 16 * MiB
    assert shown["extents"][1] == {
        "start": MiB,
        "length": 8192,
        "data": True,
        "zero": False,
        "saved": True,
        "readable": True,
    }


@pytest.mark.slow
async def test_a_bitmap_shows_what_has_been_written_since(daemon: Daemon) -> None:
    bitmap = '{"node": "vda", "name": "b", "granularity": 65536}'
    assert daemon.run("qmp", "block-dirty-bitmap-add", bitmap).code == 0
    async with client(daemon, "vda") as guest:
        await guest.write(MiB + 5, b"\2")
        await guest.write(16 * MiB - 1, b"\2")
    found = table(daemon.run("map", "vda", "--bitmap", "b").out)
    assert [part for part in found if part[2] == "dirty"] == [
        (MiB, 65536, "dirty"),
        (16 * MiB - 65536, 65536, "dirty"),
    ]
    assert daemon.run("map", "vda", "--bitmap", "b", "--json").json["extents"][1]["dirty"] is True


@pytest.mark.slow
def test_many_extents_come_in_many_answers(short_tmp: Path) -> None:
    path = short_tmp / "vda.raw"
    count = 20_000
    with open(path, "wb") as file:
        for index in range(count):
            file.seek(index * 8192)
            file.write(b"x")
        file.truncate(count * 8192)
    with Daemon(short_tmp, path) as daemon:
        daemon.ready()
        extents = daemon.run("map", "vda", "--json").json["extents"]
    position = 0
    for extent in extents:
        assert extent["start"] == position
        position += extent["length"]
    assert position == count * 8192
    assert len(extents) == 2 * count


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar_with_exact_sums(daemon: Daemon) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "nbdfleece", "map", "vda", "--control", str(daemon.control)],
        stdout=follower,
        env=environment(COLUMNS="60", PYTHONIOENCODING="utf-8"),
    ) as process:
        os.close(follower)
        text = b""
        try:
            while piece := os.read(leader, 65536):
                text += piece
        except OSError:  # Linux: the other end has been closed
            pass
        assert process.wait() == 0
    os.close(leader)
    lines = text.decode().replace("\r", "").splitlines()
    assert lines[0] == "vda  16 MiB"
    bars = [line.lstrip(" 0123456789MiB") for line in lines[2:6]]
    assert len({len(bar) for bar in bars}) == 1
    assert set(bars[0]) == {"█", "·"}
    assert set("".join(bars[1:])) == {"·"}
    assert re.search(r"███  data +1 MiB +6\.2 %", text.decode())


@pytest.mark.slow
def test_it_is_drawn_into_a_file(daemon: Daemon, tmp_path: Path) -> None:
    done = daemon.run("map", "vda", "--svg", tmp_path / "vda.svg")
    assert (done.code, done.out) == (0, "")
    assert "data: 1 MiB, 6.2 %" in (tmp_path / "vda.svg").read_text()
    done = daemon.run("map", "vda", "--svg", tmp_path / "no" / "vda.svg")
    assert (done.code, done.err.count("\n")) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["nope"], 5, "there is no disk 'nope'"),
        (["vda@nope"], 5, "no snapshot 'nope'"),
        (["vda", "--bitmap", "nope"], 5, "nope"),
        ([], 2, "DISK|DISK@NAME"),
    ],
)
def test_mistakes(daemon: Daemon, args: list[str], code: int, text: str) -> None:
    done = daemon.run("map", *args)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert text in done.err


@pytest.mark.slow
async def test_a_broken_snapshot_has_no_map(daemon: Daemon) -> None:
    daemon.run("snapshot", "create", "vda", "--name", "one", "--temp-limit", "4K")
    async with client(daemon, "vda") as guest:
        await guest.write(MiB, b"\2" * 65536)
    done = daemon.run("map", "vda@one")
    assert (done.code, done.err.count("\n")) == (6, 1)
    assert "snapshot vda@one is broken" in done.err


def test_a_cell_shows_the_most_telling_kind_in_it(rng: random.Random) -> None:
    assert cells(100, [Stretch(0, 99, DATA), Stretch(99, 1, DIRTY)], 2) == [DATA, DIRTY]
    for _ in range(200):
        size, count = rng.randrange(1, 300), rng.randrange(1, 60)
        cuts = sorted({0, size, *(rng.randrange(size) for _ in range(6))})
        parts = [
            Stretch(start, stop - start, rng.randrange(len(KINDS)))
            for start, stop in pairwise(cuts)
        ]
        found = cells(size, parts, count)
        assert len(found) == count
        for part in parts:  # nothing is too small to be seen
            first, last = part.start * count // size, (part.start + part.length - 1) * count // size
            assert all(found[index] >= part.rank for index in range(first, last + 1))
        assert set(found) <= {part.rank for part in parts}


def test_a_drawing_stands_alone_and_is_as_wide_in_each_row() -> None:
    text = draw("a&b", 1 << 40, [Stretch(0, 1 << 20, SAVED), Stretch(1 << 20, 1 << 39, DATA)])
    root = ET.fromstring(text)
    widths: dict[str, int] = {}
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        if rect.get("height") == "24":
            y = rect.get("y", "")
            widths[y] = widths.get(y, 0) + int(rect.get("width", "0"))
    assert list(widths.values()) == [960] * 8
    assert "<0.1 %" in "".join(root.itertext())
