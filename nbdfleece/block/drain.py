"""Drained sections: nothing new begins, and what had begun has ended.

A section is opened on the nodes whose surroundings are about to change. Every parent above them,
up to the exports, stops beginning requests; then all that was in flight runs to its end. Sections
nest. A connection survives a drain: an export merely stops reading its socket.

What is in flight above the nodes may be on its way through any node below its own, so all of those
are told to hold nothing back (`Driver.drain_begun`): a throttled request is let through.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nbdfleece.block.node import Node
from nbdfleece.block.permissions import topological

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable


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
