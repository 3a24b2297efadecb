"""A small blocking QMP client, and typed access to what it gets.

One connection, one request at a time; events that come in between are dropped.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

from nbdfleece.base.errors import NbdfleeceError
from nbdfleece.protocol.qmp.framing import Framer
from nbdfleece.protocol.qmp.values import encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from nbdfleece.protocol.qmp.framing import BadMessage
    from nbdfleece.protocol.qmp.values import Json

_READ: Final = 64 * 1024
_GREETING_TIMEOUT_S: Final = 10.0
_NOBODY: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED})


class NoDaemon(NbdfleeceError):
    """Nobody answers at the control socket."""


class CommandFailed(NbdfleeceError):
    """The daemon says why a command failed.

    Attributes:
        reason: `not-found`, `in-use`, `broken`, `usage`, or empty.
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class Row:
    """A JSON object, by typed getters; what is missing or of another type is empty."""

    def __init__(self, value: Json) -> None:
        self.value: Mapping[str, Json] = value if isinstance(value, Mapping) else {}

    def text(self, name: str) -> str:
        """Return a string."""
        value = self.value.get(name)
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> int:
        """Return a whole number."""
        value = self.value.get(name)
        return value if isinstance(value, int) else 0

    def row(self, name: str) -> Row:
        """Return an object."""
        return Row(self.value.get(name))

    def rows(self, name: str) -> list[Row]:
        """Return a list of objects."""
        return as_rows(self.value.get(name))

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        value = self.value.get(name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            return []
        return [item for item in value if isinstance(item, str)]


def as_rows(value: Json) -> list[Row]:
    """Return the objects in a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return []
    return [Row(item) for item in value]


class Client:
    """A connection to the daemon, ready for commands.

    Args:
        path: The control socket.

    Raises:
        NoDaemon: Nobody answers there.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._messages: Iterator[Mapping[str, Json] | BadMessage] = iter(())
        self._framer = Framer()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(_GREETING_TIMEOUT_S)
            self._sock.connect(path)
            if "QMP" not in self.receive():
                raise self.gone("what answers is no nbdfleece")
            self._sock.settimeout(None)
        except OSError as error:
            self._sock.close()
            why = error.strerror or str(error)
            if error.errno in _NOBODY:
                why += " (it does not run, or --control or NBDFLEECE_CONTROL must name its socket)"
            raise self.gone(why) from error
        except NoDaemon:
            self._sock.close()
            raise
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sock.close()

    def execute(self, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
        """Run a command and return its result.

        Raises:
            CommandFailed: The daemon refused, or could not do it.
            NoDaemon: It went away.
        """
        request: dict[str, Json] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            self.send(request)
            while True:
                answer = self.receive()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    error = Row(answer["error"])
                    raise CommandFailed(error.text("desc"), error.text("reason"))
        except OSError as lost:
            raise self.gone(lost.strerror or str(lost)) from lost

    def query(self, command: str, arguments: Mapping[str, Json] | None = None) -> list[Row]:
        """Run a command whose result is a list of objects; see `execute`."""
        return as_rows(self.execute(command, arguments))

    def send(self, request: Mapping[str, Json]) -> None:
        """Send a request as it is; `receive` gives its answer, and what comes before that.

        Raises:
            NoDaemon: It went away.
        """
        try:
            self._sock.sendall(encode(request))
        except OSError as lost:
            raise self.gone(lost.strerror or str(lost)) from lost

    def another(self) -> Client:
        """Return one more connection to the same socket.

        Raises:
            NoDaemon: Nobody answers there any more.
        """
        return Client(self._path)

    def run_out(self) -> None:
        """Send no more, and return when the daemon has carried out what was sent.

        Whatever became of that; the connection, which may have been interrupted anywhere, is of no
        further use.
        """
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(_READ):
                pass

    def hang_up(self) -> None:
        """End the connection; who waits in `receive` is told so. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def receive(self) -> Mapping[str, Json]:
        """Return the next answer or event, as it came.

        Raises:
            NoDaemon: It went away.
            OSError: Likewise.
        """
        while True:
            for message in self._messages:
                if isinstance(message, Mapping):
                    return message
                raise self.gone(f"what it sends makes no sense: {message.text}")
            data = self._sock.recv(_READ)
            if not data:
                raise self.gone("the daemon closed the connection")
            self._messages = self._framer.feed(data)

    def gone(self, why: str) -> NoDaemon:
        """Return the error that says so."""
        return NoDaemon(f"no daemon at '{self._path}': {why}")
