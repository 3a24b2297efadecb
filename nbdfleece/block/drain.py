"""Drained sections: nothing new begins, and what had begun has ended.

A section is opened on the nodes whose surroundings are about to change. Every parent above them,
up to the exports, stops beginning requests; then all that was in flight runs to its end. Sections
nest. A connection survives a drain: an export merely stops reading its socket.

What is in flight above the nodes may be on its way through any node below its own, so all of those
are told to hold nothing back (`Driver.drain_begun`): a throttled request is let through.

Requests may be stuck: what a user waits for uses `quiet`, which gives up.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import QUIET_MOMENTS_S, QUIET_TIMEOUT_S
from nbdfleece.block.node import Node
from nbdfleece.block.permissions import topological
from nbdfleece.datapath.step import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable

T = TypeVar("T")


@asynccontextmanager
async def drained(*nodes: Node) -> AsyncIterator[None]:
    """Hold a drained section over `nodes` and everything above them.

    Inside, and until the first await of the body that starts requests itself, the nodes and their
    parents are idle.

    Cancel: safe; the section is closed.
    """
    begun: list[Node] = []
    through = [node.driver for node in topological(_above(nodes))]
    try:
        for driver in through:
            driver.drain_begun()
        for node in nodes:
            node.drained_begin()
            begun.append(node)
        while not all(node.is_idle() for node in nodes):
            for node in nodes:
                await node.wait_idle()
        yield
    finally:
        for node in reversed(begun):
            node.drained_end()
        for driver in through:
            driver.drain_ended()


@asynccontextmanager
async def quiet(*nodes: Node) -> AsyncIterator[None]:
    """Hold a drained section, unless it takes too long to get into it.

    While it waits for requests to end, nothing new begins: so it waits for moments only, each
    longer than the one before, and lets the guests go on in between. A stuck request stops nobody
    else for longer than a moment.

    Raises:
        CommandError: The requests on the nodes do not end; everything goes on as before.

    Cancel: safe; the section is closed.
    """
    async with AsyncExitStack() as section:
        if not await _enter(section, nodes):
            names = ", ".join(f"'{node.name}'" for node in nodes)
            total = 2 * sum(QUIET_MOMENTS_S)
            raise CommandError(f"node {names}: requests did not end within {total:g} seconds")
        yield


async def _enter(section: AsyncExitStack, nodes: Iterable[Node]) -> bool:
    for moment in QUIET_MOMENTS_S:
        try:
            async with asyncio.timeout(moment):
                await section.enter_async_context(drained(*nodes))
        except TimeoutError:
            await asyncio.sleep(moment)
        else:
            return True
    return False


@asynccontextmanager
async def in_time(what: str) -> AsyncIterator[None]:
    """Run the body for at most QUIET_TIMEOUT_S; for work on files that may hang.

    Raises:
        CommandError: It took longer; `what` says what did. It has been cancelled, which does
            nothing to a system call that it waits for: see `flush_in_time`.
    """
    try:
        async with asyncio.timeout(QUIET_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise CommandError(f"{what}: no answer within {QUIET_TIMEOUT_S:g} seconds") from error


def started(request: Coroutine[object, None, T]) -> asyncio.Future[T]:
    """Begin a request of a node for a task that may be cancelled; requests never are.

    Whoever cancels the future abandons the result, and the request runs to its end.
    """
    return background(request)


async def flush_in_time(node: Node) -> None:
    """Flush a node; who waits gives up after QUIET_TIMEOUT_S, and the flush goes on.

    Raises:
        IoError: It failed.
        CommandError: It took longer.

    Cancel: safe; the flush goes on.
    """
    async with in_time(f"flushing node '{node.name}'"):
        await started(node.flush())


def _above(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes and all that lead to them."""
    found = dict.fromkeys(nodes)
    waiting = list(found)
    while waiting:
        for edge in waiting.pop().parents:
            if isinstance(edge.parent, Node) and edge.parent not in found:
                found[edge.parent] = None
                waiting.append(edge.parent)
    return list(found)
