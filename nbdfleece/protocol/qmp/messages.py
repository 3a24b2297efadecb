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

OOB: Final = "oob"  # the capability to ask for out-of-band execution


class _Absent:
    """Stands for an `id` that was not given: null is a valid one."""


ABSENT: Final = _Absent()


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request; its arguments have not been checked.

    Attributes:
        execute: The command.
        arguments: Its arguments.
        out_of_band: It should run before those that were sent earlier.
    """

    execute: str
    arguments: Mapping[str, Json]
    out_of_band: bool = False


def request_id(message: Mapping[str, Json]) -> Json | _Absent:
    """Return the id that the answer must carry; there may be one even in a bad request."""
    return message.get("id", ABSENT)


def parse_request(message: Mapping[str, Json], *, oob: bool = False) -> Request:
    """Return the request in `message`.

    Args:
        message: The object that came.
        oob: The client has enabled out-of-band execution.

    Raises:
        CommandError: It is none.
    """
    verbs = ("execute", "exec-oob") if oob else ("execute",)
    given = [verb for verb in verbs if verb in message]
    for verb in given:
        if not isinstance(message[verb], str):
            raise CommandError(f"QMP input member '{verb}' must be a string")
    if len(given) > 1:
        raise CommandError("QMP input member 'execute' clashes with 'exec-oob'")
    arguments = message.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise CommandError("QMP input member 'arguments' must be an object")
    for name in message:
        if name not in _MEMBERS and name not in verbs:
            raise CommandError(f"QMP input member '{name}' is unexpected")
    if not given:
        raise CommandError("QMP input lacks member 'execute'")
    return Request(str(message[given[0]]), arguments, given[0] == "exec-oob")


def greeting(version: Json) -> Json:
    """Return the first message of a monitor."""
    return {"QMP": {"version": version, "capabilities": [OOB]}}


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
        reason: Our own sorting, for programs: `not-found`, `in-use`, `broken`, ... QEMU has no such
            member.
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
