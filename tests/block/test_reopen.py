"""blockdev-reopen: T-R1, T-R3, T-R5 to T-R9, T-R11, T-R13 to T-R15 of the fleecing document."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import drain
from nbdfleece.block import permissions as perms
from nbdfleece.block.bitmap import DirtyBitmap
from nbdfleece.block.child import Child
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.throttle import ThrottleDriver
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from nbdfleece.block.throttle_group import make_throttle_group
from tests.support.driver_kit import Owner, open_descriptors, read, remove_all
from tests.support.waiting import until

SIZE = 3 << 20
MIB = 1 << 20
RW = perms.CONSISTENT_READ | perms.WRITE
BUT_RESIZE = perms.ALL & ~perms.RESIZE


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


async def null(graph: Graph, name: str, **more: object) -> Node:
    options = {"driver": "null-co", "node-name": name, "size": SIZE, **more}
    return await add_from_options(graph, options)


async def raw(graph: Graph, name: str, file: object, **more: object) -> Node:
    return await add_from_options(graph, raw_options(name, file, **more))


def make_image(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def raw_options(name: str, file: object, **more: object) -> dict[str, object]:
    return {"driver": "raw", "node-name": name, "file": file, **more}


def null_options(name: str, **more: object) -> dict[str, object]:
    return {"driver": "null-co", "node-name": name, "size": SIZE, **more}


def file_options(name: str, path: Path, **more: object) -> dict[str, object]:
    return {"driver": "file", "node-name": name, "filename": str(path), **more}


def writer(graph: Graph, node: Node) -> Child:
    return graph.attach_root("root", Owner("writer"), node, perm=RW, shared=BUT_RESIZE)


def shape(graph: Graph) -> list[tuple[object, ...]]:
    """Return all that must be the same behind a refusal."""
    return [
        (
            *(node.name, node.size, node.read_only, node.discard_enabled, node.spec),
            *(
                (edge.name, edge.node.name, edge.role, edge.perm, edge.shared)
                for edge in sorted(node.children, key=lambda edge: edge.name)
            ),
        )
        for node in graph
    ]


async def refused(graph: Graph, text: str, *options: dict[str, object]) -> None:
    before = shape(graph)
    descriptors = open_descriptors()
    with pytest.raises(CommandError) as caught:
        await reopen(graph, options)
    assert text in str(caught.value)
    assert shape(graph) == before
    assert open_descriptors() == descriptors
    assert not any(node.is_drained for node in graph)


# --- what may be said (T-R1) ---------------------------------------------------------------------


async def test_the_same_options_and_no_options_change_nothing(graph: Graph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", os.urandom(SIZE))
    await raw(graph, "r", file_options("f", image))
    await raw(graph, "by-name", "f")
    before = shape(graph)

    await reopen(graph, [])
    await reopen(graph, [raw_options("by-name", "f")])
    await reopen(graph, [raw_options("r", "f")])

    assert [row[:4] + row[5:] for row in shape(graph)] == [row[:4] + row[5:] for row in before]
    await reopen(graph, [raw_options("r", file_options("f", image))])
    await reopen(graph, [raw_options("r", {"driver": "file", "filename": str(image)})])


async def test_what_is_refused(graph: Graph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", bytes(SIZE))
    inline = {"driver": "file", "filename": str(image)}
    await raw(graph, "r", inline)
    await null(graph, "n")
    await raw(graph, "by-name", "n")

    for text, options in (
        ("node-name not specified", {"driver": "raw", "file": "n"}),
        ("Failed to find node with node-name='no'", raw_options("no", "n")),
        ("Failed to find node with node-name=''", raw_options("", "n")),
        ("Cannot change the option 'driver'", file_options("r", image)),
        ("Cannot find device='' nor node-name='no'", raw_options("r", "no")),
        ("Cannot find device='' nor node-name=''", raw_options("r", "")),
        ("Invalid parameter type for 'options[0].file'", raw_options("r", None)),
        ("Parameter 'options[0].file' is missing", {"driver": "raw", "node-name": "r"}),
        ("Parameter 'options[0].filename' is missing", {"driver": "file", "node-name": "r"}),
        ("Parameter 'options[0].x' is unexpected", raw_options("r", "n", x=1)),
        ("Cannot change the option 'node-name'", raw_options("r", {**inline, "node-name": "x"})),
        ("Option 'filename' cannot be reset", raw_options("r", {"driver": "null-co"})),
        ("Cannot change the option 'filename'", raw_options("r", {**inline, "filename": "b"})),
        ("Cannot change the option 'locking'", raw_options("r", {**inline, "locking": "off"})),
        (
            "force-share=on can only be used with read-only images",
            raw_options("r", inline, **{"force-share": True}),
        ),
        ("Cannot change the option 'file.driver'", raw_options("by-name", null_options("n"))),
        ("Cannot change the option 'size'", null_options("n", size=5)),
        ("Option 'size' cannot be reset", {"driver": "null-co", "node-name": "n"}),
    ):
        await refused(graph, text, options)


async def test_drivers_without_reopen_refuse(graph: Graph) -> None:
    """T-R8, but for copy-before-write: its policy may be changed."""
    for name in ("source", "target", "other"):
        await null(graph, name)
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target"}
    access = {"driver": "snapshot-access", "node-name": "access", "file": "cbw"}
    node = await add_from_options(graph, cbw)
    await add_from_options(graph, access)
    driver = node.driver
    assert isinstance(driver, CopyBeforeWrite)

    await refused(graph, "used by node 'access' does not support reopening files", access)
    await refused(graph, "Cannot change the option 'file'", {**cbw, "file": "other"})
    await refused(graph, "Cannot change the option 'target'", {**cbw, "target": "other"})
    await refused(graph, "'min-cluster-size'", {**cbw, "min-cluster-size": 65536})

    await reopen(graph, [{**cbw, "on-cbw-error": "break-snapshot", "cbw-timeout": 3}])
    assert (driver.on_cbw_error, driver.cbw_timeout_s) == (OnCbwError.BREAK_SNAPSHOT, 3.0)
    await refused(
        graph,
        "Failed to find node with node-name='no'",
        cbw,
        raw_options("no", "other"),
    )
    assert driver.on_cbw_error is OnCbwError.BREAK_SNAPSHOT
    await reopen(graph, [cbw])
    assert (driver.on_cbw_error, driver.cbw_timeout_s) == (OnCbwError.BREAK_GUEST_WRITE, None)


# --- toggles (T-R3) ------------------------------------------------------------------------------


async def test_read_only_and_back(graph: Graph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", bytes(SIZE))
    node = await raw(graph, "r", file_options("f", image))
    file = graph.find("f")
    before = open_descriptors()

    nested = file_options("f", image)
    await reopen(graph, [raw_options("r", nested, **{"read-only": True})])
    assert node.read_only
    assert file.read_only, "inherited"
    with pytest.raises(CommandError, match="Block node 'r' is read-only"):
        writer(graph, node)
    await reopen(graph, [raw_options("r", nested)])

    edge = writer(graph, node)
    await node.write(0, memoryview(b"again"), fua=True)
    await refused(
        graph,
        "Read-only block node 'f' cannot support read-write users",
        raw_options("r", {**nested, "read-only": True}),
    )
    await refused(
        graph,
        "Read-only block node 'r' cannot support read-write users",
        raw_options("r", nested, **{"read-only": True}),
    )
    assert await read(node, 0, 5) == b"again"
    await node.write(5, memoryview(b"!"), fua=False)
    graph.detach_root(edge)
    assert open_descriptors() == before + 1, "the descriptor with the locks"


async def test_the_locks_outlive_a_reopen(graph: Graph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", bytes(SIZE))
    for locking in ("on", "off"):
        node = await add_from_options(graph, file_options("f", image, locking=locking))
        owner = Owner("exclusive")
        edge = graph.attach_root("root", owner, node, perm=RW, shared=perms.ALL & ~perms.WRITE)
        for direct in (True, False, True):
            options = file_options("f", image, locking=locking, cache={"direct": direct})
            await reopen(graph, [options])
            assert node.driver.bypasses_cache() is direct
            assert bytes(await read(node, 0, 10)) == bytes(10)
        await reopen(graph, [file_options("f", image, locking=locking, discard="unmap")])
        assert node.discard_enabled

        other = Graph()
        stranger = await other.add(
            None,
            FileDriver(
                filename=str(image), locking=Locking.AUTO, cache_direct=False, new_and_sparse=False
            ),
            read_only=False,
            discard_enabled=False,
        )
        if locking == "on":
            with pytest.raises(CommandError, match='Failed to get "write" lock'):
                writer(other, stranger)
        else:
            other.detach_root(writer(other, stranger))
        await remove_all(other)
        graph.detach_root(edge)
        await remove_all(graph)


async def test_what_may_be_switched(graph: Graph) -> None:
    """T-R3: also what changes nothing here but what is shown."""
    node = await null(graph, "n")
    unmap = {"detect-zeroes": "unmap"}
    for more, shown in (
        ({"cache": {"no-flush": True}, "auto-read-only": True}, ("off", True)),
        ({"detect-zeroes": "on"}, ("on", False)),
        ({**unmap, "discard": "unmap"}, ("unmap", False)),
        ({}, ("off", False)),
    ):
        await reopen(graph, [null_options("n", **more)])
        assert node.spec is not None
        assert (node.spec.detect_zeroes, node.spec.no_flush) == shown
    await refused(
        graph, "detect-zeroes to unmap is not allowed without", null_options("n", **unmap)
    )


async def test_locking_cannot_be_left_out_again(graph: Graph, tmp_path: Path) -> None:
    """T-R6."""
    image = make_image(tmp_path / "a", bytes(SIZE))
    await add_from_options(graph, file_options("f", image, locking="off"))
    await refused(
        graph, "Option 'locking' cannot be reset to its default value", file_options("f", image)
    )


async def test_a_file_that_was_replaced_is_not_taken(graph: Graph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", bytes(SIZE))
    await add_from_options(graph, file_options("f", image))
    image.unlink()
    make_image(image, bytes(SIZE))

    await refused(
        graph, "another file is there now", file_options("f", image, **{"read-only": True})
    )


# --- windows (T-R5, T-R6) and sizes (T-R15) ------------------------------------------------------


async def test_the_window_of_raw_moves_and_comes_back(graph: Graph, tmp_path: Path) -> None:
    content = b"".join(bytes([1 + index]) * MIB for index in range(3))
    await add_from_options(graph, file_options("f", make_image(tmp_path / "a", content)))
    node = await raw(graph, "r", "f")
    upper = await raw(graph, "upper", "r")

    await reopen(graph, [raw_options("r", "f", offset=MIB)])
    assert (node.size, upper.size) == (2 * MIB, 2 * MIB), "T-R15"
    assert await read(upper, 0, 2 * MIB) == content[MIB:]
    await reopen(graph, [raw_options("r", "f", offset=MIB, size=512)])
    assert await read(upper, 0, 512) == content[MIB : MIB + 512]
    await reopen(graph, [raw_options("r", "f")])
    assert await read(upper, 0, SIZE) == content, "T-R6: left out is back to default"

    await refused(graph, "The sum of offset (0)", raw_options("r", "f", size=SIZE + 1))
    await refused(graph, "cannot be greater than size", raw_options("r", "f", offset=SIZE + 1))
    edge = writer(graph, upper)
    await refused(
        graph,
        "permissions 'resize' are both required by the new options of node 'r'",
        raw_options("r", "f", size=MIB),
    )
    graph.detach_root(edge)
    bitmap = DirtyBitmap("b", size=SIZE, granularity=65536, enabled=True)
    bitmap.set(0, SIZE)
    upper.bitmaps["b"] = bitmap
    bitmap.busy = True
    await refused(graph, "Bitmap 'b'", raw_options("r", "f", size=MIB))
    bitmap.busy = False
    await reopen(graph, [raw_options("r", "f", size=MIB)])
    assert (bitmap.size, bitmap.count()) == (MIB, MIB)
    await reopen(graph, [raw_options("r", "f")])
    assert (bitmap.size, bitmap.count()) == (SIZE, MIB), "what is new is clean"
    upper.bitmaps.clear()


async def test_a_resize_is_seen_by_all_above(graph: Graph, tmp_path: Path) -> None:
    """T-R15, by block_resize."""
    image = make_image(tmp_path / "a", b"x" * MIB)
    await add_from_options(graph, file_options("f", image))
    middle, top = await raw(graph, "m", "f"), await raw(graph, "t", "m")
    fixed = await raw(graph, "w", "f", offset=512, size=512)

    with pytest.raises(CommandError, match="unshared by node 'w'"):
        await graph.resize(middle, 2 * MIB)
    with pytest.raises(CommandError, match="Cannot resize fixed-size raw disks"):
        await graph.resize(fixed, 2 * MIB)
    await graph.remove(fixed)
    await graph.resize(middle, 2 * MIB + 1)
    assert (middle.size, top.size, image.stat().st_size) == (2 * MIB + 1,) * 3
    assert await read(top, MIB - 1, 3) == b"x\0\0"
    await graph.resize(graph.find("f"), 5)
    assert (middle.size, top.size, image.stat().st_size) == (5, 5, 5)
    assert await read(top, 0, 5) == b"xxxxx"
    edge = writer(graph, top)
    with pytest.raises(CommandError, match="unshared by owner 'writer'"):
        await graph.resize(top, 6)
    graph.detach_root(edge)
    await null(graph, "n")
    with pytest.raises(CommandError, match="does not support resize"):
        await graph.resize(graph.find("n"), 6)


# --- children by name (T-R7, T-R13, T-R14) -------------------------------------------------------


async def test_every_wiring_of_three_disks_gives_their_bytes(graph: Graph, tmp_path: Path) -> None:
    """T-R7 with windows in place of backing files."""
    for index in range(3):
        content = bytes([ord("a") + index]) * SIZE
        image = make_image(tmp_path / f"{index}", content)
        await add_from_options(graph, file_options(f"f{index}", image))
    top, middle = await raw(graph, "top", "f0"), await raw(graph, "middle", "f1")
    edge = writer(graph, top)

    for file in ("f1", "f2", "middle", "f0", "middle"):
        await reopen(graph, [raw_options("top", file)])
        wanted = {"middle": b"b", "f0": b"a", "f1": b"b", "f2": b"c"}[file]
        assert await read(top, MIB, 1) == wanted
    await refused(
        graph,
        "Making 'top' a file child of 'middle' would create a cycle",
        raw_options("middle", "top"),
    )
    await refused(
        graph, "Making 'top' a file child of 'top' would create a cycle", raw_options("top", "top")
    )
    # Neither order of the two single changes would do.
    await reopen(graph, [raw_options("middle", "top"), raw_options("top", "f2")])
    assert await read(middle, 0, 1) == b"c"
    await refused(
        graph,
        "would create a cycle",
        raw_options("top", "middle"),
        raw_options("middle", "top"),
    )
    await reopen(graph, [raw_options("top", "middle"), raw_options("middle", "f1")])
    assert await read(top, 0, 1) == b"b"
    graph.detach_root(edge)


async def test_all_or_nothing(graph: Graph, tmp_path: Path) -> None:
    """T-R14: the last of several fails."""
    image = make_image(tmp_path / "a", bytes(SIZE))
    await add_from_options(graph, file_options("f", image))
    await null(graph, "n")
    await raw(graph, "r", "f")
    last = await raw(graph, "last", "n")
    edge = writer(graph, last)
    await refused(
        graph,
        "Read-only block node 'last' cannot support read-write users",
        file_options("f", image, **{"read-only": True}),
        raw_options("r", "n", offset=4096),
        raw_options("last", "n", **{"read-only": True}),
    )
    graph.detach_root(edge)


async def test_of_two_options_for_a_node_the_later_count(graph: Graph) -> None:
    await null(graph, "n")
    node = await raw(graph, "r", "n")
    await reopen(graph, [raw_options("r", "n", size=1), raw_options("r", "n", size=2)])
    assert node.size == 2


async def test_an_inline_child_goes_when_it_is_replaced(graph: Graph) -> None:
    await null(graph, "n")
    await raw(graph, "r", {"driver": "raw", "node-name": "gone", "file": null_options("gone-too")})
    kept = await raw(graph, "kept", null_options("shared"))
    await raw(graph, "also", "shared")

    await reopen(graph, [raw_options("r", "n")])
    assert [node.name for node in graph] == ["n", "r", "shared", "kept", "also"]
    await graph.remove(kept)
    assert graph.get("shared") is not None, "another parent is left"


async def test_several_reopen_the_same_at_once(graph: Graph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", b"a" * SIZE)
    node = await add_from_options(graph, file_options("f", image))
    before = open_descriptors()
    async with asyncio.TaskGroup() as tasks:
        for index in range(20):
            direct = {"direct": index % 2 == 0}
            tasks.create_task(reopen(graph, [file_options("f", image, cache=direct)]))
    assert not node.driver.bypasses_cache()
    assert await read(node, 0, 1) == b"a"
    assert open_descriptors() == before + 1, "the descriptor with the locks"


async def test_frozen_and_implicit_children_stay(graph: Graph) -> None:
    """T-R11 without its jobs."""
    for name in ("n", "other"):
        await null(graph, name)
    filtering = await raw(graph, "filter", "n")
    node = await raw(graph, "r", "filter")
    assert node.file is not None

    node.file.frozen = ["job 'j' needs it"]
    await refused(graph, "Cannot change frozen 'file' link", raw_options("r", "other"))
    node.file.frozen = []
    filtering.is_implicit = True
    await reopen(graph, [raw_options("r", "n")])
    assert node.file.node is filtering, "the same, looked at through the filter"
    await refused(graph, "Cannot replace implicit file child of r", raw_options("r", "other"))
    filtering.is_implicit = False
    await reopen(graph, [raw_options("r", "other")])
    assert node.file.node.name == "other"


async def test_the_final_graph_must_bear_all_permissions(graph: Graph) -> None:
    for name in ("n", "other"):
        await null(graph, name)
    guarded = await add_from_options(
        graph,
        {
            "driver": "blkdebug",
            "node-name": "exclusive",
            "image": "n",
            "unshare-child-perms": ["write"],
        },
    )
    held = graph.attach_root("root", Owner("reader"), guarded, perm=1, shared=perms.ALL)
    node = await raw(graph, "r", "other")
    edge = writer(graph, node)
    await refused(
        graph,
        "permissions 'write' are both required by node 'r' (uses node 'n' as 'file' child) "
        "and unshared by node 'exclusive' (uses node 'n' as 'image' child).",
        raw_options("r", "n"),
    )
    for held_edge in (edge, held):
        graph.detach_root(held_edge)


async def test_a_point_in_time_keeps_what_it_stands_on(graph: Graph, tmp_path: Path) -> None:
    """The reference lets the temporary image's content be exchanged (fleecing.md 6.1, 11)."""
    for name in ("a", "b", "temp"):
        image = make_image(tmp_path / name, name[:1].encode() * SIZE)
        await add_from_options(graph, file_options(name, image))
    await raw(graph, "source", "a")
    await raw(graph, "filter", "a")
    await raw(graph, "target", "temp")
    cbw = {"driver": "copy-before-write", "node-name": "c", "file": "source", "target": "target"}
    await add_from_options(graph, cbw)
    await reopen(graph, [raw_options("source", "b")])
    await reopen(graph, [raw_options("source", "a")])
    access = await add_from_options(
        graph, {"driver": "snapshot-access", "node-name": "access", "file": "c"}
    )

    text = "it preserves a point in time"
    await refused(graph, text, raw_options("source", "b"))
    await refused(graph, text, raw_options("target", "b"))
    await reopen(graph, [raw_options("source", "filter")])  # T-R13: a filter in between is fine
    await refused(graph, text, raw_options("filter", "b"))
    assert await read(access, 0, 1) == b"a"


async def test_a_throttle_group_may_be_changed(graph: Graph) -> None:
    """T-R9."""
    for group in ("slow", "fast"):
        make_throttle_group(graph.throttle_groups, group, {})
    await null(graph, "n")
    await raw(graph, "r", "n")
    slow = {"driver": "throttle", "node-name": "t", "throttle-group": "slow", "file": "n"}
    node = await add_from_options(graph, slow)
    driver = node.driver
    assert isinstance(driver, ThrottleDriver)

    await reopen(graph, [{**slow, "throttle-group": "fast"}])
    assert driver.group.name == "fast"
    with pytest.raises(CommandError, match="in use"):
        graph.throttle_groups.remove("fast")
    wrong = raw_options("r", "n", offset=SIZE + 1)
    await refused(graph, "cannot be greater than size", slow, wrong)
    assert driver.group.name == "fast", "moved, and moved back"
    graph.throttle_groups.remove("slow")
    await refused(graph, "slow", slow)
    assert driver.group.name == "fast"


async def test_a_disk_that_does_not_flush_is_given_up_in_time(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call cannot be cancelled: nobody waits for it any longer, and it goes on."""
    path = make_image(tmp_path / "a.raw", bytes(SIZE))
    node = await add_from_options(graph, file_options("a", path))
    monkeypatch.setattr(drain, "QUIET_TIMEOUT_S", 0.2)
    released = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _fd: released.wait(20))
        async with asyncio.timeout(5):
            with pytest.raises(CommandError, match="flushing node 'a': no answer within"):
                await reopen(graph, [file_options("a", path, discard="unmap")])
        assert node.in_flight == 1
        released.set()
        await until(lambda: node.in_flight == 0)
    await reopen(graph, [file_options("a", path, discard="unmap")])
    assert node.discard_enabled
