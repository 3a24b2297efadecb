"""qcow2 nodes from options: which children they have."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block.child import Role
from nbdfleece.block.graph import Graph
from nbdfleece.block.registry import add_from_options
from nbdfleece.block.reopen import reopen
from nbdfleece.formats.qcow2.create import NewImage
from tests.support.driver_kit import read, remove_all
from tests.support.qcow2 import make_qcow2

MiB = 1 << 20
IMAGE = NewImage(size=MiB)


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await remove_all(graph)


def options(path: Path, **more: object) -> dict[str, object]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "q", "file": file, **more}


def chain(folder: Path, **how: str | None) -> Path:
    (folder / "base").write_bytes(b"base" * (MiB // 4))
    image = replace(IMAGE, **{"backing_file": "base", "backing_format": "raw", **how})
    return make_qcow2(folder / "top.qcow2", image)


async def test_the_backing_is_opened_as_the_header_says(graph: Graph, tmp_path: Path) -> None:
    node = await add_from_options(graph, options(chain(tmp_path)))
    assert node.backing is not None
    assert node.backing.node.driver.name == "raw"
    assert node.backing.node.read_only
    assert await read(node, 4, 4) == b"base"
    await graph.remove(node)
    assert list(graph) == []


async def test_no_backing_and_another_backing_are_as_said(graph: Graph, tmp_path: Path) -> None:
    path = chain(tmp_path)
    node = await add_from_options(graph, options(path, backing=None))
    assert node.backing is None
    assert await read(node, 4, 4) == bytes(4)
    await graph.remove(node)

    null = {"driver": "null-co", "size": 8, "read-zeroes": True}
    node = await add_from_options(graph, options(path, backing=null))
    assert node.backing is not None
    assert node.backing.node.driver.name == "null-co"


async def test_a_backing_without_a_format_is_demanded_not_guessed(
    graph: Graph, tmp_path: Path
) -> None:
    path = chain(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xe2\x79\x2a\xca")
    data[at : at + 4] = b"\x12\x34\x56\x78"  # no more the extension that says it
    path.write_bytes(data)
    with pytest.raises(CommandError, match="without its format"):
        await add_from_options(graph, options(path))
    assert list(graph) == []


async def test_a_backing_that_is_said_in_json_is_opened(graph: Graph, tmp_path: Path) -> None:
    name = "json:" + json.dumps({"driver": "null-co", "size": MiB, "read-zeroes": True})
    path = make_qcow2(
        tmp_path / "x.qcow2", replace(IMAGE, backing_file=name, backing_format="null-co")
    )
    node = await add_from_options(graph, options(path))
    assert node.backing is not None
    assert node.backing.node.driver.name == "null-co"


@pytest.mark.parametrize("name", ["gopher://x/y", "nbd:unix:/x", "json:[1]", "json:{", "missing"])
async def test_names_that_are_not_understood_are_refused(
    graph: Graph, tmp_path: Path, name: str
) -> None:
    path = make_qcow2(tmp_path / "x.qcow2", replace(IMAGE, backing_file=name, backing_format="raw"))
    with pytest.raises(CommandError):
        await add_from_options(graph, options(path))
    assert list(graph) == []


async def test_images_that_name_themselves_are_refused(graph: Graph, tmp_path: Path) -> None:
    path = make_qcow2(
        tmp_path / "x.qcow2", replace(IMAGE, backing_file="x.qcow2", backing_format="qcow2")
    )
    with pytest.raises(CommandError, match="images name each other"):
        await add_from_options(graph, options(path, **{"read-only": True}))
    assert list(graph) == []


@pytest.mark.parametrize("raw", [False, True])
async def test_the_data_file_is_opened_by_its_name(
    graph: Graph,
    tmp_path: Path,
    raw: bool,
) -> None:
    data = tmp_path / "x.data"
    data.write_bytes(bytes(MiB))
    image = replace(IMAGE, data_file="x.data", data_file_raw=raw, preallocate=raw)
    node = await add_from_options(graph, options(make_qcow2(tmp_path / "x.qcow2", image)))
    await node.write(70_000, memoryview(b"in the data file"), fua=True)
    assert data.read_bytes()[70_000:70_016] == b"in the data file"
    assert await read(node, 70_000, 16) == b"in the data file"
    await node.write_zeroes(0, MiB, fua=True, may_unmap=True, no_fallback=False)
    assert await read(node, 0, MiB) == bytes(MiB)
    if raw:
        assert data.read_bytes() == bytes(MiB)


async def test_reopen_without_the_data_file_leaves_the_roles_as_the_image_has_them(
    graph: Graph, tmp_path: Path
) -> None:
    (tmp_path / "x.data").write_bytes(bytes(MiB))
    path = make_qcow2(tmp_path / "x.qcow2", replace(IMAGE, data_file="x.data"))
    node = await add_from_options(graph, options(path))
    before = [(edge.name, edge.role) for edge in node.children]
    assert dict(before)["file"] is Role.METADATA | Role.PRIMARY

    await reopen(graph, [options(path, discard="unmap")])

    assert [(edge.name, edge.role) for edge in node.children] == before
    await node.write(70_000, memoryview(b"in the data file"), fua=True)
    assert (tmp_path / "x.data").read_bytes()[70_000:70_016] == b"in the data file"


async def test_a_data_file_must_fit_the_image(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "x.data").write_bytes(bytes(MiB))
    path = make_qcow2(tmp_path / "x.qcow2", IMAGE)
    data = {"driver": "file", "filename": str(tmp_path / "x.data")}
    with pytest.raises(CommandError, match="can only be set for images with an external"):
        await add_from_options(graph, options(path, **{"data-file": data}))
    assert list(graph) == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"l2-cache-entry-size": 1000}, "power of two"),
        ({"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1}, "same time"),
        ({"cache-size": 1, "l2-cache-size": 2}, "may not exceed"),
        ({"overlap-check": "some"}, "does not accept"),
        ({"encrypt": {"format": "luks"}}, "unexpected"),
    ],
)
async def test_bad_options_are_refused(
    graph: Graph, tmp_path: Path, more: dict[str, object], text: str
) -> None:
    with pytest.raises(CommandError, match=text):
        await add_from_options(graph, options(make_qcow2(tmp_path / "x.qcow2", IMAGE), **more))


async def test_files_that_are_no_image_are_refused(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in (b"", os.urandom(100_000), b"QFI\xfb"):
        path.write_bytes(content)
        with pytest.raises(CommandError, match="not in qcow2 format"):
            await add_from_options(graph, options(path))
    assert list(graph) == []


async def test_an_image_is_called_by_its_file_unless_its_backing_is_another(
    graph: Graph, tmp_path: Path
) -> None:
    path = chain(tmp_path)
    node = await add_from_options(graph, options(path))
    assert node.driver.image_name() == str(path)
    about = node.driver.image_info()
    assert about["backing-filename"] == "base"
    assert about["full-backing-filename"] == str(tmp_path / "base")
    assert about["backing-filename-format"] == "raw"
    assert about["cluster-size"] == 65536
    assert about["format-specific"] == {
        "type": "qcow2",
        "data": {
            "compat": "1.1",
            "compression-type": "zlib",
            "lazy-refcounts": False,
            "refcount-bits": 16,
            "corrupt": False,
            "extended-l2": False,
        },
    }
    await graph.remove(node)
    node = await add_from_options(graph, options(path, backing=None))
    assert node.driver.image_name().startswith("json:")
    await graph.remove(node)
    plain = make_qcow2(tmp_path / "plain.qcow2", replace(IMAGE, version=2))
    node = await add_from_options(graph, options(plain, backing=None))
    assert node.driver.image_name() == str(plain)
    assert node.driver.image_info()["format-specific"] == {
        "type": "qcow2",
        "data": {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16},
    }
