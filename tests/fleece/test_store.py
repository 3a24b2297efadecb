from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nbdfleece.fleece.errors import NameTaken, StateError, StateLocked
from nbdfleece.fleece.store import StateFolder, remove_files


@pytest.fixture
def state(tmp_path: Path):
    folder = StateFolder(tmp_path / "state", None)
    folder.open()
    yield folder
    folder.close()


def test_only_one_may_use_it(state: StateFolder) -> None:
    late = StateFolder(state.path, None)
    with pytest.raises(StateLocked):
        late.open()
    state.close()
    late.open()
    late.close()


def test_files_of_a_snapshot(state: StateFolder) -> None:
    files = state.make_snapshot("vda", "one", 5000, {"instant": ""})
    assert files.temp.stat().st_size == 5000
    assert files.temp.stat().st_blocks == 0
    assert files.temp.stat().st_mode & 0o777 == 0o600
    assert json.loads(files.meta.read_text())["version"] == 1
    with pytest.raises(NameTaken):
        state.make_snapshot("vda", "one", 5000, {})
    remove_files(files)
    assert not files.folder.exists()
    remove_files(files)


def test_a_snapshot_that_cannot_be_made_leaves_nothing(state: StateFolder) -> None:
    with pytest.raises(StateError):
        state.make_snapshot("vda", "one", -1, {})
    assert not state.snapshot_exists("vda", "one")


def test_leftovers_go_and_are_named(state: StateFolder) -> None:
    files = state.make_snapshot("vda", "one", 5000, {})
    torn = state.path / "vda" / "snapshots" / "torn"
    torn.mkdir()
    (torn / "meta.json").write_text('{"version": 1, "ins')
    empty = state.path / "vdb" / "snapshots" / "empty"
    empty.mkdir(parents=True)
    said = state.clear_leftovers()
    assert [line.split()[1] for line in said] == ["vda@one", "vda@torn", "vdb@empty"]
    assert not files.folder.exists()
    assert not torn.exists()
    assert state.clear_leftovers() == []


def test_leftovers_never_reach_outside(state: StateFolder, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    files = state.make_snapshot("vda", "one", 5000, {})
    files.meta.write_text(json.dumps({"version": 1, "temp": str(precious)}))
    state.clear_leftovers()
    assert precious.exists()
    assert not files.folder.exists()


def test_what_is_not_ours_in_a_leftover_stays(state: StateFolder) -> None:
    files = state.make_snapshot("vda", "one", 5000, {})
    (files.folder / "notes").write_text("x")
    (said,) = state.clear_leftovers()
    assert "cannot be removed" in said
    assert os.listdir(files.folder) == ["notes"]


def test_an_unknown_version_is_refused_and_nothing_touched(state: StateFolder) -> None:
    first = state.make_snapshot("vda", "a", 5000, {})
    second = state.make_snapshot("vda", "b", 5000, {})
    second.meta.write_text('{"version": 2}')
    with pytest.raises(StateError, match=r"meta\.json' is of version 2"):
        state.clear_leftovers()
    assert first.temp.exists()
    disk = state.path / "vda" / "disk.json"
    disk.write_text('{"version": "x"}')
    with pytest.raises(StateError, match=r"disk\.json' is of version 'x'"):
        state.write_disk("vda", {})
    assert disk.read_text() == '{"version": "x"}'
