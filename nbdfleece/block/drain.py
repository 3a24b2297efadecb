"""Drained sections: nothing new begins, and what had begun has ended.

A section is opened on the nodes whose surroundings are about to change. Every parent above them,
up to the exports, stops beginning requests; then all that was in flight runs to its end. Sections
nest. A connection survives a drain: an export merely stops reading its socket.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdfleece.block.node import Node


@asynccontextmanager
async def drained(*nodes: Node) -> AsyncIterator[None]:
    """Hold a drained section over `nodes` and everything above them.

    Inside, and until the first await of the body that starts requests itself, the nodes and their
    parents are idle.

    Cancel: safe; the section is closed.
    """
    begun: list[Node] = []
    try:
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
