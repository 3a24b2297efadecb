"""What every test may use: real programs, deadlines, seeds, short temporary folders.

Real programs: mark a test with ``@pytest.mark.interop("qemu-img", "nbdinfo")``, or ask for the
fixture ``program`` and call ``program("qemu-img")``. Without the program the test is skipped; under
NBDFLEECE_REQUIRE_CLIENTS=1 (tests/check.py --require-clients, CI) it fails.

Deadlines: setup, call and teardown of a test may each take 60 s, or what
``@pytest.mark.deadline(seconds)`` says. Then the tasks of the running loop are printed and the
phase fails; a test that does not even react to that ends the run, with the stack of every thread.

Random histories: the fixtures ``seed`` and ``rng``; the seed stands in the report's header, and
``--seed N`` repeats it. ``long_run`` is true under NBDFLEECE_LONG=1 (tests/check.py --long).
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

import pytest

from tests.check import CLIENTS, find_program
from tests.support.pki import Pki

DEADLINE_S = 60.0
GRACE_S = 15.0  # from the polite end of a test that hangs to the end of the run

SEED: pytest.StashKey[int] = pytest.StashKey()
STDERR: pytest.StashKey[TextIO] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random histories")


def pytest_configure(config: pytest.Config) -> None:
    chosen: int | None = config.getoption("--seed")
    config.stash[SEED] = random.SystemRandom().randrange(2**32) if chosen is None else chosen
    # Tests run with their stderr captured; a stack printed while dying must reach the terminal.
    config.stash[STDERR] = os.fdopen(os.dup(sys.stderr.fileno()), "w")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[STDERR].close()


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[SEED]} (repeat with --seed {config.stash[SEED]})"


# ---------------------------------------------------------------------------- real programs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for the fixture ``program`` is an interop test, also for ``-m``."""
    for item in items:
        if "program" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.interop)


def require_program(name: str) -> str:
    """Return the path of a real program, or skip (fail, where programs are required)."""
    path = find_program(name)
    if path is not None:
        return path
    reason = f"{name} is not installed (apt-get install {CLIENTS.get(name, name)})"
    if os.environ.get("NBDFLEECE_REQUIRE_CLIENTS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def program() -> Callable[[str], str]:
    return require_program


# -------------------------------------------------------------------------------- deadlines


@contextlib.contextmanager
def deadline(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("deadline")
    seconds = float(marker.args[0]) if marker else DEADLINE_S

    def expire(_signum: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # no loop is running
            for task in asyncio.all_tasks(asyncio.get_running_loop()):
                task.print_stack(file=sys.stderr)
        pytest.fail(f"deadline of {seconds:g} s passed")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=item.config.stash[STDERR])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    for marker in item.iter_markers("interop"):
        for name in marker.args:
            require_program(name)
    with deadline(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with deadline(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with deadline(item):
        return (yield)


# ------------------------------------------------------------------ random histories, folders


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    value = pytestconfig.stash[SEED]
    print(f"seed: {value} (repeat with --seed {value})")  # shown when the test fails
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def long_run() -> bool:
    return os.environ.get("NBDFLEECE_LONG") == "1"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder whose path is short enough for a unix socket (108 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="nbdf-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Certificates for the whole session; for reading only (tests/support/pki.py)."""
    return Pki(tmp_path_factory.mktemp("pki"))
