"""Snapshots from the command line, on a real daemon."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from nbdfleece.base.errors import OptionRefused
from tests.support.daemon_process import Daemon, make_disk
from tests.support.nbd_client import NbdClient, connected

SIZE = 1 << 20


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    disks = [make_disk(short_tmp / f"{name}.raw", SIZE) for name in ("vda", "vdb")]
    with Daemon(short_tmp, *disks) as running:
        running.ready(2)
        yield running
        assert "Traceback" not in running.errors()


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own, where the machine lets us make one."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"this machine mounts nothing: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def connect(daemon: Daemon, export: str) -> NbdClient:
    client = await NbdClient.open(str(daemon.socket))
    await client.connect(export)
    return client


async def read_all(daemon: Daemon, export: str) -> bytes:
    client = await connect(daemon, export)
    try:
        return await client.read(0, SIZE)
    finally:
        await client.close()


# --- life ------------------------------------------------------------------------------------


async def test_a_snapshot_keeps_what_the_guest_overwrites(daemon: Daemon) -> None:
    guest = await connect(daemon, "vda")
    await guest.write(0, b"\2" * 8192)
    made = daemon.run("snapshot", "create", "vda", "--name", "one")
    assert made.out == f"vda@one {daemon.uri('vda@one')}\n"
    await guest.write(4096, b"\3" * 8192)  # on the same connection
    assert await read_all(daemon, "vda@one") == b"\2" * 8192 + b"\1" * (SIZE - 8192)
    assert (await read_all(daemon, "vda"))[4096:12288] == b"\3" * 8192
    assert daemon.run("snapshot", "delete", "vda@one").code == 0
    assert (await read_all(daemon, "vda"))[4096:12288] == b"\3" * 8192
    assert list((daemon.state / "vda" / "snapshots").iterdir()) == []
    await guest.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
async def test_stacked_snapshots_stay_right_whichever_goes_first(
    daemon: Daemon, order: tuple[int, ...]
) -> None:
    guest = await connect(daemon, "vda")
    wanted: dict[int, bytes] = {}
    for number in range(3):
        wanted[number] = await read_all(daemon, "vda")
        assert daemon.run("snapshot", "create", "vda", "--name", f"s{number}").code == 0
        await guest.write(4096 * number, bytes([10 + number]) * (SIZE // 2))
    for gone in order:
        for number, content in wanted.items():
            assert await read_all(daemon, f"vda@s{number}") == content
        assert daemon.run("snapshot", "delete", f"vda@s{gone}").code == 0
        del wanted[gone]
        await guest.write(0, bytes([50 + gone]) * SIZE)
        for number, content in wanted.items():
            assert await read_all(daemon, f"vda@s{number}") == content
    await guest.close()


async def test_several_disks_are_taken_at_one_instant(daemon: Daemon) -> None:
    """A guest writes a counter to vda, then to vdb: the two never differ by more than one."""
    guests = [await connect(daemon, "vda"), await connect(daemon, "vdb")]
    stop = asyncio.Event()

    async def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for guest in guests:
                await guest.write(0, number.to_bytes(8, "big") * 512)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        for number in range(5):
            await asyncio.sleep(0.05)
            name = f"s{number}"
            done = await asyncio.to_thread(
                daemon.run, "snapshot", "create", "vda", "vdb", "--name", name, "--json"
            )
            instants = {row["instant"] for row in done.json}
            assert len(instants) == 1
        stop.set()
    for number in range(5):
        first = await read_all(daemon, f"vda@s{number}")
        second = await read_all(daemon, f"vdb@s{number}")
        difference = int.from_bytes(first[:8], "big") - int.from_bytes(second[:8], "big")
        assert difference in (0, 1)
    for guest in guests:
        await guest.close()


async def test_a_group_is_taken_whole_or_not_at_all(daemon: Daemon) -> None:
    assert daemon.run("snapshot", "create", "vdb", "--name", "one").code == 0
    done = daemon.run("snapshot", "create", "vda", "vdb", "--name", "one")
    assert done.code == 4
    assert done.err == ("nbdfleece: snapshot create: disk 'vdb' has a snapshot 'one' already\n")
    names = [row["export"] for row in daemon.run("snapshot", "list", "--json").json]
    assert names == ["vdb@one"]
    assert not (daemon.state / "vda" / "snapshots" / "one").exists()


async def test_a_snapshot_that_is_read_is_not_deleted_unless_forced(daemon: Daemon) -> None:
    daemon.run("snapshot", "create", "vda", "--name", "one")
    reader = await connect(daemon, "vda@one")
    done = daemon.run("snapshot", "delete", "vda@one")
    assert done.code == 4
    assert "is being read by 1 connection" in done.err
    assert await reader.read(0, 10) == b"\1" * 10
    assert daemon.run("snapshot", "delete", "--force", "vda@one").code == 0
    with pytest.raises((ConnectionError, Exception)):
        await reader.read(0, 10)
    await reader.close()


def test_names_given_by_time_are_unique(daemon: Daemon) -> None:
    made = [daemon.run("snapshot", "create", "vda", "vdb").out for _ in range(3)]
    names = [line.split()[0] for text in made for line in text.splitlines()]
    assert len(set(names)) == 6
    for name in names:
        assert re.fullmatch(r"vd[ab]@\d{8}T\d{6}Z(-\d)?", name)
    assert daemon.run("snapshot", "delete", *names).code == 0


async def test_a_write_to_a_snapshot_is_refused(daemon: Daemon) -> None:
    daemon.run("snapshot", "create", "vda", "--name", "one")
    client = await connect(daemon, "vda@one")
    with pytest.raises(Exception, match="error"):
        await client.write(0, b"x")
    await client.close()


# --- broken ----------------------------------------------------------------------------------


async def test_over_the_limit_the_snapshot_breaks_and_the_guest_goes_on(daemon: Daemon) -> None:
    monitor = await asyncio.open_unix_connection(str(daemon.control))
    events = await monitor_events(monitor)
    daemon.run("snapshot", "create", "vda", "--name", "one", "--temp-limit", "100K")
    guest = await connect(daemon, "vda")
    for number in range(30):
        await guest.write(number * 4096, b"\7" * 4096)
    assert await guest.read(0, 30 * 4096) == b"\7" * (30 * 4096)
    seen = [await next_event(monitor) for _ in range(3)]
    assert [event["event"] for event in seen] == [
        "FLEECE_SNAPSHOT_CREATED",
        "FLEECE_TEMP_THRESHOLD",
        "FLEECE_SNAPSHOT_BROKEN",
    ]
    assert seen[1]["data"] == {"disk": "vda", "snapshot": "one", "used": 81920, "limit": 102400}
    assert "No space" in seen[2]["data"]["error"]
    shown = daemon.run("snapshot", "show", "vda@one")
    assert shown.code == 6
    assert "broken: " in shown.out
    assert daemon.run("health").code == 6
    listed = daemon.run("snapshot", "list", "--json").json
    assert listed[0]["state"] == "broken"
    assert "No space" in listed[0]["error"]
    assert daemon.run("snapshot", "delete", "vda@one").code == 0
    assert daemon.run("health").code == 0
    await guest.close()
    monitor[1].close()
    assert events


async def test_break_guest_write_fails_the_guest_and_keeps_the_snapshot(daemon: Daemon) -> None:
    options = ("--temp-limit", "8K", "--on-error", "break-guest-write")
    daemon.run("snapshot", "create", "vda", "--name", "one", *options)
    guest = await connect(daemon, "vda")
    await guest.write(0, b"\7" * 8192)
    with pytest.raises(Exception, match="error"):
        await guest.write(8192, b"\7" * 4096)
    assert await read_all(daemon, "vda@one") == b"\1" * SIZE
    assert daemon.run("snapshot", "show", "vda@one").code == 0
    await guest.close()


async def test_a_full_file_system_of_old_data(short_tmp: Path) -> None:
    disk = make_disk(short_tmp / "vda.raw", 4 * SIZE)
    with (
        mounted(short_tmp / "small", "1m") as temp,
        Daemon(short_tmp, "--temp-dir", temp, disk) as daemon,
    ):
        daemon.ready()
        assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
        guest = await connect(daemon, "vda")
        for number in range(4):
            await guest.write(number * SIZE, b"\7" * SIZE)
        assert await guest.read(0, 4 * SIZE) == b"\7" * (4 * SIZE)
        rows = daemon.run("snapshot", "list", "--json").json
        assert rows[0]["state"] == "broken"
        assert "No space left" in rows[0]["error"]
        assert daemon.run("snapshot", "delete", "vda@one").code == 0
        assert list(temp.iterdir()) == []
        await guest.close()
        assert daemon.stop() == 0


async def monitor_events(monitor) -> bool:
    reader, writer = monitor
    await reader.readline()
    writer.write(b'{"execute":"qmp_capabilities"}\n')
    return b"return" in await reader.readline()


async def next_event(monitor) -> dict:
    """The next event that is not about clients."""
    while True:
        event = json.loads(await asyncio.wait_for(monitor[0].readline(), 20))
        if not event["event"].startswith("FLEECE_CLIENT_"):
            return event


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["create"], 2, "DISK"),
        (["create", "nope"], 5, "there is no disk 'nope'"),
        (["create", "vda", "vda"], 1, "named twice"),
        (["create", "vda", "--name", "-x"], 2, "--name"),
        (["create", "vda", "--name", "a/b"], 2, "cannot be the name of a snapshot"),
        (["create", "vda", "--name", "x" * 65], 2, "cannot be the name of a snapshot"),
        (["create", "vda", "--temp-limit", "lots"], 2, "is not a size"),
        (["create", "vda", "--on-error", "panic"], 2, "panic"),
        (["create", "vda", "--durability", "power"], 2, "not built yet"),
        (["create", "vda", "--expire", "1d"], 2, "--expire is not built yet"),
        (["create", "vda", "--bitmap", ""], 1, "Bitmap name cannot be empty"),
        (["show", "vda"], 2, "is not DISK@NAME"),
        (["show", "vda@nope"], 5, "no snapshot 'nope'"),
        (["list", "nope"], 5, "there is no disk 'nope'"),
        (["delete", "vda@nope"], 5, "no snapshot 'nope'"),
        (["delete", "nope@one"], 5, "there is no disk 'nope'"),
        (["delete", "vda@x", "--success", "--failed"], 2, "not allowed with argument"),
        (["reset", "vda@x"], 2, "not built yet"),
        (["shrink"], 2, "shrink"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_mistakes(daemon: Daemon, args: list[str], code: int, text: str) -> None:
    done = daemon.run("snapshot", *args)
    assert done.out == ""
    assert done.err.startswith("nbdfleece: snapshot")
    assert done.err.count("\n") == 1
    assert text in done.err
    assert done.code == code


def test_some_deleted_and_some_not(daemon: Daemon) -> None:
    daemon.run("snapshot", "create", "vda", "--name", "one")
    done = daemon.run("snapshot", "delete", "vda@one", "vda@two")
    assert done.code == 7
    assert done.err == "nbdfleece: snapshot delete: disk 'vda' has no snapshot 'two'\n"


# --- output ----------------------------------------------------------------------------------


def test_list_is_aligned_and_json_is_stable(daemon: Daemon) -> None:
    assert daemon.run("snapshot", "list").out == ""
    daemon.run("snapshot", "create", "vda", "vdb", "--name", "a-rather-long-name")
    header, first, second = daemon.run("snapshot", "list").out.splitlines()
    assert header.split() == ["NAME", "DISK", "INSTANT", "AGE", "SIZE", "HELD", "READERS", "STATE"]
    assert header.index("DISK") == first.index("vda") == second.index("vdb")
    rows = daemon.run("snapshot", "list", "vda", "--json").json
    assert set(rows[0]) == {
        *("disk", "snapshot", "export", "node-name", "instant", "size", "saved-bytes"),
        *("temp-bytes", "state", "readers", "durability", "on-error"),
    }
    assert rows[0]["size"] == SIZE
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", rows[0]["instant"])


def test_show(daemon: Daemon) -> None:
    daemon.run("snapshot", "create", "vda", "--name", "one", "--temp-limit", "1G", "--timeout", "5")
    shown = daemon.run("snapshot", "show", "vda@one")
    assert shown.code == 0
    assert re.search(r"^space limit: +1 GiB$", shown.out, re.MULTILINE)
    facts = daemon.run("snapshot", "show", "vda@one", "--json").json
    assert facts["uris"] == [daemon.uri("vda@one")]
    assert (facts["temp-limit"], facts["timeout"]) == (1 << 30, 5.0)


# --- tokens ----------------------------------------------------------------------------------


def token_of(line: str) -> tuple[str, str]:
    """The export name with a token, and the token, in a line `DISK@NAME URI`."""
    parts = urlsplit(line.split()[1])
    name = unquote(parts.path).removeprefix("/")
    return name, name.partition(":")[2]


async def test_a_token_opens_the_snapshot_and_shows_up_nowhere(daemon: Daemon) -> None:
    made = daemon.run("snapshot", "create", "vda", "vdb", "--name", "one", "--token", "1h")
    assert made.code == 0, made.err
    lines = made.out.splitlines()
    assert [line.split()[0] for line in lines] == ["vda@one", "vdb@one"]
    name, token = token_of(lines[0])
    assert name.startswith("vda@one:")
    assert len(token) == 32
    assert token != token_of(lines[1])[1]

    assert await read_all(daemon, name) == b"\1" * SIZE
    two = [await connect(daemon, name) for _ in range(2)]
    assert [await client.read(0, 4) for client in two] == [b"\1" * 4] * 2
    for guess in (name[:-1] + "*", f"vdb@one:{token}", "vda@one:"):
        with pytest.raises(OptionRefused, match="there is no export"):
            async with connected(str(daemon.socket), guess):
                pass

    for command in (
        ("snapshot", "list", "--json"),
        ("snapshot", "show", "vda@one", "--json"),
        ("status", "--json"),
        ("client", "list", "--json"),
    ):
        assert token not in daemon.run(*command).out, command
    for client in two:
        await client.close()
    assert token[:-1] not in daemon.errors()
    assert not [path for path in daemon.state.rglob("*") if path.is_file() and holds(path, token)]


def holds(path: Path, text: str) -> bool:
    with open(path, "rb") as file:
        return text.encode() in file.read(1 << 20)


async def test_a_token_dies_with_its_snapshot(daemon: Daemon) -> None:
    made = daemon.run("snapshot", "create", "vda", "--name", "one", "--token", "1h", "--json")
    row = made.json[0]
    name = row["token-export"]
    assert row["uri"] == row["token-uris"][0]
    assert token_of(f"x {row['uri']}")[0] == name
    assert daemon.run("snapshot", "delete", "vda@one").code == 0
    assert daemon.run("snapshot", "create", "vda", "--name", "one").code == 0
    with pytest.raises(OptionRefused, match="there is no export"):
        async with connected(str(daemon.socket), name):
            pass
    assert await read_all(daemon, "vda@one") == b"\1" * SIZE


@pytest.mark.interop("nbdinfo", "qemu-img")
def test_real_clients_take_the_uri_with_a_token(daemon: Daemon) -> None:
    made = daemon.run("snapshot", "create", "vda", "--name", "one", "--token", "1h")
    uri = made.out.split()[1]
    for command in (["nbdinfo", "--size"], ["qemu-img", "info", "--output=json"]):
        done = subprocess.run([*command, uri], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert str(SIZE) in done.stdout


@pytest.mark.parametrize("lifetime", ["0", "367d"])
def test_a_token_without_a_sensible_lifetime_is_refused(daemon: Daemon, lifetime: str) -> None:
    made = daemon.run("snapshot", "create", "vda", "--name", "one", "--token", lifetime)
    assert made.code == 1
    assert "a token can last up to 366 days" in made.err
    assert daemon.run("snapshot", "list", "--json").json == []
