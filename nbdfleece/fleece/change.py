"""Changes that wait for requests to end, as disks and snapshots need them: short, or refused."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import QUIET_MOMENTS_S, QUIET_TIMEOUT_S
from nbdfleece.block.drain import drained

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdfleece.block.node import Node
    from nbdfleece.server.export import Export
    from nbdfleece.server.exports import Exports, RemoveMode


async def remove_export(exports: Exports, export: Export, mode: RemoveMode) -> None:
    """Offer an export no more.

    Raises:
        InUse: With SAFE: it has clients. Nothing has changed.
        CommandError: With HARD: requests that had begun do not end. Nobody can connect any more.

    Cancel: safe; it may be removed again.
    """
    try:
        async with asyncio.timeout(QUIET_TIMEOUT_S):
            await exports.remove(export.options.id, mode)
    except TimeoutError as error:
        raise CommandError(
            f"export '{export.options.name}': requests did not end "
            f"within {QUIET_TIMEOUT_S:g} seconds"
        ) from error


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
    for moment in QUIET_MOMENTS_S:
        try:
            async with asyncio.timeout(moment) as limit, drained(*nodes):
                limit.reschedule(None)  # the body is not to be cut short
                yield
                return
        except TimeoutError:
            await asyncio.sleep(moment)
    names = ", ".join(f"'{node.name}'" for node in nodes)
    total = 2 * sum(QUIET_MOMENTS_S)
    raise CommandError(f"node {names}: requests did not end within {total:g} seconds")


@asynccontextmanager
async def in_time(what: str) -> AsyncIterator[None]:
    """Run the body for at most QUIET_TIMEOUT_S; for work on files that may hang.

    Raises:
        CommandError: It took longer; `what` says what did. It has been cancelled.
    """
    try:
        async with asyncio.timeout(QUIET_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise CommandError(f"{what}: no answer within {QUIET_TIMEOUT_S:g} seconds") from error
