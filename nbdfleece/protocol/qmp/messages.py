"""QMP messages: requests in; greeting, return, error and event out.

Follows: QEMU docs/interop/qmp-spec and qapi/qmp-dispatch.c, whose words the errors use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError

if TYPE_CHECKING:
    from nbdfleece.protocol.qmp.values import Json

_MEMBERS: Final = ("execute", "arguments", "id")


class _Absent:
    """Stands for an `id` that was not given: null is a valid one."""


ABSENT: Final = _Absent()


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request; its arguments have not been checked."""

    execute: str
    arguments: Mapping[str, Json]


def request_id(message: Mapping[str, Json]) -> Json | _Absent:
    """Return the id that the answer must carry; there may be one even in a bad request."""
    return message.get("id", ABSENT)


def parse_request(message: Mapping[str, Json]) -> Request:
    """Return the request in `message`.

    Raises:
        CommandError: It is none.
    """
    execute = message.get("execute")
    if "execute" in message and not isinstance(execute, str):
        raise CommandError("QMP input member 'execute' must be a string")
    arguments = message.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise CommandError("QMP input member 'arguments' must be an object")
    for name in message:
        if name not in _MEMBERS:
            raise CommandError(f"QMP input member '{name}' is unexpected")
    if not isinstance(execute, str):
        raise CommandError("QMP input lacks member 'execute'")
    return Request(execute, arguments)


def greeting(version: Json) -> Json:
    """Return the first message of a monitor."""
    return {"QMP": {"version": version, "capabilities": []}}


def success(value: Json, identity: Json | _Absent) -> Json:
    """Return the answer of a command that is done."""
    return _with_id({"return": value}, identity)


def failure(
    qmp_class: str, text: str, identity: Json | _Absent, *, reason: str | None = None
) -> Json:
    """Return the answer of a command that failed.

    Args:
        qmp_class: QEMU's error class.
        text: One line for people.
        identity: The id of the request.
        reason: Our own sorting, for programs: `not-found`, `in-use`, ... QEMU has no such member.
    """
    error = {"class": qmp_class, "desc": text}
    if reason is not None:
        error["reason"] = reason
    return _with_id({"error": error}, identity)


def event(name: str, data: Mapping[str, Json], *, microseconds: int) -> Json:
    """Return an event; `microseconds` is when it happened, since the epoch."""
    seconds, rest = divmod(microseconds, 1_000_000)
    message: dict[str, Json] = {"timestamp": {"seconds": seconds, "microseconds": rest}}
    message["event"] = name
    if data:
        message["data"] = data
    return message


def _with_id(answer: dict[str, Json], identity: Json | _Absent) -> Json:
    if not isinstance(identity, _Absent):
        answer["id"] = identity
    return answer
