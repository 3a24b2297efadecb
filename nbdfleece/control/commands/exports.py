"""Commands about exports and the NBD server, as QEMU's.

Modes `hide` and `soft` of a removal are ours: QEMU names them as what might come. What belongs to a
disk or a snapshot is not removed here but with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, InUse
from nbdfleece.base.limits import MAX_STRING
from nbdfleece.control.command import Command
from nbdfleece.control.commands.bitmaps import BITMAP_OR_NAME
from nbdfleece.control.commands.general import NOTHING
from nbdfleece.control.transaction import between_transactions
from nbdfleece.fleece.io_limits import drop_unused_limits
from nbdfleece.protocol.qmp.schema import (
    UINT32,
    Array,
    Boolean,
    Enum,
    String,
    Struct,
    Union,
)
from nbdfleece.server.addresses import (
    Address,
    TcpAddress,
    UnixAddress,
    VsockAddress,
)
from nbdfleece.server.authz import Authz, AuthzList, AuthzListFile, AuthzSimple
from nbdfleece.server.export import ExportOptions
from nbdfleece.server.exports import RemoveMode, find_bitmaps
from nbdfleece.server.service import Terms
from nbdfleece.server.tls import TlsCredentials

if TYPE_CHECKING:
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.control.objects import Object
    from nbdfleece.protocol.qmp.schema import Arguments, Type
    from nbdfleece.protocol.qmp.values import Json

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_MAX_PORT: Final = 0xFFFF
_MAX_U32: Final = 0xFFFFFFFF
_NBD: Final = "nbd"


# --- exports -------------------------------------------------------------------------------------


async def _export_add(context: Context, arguments: Arguments) -> Json:
    """Offer a node to NBD clients."""
    async with between_transactions(context, wanted="bitmaps" in arguments):
        _offer(context, arguments)
    return {}


def _offer(context: Context, arguments: Arguments) -> None:
    export_id, node_name = arguments.string("id"), arguments.string("node-name")
    _check_id(context, export_id)
    node = context.graph.find(node_name)
    thread = _iothread(context, arguments.optional_string("iothread"))
    writable = arguments.boolean("writable", default=False)
    if writable and node.read_only:
        raise CommandError("Cannot export read-only node as writable")
    options = ExportOptions(
        id=export_id,
        name=_or(arguments.optional_string("name"), node_name),
        writable=writable,
        description=_or(arguments.optional_string("description"), ""),
        allocation_depth=arguments.boolean("allocation-depth", default=False),
        writethrough=arguments.boolean("writethrough", default=False),
    )
    _add(context, node, options, _bitmap_names(arguments))
    if thread is not None:
        _hold_while_exported(context, export_id, thread)


async def _server_add(context: Context, arguments: Arguments) -> Json:
    """Offer a node to NBD clients, under an export id that is its name."""
    async with between_transactions(context, wanted="bitmap" in arguments):
        _offer_device(context, arguments)
    return {}


def _offer_device(context: Context, arguments: Arguments) -> None:
    device = arguments.string("device")
    node = _node_of_device(context, device)
    name = _or(arguments.optional_string("name"), device)
    _check_id(context, name)
    options = ExportOptions(
        id=name,
        name=name,
        # As in QEMU: a node that cannot be written is offered read-only, whatever was asked for.
        writable=arguments.boolean("writable", default=False) and not node.read_only,
        description=_or(arguments.optional_string("description"), ""),
        allocation_depth=False,
    )
    _add(context, node, options, [arguments.string("bitmap")] if "bitmap" in arguments else [])


def _bitmap_names(arguments: Arguments) -> list[str | tuple[str, str]]:
    """Return `bitmaps`: names, or (node name, name)."""
    given = arguments.members.get("bitmaps", ())
    assert isinstance(given, Sequence), "checked by the schema"
    return [
        (str(item["node"]), str(item["name"])) if isinstance(item, Mapping) else str(item)
        for item in given
    ]


def _add(
    context: Context, node: Node, options: ExportOptions, bitmaps: list[str | tuple[str, str]]
) -> None:
    context.nbd.check_running()
    for what, text in (("export name", options.name), ("description", options.description)):
        if len(text.encode(errors="surrogateescape")) > MAX_STRING:
            raise CommandError(f"{what} '{text}' too long")
    context.exports.check_new(options)
    found = find_bitmaps(context.graph, node, bitmaps, writable=options.writable)
    context.exports.add(node, options, found)


async def _export_del(context: Context, arguments: Arguments) -> Json:
    """Offer a node no more; BLOCK_EXPORT_DELETED tells when it is let go."""
    return await _remove(context, arguments.string("id"), arguments.optional_string("mode"))


async def _server_remove(context: Context, arguments: Arguments) -> Json:
    """Offer a node no more, by the export id that nbd-server-add gave it."""
    return await _remove(context, arguments.string("name"), arguments.optional_string("mode"))


async def _remove(context: Context, export_id: str, word: str | None) -> Json:
    context.exports.get(export_id)
    for disk in context.fleece.disks():
        owned = {disk.name, *(snapshot.export_name for snapshot in disk.snapshots.values())}
        if export_id in owned:
            raise InUse(f"export '{export_id}' belongs to disk '{disk.name}' and goes with it")
    mode = RemoveMode(word or "safe")
    if mode is RemoveMode.HARD:
        context.exports.cut_off(export_id)
    else:
        await context.exports.remove(export_id, mode)
        await drop_unused_limits(context.graph)
    return {}


async def _query_exports(context: Context, _arguments: Arguments) -> Json:
    """List the exports, the latest first."""
    return [
        {
            "node-name": export.node.name,
            "shutting-down": export.is_closing,
            "type": _NBD,
            "id": export.options.id,
        }
        for export in reversed(list(context.exports))
    ]


def _check_id(context: Context, export_id: str) -> None:
    """Check that a new export may have this id.

    Raises:
        CommandError: It is not well-formed, or taken.
    """
    if _ID.fullmatch(export_id) is None:
        raise CommandError("Invalid block export id")
    if any(export.options.id == export_id for export in context.exports):
        raise CommandError(f"Block export id '{export_id}' is already in use")


def _or(given: str | None, default: str) -> str:
    """Return `given`, also where it is empty, or the default."""
    return default if given is None else given


def _node_of_device(context: Context, device: str) -> Node:
    for node in context.graph:
        if node.name == device:
            return node
    raise CommandError(f"Cannot find device='{device}' nor node-name='{device}'")


def _iothread(context: Context, object_id: str | None) -> Object | None:
    """Return the iothread of this id, of which all we do is keep it.

    Raises:
        CommandError: There is none.
    """
    if object_id is None:
        return None
    found = context.objects.find(object_id)
    if found is None or found.kind != "iothread":
        raise CommandError(f'iothread "{object_id}" not found')
    return found


def _hold_while_exported(context: Context, export_id: str, used: Object) -> None:
    used.users += 1

    def release(removed: str) -> None:
        if removed == export_id:
            used.users -= 1
            unsubscribe()

    unsubscribe = context.exports.removed.subscribe(release)


# --- the server ----------------------------------------------------------------------------------


async def _server_start(context: Context, arguments: Arguments) -> Json:
    """Let NBD clients connect."""
    context.nbd.check_stopped()
    credentials_id = arguments.optional_string("tls-creds")
    authz_id = arguments.optional_string("tls-authz")
    credentials = None if credentials_id is None else _credentials(context, credentials_id)
    authz = None if authz_id is None else _authz(context, authz_id)
    if authz is not None and credentials is None:
        # QEMU goes on, and asks nobody.
        raise CommandError("'tls-authz' needs 'tls-creds': without TLS nobody has a name")
    terms = Terms(credentials, authz, arguments.optional_integer("max-connections"))
    where = _address(arguments.members["addr"])
    used = [context.objects.find(name) for name in (credentials_id, authz_id) if name is not None]
    held = [found for found in used if found is not None]
    for found in held:
        found.users += 1

    def release() -> None:
        for found in held:
            found.users -= 1

    await context.nbd.start(where, terms, release)
    return {}


async def _server_stop(context: Context, _arguments: Arguments) -> Json:
    """Disconnect all NBD clients, remove all exports, and let nobody connect."""
    await context.nbd.stop()
    return {}


def _credentials(context: Context, object_id: str) -> TlsCredentials:
    found = context.objects.find(object_id)
    if found is None:
        raise CommandError(f"No TLS credentials with id '{object_id}'")
    if not found.kind.startswith("tls-creds-"):
        raise CommandError(f"Object with id '{object_id}' is not TLS credentials")
    if not isinstance(found.value, TlsCredentials):
        raise CommandError("Expected TLS credentials for a server endpoint")
    return found.value


def _authz(context: Context, object_id: str) -> Authz:
    found = context.objects.find(object_id)
    if found is None:
        raise CommandError(f"No authorization object with id '{object_id}'")
    if not isinstance(found.value, AuthzSimple | AuthzList | AuthzListFile):
        raise CommandError(f"Object with id '{object_id}' is not an authorization object")
    return found.value


def _address(value: Json) -> Address:
    """Return the address that a checked SocketAddressLegacy stands for.

    Raises:
        CommandError: It stands for none.
    """
    assert isinstance(value, Mapping), "checked by the schema"
    kind, data = value["type"], value["data"]
    assert isinstance(data, Mapping), "checked by the schema"
    if kind == "unix":
        return UnixAddress(str(data["path"]))
    if kind == "inet":
        host, port = str(data["host"]), str(data["port"])
        if not _is_number(port, _MAX_PORT):
            raise CommandError(
                f"address resolution failed for {host}:{port}: "
                "Servname not supported for ai_socktype"
            )
        return TcpAddress(host, int(port))
    if kind == "vsock":
        for member in ("cid", "port"):
            if not _is_number(str(data[member]), _MAX_U32):
                raise CommandError(f"Failed to parse {member} '{data[member]}'")
        return VsockAddress(int(str(data["cid"])), int(str(data["port"])))
    raise CommandError("only QEMU supports file descriptor passing")


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most


def _wrapped(**members: Type) -> Struct:
    return Struct({"data": Struct(members)})


_INET: Final = Struct(
    {"host": String(), "port": String()}, {"numeric": Boolean(), "keep-alive": Boolean()}
)
SOCKET_ADDRESS: Final = Union(
    "type",
    Struct(),
    {
        "inet": Struct({"data": _INET}),
        "unix": _wrapped(path=String()),
        "vsock": _wrapped(cid=String(), port=String()),
        "fd": _wrapped(str=String()),
    },
)
_MODE: Final = Enum(tuple(mode.value for mode in RemoveMode))
_EXPORTS: Final = Array(
    Struct(
        {"node-name": String(), "shutting-down": Boolean(), "type": Enum((_NBD,)), "id": String()}
    )
)

COMMANDS: Final = (
    Command(
        "block-export-add",
        Union(
            "type",
            Struct(
                {"id": String(), "node-name": String()},
                {
                    "fixed-iothread": Boolean(),
                    "iothread": String(),
                    "writable": Boolean(),
                    "writethrough": Boolean(),
                },
            ),
            {
                _NBD: Struct(
                    optional={
                        "name": String(),
                        "description": String(),
                        "bitmaps": Array(BITMAP_OR_NAME),
                        "allocation-depth": Boolean(),
                    }
                )
            },
        ),
        _export_add,
    ),
    Command("block-export-del", Struct({"id": String()}, {"mode": _MODE}), _export_del),
    Command("query-block-exports", NOTHING, _query_exports, returns=_EXPORTS),
    Command(
        "nbd-server-start",
        Struct(
            {"addr": SOCKET_ADDRESS},
            {"tls-creds": String(), "tls-authz": String(), "max-connections": UINT32},
        ),
        _server_start,
    ),
    Command("nbd-server-stop", NOTHING, _server_stop),
    Command(
        "nbd-server-add",
        Struct(
            {"device": String()},
            {
                "name": String(),
                "description": String(),
                "writable": Boolean(),
                "bitmap": String(),
            },
        ),
        _server_add,
        features=("deprecated",),
    ),
    Command(
        "nbd-server-remove",
        Struct({"name": String()}, {"mode": _MODE}),
        _server_remove,
        features=("deprecated",),
    ),
)
