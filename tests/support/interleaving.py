"""A second thread that acts between two given lines of the code under test, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, ModuleType


class Lines:
    """Counts the lines that are reached.

    Attributes:
        reached: How many.
    """

    def __init__(self) -> None:
        self.reached = 0


@contextmanager
def acting(
    modules: tuple[ModuleType, ...], actions: Mapping[int, Callable[[], None]]
) -> Iterator[Lines]:
    """Call each action just before the line of the modules that is reached as number so and so."""
    files = {module.__file__ for module in modules}
    lines = Lines()

    def line(_frame: FrameType, event: str, _argument: object):
        if event == "line":
            action = actions.get(lines.reached)
            lines.reached += 1
            if action is not None:
                action()
        return line

    def call(frame: FrameType, _event: str, _argument: object):
        return line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield lines
    finally:
        sys.settrace(before)
