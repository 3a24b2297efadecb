"""Hooks: what was frozen is thawed, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdfleece.backup.hooks import HookFailed, Hooks, TooLate
from tests.support.daemon_process import environment


class Log:
    """A file that hooks write lines to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def hook(self, word: str, then: str = "true") -> str:
        return f"echo {word} >> {self.path}; {then}"

    @property
    def words(self) -> list[str]:
        return self.path.read_text().split() if self.path.exists() else []

    def wait(self, *words: str) -> None:
        """Return when these and no other words are there."""
        end = time.monotonic() + 20
        while self.words != list(words):
            assert time.monotonic() < end, self.words
            time.sleep(0.01)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


def test_the_instant_lies_between_the_hooks(log: Log) -> None:
    with Hooks(log.hook("freeze"), log.hook("thaw"), 10, ["vda", "vdb"]) as hooks:
        assert log.words == ["freeze"]
        hooks.thaw()
        assert log.words == ["freeze", "thaw"]

    assert log.words == ["freeze", "thaw"]


def test_hooks_know_what_they_are_for(log: Log) -> None:
    word = "$NBDFLEECE_HOOK:$NBDFLEECE_DISKS"
    with Hooks(log.hook(word), log.hook(word), 10, ["vda", "vdb"]) as hooks:
        hooks.thaw()

    assert log.words == ["pre:vda", "vdb", "post:vda", "vdb"]


def test_what_fails_half_way_is_thawed(log: Log) -> None:
    with (
        pytest.raises(HookFailed, match="exit code 3"),
        Hooks(log.hook("freeze", "exit 3"), log.hook("thaw"), 10, []),
    ):
        log.hook("not reached")

    assert log.words == ["freeze", "thaw"]


def test_a_hook_is_killed_at_its_deadline_with_its_children(log: Log) -> None:
    slow = log.hook("freeze", f"(sleep 2; echo late >> {log.path}) & sleep 60")
    begin = time.monotonic()
    with (
        pytest.raises(HookFailed, match=r"had not ended after 0.5 seconds"),
        Hooks(slow, log.hook("thaw"), 0.5, []),
    ):
        pass

    assert time.monotonic() - begin < 20
    time.sleep(2.5)  # until the child would have written
    assert log.words == ["freeze", "thaw"]


def test_an_error_in_between_thaws(log: Log) -> None:
    with pytest.raises(ZeroDivisionError), Hooks(log.hook("freeze"), log.hook("thaw"), 10, []):
        print(1 // 0)

    assert log.words == ["freeze", "thaw"]


def test_a_failed_thaw_is_told(log: Log) -> None:
    with (
        Hooks("", log.hook("thaw", "kill -9 $$"), 10, []) as hooks,
        pytest.raises(HookFailed, match="killed by signal 9"),
    ):
        hooks.thaw()


def test_without_hooks_nothing_happens() -> None:
    with Hooks("", "", 10, []) as hooks:
        hooks.thaw()


def test_whoever_hangs_is_not_waited_for(log: Log) -> None:
    with Hooks(log.hook("freeze"), log.hook("thaw"), 0.3, []) as hooks:
        log.wait("freeze", "thaw")  # the instant takes too long
        with pytest.raises(TooLate, match=r"not taken within 0.3 seconds"):
            hooks.thaw()


def test_a_killed_guard_is_replaced(log: Log) -> None:
    with Hooks(log.hook("freeze"), log.hook("thaw"), 10, []) as hooks:
        assert hooks._guard is not None
        hooks._guard.kill()
        hooks._guard.wait()
        hooks.thaw()

    assert log.words == ["freeze", "thaw"]


_COMMAND = """
import sys, time
from nbdfleece.backup.hooks import Hooks
with Hooks(sys.argv[1], sys.argv[2], 30, []):
    print("frozen", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whoever_is_killed_has_been_thawed_for(log: Log, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _COMMAND, log.hook("freeze"), log.hook("thaw")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"frozen\n"
        os.killpg(command.pid, number)  # as a terminal does: the whole group
        log.wait("freeze", "thaw")


def test_whoever_is_killed_while_freezing_has_been_thawed_for(log: Log) -> None:
    pre = log.hook("freeze", f"sleep 1; echo frozen >> {log.path}")
    with subprocess.Popen(
        [sys.executable, "-c", _COMMAND, pre, log.hook("thaw")], env=environment()
    ) as command:
        log.wait("freeze")
        command.kill()
        log.wait("freeze", "frozen", "thaw")
