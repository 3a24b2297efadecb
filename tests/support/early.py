"""A reply that tells when it is sent, in place of a connection's (datapath.route.EarlyReply)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdfleece.datapath.route import EarlyReply, EarlySender


class Told:
    """Calls `tell` in the worker thread, instead of sending anything."""

    data = b""
    sent = False

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        self.way: EarlySender = self

    def send_early(self, replies: Sequence[EarlyReply]) -> None:
        """Tell."""
        self._tell()
