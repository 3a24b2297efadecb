"""Dirty bitmaps: which granules of a node have been written.

A bit covers [i * granularity, (i + 1) * granularity), cut at the end of the node. Marking rounds
outwards.

While somebody works with a bitmap (a backup, a snapshot) it is frozen: it stands still, and an
anonymous bitmap, its successor, records in its place::

    freeze      A            ->  A (busy, not recording) + successor (recording if A was)
    abdicate    A+successor  ->  the successor, under A's name    what A held has been dealt with
    reclaim     A+successor  ->  A united with the successor      nothing is forgotten

Invariants
  D1  A bit is set because of a write by `mark`, which block.node calls; commands alone clear it.
  D2  A bitmap with a successor is busy and does not record.
  D3  What a store holds of a bitmap is never less than the bitmap, united with its successor: a bit
      is in the store before `mark` returns, and is taken out of the store by `settle` alone.

Follows: QEMU block/dirty-bitmap.c and util/hbitmap.c (the form that is hashed).
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from nbdfleece.base.errors import CommandError, InUse, NotFound
from nbdfleece.base.extent import Extent
from nbdfleece.base.limits import MAX_BITMAP_NAME, MAX_BITMAP_RUNS
from nbdfleece.base.units import KiB, ceil_div, is_power_of_2
from nbdfleece.datapath.states import PAGE, StateMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, MutableMapping

    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node

_CLEAN: Final = 0
_DIRTY: Final = 1
DIRTY: Final = 1 << 0  # flag of an extent of `status`; as NBD's qemu:dirty-bitmap has it

_MIN_GRANULARITY: Final = 512
_DEFAULT_GRANULARITY: Final = (4 * KiB, 64 * KiB)
_WORD: Final = 64  # bits
_DIGITS: Final = bytes.maketrans(b"\0\1", b"01")

Content: TypeAlias = StateMap
"""What a bitmap holds, for `DirtyBitmap.put_back`."""

_anonymous = itertools.count(1)


class BitmapStore(Protocol):
    """Where a persistent bitmap outlives the process.

    Attributes:
        renew_at: By time.monotonic: no write or flush begins later than this without `renew`.
    """

    renew_at: float

    def renew(self) -> None:
        """Learn that the node is being written or flushed, and move `renew_at` on. Cannot fail."""

    def record(self, first: int, last: int) -> None:
        """Make the granules [first, last) dirty, before this returns. Cannot fail.

        What cannot be kept makes the store say, from now on, that it cannot be trusted.
        """

    def settle(self, bitmap: DirtyBitmap) -> None:
        """Take out what is clean in `bitmap` and in its successor; keep whether it records.

        That may go on behind the call, up to `hold`; what is dirty then is what counts.
        """

    def hold(self) -> None:
        """Take nothing out until the next `settle`."""

    def resize(self, bitmap: DirtyBitmap) -> None:
        """Follow the bitmap to its new size."""

    def abandon(self, why: str) -> None:
        """Say, from now on, that what is kept cannot be trusted, and why."""


class BitmapKeeper(Protocol):
    """Keeps the persistent bitmaps of one node: in its image, or beside it."""

    async def keep(self, bitmap: DirtyBitmap) -> None:
        """Make a bitmap persistent (it sets `persistent`, and `store` if it has one).

        Raises:
            CommandError: It cannot be kept. Nothing has changed.
        """

    async def forget(self, bitmap: DirtyBitmap) -> None:
        """Delete what is kept of a persistent bitmap.

        Raises:
            CommandError: It cannot be deleted.
        """


class DirtyBitmap:
    """A dirty bitmap of one node.

    Attributes:
        name: Unique on its node; empty: anonymous.
        granularity: Bytes per bit, a power of two from 512 to 2 GiB.
        size: Bytes covered: the size of the node.
        enabled: Writes are recorded.
        busy: Somebody uses it; it may not be changed or used by others.
        readonly: It belongs to an image that cannot be written.
        inconsistent: Its content cannot be trusted; it can only be removed.
        reason: Why it is inconsistent, for people; may be empty.
        persistent: It outlives the process.
        owner: Who relies on it, for people: it may be looked at and removed, and not be changed by
            commands. Empty: nobody.
        store: Where it is kept as it changes; None: nowhere (or at the close of its image).
        successor: What records while this is frozen, or None.
    """

    __slots__ = (
        "_bits",
        "_shift",
        "busy",
        "enabled",
        "granularity",
        "inconsistent",
        "name",
        "owner",
        "persistent",
        "readonly",
        "reason",
        "size",
        "store",
        "successor",
    )

    def __init__(self, name: str, *, size: int, granularity: int, enabled: bool) -> None:
        check_granularity(granularity)
        self.name = name
        self.granularity = granularity
        self.size = size
        self.enabled = enabled
        self.busy = False
        self.readonly = False
        self.inconsistent = False
        self.reason = ""
        self.persistent = False
        self.owner = ""
        self.store: BitmapStore | None = None
        self.successor: DirtyBitmap | None = None
        self._shift = granularity.bit_length() - 1
        self._bits = StateMap(ceil_div(size, granularity))

    @property
    def recording(self) -> bool:
        """Whether writes are recorded, here or in the successor (as QMP reports it)."""
        return self.enabled or (self.successor is not None and self.successor.enabled)

    # --- writes ----------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """Record a write, if the bitmap records now."""
        if self.enabled:
            shift = self._shift
            first, end = offset >> shift, offset + length - 1 >> shift
            # Most writes go where others have been, and lie in one granule.
            if first == end:
                if self._bits.get(first) == _DIRTY:
                    return
            elif self._bits.uniform(first, end + 1) == _DIRTY:
                return
            self._set(first, end + 1)

    def _set(self, first: int, last: int) -> None:
        if self.store is not None:
            self.store.record(first, last)  # D3
        self._bits.fill(first, last, _DIRTY)

    # --- content ---------------------------------------------------------------------------------

    def set(self, offset: int, length: int) -> None:
        """Make every granule that the range touches dirty, whether the bitmap records or not."""
        if length:
            self._set(offset >> self._shift, (offset + length - 1 >> self._shift) + 1)

    def take(self) -> Content:
        """Make every granule clean and return the content, for `put_back`; a store lags (D3)."""
        if self.store is not None:
            self.store.hold()
        taken, self._bits = self._bits, StateMap(len(self._bits))
        return taken

    def put_back(self, taken: Content) -> None:
        """Have the content again that `take` or `copy` returned."""
        assert len(taken) == len(self._bits), "the bitmap has been resized"
        self._bits = taken
        if self.store is not None:
            for first, last in self.runs():
                self.store.record(first, last)  # D3

    def copy(self) -> Content:
        """Return a copy of the content, for `put_back`."""
        return self._bits.copy()

    def unite(self, other: DirtyBitmap) -> None:
        """Make dirty what is dirty in `other`, of the same size; rounds outwards."""
        assert other.size == self.size, "bitmaps of nodes of different sizes"
        if other is not self:
            for offset, length in other.dirty_ranges():
                self.set(offset, length)

    def settle(self) -> None:
        """Have the store hold this and no more: behind whatever was not a write."""
        if self.store is not None:
            self.store.settle(self)

    def resize(self, size: int) -> None:
        """Follow the node to its new size: what is gone is forgotten, what is new is clean."""
        bits = StateMap(ceil_div(size, self.granularity))
        for first, last in self.runs():
            if first < len(bits):
                bits.fill(first, min(last, len(bits)), _DIRTY)
        self.size, self._bits = size, bits
        if self.store is not None and self.name:
            self.store.resize(self)

    def count(self) -> int:
        """Return dirty granules times granularity, in bytes (as QMP reports it)."""
        return self._bits.count(_DIRTY) * self.granularity

    def dirty_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of every dirty run, in order; nothing may change meanwhile."""
        for first, last in self.runs():
            offset = first << self._shift
            yield offset, min(last << self._shift, self.size) - offset

    def load(self, base: int, states: bytes) -> None:
        """Take over up to 16384 granules from `base` on, a multiple of that: 0 clean, 1 dirty."""
        self._bits.put_page(base, states)

    def states(self) -> Iterator[tuple[int, bytes]]:
        """Yield what `load` takes, for parts that are not all clean, in order."""
        for base, page in self._bits.pages():
            if page != _CLEAN:
                size = min(PAGE, len(self._bits) - base)
                yield base, bytes((_DIRTY,)) * size if isinstance(page, int) else bytes(page[:size])

    def bases(self) -> list[int]:
        """Return where parts begin that are not all clean, in order; see `page`."""
        return [base for base, page in self._bits.pages() if page != _CLEAN]

    def page(self, base: int) -> bytes:
        """Return up to 16384 granules from `base` on, a multiple of that: 0 clean, 1 dirty."""
        size = min(PAGE, len(self._bits) - base)
        page = self._bits.page(base)
        return bytes((page,)) * size if isinstance(page, int) else bytes(page[:size])

    def runs(self) -> Iterator[tuple[int, int]]:
        """As `dirty_ranges`, in granules [first, last)."""
        start, end = 0, 0  # a run that may go on in the next page
        for base, page in self._bits.pages():
            size = min(PAGE, len(self._bits) - base)
            if isinstance(page, int):
                found = [(base, base + size)] if page == _DIRTY else []
            else:
                found = [(base + first, base + last) for first, last in _page_runs(page, size)]
            for first, last in found:
                if first == end:
                    end = last
                    continue
                if end > start:
                    yield start, end
                start, end = first, last
        if end > start:
            yield start, end

    async def status(self, offset: int, length: int) -> list[Extent]:
        """Return extents from `offset` on, flags DIRTY or 0: a status function of the data path.

        What lies behind the end of the bitmap's node is clean.
        """
        if offset >= self.size:
            return [Extent(offset, length, 0)]
        bits, shift = self._bits, self._shift
        index, last = offset >> shift, min((offset + length - 1 >> shift) + 1, len(bits))
        extents: list[Extent] = []
        while index < last and len(extents) < MAX_BITMAP_RUNS:
            stop = bits.run_end(index, last)
            start, end = max(offset, index << shift), min(stop << shift, self.size)
            extents.append(Extent(start, end - start, bits.get(index) and DIRTY))
            index = stop
        return extents

    def packed(self) -> Iterator[tuple[int, bytes]]:
        """Yield (first granule, bits) of parts that are not all clean, in order.

        Eight granules per byte, the first in the lowest bit; each part begins at a multiple of
        16384 granules and ends at a whole 64-bit word.
        """
        for base, states in self.states():
            digits = states.translate(_DIGITS)[::-1]
            words = ceil_div(len(states), _WORD)
            yield base, int(digits, 2).to_bytes(words * _WORD // 8, "little")

    def sha256(self) -> str:
        """Return the hash, in hex, of all bits as 64-bit words, as QEMU has it."""
        found = hashlib.sha256()
        done = 0
        total = max(1, ceil_div(len(self._bits), _WORD)) * _WORD // 8
        zeroes = bytes(min(total, PAGE * KiB // 8))
        for base, bits in self.packed():
            _hash_zeroes(found, base // 8 - done, zeroes)
            found.update(bits)
            done = base // 8 + len(bits)
        _hash_zeroes(found, total - done, zeroes)
        return found.hexdigest()

    # --- use -------------------------------------------------------------------------------------

    def check_usable(self, *, to_change: bool) -> None:
        """Check that nobody uses the bitmap and that its content can be trusted.

        Args:
            to_change: It is to be changed, too.

        Raises:
            InUse: It is busy or, to be changed, somebody's.
            CommandError: It is inconsistent or, to be changed, read-only.
        """
        self.check_idle()
        if to_change:
            self.check_not_owned()
            self._check_writable()
        if self.inconsistent:
            why = f" ({self.reason})" if self.reason else ""
            raise CommandError(f"Bitmap '{self.name}' is inconsistent and cannot be used{why}")

    def check_not_owned(self) -> None:
        """Check that nobody relies on what the bitmap records.

        Raises:
            InUse: Somebody does.
        """
        if self.owner:
            raise InUse(f"Bitmap '{self.name}' belongs to {self.owner}: it can only be removed")

    def check_removable(self) -> None:
        """Check that the bitmap may be removed: that may be done with an inconsistent one, too.

        Raises:
            InUse: It is busy.
            CommandError: It is in an image that cannot be written.
        """
        self.check_idle()
        self._check_writable()

    def _check_writable(self) -> None:
        if self.readonly:
            raise CommandError(f"Bitmap '{self.name}' is readonly and cannot be modified")

    def check_idle(self) -> None:
        """Check that nobody uses the bitmap.

        Raises:
            InUse: Somebody does.
        """
        if self.busy or self.successor is not None:
            raise InUse(
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used"
            )


def _page_runs(page: bytearray, size: int) -> Iterator[tuple[int, int]]:
    first = page.find(_DIRTY, 0, size)
    while first >= 0:
        last = page.find(_CLEAN, first, size)
        if last < 0:
            last = size
        yield first, last
        first = page.find(_DIRTY, last, size)


def _hash_zeroes(found: hashlib._Hash, count: int, zeroes: bytes) -> None:
    while count > 0:
        piece = min(count, len(zeroes))
        found.update(memoryview(zeroes)[:piece])
        count -= piece


# --- the bitmaps of a node -----------------------------------------------------------------------


def check_granularity(granularity: int) -> None:
    """Check what a bit is to cover.

    Raises:
        CommandError: Not a power of two of at least 512.
    """
    if granularity < _MIN_GRANULARITY or not is_power_of_2(granularity):
        raise CommandError("Granularity must be power of 2 and at least 512")


def default_granularity(node: Node) -> int:
    """Return what a bit of a bitmap of `node` covers where nobody says: 4 to 64 KiB."""
    low, high = _DEFAULT_GRANULARITY
    cluster = node.driver.cluster_size()
    return high if cluster <= 1 else min(max(low, cluster), high)


def new_bitmap(node: Node, name: str, granularity: int | None, *, enabled: bool) -> DirtyBitmap:
    """Return a new bitmap for `node`, which does not have it yet.

    Raises:
        CommandError: The name is empty, too long, taken or no proper text, or the granularity is
            none.
    """
    if not name:
        raise CommandError("Bitmap name cannot be empty")
    if granularity is None:
        granularity = default_granularity(node)
    check_granularity(granularity)
    if name in node.bitmaps:
        raise CommandError(f"Bitmap already exists: {name}")
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise CommandError("Bitmap name is not UTF-8") from error
    if "\0" in name:
        raise CommandError("Bitmap name contains a NUL byte")
    if length > MAX_BITMAP_NAME:
        raise CommandError(f"Bitmap name too long: {name}")
    return DirtyBitmap(name, size=node.size, granularity=granularity, enabled=enabled)


def check_storable(node: Node) -> BitmapKeeper:
    """Return who keeps persistent bitmaps of `node`.

    Raises:
        CommandError: Nobody does.
    """
    if node.bitmap_keeper is None:
        raise CommandError(
            f"Can't store persistent bitmaps to {node.name}: Operation not supported"
        )
    return node.bitmap_keeper


def check_mergeable(target: DirtyBitmap, source: DirtyBitmap) -> None:
    """Check that `target` may be united with `source`.

    Raises:
        CommandError: The source is in use or inconsistent, or of another size.
    """
    source.check_usable(to_change=False)
    if source.size != target.size:
        raise CommandError(
            f"Bitmaps are of different sizes (destination size is {target.size}, "
            f"source size is {source.size}) and can't be merged"
        )


def find_node(graph: Graph, name: str) -> Node:
    """Return the node called `name`, in the words that bitmap commands have for it.

    Raises:
        NotFound: There is none.
    """
    node = graph.get(name)
    if node is None:
        raise NotFound(f"Node '{name}' not found")
    return node


def find_bitmap(node: Node, name: str) -> DirtyBitmap:
    """Return the bitmap of `node` called `name`.

    Raises:
        NotFound: There is none.
    """
    bitmap = node.bitmaps.get(name)
    if bitmap is None or bitmap.name != name:
        raise NotFound(f"Dirty bitmap '{name}' not found")
    return bitmap


def find_in_chain(node: Node, name: str) -> tuple[Node, DirtyBitmap] | None:
    """Return the bitmap called `name` of the node or of what it shows: filtered, backing.

    With it its own node comes; None: there is none.
    """
    while True:
        bitmap = node.bitmaps.get(name)
        if bitmap is not None and bitmap.name == name:
            return node, bitmap
        edge = node.file if node.driver.is_filter else node.backing
        if edge is None:
            return None
        node = edge.node


def freeze(bitmaps: MutableMapping[str, DirtyBitmap], bitmap: DirtyBitmap) -> None:
    """Make a bitmap stand still, and its successor record; no write may be in flight.

    Raises:
        InUse: It is in use.
        CommandError: It cannot be used.
    """
    bitmap.check_usable(to_change=False)
    successor = DirtyBitmap(
        "", size=bitmap.size, granularity=bitmap.granularity, enabled=bitmap.enabled
    )
    successor.store = bitmap.store  # it keeps both until one of them is gone (D3)
    bitmap.successor = successor
    bitmap.enabled = False
    bitmap.busy = True
    bitmaps[f"\0{next(_anonymous)}"] = successor


def abdicate(
    bitmaps: MutableMapping[str, DirtyBitmap],
    bitmap: DirtyBitmap,
    *,
    also: Iterable[tuple[int, int]] = (),
) -> DirtyBitmap:
    """Let the successor take over; what the bitmap held is forgotten but for some ranges of it.

    Args:
        bitmaps: Those of the node.
        bitmap: A frozen one.
        also: (offset, length) of what is dirty besides.

    Returns:
        The successor.
    """
    successor = _drop_successor(bitmaps, bitmap)
    for offset, length in also:
        successor.set(offset, length)
    successor.name = bitmap.name
    successor.persistent = bitmap.persistent
    bitmaps[bitmap.name] = successor
    successor.settle()
    return successor


def reclaim(bitmaps: MutableMapping[str, DirtyBitmap], bitmap: DirtyBitmap) -> DirtyBitmap:
    """Let the bitmap record again, united with what its successor has recorded. Returns it."""
    successor = _drop_successor(bitmaps, bitmap)
    bitmap.unite(successor)
    bitmap.enabled = successor.enabled
    bitmap.settle()
    return bitmap


def _drop_successor(bitmaps: MutableMapping[str, DirtyBitmap], bitmap: DirtyBitmap) -> DirtyBitmap:
    successor = bitmap.successor
    assert successor is not None, f"bitmap '{bitmap.name}' is not frozen"
    key = next(key for key, found in bitmaps.items() if found is successor)
    del bitmaps[key]
    bitmap.successor = None
    bitmap.busy = False
    return successor
