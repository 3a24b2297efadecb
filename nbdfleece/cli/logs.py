"""Where the daemon's log goes, and how a line of it looks."""

from __future__ import annotations

import logging
import os
import select
import sys
from typing import Final, TextIO

_JOURNAL_LEVELS: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
_NOTICE: Final = 5


def start(*, verbose: bool, quiet: bool) -> None:
    """Send the log to stderr: one line per event, with the time or, for the journal, the level."""
    handler = HandlerThatNeverWaits(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        line = "%(asctime)s %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(line, "%Y-%m-%dT%H:%M:%S"))
    level = logging.INFO
    if verbose or quiet:
        level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class HandlerThatNeverWaits(logging.StreamHandler[TextIO]):
    """Drops lines while nobody takes them, and says how many when somebody does again.

    The event loop writes the log: a pipe that is full would stop every guest, and clients make
    lines by coming and going.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._room = select.poll()
        self._room.register(stream.fileno(), select.POLLOUT)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or drop it."""
        if not self._room.poll(0):
            self._lost += 1
            return
        if self._lost:
            said = (
                record.name,
                logging.WARNING,
                "",
                0,
                "%d lines of the log were lost: nobody took them",
            )
            super().emit(logging.LogRecord(*said, (self._lost,), None))
            self._lost = 0
        super().emit(record)


class _JournalFormatter(logging.Formatter):
    """Puts the level where the journal looks for it; the journal knows the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for `record`."""
        level = _JOURNAL_LEVELS.get(record.levelno, _NOTICE)
        return f"<{level}>{super().format(record)}"
