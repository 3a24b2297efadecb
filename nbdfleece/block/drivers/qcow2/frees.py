"""Host clusters that the disk lets go of, on their way to be free.

::

    L2 or L1 entry changed in memory -> waiting -> commit has written that -> settling -> free
                                                                  requests of their epoch have ended

A request that is on its way to host clusters holds an epoch. What is let go of while it runs is of
its epoch or a later one, and is free only when all requests of that epoch, and of those before it,
have ended. So nobody reads or writes a cluster that has become somebody else's meanwhile.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdfleece.base.errors import ImageError, IoError

if TYPE_CHECKING:
    from nbdfleece.block.drivers.qcow2.image import Image

_log: Final = logging.getLogger(__name__)


class Free(NamedTuple):
    """Host clusters whose refcounts are to go down by one."""

    first: int
    clusters: int
    why: int


class Epoch:
    """Requests that began between two commits: how many are still running.

    Args:
        before: The epoch before it.
    """

    __slots__ = ("_before", "count")

    def __init__(self, before: Epoch | None) -> None:
        self.count = 0
        self._before = before

    def is_over(self) -> bool:
        """Tell whether all its requests, and those of all epochs before it, have ended."""
        while self._before is not None and self._before.count == 0:
            self._before = self._before._before  # noqa: SLF001 - another of its kind
        return self.count == 0 and self._before is None


class Frees:
    """What has been let go of in one image.

    Attributes:
        epoch: Of requests that begin now.
        waiting: Let go of since the last commit.
        pass_discard: Whether the space of freed clusters is given back, by reason.
    """

    def __init__(self, image: Image) -> None:
        self._image: Final = image
        self.epoch = Epoch(None)
        self.waiting: list[Free] = []
        self.pass_discard = [False, True, False]
        self._settling: deque[tuple[Epoch, list[Free]]] = deque()
        self._is_settling = False

    def add(self, offset: int, length: int, why: int) -> None:
        """Note that one reference less leads to the host clusters of a range."""
        bits = self._image.header.cluster_bits
        first = offset >> bits
        count = ((offset + length - 1) >> bits) - first + 1
        if self.waiting:
            last = self.waiting[-1]
            if last.why == why and last.first + last.clusters == first:
                self.waiting[-1] = Free(last.first, last.clusters + count, why)
                return
        self.waiting.append(Free(first, count, why))

    def take(self) -> list[Free]:
        """Return what was let go of so far; for `commit`."""
        taken, self.waiting = self.waiting, []
        return taken

    def begin_epoch(self) -> Epoch:
        """Begin a new epoch, and return the one that ends."""
        ended, self.epoch = self.epoch, Epoch(self.epoch)
        return ended

    def gone_from_disk(self, frees: list[Free], epoch: Epoch) -> None:
        """Learn that the tables on disk do not tell of these clusters any more."""
        self._settling.append((epoch, frees))

    async def settle(self) -> None:
        """Free whatever nobody can be on the way to; the refcounts change in memory only."""
        if self._is_settling:
            return
        self._is_settling = True
        try:
            while self._settling and self._settling[0][0].is_over():
                _, frees = self._settling[0]
                while frees:
                    try:
                        await self._settle_one(frees[-1])
                    except IoError as error:  # they stay in use, which harms nobody
                        _log.warning("node '%s': %s", self._image.node.name, error)
                    frees.pop()
                self._settling.popleft()
        finally:
            self._is_settling = False

    async def _settle_one(self, free: Free) -> None:
        bits = self._image.header.cluster_bits
        self._image.decompressed.clear()  # their places may have other content soon
        last = await self._image.counts.last_references(free.first, free.clusters)
        for first, count in last:
            if not self._image.metadata.isdisjoint(range(first, first + count)):
                error = ImageError(f"metadata at {first << bits:#x} is said to be of the disk")
                raise self._image.damaged(error)
        for first, count in last:
            if not self.pass_discard[free.why]:
                continue
            # Before anybody else may have the cluster.
            length = min((first + count) << bits, self._image.file.size) - (first << bits)
            if length > 0:
                try:
                    await self._image.file.discard(first << bits, length)
                except IoError as error:  # a hint
                    _log.debug("node '%s': %s", self._image.node.name, error)
        await self._image.counts.decrease(free.first, free.clusters)
