"""The commands that fleecing needs, and requests that ask for each once well and once badly.

`TABLE` is the table of the QMP surface without what fleecing does not need, which `ABSENT` lists
with the reasons. `TABLE_STEPS` has what the other lists of steps have not.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

from tests.support.qmp_conversation import WAIT, Defect, Difference, Step

Json = Any

_MIB = 1 << 20

TABLE: Final = frozenset(
    {
        *("blockdev-add", "blockdev-del", "blockdev-reopen", "blockdev-create", "block_resize"),
        *("blockdev-backup", "query-block-jobs", "query-jobs"),
        *(f"block-job-{verb}" for verb in ("cancel", "pause", "resume", "complete", "set-speed")),
        *(f"block-job-{verb}" for verb in ("finalize", "dismiss")),
        *(f"job-{verb}" for verb in ("cancel", "pause", "resume", "complete")),
        *(f"job-{verb}" for verb in ("finalize", "dismiss")),
        *(f"block-dirty-bitmap-{verb}" for verb in ("add", "remove", "clear", "enable")),
        *(f"block-dirty-bitmap-{verb}" for verb in ("disable", "merge")),
        "x-debug-block-dirty-bitmap-sha256",
        *("nbd-server-start", "nbd-server-stop", "nbd-server-add", "nbd-server-remove"),
        *("block-export-add", "block-export-del", "query-block-exports"),
        *("query-named-block-nodes", "query-block", "query-blockstats"),
        *("x-debug-query-block-graph", "transaction"),
        *("blockdev-snapshot", "blockdev-snapshot-sync", "blockdev-snapshot-internal-sync"),
        *("blockdev-snapshot-delete-internal-sync", "change-backing-file"),
        *("block-set-write-threshold", "object-add", "object-del"),
        *("qom-set", "qom-get", "qom-list"),
        *("query-version", "query-commands", "query-qmp-schema"),
    }
)

# Beginning and ending of the conversation, which its other tests have.
ELSEWHERE: Final = frozenset({"quit", "qmp_capabilities"})

NEVER_GOOD: Final = {
    "block-job-complete": "only mirror and active commit are ever ready, and neither is there",
    "job-complete": "the same",
}

ABSENT: Final = {
    "`block-stream`, `block-commit`, `blockdev-mirror`, `drive-backup`, `drive-mirror`": (
        "fleecing does without",
        {"block-stream", "block-commit", "blockdev-mirror", "drive-backup", "drive-mirror"},
    ),
    "`chardev-...`, `query-chardev...`, `ringbuf-...`": (
        "only a monitor uses a character device, and monitors are made at the start",
        {
            *("chardev-add", "chardev-change", "chardev-remove", "chardev-send-break"),
            *("query-chardev", "query-chardev-backends", "ringbuf-read", "ringbuf-write"),
        },
    ),
    "`qom-list-types`, `qom-list-properties`": (
        "which objects there are, and their properties, `query-qmp-schema` says",
        {"qom-list-types", "qom-list-properties"},
    ),
    "`x-blockdev-amend`, `x-blockdev-change`, `x-blockdev-set-iothread`": (
        "not stable in the reference, and for formats and threads that are not there",
        {"x-blockdev-amend", "x-blockdev-change", "x-blockdev-set-iothread"},
    ),
}

TABLE_DIFFERENCES = (
    *(
        Difference(commands, "there", "`CommandNotFound`", reason)
        for commands, (reason, _) in ABSENT.items()
    ),
    Difference(
        "`object-add` of `secret`, and `passwordid` of `tls-creds-x509`",
        "a password for an encrypted key",
        "refused: an unknown type, an unknown member",
        "nobody can type it into a daemon, and in a file it protects no more than the key's mode",
    ),
    Difference(
        "`object-add` of `tls-creds-anon`",
        "TLS that proves nobody's identity",
        "refused as an unknown type",
        "who sits in between reads and changes everything",
    ),
    Difference(
        "`tls-creds` of the driver `nbd`; `object-add` of `tls-creds-psk` for a client",
        "the id of an object with certificates or keys",
        "of one with certificates, or their folder itself, with a slash in its name; no keys",
        "Python has pre-shared keys from 3.13 on only",
    ),
    Difference(
        "`cache.no-flush`",
        "flushes are not done",
        "taken and shown; flushes are done",
        "what was flushed is not to be lost",
    ),
    Difference(
        "`detect-zeroes`",
        "looks for zeroes in what is written",
        "taken and shown; a client's zeroes are kept as it sends them",
        "it is for space only, and clients can write zeroes as such",
    ),
    Difference(
        "`auto-read-only`",
        "opens a file read-only where it cannot be written, or nobody writes",
        "taken; the file is opened as `read-only` says",
        "what is to be written and cannot be is an error at the start",
    ),
    Difference(
        "`force-share`, with `read-only`",
        "opens an image that somebody else writes",
        "refused",
        "what is read would be of no point in time",
    ),
    Difference(
        "sizes that are no multiple of 512, in `block_resize` and of files",
        "rounded up to sectors",
        "exact",
        "a disk has as many bytes as its file",
    ),
    Difference(
        "`blockdev-snapshot-delete-internal-sync` of a node whose format has no snapshots",
        "`Failed to get a snapshot list: Operation not supported`",
        "the words of `blockdev-snapshot-internal-sync`",
        "they name the format and the node",
    ),
)


def _file(name: str) -> Json:
    return {"driver": "file", "node-name": name, "filename": f"FOLDER/{name}"}


def _create(**options: Json) -> Iterator[Step]:
    yield Step("blockdev-create", {"job-id": "c", "options": options})
    yield Step(WAIT, {"id": "c", "status": "concluded"})
    yield Step("query-jobs")
    yield Step("job-dismiss", {"id": "c"})


_DATES = ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")
# How far a file has grown is each program's own choice.
_NODES = Step(
    "query-named-block-nodes",
    {"flat": True},
    result="subset",
    ignore=("file", "filename", *_DATES, "actual-size", "virtual-size"),
)
_SIZES = Step("query-named-block-nodes", {"flat": True}, result="subset", ignore=("actual-size",))


def _internal(device: str, name: str) -> Step:
    return Step("blockdev-snapshot-internal-sync", {"device": device, "name": name})


def _delete_internal(**which: str) -> Step:
    return Step("blockdev-snapshot-delete-internal-sync", which, ignore=_DATES)


def _object(kind: str, name: str, **properties: Json) -> Step:
    given = {key.replace("_", "-"): value for key, value in properties.items()}
    return Step("object-add", {"qom-type": kind, "id": name, **given}, text=False)


def _start(kind: str, data: Json, **more: Json) -> Step:
    given = {key.replace("_", "-"): value for key, value in more.items()}
    return Step("nbd-server-start", {"addr": {"type": kind, "data": data}, **given}, text=False)


_N = {"driver": "null-co", "node-name": "n", "size": _MIB}
_EVERY_NODE = {
    "detect-zeroes": "unmap",
    "discard": "unmap",
    "auto-read-only": True,
    "cache": {"no-flush": True, "direct": True},
}
_BACKUP = {"device": "a", "target": "t", "job-id": "j"}
_UNIX = {"path": "FOLDER/nbd"}

TABLE_STEPS = (
    Step("query-commands", result="any"),
    Step("query-qmp-schema", result="any"),
    # options of every node
    Step("blockdev-add", {**_N, "detect-zeroes": "unmap"}),
    Step("blockdev-add", {**_N, "force-share": True}),
    Step("blockdev-add", {**_N, **_EVERY_NODE}),
    Step("blockdev-reopen", {"options": [{**_N, **_EVERY_NODE, "detect-zeroes": "on"}]}),
    Step("query-named-block-nodes", {"flat": True}, result="subset", ignore=("file", "filename")),
    Step("blockdev-reopen", {"options": [_N]}),
    _NODES,
    Step("blockdev-del", {"node-name": "n"}),
    # jobs by the old names
    *(
        Step("blockdev-add", {"driver": "null-co", "node-name": name, "size": _MIB})
        for name in "at"
    ),
    Step("blockdev-backup", {**_BACKUP, "sync": "none"}),
    Step("block-job-pause", {"device": "j"}),
    Step(WAIT, {"id": "j", "status": "paused"}),
    Step("block-job-pause", {"device": "j"}),
    Step("job-resume", {"id": "j"}),
    Step("job-resume", {"id": "j"}),
    Step("block-job-cancel", {"device": "j", "force": True}),
    Step(WAIT, {"id": "j", "status": None}),
    Step("blockdev-backup", {**_BACKUP, "sync": "full", "auto-dismiss": False}),
    Step(WAIT, {"id": "j", "status": "concluded"}),
    Step("block-job-dismiss", {"id": "j"}),
    # sizes
    *_create(driver="file", filename="FOLDER/raw", size=_MIB),
    Step("blockdev-add", _file("raw")),
    Step("block_resize", {"node-name": "raw", "size": 2 * _MIB}),
    Step("block_resize", {"node-name": "raw", "size": 1536}),
    _SIZES,
    # snapshots inside an image
    *_create(driver="file", filename="FOLDER/q-file", size=0),
    Step("blockdev-add", _file("q-file")),
    *_create(driver="qcow2", file="q-file", size=_MIB),
    Step("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "q-file"}),
    _internal("nope", "s"),
    _internal("raw", "s"),
    _internal("q", ""),
    _internal("q", "s"),
    _internal("q", "s"),
    _internal("q", "t"),
    _NODES,
    _delete_internal(device="q"),
    _delete_internal(device="q", name="nope"),
    _delete_internal(device="q", id="1", name="t"),
    _delete_internal(device="q", name="t"),
    _delete_internal(device="q", id="1", name="s"),
    _delete_internal(device="q", id="1"),
    # bitmaps that an image keeps
    *chain.from_iterable(
        (
            Step(f"block-dirty-bitmap-{verb}", {"node": "q", "name": "b", **more}),
            _NODES,
        )
        for verb, more in (
            ("add", {"persistent": True}),
            ("add", {}),
            ("disable", {}),
            ("remove", {}),
            ("remove", {}),
        )
    ),
    # objects of all kinds
    _object("no-such-type", "o"),
    _object("authz-list", "l", policy="deny", rules=[{"match": "CN=x", "policy": "allow"}]),
    _object("authz-list", "l"),
    _object("authz-simple", "z", identity="CN=x"),
    _object("iothread", "io"),
    _object("tls-creds-x509", "x", endpoint="server", dir="FOLDER/nope"),
    _object("tls-creds-psk", "p", endpoint="server", dir="FOLDER/nope"),
    _object("throttle-group", "g", limits={"iops-total": 100}),
    Step("qom-list", {"path": "/objects"}, result="subset"),
    Step("qom-get", {"path": "/objects/g", "property": "limits"}),
    Step("qom-get", {"path": "g", "property": "nope"}, text=False),
    Step("qom-set", {"path": "g", "property": "limits", "value": {"iops-total": -1}}, text=False),
    Step("qom-set", {"path": "g", "property": "x-iops-total", "value": 5}, text=False),
    *(Step("object-del", {"id": name}) for name in ("l", "z", "io", "g", "g")),
    # the server, by every kind of address
    _start("inet", {"host": "127.0.0.1", "port": "no-such-port"}),
    _start("inet", {"host": "192.0.2.1", "port": "1"}),
    _start("fd", {"str": "nope"}),
    _start("unix", _UNIX, tls_creds="nope"),
    _start("unix", _UNIX, max_connections=2),
    _start("unix", _UNIX, max_connections=2),
    Step("nbd-server-add", {"device": "raw", "name": "n", "description": "d", "writable": True}),
    Step("nbd-server-add", {"device": "nope"}),
    Step(
        "block-export-add",
        {"type": "nbd", "id": "i", "node-name": "raw", "iothread": "nope"},
        text=False,
    ),
    Step(
        "block-export-add",
        {"type": "nbd", "id": "i", "node-name": "raw", "description": "d" * 5000},
    ),
    Step("block_resize", {"node-name": "raw", "size": 4 * _MIB}, text=False),
    Step("query-block-exports"),
    Step("nbd-server-remove", {"name": "n", "mode": "hard"}),
    Step("nbd-server-remove", {"name": "n"}),
    Step("nbd-server-stop"),
    # an overlay in a new file; nobody can take it away there, so it comes last
    Step(
        "blockdev-snapshot-sync",
        {"node-name": "raw", "snapshot-file": "FOLDER/nope/x", "snapshot-node-name": "o"},
        text=False,
    ),
    Step(
        "blockdev-snapshot-sync",
        {"node-name": "raw", "snapshot-file": "FOLDER/over", "snapshot-node-name": "o"},
    ),
)


# --- what the reference does wrong ----------------------------------------------------------------

_A = ("blockdev-add", {"driver": "null-co", "node-name": "a", "size": _MIB, "read-zeroes": True})


def _image(**more: Json) -> tuple[tuple[str, Json], ...]:
    """The node `q` of a new image, by steps."""
    file = {"driver": "file", "filename": "FOLDER/q-file"}
    steps: list[tuple[str, Json]] = []
    for options in ({**file, "size": 0}, {"driver": "qcow2", "file": "q-file", "size": _MIB}):
        steps += [
            ("blockdev-create", {"job-id": "c", "options": options}),
            (WAIT, {"id": "c", "status": "concluded"}),
            ("job-dismiss", {"id": "c"}),
        ]
    steps.insert(3, ("blockdev-add", {**file, "node-name": "q-file"}))
    node = {"driver": "qcow2", "node-name": "q", "file": "q-file", **more}
    return (*steps, ("blockdev-add", node))


_CBW = {"driver": "copy-before-write", "node-name": "cbw", "file": "a"}
_ACCESS = ("blockdev-add", {"driver": "snapshot-access", "node-name": "access", "file": "cbw"})

TABLE_DEFECTS = (
    Defect(
        "`cbw-timeout` of more than four seconds",
        "counted in 32 bits of nanoseconds: some are over at once",
        "as long as it says",
        (
            _A,
            ("blockdev-add", {"driver": "null-co", "node-name": "temp", "size": _MIB}),
            ("blockdev-add", {**_CBW, "target": "temp", "cbw-timeout": (1 << 32) - 1}),
        ),
        None,
    ),
    Defect(
        "`blockdev-reopen` that takes the backing from the target of copy-before-write",
        "taken; the snapshot reads as zeroes what it should read from there",
        "refused",
        (
            _A,
            *_image(backing="a"),
            ("blockdev-add", {**_CBW, "target": "q"}),
            _ACCESS,
            (
                "blockdev-reopen",
                {
                    "options": [
                        {"driver": "qcow2", "node-name": "q", "file": "q-file", "backing": None}
                    ]
                },
            ),
        ),
        "Cannot change frozen 'backing' link from node 'q' to 'a'",
    ),
    Defect(
        "`block-dirty-bitmap-add` of a persistent bitmap on a node that is read-only",
        "taken, and lost when the node is closed",
        "refused",
        (
            *_image(**{"read-only": True}),
            ("block-dirty-bitmap-add", {"node": "q", "name": "b", "persistent": True}),
        ),
        "Can't make bitmap 'b' persistent in 'q': Image is read-only",
    ),
)
