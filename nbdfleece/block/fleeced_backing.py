"""An overlay that is the target of copy-before-write, over the very disk that is preserved.

::

    guest -> [copy-before-write] --file-----------> source
                     `--target--> overlay --backing--^
    backup client ------------------^

The older way of fleecing: a client reads the overlay itself. What has been saved is there; the rest
is still in the source. So the overlay is of the instant as long as the filter stands above the
source, and shows live data before and after.

Invariants
  F1  While the filter is there, no link between overlay and source can be changed.
  F2  A look through the backing link counts only if, behind it, the overlay still holds nothing
      there, and the guard bears it: a cluster is saved before the guest's data goes to the source
      (invariant B of copy-before-write), so what was seen then is old.
  F3  Once the filter has left its place, or could not save what a guest overwrote, whatever looks
      through the link fails, for good: the user has to give the overlay another backing.

QEMU freezes nothing here, makes the filter's writes wait for readers of the overlay, and shows live
data when the job has been cancelled.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse, IoError
from nbdfleece.block import permissions
from nbdfleece.block.child import Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdfleece.block.child import Child
    from nbdfleece.block.node import Node

_log: Final = logging.getLogger(__name__)


class FleecedBacking:
    """The backing link of an overlay whose backing is being preserved; `guard` makes one.

    Args:
        edge: The first backing link on the way from the target to the source.
        links: All links on that way.
        why: Why they are frozen, for people.
        check: Raises IoError for a range of which the source no longer has the old data.
    """

    def __init__(
        self, edge: Child, links: list[Child], why: str, check: Callable[[int, int], None]
    ) -> None:
        self._edge = edge
        self._links = links
        self._why = why
        edge.guard = check
        for link in links:
            link.frozen.append(why)
            link.stays = True

    def cut(self, why: str) -> None:
        """Let nobody look through the link any more (F3). The first reason counts.

        Args:
            why: For people.
        """
        if isinstance(self._edge.guard, _Cut):
            return
        overlay = self._edge.parent.describe_parent()
        text = f"{overlay}: not a point in time any more: {why}"
        _log.warning("%s; what it does not hold itself cannot be read", text)
        self._edge.guard = _Cut(text)

    def release(self) -> None:
        """Let the links be changed again. Cannot fail."""
        for link in self._links:
            link.frozen.remove(self._why)
            link.stays = bool(link.frozen)
        if not isinstance(self._edge.guard, _Cut):
            self._edge.guard = None


class _Cut:
    """Refuses every look through a link."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __call__(self, offset: int, length: int) -> None:
        raise IoError(
            errno.EIO,
            f"{self._text}: {length} bytes at {offset}",
            public="not a point in time any more",
        )


async def guard(
    source: Node, target: Node, why: str, check: Callable[[int, int], None]
) -> FleecedBacking | None:
    """Guard the backing link through which a target shows the source; None: there is none.

    Raises:
        CommandError: The overlay cannot become a point in time. Nothing has changed.
    """
    edge = _find(source, target)
    if edge is None:
        return None
    if edge.guard is not None:
        raise InUse(
            f"Target '{target.name}' is, or has been, a point in time of its backing "
            f"'{edge.node.name}': give it another backing first"
        )
    await _check_empty(target)
    links = [edge, *_links(edge.node, source)]
    return FleecedBacking(edge, links, why, check)


def _find(source: Node, target: Node) -> Child | None:
    """Return the first backing link on the way from the target to the source.

    Raises:
        CommandError: The source is behind the target in some other way.
    """
    node = target
    while source in permissions.topological([node]):
        backing, file = node.backing, node.file
        if backing is not None and source in permissions.topological([backing.node]):
            return backing
        if file is None or not file.role & Role.FILTERED:
            raise CommandError(f"Target '{target.name}' stands on the source '{source.name}'")
        node = file.node
    return None


def _links(node: Node, source: Node) -> list[Child]:
    """Return all links from a node on that are on a way to the source."""
    return [
        edge
        for above in permissions.topological([node])
        if above is not source
        for edge in above.children
        if source in permissions.topological([edge.node])
    ]


async def _check_empty(target: Node) -> None:
    """Insist that everything read from the target is read from what is behind it.

    Raises:
        CommandError: It holds something.
    """
    offset = 0
    while offset < target.size:
        try:
            found = await target.allocation_depth(offset, target.size - offset)
        except IoError as error:
            raise CommandError(f"Target '{target.name}' cannot be looked at: {error}") from error
        for extent in found:
            if extent.flags == 1:
                raise CommandError(
                    f"Target '{target.name}' holds data already, at {extent.offset}: what it shows "
                    "would not be of one instant"
                )
        offset = max(found[-1].end, offset + 1)
