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
