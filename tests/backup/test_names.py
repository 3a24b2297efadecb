import pytest

from nbdfleece.backup.names import (
    Kind,
    file_name,
    is_disk,
    is_point,
    parse_file_name,
    point_name,
    time_prefix,
)
from nbdfleece.base.errors import ConfigError


def test_a_point_is_called_by_its_instant_in_utc() -> None:
    assert point_name("2026-11-27T04:16:44.5+01:00", set()) == "20261127T031644Z"


def test_names_sort_by_time_also_within_a_second() -> None:
    taken: list[str] = []
    for _ in range(3):
        taken.append(point_name("2026-11-27T03:16:44Z", taken))
    taken.append(point_name("2026-11-27T03:16:45Z", taken))

    assert taken[1] == "20261127T031644Z_2"
    files = [file_name(name, Kind.FULL) for name in taken]
    assert files == sorted(files)


@pytest.mark.parametrize("kind", list(Kind))
def test_file_names_say_point_and_kind(kind: Kind) -> None:
    assert parse_file_name(file_name("20261127T031644Z_2", kind)) == ("20261127T031644Z_2", kind)


@pytest.mark.parametrize(
    "name",
    ["20261127T031644Z.full.qcow2.partial", "manifest.json", "x.full.qcow2", "..full.qcow2", ""],
)
def test_other_names_are_nobodys(name: str) -> None:
    assert parse_file_name(name) is None


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("20261127T031644Z", "20261127T031644Z"),
        ("20261127T03", "20261127T03"),
        ("202611", "202611"),
        ("2026-11-27", "20261127T"),
        ("2026-11-27T04:16:44+01:00", "20261127T031644Z"),
        ("2026-11-27T03:16:44.123Z", "20261127T031644Z"),
        ("2026-11-27 03:16:44", "20261127T031644Z"),
    ],
)
def test_what_instants_mean(text: str, prefix: str) -> None:
    assert time_prefix(text) == prefix


@pytest.mark.parametrize("text", ["yesterday", "../x", "2026-13-01", "20261127x", ""])
def test_no_instant(text: str) -> None:
    with pytest.raises(ConfigError, match="is no instant"):
        time_prefix(text)


def test_disks_and_points_cannot_lead_elsewhere() -> None:
    assert is_disk("vda")
    assert is_point("20261127T031644Z")
    assert not any(map(is_disk, ["..", ".", "a/b", "", "-x", "v" * 65]))
    assert not any(map(is_point, ["..", "20261127T031644", "20261127T031644Z_0", "x"]))
