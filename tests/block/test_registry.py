"""Node options: what is taken, what is refused and in which words, and what becomes of nodes."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.bitmap import DirtyBitmap
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.fault import BlkdebugDriver, IoType
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.nbd.driver import NbdDriver
from nbdfleece.block.drivers.nbd.target import ClientTls, InetServer, Target, UnixServer
from nbdfleece.block.graph import Graph
from nbdfleece.block.registry import NodeSpec, add_from_options, drivers, parse_node_options
from tests.support.driver_kit import fails, make_image, open_descriptors, read, remove_all

NULL = {"driver": "null-co"}


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


def inline(spec: NodeSpec, name: str) -> NodeSpec:
    child = spec.children[name]
    assert isinstance(child, NodeSpec)
    return child


# --- parsing ---------------------------------------------------------------------------------


def test_every_driver_has_a_name() -> None:
    assert drivers() == [
        "blkdebug",
        "copy-before-write",
        "file",
        "host_device",
        "nbd",
        "null-co",
        "qcow2",
        "raw",
        "snapshot-access",
        "throttle",
    ]


def test_defaults_are_those_of_qemu() -> None:
    spec = parse_node_options({"driver": "null-co"})

    assert (spec.node_name, spec.driver, spec.read_only, spec.discard) == (
        None,
        "null-co",
        False,
        False,
    )
    assert dict(spec.driver_options) == {"size": 1 << 30, "latency-ns": 0, "read-zeroes": False}
    assert spec.children == {}


def test_options_are_taken() -> None:
    spec = parse_node_options(
        {
            "driver": "file",
            "node-name": "disk",
            "filename": "a.raw",
            "locking": "off",
            "aio": "threads",
            "read-only": True,
            "auto-read-only": True,
            "force-share": False,
            "detect-zeroes": "unmap",
            "discard": "unmap",
            "cache": {"direct": True, "no-flush": True},
        }
    )

    assert (spec.node_name, spec.read_only, spec.discard) == ("disk", True, True)
    assert (spec.detect_zeroes, spec.no_flush) == ("unmap", True)
    assert spec.driver_options["filename"] == "a.raw"
    assert spec.driver_options["locking"] == "off"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": 3}, "Invalid parameter type for 'driver', expected: string"),
        ({"driver": None}, "Invalid parameter type for 'driver', expected: string"),
        ({"driver": "nosuch"}, "Parameter 'driver' does not accept value 'nosuch'"),
        ({"driver": "file"}, "Parameter 'filename' is missing"),
        (
            {"driver": "file", "filename": 3},
            "Invalid parameter type for 'filename', expected: string",
        ),
        ({"driver": "null-co", "foo": 1}, "Parameter 'foo' is unexpected"),
        (
            {"driver": "raw", "file": {"driver": "file", "filename": "x", "foo": 1}},
            "Parameter 'file.foo' is unexpected",
        ),
        ({"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
        ({"driver": "raw", "file": {}}, "Parameter 'file.driver' is missing"),
        ({"driver": "raw"}, "Parameter 'file' is missing"),
        ({"driver": "raw", "file.driver": "null-co"}, "Parameter 'file' is missing"),
        (
            {"driver": "raw", "file": 3},
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            {"driver": "raw", "size": "1M", "file": NULL},
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            {"driver": "raw", "size": True, "file": NULL},
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            {"driver": "raw", "size": -1, "file": NULL},
            "Parameter 'size' expects a non-negative number below 2^64",
        ),
        (
            {"driver": "null-co", "size": 1 << 64},
            "Parameter 'size' expects a non-negative number below 2^64",
        ),
        (
            {"driver": "null-co", "read-only": "x"},
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            {"driver": "null-co", "discard": "zap"},
            "Parameter 'discard' does not accept value 'zap'",
        ),
        (
            {"driver": "null-co", "cache": {"dirct": True}},
            "Parameter 'cache.dirct' is unexpected",
        ),
        ({"driver": "null-co", "cache": 1}, "Invalid parameter type for 'cache', expected: object"),
        (
            {"driver": "null-co", "cache": {"no-flush": 1}},
            "Invalid parameter type for 'cache.no-flush', expected: boolean",
        ),
        (
            {"driver": "null-co", "detect-zeroes": "unmap"},
            "setting detect-zeroes to unmap is not allowed without setting discard operation to "
            "unmap",
        ),
        (
            {"driver": "null-co", "force-share": True},
            "force-share=on can only be used with read-only images",
        ),
        (
            {"driver": "null-co", "force-share": True, "read-only": True},
            "Parameter 'force-share' has no other value here yet",
        ),
        (
            {"driver": "file", "filename": "x", "locking": "maybe"},
            "Parameter 'locking' does not accept value 'maybe'",
        ),
        (
            {"driver": "file", "filename": "x", "aio": "io_uring"},
            "Parameter 'aio' has no other value here yet",
        ),
        (
            {"driver": "blkdebug", "image": NULL, "inject-error": [{"event": "zz"}]},
            "Parameter 'inject-error[0].event' does not accept value 'zz'",
        ),
        (
            {"driver": "blkdebug", "image": NULL, "inject-error": [{}]},
            "Parameter 'inject-error[0].event' is missing",
        ),
        (
            {"driver": "blkdebug", "image": NULL, "inject-error": {}},
            "Invalid parameter type for 'inject-error', expected: array",
        ),
        (
            {"driver": "blkdebug", "image": NULL, "inject-error": [1]},
            "Invalid parameter type for 'inject-error[0]', expected: object",
        ),
        (
            {"driver": "blkdebug", "image": NULL, "set-state": [{"event": "none"}]},
            "Parameter 'set-state[0].new_state' is missing",
        ),
        (
            {"driver": "blkdebug", "image": NULL, "take-child-perms": ["write", "fly"]},
            "Parameter 'take-child-perms[1]' does not accept value 'fly'",
        ),
        (
            {"driver": "copy-before-write", "file": NULL, "target": NULL, "cbw-timeout": 1 << 32},
            "Parameter 'cbw-timeout' expects a non-negative number below 2^32",
        ),
        (
            {"driver": "copy-before-write", "file": NULL, "target": NULL, "on-cbw-error": "x"},
            "Parameter 'on-cbw-error' does not accept value 'x'",
        ),
        (
            {
                "driver": "copy-before-write",
                "file": NULL,
                "target": NULL,
                "bitmap": {"node": "n"},
            },
            "Parameter 'bitmap.name' is missing",
        ),
        ({"driver": "copy-before-write", "file": NULL}, "Parameter 'target' is missing"),
        ({"driver": "snapshot-access"}, "Parameter 'file' is missing"),
    ],
)
def test_bad_options_are_refused_with_their_path(options: dict[str, object], error: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_node_options(options)
    assert str(caught.value) == error


def test_options_given_are_not_changed() -> None:
    options = {"driver": "raw", "file": {"driver": "null-co", "size": 5}}
    parse_node_options(options)
    assert options == {"driver": "raw", "file": {"driver": "null-co", "size": 5}}


def test_inline_children_take_read_only_and_cache_and_pass_discards() -> None:
    file = {"driver": "file", "filename": "x"}
    spec = parse_node_options(
        {
            "driver": "raw",
            "read-only": True,
            "cache": {"direct": True},
            "file": {"driver": "raw", "file": file},
        }
    )
    innermost = inline(inline(spec, "file"), "file")

    assert not spec.discard
    assert (innermost.read_only, innermost.discard) == (True, True)
    driver = innermost.build(Graph())
    assert driver._cache_direct  # type: ignore[attr-defined]

    told = parse_node_options(
        {
            "driver": "raw",
            "read-only": True,
            "file": {**file, "read-only": False, "discard": "ignore", "cache": {"direct": False}},
        }
    )
    assert (inline(told, "file").read_only, inline(told, "file").discard) == (False, False)


@pytest.mark.parametrize(
    ("window", "role"),
    [
        ({}, Role.FILTERED | Role.PRIMARY),
        ({"offset": 0}, Role.DATA | Role.PRIMARY),
        ({"size": 5}, Role.DATA | Role.PRIMARY),
    ],
)
def test_raw_is_like_a_filter_without_a_window(window: dict[str, object], role: Role) -> None:
    spec = parse_node_options({"driver": "raw", "file": NULL, **window})
    assert spec.roles == {"file": role}


def test_roles_of_the_other_drivers() -> None:
    cbw = parse_node_options({"driver": "copy-before-write", "file": "a", "target": "b"})
    assert cbw.children == {"file": "a", "target": "b"}
    assert cbw.roles == {"file": Role.FILTERED | Role.PRIMARY, "target": Role.DATA}
    access = parse_node_options({"driver": "snapshot-access", "file": "c"})
    assert access.roles == {"file": Role.DATA | Role.PRIMARY}


# --- adding ----------------------------------------------------------------------------------


async def test_a_tree_is_made_children_first(graph: Graph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", 10_000)
    root = await add_from_options(
        graph,
        {
            "driver": "raw",
            "node-name": "window",
            "offset": 1000,
            "file": {
                "driver": "blkdebug",
                "image": {"driver": "file", "node-name": "disk", "filename": str(path)},
            },
        },
    )

    assert [node.name for node in graph] == ["disk", "#block001", "window"]
    assert root.size == 9000
    assert root.owned_by_monitor
    assert not graph.find("disk").owned_by_monitor
    await root.write(0, memoryview(b"here"), fua=False)
    assert await read(graph.find("disk"), 1000, 4) == b"here"


async def test_children_may_be_named(graph: Graph) -> None:
    await add_from_options(graph, {"driver": "null-co", "node-name": "disk", "size": 512})
    await add_from_options(graph, {"driver": "null-co", "node-name": "temp", "size": 512})
    cbw = await add_from_options(
        graph,
        {
            "driver": "copy-before-write",
            "node-name": "cbw",
            "file": "disk",
            "target": "temp",
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": 45,
            "min-cluster-size": 8192,
        },
    )
    access = await add_from_options(
        graph, {"driver": "snapshot-access", "node-name": "access", "file": "cbw"}
    )

    assert isinstance(cbw.driver, CopyBeforeWrite)
    assert cbw.driver.on_cbw_error is OnCbwError.BREAK_SNAPSHOT
    assert cbw.driver.cbw_timeout_s == 45.0
    assert await read(access, 0, 512) == bytes(512)


async def test_the_root_needs_a_name(graph: Graph) -> None:
    with pytest.raises(CommandError, match="'node-name' must be specified for the root node"):
        await add_from_options(graph, {"driver": "null-co"})
    assert list(graph) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"driver": "raw", "offset": 1 << 40, "file": {"driver": "file", "filename": "IMAGE"}},
            "cannot be greater than size",
        ),
        (
            {"driver": "raw", "file": "nobody"},
            "Cannot find device='nobody' nor node-name='nobody'",
        ),
        (
            {
                "driver": "copy-before-write",
                "file": {"driver": "file", "filename": "IMAGE"},
                "target": {"driver": "null-co", "size": 100},
            },
            "is smaller than",
        ),
        (
            {
                "driver": "copy-before-write",
                "file": {"driver": "file", "filename": "IMAGE", "node-name": "f"},
                "target": {"driver": "null-co"},
                "bitmap": {"node": "f", "name": "b"},
            },
            "Dirty bitmap 'b' not found",
        ),
        (
            {
                "driver": "copy-before-write",
                "file": {"driver": "file", "filename": "IMAGE"},
                "target": {"driver": "file", "filename": "/none/such"},
            },
            "Could not open '/none/such': No such file or directory",
        ),
        (
            {"driver": "snapshot-access", "file": {"driver": "file", "filename": "IMAGE"}},
            "does not preserve a point in time",
        ),
    ],
    ids=["window", "reference", "small target", "bitmap", "second child", "no point in time"],
)
async def test_a_failure_removes_the_children_that_were_made(
    options: dict[str, object], error: str, graph: Graph, tmp_path: Path
) -> None:
    path = make_image(tmp_path / "image", 10_000)
    for child in options.values():
        if isinstance(child, dict) and child.get("filename") == "IMAGE":
            child["filename"] = str(path)
    await add_from_options(graph, {"driver": "null-co", "node-name": "bystander"})
    await graph.remove(
        await add_from_options(graph, {"driver": "file", "node-name": "x", "filename": str(path)})
    )
    before = open_descriptors()

    with pytest.raises(CommandError, match=error):
        await add_from_options(graph, {"node-name": "root", **options})

    assert [node.name for node in graph] == ["bystander"]
    assert open_descriptors() == before


async def test_a_bitmap_is_looked_up_when_the_filter_is_made(graph: Graph) -> None:
    disk = await add_from_options(
        graph, {"driver": "null-co", "node-name": "disk", "size": 1 << 20}
    )
    bitmap = DirtyBitmap("b", size=1 << 20, granularity=65536, enabled=True)
    bitmap.set(0, 1)
    disk.bitmaps["b"] = bitmap
    cbw = await add_from_options(
        graph,
        {
            "driver": "copy-before-write",
            "node-name": "cbw",
            "file": "disk",
            "target": {"driver": "null-co", "size": 1 << 20},
            "bitmap": {"node": "disk", "name": "b"},
        },
    )
    view = memoryview(bytearray(512))

    assert await fails(cbw.snapshot_read(0, view)) == 0
    assert await fails(cbw.snapshot_read(65536, view)) == errno.EACCES


async def test_faults_come_from_options(graph: Graph) -> None:
    node = await add_from_options(
        graph,
        {
            "driver": "blkdebug",
            "node-name": "debug",
            "image": {"driver": "null-co", "size": 1 << 20},
            "inject-error": [
                {"event": "read_aio", "sector": 4, "errno": errno.ENOSPC, "immediately": True},
                {"event": "none", "iotype": "flush", "once": True, "state": 2},
            ],
            "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
            "take-child-perms": ["resize"],
            "unshare-child-perms": ["write", "resize"],
        },
    )
    assert isinstance(node.driver, BlkdebugDriver)
    view = memoryview(bytearray(512))

    assert await fails(node.read(3 * 512, view)) == 0
    assert await fails(node.read(4 * 512, view)) == errno.ENOSPC
    assert await fails(node.flush()) == 0
    assert await fails(node.write(0, view, fua=False)) == 0
    assert await fails(node.flush()) == errno.EIO
    assert await fails(node.flush()) == 0
    assert node.driver.seen[IoType.FLUSH] == 3


async def test_locking_reaches_the_driver(graph: Graph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", 512)
    for name, locking in (("off", Locking.OFF), ("on", Locking.ON), ("auto", Locking.AUTO)):
        node = await add_from_options(
            graph,
            {"driver": "file", "node-name": name, "filename": str(path), "locking": locking.value},
        )
        assert (node.driver._locks is None) == (locking is Locking.OFF)  # type: ignore[attr-defined]


async def test_a_device_is_not_opened_as_a_file_nor_a_file_as_a_device(
    graph: Graph, tmp_path: Path
) -> None:
    path = make_image(tmp_path / "image", 512)
    for driver, filename in (("host_device", str(path)), ("file", os.devnull)):
        with pytest.raises(CommandError, match=f"'{driver}' driver requires"):
            await add_from_options(
                graph, {"driver": driver, "node-name": "x", "filename": filename}
            )


# --- nbd -------------------------------------------------------------------------------------

UNIX = {"type": "unix", "path": "/s"}
INET = {"type": "inet", "host": "h", "port": "10809"}


def nbd_target(**options: object) -> Target:
    driver = parse_node_options({"driver": "nbd", **options}).build(Graph())
    assert isinstance(driver, NbdDriver)
    return driver.target


def test_nbd_options_are_taken() -> None:
    assert nbd_target(server=UNIX) == Target(UnixServer("/s"), "")
    assert nbd_target(server=INET, export="x") == Target(InetServer("h", 10809), "x")
    assert nbd_target(server={**INET, "port": 5}).server == InetServer("h", 5)
    assert nbd_target(server=INET, **{"tls-creds": "/c"}).tls == ClientTls("/c", "h")
    over_unix = nbd_target(server=UNIX, **{"tls-creds": "/c", "tls-hostname": "n"})
    assert over_unix.tls == ClientTls("/c", "n")
    assert nbd_target(server=UNIX, **{"x-dirty-bitmap": "qemu:dirty-bitmap:b"}).dirty_bitmap


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "'server' is missing"),
        ({"server": 1}, "'server', expected: object"),
        ({"server": {}}, r"'server\.type' is missing"),
        ({"server": {"type": "vsock"}}, r"'server\.type' does not accept"),
        ({"server": {"type": "unix"}}, r"'server\.path' is missing"),
        ({"server": {**UNIX, "host": "h"}}, r"'server\.host' is unexpected"),
        ({"server": {"type": "inet", "host": "h"}}, r"'server\.port' is missing"),
        ({"server": {**INET, "port": "nbd"}}, r"'server\.port' does not accept"),
        ({"server": {**INET, "port": "65536"}}, "no host and port"),
        ({"server": {**INET, "port": "9" * 5000}}, "no host and port"),
        ({"server": {"type": "unix", "path": "s" * 108}}, "path of a unix socket"),
        ({"server": UNIX, "export": "x" * 4097}, "export name"),
        ({"server": UNIX, "tls-creds": "/c"}, "needs tls-hostname"),
        ({"server": UNIX, "tls-hostname": "n"}, "without TLS"),
        ({"server": UNIX, "reconnect-delay": -1}, "'reconnect-delay'"),
        ({"server": UNIX, "open-timeout": "1"}, "'open-timeout', expected: integer"),
        ({"server": UNIX, "file": "x"}, "'file' is unexpected"),
    ],
)
def test_nbd_options_that_are_wrong(options: dict[str, object], text: str) -> None:
    with pytest.raises(CommandError, match=text):
        parse_node_options({"driver": "nbd", **options})


async def test_nbd_node_that_cannot_be_opened_leaves_nothing(graph: Graph, tmp_path: Path) -> None:
    server = {"type": "unix", "path": str(tmp_path / "none")}
    with pytest.raises(CommandError, match="No such file"):
        await add_from_options(graph, {"driver": "nbd", "node-name": "n", "server": server})
    assert not list(graph)
