import json
from dataclasses import replace

import pytest

from nbdfleece.backup.errors import Damaged
from nbdfleece.backup.manifest import Change, Manifest, Point, dump, load
from nbdfleece.backup.names import Kind


def point(number: int, parent: int | None = None) -> Point:
    return Point(
        name=f"2026112{number}T000000Z",
        instant=f"2026-11-2{number}T00:00:00.123Z",
        kind=Kind.FULL if parent is None else Kind.INCREMENT,
        parent=None if parent is None else f"2026112{parent}T000000Z",
        size=1 << 30,
        file_bytes=4711,
        sha256="ab" * 32,
        bitmap="backup-1-2",
        reason="first backup" if parent is None else "",
    )


CHAIN = Manifest("vda", "0123abcd", (point(1), point(2, 1), point(3, 2)))


def test_what_is_written_is_read() -> None:
    whole = replace(
        CHAIN,
        pending=Change(replace(point(2), reason=""), ("20261121T000000Z",)),
        garbage=("20261101T000000Z.full.qcow2",),
    )

    assert load(dump(whole), "m") == whole
    assert load(dump(CHAIN), "m") == CHAIN


def test_a_pending_merge_applied_leaves_the_old_files_as_garbage() -> None:
    merged = replace(point(2), sha256="cd" * 32)
    pending = replace(CHAIN, pending=Change(merged, (point(1).name,)))

    applied = pending.applied()

    assert applied.points == (merged, point(3, 2))
    assert applied.garbage == (point(1).file, point(2, 1).file)
    assert applied.pending is None


def test_a_pending_file_that_takes_an_old_name_is_no_garbage() -> None:
    merged = replace(point(3, 1), sha256="cd" * 32)

    applied = replace(CHAIN, pending=Change(merged, (point(2).name,))).applied()

    assert applied.points == (point(1), merged)
    assert applied.garbage == (point(2, 1).file,)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "version 2"),
        ({"disk": "../etc"}, "'disk'"),
        ({"points": 7}, "'points'"),
        ({"garbage": ["../../etc/passwd"]}, "'garbage'"),
        ({"points": [{"name": "x"}]}, "'kind'"),
        ({"pending": {"drop": 1}}, "'drop'"),
    ],
)
def test_nonsense_is_refused_with_its_name(change: dict, complaint: str) -> None:
    value = json.loads(dump(CHAIN)) | change

    with pytest.raises(Damaged, match=complaint):
        load(json.dumps(value).encode(), "manifest.json")


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("name", "../x"),
        ("name", "20261122T000000"),
        ("file", "20261122T000000Z.full.qcow2"),
        ("parent", None),
        ("parent", "20261125T000000Z"),
        ("size", -1),
        ("size", True),
        ("sha256", "AB"),
        ("instant", "2026-11-22T00:00:00"),
        ("instant", "soon"),
        ("bitmap", "a/b"),
    ],
)
def test_points_that_make_no_sense_are_refused(member: str, value: object) -> None:
    manifest = json.loads(dump(CHAIN))
    manifest["points"][1][member] = value

    with pytest.raises(Damaged):
        load(json.dumps(manifest).encode(), "m")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"7", b"[" * 100000])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        load(data, "m")


def test_points_out_of_order_are_refused() -> None:
    with pytest.raises(Damaged, match="out of order"):
        load(dump(replace(CHAIN, points=(point(1), point(3, 1), point(2, 1)))), "m")
