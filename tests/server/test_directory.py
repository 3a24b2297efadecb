"""What one client may see: rights, masked flags, tokens, TLS first, full exports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.server.directory import ClientDirectory, Gate
from nbdfleece.server.export import READ_ONLY_FLAGS, WRITABLE_FLAGS
from nbdfleece.server.identity import Identity
from nbdfleece.server.policy import Policy, Rights
from nbdfleece.server.tokens import Tokens
from tests.support.nbd_server import Served, serving

RULES = """
rule = [
  { who = { uid = 1 }, exports = ["disk"], allow = "all" },
  { who = { uid = 2 }, exports = ["disk"], allow = ["list", "read"] },
  { who = { uid = 3 }, exports = ["disk"], allow = ["read", "write"] },
  { who = { uid = 4 }, exports = ["*"], allow = ["list"] },
]
"""


def policy(folder: Path, text: str = RULES) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text.replace('"all"', '["all"]'))
    return Policy(path)


@asynccontextmanager
async def gated(folder: Path, **fields: object) -> AsyncIterator[tuple[Served, Gate]]:
    async with serving(folder) as served:
        yield served, Gate(served.exports, policy(folder), **fields)  # type: ignore[arg-type]


def seen_by(gate: Gate, uid: int, *, may_start_tls: bool = False) -> ClientDirectory:
    return ClientDirectory(gate, Identity(uid=uid), may_start_tls=may_start_tls)


def flags(directory: ClientDirectory, name: str) -> int:
    found = directory.find(name)
    assert found is not None
    return found.flags


def refusal(call: Callable[[], object]) -> int:
    with pytest.raises(OptionRefused) as caught:
        call()
    return caught.value.reply


async def test_without_a_policy_everybody_may_do_everything(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        directory = seen_by(Gate(served.exports), 77)
        assert [info.name for info in directory.list()] == ["disk", "frozen"]
        assert flags(directory, "disk") == WRITABLE_FLAGS
        assert flags(directory, "frozen") == READ_ONLY_FLAGS
        assert directory.find("unknown") is None
        assert directory.refused == ""


async def test_rights_are_flags(short_tmp: Path) -> None:
    async with gated(short_tmp) as (_, gate):
        assert flags(seen_by(gate, 1), "disk") == WRITABLE_FLAGS
        assert flags(seen_by(gate, 2), "disk") == READ_ONLY_FLAGS
        assert flags(seen_by(gate, 3), "disk") == WRITABLE_FLAGS & ~c.NBD_FLAG_SEND_TRIM


async def test_not_allowed_is_the_same_as_not_there(short_tmp: Path) -> None:
    async with gated(short_tmp) as (served, gate):
        for uid in (4, 5):
            directory = seen_by(gate, uid)
            for name in ("disk", "frozen", "unknown", ""):
                assert directory.find(name) is None
        served.exports.named("disk").refusal = "the snapshot is broken"
        assert seen_by(gate, 5).find("disk") is None
        assert refusal(lambda: seen_by(gate, 1).find("disk")) == c.NBD_REP_ERR_POLICY


async def test_the_policy_is_asked_before_anybody_looks(short_tmp: Path) -> None:
    async with gated(short_tmp) as (served, gate):
        steps: list[str] = []

        class Watching(Policy):
            def rights(self, identity: Identity, export_name: str) -> Rights:
                steps.append(f"rights {export_name}")
                return Rights.NONE

        gate.policy = Watching(short_tmp / "policy.toml")
        named = served.exports.named
        served.exports.named = lambda name: (steps.append(f"named {name}"), named(name))[1]
        for name in ("disk", "unknown"):
            seen_by(gate, 1).find(name)
        assert steps == ["rights disk", "named disk", "rights unknown", "named unknown"]


async def test_lists_show_what_may_be_listed(short_tmp: Path) -> None:
    async with gated(short_tmp) as (_, gate):
        assert [info.name for info in seen_by(gate, 2).list()] == ["disk"]
        assert [info.name for info in seen_by(gate, 3).list()] == []
        assert [info.name for info in seen_by(gate, 4).list()] == ["disk", "frozen"]


async def test_refusals_of_what_is_there_are_told_to_the_log(short_tmp: Path) -> None:
    async with gated(short_tmp) as (_, gate):
        directory = seen_by(gate, 5)
        directory.find("unknown")
        assert directory.refused == ""
        directory.find("frozen")
        assert directory.refused == "frozen"


async def test_default_export_is_judged_by_its_own_name(short_tmp: Path) -> None:
    async with gated(short_tmp) as (served, gate):
        served.exports.default_name = "disk"
        found = seen_by(gate, 2).find("")
        assert found is not None
        assert (found.name, found.flags) == ("disk", READ_ONLY_FLAGS)
        assert seen_by(gate, 5).find("") is None


async def test_policy_that_is_read_again_counts_at_once(short_tmp: Path) -> None:
    async with gated(short_tmp) as (_, gate):
        directory = seen_by(gate, 5)
        assert directory.find("disk") is None
        policy(short_tmp, RULES.replace("uid = 2", "uid = 5"))
        assert gate.policy is not None
        gate.policy.reload()
        assert flags(directory, "disk") == READ_ONLY_FLAGS


# --- TLS -------------------------------------------------------------------------------------


async def test_where_tls_may_give_more_it_comes_first_for_all_one_does_not_get(
    short_tmp: Path,
) -> None:
    async with gated(short_tmp) as (_, gate):
        directory = seen_by(gate, 2, may_start_tls=True)
        assert flags(directory, "disk") == READ_ONLY_FLAGS
        for name in ("frozen", "unknown", ""):
            assert refusal(lambda name=name: directory.find(name)) == c.NBD_REP_ERR_TLS_REQD
        assert [info.name for info in directory.list()] == ["disk"]


async def test_without_a_policy_tls_gives_nothing_more(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        directory = seen_by(Gate(served.exports), 1, may_start_tls=True)
        assert directory.find("unknown") is None


# --- tokens ----------------------------------------------------------------------------------


async def test_token_opens_one_export_to_a_stranger_and_is_not_listed(short_tmp: Path) -> None:
    tokens = Tokens(lambda: 0.0)
    async with gated(short_tmp, tokens=tokens) as (served, gate):
        name = tokens.add("disk", 60.0)
        stranger = seen_by(gate, 5)
        found = stranger.find(name)
        assert found is not None
        assert (found.name, found.flags) == (name, READ_ONLY_FLAGS)
        assert stranger.chosen(found) is served.exports.named("disk")
        assert stranger.find(name[:-1] + "~") is None
        assert stranger.list() == []
        tokens.revoke("disk")
        assert stranger.find(name) is None


async def test_token_of_an_export_that_is_gone_opens_nothing(short_tmp: Path) -> None:
    tokens = Tokens(lambda: 0.0)
    async with gated(short_tmp, tokens=tokens) as (_, gate):
        assert seen_by(gate, 5).find(tokens.add("gone", 60.0)) is None


# --- full exports ----------------------------------------------------------------------------


async def test_full_export_says_so_to_those_who_may_know(short_tmp: Path) -> None:
    async with gated(short_tmp, max_per_export=1) as (served, gate):
        export = served.exports.named("disk")
        assert export is not None
        export.hold()
        assert refusal(lambda: seen_by(gate, 1).find("disk")) == c.NBD_REP_ERR_POLICY
        assert seen_by(gate, 5).find("disk") is None
        export.release()
        assert seen_by(gate, 1).find("disk") is not None


async def test_token_that_expires_once_its_export_is_found(short_tmp: Path) -> None:
    """Between being found and being held lies no time for the client, but some for the clock."""
    now = 0.0
    tokens = Tokens(lambda: now)
    async with gated(short_tmp, tokens=tokens) as (served, gate):
        directory = seen_by(gate, 5)
        info = directory.find(tokens.add("disk", 60.0))
        assert info is not None
        now = 60.0
        assert directory.chosen(info) is served.exports.named("disk")


async def test_policy_that_is_read_again_once_an_export_is_found(short_tmp: Path) -> None:
    """It is read in a thread, so at any moment."""
    async with gated(short_tmp) as (served, gate):
        directory = seen_by(gate, 2)
        info = directory.find("disk")
        assert info is not None
        assert gate.policy is not None
        policy(short_tmp, "rule = []")
        gate.policy.reload()
        assert directory.chosen(info) is served.exports.named("disk")
        assert seen_by(gate, 2).find("disk") is None


@pytest.mark.parametrize("is_for_one", [True, False])
async def test_where_one_may_connect_nobody_hears_of_several(
    short_tmp: Path, is_for_one: bool
) -> None:
    async with gated(short_tmp, is_for_one=is_for_one) as (_, gate):
        directory = seen_by(gate, 1)
        listed = next(info for info in directory.list() if info.name == "disk")
        for found in (flags(directory, "disk"), listed.flags):
            assert bool(found & c.NBD_FLAG_CAN_MULTI_CONN) is not is_for_one
