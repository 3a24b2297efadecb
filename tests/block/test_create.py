"""New images, as far as no daemon is needed; see also tests/control/test_overlays.py."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from nbdfleece.base.errors import CommandError
from nbdfleece.block import create as created
from nbdfleece.block.create import create
from nbdfleece.block.graph import Graph
from nbdfleece.block.registry import add_from_options
from tests.support.driver_kit import remove_all
from tests.support.waiting import until


async def test_files_that_take_their_time_hold_nobody_else_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead file system keeps its thread; state folder and policy are read in other ones."""
    count = 2 * (os.cpu_count() or 1) + 8  # more than the loop has threads
    may_go = threading.Event()
    begun: list[str] = []

    def slow(filename: str, size: int, mode: str) -> None:
        begun.append(filename)
        may_go.wait()

    monkeypatch.setattr(created, "_make_file", slow)
    graph = Graph()
    async with asyncio.TaskGroup() as tasks:
        try:
            for index in range(count):
                file = {"filename": str(tmp_path / str(index)), "size": 1}
                tasks.create_task(create(graph, "file", file))
            async with asyncio.timeout(10):
                await until(lambda: len(begun) == count)
                await asyncio.to_thread(tmp_path.stat)
        finally:
            may_go.set()


async def test_what_is_no_file_name_is_refused() -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises(CommandError, match="not a file name"):
            await create(Graph(), "file", {"filename": name, "size": 1})


async def test_who_stands_on_the_node_sees_its_new_size(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    graph = Graph()
    file = {"driver": "file", "node-name": "f", "filename": str(tmp_path / "f")}
    for options in (file, {"driver": "raw", "node-name": "r", "file": "f"}):
        await add_from_options(graph, options)

    await create(graph, "qcow2", {"file": "f", "size": 1 << 20})

    raw = graph.find("r")
    assert raw.size == (tmp_path / "f").stat().st_size
    image = await add_from_options(graph, {"driver": "qcow2", "node-name": "q", "file": "r"})
    assert image.size == 1 << 20
    await remove_all(graph)
