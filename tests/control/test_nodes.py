"""Commands about nodes, at a real daemon; and the same asked of qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import Daemon, make_disk

Json = Any
MIB = 1 << 20


class Client:
    """Sends commands over a pair of files and keeps the events."""

    def __init__(self, write: Callable[[bytes], object], read: Callable[[], bytes]) -> None:
        self._write, self._read = write, read
        self.events: list[Json] = []
        json.loads(read())
        assert self("qmp_capabilities") == {}

    def __call__(self, command: str, **arguments: Json) -> Json:
        """Return what the command returns, or the text of its error."""
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._write(json.dumps({"execute": command, "arguments": spelled}).encode() + b"\n")
        while True:
            message = json.loads(self._read())
            if "event" not in message:
                break
            self.events.append(message)
        if "error" in message:
            assert message["error"]["class"] == "GenericError"
            return message["error"]["desc"]
        return message["return"]

    def node(self, name: str) -> Json:
        found = self("query-named-block-nodes", flat=True)
        return next((row for row in found if row["node-name"] == name), None)


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, make_disk(short_tmp / "vda.raw", MIB)) as running:
        running.ready()
        yield running
        assert "Traceback" not in running.errors()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
        sock.settimeout(20)
        sock.connect(str(daemon.control))
        file = stack.enter_context(sock.makefile("rb"))
        yield Client(sock.sendall, file.readline)


@pytest.fixture
def reference(program: Callable[[str], str]) -> Iterator[Client]:
    command = [program("qemu-storage-daemon"), "--chardev", "stdio,id=c", "--monitor", "c"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sink = process.stdin

        def write(data: bytes) -> None:
            sink.write(data)
            sink.flush()

        try:
            yield Client(write, process.stdout.readline)
        finally:
            process.kill()


def client_error(client: Client, command: str, **arguments: Json) -> str:
    text = client(command, **arguments)
    assert isinstance(text, str)
    return text


# --- one after the other ---------------------------------------------------------------------


def test_a_disk_is_a_drive(client: Client, short_tmp: Path) -> None:
    drive = client("query-block")[0]
    inserted = drive.pop("inserted")
    assert drive == {
        "device": "vda",
        "qdev": "/machine/peripheral/vda/virtio-backend",
        "type": "unknown",
        "removable": False,
        "locked": False,
        "io-status": "ok",
    }
    assert inserted == client.node("vda")
    assert inserted["image"]["filename"] == str(short_tmp / "vda.raw")
    assert (inserted["drv"], inserted["ro"], inserted["image"]["virtual-size"]) == (
        *("file", False),
        MIB,
    )
    stats = client("query-blockstats")[0]
    assert (stats["device"], stats["node-name"]) == ("vda", "vda")
    assert stats["stats"]["wr_operations"] == 0
    client("fleece-snapshot-create", disks=["vda"], name="monday")
    assert client("query-block")[0]["inserted"]["drv"] == "copy-before-write"
    assert client("query-blockstats")[0]["parent"]["node-name"] == "vda"


def test_what_the_program_made_itself_stays(client: Client) -> None:
    client("fleece-snapshot-create", disks=["vda"], name="monday")
    for row in client("query-named-block-nodes"):
        name = row["node-name"]
        assert client("blockdev-del", node_name=name) in (
            f"Node {name} is not owned by the monitor",
            f"Node {name} is in use",
        )
    options = {"driver": "file", "node-name": "vda", "filename": "x"}
    text = client("blockdev-reopen", options=[options])
    assert text == "Node 'vda' was not made by blockdev-add"
    assert "unshared by" in client("block_resize", device="vda", size=4096)


def test_a_disk_stays_while_a_node_uses_it(client: Client) -> None:
    assert client("blockdev-add", driver="raw", node_name="r", file="vda") == {}
    for force in (False, True):
        text = client_error(client, "fleece-disk-remove", disk="vda", force=force)
        assert text == "disk 'vda' is in use by node 'r'"
    assert client("query-block")[0]["inserted"]["node-name"] == "vda"
    assert client("blockdev-del", node_name="r") == {}
    assert client("fleece-disk-remove", disk="vda") == {}
    assert client("query-named-block-nodes") == []


def test_the_daemon_ends_whatever_nodes_there_are(
    client: Client, daemon: Daemon, short_tmp: Path
) -> None:
    image = make_disk(short_tmp / "other.raw", MIB)
    inline = {"driver": "file", "filename": str(image)}
    for options in (
        {"driver": "raw", "node-name": "inline", "file": inline},
        {"driver": "raw", "node-name": "above", "file": "vda"},
        {"driver": "null-co", "node-name": "temp", "size": MIB},
        {"driver": "copy-before-write", "node-name": "c", "file": "inline", "target": "temp"},
        {"driver": "snapshot-access", "node-name": "access", "file": "c"},
    ):
        assert client("blockdev-add", **options) == {}
    client("fleece-snapshot-create", disks=["vda"], name="monday")
    for name in ("c", "access", "above"):
        export = {"type": "nbd", "id": name, "node-name": name, "name": name}
        assert client("block-export-add", **export) == {}
    assert daemon.stop() == 0
    assert "ERROR" not in daemon.errors()


@pytest.mark.interop("qemu-io")
def test_a_write_behind_the_threshold_is_told_once(client: Client, daemon: Daemon) -> None:
    """T-W1."""
    assert client.node("vda")["write_threshold"] == 0
    assert client("block-set-write-threshold", node_name="no", write_threshold=1) == (
        "Device 'no' not found"
    )
    client("block-set-write-threshold", node_name="vda", write_threshold=8192)
    assert client.node("vda")["write_threshold"] == 8192
    uri = f"nbd+unix:///vda?socket={daemon.socket}"

    def write(*commands: str) -> None:
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "raw", *words, uri], check=True, capture_output=True)

    write("write 0 8k")
    assert client.node("vda")["write_threshold"] == 8192
    write("write 6k 4k", "write 64k 4k")
    assert client.node("vda")["write_threshold"] == 0
    told = [event["data"] for event in client.events if event["event"] == "BLOCK_WRITE_THRESHOLD"]
    assert told == [{"node-name": "vda", "amount-exceeded": 2048, "write-threshold": 8192}]


# --- beside the reference --------------------------------------------------------------------


def conversation(folder: Path) -> Iterator[tuple[str, dict[str, Json]]]:
    """Yield commands; both daemons are asked each."""
    image = str(make_disk(folder / "a.raw", MIB))
    other = str(make_disk(folder / "b.raw", MIB))
    inline = {"driver": "file", "filename": other}
    null = {"driver": "null-co", "size": MIB}
    add, reopen, resize = "blockdev-add", "blockdev-reopen", "block_resize"

    def raw(name: str, file: Json, **more: Json) -> dict[str, Json]:
        return {"driver": "raw", "node-name": name, "file": file, **more}

    yield add, {"driver": "file", "node-name": "f", "filename": image}
    yield add, raw("r", inline)
    yield add, {**null, "node-name": "n"}
    yield add, {"driver": "null-co", "node-name": "plain", "read-only": True}
    yield add, raw("w", {"driver": "raw", "size": 4096, "file": "n"}, offset=512)
    yield add, {"driver": "copy-before-write", "node-name": "c", "file": "f", "target": "n"}
    yield "query-named-block-nodes", {}
    for name in ("c", "f", "nope", ""):
        yield "blockdev-del", {"node-name": name}
    yield add, {"driver": "null-co"}
    for name in ("", "f", "x" * 32, "9z", "a b"):
        yield add, {"driver": "null-co", "node-name": name}
    for file in ("nope", "", None, 3, {}, {"driver": "null-co", "x": 1}):
        yield add, raw("z", file)
    yield add, {"driver": "raw", "node-name": "z"}
    yield add, {"driver": "file", "node-name": "z", "filename": "/nope"}
    yield add, {"driver": "null-co", "node-name": "z", "read-only": "x"}
    yield add, raw("z", "f", offset=MIB + 512)
    yield "query-named-block-nodes", {"flat": True}
    yield "query-blockstats", {"query-nodes": 3}
    for size in (2 * MIB, -1, 4096, MIB):
        yield resize, {"node-name": "r", "size": size}
    for where in ({"node-name": "nope"}, {}, {"device": "nope"}, {"node-name": "n"}):
        yield resize, {**where, "size": 1}
    for options in (
        *(raw("nope", "f"), {"driver": "raw", "file": "f"}, raw("", "f")),
        *(raw("r", ""), raw("r", "nope"), {"driver": "raw", "node-name": "r"}),
        *(raw("r", "f", x=1), raw("r", "f", backing=None)),
        raw("r", {**inline, "node-name": "x"}),
        raw("r", {**inline, "filename": image}),
        raw("r", {**inline, "locking": "off"}),
        raw("r", {"driver": "null-co"}),
        raw("r", inline),
        raw("r", inline, **{"read-only": True}),
    ):
        yield reopen, {"options": [options]}
    yield "query-named-block-nodes", {}
    yield resize, {"node-name": "r", "size": 1}
    for options in (
        *(raw("r", "f"), raw("r", "r"), raw("r", "n"), raw("r", {**null}), raw("r", inline)),
        *(raw("r", "n", offset=4096), raw("r", "n", size=4096), raw("r", "n")),
        *(raw("r", "n", offset=2 * MIB), raw("w", "r"), raw("r", "w")),
        *({**null, "node-name": "n", "size": 5}, {"driver": "null-co", "node-name": "n"}),
        {**null, "node-name": "n", "read-only": True},
        {**null, "node-name": "n", "cache": {"direct": True}},
    ):
        yield reopen, {"options": [options]}
    yield reopen, {"options": [raw("r", "f"), raw("nope", "f")]}
    yield reopen, {"options": {}}
    yield "query-named-block-nodes", {}
    for name, threshold in (("r", 5), ("nope", 5), ("r", "x"), ("r", 0)):
        yield "block-set-write-threshold", {"node-name": name, "write-threshold": threshold}
    for name in ("r", "w", "c", "f", "n", "plain"):
        yield "blockdev-del", {"node-name": name}
    yield "query-named-block-nodes", {}


def comparable(answer: Json) -> Json:
    """Leave out what is ours, or nobody can say: our disk, sizes on disk, other made-up names."""
    if isinstance(answer, str):
        return re.sub(r"#block\d+", "#", answer.replace("the  actual", "the actual"))
    if not isinstance(answer, list):
        return answer
    rows = []
    for row in answer:
        if row["node-name"] == "vda":
            continue
        # QEMU's filter keeps its own bitmaps among those of the user.
        about = {key: row[key] for key in row if key != "dirty-bitmaps"}
        about |= {"image": _image(row["image"]), "file": _parsed(row["file"])}
        if row["node-name"].startswith("#"):
            about["node-name"] = "#"
        rows.append(about)
    return rows


def _image(image: Json) -> Json:
    found = {key: value for key, value in image.items() if key != "actual-size"}
    found["filename"] = _parsed(image["filename"])
    if "backing-image" in found:
        found["backing-image"] = _image(found["backing-image"])
    return found


def shown(answer: Json) -> list[str]:
    return json.dumps(answer, indent=1, sort_keys=True).splitlines()


def _parsed(name: str) -> Json:
    return json.loads(name[len("json:") :]) if name.startswith("json:") else name


@pytest.mark.interop
def test_both_answer_alike(client: Client, reference: Client, tmp_path: Path) -> None:
    ours_in, theirs_in = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours_in, theirs_in):
        folder.mkdir()
    for (command, arguments), (_, same) in zip(
        conversation(ours_in), conversation(theirs_in), strict=True
    ):
        ours = comparable(client(command, **arguments))
        theirs = comparable(reference(command, **same))
        expected = json.loads(json.dumps(theirs).replace(str(theirs_in), str(ours_in)))
        assert shown(ours) == shown(expected), f"{command} {arguments}"


# --- internal snapshots --------------------------------------------------------------------------


def internal_snapshots(folder: Path) -> Iterator[tuple[str, dict[str, Json]]]:
    """Commands about internal snapshots, good ones and bad ones."""
    image = {"driver": "file", "filename": str(folder / "image.qcow2")}
    yield "blockdev-add", {"driver": "qcow2", "node_name": "q", "file": image}
    yield "blockdev-snapshot-internal-sync", {"device": "q", "name": "one"}
    yield "blockdev-snapshot-internal-sync", {"device": "q", "name": "one"}
    yield "blockdev-snapshot-internal-sync", {"device": "q", "name": ""}
    yield "blockdev-snapshot-internal-sync", {"device": "nobody", "name": "x"}
    yield "blockdev-snapshot-internal-sync", {"device": "q"}
    two = {"type": "blockdev-snapshot-internal-sync", "data": {"device": "q", "name": "two"}}
    yield "transaction", {"actions": [two, {"type": "abort", "data": {}}]}
    yield "transaction", {"actions": [two]}
    yield "query-named-block-nodes", {"flat": True}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q"}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q", "name": "x"}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q", "id": "1", "name": "x"}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q", "id": "9"}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q", "id": "1", "name": "one"}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q", "name": "two"}
    yield "blockdev-snapshot-delete-internal-sync", {"device": "q", "name": "two"}
    yield "blockdev-del", {"node_name": "q"}


def of_snapshots(answer: Json) -> Json:
    """What is the same whoever answers."""
    if isinstance(answer, list):
        found = next(row for row in answer if row["node-name"] == "q")
        return [of_snapshots(each) for each in found["image"]["snapshots"]]
    if isinstance(answer, dict):
        clocks = ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")
        return {key: value for key, value in answer.items() if key not in clocks}
    return answer


@pytest.mark.interop("qemu-img", "qemu-storage-daemon")
def test_internal_snapshots_are_as_the_reference_has_them(
    client: Client, reference: Client, short_tmp: Path, program: Callable[[str], str]
) -> None:
    answers: list[list[Json]] = []
    for name, whom in (("ours", client), ("theirs", reference)):
        folder = short_tmp / name
        folder.mkdir()
        image = str(folder / "image.qcow2")
        subprocess.run([program("qemu-img"), "create", "-qf", "qcow2", image, "1M"], check=True)
        answers.append(
            [of_snapshots(whom(verb, **rest)) for verb, rest in internal_snapshots(folder)]
        )
        listed = [program("qemu-img"), "snapshot", "-l", image]
        assert subprocess.run(listed, check=True, capture_output=True).stdout == b""
    assert answers[0] == answers[1]
    assert [each["name"] for each in answers[0][8]] == ["one", "two"]
