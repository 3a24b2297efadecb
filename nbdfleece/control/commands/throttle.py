"""Commands about I/O limits and about the accounting of requests.

What QEMU calls a device is here an export, by its id: a disk's name is the id of its live export. A
node is taken too, by its name, where no export has that id.

An export that nobody has asked about is not accounted, so that its requests cost nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import CommandError
from nbdfleece.block.accounting import Accounting, Kind, Stats, check_boundaries, stats_of
from nbdfleece.block.throttle import Limits
from nbdfleece.control.command import Command
from nbdfleece.control.devices import find_device
from nbdfleece.fleece.io_limits import limit_export, limit_node
from nbdfleece.protocol.qmp.schema import SIZE, Array, Boolean, Integer, String, Struct
from nbdfleece.server.export import Export

if TYPE_CHECKING:
    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Arguments
    from nbdfleece.protocol.qmp.values import Json

# --- limits --------------------------------------------------------------------------------------

# BlockIOThrottle's names of the limits, and those of ThrottleLimits.
_LIMITS: Final = {
    "bps": "bps-total",
    "bps_rd": "bps-read",
    "bps_wr": "bps-write",
    "iops": "iops-total",
    "iops_rd": "iops-read",
    "iops_wr": "iops-write",
}
_MEMBERS: Final = {
    **_LIMITS,
    **{f"{ours}_max": f"{name}-max" for ours, name in _LIMITS.items()},
    **{f"{ours}_max_length": f"{name}-max-length" for ours, name in _LIMITS.items()},
    "iops_size": "iops-size",
}


async def _set_io_throttle(context: Context, arguments: Arguments) -> Json:
    """Limit the requests of a device; all zero: limit them no more."""
    device, by_id = arguments.optional_string("device"), arguments.optional_string("id")
    name = device or by_id
    if name is None or (device is not None and by_id is not None):
        raise CommandError("Need exactly one of 'device' and 'id'")
    found = find_device(context, name)
    given = {
        member: arguments.integer(ours) for ours, member in _MEMBERS.items() if ours in arguments
    }
    limits = Limits().with_members(given)
    group = arguments.optional_string("group")
    if isinstance(found, Export):
        await limit_export(context.graph, found, limits, group, name)
    else:
        await limit_node(context.graph, found, limits, group, name)
    return {}


# --- accounting ----------------------------------------------------------------------------------

_HISTOGRAMS: Final = {
    "boundaries-read": Kind.READ,
    "boundaries-write": Kind.WRITE,
    "boundaries-flush": Kind.FLUSH,
}


def export_stats(export: Export) -> dict[str, Json]:
    """Return BlockDeviceStats of an export; counting begins when they are first asked for."""
    return _json(stats_of(_accounted(None, export)))


def node_stats(node: Node) -> dict[str, Json]:
    """Return BlockDeviceStats of a node; all zero unless it is accounted."""
    return _json(stats_of(node.accounting))


def _accounted(context: Context | None, found: Export | Node) -> Accounting:
    """Return the accounting of a device, begun now if it has not been."""
    if found.accounting is None:
        _set_accounting(context, found, Accounting())
    assert found.accounting is not None, "has just been set"
    return found.accounting


def _set_accounting(
    context: Context | None, found: Export | Node, accounting: Accounting | None
) -> None:
    found.account(accounting)
    if context is not None:
        for export in context.exports:  # one may go to the node
            export.renew_routes()


async def _histogram_set(context: Context, arguments: Arguments) -> Json:
    """Count the latencies of a device's requests in bins; without boundaries: no more."""
    name = arguments.string("id")
    found = find_device(context, name)
    wanted: dict[Kind, Sequence[int]] = {}
    if "boundaries" in arguments:
        wanted = dict.fromkeys(_HISTOGRAMS.values(), _integers(arguments, "boundaries"))
    for argument, kind in _HISTOGRAMS.items():
        if argument in arguments:
            wanted[kind] = _integers(arguments, argument)
    for argument, kind in _HISTOGRAMS.items():
        word = argument.removeprefix("boundaries-")
        if kind in wanted and not check_boundaries(wanted[kind]):
            raise CommandError(f"Device '{name}' set {word} boundaries fail")
    if wanted:
        _accounted(context, found).set_histograms(wanted)
    elif found.accounting is not None:
        found.accounting.histograms.clear()
    return {}


async def _accounting_set(context: Context, arguments: Arguments) -> Json:
    """Count the requests of an export or node, from now on and from zero, or no more."""
    found = find_device(context, arguments.string("id"))
    accounting: Accounting | None = None
    if arguments.boolean("enable", default=True):
        accounting = Accounting()
        accounting.account_invalid = arguments.boolean("account-invalid", default=True)
        accounting.account_failed = arguments.boolean("account-failed", default=True)
        accounting.set_intervals(_integers(arguments, "intervals"))
    _set_accounting(context, found, accounting)
    return {}


async def _accounting_query(context: Context, arguments: Arguments) -> Json:
    """Return what has been counted of an export or node, as BlockDeviceStats; all zero: nothing."""
    return _json(stats_of(find_device(context, arguments.string("id")).accounting))


def _json(stats: Stats) -> dict[str, Json]:
    return {name: _json_value(value) for name, value in stats.items()}


def _json_value(value: object) -> Json:
    if isinstance(value, dict):
        return _json(value)
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    assert isinstance(value, int | float), "numbers and truth values"
    return value


def _integers(arguments: Arguments, name: str) -> list[int]:
    """Return the list of numbers `name`; empty without it."""
    value = arguments.members.get(name, ())
    assert isinstance(value, Sequence), name
    return [item for item in value if isinstance(item, int)]


_BOUNDARIES: Final = Array(SIZE)
_COUNT: Final = Integer()

COMMANDS: Final = (
    Command(
        "block_set_io_throttle",
        Struct(
            dict.fromkeys(_LIMITS, _COUNT),
            {
                "device": String(),
                "id": String(),
                "group": String(),
                **{name: _COUNT for name in _MEMBERS if name not in _LIMITS},
            },
        ),
        _set_io_throttle,
    ),
    Command(
        "block-latency-histogram-set",
        Struct(
            {"id": String()}, {"boundaries": _BOUNDARIES} | dict.fromkeys(_HISTOGRAMS, _BOUNDARIES)
        ),
        _histogram_set,
    ),
    Command(
        "fleece-accounting-set",
        Struct(
            {"id": String()},
            {
                "enable": Boolean(),
                "account-invalid": Boolean(),
                "account-failed": Boolean(),
                "intervals": Array(Integer()),
            },
        ),
        _accounting_set,
    ),
    Command("query-fleece-accounting", Struct({"id": String()}), _accounting_query),
)
