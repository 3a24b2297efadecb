"""Where the daemon's log goes, and how a line of it looks."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

_JOURNAL_LEVELS: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
_NOTICE: Final = 5


def start(*, verbose: bool, quiet: bool) -> None:
    """Send the log to stderr: one line per event, with the time or, for the journal, the level."""
    handler = logging.StreamHandler(sys.stderr)
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


class _JournalFormatter(logging.Formatter):
    """Puts the level where the journal looks for it; the journal knows the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for `record`."""
        level = _JOURNAL_LEVELS.get(record.levelno, _NOTICE)
        return f"<{level}>{super().format(record)}"
