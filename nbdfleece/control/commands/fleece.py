"""Commands of our own: disks, snapshots, clients, and the daemon's state as `status` shows it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.base.extent import HOLE, ZERO
from nbdfleece.control.command import Command, uris
from nbdfleece.control.transaction import Action, ActionKind, between_transactions
from nbdfleece.fleece.errors import NotBuilt
from nbdfleece.fleece.location import make_location
from nbdfleece.fleece.map import DIRTY, GONE, SAVED
from nbdfleece.fleece.snapshot import SnapshotOptions, on_error_policy
from nbdfleece.protocol.qmp.schema import SIZE, Array, Boolean, Enum, Number, String, Struct

if TYPE_CHECKING:
    from nbdfleece.base.extent import Extent
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.fleece.disk import Disk
    from nbdfleece.fleece.fleece import Taken
    from nbdfleece.fleece.snapshot import Snapshot
    from nbdfleece.fleece.taking import Taking
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json
    from nbdfleece.server.session import Session

_NOTHING: Final = Struct()
_SWITCH: Final = {True: "on", False: "off"}


# --- disks ---------------------------------------------------------------------------------------


async def _disk_add(context: Context, arguments: Arguments) -> Json:
    """Serve another disk: open it and export it under its name."""
    options: dict[str, str] = {}
    for name in ("format", "discard", "cache", "reconnect-delay", "open-timeout"):
        if name in arguments:
            options[name] = arguments.string(name)
    for name in ("read-only", "locking"):
        if name in arguments:
            options[name] = _SWITCH[arguments.boolean(name, default=False)]
    disk = arguments.optional_string("disk")
    location = make_location(disk, arguments.string("location"), options)
    return _disk(await context.fleece.add_disk(location))


async def _disk_remove(context: Context, arguments: Arguments) -> Json:
    """Stop serving a disk; with `force` also under clients and snapshots."""
    force = arguments.boolean("force", default=False)
    await context.fleece.remove_disk(arguments.string("disk"), force=force)
    return {}


async def _query_disks(context: Context, _arguments: Arguments) -> Json:
    """List the disks."""
    return [_disk(disk) for disk in context.fleece.disks()]


def _disk(disk: Disk) -> Json:
    facts = disk.facts()
    return {
        "disk": facts.disk,
        "location": facts.location,
        "format": "qcow2" if disk.location.is_qcow2 else "raw",
        "size": facts.size,
        "read-only": facts.read_only,
        "export": facts.export,
        "node-name": facts.node_name,
        "snapshots": facts.snapshots,
        "clients": facts.clients,
    }


async def _query_map(context: Context, arguments: Arguments) -> Json:
    """Tell what a disk or snapshot holds where, from `offset` on; `next`: ask again from there.

    `zero` reads as zeroes, `data` takes space; of a snapshot, `saved` is the old data that it holds
    itself, and what is not `readable` has been given up; with `bitmap`, `dirty` has been written.
    """
    found = await context.fleece.map(
        arguments.string("disk"),
        arguments.optional_string("snapshot"),
        arguments.optional_string("bitmap"),
        offset=arguments.optional_integer("offset") or 0,
    )
    answer: dict[str, Json] = {
        "size": found.size,
        "extents": [_mapped(extent, arguments) for extent in found.extents],
    }
    if found.end < found.size:
        answer["next"] = found.end
    return answer


def _mapped(extent: Extent, arguments: Arguments) -> Json:
    answer: dict[str, Json] = {
        "start": extent.offset,
        "length": extent.length,
        "data": not extent.flags & HOLE,
        "zero": bool(extent.flags & ZERO),
    }
    if "snapshot" in arguments:
        answer["saved"] = bool(extent.flags & SAVED)
        answer["readable"] = not extent.flags & GONE
    if "bitmap" in arguments:
        answer["dirty"] = bool(extent.flags & DIRTY)
    return answer


# --- snapshots -----------------------------------------------------------------------------------


async def _snapshot_create(context: Context, arguments: Arguments) -> Json:
    """Take a snapshot of each disk, all at one instant, and export them."""
    async with between_transactions(context, wanted="bitmap" in arguments):
        made = await context.fleece.create_snapshots(
            arguments.strings("disks"),
            arguments.optional_string("name"),
            _snapshot_options(arguments),
            token_s=arguments.optional_number("token"),
        )
    return [_created(context, taken) for taken in made]


class _SnapshotCreate(Action):
    """As `_snapshot_create`, in a transaction; no tokens, which a transaction cannot return."""

    _taking: Taking | None = None
    _is_committed = False

    def nodes(self) -> list[Node]:
        """See Action.nodes."""
        return [] if self._taking is None else self._taking.tops()

    async def begin(self) -> None:
        """See Action.begin."""
        fleece, arguments = self.context.fleece, self.arguments
        options = _snapshot_options(arguments)
        await self.transaction.lock(fleece.changing)
        name = arguments.optional_string("name")
        self._taking = fleece.take(arguments.strings("disks"), name, options)
        await self._taking.prepare()

    async def prepare(self) -> None:
        """See Action.prepare."""
        assert self._taking is not None, "it has begun"
        await self.transaction.quieten(self)
        await self._taking.engage()
        try:
            await self._taking.expose()
        except BaseException:
            await self._taking.withdraw()
            raise

    def commit(self) -> None:
        """See Action.commit."""
        assert self._taking is not None, "it has begun"
        self.context.fleece.adopt(self._taking)
        self._is_committed = True

    async def abort(self) -> None:
        """See Action.abort."""
        assert self._taking is not None, "it has begun"
        await self._taking.withdraw()

    async def clean(self) -> None:
        """See Action.clean."""
        if self._taking is not None and self._is_committed:
            await self._taking.keep()
        elif self._taking is not None:
            await self._taking.discard()


def _snapshot_options(arguments: Arguments) -> SnapshotOptions:
    """Return how snapshots are to behave.

    Raises:
        NotBuilt: They cannot do that.
        CommandError: Some exclude each other.
    """
    if arguments.optional_string("durability") == "power":
        raise NotBuilt("durability 'power' is not built yet")
    if "expire" in arguments:
        raise NotBuilt("'expire' is not built yet")
    internal = arguments.boolean("internal", default=False)
    for name in ("on-error", "timeout", "temp-limit", "bitmap"):
        if internal and name in arguments:
            raise CommandError(f"'{name}' means nothing to an internal snapshot")
    return SnapshotOptions(
        on_error=on_error_policy(arguments.optional_string("on-error") or "break-snapshot"),
        timeout_s=arguments.optional_number("timeout") or None,
        temp_limit=arguments.optional_integer("temp-limit"),
        bitmap=arguments.optional_string("bitmap"),
        internal=internal,
    )


def _created(context: Context, taken: Taken) -> Json:
    snapshot = taken.snapshot
    answer: dict[str, Json] = {
        "disk": snapshot.disk,
        "snapshot": snapshot.name,
        "export": snapshot.export_name,
        "node-name": snapshot.node_name,
        "instant": snapshot.instant,
    }
    if taken.token_export is not None:
        answer["token-export"] = taken.token_export
        answer["token-uris"] = list(uris(context.server, taken.token_export))
    return answer


async def _snapshot_delete(context: Context, arguments: Arguments) -> Json:
    """Give a snapshot up, `force`: also under its readers, `success`: its bitmap has been copied.

    Then only what has changed since the instant stays dirty; else nothing is forgotten.
    """
    await context.fleece.delete_snapshot(
        arguments.string("disk"),
        arguments.string("snapshot"),
        force=arguments.boolean("force", default=False),
        succeeded=arguments.boolean("success", default=False),
    )
    return {}


async def _query_snapshots(context: Context, arguments: Arguments) -> Json:
    """List the snapshots, of one disk or of all."""
    snapshots = context.fleece.snapshots(arguments.optional_string("disk"))
    return [await _described(snapshot) for snapshot in snapshots]


async def _described(snapshot: Snapshot) -> Json:
    facts = await snapshot.facts()
    answer: dict[str, Json] = {
        "disk": facts.disk,
        "snapshot": facts.snapshot,
        "export": facts.export,
        "node-name": facts.node_name,
        "instant": facts.instant,
        "size": facts.size,
        "saved-bytes": facts.saved_bytes,
        "temp-bytes": facts.temp_bytes,
        "state": "ok" if facts.error is None else "broken",
    }
    if facts.error is not None:
        answer["error"] = facts.error
    answer |= {
        "readers": facts.readers,
        "durability": facts.durability,
        "on-error": facts.on_error,
    }
    if facts.timeout_s is not None:
        answer["timeout"] = facts.timeout_s
    if facts.temp_limit is not None:
        answer["temp-limit"] = facts.temp_limit
    if facts.bitmap is not None:
        answer["bitmap"] = facts.bitmap
    return answer


# --- clients and the daemon ----------------------------------------------------------------------


async def _query_clients(context: Context, _arguments: Arguments) -> Json:
    """List who is connected."""
    return [_client(session) for session in context.server.sessions.values()]


def _client(session: Session) -> Json:
    answer: dict[str, Json] = {"id": session.id, "peer": session.peer}
    if session.identity_name:
        answer["identity"] = session.identity_name
    if session.tls:
        answer["tls"] = session.tls
    answer["seconds"] = int(session.age_s)
    if session.export is not None:
        answer["export"] = session.export.options.name
    pump = session.pump
    if pump is not None:
        answer |= {
            "requests": pump.requests,
            "in-flight": pump.in_flight,
            "bytes-read": pump.bytes_read,
            "bytes-written": pump.bytes_written,
        }
    return answer


async def _client_kick(context: Context, arguments: Arguments) -> Json:
    """Disconnect a client at once; it may come back."""
    number = arguments.integer("id")
    session = context.server.sessions.get(number)
    if session is None:
        raise NotFound(f"there is no client {number}")
    session.abort("kicked by an administrator")
    return {}


async def _query_status(context: Context, _arguments: Arguments) -> Json:
    """Tell what `nbdfleece status` shows of the daemon itself."""
    space = await context.fleece.temp_space()
    listeners = context.server.listeners
    names = [disk.name for disk in context.fleece.disks()]
    names += [snapshot.export_name for snapshot in context.fleece.snapshots()]
    credentials = context.server.credentials
    answer: dict[str, Json] = {
        "version": __version__,
        "pid": os.getpid(),
        "started": context.started,
        "listen": [listener.describe() for listener in listeners],
        "exports": [{"name": name, "uris": uris(context.server, name)} for name in names],
        "clients": len(context.server.sessions),
        "temp": {"path": space.path, "free": space.free, "total": space.total},
        "warnings": [] if credentials is None else credentials.warnings(),
        "expired": [] if credentials is None else credentials.warnings(ahead=timedelta()),
    }
    if credentials is not None:
        answer["tls"] = {
            "path": str(credentials.folder),
            "expires": [
                {
                    "file": expiry.file,
                    "subject": expiry.subject,
                    "time": expiry.ends.isoformat().replace("+00:00", "Z"),
                }
                for expiry in credentials.expiries
            ],
        }
    return answer


_SNAPSHOT: Final = Struct(
    {"disks": Array(String())},
    {
        "name": String(),
        "temp-limit": SIZE,
        "bitmap": String(),
        "on-error": Enum(("break-snapshot", "break-guest-write")),
        "timeout": Number(low=0),
        "durability": Enum(("process", "power")),
        "expire": Number(low=0),
        "internal": Boolean(),
    },
)
SNAPSHOT_CREATE: Final = ActionKind("fleece-snapshot-create", _SNAPSHOT, _SnapshotCreate)

COMMANDS: Final = (
    Command(
        "fleece-disk-add",
        Struct(
            {"location": String()},
            {
                "disk": String(),
                "format": Enum(("raw", "qcow2")),
                "read-only": Boolean(),
                "discard": Enum(("unmap", "ignore")),
                "cache": Enum(("writeback", "none")),
                "locking": Boolean(),
                "reconnect-delay": String(),
                "open-timeout": String(),
            },
        ),
        _disk_add,
    ),
    Command("fleece-disk-remove", Struct({"disk": String()}, {"force": Boolean()}), _disk_remove),
    Command("query-fleece-disks", _NOTHING, _query_disks),
    Command(
        "query-fleece-map",
        Struct({"disk": String()}, {"snapshot": String(), "bitmap": String(), "offset": SIZE}),
        _query_map,
    ),
    Command(
        "fleece-snapshot-create",
        Struct(_SNAPSHOT.required, {**_SNAPSHOT.optional, "token": Number(low=0)}),
        _snapshot_create,
    ),
    Command(
        "fleece-snapshot-delete",
        Struct(
            {"disk": String(), "snapshot": String()}, {"force": Boolean(), "success": Boolean()}
        ),
        _snapshot_delete,
    ),
    Command("query-fleece-snapshots", Struct(optional={"disk": String()}), _query_snapshots),
    Command("query-fleece-clients", _NOTHING, _query_clients),
    Command("fleece-client-kick", Struct({"id": SIZE}), _client_kick),
    Command("query-fleece-status", _NOTHING, _query_status),
)
