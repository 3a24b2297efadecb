"""Transactions: order, undoing, one drained section, and what the actions do together."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.bitmap import new_bitmap
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.cli.client import Client, CommandFailed
from nbdfleece.control.commands import COMMANDS
from nbdfleece.control.commands.transaction import ACTIONS
from nbdfleece.control.objects import Objects
from nbdfleece.control.transaction import Action, ActionKind, Transaction
from nbdfleece.protocol.qmp.schema import Arguments, String, Struct
from nbdfleece.server.exports import Exports, RemoveMode
from tests.support.live import serving
from tests.support.storage_daemon import StorageDaemon
from tests.support.waiting import turns


class Bench:
    """Actions that write down what is done with them, and refuse where they are told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.refuse: set[str] = set()
        self.graph = Graph()
        self.context = SimpleNamespace(transacting=asyncio.Lock(), graph=self.graph)
        self.touches: dict[str, list[Node]] = {}
        self.lock = asyncio.Lock()
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, *names: str, grouped: bool = False) -> None:
        kind = ActionKind("noted", Struct({"name": String()}), self._make, can_be_grouped=False)
        asked = [(kind, Arguments(kind.arguments, {"name": name})) for name in names]
        await Transaction(self.context, grouped=grouped).run(asked)

    async def run_refused(self, *names: str) -> None:
        with pytest.raises(CommandError):
            await self.run(*names)

    def _make(self, transaction: Transaction, arguments: Arguments) -> Action:
        return Noted(self, transaction, arguments)

    async def node(self, name: str) -> Node:
        driver = NullDriver(size=1 << 20, read_zeroes=True, latency_ns=0)
        return await self.graph.add(name, driver, read_only=False, discard_enabled=True)

    def note(self, step: str, name: str) -> None:
        self.done.append(f"{step} {name}")
        if f"{step} {name}" in self.refuse:
            raise CommandError(f"no {step} {name}")


class Noted(Action):
    def __init__(self, bench: Bench, transaction: Transaction, arguments: Arguments) -> None:
        super().__init__(transaction, arguments)
        self.bench = bench
        self.name = arguments.string("name")

    def nodes(self) -> list[Node]:
        return self.bench.touches.get(self.name, [])

    async def begin(self) -> None:
        await self.transaction.lock(self.bench.lock)
        self.bench.note("begin", self.name)

    async def prepare(self) -> None:
        await self.transaction.quieten(self)
        assert all(node.is_drained for node in self.nodes())
        await self.bench.gate.wait()
        self.bench.note("prepare", self.name)

    def commit(self) -> None:
        self.bench.note("commit", self.name)

    async def abort(self) -> None:
        self.bench.note("abort", self.name)

    async def clean(self) -> None:
        assert not any(node.is_drained for node in self.nodes())
        self.bench.note("clean", self.name)


async def test_actions_are_begun_prepared_committed_and_cleaned_in_order() -> None:
    bench = Bench()
    await bench.run("a", "b")
    steps = ("begin", "prepare", "commit", "clean")
    assert bench.done == [f"{step} {name}" for step in steps for name in "ab"]


async def test_nothing_asked_for_succeeds() -> None:
    await Bench().run()


async def test_the_first_refusal_undoes_what_was_prepared_latest_first() -> None:
    bench = Bench()
    bench.refuse = {"prepare c", "prepare d"}
    with pytest.raises(CommandError, match=r"^no prepare c$"):
        await bench.run("a", "b", "c", "d")
    begun = [f"begin {name}" for name in "abcd"]
    cleaned = [f"clean {name}" for name in "abcd"]
    tried = ["prepare a", "prepare b", "prepare c", "abort b", "abort a"]
    assert bench.done == [*begun, *tried, *cleaned]


async def test_what_cannot_even_begin_is_cleaned_and_no_more() -> None:
    bench = Bench()
    bench.refuse = {"begin b"}
    with pytest.raises(CommandError, match=r"^no begin b$"):
        await bench.run("a", "b", "c")
    assert bench.done == ["begin a", "begin b", "clean a", "clean b"]


async def test_an_undoing_that_fails_is_logged_and_the_others_are_undone(caplog) -> None:
    bench = Bench()
    bench.refuse = {"prepare c", "abort b", "clean a"}
    with pytest.raises(CommandError, match=r"^no prepare c$"):
        await bench.run("a", "b", "c")
    assert bench.done[-5:] == ["abort b", "abort a", "clean a", "clean b", "clean c"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "no abort b" in caplog.text


async def test_what_is_drained_stays_so_until_all_is_committed() -> None:
    bench = Bench()
    one, two = await bench.node("one"), await bench.node("two")
    bench.touches = {"a": [one], "b": [two, one], "c": []}
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run("c", "a", "b"))
        await turns(5)
        assert one.is_drained
        assert two.is_drained, "of later actions too, at once"
        bench.gate.set()
        await task
    assert not one.is_drained
    assert not two.is_drained


async def test_a_drained_section_of_somebody_else_is_not_relied_upon() -> None:
    bench = Bench()
    node = await bench.node("one")
    bench.touches = {"a": [node]}
    bench.gate.clear()
    node.drained_begin()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run("a"))
        await turns(5)
        node.drained_end()
        assert node.is_drained
        bench.gate.set()
        await task
    assert not node.is_drained


async def test_requests_that_do_not_end_refuse_the_transaction(monkeypatch) -> None:
    monkeypatch.setattr("nbdfleece.block.drain.QUIET_MOMENTS_S", (0.001, 0.001))
    bench = Bench()
    node = await bench.node("one")
    bench.touches = {"b": [node]}
    node.enter()
    with pytest.raises(CommandError, match="did not end"):
        await bench.run("a", "b")
    assert not node.is_drained
    node.leave()
    await bench.run("a", "b")


async def test_transactions_wait_for_each_other() -> None:
    bench = Bench()
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bench.run("a"))
        tasks.create_task(bench.run("b"))
        await turns(5)
        assert bench.done == ["begin a"]
        bench.gate.set()
    assert bench.done[4:5] == ["begin b"]
    assert not bench.lock.locked()


@pytest.mark.parametrize("command", ["block-export-add", "nbd-server-add", "bare"])
async def test_nobody_takes_a_bitmap_that_a_transaction_may_put_back(command: str) -> None:
    """An incremental backup by one that is cleared for the moment would miss what has changed."""
    bench = Bench()
    node = await bench.node("n")
    node.bitmaps["b"] = new_bitmap(node, "b", None, enabled=True)
    exports, nbd = Exports(bench.graph), SimpleNamespace(check_running=lambda: None)
    context = SimpleNamespace(**vars(bench.context), exports=exports, nbd=nbd, objects=Objects())
    asked = {
        "block-export-add": {"type": "nbd", "id": "e", "node-name": "n", "bitmaps": ["b"]},
        "nbd-server-add": {"device": "n", "name": "e", "bitmap": "b"},
        "bare": {"type": "nbd", "id": "e", "node-name": "n"},
    }[command]
    run = COMMANDS["block-export-add" if command == "bare" else command]
    bench.touches, bench.refuse = {"a": [node]}, {"prepare a"}
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run_refused("a"))
        await turns(5)
        node.bitmaps["b"].enabled = False  # so that a read-only export may have it
        adding = tasks.create_task(run.run(context, Arguments(run.arguments, asked)))
        await turns(5)
        assert len(list(exports)) == (1 if command == "bare" else 0)
        bench.gate.set()
        await task
        await adding
    assert len(list(exports)) == 1
    await exports.remove("e", RemoveMode.HARD)


@pytest.mark.parametrize("bitmap", [{"bitmap": "b"}, {}], ids=["bitmap", "none"])
async def test_a_snapshot_with_a_bitmap_waits_for_a_transaction(bitmap: dict) -> None:
    bench, made = Bench(), []

    async def create(disks: list[str], *_: object, **__: object) -> list[object]:
        made.extend(disks)
        return []

    fleece = SimpleNamespace(create_snapshots=create)
    context = SimpleNamespace(**vars(bench.context), fleece=fleece)
    run = COMMANDS["fleece-snapshot-create"]
    async with asyncio.TaskGroup() as tasks, context.transacting:
        tasks.create_task(run.run(context, Arguments(run.arguments, {"disks": ["vda"], **bitmap})))
        await turns(5)
        assert made == ([] if bitmap else ["vda"])
    assert made == ["vda"]


async def test_a_cancelled_transaction_is_undone() -> None:
    bench = Bench()
    node = await bench.node("one")
    bench.touches = {"a": [node]}
    bench.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(bench.run("a"))
        await turns(5)
        task.cancel()
    assert bench.done == ["begin a", "clean a"]
    assert not node.is_drained
    assert not bench.context.transacting.locked()


async def test_what_makes_no_job_cannot_be_grouped() -> None:
    bench = Bench()
    with pytest.raises(CommandError, match="Action 'noted' does not support Transaction property"):
        await bench.run("a", grouped=True)
    assert bench.done == ["begin a", "clean a"]


async def test_merging_waits_for_writes_to_the_nodes_of_the_sources() -> None:
    bench = Bench()
    one, two = await bench.node("one"), await bench.node("two")

    async def run(kind: str, **data: object) -> None:
        found = ACTIONS[f"block-dirty-bitmap-{kind}"]
        await Transaction(bench.context).run([(found, Arguments(found.arguments, data))])

    for node in ("one", "two"):
        await run("add", node=node, name="b")
    two.enter()
    two.bitmaps["b"].mark(0, 1)
    async with asyncio.TaskGroup() as tasks:
        sources = [{"node": "two", "name": "b"}]
        tasks.create_task(run("merge", node="one", target="b", bitmaps=sources))
        await turns(5)
        assert one.bitmaps["b"].count() == 0
        two.bitmaps["b"].mark(1 << 19, 1)
        two.leave()
    assert one.bitmaps["b"].count() == 2 << 16


# --- the real actions, in the real daemon --------------------------------------------------------

MiB = 1 << 20
ABORT = {"type": "abort", "data": {}}


def action(kind: str, **data: object) -> dict:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def backup(device: str, target: str, **more: object) -> dict:
    given = {"device": device, "target": target, "sync": "full", **more}
    return action("blockdev-backup", **given)


def file_node(name: str) -> dict:
    return action("blockdev-add", driver="file", node_name=name, filename=name)


def images(folder: Path, names: str = "abtu") -> list[str]:
    """Options for nodes above files of the same names, full of them, in the daemon's folder."""
    for name in names:
        (folder / name).write_bytes(name.encode() * MiB)
    return [
        option
        for name in names
        for option in ("--blockdev", f"driver=file,node-name={name},filename={name}")
    ]


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[StorageDaemon]:
    with StorageDaemon(short_tmp, *images(short_tmp)) as daemon:
        yield daemon


def grouped(*actions: dict) -> dict:
    return {"actions": list(actions), "properties": {"completion-mode": "grouped"}}


def state(daemon: StorageDaemon) -> list[object]:
    """All that can be asked of the graph and the jobs; events so far are forgotten."""
    queries = ("x-debug-query-block-graph", "query-named-block-nodes", "query-jobs")
    found = [daemon.ask(query) for query in queries]
    daemon.events.clear()
    return found


def statuses(daemon: StorageDaemon, job: str) -> list[str]:
    """The states that a job has gone through so far; no other event may have come."""
    assert {event["event"] for event in daemon.events} <= {"JOB_STATUS_CHANGE"}
    data = [event["data"] for event in daemon.events]
    return [each["status"] for each in data if each["id"] == job]


@pytest.mark.parametrize(
    "wrong",
    [
        backup("nope", "t", job_id="k"),
        backup("b", "nope", job_id="k"),
        backup("b", "b", job_id="k"),
        backup("b", "u"),
        backup("b", "u", job_id="j"),
        backup("b", "t", job_id="k"),
        backup("b", "u", job_id="k", filter_node_name="a"),
        backup("b", "u", job_id="k", speed=-1),
        action("blockdev-add", driver="null-co", node_name="a"),
        action("blockdev-add", driver="raw", node_name="new", file="nope"),
        ABORT,
    ],
    ids=lambda wrong: str(list(wrong["data"].values())),
)
@pytest.mark.parametrize("place", range(3))
def test_whatever_is_refused_at_whatever_place_nothing_has_happened(
    daemon: StorageDaemon, wrong: dict, place: int
) -> None:
    """T-J4 and T-J12."""
    good = [file_node("t2"), backup("a", "t", job_id="j", filter_node_name="f")]
    (daemon.folder / "t2").write_bytes(bytes(MiB))
    before = state(daemon)
    answer = daemon.answer("transaction", {"actions": [*good[:place], wrong, *good[place:], ABORT]})
    assert answer["error"]["class"] == "GenericError"
    created = ["created", "aborting", "concluded", "null"] if place == 2 else []
    clash = wrong["data"].get("job-id") == "j" or wrong["data"].get("target") == "t"
    if not (clash and place < 2):  # there it is the right job that is refused, or was first
        assert statuses(daemon, "j") == created
    assert state(daemon) == before
    assert daemon.ask("transaction", {"actions": good}) == {}
    daemon.event("BLOCK_JOB_COMPLETED")
    assert (daemon.folder / "t").read_bytes() == b"a" * MiB


def test_a_command_and_its_action_refuse_in_the_same_words(daemon: StorageDaemon) -> None:
    for wrong in (backup("nope", "t"), backup("a", "t"), backup("a", "t", job_id="j", speed=-1)):
        alone = daemon.error("blockdev-backup", wrong["data"])
        assert daemon.error("transaction", {"actions": [wrong]}) == alone


def test_later_actions_see_what_earlier_ones_have_done(daemon: StorageDaemon) -> None:
    (daemon.folder / "t2").write_bytes(bytes(MiB))
    actions = [
        file_node("t2"),
        action("blockdev-add", driver="raw", node_name="t3", file="t2"),
        backup("a", "t3", job_id="j"),
    ]
    before = state(daemon)
    daemon.error("transaction", {"actions": [*actions, ABORT]})
    assert state(daemon) == before
    daemon.ask("transaction", {"actions": actions})
    daemon.event("BLOCK_JOB_COMPLETED")
    assert (daemon.folder / "t2").read_bytes() == b"a" * MiB
    assert daemon.ask("blockdev-del", {"node-name": "t3"}) == {}
    assert daemon.ask("blockdev-del", {"node-name": "t2"}) == {}


def test_a_grouped_backup_that_cannot_read_cancels_the_other(daemon: StorageDaemon) -> None:
    """T-B3, the jobs' half."""
    rule = {"event": "read_aio", "errno": 5}
    bad = {"driver": "blkdebug", "node-name": "bad", "image": "b", "inject-error": [rule]}
    daemon.ask("blockdev-add", bad)
    before = state(daemon)
    actions = [backup("a", "t", job_id="j", speed=1), backup("bad", "u", job_id="k")]
    daemon.ask("transaction", grouped(*actions))
    error = daemon.event("BLOCK_JOB_ERROR")
    assert error == {"device": "k", "operation": "read", "action": "report"}
    ended = daemon.event("BLOCK_JOB_COMPLETED")
    assert (ended["device"], ended["error"]) == ("k", "Input/output error")
    assert daemon.event("BLOCK_JOB_CANCELLED")["device"] == "j"
    while daemon.ask("query-jobs"):
        pass
    assert state(daemon) == before


def test_jobs_that_are_not_grouped_do_not_care_for_each_other(daemon: StorageDaemon) -> None:
    rule = {"event": "read_aio", "errno": 5}
    bad = {"driver": "blkdebug", "node-name": "bad", "image": "b", "inject-error": [rule]}
    daemon.ask("blockdev-add", bad)
    actions = [backup("a", "t", job_id="j", auto_finalize=False), backup("bad", "u", job_id="k")]
    properties = {"completion-mode": "individual"}
    daemon.ask("transaction", {"actions": actions, "properties": properties})
    while [row["status"] for row in daemon.ask("query-jobs")] != ["pending"]:
        pass
    assert daemon.event("BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
    daemon.ask("job-finalize", {"id": "j"})
    assert "error" not in daemon.event("BLOCK_JOB_COMPLETED")
    assert (daemon.folder / "t").read_bytes() == b"a" * MiB


def test_exports_with_requests_in_flight_do_not_hold_up_an_aborted_transaction(
    short_tmp: Path, program: Callable[[str], str]
) -> None:
    """T-J13: exports in threads of their own there; here all are in one, and none may block it."""
    options = [*images(short_tmp), "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    for name in "ab":
        options += ["--export", f"type=nbd,id={name},node-name={name},name={name},writable=on"]
    with StorageDaemon(short_tmp, *options) as daemon:
        rounds = 12
        commands = []
        for number in range(rounds):
            for i in range(128):
                commands += ["-c", f"aio_write -P {1 + (i + number) % 200} {i * 8192} 8k"]
            commands += ["-c", "aio_flush"]
        guests = [
            subprocess.Popen(
                [program("qemu-io"), "-f", "raw", *commands, daemon.uri(name)],
                stdout=subprocess.DEVNULL,
            )
            for name in "ab"
        ]
        actions = [backup("a", "t", job_id="j"), backup("b", "u", job_id="k")]
        asked = 0
        while asked < 20 or any(guest.poll() is None for guest in guests):
            for mode in ({"actions": [*actions, ABORT]}, grouped(*actions, ABORT)):
                assert "Abort action" in daemon.error("transaction", mode)
            asked += 1
        assert [guest.wait(20) for guest in guests] == [0, 0]
        expected = b"".join(bytes([1 + (i + rounds - 1) % 200]) * 8192 for i in range(128))
        for name in "ab":
            assert (short_tmp / name).read_bytes() == expected


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


QUERIES = (
    "x-debug-query-block-graph",
    "query-named-block-nodes",
    "query-jobs",
    "query-block-exports",
    "query-fleece-snapshots",
)


@pytest.mark.parametrize("place", range(6))
def test_snapshots_of_disks_are_undone_wholly_wherever_the_transaction_fails(
    short_tmp: Path, place: int
) -> None:
    for name in "abt":
        (short_tmp / name).write_bytes(name.encode() * MiB)
    good = [
        action("fleece-snapshot-create", disks=["a"], name="s"),
        action("blockdev-add", driver="file", node_name="t", filename=str(short_tmp / "t")),
        backup("a", "t", job_id="j"),
        action("fleece-snapshot-create", disks=["b", "a"], name="s2", temp_limit=MiB),
        action("blockdev-add", driver="null-co", node_name="n"),
    ]
    disks = [short_tmp / name for name in "ab"]
    with (
        serving(short_tmp, *disks, disks=2) as daemon,
        Client(str(daemon.control)) as monitor,
    ):
        before = [monitor.execute(query) for query in QUERIES], listing(daemon.state)
        with pytest.raises(CommandFailed, match="Abort action"):
            monitor.execute("transaction", {"actions": [*good[:place], ABORT, *good[place:]]})
        after = [monitor.execute(query) for query in QUERIES], listing(daemon.state)
        assert after == before
        monitor.execute("transaction", {"actions": good})
        exports = {row["id"] for row in monitor.execute("query-block-exports")}
        assert exports == {"a", "b", "a@s", "a@s2", "b@s2"}
        assert {row["state"] for row in monitor.execute("query-fleece-snapshots")} == {"ok"}


def test_what_is_wrong_with_snapshots_in_a_transaction(short_tmp: Path) -> None:
    (short_tmp / "a").write_bytes(bytes(MiB))
    with serving(short_tmp, short_tmp / "a") as daemon, Client(str(daemon.control)) as monitor:
        for data, text in (
            ({"disks": []}, "no disk is named"),
            ({"disks": ["x"]}, "there is no disk 'x'"),
            ({"disks": ["a", "a"]}, "a disk is named twice"),
            ({"disks": ["a"], "durability": "power"}, "not built"),
            ({"disks": ["a"], "token": 5}, r"Parameter 'actions\[0\].data.token' is unexpected"),
            ({"disks": ["a"], "timeout": -5}, r"'actions\[0\].data.timeout' expects"),
        ):
            asked = {"actions": [{"type": "fleece-snapshot-create", "data": data}]}
            with pytest.raises(CommandFailed, match=text):
                monitor.execute("transaction", asked)
        twice = [action("fleece-snapshot-create", disks=["a"], name="s")] * 2
        with pytest.raises(CommandFailed, match="has a snapshot 's' already"):
            monitor.execute("transaction", {"actions": twice})
        assert monitor.execute("query-fleece-snapshots") == []
        assert monitor.execute("transaction", {"actions": twice[:1]}) == {}
