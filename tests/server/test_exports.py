"""The registry of exports."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError, InUse, NotFound, OptionRefused
from nbdfleece.base.limits import MAX_STATUS_EXTENTS
from nbdfleece.base.units import MiB
from nbdfleece.block.bitmap import DirtyBitmap, new_bitmap
from nbdfleece.block.child import Child, Role
from nbdfleece.block.driver import Driver
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.node import Node
from nbdfleece.protocol.nbd import client as talks
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.server.export import ExportOptions
from nbdfleece.server.exports import RemoveMode, find_bitmaps
from tests.support.fleecing import add_filter
from tests.support.memory import MemoryDriver
from tests.support.nbd_client import connected
from tests.support.nbd_server import Served, pattern, serving
from tests.support.waiting import until


def options(
    export_id: str = "new", name: str = "new", *, writable: bool = False, description: str = ""
) -> ExportOptions:
    return ExportOptions(export_id, name, writable=writable, description=description)


async def listed(served: Served) -> list[str]:
    one = await served.open()
    await one.run(talks.greet(no_zeroes=True))
    names = [name for name, _ in await one.run(talks.list_exports())]
    await one.close()
    return names


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (options(""), "Invalid block export id ''"),
        (options("#x"), "Invalid block export id '#x'"),
        (options("disk"), "Block export id 'disk' is already in use"),
        (options(name="disk"), "NBD server already has export named 'disk'"),
        (options(name="x" * 4097), "export name is longer than 4096 bytes"),
        (options(description="x" * 4097), "export description is longer than 4096 bytes"),
        (options(name="a\0b"), "export name contains a NUL byte"),
        (options(name="\udcff"), "export name is not UTF-8"),
    ],
)
async def test_bad_export_is_refused(short_tmp: Path, wanted: ExportOptions, text: str) -> None:
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(4096)))

        with pytest.raises(CommandError, match=text):
            served.exports.add(node, wanted)

        assert len(list(served.exports)) == 2
        assert not node.parents


async def test_longest_name_is_taken_and_found(short_tmp: Path) -> None:
    name = "n" * 4096
    async with serving(short_tmp) as served:
        await served.add("big", b"1234")
        node = await served.add_node(MemoryDriver(bytearray(b"5678")))
        served.exports.add(node, options(name=name))

        async with connected(served.path, name) as client:
            assert await client.read(0, 4) == b"5678"
        assert name in await listed(served)


async def test_read_only_node_is_not_offered_for_writing(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(4096)), read_only=True)

        with pytest.raises(CommandError, match="read-only"):
            served.exports.add(node, options(writable=True))
        assert not node.parents
        assert served.exports.named("new") is None

        served.exports.add(node, options(writable=False))


async def test_conflicting_use_of_the_node_is_refused(short_tmp: Path) -> None:
    class Selfish(MemoryDriver):
        def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
            return 0, 0

        async def open(self) -> int:
            return 4096

    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(4096)))
        owner: Driver = Selfish(bytearray(4096))
        await served.graph.add(
            "owner", owner, {"file": (node, Role.DATA)}, read_only=False, discard_enabled=True
        )

        with pytest.raises(CommandError, match="Permission conflict"):
            served.exports.add(node, options())


async def test_node_that_is_too_large_is_refused(short_tmp: Path) -> None:
    class Huge(MemoryDriver):
        async def open(self) -> int:
            return 1 << 63

    async with serving(short_tmp) as served:
        node = await served.add_node(Huge(bytearray()))

        with pytest.raises(CommandError, match="larger"):
            served.exports.add(node, options())


async def test_unknown_export_is_not_found(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        with pytest.raises(NotFound):
            served.exports.get("unknown")
        with pytest.raises(NotFound):
            await served.exports.remove("unknown", RemoveMode.SAFE)


async def test_id_and_name_are_different_things(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(4)))
        served.exports.add(node, options("the-id", "the-name"))

        assert "the-name" in await listed(served)
        assert served.exports.named("the-id") is None
        assert served.exports.get("the-id").options.name == "the-name"


async def test_default_export(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        one = await served.open()
        await one.run(talks.greet(no_zeroes=True))
        with pytest.raises(OptionRefused) as caught:
            await one.run(talks.go(""))
        assert caught.value.reply == c.NBD_REP_ERR_UNKNOWN

        served.exports.default_name = "frozen"
        assert (await one.run(talks.go(""))).name == "frozen"
        await one.close()


# --- removal ---------------------------------------------------------------------------------


async def test_safe_removal_is_refused_while_there_are_clients(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        async with connected(served.path) as client:
            with pytest.raises(InUse, match="export 'disk' still in use"):
                await served.exports.remove("disk", RemoveMode.SAFE)
            assert await client.read(0, 4) == pattern(4)
            await client.disconnect()

        await served.exports.get("disk").wait_unused()
        await served.exports.remove("disk", RemoveMode.SAFE)
        assert await listed(served) == ["frozen"]


async def test_hard_removal_disconnects_the_clients_of_this_export_alone(short_tmp: Path) -> None:
    async with (
        serving(short_tmp) as served,
        connected(served.path) as client,
        connected(served.path, "frozen") as other,
    ):
        node = served.exports.get("disk").node
        gone: list[str] = []
        served.exports.removed.subscribe(gone.append)

        await served.exports.remove("disk", RemoveMode.HARD)

        await client.wait_closed()
        assert gone == ["disk"]
        assert not node.parents
        assert await other.read(0, 4) == pattern(4)
        late = await served.open()
        with pytest.raises(OptionRefused):
            await late.connect("disk")
        await late.close()


async def test_hard_removal_waits_for_requests_in_flight(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        served.disk.hold = {"write"}
        await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
        await until(lambda: served.disk.waiting)

        async with asyncio.TaskGroup() as tasks:
            removal = tasks.create_task(served.exports.remove("disk", RemoveMode.HARD))
            await client.wait_closed()
            assert not removal.done()
            with pytest.raises(CommandError, match="already in use"):
                served.exports.add(served.exports.get("frozen").node, options("disk", "other"))
            with pytest.raises(InUse):
                await served.exports.remove("disk", RemoveMode.SAFE)
            second = tasks.create_task(served.exports.remove("disk", RemoveMode.HARD))
            served.disk.held.set()
        assert removal.done()
        assert second.done()
        assert served.disk.data[:4] == b"abcd"


async def test_name_of_a_removed_export_may_be_used_again(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        first = served.exports.named("disk")
        node = served.exports.get("disk").node
        await served.exports.remove("disk", RemoveMode.SAFE)
        served.exports.add(node, options("disk", "disk"))

        again = served.exports.named("disk")
        assert first is not None
        assert again is not None
        assert first.generation != again.generation


async def test_go_right_after_info_meets_the_same_export_or_none(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        one = await served.open()
        await one.run(talks.greet(no_zeroes=True))
        await one.run(talks.info("disk"))
        node = served.exports.get("disk").node
        await served.exports.remove("disk", RemoveMode.SAFE)
        served.exports.add(node, options("disk", "disk"))

        with pytest.raises(OptionRefused, match="changed"):
            await one.run(talks.go("disk"))
        await one.close()


@pytest.mark.parametrize("mode", [RemoveMode.HIDE, RemoveMode.SOFT])
async def test_hidden_export_is_gone_when_its_last_client_is(
    short_tmp: Path, mode: RemoveMode
) -> None:
    async with serving(short_tmp) as served:
        node = served.exports.get("disk").node
        gone: list[str] = []
        served.exports.removed.subscribe(gone.append)
        async with connected(served.path) as client, connected(served.path) as second:
            await served.exports.remove("disk", mode)

            assert await listed(served) == ["frozen"]
            late = await served.open()
            with pytest.raises(OptionRefused):
                await late.connect("disk")
            await late.close()
            await client.disconnect()
            assert gone == []
            await second.disconnect()
        await until(lambda: gone)
        assert gone == ["disk"]
        assert not node.parents
        with pytest.raises(NotFound):
            served.exports.get("disk")


async def test_clients_of_a_hidden_export_go_on(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        await served.exports.remove("disk", RemoveMode.HIDE)

        await client.write(0, b"abcd")
        assert await client.read(0, 4) == b"abcd"


async def test_clients_of_an_export_that_is_softly_removed_hear_of_it(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        served.disk.hold = {"write"}
        begun = await client.submit(c.NBD_CMD_WRITE, 0, 4, data=b"abcd")
        await until(lambda: served.disk.waiting)
        await served.exports.remove("disk", RemoveMode.SOFT)

        assert await client.error_of(c.NBD_CMD_READ, 0, 4) == c.NBD_ESHUTDOWN
        assert await client.error_of(c.NBD_CMD_WRITE, 0, 4, data=b"evil") == c.NBD_ESHUTDOWN
        assert await client.error_of(c.NBD_CMD_BLOCK_STATUS, 0, 4) == c.NBD_ESHUTDOWN
        served.disk.held.set()
        assert (await begun).error == 0
        assert served.disk.data[:4] == b"abcd"
        await client.disconnect()


@pytest.mark.parametrize("mode", [RemoveMode.HIDE, RemoveMode.SOFT])
async def test_hidden_export_without_clients_is_gone_at_once(
    short_tmp: Path, mode: RemoveMode
) -> None:
    async with serving(short_tmp) as served:
        await served.exports.remove("disk", mode)
        with pytest.raises(NotFound):
            served.exports.get("disk")


async def test_hidden_export_can_be_removed_the_hard_way(short_tmp: Path) -> None:
    async with serving(short_tmp) as served, connected(served.path) as client:
        gone: list[str] = []
        served.exports.removed.subscribe(gone.append)
        await served.exports.remove("disk", RemoveMode.HIDE)
        with pytest.raises(InUse):
            await served.exports.remove("disk", RemoveMode.SAFE)
        await served.exports.remove("disk", RemoveMode.HARD)

        await client.wait_closed()
        assert gone == ["disk"]


# --- metadata contexts -----------------------------------------------------------------------


def bitmap(node: Node, name: str, *, enabled: bool = False) -> DirtyBitmap:
    found = new_bitmap(node, name, 512, enabled=enabled)
    node.bitmaps[name] = found
    return found


async def test_bitmaps_are_offered_by_name_and_busy_meanwhile(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(8192)))
        monday, coarse = bitmap(node, "since:monday"), bitmap(node, "coarse")
        monday.set(0, 4096)
        coarse.set(512, 1)
        served.exports.add(node, options(), [monday, coarse])
        assert monday.busy
        names = [f"qemu:dirty-bitmap:{name}" for name in ("since:monday", "coarse")]
        one = await served.open()
        await one.connect("new", contexts=["base:allocation", *names])

        assert set(one.contexts) == {"base:allocation", *names}
        assert await one.status(0, 8192, context=names[0]) == [(4096, 1), (4096, 0)]
        assert await one.status(0, 8192, context=names[1]) == [(512, 0), (512, 1), (7168, 0)]
        assert await one.status(600, 100, context=names[1]) == [(100, 1)]
        await one.close()
        await served.exports.remove("new", RemoveMode.HARD)
        assert not monday.busy


async def test_all_contexts_of_a_reply_tell_of_the_same_range(short_tmp: Path) -> None:
    """One bitmap has more runs than a reply has extents; the other, as far as told, has one."""
    size = 64 * MiB * 8
    async with serving(short_tmp) as served:
        node = await served.add_node(NullDriver(size=size, read_zeroes=True, latency_ns=0))
        busy, clean = bitmap(node, "busy"), bitmap(node, "clean")
        for offset in range(0, 2 * MAX_STATUS_EXTENTS * 512, 1024):
            busy.set(offset, 1)
        served.exports.add(node, options(), [busy, clean])
        one = await served.open()
        names = [f"qemu:dirty-bitmap:{name}" for name in ("busy", "clean")]
        await one.connect("new", contexts=names)
        found = await one.statuses(0, size)
        assert sum(length for length, _ in found[names[0]]) == MAX_STATUS_EXTENTS * 512
        assert found[names[1]] == [(MAX_STATUS_EXTENTS * 512, 0)]
        await one.close()


async def test_bitmaps_are_looked_for_in_what_the_node_shows(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        graph = served.graph
        disk = await served.add_node(MemoryDriver(bytearray(8192)))
        temp = await served.add_node(MemoryDriver(bytearray(8192)))
        cbw = await add_filter(graph, disk, temp, CopyBeforeWrite())
        below, above = bitmap(disk, "below"), bitmap(cbw, "above")
        names = ["below", "above", (disk.name, "below")]
        assert find_bitmaps(graph, cbw, names, writable=False) == [below, above]
        for name, text in (
            ("nope", "Bitmap 'nope' is not found"),
            ((disk.name, "above"), "Dirty bitmap 'above' not found"),
            (("nope", "b"), "Node 'nope' not found"),
        ):
            with pytest.raises(NotFound) as refused:
                find_bitmaps(graph, cbw, [name], writable=False)
            assert str(refused.value) == text
        bitmap(disk, "above")
        with pytest.raises(CommandError, match="Two bitmaps are called 'above'"):
            find_bitmaps(graph, cbw, ["above", (disk.name, "above")], writable=False)


async def test_a_bitmap_that_would_change_or_is_in_use_is_not_offered(short_tmp: Path) -> None:
    """2.5: an enabled bitmap may be offered to the very client that writes, and on its own."""
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(8192)))
        enabled = bitmap(node, "b", enabled=True)
        with pytest.raises(CommandError) as refused:
            find_bitmaps(served.graph, node, ["b"], writable=False)
        assert str(refused.value) == "Enabled bitmap 'b' incompatible with readonly export"
        assert find_bitmaps(served.graph, node, ["b"], writable=True) == [enabled]
        enabled.inconsistent = True
        with pytest.raises(CommandError, match="inconsistent"):
            find_bitmaps(served.graph, node, ["b"], writable=True)
        enabled.inconsistent = False
        served.exports.add(node, options(writable=True), [enabled])
        with pytest.raises(InUse):
            find_bitmaps(served.graph, node, ["b"], writable=True)
        enabled.mark(0, 1)
        assert enabled.count() == 512, "it records on"


async def test_depth_of_a_plain_disk_is_one(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        one = await served.open()
        await one.connect("disk", contexts=["qemu:allocation-depth"])
        found = await one.status(0, MiB, context="qemu:allocation-depth")
        assert found == [(MiB, 1)]
        await one.close()


async def test_stopped_guests_begin_nothing_until_they_are_let_go(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(4096)))
        served.exports.add(node, options(writable=True))
        async with connected(served.path, "new") as client:
            await client.write(0, b"before")
            await served.exports.stop_guests()
            await served.exports.stop_guests()
            assert served.exports.guests_are_stopped
            (pump,) = served.exports.get("new").pumps
            begun = pump.requests
            write = asyncio.create_task(client.write(0, b"after!"))
            async with connected(served.path, "frozen") as reader:
                assert await reader.read(0, 8) == pattern(8)
            assert pump.requests == begun
            assert not write.done()

            served.exports.let_guests_go()
            served.exports.let_guests_go()
            await write
            assert not served.exports.guests_are_stopped
            assert await client.read(0, 6) == b"after!"


async def test_an_export_that_is_removed_while_guests_are_stopped(short_tmp: Path) -> None:
    async with serving(short_tmp) as served:
        node = await served.add_node(MemoryDriver(bytearray(4096)))
        await served.exports.stop_guests()
        served.exports.add(node, options(writable=True))
        await served.exports.remove("new", RemoveMode.SAFE)
        served.exports.let_guests_go()
        served.exports.add(node, options(writable=True))
        async with connected(served.path, "new") as client:
            await client.write(0, b"x")
