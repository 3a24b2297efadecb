"""Snapshots that are kept in a node's image: what drivers offer, and changes of them.

A change is made in a drained section: what a guest was told is written is in the snapshot, and
nothing is half in it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from nbdfleece.base.errors import CommandError, IoError, NotFound
from nbdfleece.block.drain import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdfleece.base.extent import Extent
    from nbdfleece.block.node import Node


class SnapshotInfo(Protocol):
    """What there is to say of an internal snapshot."""

    @property
    def id(self) -> str:
        """Unique in the image."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def date_s(self) -> int:
        """When it was taken: seconds since 1970."""

    @property
    def date_ns(self) -> int:
        """And nanoseconds."""

    @property
    def clock_ns(self) -> int:
        """How long the guest had run."""

    @property
    def state_size(self) -> int:
        """Bytes of a virtual machine's state that is kept with it."""

    @property
    def disk_size(self) -> int | None:
        """Bytes of the disk then; None: not recorded."""

    @property
    def instructions(self) -> int | None:
        """Count of the guest's instructions; None: not recorded."""


class PointInTime(Protocol):
    """One of them while it is read: it is not deleted meanwhile. Ranges lie inside its size."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read_now(self, offset: int, view: memoryview) -> bool:
        """See Driver.read_now."""

    async def read(self, offset: int, view: memoryview) -> None:
        """See Driver.read."""

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See Driver.block_status."""

    def close(self) -> None:
        """Read it no more."""


class InternalSnapshots(Protocol):
    """The snapshots of one image; changes are made while its node is drained."""

    def all(self) -> Sequence[SnapshotInfo]:
        """Return them, in the order of the image."""

    async def create(self, name: str, date_s: int, date_ns: int) -> SnapshotInfo:
        """Make one of the disk as it is now.

        Raises:
            CommandError: The image cannot have it. Nothing has changed.
            IoError: It failed. Nothing has changed, but for space that may be lost.
        """

    async def delete(self, wanted: str) -> None:
        """Delete one by its id.

        Raises:
            InUse: It is being read. Nothing has changed.
            IoError: It failed: it is gone or not.
        """

    async def apply(self, wanted: str) -> None:
        """Go back to one by its id.

        Raises:
            CommandError: That cannot be. Nothing has changed.
            IoError: It failed: the disk is what it was, or what it was then.
        """


def snapshots_of(node: Node) -> InternalSnapshots:
    """Return the snapshots in the image of a node.

    Raises:
        CommandError: It cannot have any.
    """
    found = node.driver.internal_snapshots()
    if found is None:
        raise CommandError(
            f"Block format '{node.driver.name}' used by device '{node.name}' does not support "
            "internal snapshots"
        )
    return found


def find(node: Node, id_: str | None, name: str | None) -> SnapshotInfo | None:
    """Return the snapshot that has the id and the name, as far as they are given, or None."""
    for each in snapshots_of(node).all():
        if (id_ is None or each.id == id_) and (name is None or each.name == name):
            return each
    return None


def check_new(node: Node, name: str) -> None:
    """Check that a node may get an internal snapshot called `name`.

    Raises:
        CommandError: It may not.
    """
    snapshots_of(node)
    if not name:
        raise CommandError("Name is empty")
    if node.read_only:
        raise CommandError(f"Device '{node.name}' is read only")
    if find(node, None, name) is not None:
        raise CommandError(f"Snapshot with name '{name}' already exists on device '{node.name}'")


async def create(node: Node, name: str) -> SnapshotInfo:
    """Make an internal snapshot of a node as it is now.

    Raises:
        CommandError: The node cannot have it, or its requests do not end. Nothing has changed.

    Cancel: before it has begun.
    """
    check_new(node, name)
    snapshots = snapshots_of(node)
    async with quiet(node):
        now = time.time_ns()
        try:
            return await snapshots.create(name, now // 10**9, now % 10**9)
        except IoError as error:
            raise CommandError(f"Failed to create snapshot '{name}': {error}") from error


async def delete(node: Node, id_: str | None, name: str | None) -> SnapshotInfo:
    """Delete an internal snapshot, and return what it was.

    Raises:
        NotFound: There is none.
        CommandError: It cannot be deleted: it is in use, or that failed.

    Cancel: before it has begun.
    """
    snapshots = snapshots_of(node)
    if id_ is None and name is None:
        raise CommandError("Name or id must be provided")
    found = find(node, id_, name)
    if found is None:
        raise NotFound(
            f"Snapshot with id '{id_ or 'null'}' and name '{name or 'null'}' does not exist on "
            f"device '{node.name}'"
        )
    async with quiet(node):
        try:
            await snapshots.delete(found.id)
        except IoError as error:
            raise CommandError(f"Failed to delete snapshot '{found.name}': {error}") from error
    return found
