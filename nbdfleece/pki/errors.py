"""Errors that a person can act upon; who prints them sorts them by class."""

from __future__ import annotations

from nbdfleece.base.errors import CommandError, InUse, NotFound


class AlreadyThere(InUse):
    """What would be made is there, and is not overwritten."""


class NoAuthority(NotFound):
    """The folder has no certificate authority."""


class ClientNotFound(NotFound):
    """No certificate was ever issued to a client of that name."""


class PkiError(CommandError):
    """The folder cannot be used as it is."""
