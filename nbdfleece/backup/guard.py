"""The process that runs the hooks around an instant, and outlives whoever started it.

Started by `hooks` as a program, in a session of its own, so that no Ctrl-C reaches it. First it
reads one JSON line: pre, post, timeout_s, disks. Then::

    guard                                   starter
    runs `pre`
    {"hook": "pre", "error": ...}   ->
    waits, `timeout_s` at most              takes the instant
                                    <-      the end of the pipe: it is done, or has died
    runs `post`, whatever happened
    {"hook": "post", "error": ..., "late": ...}   ->

`late` says that the guard did not wait any longer for its starter. A hook that takes longer than
`timeout_s` is killed with its whole process group. What hooks say goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHELL: Final = "/bin/sh"
_KILL_WAIT_S: Final = 5.0  # for a killed hook to be gone


def run_hook(command: str, name: str, disks: str, timeout_s: float) -> str | None:
    """Run a hook to its end, or kill it at its deadline; return what went wrong, or None."""
    environment = {**os.environ, "NBDFLEECE_HOOK": name, "NBDFLEECE_DISKS": disks}
    try:
        hook = subprocess.Popen(  # noqa: S603 - whoever may run the command chose the hook
            [_SHELL, "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    try:
        code = hook.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(hook.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            hook.wait(_KILL_WAIT_S)
        return f"it had not ended after {timeout_s:g} seconds, and was killed"
    if code < 0:
        return f"it was killed by signal {-code}"
    return None if code == 0 else f"it ended with exit code {code}"


def _say(message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # who should hear it may be dead
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def _must_thaw(timeout_s: float) -> bool:
    """Return when the starter has closed the pipe; False: it did not in time."""
    ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(ready)


def _stay(_signal: int, _frame: object) -> None:
    """Ignore a signal; unlike SIG_IGN this is not handed on to the hooks."""


def main() -> None:
    """Be the guard."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stay)
    told = json.loads(sys.stdin.readline())
    pre, post, disks = str(told["pre"]), str(told["post"]), str(told["disks"])
    timeout_s = float(told["timeout_s"])
    error: str | None = None
    is_late = False
    if pre:
        error = run_hook(pre, "pre", disks, timeout_s)
        _say({"hook": "pre", "error": error})
    if error is None:
        is_late = not _must_thaw(timeout_s) and bool(pre)
    error = run_hook(post, "post", disks, timeout_s) if post else None
    _say({"hook": "post", "error": error, "late": is_late})


if __name__ == "__main__":
    main()
