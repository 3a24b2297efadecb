"""Random conversations with a real daemon's control socket.

Every request is of the declared types, with values that make little sense, and names of what is
there. Whatever comes, it is answered, and no answer is a fault of ours: those that meant nothing to
anybody have been paths with a NUL, and further exports of nodes that the daemon had to close.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from nbdfleece.control.commands import COMMANDS
from nbdfleece.protocol.qmp.schema import (
    Alternate,
    Array,
    Boolean,
    Enum,
    Integer,
    Later,
    Null,
    Number,
    String,
    Struct,
    Type,
    Union,
)
from tests.control.test_monitor import Monitor
from tests.support.daemon_process import Daemon, make_disk

REQUESTS = 20_000 if os.environ.get("NBDFLEECE_LONG") == "1" else 600
DEEPEST = 5

NEVER = {"quit", "qmp_capabilities", "stop"}
OFTEN = ("blockdev-add", "transaction", "block-export-add", "blockdev-backup", "blockdev-reopen")
SLOW = {"latency-ns", "throttle-group", "open-timeout", "reconnect-delay"}  # answered, but when?
WORDS = (
    *("", "a", "vda", "a\0b", "x" * 300, "%s", "é", "😀", "raw", "file", "0", "-1", "::1", ",,"),
    *("../x", "/", "/dev/null", "/machine/peripheral/vda", "nbd://a..b/", "vda@s", "#block001"),
)


class Talker:
    """Makes arguments up.

    Args:
        rng: Decides.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names: list[str] = []  # of what is there

    def value(self, kind: Type, depth: int = 0):
        """Return a value of a declared type."""
        rng = self.rng
        if isinstance(kind, Later):
            return self.value(kind.make(), depth)
        if isinstance(kind, String):
            new = [f"new{rng.randrange(1000)}"] * 3
            return rng.choice([*WORDS, *self.names, *self.names, *new])
        if isinstance(kind, Enum):
            return rng.choice([word for word in kind.words if word != "nbd"] or kind.words)
        if isinstance(kind, Boolean):
            return rng.random() < 0.5
        if isinstance(kind, Integer):
            return rng.choice([0, 1, -1, 512, 65536, kind.low, kind.high, rng.randrange(1 << 20)])
        if isinstance(kind, Number):
            return rng.choice([0, 1, 1.5, 1e308, -0.0])
        if isinstance(kind, Array):
            return [self.value(kind.item, depth + 1) for _ in range(rng.choice([0, 1, 1, 2]))]
        if isinstance(kind, Alternate):
            simple = [each for each in kind.choices if not isinstance(each, Later)]
            choices = simple if depth > DEEPEST else kind.choices
            return self.value(rng.choice(choices), depth + 1)
        if isinstance(kind, Union):
            tag = rng.choice([word for word in kind.variants if word != "nbd"] or ["nbd"])
            rest = self.members(kind.base, depth) | self.members(kind.variants[tag], depth)
            return {kind.tag: tag, **rest}
        if isinstance(kind, Struct):
            return self.members(kind, depth)
        return None if isinstance(kind, Null) else rng.choice([None, 1, "x", [], {}, -5, "vda"])

    def members(self, kind: Struct | Union, depth: int) -> dict:
        """Return members of an object: all that must be there, and some that may."""
        if isinstance(kind, Union):
            return self.value(kind, depth)
        some = {
            name: member
            for name, member in kind.optional.items()
            if name not in SLOW and self.rng.random() < 0.4
        }
        return {
            name: self.value(member, depth + 1)
            for name, member in {**kind.required, **some}.items()
        }


def names_of_what_is_there(monitor: Monitor) -> list[str]:
    nodes = monitor.ask({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
    found = []
    for node in nodes["return"]:
        found += [node["node-name"], *(each.get("name") for each in node.get("dirty-bitmaps", []))]
    for query in ("query-jobs", "query-block-exports"):
        found += [each["id"] for each in monitor.ask({"execute": query})["return"]]
    return [name for name in found if name]


@pytest.mark.slow
@pytest.mark.deadline(600)
def test_no_request_meets_a_fault_of_ours(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    monkeypatch.chdir(short_tmp)  # names of files that it makes up
    talker = Talker(rng)
    commands = [name for name in COMMANDS if name not in NEVER]
    with Daemon(short_tmp, f"vda={make_disk(short_tmp / 'vda.img', 1 << 20)}") as daemon:
        daemon.ready()
        with Monitor(daemon) as monitor:
            for number in range(REQUESTS):
                if number % 40 == 0:
                    talker.names = names_of_what_is_there(monitor)
                command = rng.choice([*commands, *OFTEN * 5])
                arguments = talker.value(COMMANDS[command].arguments)
                request = {"execute": command, "arguments": arguments, "id": number}
                answer = monitor.ask(request)
                error = answer.get("error", {"desc": ""})["desc"]
                assert not error.startswith("internal error"), json.dumps(request)
                assert answer.get("id", number) == number
        daemon.stop()
        assert "Traceback" not in daemon.errors()
