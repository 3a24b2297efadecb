"""A reply that tells when it is sent, in place of a connection's (datapath.route.EarlyReply)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdfleece.datapath.route import EarlyReply


class Told:
    """Calls `tell` in the worker thread, instead of sending anything."""

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell

    def send_with(self, others: Sequence[EarlyReply]) -> list[EarlyReply]:
        """Tell; `others` go their own way."""
        self._tell()
        return list(others)
