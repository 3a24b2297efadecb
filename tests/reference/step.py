"""Plain twin of nbdfleece.datapath.step: every request coroutine is a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Step:
    """A running request: `on_done(result, error)` is called once, from the event loop."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T],
        on_done: Callable[[T | None, BaseException | None], None],
    ) -> None:
        self._coroutine = coroutine
        self._on_done = on_done

    def resume(self) -> None:
        """Begin; the end comes by itself."""
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[T]) -> None:
        error = task.exception()
        self._on_done(None if error else task.result(), error)


def background(coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """Start `coroutine` and return a future of its end."""
    return asyncio.get_running_loop().create_task(coroutine)
