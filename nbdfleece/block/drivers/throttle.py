"""Driver `throttle`: a filter that keeps requests to the limits of a throttle group.

Reads, writes, zero writes and discards wait for their turn; flushes and queries do not. In a
drained section nothing waits: what is in flight above would keep the section from beginning.

Follows: QEMU block/throttle.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nbdfleece.block.driver import Driver, Reopening
from nbdfleece.block.throttle import Direction
from nbdfleece.block.throttle_group import Member

if TYPE_CHECKING:
    from nbdfleece.base.extent import Extent
    from nbdfleece.block.node import Node
    from nbdfleece.block.throttle_group import ThrottleGroup, ThrottleGroups


class ThrottleDriver(Driver):
    """Driver `throttle`; child `file` with roles FILTERED and PRIMARY.

    Args:
        groups: Where `group` is from.
        group: Whose limits.

    Attributes:
        is_io_limit: `block_set_io_throttle` has put it where it is, and removes it.
    """

    name: ClassVar[str] = "throttle"
    is_filter: ClassVar[bool] = True
    changeable: ClassVar[frozenset[str]] = frozenset({"throttle-group"})

    def __init__(self, groups: ThrottleGroups, group: ThrottleGroup) -> None:
        self.is_io_limit = False
        self._groups = groups
        self._first_group = self._group_before = group
        self._member: Member | None = None

    @property
    def group(self) -> ThrottleGroup:
        """Whose limits hold."""
        return self._first_group if self._member is None else self._member.group

    def change_group(self, group: ThrottleGroup) -> None:
        """Keep to another group's limits from now on; what waits goes at once."""
        old = self._open_member.group
        self._open_member.move(group)
        self._groups.drop_unused(old)

    async def open(self) -> int:
        """Join the group; see Driver.open."""
        self._member = Member(self._first_group)
        return self._below().size

    async def close(self) -> None:
        """Leave the group; see Driver.close."""
        member = self._open_member
        self._first_group, self._member = member.group, None
        member.group.leave(member)
        self._groups.drop_unused(member.group)

    def reopen_apply(self, to: Reopening) -> None:
        """Change the group; see Driver.reopen_apply."""
        group = self._groups.find(str(to.options["throttle-group"]))
        self._group_before = self.group
        self._open_member.move(group)

    def reopen_undo(self) -> None:
        """Change it back; see Driver.reopen_undo."""
        self._open_member.move(self._group_before)

    async def reopen_finish(self) -> None:
        """Let go of the group that was left; see Driver.reopen_finish."""
        self._groups.drop_unused(self._group_before)

    def drain_begun(self) -> None:
        """Let all requests through; see Driver.drain_begun."""
        if self._member is not None:  # else the node was closed while somebody waited
            self._member.begin_to_let_through()

    def drain_ended(self) -> None:
        """Keep to the limits again; see Driver.drain_ended."""
        if self._member is not None:  # else the node was closed in the section
            self._member.end_to_let_through()

    # --- I/O -------------------------------------------------------------------------------

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Forward if it need not wait for its turn; what is not done is not counted."""
        member = self._open_member
        if not member.may_go(Direction.READ) or not self._below().read_now(offset, view):
            return False
        return member.admit_now(Direction.READ, len(view))

    async def read(self, offset: int, view: memoryview) -> None:
        """Wait, and forward."""
        await self._open_member.admit(Direction.READ, len(view))
        await self._below().read(offset, view)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Wait, and forward."""
        await self._open_member.admit(Direction.WRITE, len(data))
        await self._below().write(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Wait, and forward."""
        await self._open_member.admit(Direction.WRITE, length)
        await self._below().write_zeroes(
            offset, length, fua=fua, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        """Wait, and forward."""
        await self._open_member.admit(Direction.WRITE, length)
        await self._below().discard(offset, length)

    async def flush(self) -> None:
        """Forward."""
        await self._below().flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Forward."""
        return await self._below().block_status(offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[Extent]:
        """Forward."""
        return await self._below().allocation_depth(offset, length)

    # --- facts -----------------------------------------------------------------------------

    def cluster_size(self) -> int:
        """Return the child's."""
        return self._below().driver.cluster_size()

    def reads_zero_when_new(self) -> bool:
        """Tell what the child tells."""
        return self._below().driver.reads_zero_when_new()

    async def allocated_size(self) -> int | None:
        """Return the child's."""
        return await self._below().driver.allocated_size()

    @property
    def _open_member(self) -> Member:
        assert self._member is not None, "the throttle node is not open"
        return self._member

    def _below(self) -> Node:
        edge = self.node.file
        assert edge is not None, "throttle has a file child"
        return edge.node
