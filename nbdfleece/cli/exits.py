"""Exit codes, and the one line on stderr that goes with all but the first."""

from __future__ import annotations

import sys
from typing import Final

from nbdfleece.base.errors import CommandError, ConfigError, InUse, NbdfleeceError, NotFound
from nbdfleece.cli.arguments import UsageError
from nbdfleece.cli.client import CommandFailed, NoDaemon

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_DAEMON: Final = 3
REFUSED: Final = 4
NOT_FOUND: Final = 5
BROKEN: Final = 6
PARTLY: Final = 7

_REASONS: Final = {
    "not-found": NOT_FOUND,
    "in-use": REFUSED,
    "broken": BROKEN,
    "usage": USAGE,
}
_CLASSES: Final[tuple[tuple[type[NbdfleeceError], int], ...]] = (
    (UsageError, USAGE),
    (ConfigError, USAGE),
    (NoDaemon, NO_DAEMON),
    (InUse, REFUSED),
    (NotFound, NOT_FOUND),
    (CommandError, FAILED),
)


def code_of(error: NbdfleeceError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, CommandFailed):
        return _REASONS.get(error.reason, FAILED)
    for kind, code in _CLASSES:
        if isinstance(error, kind):
            return code
    return FAILED


def complain(what: str, why: str) -> None:
    """Say on stderr what was attempted and why it failed, in one line."""
    line = ": ".join(f"nbdfleece: {what}: {why}".splitlines())
    print(line, file=sys.stderr)
