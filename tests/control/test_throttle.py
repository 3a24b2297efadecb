"""I/O limits and accounting by commands, in a real daemon."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.control.commands.throttle import COMMANDS
from nbdfleece.protocol.nbd import constants as c
from tests.control.test_monitor import Monitor
from tests.support.daemon_process import Daemon, make_disk
from tests.support.live import (
    client,
    eventually,
    has_in_flight,
    read_export,
    serving,
    snapshot,
)
from tests.support.nbd_client import connected
from tests.support.storage_daemon import StorageDaemon

MiB = 1 << 20

NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
VDA = "/machine/peripheral/vda/virtio-backend"


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with serving(short_tmp, make_disk(short_tmp / "vda.raw", MiB)) as daemon:
        yield daemon


@pytest.fixture
def monitor(daemon: Daemon) -> Iterator[Monitor]:
    with Monitor(daemon) as monitor:
        yield monitor


def run(monitor: Monitor, command: str, **arguments: object):
    given = {name.replace("__", "-"): value for name, value in arguments.items()}
    return monitor.ask({"execute": command, "arguments": given})


def error_of(monitor: Monitor, command: str, **arguments: object) -> tuple[str, str]:
    error = run(monitor, command, **arguments)["error"]
    return error["class"], error["desc"]


def limit(monitor: Monitor, **limits: object) -> None:
    assert run(monitor, "block_set_io_throttle", **(NO_LIMITS | limits)) == {"return": {}}


def stats(monitor: Monitor, device: str = "vda") -> dict:
    return run(monitor, "query-fleece-accounting", id=device)["return"]


def test_commands_are_documented_by_their_names() -> None:
    assert [command.name for command in COMMANDS] == [
        "block_set_io_throttle",
        "block-latency-histogram-set",
        "fleece-accounting-set",
        "query-fleece-accounting",
    ]


# --- limits --------------------------------------------------------------------------------------


def test_limits_are_checked(monitor: Monitor) -> None:
    set_limits = "block_set_io_throttle"
    for arguments, error in (
        ({"id": "vda", **NO_LIMITS} | {"bps": 1, "bps_rd": 1}, "bps/iops/max total values and"),
        ({"id": "vda", **NO_LIMITS, "bps_max": 1}, "bps_max/iops_max require corresponding"),
        ({"id": "vda", **NO_LIMITS, "iops_size": 1}, "iops size requires an iops value"),
        ({"id": "vda", **NO_LIMITS, "bps_max_length": 0}, "the burst length cannot be 0"),
        ({"id": "vda", **NO_LIMITS} | {"bps": -1}, "bps/iops/max values must be within [0, 1"),
        ({**NO_LIMITS}, "Need exactly one of 'device' and 'id'"),
        ({**NO_LIMITS, "id": "vda", "device": "vda"}, "Need exactly one of 'device' and 'id'"),
        ({"id": "vda"}, "Parameter 'bps' is missing"),
        ({**NO_LIMITS, "id": "vda", "bogus": 1}, "Parameter 'bogus' is unexpected"),
    ):
        kind, text = error_of(monitor, set_limits, **arguments)
        assert kind == "GenericError"
        assert text.startswith(error), text
    assert error_of(monitor, set_limits, id="nope", **NO_LIMITS) == (
        "DeviceNotFound",
        "Device 'nope' not found",
    )


async def test_limited_writes_wait_and_go_when_the_limits_go(
    daemon: Daemon, monitor: Monitor
) -> None:
    """Of many requests under one per 1,000 seconds few go, however slow the machine is."""
    limit(monitor, id=VDA, bps=1)
    async with client(daemon, "vda") as guest:
        replies = [
            await guest.submit(c.NBD_CMD_WRITE, 1000 * number, 1000, data=bytes([number]) * 1000)
            for number in range(1, 10)
        ]
        assert (await replies[0]).error == 0  # it overflows the bucket
        await guest.flush()  # not limited
        assert not any(reply.done() for reply in replies[1:])

        limit(monitor, device="vda")

        for reply in replies:
            assert (await reply).error == 0
        assert await guest.read(9000, 1000) == b"\x09" * 1000


async def test_limited_requests_go_on_by_themselves(daemon: Daemon, monitor: Monitor) -> None:
    """The daemon's own clock: all are answered, and no sooner than the limit allows."""
    limit(monitor, id="vda", iops=200)
    async with client(daemon, "vda") as guest:
        begun = time.monotonic()
        replies = [await guest.submit(c.NBD_CMD_READ, 0, 512) for _ in range(60)]
        for reply in replies:
            assert (await reply).error == 0
        # A tenth of a second's worth and one more go at once.
        assert time.monotonic() - begun >= (60 - 21) / 200 - 0.01


async def test_snapshots_go_with_limits(daemon: Daemon, monitor: Monitor) -> None:
    """Taken while requests are held back, read without limits, deleted; then the disk."""
    limit(monitor, id="vda", bps=1)
    async with client(daemon, "vda") as guest:
        replies = [
            await guest.submit(c.NBD_CMD_WRITE, 0, 4096, data=b"\2" * 4096) for _ in range(5)
        ]
        await replies[0]
        await eventually(lambda: has_in_flight(daemon, 4))
        await snapshot(daemon, "vda", name="s")
        for reply in replies:  # the drained section has let them through
            assert (await reply).error == 0
        late = await guest.submit(c.NBD_CMD_WRITE, 8192, 4096, data=b"\3" * 4096)

        assert await read_export(daemon, "vda@s") == b"\2" * 4096 + b"\1" * (MiB - 4096)

        assert not late.done()
        limit(monitor, id="vda@s", iops=10**6)
        assert (await read_export(daemon, "vda@s"))[:4096] == b"\2" * 4096
        done = run(monitor, "fleece-snapshot-delete", disk="vda", snapshot="s", force=True)
        assert done == {"return": {}}
        assert (await late).error == 0

    def unused() -> bool:
        rows = run(monitor, "query-fleece-disks")["return"]
        return rows[0]["clients"] == 0

    await eventually(unused)
    assert run(monitor, "fleece-disk-remove", disk="vda") == {"return": {}}


def test_limits_are_told(monitor: Monitor) -> None:
    limit(monitor, id="vda", iops=500, iops_max=600, group="group")
    (row,) = run(monitor, "query-block")["return"]
    assert {name: row["inserted"][name] for name in ("iops", "iops_max", "bps", "group")} == {
        "iops": 500, "iops_max": 600, "bps": 0, "group": "group",
    }  # fmt: skip
    limit(monitor, id="vda")
    (row,) = run(monitor, "query-block")["return"]
    assert "group" not in row["inserted"]


@pytest.mark.parametrize("mode", ["safe", "hard"])
def test_limits_go_with_their_export(short_tmp: Path, mode: str) -> None:
    """A node under limits whose export is gone can be removed, and so can the user's group."""
    with StorageDaemon(
        short_tmp,
        *("--object", "throttle-group,id=mine"),
        *("--blockdev", "driver=null-co,node-name=disk,size=1048576"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
    ) as daemon:
        given = NO_LIMITS | {"iops": 7, "id": "export", "group": "mine"}
        assert daemon.answer("block_set_io_throttle", given) == {"return": {}}
        limits = daemon.ask("qom-get", {"path": "/objects/mine", "property": "limits"})
        assert limits["iops-total"] == 7
        assert "error" in daemon.answer("object-del", {"id": "mine"})
        assert "error" in daemon.answer("blockdev-del", {"node-name": "disk"})

        daemon.ask("block-export-del", {"id": "export", "mode": mode})
        if mode == "hard":
            assert daemon.event("BLOCK_EXPORT_DELETED") == {"id": "export"}
        # Nothing is left of the limits, and not by the next command about nodes.
        graph = daemon.ask("x-debug-query-block-graph")
        assert [node["name"] for node in graph["nodes"]] == ["disk"]
        assert daemon.answer("blockdev-del", {"node-name": "disk"}) == {"return": {}}
        assert daemon.answer("object-del", {"id": "mine"}) == {"return": {}}


async def test_limits_of_a_group_are_set_while_requests_wait(short_tmp: Path) -> None:
    """T-T3: object: get and set limits; a filter of blockdev-add follows at once."""
    with StorageDaemon(
        short_tmp,
        *("--object", "throttle-group,id=mine,limits.bps-total=1"),
        *("--blockdev", "driver=null-co,node-name=disk,size=1048576"),
        *("--blockdev", "driver=throttle,node-name=slow,throttle-group=mine,file=disk"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "type=nbd,id=export,node-name=slow,name=disk,writable=on"),
    ) as daemon:
        async with connected(str(short_tmp / "nbd.sock"), "disk") as guest:
            replies = [
                await guest.submit(c.NBD_CMD_WRITE, 0, 4096, data=bytes(4096)) for _ in range(5)
            ]
            assert (await replies[0]).error == 0
            await guest.flush()
            assert not any(reply.done() for reply in replies[1:])
            of_limits = {"path": "/objects/mine", "property": "limits"}
            assert await asyncio.to_thread(
                daemon.answer, "qom-set", {**of_limits, "value": {"bps-total": 0}}
            ) == {"return": {}}
            for reply in replies:
                assert (await reply).error == 0


# --- accounting ----------------------------------------------------------------------------------


async def test_counters_of_an_export(daemon: Daemon, monitor: Monitor) -> None:
    """T-A1: what a client does is counted once it is asked for; QEMU counts nothing here."""
    async with client(daemon, "vda") as guest:
        await guest.read(0, 512)
        assert stats(monitor)["rd_operations"] == 0  # nobody had asked
        done = run(
            monitor, "fleece-accounting-set", id="vda", intervals=[60], account__failed=False
        )
        assert done == {"return": {}}
        assert "idle_time_ns" not in stats(monitor)

        for _ in range(3):
            await guest.read(0, 4096)
        await guest.write(8192, os.urandom(1024))
        await guest.zero(0, 4096)
        await guest.trim(0, 4096)
        await guest.flush()
        assert (await (await guest.submit(c.NBD_CMD_READ, MiB, 512))).error == c.NBD_EINVAL

        found = stats(monitor)
        assert {
            name: found[name]
            for name in found
            if name.endswith(("operations", "bytes", "offset", "account_failed")) and found[name]
        } == {
            "rd_operations": 3, "rd_bytes": 3 * 4096, "invalid_rd_operations": 1,
            "wr_operations": 2, "wr_bytes": 1024 + 4096, "wr_highest_offset": 8192 + 1024,
            "unmap_operations": 1, "unmap_bytes": 4096, "flush_operations": 1,
        }  # fmt: skip
        assert found["account_failed"] is False
        assert found["idle_time_ns"] >= 0
        assert found["rd_total_time_ns"] > 0
        (timed,) = found["timed_stats"]
        assert timed["interval_length"] == 60
        assert 0 < timed["min_wr_latency_ns"] <= timed["max_wr_latency_ns"]

        run(monitor, "fleece-accounting-set", id="vda", enable=False)
        await guest.read(0, 4096)
        assert stats(monitor)["rd_operations"] == 0


async def test_counters_of_a_node(daemon: Daemon, monitor: Monitor) -> None:
    (disk,) = run(monitor, "query-fleece-disks")["return"]
    await snapshot(daemon, "vda", name="s")
    node = next(
        row["node-name"]
        for row in run(monitor, "query-named-block-nodes", flat=True)["return"]
        if row["drv"] == "copy-before-write"
    )
    assert disk["node-name"] == "vda"
    run(monitor, "fleece-accounting-set", id=node)
    async with client(daemon, "vda") as guest:
        for _ in range(3):
            await guest.read(0, 4096)
        await guest.write(0, bytes(512))

    assert (stats(monitor, node)["rd_operations"], stats(monitor, node)["wr_bytes"]) == (3, 512)


async def test_query_blockstats_counts_from_the_first_question_on(
    daemon: Daemon, monitor: Monitor
) -> None:
    async with client(daemon, "vda") as guest:
        (before,) = run(monitor, "query-blockstats")["return"]
        await guest.read(0, 4096)
        (after,) = run(monitor, "query-blockstats")["return"]

    assert (before["device"], before["qdev"]) == ("vda", VDA)
    assert before["stats"]["rd_operations"] == 0
    assert after["stats"]["rd_operations"] == 1


async def test_histograms(daemon: Daemon, monitor: Monitor) -> None:
    """T-A2."""
    command = "block-latency-histogram-set"
    for boundaries in ([], [0], [0, 1], [5, 5], [5, 4]):
        assert error_of(monitor, command, id="vda", boundaries=boundaries) == (
            "GenericError",
            "Device 'vda' set read boundaries fail",
        )
    assert error_of(monitor, command, id="vda", boundaries=[1], boundaries__flush=[]) == (
        "GenericError",
        "Device 'vda' set flush boundaries fail",
    )
    assert error_of(monitor, command, id="nope") == ("DeviceNotFound", "Device 'nope' not found")
    assert "rd_latency_histogram" not in stats(monitor)

    far = 1 << 62
    assert run(monitor, command, id="vda", boundaries=[10, far]) == {"return": {}}
    async with client(daemon, "vda") as guest:
        await guest.read(0, 512)
        await guest.read(0, 512)
        await guest.write(0, bytes(512))
        await guest.flush()

    found = stats(monitor)
    assert found["rd_latency_histogram"] == {"boundaries": [10, far], "bins": [0, 2, 0]}
    assert found["wr_latency_histogram"]["bins"] == [0, 1, 0]
    assert found["flush_latency_histogram"]["bins"] == [0, 1, 0]
    run(monitor, command, id="vda", boundaries__write=[far])
    found = stats(monitor)
    assert found["rd_latency_histogram"]["bins"] == [0, 2, 0]
    assert found["wr_latency_histogram"] == {"boundaries": [far], "bins": [0, 0]}

    assert run(monitor, command, id="vda") == {"return": {}}
    assert not any("histogram" in name for name in stats(monitor))


def test_accounting_options_are_checked(monitor: Monitor) -> None:
    assert error_of(monitor, "fleece-accounting-set", id="vda", intervals=[0]) == (
        "GenericError",
        "interval length must be greater than zero",
    )
    assert error_of(monitor, "query-fleece-accounting", id="nope")[0] == "DeviceNotFound"
