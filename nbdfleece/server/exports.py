"""All exports: added, found, listed, removed.

Invariants
  R1  Ids are unique, and so are names; both are compared exactly.
  R2  An export that is being removed cannot be found by clients; its id is taken until it is gone.
  R3  While guests are stopped, no writable export begins a request, also not one that is new.
  R4  A bitmap that is offered is busy until its export is gone.
"""

from __future__ import annotations

import enum
import itertools
from functools import partial
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, InUse, NotFound, OptionRefused
from nbdfleece.base.limits import MAX_SIZE
from nbdfleece.base.notify import Notifier
from nbdfleece.block.bitmap import find_bitmap, find_in_chain, find_node
from nbdfleece.protocol.nbd.strings import decode
from nbdfleece.server.export import Export, ExportOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nbdfleece.block.bitmap import DirtyBitmap
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node
    from nbdfleece.protocol.nbd.haggle import ExportInfo


class RemoveMode(enum.Enum):
    """What happens to the clients of an export that is removed; values as in QMP.

    QEMU has the first two, and names the others as what might come.
    """

    SAFE = "safe"  # refuse while there are any
    HARD = "hard"  # disconnect them
    HIDE = "hide"  # let them go on, and wait until they have left
    SOFT = "soft"  # as HIDE, but answer all their further requests with NBD_ESHUTDOWN


class Exports:
    """The exports of one server. What of them a client may see is up to server.directory.

    Attributes:
        default_name: Name of the export that a client gets for the empty name, or None.
        removed: Tells the id of each export that is gone.
    """

    def __init__(self, graph: Graph) -> None:
        self.default_name: str | None = None
        self.removed: Notifier[str] = Notifier()
        self._graph = graph
        self._by_id: dict[str, Export] = {}
        self._by_name: dict[str, Export] = {}
        self._generations = itertools.count(1)
        self._stopped: set[Export] | None = None  # exports that are held; None: guests run

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._by_id.values()))

    # --- the control plane's side --------------------------------------------------------------

    def add(
        self,
        node: Node,
        options: ExportOptions,
        bitmaps: Sequence[DirtyBitmap] = (),
    ) -> Export:
        """Offer `node` to clients.

        Args:
            node: What.
            options: How.
            bitmaps: Offered as metadata contexts `qemu:dirty-bitmap:NAME`; `find_bitmaps` has
                found them, or they are frozen by the caller.

        Raises:
            CommandError: The id or the name is taken, a string is not one of the spec, the node is
                read-only but the export is not, or too large, or permissions conflict. Nothing
                has changed.
        """
        self.check_new(options)
        if node.size > MAX_SIZE:
            raise CommandError(f"node '{node.name}' is larger than clients can bear")
        export = Export(options, generation=next(self._generations), bitmaps=bitmaps)
        needed, shared = export.edge_permissions
        self._graph.attach_root("root", export, node, perm=needed, shared=shared)
        export.hold_bitmaps()
        self._by_id[options.id] = export
        self._by_name[options.name] = export
        self._stop(export)
        return export

    def get(self, export_id: str) -> Export:
        """Return the export with this id.

        Raises:
            NotFound: There is none.
        """
        export = self._by_id.get(export_id)
        if export is None:
            raise NotFound(f"Export '{export_id}' is not found")
        return export

    async def remove(self, export_id: str, mode: RemoveMode) -> None:
        """Offer an export no more, and let its node go.

        With HARD the connections are closed at once; this returns when the requests that they had
        begun have ended. With HIDE and SOFT it returns at once; the export is gone, and `removed`
        tells of it, when its last client has left. A further call may be of a harder mode.

        Raises:
            NotFound: There is none with this id.
            InUse: With SAFE: it has clients, or its removal is under way. Nothing has changed.

        Cancel: abandons the wait; with HARD the clients are gone, the id stays taken.
        """
        export = self.get(export_id)
        if mode is RemoveMode.SAFE and (export.is_used or export.is_closing):
            raise InUse(f"export '{export_id}' still in use")
        if not export.is_closing:
            export.is_closing = True
            del self._by_name[export.options.name]
        if mode is RemoveMode.SOFT:
            export.retire()
        if mode in (RemoveMode.HIDE, RemoveMode.SOFT) and export.is_used:
            export.when_unused = partial(self._forget, export)
            return
        export.is_cut_off = True
        for pump in list(export.pumps):
            pump.abort("the export is removed")
        await export.wait_unused()
        self._forget(export)

    def cut_off(self, export_id: str) -> None:
        """Offer an export no more and disconnect its clients, without waiting for requests.

        The export is gone, and `removed` tells of it, when those have ended; now, without any.

        Raises:
            NotFound: There is none with this id.
        """
        export = self.get(export_id)
        if not export.is_closing:
            export.is_closing = True
            del self._by_name[export.options.name]
        export.is_cut_off = True
        export.when_unused = partial(self._forget, export)
        for pump in list(export.pumps):
            pump.abort("the export is removed")
        if not export.is_used:
            self._forget(export)

    def _forget(self, export: Export) -> None:
        """Let go of an export that is not used any more. Idempotent: several may wait for that."""
        if export.root is None:
            return
        self._graph.detach_root(export.root)
        export.release_bitmaps()
        if self._stopped is not None:
            self._stopped.discard(export)
        del self._by_id[export.options.id]
        self.removed.publish(export.options.id)

    # --- guests --------------------------------------------------------------------------------

    @property
    def guests_are_stopped(self) -> bool:
        """Whether writable exports begin no requests."""
        return self._stopped is not None

    async def stop_guests(self) -> None:
        """Begin no request of a writable export until `let_guests_go`. Idempotent.

        Connections stay, and what clients send waits in their sockets. Returns when all that had
        begun has ended and is on stable storage.

        Raises:
            IoError: A disk cannot be flushed. Guests are stopped nevertheless.

        Cancel: guests are stopped; some of their requests may still be running.
        """
        if self._stopped is None:
            self._stopped = set()
            for export in self:
                self._stop(export)
        for export in list(self._stopped):
            await export.wait_idle()
            if export.root is not None:
                await export.node.flush()

    def let_guests_go(self) -> None:
        """Undo `stop_guests`. Idempotent."""
        held, self._stopped = self._stopped, None
        for export in held or ():
            export.drained_end()

    def _stop(self, export: Export) -> None:
        if self._stopped is not None and export.options.writable:
            self._stopped.add(export)
            export.drained_begin()

    def check_new(self, options: ExportOptions) -> None:
        """Check that an export with these options may be added, whatever the node.

        Raises:
            CommandError: Its text says why not.
        """
        if not options.id or options.id.startswith("#"):
            raise CommandError(f"Invalid block export id '{options.id}'")
        if options.id in self._by_id:
            raise CommandError(f"Block export id '{options.id}' is already in use")
        for what, text in (("name", options.name), ("description", options.description)):
            try:
                # Strings from a command line may hold bytes that are not UTF-8.
                decode(text.encode(errors="surrogateescape"), f"export {what}")
            except OptionRefused as refused:
                raise CommandError(f"export '{options.id}': {refused.text}") from refused
        if options.name in self._by_name:
            raise CommandError(f"NBD server already has export named '{options.name}'")

    # --- the clients' side ---------------------------------------------------------------------

    def named(self, name: str) -> Export | None:
        """Return the export of that name that clients may ask for, or None."""
        return self._by_name.get(name)

    def list(self) -> list[ExportInfo]:
        """Return all exports that clients may ask for."""
        return [export.describe() for export in self._by_name.values()]


def find_bitmaps(
    graph: Graph, node: Node, names: Iterable[str | tuple[str, str]], *, writable: bool
) -> list[DirtyBitmap]:
    """Return the bitmaps that an export of `node` is to offer, each once.

    Args:
        graph: Where the nodes are.
        node: What is exported.
        names: A name alone is looked for in the node and in what it shows (filtered, backing);
            (node name, bitmap name) in that node alone.
        writable: The export is.

    Raises:
        CommandError: One is not there, busy or inconsistent; or it would change under those who
            read it: it records writes of others than this export's clients.
    """
    bitmaps: list[DirtyBitmap] = []
    for name in names:
        if isinstance(name, str):
            found = find_in_chain(node, name)
            if found is None:
                raise NotFound(f"Bitmap '{name}' is not found")
            owner, bitmap = found
        else:
            owner = find_node(graph, name[0])
            bitmap = find_bitmap(owner, name[1])
        if bitmap in bitmaps:
            continue
        bitmap.check_usable(to_change=False)
        if not writable and not owner.read_only and bitmap.enabled:
            raise CommandError(f"Enabled bitmap '{bitmap.name}' incompatible with readonly export")
        if any(other.name == bitmap.name for other in bitmaps):
            raise CommandError(f"Two bitmaps are called '{bitmap.name}'")
        bitmaps.append(bitmap)
    return bitmaps
