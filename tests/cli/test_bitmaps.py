"""`nbdfleece bitmap`, and `snapshot create --bitmap` to the end, with real programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece.formats.bitmap_file import HEADER_SIZE
from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import qemu_io, run, serving

Program = Callable[[str], str]
KiB, MiB = 1 << 10, 1 << 20
SIZE = 8 * MiB


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    disks = [make_disk(short_tmp / f"{name}.raw", SIZE) for name in ("vda", "vdb")]
    with serving(short_tmp, *disks, disks=2) as daemon:
        yield daemon


def bitmaps(daemon: Daemon, *disk: str) -> list[dict]:
    return json.loads(daemon.run("bitmap", "list", *disk, "--json").out)


def test_bitmaps_are_added_listed_cleared_and_removed(daemon: Daemon, program: Program) -> None:
    assert daemon.run("bitmap", "list").out == ""
    assert daemon.run("bitmap", "add", "vda", "nightly").code == 0
    assert daemon.run("bitmap", "add", "vdb", "fine", "--granularity", "4K").code == 0
    qemu_io(program, daemon.uri("vda"), "write 1M 1")
    first, second = bitmaps(daemon)
    assert (first["disk"], first["bitmap"], first["count"]) == ("vda", "nightly", 64 * KiB)
    assert (first["recording"], first["busy"]) == (True, False)
    assert (second["disk"], second["bitmap"], second["granularity"]) == ("vdb", "fine", 4096)
    assert bitmaps(daemon, "vdb") == [second]
    table = daemon.run("bitmap", "list").out.splitlines()
    assert table[0].split() == ["NAME", "DISK", "DIRTY", "GRANULARITY", "STATE"]
    assert "recording" in table[1]
    assert daemon.run("bitmap", "clear", "vda", "nightly").code == 0
    assert bitmaps(daemon, "vda")[0]["count"] == 0
    assert daemon.run("bitmap", "remove", "vda", "nightly").code == 0
    assert bitmaps(daemon, "vda") == []


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["add", "vda"], 2, "NAME"),
        (["add", "nope", "b"], 5, "there is no disk 'nope'"),
        (["add", "vda", ""], 1, "Bitmap name cannot be empty"),
        (["add", "vda", "b", "--granularity", "100"], 1, "power of 2"),
        (["add", "vda", "b", "--granularity", "much"], 2, "is not a size"),
        (["remove", "vda", "b"], 5, "Dirty bitmap 'b' not found"),
        (["clear", "vda", "b"], 5, "Dirty bitmap 'b' not found"),
        (["list", "nope"], 5, "there is no disk 'nope'"),
        (["shrink"], 2, "shrink"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(daemon: Daemon, args: list[str], code: int, text: str) -> None:
    done = daemon.run("bitmap", *args)
    assert done.out == ""
    assert done.err.startswith("nbdfleece: bitmap")
    assert text in done.err
    assert done.code == code


def dirty(program: Program, uri: str, name: str) -> list[tuple[int, int]]:
    context = f"qemu:dirty-bitmap:{name}"
    done = run(program("nbdinfo"), f"--map={context}", "--json", uri)
    return [(row["offset"], row["length"]) for row in json.loads(done.stdout) if row["type"] & 1]


@pytest.mark.interop("nbdinfo", "qemu-img", "qemu-io")
def test_an_increment_is_read_from_the_snapshot_by_real_programs(
    daemon: Daemon, program: Program, short_tmp: Path
) -> None:
    """What was dirty at the instant, and no more, makes a copy of the last instant one of this."""
    copy = short_tmp / "copy.raw"
    for kind, name in (("full", "one"), ("increment", "two"), ("failed", "three")):
        qemu_io(program, daemon.uri("vda"), f"write -P {len(name)} 3M 100k", "write -P 9 64k 1")
        create = ("snapshot", "create", "vda", "vdb", "--name", name, "--bitmap", "b")
        assert daemon.run(*create).code == 0
        uri = daemon.uri(f"vda@{name}")
        qemu_io(program, daemon.uri("vda"), "write -P 77 3M 1M", "write -P 77 6M 64k")
        listed = json.loads(run(program("nbdinfo"), "--json", uri).stdout)["exports"][0]
        found = [each for each in listed["contexts"] if "dirty" in each]
        assert found == ["qemu:dirty-bitmap:b"]
        whole = short_tmp / f"{name}.raw"
        run(program("qemu-img"), "convert", "-f", "raw", "-O", "raw", uri, whole)
        if kind == "full":
            assert dirty(program, uri, "b") == [(0, SIZE)]
            copy.write_bytes(whole.read_bytes())
        else:
            extents = dirty(program, uri, "b")
            assert sum(length for _, length in extents) < SIZE
            with copy.open("r+b") as into, whole.open("rb") as out:
                for offset, length in extents:
                    out.seek(offset)
                    into.seek(offset)
                    into.write(out.read(length))
        assert copy.read_bytes() == whole.read_bytes()
        shown = json.loads(daemon.run("snapshot", "show", f"vda@{name}", "--json").out)
        assert shown["bitmap"] == "b"
        assert bitmaps(daemon, "vda")[0]["busy"]
        end = "--failed" if kind == "failed" else "--success"
        assert daemon.run("snapshot", "delete", f"vda@{name}", f"vdb@{name}", end).code == 0
    left = bitmaps(daemon, "vda")[0]
    assert (left["busy"], left["count"]) == (False, MiB + 2 * 64 * KiB)
    assert bitmaps(daemon, "vdb")[0]["count"] == 0


def test_a_clear_and_a_merge_that_are_undone_leave_the_file_with_all_that_was_dirty(
    daemon: Daemon, program: Program
) -> None:
    assert daemon.run("bitmap", "add", "vda", "nightly").code == 0
    assert daemon.run("bitmap", "add", "vda", "other").code == 0
    qemu_io(program, daemon.uri("vda"), "write 1M 1M")
    assert daemon.run("bitmap", "clear", "vda", "other").code == 0
    actions = [
        {"type": "block-dirty-bitmap-clear", "data": {"node": "vda", "name": "nightly"}},
        {
            "type": "block-dirty-bitmap-merge",
            "data": {"node": "vda", "target": "nightly", "bitmaps": ["other"]},
        },
        {"type": "abort", "data": {}},
    ]

    assert daemon.run("qmp", "transaction", json.dumps({"actions": actions})).code != 0

    found = next(row for row in bitmaps(daemon, "vda") if row["bitmap"] == "nightly")
    assert found["count"] == MiB
    (file,) = daemon.state.glob("vda/bitmaps/nightly")
    assert file.read_bytes()[HEADER_SIZE:].count(1) == MiB // (64 * KiB)


def test_a_transaction_ties_bitmaps_to_its_instant_or_leaves_nothing(
    daemon: Daemon, short_tmp: Path
) -> None:
    """Bitmap actions, snapshots and what fails behind them: all or nothing."""
    add = {"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "other"}}
    taken = {"disks": ["vda", "vdb"], "name": "s", "bitmap": "b"}
    actions = [add, {"type": "fleece-snapshot-create", "data": taken}]
    for more in ([{"type": "abort", "data": {}}], [add]):
        asked = json.dumps({"actions": actions + more})
        assert daemon.run("qmp", "transaction", asked).code != 0
        assert bitmaps(daemon) == []
        assert json.loads(daemon.run("snapshot", "list", "--json").out) == []
        assert not list(daemon.state.glob("*/bitmaps/*"))
    assert daemon.run("qmp", "transaction", json.dumps({"actions": actions})).code == 0
    rows = {(row["disk"], row["bitmap"]): row for row in bitmaps(daemon)}
    assert rows[("vda", "b")]["busy"]
    assert rows[("vdb", "b")]["busy"]
    assert rows[("vda", "other")]["count"] == 0
    assert [path.parent.parent.name for path in sorted(daemon.state.glob("*/bitmaps/b"))] == [
        "vda",
        "vdb",
    ]
    assert daemon.run("snapshot", "delete", "vda@s", "vdb@s", "--success").code == 0
    assert {row["count"] for row in bitmaps(daemon)} == {0}
