"""Drivers by name, and nodes made from options as blockdev-add has them.

::

    options (nested mappings) --parse_node_options--> NodeSpec --add_from_options--> nodes

Parsing checks everything that can be checked without the graph. An error names the parameter with
its path (`file.filename`). A new driver needs a function that reads its options, and a line in
_DRIVERS.

What an inline child is not told it takes from its parent: `read-only` and `cache`; `discard` is on,
as whoever is above has decided already.

Follows: QEMU qapi/block-core.json (BlockdevOptions), block.c (bdrv_inherited_options).
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

from nbdfleece.base.errors import CommandError, NotFound
from nbdfleece.base.keyval import Spelled
from nbdfleece.base.limits import MAX_BACKING_DEPTH
from nbdfleece.base.units import GiB, is_power_of_2
from nbdfleece.block import permissions as perms
from nbdfleece.block.bitmap import find_bitmap
from nbdfleece.block.child import Role
from nbdfleece.block.drivers.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdfleece.block.drivers.fault import EVENTS, BlkdebugDriver, Injection, IoType, StateChange
from nbdfleece.block.drivers.file import FileDriver
from nbdfleece.block.drivers.host_device import HostDeviceDriver
from nbdfleece.block.drivers.locks import Locking
from nbdfleece.block.drivers.nbd.driver import NbdDriver
from nbdfleece.block.drivers.nbd.target import InetServer, UnixServer, make_target
from nbdfleece.block.drivers.null import NullDriver
from nbdfleece.block.drivers.qcow2.children import implied_children
from nbdfleece.block.drivers.qcow2.driver import Qcow2Driver, Qcow2Options
from nbdfleece.block.drivers.raw import RawDriver
from nbdfleece.block.drivers.snapshot_access import SnapshotAccess
from nbdfleece.block.drivers.throttle import ThrottleDriver

if TYPE_CHECKING:
    from nbdfleece.block.driver import Driver
    from nbdfleece.block.graph import Graph
    from nbdfleece.block.node import Node

Choice = TypeVar("Choice", bound=enum.Enum)
Build = Callable[["Graph"], "Driver"]
Imply = Callable[[Mapping[str, "Node"]], Awaitable["Implied"]]

SECTOR: Final = 512  # unit of blkdebug's `sector`, least size of a piece of an L2 table
_PERMS: Final = MappingProxyType({name: bit for bit, name in perms.NAMES.items()})


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node as asked for, checked as far as that goes without the graph.

    Attributes:
        node_name: None: a private name is made.
        driver: A name of the registry.
        read_only: No parent may write.
        discard: Discards are handed to the driver.
        direct: Bypass the page cache.
        no_flush: Flushes need not be done; they are, all the same.
        detect_zeroes: `on`, `off` or `unmap`: zeroes that come as data may be kept as zeroes; they
            are not looked for.
        given: Names of the driver's own options that were given.
        driver_options: Every option of the driver that was given or has a default, by QMP name.
        children: Inline nodes, names of existing ones, or None for no node, by child name.
        roles: Of the same children, where there is a node.
        build: Makes the driver; may look things up in the graph, and raises CommandError.
        implied: Finds the children that the image itself names, when those given are there.
    """

    node_name: str | None
    driver: str
    read_only: bool
    discard: bool
    direct: bool
    no_flush: bool
    detect_zeroes: str
    given: frozenset[str]
    driver_options: Mapping[str, object]
    children: Mapping[str, NodeSpec | str | None]
    roles: Mapping[str, Role]
    build: Build
    implied: Imply | None


@dataclass(frozen=True, slots=True)
class Implied:
    """What an image says of its children.

    Attributes:
        children: Options of those that were not given, by their name.
        roles: Of these, and of given ones whose role depends on the image.
    """

    children: Mapping[str, Mapping[str, object]]
    roles: Mapping[str, Role]


def drivers() -> list[str]:
    """Return the names of all drivers."""
    return sorted(_DRIVERS)


def parse_node_options(options: Mapping[str, object], path: str = "") -> NodeSpec:
    """Check the options of a node and of its inline children.

    Args:
        options: As given.
        path: Where they are, for errors: empty, or ending in a dot.

    Raises:
        CommandError: The driver is unknown, or a parameter is missing, unexpected or bad.
    """
    inherited = _Inherited(read_only=False, direct=False, discard=_Discard.IGNORE)
    return _parse(Options(options, path, inherited))


async def add_from_options(
    graph: Graph, options: Mapping[str, object], *, needs_name: bool = True
) -> Node:
    """Make a node and its inline children (blockdev-add).

    Args:
        graph: Where.
        options: As given.
        needs_name: Refuse options without `node-name`; else the node gets a private name.

    Returns:
        The node, which the monitor now owns.

    Raises:
        CommandError: It cannot be made. The graph is unchanged.

    Cancel: not cancelled.
    """
    spec = parse_node_options(options)
    if spec.node_name is None and needs_name:
        raise CommandError("'node-name' must be specified for the root node")
    made: list[Node] = []
    try:
        node = await _add(graph, spec, made)
    except BaseException:
        for child in reversed(made):
            await graph.remove(child)
        raise
    for child in made[:-1]:
        child.goes_with_parent = True
    node.owned_by_monitor = True
    return node


async def _add(graph: Graph, spec: NodeSpec, made: list[Node], depth: int = 0) -> Node:
    """Make a node and its children.

    Args:
        graph: Where.
        spec: What.
        made: Takes what has been made, also if this fails.
        depth: How many images have led here by naming each other.
    """
    children: dict[str, tuple[Node, Role]] = {}
    for name, child in spec.children.items():
        if child is None:
            continue
        if isinstance(child, str):
            found = graph.get(child)
            if found is None:
                raise NotFound(f"Cannot find device='{child}' nor node-name='{child}'")
        else:
            found = await _add(graph, child, made, depth)
        children[name] = (found, spec.roles[name])
    if spec.implied is not None:
        await _add_implied(graph, spec, spec.implied, children, made, depth)
    node = await graph.add(
        spec.node_name,
        spec.build(graph),
        children,
        read_only=spec.read_only,
        discard_enabled=spec.discard,
    )
    node.spec = spec
    made.append(node)
    return node


async def _add_implied(
    graph: Graph,
    spec: NodeSpec,
    imply: Imply,
    children: dict[str, tuple[Node, Role]],
    made: list[Node],
    depth: int,
) -> None:
    """Make the children that the image names; arguments as of `_add`, with those made so far."""
    implied = await imply({name: node for name, (node, _) in children.items()})
    for name, role in implied.roles.items():
        if name in children:
            children[name] = (children[name][0], role)
    inherited = _Inherited(read_only=spec.read_only, direct=spec.direct, discard=_Discard.UNMAP)
    for name, options in implied.children.items():
        if depth >= MAX_BACKING_DEPTH:
            raise CommandError(f"More than {MAX_BACKING_DEPTH} images name each other")
        child = _parse(Options(options, f"{name}.", inherited))
        children[name] = (await _add(graph, child, made, depth + 1), implied.roles[name])


# --- reading options --------------------------------------------------------------------------


class _Discard(enum.Enum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class _DetectZeroes(enum.Enum):
    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@dataclass(frozen=True, slots=True)
class _Inherited:
    """What an inline child takes from its parent."""

    read_only: bool
    direct: bool
    discard: _Discard


class Options:
    """The options of one object: taken one by one, checked, and none may be left over.

    Args:
        options: As given.
        path: Of this object, for errors: empty, or ending in a dot.
        inherited: What holds where nothing is given.

    Attributes:
        taken: What was taken, by name, defaults included.
        children: See NodeSpec.
        implied: See NodeSpec.
        roles: See NodeSpec.
        direct: `cache.direct`.
    """

    def __init__(self, options: Mapping[str, object], path: str, inherited: _Inherited) -> None:
        self._left = dict(options)
        self.path = path
        self.inherited = inherited
        self.direct = inherited.direct
        self.read_only = inherited.read_only
        self.taken: dict[str, object] = {}
        self.children: dict[str, NodeSpec | str | None] = {}
        self.implied: Imply | None = None
        self.roles: dict[str, Role] = {}

    def has(self, name: str) -> bool:
        """Tell whether the parameter was given and has not been taken."""
        return name in self._left

    def left(self) -> frozenset[str]:
        """Return the names of the parameters that were given and have not been taken."""
        return frozenset(self._left)

    def require(self, name: str) -> None:
        """Insist on a parameter.

        Raises:
            CommandError: It was not given.
        """
        if name not in self._left:
            raise CommandError(f"Parameter '{self.path}{name}' is missing")

    def string(self, name: str, default: str | None = None) -> str | None:
        """Take a text."""
        value = self._take(name, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong_type(name, "string")
        return value

    def required_string(self, name: str) -> str:
        """Take a text that has to be there."""
        self.require(name)
        value = self.string(name)
        if value is None:
            raise self.wrong_type(name, "string")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """Take a truth value."""
        value = self._take(name, default)
        if isinstance(value, Spelled):
            self.taken[name] = value = value.boolean(self.path + name)
        if not isinstance(value, bool):
            raise self.wrong_type(name, "boolean")
        return value

    def number(self, name: str, default: int | None, *, bits: int = 64) -> int | None:
        """Take a number from 0 to 2^bits - 1."""
        value = self._take(name, default)
        if value is None and default is None:
            return None
        if isinstance(value, Spelled):
            self.taken[name] = value = value.integer(self.path + name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong_type(name, "integer")
        if not 0 <= value < 1 << bits:
            raise CommandError(
                f"Parameter '{self.path}{name}' expects a non-negative number below 2^{bits}"
            )
        return value

    def choice(self, name: str, default: Choice) -> Choice:
        """Take one of the values of an enumeration."""
        value = self.string(name, str(default.value))
        for member in type(default):
            if member.value == value:
                return member
        raise self.not_accepted(name, value)

    def only(self, name: str, accepted: object) -> None:
        """Take a parameter that may be given, and has one value that is built."""
        value = self._take(name, accepted)
        if isinstance(value, Spelled) and isinstance(accepted, bool):
            value = value.boolean(self.path + name)
        if value != accepted:
            raise CommandError(f"Parameter '{self.path}{name}' has no other value here yet")

    def value(self, name: str) -> object:
        """Take a parameter of any type."""
        return self._take(name, None)

    def mapping(self, name: str) -> Options | None:
        """Take a nested object, without its content."""
        value = self._take(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong_type(name, "object")
        return Options(value, f"{self.path}{name}.", self.inherited)

    def mappings(self, name: str) -> list[Options]:
        """Take a list of objects."""
        found: list[Options] = []
        for index, value in enumerate(self._list(name)):
            if not isinstance(value, Mapping):
                raise self.wrong_type(f"{name}[{index}]", "object")
            found.append(Options(value, f"{self.path}{name}[{index}].", self.inherited))
        return found

    def permissions(self, name: str) -> int:
        """Take a list of permission names."""
        found = perms.NONE
        for index, value in enumerate(self._list(name)):
            bit = _PERMS.get(value) if isinstance(value, str) else None
            if bit is None:
                raise self.not_accepted(f"{name}[{index}]", value)
            found |= bit
        return found

    def child(self, name: str, role: Role) -> None:
        """Take a child: the name of a node, or the options of one."""
        self.require(name)
        value = self._left.pop(name)
        self.roles[name] = role
        if isinstance(value, str):
            self.children[name] = value
        elif isinstance(value, Mapping):
            inherited = _Inherited(self.read_only, self.direct, _Discard.UNMAP)
            self.children[name] = _parse(Options(value, f"{self.path}{name}.", inherited))
        else:
            raise self.wrong_type(name, "BlockdevRef")

    def no_child(self, name: str) -> bool:
        """Take a child that is said to be none (null); tell whether it was."""
        if self._left.get(name, self) is not None:
            return False
        self._left.pop(name)
        self.children[name] = None
        return True

    def finish(self) -> None:
        """Check that nothing was given that nobody took.

        Raises:
            CommandError: Names the first such parameter.
        """
        if self._left:
            raise CommandError(f"Parameter '{self.path}{next(iter(self._left))}' is unexpected")

    def wrong_type(self, name: str, expected: str) -> CommandError:
        """Return the error for a value of the wrong type."""
        return CommandError(f"Invalid parameter type for '{self.path}{name}', expected: {expected}")

    def not_accepted(self, name: str, value: object) -> CommandError:
        """Return the error for a value that is none of those possible."""
        return CommandError(f"Parameter '{self.path}{name}' does not accept value '{value}'")

    def _take(self, name: str, default: object) -> object:
        value = self._left.pop(name, default)
        if value is not None:
            self.taken[name] = value
        return value

    def _list(self, name: str) -> Iterable[object]:
        value = self._take(name, None)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self.wrong_type(name, "array")
        return list(value)


def _parse(options: Options) -> NodeSpec:
    driver = options.required_string("driver")
    read_options = _DRIVERS.get(driver)
    if read_options is None:
        raise options.not_accepted("driver", driver)
    node_name = options.string("node-name")
    options.read_only = options.boolean("read-only", default=options.inherited.read_only)
    discard = options.choice("discard", options.inherited.discard)
    cache, no_flush = options.mapping("cache"), False
    if cache is not None:
        options.direct = cache.boolean("direct", default=options.direct)
        no_flush = cache.boolean("no-flush", default=False)
        cache.finish()
    options.boolean("auto-read-only", default=False)  # it allows us to, and we never have to
    if not options.read_only and options.boolean("force-share", default=False):
        raise CommandError("force-share=on can only be used with read-only images")
    options.only("force-share", accepted=False)
    detect_zeroes = options.choice("detect-zeroes", _DetectZeroes.OFF)
    if detect_zeroes is _DetectZeroes.UNMAP and discard is not _Discard.UNMAP:
        raise CommandError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to "
            "unmap"
        )
    options.taken.clear()  # the rest is the driver's own
    given = options.left()
    build = read_options(options)
    options.finish()
    return NodeSpec(
        node_name=node_name,
        driver=driver,
        read_only=options.read_only,
        discard=discard is _Discard.UNMAP,
        direct=options.direct,
        no_flush=no_flush,
        detect_zeroes=detect_zeroes.value,
        given=given - options.children.keys(),
        driver_options=MappingProxyType(options.taken),
        children=MappingProxyType(options.children),
        roles=MappingProxyType(options.roles),
        build=build,
        implied=options.implied,
    )


# --- the drivers ------------------------------------------------------------------------------


def _file(options: Options) -> Build:
    filename = options.required_string("filename")
    locking = options.choice("locking", Locking.AUTO)
    options.only("aio", accepted="threads")
    direct = options.direct
    return lambda _graph: FileDriver(
        filename=filename, locking=locking, cache_direct=direct, new_and_sparse=False
    )


def _host_device(options: Options) -> Build:
    filename = options.required_string("filename")
    locking = options.choice("locking", Locking.AUTO)
    options.only("aio", accepted="threads")
    direct = options.direct
    return lambda _graph: HostDeviceDriver(filename=filename, locking=locking, cache_direct=direct)


class _ServerType(enum.Enum):
    INET = "inet"
    UNIX = "unix"


def _nbd(options: Options) -> Build:
    options.require("server")
    server = options.mapping("server")
    if server is None:
        raise options.wrong_type("server", "object")
    where = _server(server)
    tls_creds = options.string("tls-creds")
    target = make_target(
        where,
        options.string("export", "") or "",
        use_tls=tls_creds is not None,
        tls_folder=tls_creds,
        tls_hostname=options.string("tls-hostname"),
        dirty_bitmap=options.string("x-dirty-bitmap"),
    )
    reconnect_delay_s = options.number("reconnect-delay", 0, bits=32) or 0
    open_timeout_s = options.number("open-timeout", 0, bits=32) or 0
    return lambda _graph: NbdDriver(
        target, reconnect_delay_s=reconnect_delay_s, open_timeout_s=open_timeout_s
    )


def _server(options: Options) -> InetServer | UnixServer:
    """Return a SocketAddress; a port is a text in QEMU, and may be a number here."""
    options.require("type")
    where: InetServer | UnixServer
    if options.choice("type", _ServerType.INET) is _ServerType.UNIX:
        where = UnixServer(options.required_string("path"))
    else:
        host = options.required_string("host")
        options.require("port")
        port = options.value("port")
        digits = str(port) if isinstance(port, int) else port
        if not isinstance(digits, str) or not (digits.isascii() and digits.isdigit()):
            raise options.not_accepted("port", port)
        where = InetServer(host, int(digits[:6]))
    options.finish()
    return where


def _null(options: Options) -> Build:
    size = options.number("size", 1 * GiB) or 0
    latency_ns = options.number("latency-ns", 0) or 0
    read_zeroes = options.boolean("read-zeroes", default=False)
    return lambda _graph: NullDriver(size=size, read_zeroes=read_zeroes, latency_ns=latency_ns)


def _raw(options: Options) -> Build:
    offset, size = options.number("offset", None), options.number("size", None)
    options.child("file", RawDriver.file_role(offset=offset, size=size))
    return lambda _graph: RawDriver(offset=offset, size=size)


def _blkdebug(options: Options) -> Build:
    injections = [_injection(rule) for rule in options.mappings("inject-error")]
    changes = [_state_change(rule) for rule in options.mappings("set-state")]
    take = options.permissions("take-child-perms")
    unshare = options.permissions("unshare-child-perms")
    options.child("image", Role.FILTERED | Role.PRIMARY)
    return lambda _graph: BlkdebugDriver(
        inject_errors=injections,
        set_states=changes,
        take_child_perms=take,
        unshare_child_perms=unshare,
    )


def _event(options: Options) -> str:
    event = options.required_string("event")
    if event not in EVENTS:
        raise options.not_accepted("event", event)
    return event


def _injection(options: Options) -> Injection:
    event = _event(options)
    iotype = options.choice("iotype", IoType.READ) if options.has("iotype") else None
    sector = options.number("sector", None, bits=54)
    injection = Injection(
        event=event,
        iotype=iotype,
        errno=options.number("errno", errno.EIO, bits=31) or errno.EIO,
        offset=None if sector is None else sector * SECTOR,
        length=SECTOR,
        state=options.number("state", 0, bits=31) or 0,
        once=options.boolean("once", default=False),
        immediately=options.boolean("immediately", default=False),
    )
    options.finish()
    return injection


def _state_change(options: Options) -> StateChange:
    event = _event(options)
    state = options.number("state", 0, bits=31) or 0
    options.require("new_state")
    change = StateChange(event, state, options.number("new_state", 0, bits=31) or 0)
    options.finish()
    return change


def _copy_before_write(options: Options) -> Build:
    on_cbw_error = options.choice("on-cbw-error", OnCbwError.BREAK_GUEST_WRITE)
    timeout_s = options.number("cbw-timeout", 0, bits=32)
    min_cluster_size = options.number("min-cluster-size", 0) or 0
    bitmap = options.mapping("bitmap")
    where: tuple[str, str] | None = None
    if bitmap is not None:
        where = bitmap.required_string("node"), bitmap.required_string("name")
        bitmap.finish()
    options.child("file", Role.FILTERED | Role.PRIMARY)
    options.child("target", Role.DATA)

    def build(graph: Graph) -> Driver:
        return CopyBeforeWrite(
            on_cbw_error=on_cbw_error,
            cbw_timeout_s=float(timeout_s) if timeout_s else None,
            min_cluster_size=min_cluster_size,
            bitmap=None if where is None else find_bitmap(graph.find(where[0]), where[1]),
            temp_limit=None,
        )

    return build


_QCOW2_FLAGS: Final = (
    *("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other"),
)
_QCOW2_SIZES: Final = ("cache-size", "l2-cache-size", "refcount-cache-size")
_QCOW2_CHECKS: Final = ("none", "constant", "cached", "all")
_COW: Final = Role.COW
_DATA_FILE: Final = Role.DATA


def _qcow2(options: Options) -> Build:
    for name in _QCOW2_FLAGS:
        if options.has(name):
            options.boolean(name, default=False)
    for name in _QCOW2_SIZES:
        options.number(name, None, bits=63)
    options.number("cache-clean-interval", None)
    entry_size = options.number("l2-cache-entry-size", None)
    if entry_size is not None and (not is_power_of_2(entry_size) or entry_size < SECTOR):
        raise CommandError("L2 cache entry size must be a power of two, of 512 bytes at least")
    check = options.value("overlap-check")
    template = check.get("template", "cached") if isinstance(check, Mapping) else check
    if template is not None and template not in _QCOW2_CHECKS:
        raise options.not_accepted("overlap-check", template)
    options.child("file", Role.DATA | Role.METADATA | Role.PRIMARY)
    given = {"file"}
    if options.has("data-file"):
        options.child("data-file", _DATA_FILE)
        given.add("data-file")
    if options.has("backing"):
        given.add("backing")
        if not options.no_child("backing"):
            before, options.read_only = options.read_only, True
            options.child("backing", _COW)
            options.read_only = before
    read_only, own = options.read_only, Qcow2Options.from_qmp(options.taken)

    async def imply(children: Mapping[str, Node]) -> Implied:
        implied = await implied_children(children["file"], frozenset(given), read_only=read_only)
        roles = {"data-file": _DATA_FILE, "backing": _COW}
        if "data-file" in implied or "data-file" in given:
            roles["file"] = Role.METADATA | Role.PRIMARY
        return Implied(implied, roles)

    options.implied = imply
    return lambda _graph: Qcow2Driver(own)


def _snapshot_access(options: Options) -> Build:
    options.child("file", Role.DATA | Role.PRIMARY)
    snapshot = options.string("snapshot")
    return lambda _graph: SnapshotAccess(snapshot)


def _throttle(options: Options) -> Build:
    name = options.required_string("throttle-group")
    options.child("file", Role.FILTERED | Role.PRIMARY)

    def build(graph: Graph) -> Driver:
        return ThrottleDriver(graph.throttle_groups, graph.throttle_groups.find(name))

    return build


_DRIVERS: Final[Mapping[str, Callable[[Options], Build]]] = MappingProxyType(
    {
        "blkdebug": _blkdebug,
        "copy-before-write": _copy_before_write,
        "file": _file,
        "host_device": _host_device,
        "nbd": _nbd,
        "null-co": _null,
        "qcow2": _qcow2,
        "raw": _raw,
        "snapshot-access": _snapshot_access,
        "throttle": _throttle,
    }
)
