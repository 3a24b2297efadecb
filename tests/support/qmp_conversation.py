"""One list of QMP requests for two daemons, and what may differ between their answers.

Most requests are wrong on purpose: `faults` derives them from the introspection of both daemons,
one fault in each, for every command that both have. `STEPS` are the others, in an order that
matters. docs/qmp.md lists `DIFFERENCES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Json = Any

# Not asked for: it would end the conversation, or begin it again.
NOT_DRIVEN = {"quit", "qmp_capabilities"}

# Values of unions: what blkdebug may be told of a format's inner events is not there.
NOT_COMPARED = {"blkdebug"}

# Members that we demand and the reference does not; each is among the differences.
STRICTER: frozenset[str] = frozenset()

MAX_FAULT_DEPTH = 3  # objects inside each other


@dataclass(frozen=True)
class Difference:
    """An answer of ours that is not QEMU's, on purpose.

    Attributes:
        request: What is asked: a command and its arguments, or raw text.
        reference: What qemu-storage-daemon 7.2 does.
        ours: What nbdfleece does.
        reason: Why.
    """

    request: str
    reference: str
    ours: str
    reason: str


DIFFERENCES = (
    Difference(
        "a wrong word for an enumeration inside an object or a list",
        "names the last member alone, or `null` inside a list",
        "names the whole path, as for every other fault: `actions[0].type`",
        "whoever sent a list of twenty must be told which",
    ),
    Difference(
        "a value of the wrong kind in a list of alternatives",
        "names it `null`",
        "names the whole path: `bitmaps[0]`",
        "the same",
    ),
    Difference(
        "a negative number for an unsigned 64-bit argument",
        "wraps it around",
        "`Parameter 'x' expects uint64`",
        "a size of 2^64 - 1 is never what was meant",
    ),
    Difference(
        "text that is no JSON",
        "`JSON parse error, ` and its parser's words",
        "`JSON parse error, ` and our parser's words",
        "the class and the beginning are the same, and programs look no further",
    ),
    Difference(
        "strings in single quotes",
        "taken, as an extension of JSON",
        "refused as no JSON",
        "no client sends them; JSON is JSON",
    ),
    Difference(
        "`query-version` and the greeting",
        "QEMU's version and package",
        "7.2.0, our package, and a member `nbdfleece`",
        "clients choose what they ask for by QEMU's version",
    ),
    Difference(
        "`query-status`, `query-name`, `query-tpm`, `stop`, `cont`",
        "`CommandNotFound`",
        "answered for a machine that has disks and nothing else",
        "programs written for a virtual machine ask these first",
    ),
    Difference(
        "`query-block` and `query-blockstats` without `query-nodes`",
        "always empty",
        "one entry for each served disk: the live export of a disk, and every writable export",
        "a program written for a virtual machine finds there what to back up",
    ),
    Difference(
        "`qom-list` of `/`, `qom-get` and `qom-set` of `drive`",
        "no `/machine`",
        "`/machine/peripheral/ID/virtio-backend` for each served disk, with the property `drive`",
        "the only way in QEMU to put a filter above a guest's disk",
    ),
    Difference(
        "`blockdev-snapshot` and `-sync` with an overlay of another size than the node",
        "taken; those who use the node find another size",
        "refused",
        "clients of an export know its size from when they connected",
    ),
    Difference(
        "`blockdev-snapshot-sync`: the overlay",
        "goes with the last user, and `blockdev-del` refuses it",
        "belongs to the user, as a node of `blockdev-add`",
        "whoever made it can take it away",
    ),
    Difference(
        "`block_resize` of a node that is behind an overlay",
        "`Device '(null)' is in use`",
        "names the node and the overlay",
        "that is no device",
    ),
    Difference(
        "an overlay over the source itself as target of `blockdev-backup` or copy-before-write",
        "may hold data already, and can lose its backing meanwhile",
        "has to be empty; the links between the two are frozen",
        "what is exported from it would not be of one instant",
    ),
    Difference(
        "the same overlay when the job has ended, failed, or the filter has left",
        "shows the disk as it is now",
        "gives what it holds itself; the rest is EIO until `blockdev-reopen` gives another backing",
        "a client that still reads would get newer data, without knowing",
    ),
    Difference(
        "making or deleting internal snapshots in an image of version 2",
        "done; a crash meanwhile leaves an image that `qemu-img check` calls corrupt",
        "refused",
        "that version cannot say that it has to be repaired",
    ),
    Difference(
        "going back to an internal snapshot",
        "no command; `qemu-img snapshot -a`",
        "no command; `qemu-img snapshot -a` on an image that is not served",
        "a guest that goes on would write its cached state over the older disk",
    ),
    Difference(
        "`blockdev-create` of a file that somebody writes or counts on",
        "its content is gone, unless an image lock forbids it",
        "the same; a file that could not be made is removed where there was none before",
        "a half-made image is taken for an image",
    ),
    Difference(
        "`file` and `image.filename` of a filter above a node that has no file name",
        "a `json:` text that begins with the filter",
        "a `json:` text of the node below",
        "the filter changes nothing of what the data are",
    ),
    Difference(
        "permissions of copy-before-write in `x-debug-query-block-graph`",
        "`target` is shared with other writers; `file` is read without asking for it",
        "`target` is shared with readers alone; `file` needs `consistent-read`",
        "a second writer of `target` destroys the snapshot",
    ),
    Difference(
        "`JOB_STATUS_CHANGE` while a job runs",
        "`paused` and `running` for every drain of its nodes; `created` and `null` for some "
        "jobs that were refused",
        "where a drain does not reach a job, and a job was refused before it was made, nothing",
        "how often a graph is drained is no promise; the states of a job's life are the same",
    ),
    Difference(
        "`blkdebug`",
        "takes every event of every image format",
        "takes the events of reading, writing and flushing",
        "it is for tests, and the others are of formats that are not there",
    ),
    Difference(
        "errors of commands with `fleece-` in their names",
        "no such commands",
        "a member `reason` beside `class` and `desc`",
        "our command line sorts its exit codes by it",
    ),
)


# --- requests with one fault each ---------------------------------------------------------------


class Schema:
    """What a daemon's `query-qmp-schema` says."""

    def __init__(self, entries: list[Json]) -> None:
        self.by_name = {entry["name"]: entry for entry in entries}

    def commands(self) -> set[str]:
        return {name for name, entry in self.by_name.items() if entry["meta-type"] == "command"}

    def arguments(self, command: str) -> Json:
        return self.by_name[self.by_name[command]["arg-type"]]

    def members(self, kind: Json, case: str | None = None) -> dict[str, Json]:
        """Members of an object, with those of one variant of a union."""
        found = {member["name"]: member for member in kind["members"]}
        for variant in kind.get("variants", []):
            if variant["case"] == case:
                found |= self.members(self.by_name[variant["type"]])
        return found


@dataclass(frozen=True)
class Fault:
    """A value with something wrong in it."""

    what: str
    value: Json


class Faults:
    """Makes requests that both daemons must refuse alike, of what both have.

    Attributes:
        stricter: Members found on the way that we demand and the reference does not.
    """

    def __init__(self, theirs: Schema, ours: Schema) -> None:
        self.stricter: set[str] = set()
        self.theirs = theirs
        self.ours = ours

    def commands(self) -> list[str]:
        return sorted((self.theirs.commands() & self.ours.commands()) - NOT_DRIVEN)

    def of(self, command: str) -> Iterator[Fault]:
        """Wrong arguments for a command."""
        yield from self._object(self.theirs.arguments(command), self.ours.arguments(command), 0)

    def _cases(self, theirs: Json, ours: Json) -> list[str | None]:
        """Variants that both have; without variants: [None]."""
        if "tag" not in theirs:
            return [None]
        have = {variant["case"] for variant in ours.get("variants", [])} - NOT_COMPARED
        words = self._words(theirs)
        return [word for word in words if word in have or not ours.get("variants")]

    def _words(self, union: Json) -> list[str]:
        tag = self.theirs.members(union)[union["tag"]]
        return self.theirs.by_name[tag["type"]]["values"]

    def _object(self, theirs: Json, ours: Json, depth: int) -> Iterator[Fault]:
        if depth > MAX_FAULT_DEPTH or ours["meta-type"] != "object":
            return
        for case in self._cases(theirs, ours):
            stricter = self._stricter(theirs, ours, case)
            self.stricter |= stricter
            good = self._good_object(theirs, ours, case)
            yield Fault("unexpected", {**good, "no-such-member": 1})
            mine = self.ours.members(ours, case)
            for name, member in self.theirs.members(theirs, case).items():
                if name not in mine:
                    continue
                if "default" not in member and name not in stricter:
                    yield Fault("missing", {key: good[key] for key in good if key != name})
                their_type = self.theirs.by_name[member["type"]]
                my_type = self.ours.by_name[mine[name]["type"]]
                for fault in self._value(their_type, my_type, depth + 1):
                    yield Fault(fault.what, {**good, name: fault.value})

    def _value(self, theirs: Json, ours: Json, depth: int) -> Iterator[Fault]:
        kind = theirs["meta-type"]
        if kind == "builtin":
            if theirs["name"] not in ("any", "null"):
                yield Fault("type", [] if theirs["name"] == "str" else "x")
        elif kind == "enum":
            yield Fault("type", 5)
            yield Fault("word", "no-such-word")
        elif kind == "array":
            yield Fault("type", 5)
            if ours["meta-type"] == "array":
                their_item = self.theirs.by_name[theirs["element-type"]]
                my_item = self.ours.by_name[ours["element-type"]]
                for fault in self._value(their_item, my_item, depth):
                    yield Fault(fault.what, [fault.value])
        elif kind == "alternate":
            yield Fault("type", [])
        else:
            yield Fault("type", 5)
            yield from self._object(theirs, ours, depth)

    def _stricter(self, theirs: Json, ours: Json, case: str | None) -> set[str]:
        mine = self.ours.members(ours, case)
        return {
            name
            for name, member in self.theirs.members(theirs, case).items()
            if "default" in member and name in mine and "default" not in mine[name]
        }

    def _good(self, theirs: Json, ours: Json) -> Json:
        kind = theirs["meta-type"]
        if kind == "builtin":
            values = {"str": "x", "int": 1, "number": 1, "bool": True, "null": None, "any": {}}
            return values[theirs["name"]]
        if kind == "enum":
            return next(word for word in theirs["values"] if word in ours.get("values", (word,)))
        if kind == "array":
            return []
        if kind == "alternate":
            return "x"
        return self._good_object(theirs, ours, self._cases(theirs, ours)[0])

    def _good_object(self, theirs: Json, ours: Json, case: str | None) -> dict[str, Json]:
        good: dict[str, Json] = {}
        mine = self.ours.members(ours, case)
        for name, member in self.theirs.members(theirs, case).items():
            if name == theirs.get("tag"):
                good[name] = case
            elif "default" not in member or (name in mine and "default" not in mine[name]):
                their_type = self.theirs.by_name[member["type"]]
                my_type = self.ours.by_name[mine[name]["type"]] if name in mine else their_type
                good[name] = self._good(their_type, my_type)
        return good


# --- comparing -----------------------------------------------------------------------------------

_QUOTED = re.compile(r"^(Parameter '|Invalid parameter type for ')([^']*)(')")


def same_refusal(theirs: Json, ours: Json) -> bool:
    """Tell whether two errors about arguments are the same, but for the first two differences."""
    if theirs == ours:
        return True
    if theirs["class"] != ours["class"]:
        return False
    their_path, my_path = _QUOTED.match(theirs["desc"]), _QUOTED.match(ours["desc"])
    if their_path is None or my_path is None:
        return False
    if _QUOTED.sub(r"\1\3", theirs["desc"]) != _QUOTED.sub(r"\1\3", ours["desc"]):
        return False
    last = re.split(r"\.", my_path[2])[-1]
    return their_path[2] == last or (their_path[2] == "null" and last.endswith("]"))


# --- requests whose order matters -----------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A request, and what of its answer must be QEMU's.

    Attributes:
        command: Asked for only when both daemons have it.
        arguments: Its arguments.
        text: Also the words of the error, not its class alone.
        result: What of a result must be the same: all of it, members that the reference has
            (`subset`), or nothing (`any`).
        ignore: Members that are left out of a result, at any depth; see the differences.
    """

    command: str
    arguments: Json = None
    text: bool = True
    result: str = "all"
    ignore: tuple[str, ...] = ()


def _null(name: str, **more: Json) -> Json:
    return {"driver": "null-co", "node-name": name, **more}


def _throttle(group: str) -> Json:
    return {"driver": "throttle", "node-name": "th", "throttle-group": group, "file": "a"}


def _bitmap(verb: str, **arguments: Json) -> Step:
    return Step(f"block-dirty-bitmap-{verb}", arguments)


def _action(verb: str, **data: Json) -> Json:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": "a", **data}}


_GROUP = {"qom-type": "throttle-group", "id": "t"}
_CBW = {"driver": "copy-before-write", "node-name": "cbw", "file": "a", "target": "temp"}
_MIB = 1 << 20
_X = "x" * 32

STEPS = (
    Step("query-version", result="any"),
    Step("query-block-jobs"),
    Step("query-jobs"),
    Step("query-block-exports"),
    Step("query-named-block-nodes"),
    Step("query-block"),
    Step("query-blockstats"),
    # nodes
    Step("blockdev-add", {"driver": "null-co"}),
    Step("blockdev-add", _null("1a")),
    Step("blockdev-add", _null("")),
    Step("blockdev-add", _null(_X)),
    Step("blockdev-add", _null("a", size=_MIB)),
    Step("blockdev-add", _null("a")),
    Step("blockdev-add", {"driver": "raw", "node-name": "r", "file": "nope"}),
    Step("blockdev-add", {"driver": "raw", "node-name": "r", "file": "a"}),
    Step("blockdev-add", {"driver": "raw", "node-name": "s", "file": _null("f", size=_MIB)}),
    Step("blockdev-add", _null("big", size=16 * _MIB)),
    Step("blockdev-del", {"node-name": "nope"}),
    Step("blockdev-del", {"node-name": "a"}),
    Step("blockdev-del", {"node-name": "f"}, text=False),
    Step("query-named-block-nodes", {"flat": True}, result="subset", ignore=("file", "filename")),
    Step("query-blockstats", {"query-nodes": False}),
    Step("x-debug-query-block-graph", ignore=("id", "parent", "child")),
    Step("block_resize", {"size": 1}, text=False),
    Step("block_resize", {"node-name": "q", "size": 1}, text=False),
    Step("block_resize", {"node-name": "a", "size": -1}),
    Step("block-set-write-threshold", {"node-name": "nope", "write-threshold": 5}),
    Step("block-set-write-threshold", {"node-name": "a", "write-threshold": 5}),
    Step("block-set-write-threshold", {"node-name": "a", "write-threshold": 0}),
    # reopen
    Step("blockdev-reopen", {"options": [{"driver": "null-co"}]}, text=False),
    Step("blockdev-reopen", {"options": [_null("nope")]}, text=False),
    Step("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "a", "file": "big"}]}),
    Step("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "r", "file": "nope"}]}),
    Step("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "r", "file": "r"}]}),
    Step("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "r", "file": "s"}]}),
    Step("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "r", "file": "a"}]}),
    # overlays
    Step("blockdev-snapshot", {"node": "nope", "overlay": "big"}),
    Step("blockdev-snapshot", {"node": "", "overlay": "big"}),
    Step("blockdev-snapshot", {"node": "a", "overlay": "nope"}),
    Step("blockdev-snapshot", {"node": "r", "overlay": "s"}),
    Step("blockdev-snapshot", {"node": "r", "overlay": "r"}),
    *(
        Step("blockdev-snapshot-sync", {"snapshot-file": "FOLDER/sync", **where})
        for where in ({}, {"device": "nope"}, {"node-name": "nope"}, {"node-name": "a"})
    ),
    Step(
        "blockdev-snapshot-sync",
        {"snapshot-file": "FOLDER/sync", "node-name": "a", "snapshot-node-name": "big"},
    ),
    *(
        Step(
            "change-backing-file",
            {"device": device, "image-node-name": image, "backing-file": "x"},
        )
        for device, image in (("nope", "a"), ("a", "nope"), ("r", "r"), ("a", "a"))
    ),
    # transactions
    Step("transaction", {"actions": []}),
    Step("transaction", {"actions": [{"type": "abort", "data": {}}]}),
    # jobs that are not there
    *(Step(f"block-job-{verb}", {"device": "j"}) for verb in ("cancel", "pause", "resume")),
    Step("block-job-complete", {"device": "j"}),
    Step("block-job-set-speed", {"device": "j", "speed": 1}),
    *(Step(f"block-job-{verb}", {"id": "j"}) for verb in ("finalize", "dismiss")),
    *(
        Step(f"job-{verb}", {"id": "j"})
        for verb in ("cancel", "pause", "resume", "complete", "finalize", "dismiss")
    ),
    # backup
    Step("blockdev-backup", {"device": "nope", "target": "a", "sync": "full", "job-id": "j"}),
    Step("blockdev-backup", {"device": "a", "target": "nope", "sync": "full", "job-id": "j"}),
    Step("blockdev-backup", {"device": "s", "target": "s", "sync": "full"}, text=False),
    # bitmaps
    _bitmap("add", node="nope", name="b"),
    _bitmap("add", node="a", name="b", granularity=64000),
    _bitmap("add", node="a", name="b", granularity=256),
    _bitmap("add", node="a", name="b", granularity=0),
    _bitmap("add", node="a", name="b", granularity=1 << 32),
    _bitmap("add", node="a", name=""),
    _bitmap("add", node="a", name="x" * 1024),
    _bitmap("add", node="a", name="b", persistent=True),
    _bitmap("add", node="r", name="b", persistent=True),
    _bitmap("add", node="a", name="b"),
    _bitmap("add", node="a", name="b"),
    _bitmap("add", node="a", name="coarse", granularity=1 << 31, disabled=True),
    _bitmap("add", node="big", name="b", persistent=False),
    *(
        _bitmap(verb, node=node, name=name)
        for verb in ("clear", "enable", "disable")
        for node, name in (("nope", "b"), ("a", "nope"), ("a", ""), ("a", "b"), ("a", "b"))
    ),
    *(
        _bitmap("merge", node=node, target=target, bitmaps=sources)
        for node, target, sources in (
            ("nope", "b", ["b"]),
            ("a", "nope", ["b"]),
            ("a", "b", ["nope"]),
            ("a", "b", [{"node": "nope", "name": "b"}]),
            ("a", "b", [{"node": "big", "name": "nope"}]),
            ("a", "b", [{"node": "big", "name": "b"}]),
            ("a", "b", ["b"]),
            ("a", "b", ["coarse", {"node": "a", "name": "b"}]),
        )
    ),
    *(
        Step("x-debug-block-dirty-bitmap-sha256", {"node": node, "name": name})
        for node, name in (("nope", "b"), ("a", "nope"), ("a", "b"), ("a", "coarse"))
    ),
    Step("transaction", {"actions": [_action("add", name="c"), _action("add", name="b")]}),
    Step("transaction", {"actions": [_action("clear", name="b"), {"type": "abort", "data": {}}]}),
    Step(
        "transaction",
        {
            "actions": [
                _action("disable", name="b"),
                _action("add", name="c"),
                _action("merge", target="c", bitmaps=["b"]),
                _action("remove", name="coarse"),
            ]
        },
    ),
    Step(
        "transaction",
        {"actions": [_action("clear", name="b")], "properties": {"completion-mode": "grouped"}},
    ),
    Step("query-named-block-nodes", {"flat": True}, result="subset", ignore=("file", "filename")),
    _bitmap("remove", node="a", name="nope"),
    _bitmap("remove", node="nope", name="b"),
    _bitmap("remove", node="a", name="b"),
    _bitmap("remove", node="a", name="b"),
    _bitmap("enable", node="a", name="c"),
    _bitmap("add", node="a", name="still", disabled=True),
    # the NBD server and its exports
    Step("block-export-add", {"type": "nbd", "id": "e", "node-name": "a"}),
    Step("nbd-server-stop"),
    Step("nbd-server-add", {"device": "a"}),
    Step("nbd-server-remove", {"name": "nope"}),
    Step("block-export-del", {"id": "nope"}),
    Step(
        "nbd-server-start",
        {"addr": {"type": "unix", "data": {"path": "FOLDER/x"}}, "tls-creds": "nope"},
    ),
    Step(
        "nbd-server-start", {"addr": {"type": "unix", "data": {"path": "FOLDER/no/x"}}}, text=False
    ),
    Step("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "FOLDER/nbd"}}}),
    Step("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "FOLDER/nbd"}}}),
    Step("block-export-add", {"type": "nbd", "id": "#e", "node-name": "a"}),
    Step("block-export-add", {"type": "nbd", "id": "e", "node-name": "nope"}),
    Step("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "name": "y" * 5000}),
    *(
        Step("block-export-add", {"type": "nbd", "id": "e", "node-name": node, "bitmaps": bitmaps})
        for node, bitmaps in (
            ("a", ["nope"]),
            ("a", ["c"]),
            ("r", ["still"]),
            ("a", [{"node": "nope", "name": "c"}]),
            ("a", [{"node": "a", "name": "nope"}]),
            ("a", ["still", {"node": "a", "name": "still"}]),
        )
    ),
    *(_bitmap(verb, node="a", name="still") for verb in ("remove", "clear", "enable", "disable")),
    _bitmap("merge", node="a", target="still", bitmaps=["c"]),
    _bitmap("merge", node="a", target="c", bitmaps=["still"]),
    Step("nbd-server-add", {"device": "a", "name": "x", "bitmap": "nope"}),
    Step("nbd-server-add", {"device": "a", "name": "x", "bitmap": "still"}),
    Step("block-export-add", {"type": "nbd", "id": "e", "node-name": "big"}),
    Step("block-export-add", {"type": "nbd", "id": "e2", "node-name": "big", "name": "a"}),
    Step("block-export-add", {"type": "nbd", "id": "e2", "node-name": "big", "writable": True}),
    Step("query-block-exports"),
    Step("nbd-server-add", {"device": "s"}),
    Step("nbd-server-add", {"device": "s"}),
    Step("nbd-server-remove", {"name": "s"}),
    Step("blockdev-del", {"node-name": "big"}),
    Step("block-export-del", {"id": "e"}),
    Step("block-export-del", {"id": "e"}),
    Step("block-export-del", {"id": "e2", "mode": "hard"}),
    Step("block-export-add", {"type": "nbd", "id": "e", "node-name": "a"}),
    Step("nbd-server-stop"),
    Step("nbd-server-stop"),
    Step("query-block-exports"),
    # objects
    Step("object-del", {"id": "nope"}),
    Step("object-add", {"qom-type": "throttle-group", "id": "1x"}),
    Step("object-add", {"qom-type": "throttle-group", "id": "t"}),
    Step("object-add", {"qom-type": "throttle-group", "id": "t"}, text=False),
    Step("object-del", {"id": "t"}),
    Step("object-add", {"qom-type": "authz-simple", "id": "z", "identity": "CN=x"}),
    Step("object-del", {"id": "z"}),
    Step("qom-list", {"path": "/nope"}, text=False),
    Step("qom-get", {"path": "/nope", "property": "p"}, text=False),
    Step("qom-set", {"path": "/nope", "property": "p", "value": 1}, text=False),
    # limits, and a filter that keeps to them
    Step("object-add", {**_GROUP, "limits": {"iops-total": -1}}, text=False),
    Step("object-add", {**_GROUP, "limits": {"iops-total": 1, "iops-read": 1}}),
    Step("object-add", {**_GROUP, "limits": {"bps-total-max": 5}}),
    Step("object-add", {**_GROUP, "limits": {"bps-total": 5, "bps-total-max": 4}}),
    Step("object-add", {**_GROUP, "limits": {"iops-total": 1, "iops-total-max-length": 0}}),
    Step("object-add", {**_GROUP, "limits": {"iops-total": 1, "iops-total-max-length": 5}}),
    Step("object-add", {**_GROUP, "limits": {"iops-total": 1000, "bps-read": 10**6}}),
    Step("qom-get", {"path": "t", "property": "limits"}),
    Step("qom-set", {"path": "t", "property": "limits", "value": {"iops-total": 2000}}),
    Step("qom-get", {"path": "t", "property": "limits"}),
    Step("blockdev-add", _throttle("nope")),
    Step("blockdev-add", _throttle("t")),
    Step("object-del", {"id": "t"}, text=False),
    Step("blockdev-reopen", {"options": [_throttle("nope")]}),
    Step("blockdev-reopen", {"options": [_throttle("t")]}),
    Step("blockdev-del", {"node-name": "th"}),
    Step("object-del", {"id": "t"}),
    # fleecing by hand
    Step("blockdev-add", _null("temp", size=_MIB)),
    Step("blockdev-add", {**_CBW, "target": "nope"}),
    Step("blockdev-add", {**_CBW, "on-cbw-error": "break-snapshot", "cbw-timeout": 45}),
    Step("blockdev-add", {"driver": "snapshot-access", "node-name": "access", "file": "cbw"}),
    *(Step("blockdev-del", {"node-name": name}) for name in ("a", "temp", "cbw")),
    Step(
        "blockdev-reopen",
        {"options": [{"driver": "snapshot-access", "node-name": "access", "file": "cbw"}]},
    ),
    # Permissions around copy-before-write are not the reference's: see below.
    Step("x-debug-query-block-graph", ignore=("id", "parent", "child", "perm", "shared-perm")),
    *(Step("blockdev-del", {"node-name": name}) for name in ("access", "cbw", "temp")),
    # and all away again
    *(Step("blockdev-del", {"node-name": name}) for name in ("r", "s", "big", "a")),
    Step("query-named-block-nodes"),
)

WAIT = "wait"  # not a command: until job `id` has `status`, or is gone

_BACKUP = {"device": "a", "target": "t", "sync": "full"}


def _bitmap_backups() -> Iterator[Step]:
    for sync in ("full", "top", "none", "incremental", "bitmap"):
        for name in ("b", "nope", None):
            for mode in ("on-success", "always", "never", None):
                given = {"bitmap": name, "bitmap-mode": mode}
                if not any(given.values()):
                    continue
                given = {key: value for key, value in given.items() if value is not None}
                yield Step("blockdev-backup", {**_BACKUP, "sync": sync, "job-id": "m", **given})
                yield Step(WAIT, {"id": "m", "status": None})


_NEW = {"driver": "file", "filename": "FOLDER/new", "size": 0}


def _create(**options: Json) -> tuple[Step, ...]:
    """A job that makes an image, until it is forgotten."""
    return (
        Step("blockdev-create", {"job-id": "c", "options": options}),
        Step(WAIT, {"id": "c", "status": "concluded"}),
        Step("query-jobs"),
        Step("query-block-jobs"),
        Step("block-job-dismiss", {"id": "c"}),
        Step("job-dismiss", {"id": "c"}),
    )


OVERLAY_STEPS = (
    Step("blockdev-create", {"job-id": "c", "options": {"driver": "null-co"}}),
    Step("blockdev-create", {"job-id": "c", "options": {"driver": "raw"}}),
    Step("blockdev-create", {"job-id": "1c", "options": _NEW}),
    *_create(**_NEW),
    *_create(**{**_NEW, "filename": "/nope/new"}),
    *_create(**{**_NEW, "size": _MIB, "preallocation": "metadata"}),
    *_create(**{**_NEW, "size": 4097, "preallocation": "full"}),
    *_create(driver="qcow2", file="nope", size=_MIB),
    *_create(**_NEW),
    Step("blockdev-add", {"driver": "file", "node-name": "f", "filename": "FOLDER/new"}),
    *_create(driver="qcow2", file="f", size=_MIB),
    Step("blockdev-add", _null("a", size=_MIB)),
    Step("blockdev-add", _null("b", size=_MIB)),
    Step("blockdev-add", {"driver": "qcow2", "node-name": "ov", "file": "f"}),
    Step("blockdev-snapshot", {"node": "ov", "overlay": "ov"}),
    Step("blockdev-snapshot", {"node": "a", "overlay": "ov"}),
    Step("blockdev-snapshot", {"node": "a", "overlay": "ov"}),
    Step("blockdev-snapshot", {"node": "b", "overlay": "ov"}),
    Step("blockdev-snapshot", {"node": "a", "overlay": "b"}),
    Step("blockdev-del", {"node-name": "a"}),
    Step("blockdev-del", {"node-name": "f"}),
    Step("block_resize", {"node-name": "a", "size": _MIB}, text=False),
    *(
        Step(
            "change-backing-file",
            {"device": device, "image-node-name": image, "backing-file": "x"},
        )
        for device, image in (("a", "ov"), ("b", "ov"), ("ov", "a"), ("ov", "ov"))
    ),
    *(
        Step(
            "blockdev-reopen",
            {"options": [{"driver": "qcow2", "node-name": "ov", "file": "f", **backing}]},
        )
        for backing in (
            {},
            {"backing": "nope"},
            {"backing": {"driver": "null-co"}},
            {"backing": "ov"},
            {"backing": "b"},
            {"backing": None},
            {},
            {"backing": {"driver": "null-co"}},
            {"backing": "a"},
        )
    ),
    *(Step("blockdev-del", {"node-name": name}) for name in ("a", "ov", "a", "b", "f")),
)

JOB_STEPS = (
    Step("blockdev-add", _null("a", size=_MIB, **{"read-zeroes": True})),
    Step("blockdev-add", _null("t", size=_MIB)),
    Step("blockdev-add", _null("small", size=4096)),
    Step("blockdev-backup", {**_BACKUP, "target": "small", "job-id": "j"}),
    Step("blockdev-backup", {**_BACKUP, "sync": "bitmap", "job-id": "j"}, text=False),
    Step("blockdev-backup", {**_BACKUP, "speed": -1, "job-id": "j"}),
    Step("blockdev-backup", {**_BACKUP, "job-id": "1j"}),
    Step("blockdev-backup", _BACKUP),
    Step("query-jobs"),
    # one that ends when it is told to
    Step("blockdev-backup", {**_BACKUP, "sync": "none", "job-id": "j"}),
    Step("query-jobs"),
    Step("query-block-jobs"),
    Step("blockdev-backup", {**_BACKUP, "sync": "none", "job-id": "j"}, text=False),
    Step("blockdev-del", {"node-name": "a"}),
    Step("blockdev-del", {"node-name": "t"}),
    *(Step(f"job-{verb}", {"id": "j"}) for verb in ("complete", "finalize", "dismiss", "resume")),
    Step("block-job-resume", {"device": "j"}),
    Step("block-job-set-speed", {"device": "j", "speed": -1}),
    Step("block-job-set-speed", {"device": "j", "speed": 4096}),
    Step("job-pause", {"id": "j"}),
    Step(WAIT, {"id": "j", "status": "paused"}),
    Step("job-pause", {"id": "j"}),
    Step("block-job-resume", {"device": "j"}),
    Step("job-cancel", {"id": "j"}),
    Step(WAIT, {"id": "j", "status": None}),
    # one that runs to its end and waits at every stage
    Step(
        "blockdev-backup", {**_BACKUP, "job-id": "k", "auto-finalize": False, "auto-dismiss": False}
    ),
    Step(WAIT, {"id": "k", "status": "pending"}),
    Step("query-jobs"),
    *(Step(f"job-{verb}", {"id": "k"}) for verb in ("dismiss", "pause", "resume", "complete")),
    Step("block-job-finalize", {"id": "k"}),
    Step(WAIT, {"id": "k", "status": "concluded"}),
    Step("query-jobs"),
    Step("query-block-jobs"),
    *(Step(f"job-{verb}", {"id": "k"}) for verb in ("finalize", "pause", "cancel", "dismiss")),
    Step("query-jobs"),
    # one that nobody looks after
    Step("blockdev-backup", {**_BACKUP, "job-id": "l"}),
    Step(WAIT, {"id": "l", "status": None}),
    # with bitmaps: what makes sense, and what does not
    _bitmap("add", node="a", name="b"),
    *_bitmap_backups(),
    Step("query-named-block-nodes", {"flat": True}, result="subset", ignore=("file", "filename")),
    Step("blockdev-del", {"node-name": "a"}),
    Step("blockdev-del", {"node-name": "t"}),
)


@dataclass(frozen=True)
class Defect:
    """What qemu-storage-daemon 7.2 does wrong, and we do right.

    Attributes:
        title: For the document.
        reference: What goes wrong there.
        ours: What happens here.
        steps: Requests; all but the last must succeed.
        refused: How the last one's error begins; None: it must succeed.
    """

    title: str
    reference: str
    ours: str
    steps: tuple[tuple[str, Json], ...]
    refused: str | None


def _cbw(name: str, target: str) -> tuple[str, Json]:
    options = {"driver": "copy-before-write", "node-name": name, "file": "a", "target": target}
    return "blockdev-add", options


_A = ("blockdev-add", _null("a", size=_MIB))
_UNIX = {"type": "unix", "data": {"path": "FOLDER/nbd"}}

DEFECTS = (
    Defect(
        "a target of copy-before-write that is smaller than the disk",
        "taken; the first guest write past its end aborts the program",
        "refused",
        (_A, ("blockdev-add", _null("small", size=4096)), _cbw("c", "small")),
        "",
    ),
    Defect(
        "a target of copy-before-write that is the disk itself",
        "taken",
        "refused",
        (_A, _cbw("c", "a")),
        "",
    ),
    Defect(
        "snapshot-access above a node that is no copy-before-write",
        "taken; every read fails",
        "refused",
        (_A, ("blockdev-add", {"driver": "snapshot-access", "node-name": "s", "file": "a"})),
        "",
    ),
    Defect(
        "a second writer of copy-before-write's target",
        "allowed, and it destroys the snapshot",
        "refused",
        (
            _A,
            ("blockdev-add", _null("temp", size=_MIB)),
            _cbw("c", "temp"),
            ("blockdev-add", {"driver": "snapshot-access", "node-name": "s", "file": "c"}),
            ("nbd-server-start", {"addr": _UNIX}),
            (
                "block-export-add",
                {"type": "nbd", "id": "e", "node-name": "temp", "writable": True},
            ),
        ),
        "",
    ),
    Defect(
        "`block-dirty-bitmap-merge` of an empty list",
        "the program crashes",
        "succeeds, and changes nothing",
        (
            _A,
            ("block-dirty-bitmap-add", {"node": "a", "name": "b"}),
            ("block-dirty-bitmap-merge", {"node": "a", "target": "b", "bitmaps": []}),
        ),
        None,
    ),
    Defect(
        "`blockdev-reopen` of an empty list",
        "the program crashes",
        "succeeds, and changes nothing",
        (("blockdev-reopen", {"options": []}),),
        None,
    ),
    Defect(
        "null-co with a negative `size`",
        "the program aborts",
        "refused",
        (("blockdev-add", _null("n", size=-1)),),
        "",
    ),
    Defect(
        "`nbd-server-start` with a `tls-authz` that does not exist",
        "taken; every client is refused later",
        "refused",
        (("nbd-server-start", {"addr": _UNIX, "tls-authz": "nope"}),),
        "",
    ),
    Defect(
        "`object-add` of `authz-list-file`",
        "the schema names it `authz-listfile`, which then is an invalid type",
        "taken by both names; this one is refused for its file",
        (("object-add", {"qom-type": "authz-list-file", "id": "z", "filename": "FOLDER/no"}),),
        "authz-list-file: ",
    ),
    Defect(
        "`object-del` of an iothread under an export",
        "succeeds; the program aborts at its end",
        "refused as in use",
        (
            _A,
            ("object-add", {"qom-type": "iothread", "id": "io"}),
            ("nbd-server-start", {"addr": _UNIX}),
            ("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "iothread": "io"}),
            ("object-del", {"id": "io"}),
        ),
        "object 'io' is in use",
    ),
)

RAW = (
    b"[]",
    b"1 ",
    b'"x" ',
    b"{}",
    b'{"execute": 1}',
    b'{"execute": null, "id": null}',
    b'{"execute": "nope", "id": [1, {"a": "b"}]}',
    b'{"execute": "query-version", "arguments": [], "id": true}',
    b'{"execute": "query-version", "arguments": null, "id": 1.5}',
    b'{"execute": "query-version", "zz": 1, "id": "x"}',
    b'{"execute": "query-version", "arguments": {"x": 1}}',
    b'{"arguments": {}}',
    b'{"id": 5}',
    b'{"exec-oob": "query-version"}',
    b'{"execute": "query-version", "exec-oob": "query-version"}',
    b'{"execute": "query-version", "execute": "query-version"}',
    b'{"execute": "\xc3\xa9"}',
)

RAW_WITH_OOB = (
    b'{"exec-oob": "query-version", "id": {"a": null}}',
    b'{"exec-oob": "nope"}',
    b'{"exec-oob": 1}',
    b'{"execute": "query-version", "exec-oob": "query-version"}',
    b'{"exec-oob": "qmp_capabilities"}',
    b'{"execute": "qmp_capabilities"}',
)

NOT_JSON = (
    b"nope ",
    b'{"execute": "query-version",}',
    b'{"execute" "query-version"}',
    b'{"execute": "query-version", "id": "\\q"}',
    b'{"execute": "query-version", "id": NaN}',
    b'{"execute": "\xc3\x28"}',
)
