"""docs/security.md says what is so: its limits, its examples, and the tests that it names."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from nbdfleece.base import limits
from nbdfleece.base.units import GiB, KiB, MiB
from nbdfleece.cli.arguments import build_parser
from nbdfleece.server.distinguished_name import parse_name
from nbdfleece.server.identity import Identity, PeerCertificate, peer_address
from nbdfleece.server.policy import Policy, Rights

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "security.md").read_text()

UNITS = {"": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "s": 1, "days": 86400}


def sections() -> dict[str, str]:
    """The text of each section by its heading."""
    parts = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(section: str) -> list[list[str]]:
    """The rows of the tables of a section, without their heads."""
    lines = [line for line in sections()[section].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {index - 1 for index, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [row for index, row in enumerate(cells) if not {index, index - 1} & heads]


def number(text: str) -> float:
    """`64 MiB`, `4 GiB - 64 KiB`, `2^63 - 1`, `10 s`, `none`."""
    if text == "none":
        return 0
    found = re.fullmatch(r"([\d.]+)(?:\^(\d+))?(?: ([A-Za-z]+))?(?: ([+-]) (.+))?", text)
    assert found is not None, f"'{text}' is not a value"
    value: float = float(found[1]) if "." in found[1] else int(found[1])
    value = value ** int(found[2] or 1) * UNITS[found[3] or ""]
    rest = number(found[5]) if found[5] else 0
    return value - rest if found[4] == "-" else value + rest


def documented(text: str) -> float | tuple[float, ...]:
    """A value, or several with one unit behind them: `0.2, 0.4 s`."""
    if "," not in text:
        return number(text)
    return tuple(number(part.removesuffix(" s").strip()) for part in text.split(","))


def actual() -> dict[str, object]:
    names = re.findall(r"^([A-Z0-9_]+): Final", Path(limits.__file__).read_text(), re.MULTILINE)
    return {name: getattr(limits, name) for name in names}


def test_every_limit_is_documented_with_its_value() -> None:
    described = {row[0].strip("`"): documented(row[1]) for row in rows("Limits")}
    expected = actual()
    wrong = [
        f"{name}: the document says {described.get(name, 'nothing')}, the code {value}"
        for name, value in expected.items()
        if described.get(name) != value
    ]
    wrong += [f"{name}: there is no such limit" for name in described if name not in expected]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_limit_is_documented_twice() -> None:
    names = [row[0] for row in rows("Limits")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", 0),
        ("4096", 4096),
        ("64 MiB", 64 * MiB),
        ("4 GiB - 64 KiB", 4 * GiB - 64 * KiB),
        ("16 MiB + 8", 16 * MiB + 8),
        ("2^63 - 1", (1 << 63) - 1),
        ("366 days", 366 * 86400),
        ("0.2, 2 s", (0.2, 2)),
    ],
)
def test_values_are_read_as_they_are_meant(text: str, value: object) -> None:
    assert documented(text) == value


def test_options_that_change_limits_exist() -> None:
    parser = build_parser("x")
    for option in re.findall(r"`(--[a-z-]+)`", "".join(row[2] for row in rows("Limits"))):
        args = parser.parse_args(["serve", option, "5", "/x"])
        assert getattr(args, option[2:].replace("-", "_")) == 5


# --- past holes ------------------------------------------------------------------------------


PAST = "Past holes of NBD servers, and what holds each off here"

# Of the NBD servers; the fixes without a number are told by their release.
KNOWN = {
    *("2005-3534", "2011-0530", "2011-1925", "2013-6410", "2013-7441", "2015-0847", "2022-26495"),
    *("2022-26496", "2017-7539", "2017-9524", "2017-10664", "2017-15118", "2017-15119"),
    *("2020-10761", "2024-7409", "2019-14850", "2019-14851", "2021-3716", "2025-47711"),
    *("2025-47712", "2024-34083"),
}


def test_every_known_hole_has_its_row() -> None:
    told = [row[0] for row in rows(PAST)]
    assert [number for number in KNOWN if told.count(f"CVE-{number}") != 1] == []


@cache
def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("row", rows(PAST), ids=lambda row: f"{row[0]} {row[1]}")
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    tests = row[3].split()
    assert tests
    for test in tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), f"{path} is not there"
        assert name in functions_in(ROOT / path), f"{path} has no test {name}"


# --- the example policy ------------------------------------------------------------------------


def test_example_policy_means_what_its_comments_say(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "policy.toml"
    path.write_text(example)
    policy = Policy.load(path)
    inside, outside = peer_address("10.1.2.3"), peer_address("203.0.113.1")

    def backup(name: str) -> PeerCertificate:
        return PeerCertificate(parse_name(f"CN={name},O=Example"))

    one = Identity(address=inside, tls=True, certificate=backup("backup1"))
    spiffe = PeerCertificate(parse_name("CN=x"), uris=("spiffe://example.org/backup/1",))
    read = Rights.LIST | Rights.READ
    for identity, export, rights in (
        (Identity(uid=0, gid=0, pid=1), "vda", Rights.ALL),
        (Identity(uid=0, gid=0, pid=1), "vda@a", Rights.NONE),
        (one, "vda@a", read),
        (one, "vda", Rights.NONE),
        (Identity(address=outside, tls=True, certificate=backup("backup1")), "vda@a", Rights.NONE),
        (Identity(address=inside, tls=True, certificate=backup("backup7")), "vda@a", Rights.NONE),
        (Identity(tls=True, certificate=spiffe), "vdz@a", read),
        (Identity(tls=True, psk="site-b"), "mirror", Rights.ALL),
        (Identity(tls=True, psk="site-c"), "mirror", Rights.NONE),
        (Identity(address=inside), "vda@a", Rights.NONE),
    ):
        assert policy.rights(identity, export) == rights, (identity, export)
