"""nbdinfo: what the exports say of themselves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import KiB, MiB, run, serving

pytestmark = pytest.mark.interop("nbdinfo")

SIZE = 3 * MiB + 1536
Program = Callable[[str], str]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A disk with a hole at 1 MiB, of 1 MiB, and its snapshot; and one of an odd size."""
    with tempfile.TemporaryDirectory(prefix="nbdf-") as folder:
        yield from serve_two_disks(Path(folder))


def serve_two_disks(folder: Path) -> Iterator[Daemon]:
    disk = make_disk(folder / "vda.raw", SIZE)
    with disk.open("r+b") as file:
        file.truncate(MiB)
        file.truncate(2 * MiB)
        file.seek(2 * MiB)
        file.write(b"\2" * (MiB + 1536))
    odd = make_disk(folder / "odd.raw", 1_000_001)
    with serving(folder, disk, odd, disks=2) as running:
        assert running.run("snapshot", "create", "vda", "--name", "one").code == 0
        yield running


def described(program: Program, uri: str) -> dict:
    done = run(program("nbdinfo"), "--json", uri)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_plain(daemon: Daemon, program: Program) -> None:
    done = run(program("nbdinfo"), daemon.uri("vda"))
    assert "protocol: newstyle-fixed without TLS, using structured packets" in done.stdout
    assert f"export-size: {SIZE}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("export", ["vda", "vda@one"])
def test_what_a_live_export_and_a_snapshot_can(
    daemon: Daemon, program: Program, export: str
) -> None:
    is_live = export == "vda"
    (found,) = described(program, daemon.uri(export))["exports"]
    assert found["export-name"] == export
    assert found["export-size"] == SIZE
    assert found["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    facts = {name: value for name, value in found.items() if name.startswith(("can_", "is_"))}
    assert facts == {
        "is_rotational": False,
        "is_read_only": not is_live,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": is_live,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": is_live,
        "can_zero": is_live,
    }
    assert found["block_size_minimum"] == 1
    assert found["block_size_preferred"] >= 4096
    assert found["block_size_maximum"] == 32 * MiB


def test_the_snapshot_says_its_instant(daemon: Daemon, program: Program) -> None:
    rows = daemon.run("snapshot", "list", "--json").json
    (found,) = described(program, daemon.uri("vda@one"))["exports"]
    assert found["description"] == f"disk vda as of {rows[0]['instant']}, crash-consistent"


def test_list(daemon: Daemon, program: Program) -> None:
    anything = f"nbd+unix:///?socket={daemon.socket}"
    done = run(program("nbdinfo"), "--list", "--json", anything)
    found = json.loads(done.stdout)["exports"]
    sizes = {each["export-name"]: each["export-size"] for each in found}
    assert sizes == {"vda": SIZE, "odd": 1_000_001, "vda@one": SIZE}
    assert done.stderr == ""
    plain = run(program("nbdinfo"), "--list", anything).stdout
    assert all(f'export="{name}":' in plain for name in sizes)


@pytest.mark.parametrize("export", ["vda", "odd", "vda@one"])
def test_size(daemon: Daemon, program: Program, export: str) -> None:
    expected = 1_000_001 if export == "odd" else SIZE
    assert run(program("nbdinfo"), "--size", daemon.uri(export)).stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("question", "live", "snapshot"),
    [
        ("--can=connect", 0, 0),
        ("--can=read", 0, 0),
        ("--can=write", 0, 2),
        ("--can=trim", 0, 2),
        ("--can=zero", 0, 2),
        ("--can=flush", 0, 0),
        ("--can=fua", 0, 0),
        ("--can=df", 0, 0),
        ("--can=cache", 0, 0),
        ("--can=multi-conn", 0, 0),
        ("--can=structured-reply", 0, 0),
        ("--is=read-only", 2, 0),
        ("--is=tls", 2, 2),
    ],
)
def test_questions(
    daemon: Daemon, program: Program, question: str, live: int, snapshot: int
) -> None:
    run(program("nbdinfo"), question, daemon.uri("vda"), code=live)
    run(program("nbdinfo"), question, daemon.uri("vda@one"), code=snapshot)


@pytest.mark.parametrize("export", ["vda", "vda@one"])
def test_map(daemon: Daemon, program: Program, export: str) -> None:
    done = run(program("nbdinfo"), "--map", "--json", daemon.uri(export))
    found = [(each["offset"], each["length"], each["type"]) for each in json.loads(done.stdout)]
    assert found == [(0, MiB, 0), (MiB, MiB, 3), (2 * MiB, MiB + 1536, 0)]
    totals = run(program("nbdinfo"), "--map", "--totals", daemon.uri(export)).stdout
    assert [line.split()[0] for line in totals.splitlines()] == [str(SIZE - MiB), str(MiB)]


def test_map_of_an_odd_size_ends_where_the_disk_does(daemon: Daemon, program: Program) -> None:
    done = run(program("nbdinfo"), "--map", "--json", daemon.uri("odd"))
    assert sum(each["length"] for each in json.loads(done.stdout)) == 1_000_001


def test_map_of_a_terabyte_of_hole(short_tmp: Path, program: Program) -> None:
    """One request for all of it, in units that do not fit 32 bits."""
    size = 5 << 40
    disk = short_tmp / "huge.raw"
    with disk.open("xb") as file:
        file.truncate(size)
        file.seek(3 << 40)
        file.write(b"\1" * 64 * KiB)
    with serving(short_tmp, disk) as daemon:
        assert daemon.run("snapshot", "create", "huge", "--name", "one").code == 0
        for export in ("huge", "huge@one"):
            done = run(program("nbdinfo"), "--map", "--json", daemon.uri(export))
            found = json.loads(done.stdout)
            assert [(each["offset"], each["length"]) for each in found if each["type"] == 0] == [
                (3 << 40, 64 * KiB)
            ]
            assert sum(each["length"] for each in found) == size


def test_an_unknown_export_is_refused_and_the_empty_name_needs_a_single_disk(
    daemon: Daemon, short_tmp: Path, program: Program
) -> None:
    done = run(program("nbdinfo"), daemon.uri("nowhere"), code=1)
    assert "No such file or directory" in done.stderr
    run(program("nbdinfo"), f"nbd+unix:///?socket={daemon.socket}", code=1)
    folder = short_tmp / "b"
    folder.mkdir()
    with serving(folder, make_disk(folder / "only.raw", MiB)) as single:
        anything = f"nbd+unix:///?socket={single.socket}"
        assert run(program("nbdinfo"), "--size", anything).stdout == f"{MiB}\n"


def test_over_tcp(short_tmp: Path, program: Program) -> None:
    disk = make_disk(short_tmp / "vda.raw", MiB)
    with serving(short_tmp, "--listen", "tcp:127.0.0.1:0", disk) as daemon:
        status = daemon.run("status", "--json").json["daemon"]
        (uri,) = [uri for uri in status["exports"][0]["uris"] if uri.startswith("nbd://")]
        assert run(program("nbdinfo"), "--size", uri).stdout == f"{MiB}\n"
