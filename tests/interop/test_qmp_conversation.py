"""The same requests for qemu-storage-daemon and for us: the answers are the same, or the
difference is listed with its reason in docs/qmp.md."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import environment
from tests.support.qmp_conversation import (
    DEFECTS,
    JOB_STEPS,
    NOT_JSON,
    OVERLAY_STEPS,
    RAW,
    RAW_WITH_OOB,
    STEPS,
    STRICTER,
    WAIT,
    Defect,
    Faults,
    Schema,
    Step,
    same_refusal,
)
from tests.support.qmp_table import (
    ABSENT,
    ELSEWHERE,
    NEVER_GOOD,
    TABLE,
    TABLE_DEFECTS,
    TABLE_STEPS,
)
from tests.support.qmp_transactions import (
    SNAPSHOT_TRANSACTION_STEPS,
    TRANSACTION_DEFECTS,
    TRANSACTION_STEPS,
)

pytestmark = [pytest.mark.slow, pytest.mark.interop("qemu-storage-daemon")]

Json = Any

OURS = [sys.executable, "-m", "nbdfleece", "storage-daemon"]


class Talk:
    """A monitor, as blocking calls."""

    def __init__(self, sock: socket.socket, folder: Path) -> None:
        self._sock = sock
        self._folder = str(folder)
        sock.settimeout(20)
        self._file = sock.makefile("rb")
        self.events: list[Json] = []
        self.greeting = self._receive()

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def _receive(self) -> Json:
        line = self._file.readline()
        assert line, "the daemon has gone"
        return json.loads(line.replace(self._folder.encode(), b"FOLDER"))

    def raw(self, text: bytes) -> Json:
        """Send a request as it stands, return the answer to it."""
        self._sock.sendall(text.replace(b"FOLDER", self._folder.encode()) + b"\n")
        while "event" in (got := self._receive()):
            del got["timestamp"]
            self.events.append(got)
        return got

    def ask(self, command: str, arguments: Json = None) -> Json:
        request = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        return self.raw(json.dumps(request).encode())

    def schema(self) -> Schema:
        return Schema(self.ask("query-qmp-schema")["return"])


class Pair:
    """The two daemons in the same state."""

    def __init__(self, theirs: Talk, ours: Talk) -> None:
        self.theirs = theirs
        self.ours = ours

    def negotiate(self, arguments: Json = None) -> None:
        for talk in (self.theirs, self.ours):
            assert talk.ask("qmp_capabilities", arguments) == {"return": {}}


@pytest.fixture
def pair(short_tmp: Path, program: Callable[[str], str]) -> Iterator[Pair]:
    """A monitor of each of the two programs, started with the same options."""
    with (
        _monitor(short_tmp / "reference", [program("qemu-storage-daemon")]) as theirs,
        _monitor(short_tmp / "ours", OURS) as ours,
    ):
        yield Pair(theirs, ours)
    assert "Traceback" not in (short_tmp / "ours" / "log").read_text()


@contextlib.contextmanager
def _monitor(folder: Path, command: list[str]) -> Iterator[Talk]:
    folder.mkdir()
    path = folder / "qmp"
    options = ["--chardev", f"socket,id=m,path={path},server=on,wait=off", "--monitor", "chardev=m"]
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen([*command, *options], stderr=log, env=environment()) as process,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        try:
            _connect(sock, path)
            talk = Talk(sock, folder)
            yield talk
            talk.close()
        finally:
            process.kill()


def _connect(sock: socket.socket, path: Path) -> None:
    while True:
        try:
            sock.connect(str(path))
        except OSError:
            time.sleep(0.01)  # until the deadline of the test
        else:
            return


def test_every_fault_in_arguments_is_refused_in_the_same_words(pair: Pair) -> None:
    pair.negotiate()
    faults = Faults(pair.theirs.schema(), pair.ours.schema())
    count = 0
    wrong: list[str] = []
    for command in faults.commands():
        for fault in faults.of(command):
            theirs = pair.theirs.ask(command, fault.value)
            ours = pair.ours.ask(command, fault.value)
            count += 1
            if "error" not in theirs or "error" not in ours:
                same = theirs == ours
            else:
                same = same_refusal(theirs["error"], ours["error"])
            if not same:
                wrong.append(f"{command} {json.dumps(fault.value)}\n  {theirs}\n  {ours}")
    print(f"{count} faults in {len(faults.commands())} commands")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert faults.stricter <= STRICTER


def test_what_is_no_request_is_refused_in_the_same_words(pair: Pair) -> None:
    assert pair.theirs.greeting["QMP"]["capabilities"] == pair.ours.greeting["QMP"]["capabilities"]
    for name in ("query-version", "nope"):
        assert pair.theirs.ask(name) == pair.ours.ask(name)
    pair.negotiate()
    for text in RAW:
        assert pair.theirs.raw(text) == pair.ours.raw(text), text
    for text in NOT_JSON:
        refused = [talk.raw(text)["error"] for talk in (pair.theirs, pair.ours)]
        assert {error["class"] for error in refused} == {"GenericError"}, text
        assert all(error["desc"].startswith("JSON parse error, ") for error in refused), text


def test_out_of_band_is_refused_in_the_same_words(pair: Pair) -> None:
    pair.negotiate({"enable": ["oob"]})
    for text in RAW_WITH_OOB:
        assert pair.theirs.raw(text) == pair.ours.raw(text), text


def _same(step: Step, theirs: Json, ours: Json) -> bool:
    if "error" in theirs and "error" in ours:
        return theirs == ours if step.text else theirs["error"]["class"] == ours["error"]["class"]
    if step.result == "any":
        return theirs.keys() == ours.keys()
    theirs, ours = _without(step.ignore, theirs), _without(step.ignore, ours)
    if step.result == "subset":
        return _within(_sorted(theirs.get("return")), _sorted(ours.get("return")))
    return _sorted(theirs) == _sorted(ours)


def _without(names: tuple[str, ...], value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _without(names, item) for name, item in value.items() if name not in names}
    if isinstance(value, list):
        return [_without(names, item) for item in value]
    return value


def _sorted(value: Json) -> Json:
    """Lists of objects without their order, which means nothing in what is compared here."""
    if isinstance(value, dict):
        return {name: _sorted(item) for name, item in value.items()}
    if isinstance(value, list):
        return sorted((_sorted(item) for item in value), key=_order)
    return value


def _order(value: Json) -> str:
    """What a list is sorted by: a name, where objects have one."""
    name = value.get("node-name", value.get("name")) if isinstance(value, dict) else None
    return f"{name or ''} {json.dumps(value, sort_keys=True)}"


def _within(part: Json, whole: Json) -> bool:
    """Tell whether everything in `part` is in `whole`, which may have more members."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and _within(part[name], whole[name]) for name in part)
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) == len(whole) and all(map(_within, part, whole))
    return bool(part == whole)


def test_the_same_commands_have_the_same_results_and_events(pair: Pair) -> None:
    pair.negotiate()
    _compare(pair, STEPS)
    assert pair.theirs.events == pair.ours.events


def test_jobs_go_through_the_same_states(pair: Pair) -> None:
    pair.negotiate()
    if "blockdev-backup" not in pair.ours.schema().commands():
        pytest.skip("blockdev-backup is not there")
    _compare(pair, JOB_STEPS)
    assert _of_jobs(pair.theirs.events) == _of_jobs(pair.ours.events)


def test_snapshots_in_transactions_do_the_same(pair: Pair) -> None:
    pair.negotiate()
    _compare(pair, SNAPSHOT_TRANSACTION_STEPS)
    assert _by_job(pair.theirs.events) == _by_job(pair.ours.events)


def test_transactions_do_the_same_and_undo_the_same(pair: Pair) -> None:
    pair.negotiate()
    _compare(pair, TRANSACTION_STEPS)
    theirs, ours = _by_job(pair.theirs.events), _by_job(pair.ours.events)
    assert ours == theirs
    assert len(ours) > 40


def test_overlays_and_new_images_are_made_alike(pair: Pair) -> None:
    pair.negotiate()
    _compare(pair, OVERLAY_STEPS)
    assert _of_jobs(pair.theirs.events) == _of_jobs(pair.ours.events)


def test_the_rest_of_the_table_is_answered_alike(pair: Pair) -> None:
    pair.negotiate()
    _compare(pair, TABLE_STEPS)
    assert _of_jobs(pair.theirs.events) == _of_jobs(pair.ours.events)


def test_every_command_that_the_reference_has_is_here_or_missing_for_a_reason(pair: Pair) -> None:
    pair.negotiate()
    theirs, ours = pair.theirs.schema().commands(), pair.ours.schema().commands()
    missing = {name for _, names in ABSENT.values() for name in names}
    assert theirs - ours == missing
    assert TABLE | ELSEWHERE | missing == theirs


ALL_STEPS = {
    "STEPS": STEPS,
    "JOB_STEPS": JOB_STEPS,
    "OVERLAY_STEPS": OVERLAY_STEPS,
    "TRANSACTION_STEPS": TRANSACTION_STEPS,
    "SNAPSHOT_TRANSACTION_STEPS": SNAPSHOT_TRANSACTION_STEPS,
    "TABLE_STEPS": TABLE_STEPS,
}


def test_every_command_of_the_table_is_asked_once_well_and_once_badly(short_tmp: Path) -> None:
    """By ours alone: the other tests show that the reference answers the same."""
    good: set[str] = set()
    bad: set[str] = set()
    for name, steps in ALL_STEPS.items():
        with _monitor(short_tmp / name, OURS) as talk:
            talk.ask("qmp_capabilities")
            schema = talk.schema()
            for step in steps:
                if step.command == WAIT:
                    _wait(talk, step.arguments["id"], step.arguments["status"])
                    continue
                answer = talk.ask(step.command, step.arguments)
                (bad if "error" in answer else good).add(step.command)
    # What takes no arguments, or optional ones that are switches, is bad only in its arguments.
    only_arguments = {name for name in TABLE if not _can_fail(schema, name)}
    assert good - set(NEVER_GOOD) >= TABLE - set(NEVER_GOOD)
    assert not good & set(NEVER_GOOD)
    assert bad >= TABLE - only_arguments
    assert only_arguments <= {
        name for name in TABLE if name.startswith(("query-", "x-debug-query"))
    }


def _can_fail(schema: Schema, command: str) -> bool:
    """Tell whether there are arguments that name something."""
    members = schema.members(schema.arguments(command)).values()
    return command == "nbd-server-stop" or any(member["type"] != "bool" for member in members)


EVERY_DEFECT = DEFECTS + TRANSACTION_DEFECTS + TABLE_DEFECTS


@pytest.mark.parametrize("defect", EVERY_DEFECT, ids=lambda defect: defect.title)
def test_what_the_reference_does_wrong_is_done_right(short_tmp: Path, defect: Defect) -> None:
    with _monitor(short_tmp / "ours", OURS) as talk:
        talk.ask("qmp_capabilities")
        *before, (command, arguments) = defect.steps
        for step in before:
            if step[0] == WAIT:
                _wait(talk, step[1]["id"], step[1]["status"])
            else:
                assert talk.ask(*step) == {"return": {}}
        answer = talk.ask(command, arguments)
        if defect.refused is None:
            assert answer == {"return": {}}
        else:
            assert answer["error"]["class"] == "GenericError"
            assert answer["error"]["desc"].startswith(defect.refused)
        assert talk.ask("query-named-block-nodes")["return"] is not None, "it still answers"


def _of_jobs(events: list[Json]) -> list[Json]:
    """What happened to jobs, without pauses, which are drains, and jobs that were refused."""
    found: list[Json] = []
    for event in events:
        name, data = event["event"], event["data"]
        if name == "JOB_STATUS_CHANGE" and data["status"] in ("paused", "running"):
            running = {**event, "data": {**data, "status": "running"}}
            if running not in found[-1:]:
                found.append(running)
        elif (
            name == "JOB_STATUS_CHANGE"
            and data["status"] == "null"
            and _created(data) in found[-1:]
        ):
            found.pop()
        else:
            found.append(event)
    return found


def _by_job(events: list[Json]) -> dict[str, list[Json]]:
    """What happened to each job; jobs run side by side, and which is first is by chance."""
    found: dict[str, list[Json]] = {}
    for event in events:
        job = event["data"].get("id", event["data"].get("device"))
        found.setdefault(job, []).append(event)
    return {job: _of_jobs(each) for job, each in found.items() if _of_jobs(each)}


def _created(data: Json) -> Json:
    return {"event": "JOB_STATUS_CHANGE", "data": {**data, "status": "created"}}


def _wait(talk: Talk, job: str, status: str | None) -> None:
    while True:  # until the deadline of the test
        rows = {row["id"]: row["status"] for row in talk.ask("query-jobs")["return"]}
        if rows.get(job) == status:
            return
        time.sleep(0.01)


def _compare(pair: Pair, steps: tuple[Step, ...]) -> None:
    both = pair.theirs.schema().commands() & pair.ours.schema().commands()
    wrong: list[str] = []
    asked = 0
    for step in steps:
        if step.command == WAIT:
            for talk in (pair.theirs, pair.ours):
                _wait(talk, step.arguments["id"], step.arguments["status"])
        if step.command not in both:
            continue
        asked += 1
        theirs = pair.theirs.ask(step.command, step.arguments)
        ours = pair.ours.ask(step.command, step.arguments)
        if not _same(step, theirs, ours):
            wrong.append(f"{step.command} {json.dumps(step.arguments)}\n  {theirs}\n  {ours}")
    print(f"{asked} of {len(steps)} steps")
    assert not wrong, f"{len(wrong)} of {asked}:\n" + "\n".join(wrong)
