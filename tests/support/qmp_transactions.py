"""Transactions for two daemons, good and bad ones; all answers and events are to be the same.

Not asked for, since the reference crashes: see TRANSACTION_DEFECTS.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

from tests.support.qmp_conversation import WAIT, Defect, Difference, Step

Json = Any

_MIB = 1 << 20
ABORT = {"type": "abort", "data": {}}


def _null(name: str, size: int = _MIB) -> Step:
    return Step(
        "blockdev-add",
        {"driver": "null-co", "node-name": name, "size": size, "read-zeroes": True},
    )


def _run(*actions: Json, text: bool = True, mode: str | None = None) -> Step:
    properties = {} if mode is None else {"properties": {"completion-mode": mode}}
    return Step("transaction", {"actions": list(actions), **properties}, text=text)


def _grouped(*actions: Json) -> Step:
    return _run(*actions, mode="grouped")


def _backup(job: str | None, device: str = "a", target: str = "t", **more: Json) -> Json:
    data = {"device": device, "target": target, "sync": "full"}
    data |= {name.replace("_", "-"): value for name, value in more.items()}
    if job is not None:
        data["job-id"] = job
    return {"type": "blockdev-backup", "data": data}


def _bitmap(verb: str, name: str = "b", node: str = "a", **more: Json) -> Json:
    data = {"node": node, "target" if verb == "merge" else "name": name, **more}
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


def _gone(*jobs: str) -> tuple[Step, ...]:
    return tuple(Step(WAIT, {"id": job, "status": None}) for job in jobs)


def _until(status: str, *jobs: str) -> tuple[Step, ...]:
    return tuple(Step(WAIT, {"id": job, "status": status}) for job in jobs)


def _job(verb: str, job: str) -> Step:
    return Step(f"job-{verb}", {"id": job})


_STATE = (
    Step("query-jobs"),
    Step("query-block-jobs"),
    Step("query-named-block-nodes", {"flat": True}, result="subset", ignore=("file", "filename")),
)
_WRONG_BACKUPS = (
    _backup("w", device="nope"),
    _backup("w", target="nope"),
    _backup("w", device="b", target="b"),
    _backup("w", device="b", target="small"),
    _backup("w", device="b", target="u", speed=-1),
    _backup("1w", device="b", target="u"),
    _backup(None, device="b", target="u"),
    _backup("w", device="b", target="u", filter_node_name="a"),
    _backup("w", device="b", target="u", filter_node_name="1"),
    _backup("w", device="b", target="u", bitmap="nope"),
    _backup("w", device="b", target="u", bitmap_mode="never"),
    _backup("w", device="b", target="u", x_perf={"max-workers": 0}),
    _backup("w", device="b", target="u", x_perf={"max-chunk": -1}),
)
_WRONG_BITMAPS = (
    _bitmap("add", node="nope"),
    _bitmap("add", name=""),
    _bitmap("add", granularity=100),
    _bitmap("add", persistent=True),
    *(_bitmap(verb, name="nope") for verb in ("remove", "clear")),
    *(_bitmap(verb, node="nope") for verb in ("remove", "clear")),
    _bitmap("merge", name="nope", bitmaps=["nope"]),
)


def _image(name: str) -> tuple[Step, ...]:
    """A new image without content, and its node."""
    file = f"FOLDER/{name}"
    jobs = (
        {"driver": "file", "filename": file, "size": 0},
        {"driver": "qcow2", "file": f"{name}-file", "size": _MIB},
    )
    node = {"driver": "file", "node-name": f"{name}-file", "filename": file}
    made: list[Step] = []
    for options in jobs:
        made += [
            Step("blockdev-create", {"job-id": "c", "options": options}),
            *_until("concluded", "c"),
            _job("dismiss", "c"),
        ]
    made.insert(3, Step("blockdev-add", node))
    overlay = {"driver": "qcow2", "node-name": name, "file": f"{name}-file"}
    return (*made, Step("blockdev-add", overlay))


def _snapshot(node: str, overlay: str) -> Json:
    return {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}


_SYNC = {
    "type": "blockdev-snapshot-sync",
    "data": {"node-name": "a", "snapshot-file": "FOLDER/sync", "snapshot-node-name": "sync"},
}
_GRAPH = Step("x-debug-query-block-graph", ignore=("id", "parent", "child", "perm", "shared-perm"))

SNAPSHOT_TRANSACTION_STEPS = (
    *(_null(name) for name in "abt"),
    *_image("o"),
    *_image("p"),
    *(
        _run(_snapshot(node, overlay))
        for node, overlay in (("nope", "o"), ("a", "nope"), ("a", "b"), ("a", "a"))
    ),
    _grouped(_snapshot("a", "o")),
    _grouped(_SYNC),
    _run({**_SYNC, "data": {**_SYNC["data"], "snapshot-node-name": "b"}}),
    _GRAPH,
    # undone
    _run(_snapshot("a", "o"), ABORT),
    _run(_snapshot("a", "o"), _snapshot("b", "o")),
    _run(_snapshot("a", "o"), _snapshot("b", "p"), _bitmap("add", node="nope")),
    _run(_snapshot("a", "o"), _bitmap("add", node="o"), _backup("sa", device="o"), ABORT),
    _run(_backup("sb", device="b"), _snapshot("a", "o"), ABORT),
    _GRAPH,
    # done: later actions see the overlay (T-B19)
    _run(
        _bitmap("add"),
        _snapshot("a", "o"),
        _bitmap("add", node="o"),
        _bitmap("merge", node="o", bitmaps=[{"node": "a", "name": "b"}]),
        _bitmap("remove"),
    ),
    _run(_snapshot("b", "p"), _backup("sc", device="p", sync="top")),
    *_gone("sc"),
    _GRAPH,
    *(Step("blockdev-del", {"node-name": name}) for name in ("a", "o", "p", "a", "b", "t")),
    *(Step("blockdev-del", {"node-name": f"{name}-file"}) for name in "op"),
)

TRANSACTION_STEPS = (
    *(_null(name) for name in "abctu"),
    _null("small", 4096),
    # nothing, and nothing but refusals
    _run(),
    _run(mode="individual"),
    _grouped(),
    _run(ABORT),
    _run(ABORT, ABORT),
    _grouped(ABORT),
    *(_run(wrong) for wrong in (*_WRONG_BACKUPS, *_WRONG_BITMAPS)),
    *_STATE,
    # a right backup in front of a wrong action, and behind one
    *(_run(_backup(f"f{i}"), wrong) for i, wrong in enumerate((*_WRONG_BACKUPS, *_WRONG_BITMAPS))),
    *(_run(wrong, _backup("g")) for wrong in (*_WRONG_BACKUPS[:7], *_WRONG_BITMAPS[:4])),
    _run(_backup("h"), _backup("h", device="b", target="u")),
    _run(_backup("i"), _backup("k", device="b", target="t")),
    _run(_backup("l"), _backup("m", device="a", target="u"), ABORT),
    _run(_backup("n", auto_dismiss=False, auto_finalize=False), ABORT),
    _grouped(_backup("o"), ABORT),
    _grouped(_backup("q"), _bitmap("add")),
    _grouped(_bitmap("add"), _backup("q")),
    _grouped(_bitmap("clear", name="nope")),
    _run(_backup("h", sync="none"), _backup("h2", device="a", target="a")),
    *_STATE,
    # bitmaps: later actions see what earlier ones did, and all is undone
    _run(_bitmap("add"), _bitmap("add")),
    _run(_bitmap("add"), _bitmap("add", name="c", disabled=True), ABORT),
    _run(_bitmap("add"), _bitmap("remove"), _bitmap("add", name="other", granularity=100)),
    _run(_bitmap("add", granularity=512), _bitmap("enable"), _bitmap("clear")),
    _run(_bitmap("add", name="c"), _bitmap("merge", name="c", bitmaps=["b"]), ABORT),
    _run(_bitmap("add", name="c"), _bitmap("merge", name="c", bitmaps=["b"])),
    _run(_bitmap("disable"), _bitmap("clear", name="c"), _bitmap("remove"), ABORT),
    _run(_bitmap("disable"), _bitmap("enable", name="c"), _bitmap("clear", name="nope")),
    *_STATE,
    _run(_bitmap("disable"), _bitmap("disable"), _bitmap("enable"), _bitmap("disable")),
    _run(_bitmap("remove"), _bitmap("merge", name="c", bitmaps=["b"]), text=False),
    _run(_bitmap("remove", name="c"), _bitmap("clear", name="c"), text=False),
    _run(*(_bitmap("remove", name=name) for name in "bc"), _bitmap("add", node="c", name="d")),
    _run(_bitmap("remove", node="c", name="d")),
    *_STATE,
    # bitmaps and backups together
    _run(_bitmap("add"), _backup("r")),
    *_gone("r"),
    _run(_bitmap("clear"), _backup("r2", device="b"), _bitmap("add", node="b", name="e")),
    *_gone("r2"),
    _run(_bitmap("remove"), _bitmap("remove", node="b", name="e")),
    # jobs that do not care for each other
    _run(_backup("s1"), _backup("s2", device="b", target="u"), mode="individual"),
    *_gone("s1", "s2"),
    _run(_backup("s3", sync="none"), _backup("s4", device="a", target="u", sync="none")),
    *_STATE[:2],
    _run(_backup("s5", device="c", target="u")),
    _run(_backup("s5", device="t", target="c")),
    _job("cancel", "s3"),
    *_gone("s3"),
    Step("query-jobs"),
    _job("cancel", "s4"),
    *_gone("s4"),
    # jobs that do
    _grouped(_backup("v1"), _backup("v2", device="b", target="u")),
    *_gone("v1", "v2"),
    _grouped(_backup("v3", sync="none"), _backup("v4", device="b", target="u")),
    *_until("waiting", "v4"),
    *(_job(verb, "v4") for verb in ("pause", "resume", "complete", "finalize", "dismiss")),
    Step("block-job-set-speed", {"device": "v4", "speed": 1}),
    _job("cancel", "v3"),
    *_gone("v3", "v4"),
    _grouped(_backup("v5"), _backup("v6", device="b", target="u", sync="none")),
    *_until("waiting", "v5"),
    _job("cancel", "v5"),
    *_gone("v5", "v6"),
    *(
        step
        for number, verbs in enumerate(permutations(("x", "y")))
        for step in (
            _grouped(
                _backup(f"x{number}", auto_finalize=False),
                _backup(f"y{number}", device="b", target="u", auto_dismiss=False),
            ),
            *_until("pending", f"x{number}", f"y{number}"),
            Step("query-jobs"),
            _job("finalize", f"{verbs[0]}{number}"),
            *_until("concluded", f"y{number}"),
            _job("finalize", f"{verbs[1]}{number}"),
            _job("dismiss", f"y{number}"),
            Step("query-jobs"),
        )
    ),
    _grouped(
        _backup("z1", auto_finalize=False, auto_dismiss=False),
        _backup("z2", device="b", target="u", auto_finalize=False, auto_dismiss=False),
    ),
    *_until("pending", "z1", "z2"),
    _job("cancel", "z1"),
    *_until("concluded", "z1", "z2"),
    Step("query-jobs"),
    *(_job("dismiss", job) for job in ("z1", "z2")),
    # and all away again
    *_STATE,
    *(Step("blockdev-del", {"node-name": name}) for name in ("a", "b", "c", "t", "u", "small")),
)

TRANSACTION_DIFFERENCES = (
    Difference(
        "a bitmap that an earlier action of the same `transaction` removes",
        "is there and busy until all is committed: its name is taken",
        "is gone for later actions: its name is free",
        "later actions see what earlier ones have done",
    ),
    Difference(
        "`blockdev-add` and `fleece-snapshot-create` in a `transaction`",
        "no such actions",
        "carried out with the others",
        "without them the snapshots of several disks, and backups, cannot be of one instant",
    ),
)

_ONE = ("blockdev-add", {"driver": "null-co", "node-name": "a", "size": _MIB})
_OTHERS = tuple(
    ("blockdev-add", {"driver": "null-co", "node-name": name, "size": _MIB}) for name in "btu"
)
_PAIR = [_backup("j"), _backup("k", device="b", target="u")]
_GROUPED = {"completion-mode": "grouped"}
_SAME = "Action 'block-dirty-bitmap-{}' does not support Transaction property completion-mode"

TRANSACTION_DEFECTS = (
    *(
        Defect(
            f"`transaction` with `completion-mode` grouped and `block-dirty-bitmap-{verb}`",
            "the program crashes",
            "refused, as every other action that makes no job",
            (_ONE, ("transaction", {"actions": [_bitmap(verb)], "properties": _GROUPED})),
            _SAME.format(verb),
        )
        for verb in ("enable", "disable")
    ),
    Defect(
        "a grouped `transaction` that is refused behind two backups",
        "the program hangs",
        "refused; both are undone",
        (
            _ONE,
            *_OTHERS,
            ("transaction", {"actions": [*_PAIR, ABORT], "properties": _GROUPED}),
        ),
        "Transaction aborted",
    ),
    Defect(
        "a backup of the filter of another one, in a `transaction` that is refused",
        "the program crashes",
        "refused, as without a transaction",
        (
            _ONE,
            *_OTHERS,
            (
                "transaction",
                {
                    "actions": [
                        _backup("j", filter_node_name="f"),
                        _backup("k", device="f", target="u"),
                        ABORT,
                    ]
                },
            ),
        ),
        "Node 'f' is busy: block device is in use by block job: backup",
    ),
)
