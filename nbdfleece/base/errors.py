"""The error tree, sorted by what dies.

::

    NbdfleeceError
      ConfigError        the daemon does not start             cli: exit 2, one line
      PeerViolation      this connection dies                  log, close
      OptionRefused      this option is refused                option reply, haggling goes on
      ImageError         this image is damaged, or not understood; becomes one of the next two
      IoError            this request fails; carries an errno  NBD error through errno_map
      CommandError       this command fails                    QMP error reply
        NotFound         ... because what it names is not there
        InUse            ... because somebody uses it

`OSError` becomes `IoError` at the leaves only (datapath.fileio and the drivers that open files).
An `AssertionError` is our own bug: nobody catches it but the request, command and job borders.
"""

from __future__ import annotations

import errno as _errno
from os import strerror  # a table of texts, no I/O


class NbdfleeceError(Exception):
    """Root of every error that nbdfleece raises on purpose."""


class ConfigError(NbdfleeceError):
    """The configuration is wrong; the daemon does not start."""


class PeerViolation(NbdfleeceError):
    """The peer broke the protocol in a way that ends its connection."""


class OptionRefused(NbdfleeceError):
    """A handshake option is refused.

    Attributes:
        reply: The NBD_REP_ERR_* number to answer.
        text: Shown to the peer; may be empty.
    """

    def __init__(self, reply: int, text: str = "") -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class ImageError(NbdfleeceError):
    """The bytes of a disk image are not what its format demands, or ask for what is not built.

    Raised by `formats`. It becomes a CommandError when an image is opened, and an IoError (EIO)
    when a request meets it.
    """


class IoError(NbdfleeceError):
    """One request failed.

    Attributes:
        errno: A positive errno value.
        where: What was attempted, on which node, with numbers; lower case.
        wire_errno: The errno that a client is told, where that differs.
        public: The text that a client is told: no paths, no node names.
    """

    def __init__(
        self, errno: int, where: str, *, wire_errno: int | None = None, public: str = ""
    ) -> None:
        super().__init__(f"{where}: {strerror(errno)}")
        self.errno = errno
        self.where = where
        self.wire_errno = errno if wire_errno is None else wire_errno
        self.public = public or strerror(errno)

    @classmethod
    def from_os(cls, error: OSError, where: str) -> IoError:
        """Return the IoError for an OSError met while doing `where`."""
        return cls(error.errno or _errno.EIO, where)


class CommandError(NbdfleeceError):
    """A control command failed; nothing has changed unless the text says so.

    Attributes:
        qmp_class: QMP error class, `GenericError` unless QEMU uses another.
    """

    qmp_class = "GenericError"


class NotFound(CommandError):
    """What the command names is not there."""


class InUse(CommandError):
    """What the command would remove or change is in use."""
