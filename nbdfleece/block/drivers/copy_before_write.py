"""Copy-before-write filter: old data is saved before the guest overwrites it.

::

    guest -> [copy-before-write] --file----> active disk
                   |      ^  `----target---> temporary image
                   |      `--- snapshot-access reads the point in time

Every cluster is in one state:

    UNCOPIED   the point in time is in `file`
    MOVING     a copier holds the claim; until it is done the point in time is still in `file`
    DONE       ... is in `target`
    ALL_ZERO   ... is all zeroes, and nothing was written to `target` for it
    GONE       ... cannot be read: outside `bitmap`, or discarded by the reader

::

    UNCOPIED -> MOVING -> DONE or ALL_ZERO    any -> GONE (not from MOVING)
                   `----> UNCOPIED (the copy failed)

Invariants (tests/model/test_fleecing.py holds the driver to them)
  A  For every readable cluster: `file` is unchanged since the start, or it is DONE and `target`
     holds the old data, or it is ALL_ZERO.
  B  DONE is set only after the write to `target` is complete, and before the new data goes to
     `file`.
  C  A reader that took data from `file` looks at the states again *after* its read: what is still
     not DONE was old data (by B); the rest it reads again from `target`. So guest writes never
     wait for readers, and a slow reader delays nobody.
  D  Once the snapshot is broken there is no copying, so C has nothing to look at: a write then
     waits until no reader that began before is reading its range (the frozen reads). A copy that
     had begun puts nothing into `target` that it has read since.
  E  Hence a read in flight when the snapshot breaks still returns right data; the next one fails.
  F  The snapshot error is set once and never changes.

QEMU makes writers wait for frozen reads always (its C and D); checking afterwards gives the same
bytes without the wait.

Follows: QEMU block/copy-before-write.c and block/block-copy.c.
"""

from __future__ import annotations

import asyncio
import enum
import errno
from os import strerror
from typing import TYPE_CHECKING, ClassVar, Final

from nbdfleece.base.errors import CommandError, IoError
from nbdfleece.base.extent import DATA, HOLE, ZERO, Extent, clip, merge
from nbdfleece.base.limits import COPY_PIECE, MIN_CLUSTER
from nbdfleece.base.notify import Notifier
from nbdfleece.base.units import align_up, ceil_div, is_power_of_2
from nbdfleece.block import fleeced_backing
from nbdfleece.block import permissions as perms
from nbdfleece.block.driver import Driver, Reopening
from nbdfleece.block.ranges import RangeList
from nbdfleece.datapath.states import StateMap
from nbdfleece.datapath.step import background
from nbdfleece.datapath.writes import Save, SaveError, SaveStates

if TYPE_CHECKING:
    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.child import Child
    from nbdfleece.block.driver import Place
    from nbdfleece.block.fleeced_backing import FleecedBacking
    from nbdfleece.block.node import Node
    from nbdfleece.datapath.fileio import FileIo
    from nbdfleece.datapath.route import EarlyReply

UNCOPIED: Final = 0
MOVING: Final = 1
SETTLED: Final = 2  # from here on nothing is left to save
DONE: Final = 2
ALL_ZERO: Final = 3
GONE: Final = 4

_STATUS_RUNS: Final = 4096  # runs looked at by one status call

# Flags of the extents of `held`.
HELD: Final = 1
GIVEN_UP: Final = 2
_HELD_FLAGS: Final = {DONE: HELD, ALL_ZERO: HELD, GONE: GIVEN_UP}


class OnCbwError(enum.Enum):
    """What gives way when old data cannot be saved; values as in QMP."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class CopyBeforeWrite(Driver):
    """Driver `copy-before-write`; children `file` (FILTERED, PRIMARY) and `target` (DATA).

    Args:
        on_cbw_error: What gives way when old data cannot be saved.
        cbw_timeout_s: Seconds a guest write waits for its copies; None or 0: for ever.
        min_cluster_size: Bytes, a power of two; 0: the default. The unit of copying is the largest
            of this, the target's cluster and 4 KiB.
        bitmap: Preserve only what is dirty here now; None: everything. Sampled at `open`.
        temp_limit: Bytes of old data that may be saved; more is ENOSPC. None: no limit.

    Attributes:
        on_cbw_error: May be changed while it runs.
        cbw_timeout_s: May be changed while it runs.
        broken: Publishes the snapshot error when it is set.
        refused: Publishes why a guest's write fails as its old data could not be saved.
        saved: Publishes `saved_bytes` whenever it grows.
        saved_bytes: Bytes of old data in `target`.
        error: The snapshot error, or None.
    """

    name: ClassVar[str] = "copy-before-write"
    is_filter: ClassVar[bool] = True
    changeable: ClassVar[frozenset[str]] = frozenset({"on-cbw-error", "cbw-timeout"})
    repointable: ClassVar[frozenset[str]] = frozenset()  # another disk has another point in time
    _overlay: FleecedBacking | None = None  # the target is over the source
    _cluster = 0  # `open` sets it
    _has_begun = False  # somebody may count on the point in time

    def __init__(
        self,
        *,
        on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout_s: float | None = None,
        min_cluster_size: int = 0,
        bitmap: DirtyBitmap | None = None,
        temp_limit: int | None = None,
    ) -> None:
        self.on_cbw_error = on_cbw_error
        self.cbw_timeout_s = cbw_timeout_s
        self.error: IoError | None = None
        self.broken: Notifier[IoError] = Notifier()
        self.refused: Notifier[IoError] = Notifier()
        self.saved: Notifier[int] = Notifier()
        self.saved_bytes = 0
        self._before = (on_cbw_error, cbw_timeout_s)
        self._min_cluster_size = min_cluster_size
        self._bitmap = bitmap
        self._temp_limit = temp_limit
        self._states = StateMap(0)
        self._frozen = RangeList()
        self._moved_waiters: list[asyncio.Future[None]] = []
        self._zero_is_free = False  # `target` reads as zeroes where nothing was written
        self._save_states = SaveStates(1, DONE, None)

    # --- life ------------------------------------------------------------------------------

    async def open(self) -> int:
        """Check the set-up and begin to preserve; see Driver.open."""
        source, target = self._source(), self._target()
        if source is target:
            raise CommandError("Source and target of copy-before-write are the same node")
        if target.size < source.size:
            raise CommandError(
                f"Target '{target.name}' ({target.size} bytes) is smaller than "
                f"source '{source.name}' ({source.size} bytes)"
            )
        if self._min_cluster_size and not is_power_of_2(self._min_cluster_size):
            raise CommandError("min-cluster-size needs to be a power of 2")
        self._cluster = max(MIN_CLUSTER, self._min_cluster_size, target.driver.cluster_size())
        self._zero_is_free = target.driver.reads_zero_when_new()
        self._states = StateMap(ceil_div(source.size, self._cluster))
        zero = ALL_ZERO if self._zero_is_free else None
        self._save_states = SaveStates(self._cluster, DONE, zero)
        if self._bitmap is not None:
            self._sample(self._bitmap, source.size)
            self._bitmap = None
        why = f"node '{self.node.name}' preserves a point in time there"
        self._overlay = await fleeced_backing.guard(source, target, why, self._check_overlay)
        return source.size

    async def close(self) -> None:
        """Let go of the target; see Driver.close."""
        if self._overlay is not None:
            self._overlay.release()

    def set_permissions(self, perm: int, shared: int) -> None:
        """Learn whether anybody counts on the filter: without it, an overlay shows live data.

        Who comes back later finds no point in time: what was written meanwhile has been saved by
        nobody, and what is in `target` is of before.
        """
        if self.node.parents:
            self._has_begun = True
        elif self._has_begun:
            why = f"node '{self.node.name}' has left its place"
            if self._overlay is not None:
                self._overlay.cut(why)
            if self.error is None and self._has_saved():
                self.error = IoError(errno.EIO, why)  # no news: whoever took it away knows

    async def truncate(self, size: int) -> None:
        """Refuse: the point in time has the size that it has."""
        raise CommandError(f"Node '{self.node.name}' preserves a point in time: it keeps its size")

    def size_now(self) -> int:
        """Return the size of the point in time; see Driver.size_now."""
        return self.node.size

    def reopen_apply(self, to: Reopening) -> None:
        """Change what gives way, and when; see Driver.reopen_apply."""
        self._before = (self.on_cbw_error, self.cbw_timeout_s)
        timeout = to.options.get("cbw-timeout")
        self.on_cbw_error = OnCbwError(to.options["on-cbw-error"])
        self.cbw_timeout_s = float(timeout) if isinstance(timeout, int) and timeout else None

    def reopen_undo(self) -> None:
        """See Driver.reopen_undo."""
        self.on_cbw_error, self.cbw_timeout_s = self._before

    def child_permissions(self, edge: Child, perm: int, shared: int) -> tuple[int, int]:
        """See fleecing.md 1.7, and 6.1 number 12: nobody else may write the target.

        Before the filter has parents it asks for nothing, so that it can be made while others
        write the source, and then be inserted.
        """
        if edge.name == "target":
            keep = perms.CONSISTENT_READ | perms.WRITE_UNCHANGED
            if self.node.file is not None and self._source() in perms.topological([edge.node]):
                # The target's backing chain leads to the source: not sharing writes of the target
                # would forbid those of the source.
                keep |= perms.WRITE
            return perms.WRITE | perms.CONSISTENT_READ, keep
        if not self.node.parents:
            return perm, shared
        return perm | perms.CONSISTENT_READ, shared & ~(perms.WRITE | perms.RESIZE)

    def forget_beginning(self) -> None:
        """Learn that nobody has seen the point in time, nor can have: all has been drained since.

        An overlay that is its target is as before, when the filter leaves now.
        """
        if self._overlay is not None:
            self._overlay.release()
            self._overlay = None

    # --- the guest's side --------------------------------------------------------------------

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Forward to `file`: reads of the live disk never wait for anything."""
        return self._source().read_now(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """Forward to `file`."""
        await self._source().read(offset, view)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Forward to `file`."""
        return await self._source().block_status(offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """Forward to `file`."""
        return await self._source().allocation_depth(offset, length)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Save what the write will overwrite, then write; see Driver.write.

        Raises:
            IoError: Under break-guest-write also when old data could not be saved; then `file` is
                unchanged.
        """
        if not fua:
            await self.write_replying(offset, data, None)
            return
        await self._before_write(offset, len(data))
        await self._source().write(offset, data, fua=True)

    def place(self, offset: int, length: int) -> Place | None:
        """Ask below, where nothing is to be saved; see Driver.place."""
        if self.error is None and self._states.uniform(*self._clusters(offset, length)) >= SETTLED:
            return self._source().place(offset, length)
        return None

    async def write_replying(self, offset: int, data: memoryview, reply: EarlyReply | None) -> None:
        """As `write`; see Driver.write_replying. What follows `reply` releases claims, no more."""
        if (
            self.error is None
            and not self.cbw_timeout_s
            and await self._save_then_write(offset, data, reply)
        ):
            return
        await self._before_write(offset, len(data))
        await self._source().write_replying(offset, data, reply)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Save, then forward; see `write`."""
        await self._before_write(offset, length)
        await self._source().write_zeroes(
            offset, length, fua=fua, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        """Save, then forward, even if `file` will ignore it; see `write`."""
        await self._before_write(offset, length)
        await self._source().discard(offset, length)

    async def flush(self) -> None:
        """Flush `file` only: what is in `target` does not outlive the process."""
        await self._source().flush()

    async def _before_write(self, offset: int, length: int) -> None:
        """Return when the range may change: saved, or the snapshot given up."""
        if self.error is None:
            first, last = self._clusters(offset, length)
            if self._states.uniform(first, last) < SETTLED:
                try:
                    if self.cbw_timeout_s:
                        await self._save_in_time(first, last, self.cbw_timeout_s)
                    else:
                        await self._save(first, last)
                except IoError as error:
                    if self.error is None:
                        self._give_way(error)
        if self.error is not None and self._frozen:
            # It cannot wait for itself: a frozen read is a read of `file` and ends by itself.
            await self._frozen.wait_clear(offset, length)

    def _give_way(self, error: IoError) -> None:
        """Apply `on_cbw_error` to a failed copy.

        Raises:
            IoError: `error`, when the guest's write is to fail.
        """
        if self.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE:
            self.refused.publish(error)
            raise error
        if self.error is None:
            self.error = error
            if self._overlay is not None:
                self._overlay.cut(f"old data could not be saved: {error}")
            self.broken.publish(error)

    # --- saving ----------------------------------------------------------------------------

    async def _save_then_write(
        self, offset: int, data: memoryview, reply: EarlyReply | None
    ) -> bool:
        """Save and write in one hop to a thread, where both nodes are plain files.

        `reply`, if given, may have been sent when it is True.

        Returns:
            False when this way is not open here; nothing has been done then but what `_save` will
            find done.

        At depth 1 a hop is most of the time of a write. The plain form of this is `_before_write`
        and then a write; the random histories run both.
        """
        first, last = self._clusters(offset, len(data))
        state = self._states.uniform(first, last)
        if state >= SETTLED or len(data) > COPY_PIECE:
            return False
        source, target = self._source(), self._target()
        source_file, target_file = source.plain_file(), target.plain_file()
        if source_file is None or target_file is None or target.bitmaps:
            return False
        claims = [(first, last)] if state == UNCOPIED else self._claimable(first, last)
        saves = self._plan_saves(claims, source_file)
        if not saves:
            return False
        size = 0
        for _, old, _, _, _ in saves:
            size += old if isinstance(old, int) else len(old)
        try:
            self._reserve(size)
        except IoError as error:
            self._unclaim(claims)
            self._wake_moved()
            self._give_way(error)
            return False
        if source.bitmaps:
            if reply is None:
                source.mark_before(offset, len(data))
            else:
                source.mark_early(offset, len(data))
        has_reached_source = True
        try:
            await source_file.save_then_write(
                target_file, saves, self._save_states, offset, data, reply
            )
        except SaveError as error:
            has_reached_source = False
            self.saved_bytes -= self._unclaim(claims)
            self._give_way(
                IoError.from_os(
                    error.error, f"node '{self.node.name}': saving {size} bytes before {offset}"
                )
            )
            return False
        except BaseException:  # the claims of a fault of ours would keep all others waiting
            self.saved_bytes -= self._unclaim(claims)
            raise
        finally:
            if source.bitmaps and has_reached_source:
                source.mark(offset, len(data))
            self._wake_moved()
            self._give_back_zeroes(saves)
        return True

    def _claimable(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the runs that are UNCOPIED; none while another copier is at work here."""
        runs = self._states.runs(first, last)
        if any(state == MOVING for _, _, state in runs):
            return []
        return [(start, end) for start, end, state in runs if state == UNCOPIED]

    def _plan_saves(self, claims: list[tuple[int, int]], source_file: FileIo) -> list[Save] | None:
        """Claim the runs and read what is cached of them; None when the way is not open."""
        spans = []
        for first, last in claims:
            span = self._states.span(first, last)
            if span is None:
                return None
            spans.append(span)
        read: list[tuple[Save, bool]] = []
        for (first, last), (page, start, stop) in zip(claims, spans, strict=True):
            offset, length = self._bytes(first, last)
            old = bytearray(length)
            cached = source_file.read_now(offset, memoryview(old))
            # The first byte decides nearly always.
            is_zero = cached and not old[0] and self._zero_is_free and old == bytes(length)
            read.append(((offset, old if cached else length, page, start, stop), is_zero))
        saves: list[Save] = []
        for save, is_zero in read:  # nothing can fail any more
            _, _, page, start, stop = save
            page[start:stop] = bytes((ALL_ZERO if is_zero else MOVING,)) * (stop - start)
            if not is_zero:
                saves.append(save)
        return saves

    async def _save(self, first: int, last: int) -> None:
        """Return when every cluster in [first, last) is settled.

        Claims what nobody has claimed; waits for the claims of others, and takes over those that
        fail. Copies of one call run one after another.

        Raises:
            IoError: A copy of this call failed; its cluster is UNCOPIED again.
        """
        states = self._states
        while True:
            start = states.find(UNCOPIED, first, last)
            if start >= 0:
                end = states.run_end(start, last)
                states.fill(start, end, MOVING)
                try:
                    await self._copy(start, end)
                finally:
                    self._unclaim([(start, end)])
                    self._wake_moved()
            elif states.find(MOVING, first, last) >= 0:
                # Cannot wait for itself: this call holds no claim here.
                waiter = asyncio.get_running_loop().create_future()
                self._moved_waiters.append(waiter)
                await waiter
            else:
                return

    async def _save_in_time(self, first: int, last: int, timeout_s: float) -> None:
        """As `_save`, for at most `timeout_s` seconds; then the copies go on in the background.

        Raises:
            IoError: ETIMEDOUT, or as `_save`.
        """
        loop = asyncio.get_running_loop()
        work = background(self._save_counted(first, last))
        waiter: asyncio.Future[None] = loop.create_future()

        def wake(_done: object = None) -> None:
            if not waiter.done():
                waiter.set_result(None)

        timer = loop.call_later(timeout_s, wake)
        work.add_done_callback(wake)
        await waiter
        timer.cancel()
        if not work.done():
            offset, length = self._bytes(first, last)
            raise IoError(errno.ETIMEDOUT, self._where("saving", offset, length))
        work.result()

    async def _save_counted(self, first: int, last: int) -> None:
        self.node.enter()  # it may outlive the guest's write: closing waits for it
        try:
            await self._save(first, last)
        finally:
            self.node.leave()

    async def _copy(self, first: int, last: int) -> None:
        """Settle a claimed run of clusters; zeroes of `file` are neither read nor written."""
        offset, length = self._bytes(first, last)
        end = offset + length
        while end - offset > COPY_PIECE:  # for less, reading it is as cheap as asking
            found = await self._source().block_status(offset, end - offset)
            self._check_whole()
            for extent in clip(found, offset, end - offset):
                # `offset` is at a border of clusters, inside this extent or behind it.
                if extent.flags & ZERO:
                    last_zero = extent.end if extent.end == end else self._align_down(extent.end)
                    if last_zero > offset:
                        await self._settle_zeroes(offset, last_zero)
                        offset = last_zero
                if extent.end > offset:  # data, or zeroes that end inside a cluster
                    stop = min(end, align_up(extent.end, self._cluster))
                    await self._copy_data(offset, stop)
                    offset = stop
        if offset < end:
            await self._copy_data(offset, end)

    async def _settle_zeroes(self, offset: int, end: int) -> None:
        if self._zero_is_free:
            self._settle(offset, end, ALL_ZERO)
            return
        await self._target().write_zeroes(
            offset, end - offset, fua=False, may_unmap=True, no_fallback=False
        )
        self._settle(offset, end, DONE)

    async def _copy_data(self, offset: int, end: int) -> None:
        """Copy [offset, end), whole clusters, in pieces."""
        target = self._target()
        while offset < end:
            # A cluster is settled as a whole, so it is copied as a whole.
            length = min(max(COPY_PIECE, self._cluster), end - offset)
            buffer = bytearray(length)
            view = memoryview(buffer)
            await self._read_old(offset, view)
            self._check_whole()
            for start, stop, is_zero in self._zero_runs(buffer):
                if is_zero:
                    self._settle(offset + start, offset + stop, ALL_ZERO)
                    continue
                self._reserve(stop - start)
                try:
                    await target.write(offset + start, view[start:stop], fua=False)
                except IoError:
                    self.saved_bytes -= stop - start
                    raise
                self._settle(offset + start, offset + stop, DONE)  # behind the write: B
            offset += length

    def _check_whole(self) -> None:
        """Check that what has just been read is old: that no guest has been let through (D).

        Raises:
            IoError: The snapshot error.
        """
        if self.error is not None:
            raise self.error

    async def _read_old(self, offset: int, view: memoryview) -> None:
        source = self._source()
        if not source.read_now(offset, view):
            await source.read(offset, view)

    def _zero_runs(self, buffer: bytearray) -> list[tuple[int, int, bool]]:
        """Split old data into (start, stop, is_zero) runs of whole clusters."""
        if not self._zero_is_free:
            return [(0, len(buffer), False)]
        runs: list[tuple[int, int, bool]] = []
        zeroes = bytes(self._cluster)
        for start in range(0, len(buffer), self._cluster):
            stop = min(start + self._cluster, len(buffer))
            # The first byte decides nearly always; the slice is a copy.
            is_zero = not buffer[start] and buffer[start:stop] == zeroes[: stop - start]
            if runs and runs[-1][2] == is_zero:
                runs[-1] = (runs[-1][0], stop, is_zero)
            else:
                runs.append((start, stop, is_zero))
        return runs

    def _reserve(self, size: int) -> None:
        """Account for old data that is about to be saved.

        Raises:
            IoError: ENOSPC over the limit; nothing is accounted then.
        """
        if self._temp_limit is not None and self.saved_bytes + size > self._temp_limit:
            raise IoError(
                errno.ENOSPC,
                f"node '{self.node.name}': saving {size} bytes over the limit of "
                f"{self._temp_limit}",
            )
        self.saved_bytes += size
        self.saved.publish(self.saved_bytes)

    def _settle(self, offset: int, end: int, state: int) -> None:
        self._states.fill(offset // self._cluster, ceil_div(end, self._cluster), state)
        self._wake_moved()

    def _give_back_zeroes(self, saves: list[Save]) -> None:
        """Take out of the account what turned out to be zeroes, when there is an account."""
        if not self._zero_is_free:
            return
        for offset, old, _, _, _ in saves:
            if not isinstance(old, int) and len(old) <= self._cluster:
                continue  # one cluster, looked at when it was read
            length = old if isinstance(old, int) else len(old)
            for first, last, state in self._states.runs(*self._clusters(offset, length)):
                if state == ALL_ZERO:
                    self.saved_bytes -= self._bytes(first, last)[1]

    def _unclaim(self, claims: list[tuple[int, int]]) -> int:
        """Give back what is still MOVING of a copier's own claims; return how many bytes."""
        given_back = 0
        for first, last in claims:
            for start, end, state in self._states.runs(first, last):
                if state == MOVING:
                    self._states.fill(start, end, UNCOPIED)
                    given_back += self._bytes(start, end)[1]
        return given_back

    def _wake_moved(self) -> None:
        if self._moved_waiters:
            waiters, self._moved_waiters = self._moved_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # --- the reader's side ---------------------------------------------------------------------

    def has_point_in_time(self) -> bool:
        """Say yes: this is what the filter is for."""
        return True

    def snapshot_read_now(self, offset: int, view: memoryview) -> bool:
        """Read the point in time from the page cache; see Driver.snapshot_read_now.

        No look afterwards is needed: claims are made in this thread, so nobody writes to a cluster
        that is UNCOPIED while this runs.
        """
        if self.error is not None:
            return False
        cluster = self._cluster
        length = len(view)
        first, last = offset // cluster, -(-(offset + length) // cluster)
        state = self._states.uniform(first, last)
        if state == UNCOPIED:
            return self._source().read_now(offset, view)
        if state == DONE:
            return self._target().read_now(offset, view)
        end = offset + length
        for start, stop, state in self._states.runs(first, last):
            part_offset = max(offset, start * cluster)
            part = view[part_offset - offset : min(end, stop * cluster) - offset]
            if state == UNCOPIED:
                ready = self._source().read_now(part_offset, part)
            elif state == DONE:
                ready = self._target().read_now(part_offset, part)
            elif state == ALL_ZERO:
                part[:] = bytes(len(part))
                ready = True
            else:
                ready = False
            if not ready:
                return False
        return True

    async def snapshot_read(self, offset: int, view: memoryview) -> None:
        """Read the point in time; see Driver.snapshot_read.

        Raises:
            IoError: EACCES when any byte is not readable, or the snapshot is broken (a client is
                told EIO then).
        """
        self._check_readable(offset, len(view))
        end = offset + len(view)
        position = offset
        while position < end:
            self._check_readable(position, end - position)
            stop, state = self._run(position, end)
            part = view[position - offset : stop - offset]
            if state == ALL_ZERO:
                part[:] = bytes(len(part))
            elif state == DONE:
                # What is cached comes at once, also while the target's threads are stuck.
                if not self._target().read_now(position, part):
                    await self._target().read(position, part)
                self._check_readable(position, stop - position, broken_too=False)
            else:
                stop = await self._read_unsaved(position, part)
            position = stop

    async def _read_unsaved(self, offset: int, view: memoryview) -> int:
        """Read from `file` what is not saved yet, and look at the states again (C).

        Returns:
            The end of what is right; the rest has been overwritten meanwhile, and is saved.
        """
        source = self._source()
        if not source.read_now(offset, view):
            frozen = self._frozen.add(offset, len(view))
            try:
                await source.read(offset, view)
            finally:
                self._frozen.remove(frozen)
        self._check_readable(offset, len(view), broken_too=False)
        return self._unsaved_end(offset, len(view))

    async def snapshot_block_status(self, offset: int, length: int) -> list[Extent]:
        """Say what the point in time holds; see Driver.snapshot_block_status.

        Raises:
            IoError: EACCES when any byte of the range is not readable, or the snapshot is broken.
        """
        self._check_readable(offset, length)
        end = offset + length
        extents: list[Extent] = []
        position = offset
        for _ in range(_STATUS_RUNS):
            if position >= end:
                break
            stop, state = self._run(position, end)
            if state == ALL_ZERO:
                extents.append(Extent(position, stop - position, HOLE | ZERO))
            elif state == DONE:
                # Allocated whatever the target says: it is not to be looked up anywhere else.
                extents.append(Extent(position, stop - position, DATA))
            else:
                found = await self._unsaved_status(position, stop - position)
                self._check_readable(offset, length)
                if not found:
                    continue  # saved meanwhile: look at the states again
                extents.extend(found)
                stop = found[-1].end
            position = stop
        return merge(extents)

    async def _unsaved_status(self, offset: int, length: int) -> list[Extent]:
        """Return what `file` says of a run, as far as it is still not saved afterwards."""
        found = clip(await self._source().block_status(offset, length), offset, length)
        return clip(found, offset, self._unsaved_end(offset, length) - offset)

    def held(self, offset: int, length: int) -> list[Extent]:
        """Return which parts of the range are in `target` (HELD) or given up (GIVEN_UP).

        For people: it may be out of date when it is looked at. From `offset` on, without gaps; may
        end before the range.
        """
        end = offset + length
        extents: list[Extent] = []
        while offset < end and len(extents) < _STATUS_RUNS:
            stop, state = self._run(offset, end)
            extents.append(Extent(offset, stop - offset, _HELD_FLAGS.get(state, 0)))
            offset = stop
        return merge(extents)

    async def snapshot_discard(self, offset: int, length: int) -> None:
        """Give up whole clusters inside the range; reads there fail from now on.

        Later guest writes there cost nothing. Less than a cluster: nothing happens.
        """
        end = offset + length
        first = ceil_div(offset, self._cluster)
        last = len(self._states) if end == self.node.size else end // self._cluster
        if first >= last:
            return
        while self._states.find(MOVING, first, last) >= 0:
            waiter = asyncio.get_running_loop().create_future()
            self._moved_waiters.append(waiter)
            await waiter
        self._states.fill(first, last, GONE)
        start, size = self._bytes(first, last)
        await self._target().discard(start, size)

    def _check_readable(self, offset: int, length: int, *, broken_too: bool = True) -> None:
        if broken_too and self.error is not None:
            raise IoError(
                errno.EACCES,
                f"node '{self.node.name}': the snapshot is broken ({self.error})",
                wire_errno=errno.EIO,
                public=f"the snapshot is broken: {strerror(self.error.errno)}",
            )
        if self._states.find(GONE, *self._clusters(offset, length)) >= 0:
            raise IoError(errno.EACCES, self._where("snapshot read", offset, length))

    def _check_overlay(self, offset: int, length: int) -> None:
        """Check that what `file` holds may be seen through the target's backing (fleeced_backing).

        Raises:
            IoError: Some of it is not preserved, and may have been overwritten.
        """
        end = min(offset + length, self.node.size)
        if offset < end:
            self._check_readable(offset, end - offset)

    # --- arithmetic ----------------------------------------------------------------------------

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Return the clusters [first, last) that the range touches."""
        return offset // self._cluster, -(-(offset + length) // self._cluster)

    def _bytes(self, first: int, last: int) -> tuple[int, int]:
        """Return (offset, length) of clusters [first, last), cut at the end of the node."""
        offset = first * self._cluster
        return offset, min(last * self._cluster, self.node.size) - offset

    def _run(self, offset: int, end: int) -> tuple[int, int]:
        """Return (end in bytes, state) of the run of equal states at `offset`, at most to `end`."""
        stop, state = self._states.run(offset // self._cluster, ceil_div(end, self._cluster))
        return min(stop * self._cluster, end), state

    def _unsaved_end(self, offset: int, length: int) -> int:
        """Return where, in bytes, the part of the range that is still in `file` alone ends."""
        index, last = self._clusters(offset, length)
        while index < last:
            end, state = self._states.run(index, last)
            if state not in (UNCOPIED, MOVING):
                break
            index = end
        # The first cluster may begin before the range.
        return min(max(index * self._cluster, offset), offset + length)

    def _has_saved(self) -> bool:
        """Tell whether anything has been saved, or is being saved."""
        count = len(self._states)
        return any(self._states.find(state, 0, count) >= 0 for state in (MOVING, DONE, ALL_ZERO))

    def _align_down(self, offset: int) -> int:
        return offset - offset % self._cluster

    def _sample(self, bitmap: DirtyBitmap, size: int) -> None:
        """Make everything GONE that is not dirty in `bitmap`, rounded outwards."""
        bitmap.check_usable(to_change=False)
        if bitmap.size != size:
            raise CommandError(f"Bitmap '{bitmap.name}' has another size than the source")
        self._states.fill(0, len(self._states), GONE)
        for offset, length in bitmap.dirty_ranges():
            self._states.fill(*self._clusters(offset, length), UNCOPIED)

    def _source(self) -> Node:
        edge = self.node.file
        assert edge is not None, "copy-before-write has a file child"
        return edge.node

    def _target(self) -> Node:
        return self.node.child("target").node
