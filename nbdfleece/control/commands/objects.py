"""object-add and object-del: TLS credentials, authorization objects, throttle groups, iothreads.

An iothread does nothing here, as there is one event loop; it can be made and named because programs
do so.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError, ConfigError
from nbdfleece.block.throttle import MEMBERS
from nbdfleece.block.throttle_group import make_throttle_group
from nbdfleece.control.command import Command
from nbdfleece.control.objects import ClientCredentials, Object
from nbdfleece.protocol.qmp.schema import Array, Boolean, Enum, Integer, String, Struct, Union
from nbdfleece.server.authz import make_authz
from nbdfleece.server.tls import (
    CA_CERT,
    PSK_KEYS,
    SERVER_CERT,
    SERVER_KEY,
    TlsCredentials,
)

if TYPE_CHECKING:
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments, Type
    from nbdfleece.protocol.qmp.values import Json

Properties = Mapping[str, "Json"]

THROTTLE_GROUP: Final = "throttle-group"
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


async def _object_add(context: Context, arguments: Arguments) -> Json:
    """Make an object that other commands can name."""
    object_id, kind = arguments.string("id"), arguments.string("qom-type")
    if _ID.fullmatch(object_id) is None:
        raise CommandError("Parameter 'id' expects an identifier")
    context.objects.check_new(object_id)
    properties = {
        name: value for name, value in arguments.members.items() if name not in ("id", "qom-type")
    }
    try:
        if kind == THROTTLE_GROUP:
            _add_throttle_group(context, object_id, properties)
            return {}
        # It may read files.
        value = await asyncio.to_thread(_MAKERS[kind], kind, properties)
    except ConfigError as error:
        raise CommandError(str(error)) from error
    context.objects.add(Object(object_id, kind, value))
    return {}


async def _object_del(context: Context, arguments: Arguments) -> Json:
    """Forget an object that is not in use."""
    context.objects.remove(arguments.string("id"))
    return {}


def _add_throttle_group(context: Context, object_id: str, properties: Properties) -> None:
    """Make a throttle group, which is in use as long as it has members.

    Raises:
        CommandError: Its limits are wrong, or there is a group of that name.
    """
    groups = context.graph.throttle_groups
    group = make_throttle_group(groups, object_id, properties)
    let_go = partial(groups.remove, object_id)
    context.objects.add(Object(object_id, THROTTLE_GROUP, group, let_go=let_go))


def _make_authz(kind: str, properties: Properties) -> object:
    # Rules may have been given as a sequence of any kind; rule files know lists.
    rules = properties.get("rules")
    members: dict[str, object] = dict(properties)
    if isinstance(rules, list | tuple):
        members["rules"] = [dict(rule) for rule in rules if isinstance(rule, Mapping)]
    return make_authz(kind, members)


def _make_x509(_kind: str, properties: Properties) -> object:
    if properties.get("endpoint", "client") == "client":
        folder = _folder(properties, (CA_CERT,))
        return ClientCredentials(os.path.abspath(folder))
    return _credentials(
        properties,
        (CA_CERT, SERVER_CERT, SERVER_KEY),
        verify_peer=bool(properties.get("verify-peer", True)),
    )


def _make_psk(_kind: str, properties: Properties) -> object:
    return _credentials(properties, (PSK_KEYS,), verify_peer=True)


def _credentials(
    properties: Properties, files: tuple[str, ...], *, verify_peer: bool
) -> TlsCredentials:
    """Read the credentials of a server.

    Raises:
        CommandError: They are those of a client, or a file is not there.
        ConfigError: They are broken.
    """
    folder = _folder(properties, files)
    if properties.get("endpoint", "client") != "server":
        raise CommandError("only endpoint=server is there: our nodes have no pre-shared keys")
    return TlsCredentials(Path(folder), verify_peer=verify_peer)


def _folder(properties: Properties, files: tuple[str, ...]) -> str:
    """Return the folder that has been given.

    Raises:
        CommandError: There is none, or a file is not in it.
    """
    if "dir" not in properties:
        raise CommandError("Missing 'dir' property value")
    folder = str(properties["dir"])
    for name in files:
        try:
            Path(folder, name).open("rb").close()
        except OSError as error:
            raise CommandError(
                f"Unable to access credentials {folder}/{name}: {error.strerror}"
            ) from error
        except ValueError as error:  # a NUL in it, or half of a surrogate pair
            raise CommandError(f"Unable to access credentials: {folder!a} is no folder") from error
    return folder


def _make_nothing(_kind: str, _properties: Properties) -> object:
    return None


_MAKERS: Final[Mapping[str, Callable[[str, Properties], object]]] = {
    "authz-simple": _make_authz,
    "authz-list": _make_authz,
    "authz-list-file": _make_authz,
    "authz-listfile": _make_authz,
    "iothread": _make_nothing,
    "tls-creds-psk": _make_psk,
    "tls-creds-x509": _make_x509,
}

_VERDICT: Final = Enum(("deny", "allow"))
_RULE: Final = Struct({"match": String(), "policy": _VERDICT}, {"format": Enum(("exact", "glob"))})
_LIST_FILE: Final = Struct({"filename": String()}, {"refresh": Boolean()})
_LIMITS: Final[Type] = Struct(optional={name: Integer() for name in MEMBERS})
_LIMITS_X: Final[Mapping[str, Type]] = {f"x-{name}": Integer() for name in MEMBERS}
_CREDENTIALS: Final[Mapping[str, Type]] = {"endpoint": Enum(("client", "server")), "dir": String()}
_NUMBERS: Final = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")
_POOL: Final = ("thread-pool-min", "thread-pool-max")

COMMANDS: Final = (
    Command(
        "object-add",
        Union(
            "qom-type",
            Struct({"id": String()}),
            {
                "authz-simple": Struct({"identity": String()}),
                "authz-list": Struct(optional={"policy": _VERDICT, "rules": Array(_RULE)}),
                "authz-list-file": _LIST_FILE,
                "authz-listfile": _LIST_FILE,
                "iothread": Struct(optional={name: Integer() for name in (*_NUMBERS, *_POOL)}),
                THROTTLE_GROUP: Struct(optional={"limits": _LIMITS, **_LIMITS_X}),
                "tls-creds-psk": Struct(optional=_CREDENTIALS),
                "tls-creds-x509": Struct(
                    optional={
                        **_CREDENTIALS,
                        "verify-peer": Boolean(),
                        "sanity-check": Boolean(),
                    }
                ),
            },
        ),
        _object_add,
    ),
    Command("object-del", Struct({"id": String()}), _object_del),
)
