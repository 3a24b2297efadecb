"""Removing an export within a time limit, as disks and snapshots need it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError
from nbdfleece.base.limits import QUIET_TIMEOUT_S

if TYPE_CHECKING:
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
