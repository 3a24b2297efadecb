"""How far something has come: a line that is drawn again on a terminal, plain lines or JSON else.

All of it goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Final

from nbdfleece.base.units import format_size

_TERMINAL_S: Final = 0.2  # between two drawings
_LINES_S: Final = 10.0
_JSON_S: Final = 1.0
_SHORT_S: Final = 90.0  # shorter times are said in seconds


class Progress:
    """The progress of one thing.

    Args:
        what: What it is, in a word or two.
        as_json: Write a line of JSON each second.
        quiet: Write nothing.
    """

    def __init__(self, what: str, *, as_json: bool, quiet: bool) -> None:
        self._what = what
        self._json = as_json
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not as_json
        self._started = time.monotonic()
        self._shown = self._started
        self._is_drawn = False

    def __call__(self, done: int, total: int) -> None:
        """Tell that `done` of `total` bytes are done; may be called often."""
        now = time.monotonic()
        pause = _JSON_S if self._json else _TERMINAL_S if self._terminal else _LINES_S
        if self._quiet or now - self._shown < pause:
            return
        self._shown = now
        rate = int(done / (now - self._started))
        left = (total - done) / rate if rate and total >= done else None
        if self._json:
            self._write(
                {
                    "type": "progress",
                    "done": done,
                    "total": total,
                    "rate": rate,
                    "seconds-left": None if left is None else int(left),
                }
            )
            return
        text = f"{self._what}: {format_size(done)} of {format_size(total)}"
        text += f", {format_size(rate)}/s"
        if left is not None:
            text += f", {duration(left)} left"
        if self._terminal:
            sys.stderr.write(f"\r\033[K{text}")
            self._is_drawn = True
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Take the drawn line away."""
        if self._is_drawn:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._is_drawn = False

    @staticmethod
    def _write(value: object) -> None:
        sys.stderr.write(json.dumps(value) + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Return a time for people: `45s`, `12m`, `3h05m`."""
    if seconds < _SHORT_S:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
