"""BlockdevOptions as declared types: what blockdev-add and blockdev-reopen take.

Here is what JSON may come; what of it a driver can do is up to block.registry. A driver there has a
line in _DRIVERS (tests/control/test_blockdev.py).

Follows: QEMU qapi/block-core.json.
"""

from __future__ import annotations

from typing import Final

from nbdfleece.protocol.qmp.schema import (
    UINT32,
    Alternate,
    Array,
    Boolean,
    Enum,
    Integer,
    Later,
    Null,
    String,
    Struct,
    Type,
    Union,
)

_REF: Final = Alternate("BlockdevRef", (Later(lambda: OPTIONS), String()))
_SIZE: Final = Integer(0, (1 << 64) - 1, "uint64")
_BYTES: Final = Integer(0, (1 << 63) - 1)  # QEMU declares these signed
_FILE: Final[dict[str, Type]] = {"file": _REF}
_POSIX: Final = Struct(
    {"filename": String()},
    {"locking": Enum(("auto", "on", "off")), "aio": Enum(("threads", "native", "io_uring"))},
)
_SERVER: Final = Union(
    "type",
    Struct(),
    {
        "inet": Struct({"host": String(), "port": String()}),
        "unix": Struct({"path": String()}),
    },
)
_EVENT: Final[dict[str, Type]] = {"event": String()}
_OVERLAP_MODE: Final = Enum(("none", "constant", "cached", "all"))
_OVERLAP_FLAGS: Final = Struct(
    {},
    {
        "template": _OVERLAP_MODE,
        **dict.fromkeys(
            (
                *("main-header", "active-l1", "active-l2", "refcount-table", "refcount-block"),
                *("snapshot-table", "inactive-l1", "inactive-l2", "bitmap-directory"),
            ),
            Boolean(),
        ),
    },
)
_PERMISSIONS: Final = Array(Enum(("consistent-read", "write", "write-unchanged", "resize")))

_DRIVERS: Final = {
    "blkdebug": Struct(
        {"image": _REF},
        {
            "inject-error": Array(
                Struct(
                    _EVENT,
                    {
                        "state": Integer(),
                        "iotype": String(),
                        "errno": Integer(),
                        "sector": Integer(),
                        "once": Boolean(),
                        "immediately": Boolean(),
                    },
                )
            ),
            "set-state": Array(Struct({**_EVENT, "new_state": Integer()}, {"state": Integer()})),
            "take-child-perms": _PERMISSIONS,
            "unshare-child-perms": _PERMISSIONS,
        },
    ),
    "copy-before-write": Struct(
        {"file": _REF, "target": _REF},
        {
            "bitmap": Struct({"node": String(), "name": String()}),
            "on-cbw-error": Enum(("break-guest-write", "break-snapshot")),
            "cbw-timeout": UINT32,
            "min-cluster-size": _SIZE,
        },
    ),
    "file": _POSIX,
    "host_device": _POSIX,
    "nbd": Struct(
        {"server": _SERVER},
        {
            "export": String(),
            "tls-creds": String(),
            "tls-hostname": String(),
            "x-dirty-bitmap": String(),
            "reconnect-delay": UINT32,
            "open-timeout": UINT32,
        },
    ),
    "null-co": Struct({}, {"size": Integer(), "latency-ns": _SIZE, "read-zeroes": Boolean()}),
    "qcow2": Struct(
        _FILE,
        {
            "data-file": _REF,
            "backing": Alternate("BlockdevRefOrNull", (Later(lambda: OPTIONS), String(), Null())),
            "lazy-refcounts": Boolean(),
            "pass-discard-request": Boolean(),
            "pass-discard-snapshot": Boolean(),
            "pass-discard-other": Boolean(),
            "overlap-check": Alternate("Qcow2OverlapChecks", (_OVERLAP_FLAGS, _OVERLAP_MODE)),
            "cache-size": _BYTES,
            "l2-cache-size": _BYTES,
            "l2-cache-entry-size": _BYTES,
            "refcount-cache-size": _BYTES,
            "cache-clean-interval": _BYTES,
        },
    ),
    "raw": Struct(_FILE, {"offset": _BYTES, "size": _BYTES}),
    "snapshot-access": Struct(_FILE, {"snapshot": String()}),
    "throttle": Struct({"throttle-group": String(), **_FILE}),
}

OPTIONS: Final[Union] = Union(
    "driver",
    Struct(
        {},
        {
            "node-name": String(),
            "discard": Enum(("ignore", "unmap")),
            "cache": Struct({}, {"direct": Boolean(), "no-flush": Boolean()}),
            "read-only": Boolean(),
            "auto-read-only": Boolean(),
            "force-share": Boolean(),
            "detect-zeroes": Enum(("off", "on", "unmap")),
        },
    ),
    _DRIVERS,
)

# What QEMU has no way to make is declared without members, and refused by the command.
CREATE: Final = Union(
    "driver",
    Struct(),
    {
        **dict.fromkeys(_DRIVERS, Struct()),
        "file": Struct(
            {"filename": String(), "size": _SIZE},
            {
                "preallocation": Enum(("off", "metadata", "falloc", "full")),
                "nocow": Boolean(),
                "extent-size-hint": _SIZE,
            },
        ),
        "qcow2": Struct(
            {"file": _REF, "size": _SIZE},
            {
                "version": Enum(("v2", "v3")),
                "backing-file": String(),
                "backing-fmt": Enum(tuple(_DRIVERS)),
                "cluster-size": _SIZE,
                "preallocation": Enum(("off", "metadata", "falloc", "full")),
                "lazy-refcounts": Boolean(),
                "extended-l2": Boolean(),
                "refcount-bits": Integer(),
                "compression-type": Enum(("zlib", "zstd")),
            },
        ),
    },
)
