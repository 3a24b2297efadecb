"""What can be wrong with backups, by what a person can do about it."""

from __future__ import annotations

from nbdfleece.base.errors import CommandError, InUse, NotFound


class BackupError(CommandError):
    """A backup cannot be made, read or changed; what was there before still is."""


class Damaged(BackupError):
    """A file of a backup is not what it must be."""


class NoBackup(NotFound):
    """There is no such backup, or no such point in it."""


class FolderBusy(InUse):
    """Somebody else works on the folder."""


class WouldOverwrite(InUse):
    """The destination holds something already."""
