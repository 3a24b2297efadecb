"""Hooks around an instant: freeze before it, thaw right behind it, always.

The hooks are run by a process of their own (module `guard`), which thaws also when the daemon does
not answer, and when the command that started it is interrupted or killed. If the guard itself is
killed, the command thaws.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Final, Self

from nbdfleece.backup.errors import BackupError
from nbdfleece.backup.guard import run_hook

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

HOOK_TIMEOUT_S: Final = 10.0  # as Windows' shadow copies bear it; file systems wait meanwhile


class HookFailed(BackupError):
    """A hook failed, or the instant came too late for it."""


class Hooks:
    """The hooks of one instant; entering runs `pre`, and `post` runs before this is left.

    Args:
        pre: A command for the shell; empty: none.
        post: Likewise.
        timeout_s: Seconds that each may take, and the instant between them.
        disks: Names of disks, which the hooks get in NBDFLEECE_DISKS.

    Raises:
        HookFailed: On entering: `pre` failed. `post` has been run all the same.
    """

    def __init__(self, pre: str, post: str, timeout_s: float, disks: Sequence[str]) -> None:
        self._pre = pre
        self._post = post
        self._timeout_s = timeout_s
        self._disks = " ".join(disks)
        self._guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if not (self._pre or self._post):
            return self
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "nbdfleece.backup.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._send(
                {
                    "pre": self._pre,
                    "post": self._post,
                    "timeout_s": self._timeout_s,
                    "disks": self._disks,
                }
            )
            error = self._answer("pre") if self._pre else None
        except BaseException:
            self._leave()
            raise
        if error is not None:
            self._leave()
            raise HookFailed(f"the hook '{self._pre}' failed: {error}")
        return self

    def thaw(self) -> None:
        """Run `post`, now that the instant is taken.

        Raises:
            HookFailed: It failed; or the instant was not taken in time, and so not between the
                hooks (`is_late`).
        """
        guard, self._guard = self._guard, None
        if guard is None:
            return
        answer = _last_answer(guard)
        if answer is None:  # the guard was killed
            error = run_hook(self._post, "post", self._disks, self._timeout_s)
            answer = {"error": error, "late": False}
        if answer.get("late"):
            raise TooLate(
                f"the instant was not taken within {self._timeout_s:g} seconds of the hook "
                f"'{self._pre}', so what that had frozen was let go before"
            )
        if answer.get("error") is not None:
            raise HookFailed(f"the hook '{self._post}' failed: {answer['error']}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Thaw, whatever has happened; who leaves early has an error of its own."""
        try:
            self.thaw()
        except HookFailed as error:
            sys.stderr.write(f"nbdfleece: {error}\n")

    def _send(self, message: object) -> None:
        assert self._guard is not None, "the guard runs"
        assert self._guard.stdin is not None, "its stdin is ours"
        self._guard.stdin.write(json.dumps(message) + "\n")
        self._guard.stdin.flush()

    def _answer(self, hook: str) -> str | None:
        """Return what went wrong with a hook, or None."""
        assert self._guard is not None, "the guard runs"
        answer = _read(self._guard.stdout)
        if answer is None or answer.get("hook") != hook:
            return "its guard was killed"
        error = answer.get("error")
        return None if error is None else str(error)


class TooLate(HookFailed):
    """The instant was taken when nothing was frozen any more."""


def _last_answer(guard: subprocess.Popen[str]) -> dict[str, object] | None:
    """Let the guard thaw and end; return what it says; None: it was killed."""
    try:
        assert guard.stdin is not None, "its stdin is ours"
        guard.stdin.close()  # the same as a word: the guard has nothing else to wait for
    except OSError:
        pass
    answer = None
    while (message := _read(guard.stdout)) is not None:
        if message.get("hook") == "post":
            answer = message
    guard.wait()
    assert guard.stdout is not None, "its stdout is ours"
    guard.stdout.close()
    return answer


def _read(stream: IO[str] | None) -> dict[str, object] | None:
    assert stream is not None, "its stdout is ours"
    line = stream.readline()
    if not line:
        return None
    found = json.loads(line)
    return found if isinstance(found, dict) else None
