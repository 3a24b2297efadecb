"""Errors that a person can act upon; who prints them sorts them by class."""

from __future__ import annotations

from nbdfleece.base.errors import CommandError, InUse, NotFound


class NotBuilt(CommandError):
    """What is asked for has a name already and no code yet."""


class DiskNotFound(NotFound):
    """There is no disk of that name."""


class SnapshotNotFound(NotFound):
    """There is no snapshot of that name."""


class SnapshotBroken(CommandError):
    """Old data could not be saved: the point in time is lost."""


class NameTaken(InUse):
    """A disk or a snapshot of that name is there already."""


class StateError(CommandError):
    """The state folder cannot be used as it is."""


class StateLocked(InUse):
    """Another daemon holds the state folder."""


class LocationNotFound(NotFound):
    """The file or device of a disk is not there."""
