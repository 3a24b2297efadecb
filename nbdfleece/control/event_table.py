"""Every event that a monitor may get, with its data: for introspection and documents.

What is sent is built where it happens; tests/control/test_event_table.py sees to it that nothing is
sent under a name that is not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.protocol.qmp.schema import Enum, Integer, Number, String, Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdfleece.protocol.qmp.schema import Type

_SNAPSHOT: Final[Mapping[str, Type]] = {"disk": String(), "snapshot": String()}
_CLIENT: Final[Mapping[str, Type]] = {"id": Integer(), "peer": String(), "export": String()}
_JOB: Final[Mapping[str, Type]] = {
    "type": String(),
    "device": String(),
    "len": Integer(),
    "offset": Integer(),
    "speed": Integer(),
}
_OPERATION: Final = Enum(("read", "write"))
_ACTION: Final = Enum(("ignore", "report", "stop"))
_STATUS: Final = Enum(
    (
        *("undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending"),
        *("aborting", "concluded", "null"),
    )
)

EVENTS: Final = {
    "BLOCK_EXPORT_DELETED": Struct({"id": String()}),
    "BLOCK_JOB_CANCELLED": Struct(_JOB),
    "BLOCK_JOB_COMPLETED": Struct(_JOB, {"error": String()}),
    "BLOCK_JOB_ERROR": Struct({"device": String(), "operation": _OPERATION, "action": _ACTION}),
    "BLOCK_JOB_PENDING": Struct({"type": String(), "id": String()}),
    "BLOCK_WRITE_THRESHOLD": Struct(
        {"node-name": String(), "amount-exceeded": Integer(), "write-threshold": Integer()}
    ),
    "FLEECE_CLIENT_CONNECTED": Struct(_CLIENT, {"identity": String(), "tls": String()}),
    "FLEECE_CLIENT_DISCONNECTED": Struct(
        {
            **_CLIENT,
            "bytes-read": Integer(),
            "bytes-written": Integer(),
            "requests": Integer(),
            "duration": Number(),
            "reason": String(),
        },
        {"identity": String()},
    ),
    "FLEECE_SNAPSHOT_BROKEN": Struct({**_SNAPSHOT, "error": String()}),
    "FLEECE_SNAPSHOT_CREATED": Struct({**_SNAPSHOT, "instant": String()}),
    "FLEECE_SNAPSHOT_DELETED": Struct(_SNAPSHOT),
    "FLEECE_TEMP_THRESHOLD": Struct({**_SNAPSHOT, "used": Integer(), "limit": Integer()}),
    "JOB_STATUS_CHANGE": Struct({"id": String(), "status": _STATUS}),
    "RESUME": Struct(),
    "STOP": Struct(),
}
