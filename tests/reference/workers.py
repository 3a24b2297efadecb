"""Plain twin of nbdfleece.datapath.workers: a thread pool of the standard library per lane."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nbdfleece.datapath.route import EarlyReply

T = TypeVar("T")


class Lane:
    """A queue of calls with up to `threads` worker threads."""

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def submit(self, call: Callable[[], T], reply: EarlyReply | None = None) -> asyncio.Future[T]:
        """Run `call` in a worker thread, and send `reply` from there; await what this returns."""

        def run() -> T:
            result = call()
            if reply is not None:
                reply.way.send_early([reply])
            return result

        return asyncio.get_running_loop().run_in_executor(self._pool, run)

    def close(self) -> None:
        """Let the threads go when they have run what is queued."""
        self._pool.shutdown(wait=False)
