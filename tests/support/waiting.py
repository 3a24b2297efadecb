"""Waiting for what has no event of its own; bounded by the deadline of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until the condition holds."""
    while not condition():  # noqa: ASYNC110 - that is the point
        await asyncio.sleep(0)


async def turns(count: int) -> None:
    """Let the loop turn so many times: enough for what should not happen to happen."""
    for _ in range(count):
        await asyncio.sleep(0)
