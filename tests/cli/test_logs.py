"""The log of the daemon, and whoever does not read it."""

from __future__ import annotations

import logging
import os

from nbdfleece.cli.logs import HandlerThatNeverWaits


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(writing, "w") as stream, open(reading, "rb") as log:
        handler = HandlerThatNeverWaits(stream)

        def say(text: str) -> None:
            handler.emit(logging.LogRecord("x", logging.INFO, "", 0, text, (), None))

        for number in range(2000):
            say(f"{number} " + "x" * 100)
        told = log.read().splitlines()
        assert len(told) < 1000
        assert [int(line.split()[0]) for line in told] == list(range(len(told)))
        say("again")
        lost = 2000 - len(told)
        assert (
            log.read() == f"{lost} lines of the log were lost: nobody took them\nagain\n".encode()
        )
