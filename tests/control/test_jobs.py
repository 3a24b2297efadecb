"""Jobs over QMP: the same conversation with qemu-storage-daemon, and what only ours can."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.storage_daemon import StorageDaemon

MiB = 1 << 20
SIZE = 4 * MiB

# (a request, or after how many more events of the last one to go on)
Step = tuple[str, dict] | str


def backup(**changed) -> tuple[str, dict]:
    given = {"job-id": "j", "device": "a", "target": "n", "sync": "full"}
    given |= {name.replace("_", "-"): value for name, value in changed.items()}
    return "blockdev-backup", given


def verb(name: str, job: str = "j", **more) -> tuple[str, dict]:
    by_id = not name.startswith("block-job") or name in ("block-job-finalize", "block-job-dismiss")
    return name, {"id" if by_id else "device": job, **more}


QUERIES: tuple[Step, ...] = (("query-jobs", {}), ("query-block-jobs", {}))
UNTIL_NULL = "null"
BLOCK_VERBS = [
    f"block-job-{name}" for name in ("cancel", "complete", "pause", "resume", "finalize", "dismiss")
]
JOB_VERBS = [name.removeprefix("block-") for name in BLOCK_VERBS]

CONVERSATION: tuple[Step, ...] = (
    *QUERIES,
    *(verb(name) for name in BLOCK_VERBS + JOB_VERBS),
    verb("block-job-set-speed", speed=1),
    # refusals
    backup(job_id=""),
    backup(job_id="1x"),
    backup(device="x"),
    backup(target="x"),
    backup(target="a"),
    backup(target="big"),
    backup(sync="bogus"),
    backup(filter_node_name="n"),
    backup(filter_node_name="1!"),
    backup(x_perf={"max-workers": 0}),
    backup(x_perf={"max-workers": 1 << 32}),
    backup(x_perf={"max-workers": "a"}),
    backup(x_perf={"max-chunk": 5}),
    backup(x_perf={"max-chunk": -5}),
    backup(x_perf={"other": 1}),
    backup(sync="incremental"),
    backup(sync="bitmap"),
    backup(bitmap="zz"),
    backup(bitmap_mode="never"),
    backup(sync="incremental", bitmap="zz", bitmap_mode="always"),
    *QUERIES,
    # to the end by itself
    backup(),
    UNTIL_NULL,
    backup(sync="top", on_source_error="auto", on_target_error="enospc"),
    UNTIL_NULL,
    backup(device="odd", target="odd2"),
    UNTIL_NULL,
    # step by step
    backup(auto_finalize=False, auto_dismiss=False),
    "pending",
    *QUERIES,
    *(verb(name) for name in ("block-job-complete", "block-job-pause", "block-job-resume")),
    verb("block-job-dismiss"),
    verb("block-job-set-speed", speed=-1),
    backup(device="big", target="odd"),
    verb("job-finalize"),
    "concluded",
    *QUERIES,
    *(verb(name) for name in ("job-cancel", "job-complete", "job-pause", "job-resume")),
    verb("job-finalize"),
    backup(),
    verb("block-job-dismiss"),
    UNTIL_NULL,
    # paused, slow, cancelled
    backup(speed=1000),
    "running",
    "running",
    verb("block-job-complete"),
    verb("block-job-set-speed", speed=-1),
    verb("block-job-set-speed", speed=2000),
    verb("block-job-pause"),
    "paused",
    verb("job-pause"),
    verb("block-job-cancel"),
    verb("job-resume"),
    "running",
    verb("block-job-resume"),
    verb("job-pause"),
    "paused",
    verb("block-job-cancel", force=True),
    UNTIL_NULL,
    backup(auto_finalize=False),
    "pending",
    verb("block-job-cancel"),
    UNTIL_NULL,
    # sync=none, and what of its nodes is busy
    backup(sync="none", auto_dismiss=False, filter_node_name="flt"),
    "running",
    "running",
    *QUERIES,
    ("blockdev-del", {"node-name": "a"}),
    verb("job-cancel"),
    "concluded",
    *QUERIES,
    verb("job-dismiss"),
    UNTIL_NULL,
    ("blockdev-del", {"node-name": "n"}),
    ("blockdev-del", {"node-name": "a"}),
)


def images(folder: Path) -> list[str]:
    (folder / "a").write_bytes(os.urandom(SIZE))
    for name, size in (("odd", 4097), ("odd2", 4097), ("big", 2 * SIZE)):
        (folder / name).write_bytes(os.urandom(size))
    options = [
        option
        for name in ("a", "odd", "odd2", "big")
        for option in ("--blockdev", f"driver=file,node-name={name},filename={name}")
    ]
    return [*options, "--blockdev", f"driver=null-co,node-name=n,size={SIZE}"]


def speak(daemon: StorageDaemon) -> list[object]:
    """Hold the conversation; return answers and events, each without what is by chance."""
    heard: list[object] = []
    for step in CONVERSATION:
        if not isinstance(step, str):
            answer = daemon.answer(*step)
            heard.append((step, answer.get("return", answer.get("error"))))
            continue
        while True:
            event = daemon.events.pop(0) if daemon.events else daemon._receive()
            heard.append((event["event"], event["data"]))
            if event["data"].get("status") == step:
                break
    return heard


@pytest.mark.interop("qemu-storage-daemon")
def test_the_same_conversation_with_the_reference(short_tmp: Path) -> None:
    """T-J1, T-J3, T-J4, T-J8, T-J9 over the wire."""
    heard = {}
    for name, program in (("theirs", ("qemu-storage-daemon",)), ("ours", ())):
        folder = short_tmp / name
        folder.mkdir()
        with StorageDaemon(folder, *images(folder), program=program) as daemon:
            heard[name] = speak(daemon)
            assert daemon.ask("quit") == {}
            daemon.process.wait(20)
    assert len(heard["ours"]) > 120
    for ours, theirs in zip(heard["ours"], heard["theirs"], strict=True):
        assert ours == theirs


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[StorageDaemon]:
    options = [*images(short_tmp), "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    options += ["--export", "type=nbd,id=x,node-name=a,name=live,writable=on"]
    with StorageDaemon(short_tmp, *options) as daemon:
        yield daemon


@pytest.mark.interop("qemu-io")
def test_a_guest_of_an_export_writes_during_the_backup(
    daemon: StorageDaemon, short_tmp: Path
) -> None:
    """The export goes through the filter as long as the job is there, and never notices."""
    old = (short_tmp / "a").read_bytes()
    (short_tmp / "t").write_bytes(bytes(SIZE))
    daemon.ask("blockdev-add", {"driver": "file", "node-name": "t", "filename": "t"})
    daemon.ask(*backup(target="t", filter_node_name="flt", speed=1))
    (export,) = daemon.ask("query-block-exports")
    assert export["node-name"] == "flt"
    command = ["qemu-io", "-f", "raw", "-c", "write -P 7 3M 128k", "-c", "write -P 8 100 1"]
    subprocess.run([*command, daemon.uri("live")], check=True, timeout=30, capture_output=True)
    daemon.ask(*verb("block-job-set-speed", speed=0))
    done = daemon.event("BLOCK_JOB_COMPLETED")
    assert done == {"type": "backup", "device": "j", "len": SIZE, "offset": SIZE, "speed": 0}
    assert (short_tmp / "t").read_bytes() == old
    live = (short_tmp / "a").read_bytes()
    assert live[3 * MiB : 3 * MiB + 131072] == b"\7" * 131072
    assert live[100:101] == b"\10"
    (export,) = daemon.ask("query-block-exports")
    assert export["node-name"] == "a"


def test_the_program_ends_with_a_job_still_there(daemon: StorageDaemon) -> None:
    """T-N9."""
    daemon.ask(*backup(sync="none"))
    daemon.ask("quit")
    assert daemon.process.wait(20) == 0


def test_what_the_reference_cannot(daemon: StorageDaemon) -> None:
    assert "on-cbw-error" in daemon.error(*backup(on_cbw_error="x"))
    assert "snapshot-access" in daemon.error(*backup(discard_source=True))
    daemon.ask(*backup(on_cbw_error="break-snapshot"))
    assert "error" not in daemon.event("BLOCK_JOB_COMPLETED")


@pytest.fixture
def server(short_tmp: Path) -> Iterator[Callable[[], StorageDaemon]]:
    """Start, and start again, an NBD server with the target of a backup."""
    folder = short_tmp / "server"
    folder.mkdir()
    (folder / "t").write_bytes(bytes(SIZE))
    options = ["--blockdev", "driver=file,node-name=t,filename=t"]
    options += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    options += ["--export", "type=nbd,id=t,node-name=t,name=t,writable=on"]
    with contextlib.ExitStack() as stack:

        def start() -> StorageDaemon:
            for name in ("qmp.sock", "nbd.sock"):
                (folder / name).unlink(missing_ok=True)
            return stack.enter_context(StorageDaemon(folder, *options))

        yield start


def add_target(daemon: StorageDaemon, server: StorageDaemon, **options: int) -> None:
    place = {"type": "unix", "path": str(server.folder / "nbd.sock")}
    more = {name.replace("_", "-"): value for name, value in options.items()}
    daemon.ask(
        "blockdev-add",
        {"driver": "nbd", "node-name": "t", "server": place, "export": "t", **more},
    )


def test_a_backup_goes_on_when_the_server_of_the_target_is_back(
    daemon: StorageDaemon, server: Callable[[], StorageDaemon], short_tmp: Path
) -> None:
    """T-J10."""
    first = server()
    add_target(daemon, first, reconnect_delay=30)
    daemon.ask(*backup(target="t", speed=MiB))
    daemon.ask(*verb("job-pause"))
    first.process.kill()
    first.process.wait(20)
    daemon.ask(*verb("block-job-set-speed", speed=0))
    daemon.ask(*verb("job-resume"))
    second = server()
    assert "error" not in daemon.event("BLOCK_JOB_COMPLETED")
    assert (second.folder / "t").read_bytes() == (short_tmp / "a").read_bytes()


def test_cancelling_while_the_server_of_the_target_is_down_ends_soon(
    daemon: StorageDaemon, server: Callable[[], StorageDaemon]
) -> None:
    """T-J10."""
    only = server()
    add_target(daemon, only, reconnect_delay=100)
    daemon.ask(*backup(target="t", speed=MiB))
    only.process.kill()
    only.process.wait(20)
    daemon.ask(*verb("block-job-set-speed", speed=0))
    before = time.monotonic()
    daemon.ask(*verb("block-job-cancel"))
    daemon.event("BLOCK_JOB_CANCELLED")
    assert time.monotonic() - before < 5
    daemon.ask("blockdev-del", {"node-name": "t"})
