"""Commands about dirty bitmaps, as QEMU's; all but the hash are actions of transactions, too.

Their nodes are drained meanwhile: a write in flight would be in neither the old nor the new state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.block.bitmap import (
    DirtyBitmap,
    check_mergeable,
    check_storable,
    find_bitmap,
    find_node,
    new_bitmap,
)
from nbdfleece.control.command import Command
from nbdfleece.control.commands.general import NOTHING
from nbdfleece.control.commands.nodes import describe_bitmap
from nbdfleece.control.transaction import Action, ActionKind, Transaction
from nbdfleece.protocol.qmp.schema import (
    UINT32,
    Alternate,
    Arguments,
    Array,
    Boolean,
    String,
    Struct,
)

if TYPE_CHECKING:
    from nbdfleece.block.bitmap import Content
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.values import Json


class _BitmapAction(Action):
    """What actions on one bitmap share."""

    _bitmap: DirtyBitmap

    def nodes(self) -> list[Node]:
        """See Action.nodes."""
        node = self.context.graph.get(self.arguments.string("node"))
        return [] if node is None else [node]

    def _find(self) -> tuple[Node, DirtyBitmap]:
        """Return the node and the bitmap.

        Raises:
            NotFound: One of them is not there.
        """
        node = find_node(self.context.graph, self.arguments.string("node"))
        return node, find_bitmap(node, self.arguments.string("name"))

    async def _find_quiet(self) -> tuple[Node, DirtyBitmap]:
        """As `_find`, with the node drained until the transaction is over."""
        self._find()  # nobody is stopped for what is not there
        await self.transaction.quieten(self)
        return self._find()


class _Add(_BitmapAction):
    """Make a bitmap of a node. It records writes, unless `disabled`."""

    async def prepare(self) -> None:
        """See Action.prepare."""
        self._new()
        await self.transaction.quieten(self)
        self._node, self._bitmap = self._new()
        if self.arguments.boolean("persistent", default=False):
            await check_storable(self._node).keep(self._bitmap)
        self._node.bitmaps[self._bitmap.name] = self._bitmap

    async def abort(self) -> None:
        """See Action.abort."""
        del self._node.bitmaps[self._bitmap.name]
        if self._bitmap.persistent:
            await check_storable(self._node).forget(self._bitmap)

    def _new(self) -> tuple[Node, DirtyBitmap]:
        name = self.arguments.string("node")
        node = self.context.graph.get(name)
        if node is None:
            raise NotFound(f"Cannot find device='{name}' nor node-name='{name}'")
        bitmap = new_bitmap(
            node,
            self.arguments.string("name"),
            self.arguments.optional_integer("granularity"),
            enabled=not self.arguments.boolean("disabled", default=False),
        )
        if self.arguments.boolean("persistent", default=False):
            check_storable(node)
        return node, bitmap


class _Remove(_BitmapAction):
    """Forget a bitmap, wherever it is kept; an inconsistent one, too."""

    _is_committed = False

    async def prepare(self) -> None:
        """See Action.prepare."""
        self._find()[1].check_removable()
        self._node, self._bitmap = await self._find_quiet()
        self._bitmap.check_removable()
        del self._node.bitmaps[self._bitmap.name]

    def commit(self) -> None:
        """See Action.commit."""
        self._is_committed = True
        if self._bitmap.store is not None:
            # It records no more: if it cannot be deleted, it is not to be found again as good.
            self._bitmap.store.abandon("it was removed")

    async def abort(self) -> None:
        """See Action.abort."""
        self._node.bitmaps[self._bitmap.name] = self._bitmap

    async def clean(self) -> None:
        """See Action.clean."""
        if self._is_committed and self._bitmap.persistent:
            await check_storable(self._node).forget(self._bitmap)


class _Clear(_BitmapAction):
    """Make everything clean."""

    _taken: Content

    async def prepare(self) -> None:
        """See Action.prepare."""
        self._find()[1].check_usable(to_change=True)
        _, self._bitmap = await self._find_quiet()
        self._bitmap.check_usable(to_change=True)
        self._taken = self._bitmap.take()

    def commit(self) -> None:
        """See Action.commit."""
        self._bitmap.settle()

    async def abort(self) -> None:
        """See Action.abort."""
        self._bitmap.put_back(self._taken)


class _Switch(_BitmapAction):
    """Make a bitmap record writes, or not."""

    _enabled: bool
    _before: bool

    async def prepare(self) -> None:
        """See Action.prepare."""
        self._find()[1].check_usable(to_change=False)
        _, self._bitmap = await self._find_quiet()
        self._bitmap.check_not_owned()
        self._bitmap.check_usable(to_change=False)
        self._before, self._bitmap.enabled = self._bitmap.enabled, self._enabled

    def commit(self) -> None:
        """See Action.commit."""
        self._bitmap.settle()

    async def abort(self) -> None:
        """See Action.abort."""
        self._bitmap.enabled = self._before


class _Enable(_Switch):
    """Make a bitmap record writes from now on."""

    _enabled = True


class _Disable(_Switch):
    """Make a bitmap record no more writes; it keeps what it has."""

    _enabled = False


class _Merge(_BitmapAction):
    """Make dirty in `target` what is dirty in other bitmaps, which stay as they are."""

    _before: Content

    def nodes(self) -> list[Node]:
        """See Action.nodes; a write to the node of a source is not to be missed either."""
        given = self.arguments.members["bitmaps"]
        assert isinstance(given, Sequence), "checked by the schema"
        names = [str(item["node"]) for item in given if isinstance(item, Mapping)]
        found = [self.context.graph.get(name) for name in names]
        return [*super().nodes(), *(node for node in found if node is not None)]

    async def prepare(self) -> None:
        """See Action.prepare."""
        self._sources()
        await self.transaction.quieten(self)
        sources = self._sources()
        self._before = self._bitmap.copy()
        for source in sources:
            self._bitmap.unite(source)

    def _sources(self) -> list[DirtyBitmap]:
        """Find the target and return the sources.

        Raises:
            CommandError: One is not there, or may not be used.
        """
        graph = self.context.graph
        node = find_node(graph, self.arguments.string("node"))
        self._bitmap = find_bitmap(node, self.arguments.string("target"))
        self._bitmap.check_usable(to_change=True)
        given = self.arguments.members["bitmaps"]
        assert isinstance(given, Sequence), "checked by the schema"
        sources = []
        for item in given:
            if isinstance(item, Mapping):
                source = find_bitmap(find_node(graph, str(item["node"])), str(item["name"]))
            else:
                source = find_bitmap(node, str(item))
            check_mergeable(self._bitmap, source)
            sources.append(source)
        return sources

    def commit(self) -> None:
        """See Action.commit."""
        self._bitmap.settle()

    async def abort(self) -> None:
        """See Action.abort."""
        # Its store keeps what was added: a `clear` before this may have its content to put back.
        self._bitmap.put_back(self._before)


async def _sha256(context: Context, arguments: Arguments) -> Json:
    """Give the hash of a bitmap's content, for comparing bitmaps."""
    node = find_node(context.graph, arguments.string("node"))
    bitmap = find_bitmap(node, arguments.string("name"))
    if bitmap.inconsistent:
        raise CommandError(f"Bitmap '{bitmap.name}' is inconsistent and cannot be used")
    return {"sha256": bitmap.sha256()}


# --- of disks ------------------------------------------------------------------------------------


async def _fleece_add(context: Context, arguments: Arguments) -> Json:
    """Begin to record what is written to a disk; kept over a restart where that is possible."""
    node = context.fleece.disk(arguments.string("disk")).node
    more: dict[str, Json] = {"persistent": node.bitmap_keeper is not None}
    if "granularity" in arguments:
        more["granularity"] = arguments.integer("granularity")
    return await _on_disk(ADD, context, arguments, more)


async def _fleece_remove(context: Context, arguments: Arguments) -> Json:
    """Forget a bitmap of a disk."""
    return await _on_disk(REMOVE, context, arguments)


async def _fleece_clear(context: Context, arguments: Arguments) -> Json:
    """Forget what a bitmap of a disk has recorded so far."""
    return await _on_disk(CLEAR, context, arguments)


async def _on_disk(
    kind: ActionKind,
    context: Context,
    arguments: Arguments,
    more: Mapping[str, Json] = MappingProxyType({}),
) -> Json:
    """Carry out an action on the node of a disk."""
    node = context.fleece.disk(arguments.string("disk")).node
    data = {"node": node.name, "name": arguments.string("bitmap"), **more}
    (action,) = await Transaction(context).run([(kind, Arguments(kind.arguments, data))])
    return action.result


async def _query_fleece(context: Context, arguments: Arguments) -> Json:
    """List the bitmaps of one disk, or of all."""
    wanted = arguments.optional_string("disk")
    disks = context.fleece.disks() if wanted is None else [context.fleece.disk(wanted)]
    found: list[Json] = []
    for disk in disks:
        for bitmap in disk.node.bitmaps.values():
            if bitmap.name:
                about = dict(describe_bitmap(bitmap))
                found.append({"disk": disk.name, "bitmap": about.pop("name"), **about})
    return found


_BITMAP: Final = Struct({"node": String(), "name": String()})
_PREFIX: Final = "block-dirty-bitmap-"
BITMAP_OR_NAME: Final = Alternate("BlockDirtyBitmapOrStr", (String(), _BITMAP))

ADD: Final = ActionKind(
    _PREFIX + "add",
    Struct(
        {"node": String(), "name": String()},
        {"granularity": UINT32, "persistent": Boolean(), "disabled": Boolean()},
    ),
    _Add,
)
REMOVE: Final = ActionKind(_PREFIX + "remove", _BITMAP, _Remove)
CLEAR: Final = ActionKind(_PREFIX + "clear", _BITMAP, _Clear)
_MERGE: Final = Struct({"node": String(), "target": String(), "bitmaps": Array(BITMAP_OR_NAME)})

ACTIONS: Final = (
    ADD,
    REMOVE,
    CLEAR,
    ActionKind(_PREFIX + "enable", _BITMAP, _Enable),
    ActionKind(_PREFIX + "disable", _BITMAP, _Disable),
    ActionKind(_PREFIX + "merge", _MERGE, _Merge),
)

_OF_DISK: Final = Struct({"disk": String(), "bitmap": String()})

COMMANDS: Final = (
    Command(
        "fleece-bitmap-add",
        Struct(_OF_DISK.required, {"granularity": UINT32}),
        _fleece_add,
    ),
    Command("fleece-bitmap-remove", _OF_DISK, _fleece_remove),
    Command("fleece-bitmap-clear", _OF_DISK, _fleece_clear),
    Command("query-fleece-bitmaps", Struct(optional={"disk": String()}), _query_fleece),
    *(kind.command(NOTHING) for kind in ACTIONS),
    Command(
        "x-debug-block-dirty-bitmap-sha256",
        _BITMAP,
        _sha256,
        returns=Struct({"sha256": String()}),
        features=("unstable",),
    ),
)
