"""What disk arguments mean; their syntax is in `base.disk_argument`."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdfleece.base.disk_argument import (
    KEYS,
    is_nbd_uri,
    split_disk_argument,
    without_secrets,
    without_token,
)
from nbdfleece.base.errors import CommandError, ConfigError
from nbdfleece.base.limits import MAX_DISK_NAME
from nbdfleece.base.units import parse_duration
from nbdfleece.block.drivers.nbd.uri import parse_nbd_uri
from nbdfleece.fleece.errors import LocationNotFound

if TYPE_CHECKING:
    from nbdfleece.block.drivers.nbd.target import Target

NAME_RULE: Final = "a letter, then at most 63 letters, digits, '_', '.' or '-'"

_NAME: Final = re.compile(rf"[A-Za-z][A-Za-z0-9_.-]{{0,{MAX_DISK_NAME - 1}}}")
_TIME_NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z(?:-[0-9]{1,9})?")
_SWITCHES: Final = {"on": True, "off": False}
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "format": ("raw", "qcow2"),
    "read-only": ("on", "off"),
    "discard": ("unmap", "ignore"),
    "cache": ("writeback", "none"),
    "locking": ("on", "off"),
}
_DURATIONS: Final = ("reconnect-delay", "open-timeout")
_NOT_REMOTE: Final = ("cache", "locking")  # ours to choose for our own files only

# First bytes of what is no raw disk: (offset, bytes, name).
_IMAGE_FORMATS: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
)
PROBE_LENGTH: Final = 512


@dataclass(frozen=True, slots=True)
class Location:
    """A disk as it was asked for.

    Attributes:
        disk: Its name.
        path: Where it is; absolute, or an NBD URI without its secrets.
        format_given: `format` was said, so its first bytes do not matter.
        is_qcow2: It was qcow2: the disk is what the image holds.
        read_only: Nobody may write.
        discard: Discards reach the file (`discard=unmap`).
        direct: The page cache is not used (`cache=none`).
        locking: Take QEMU's image locks.
        remote: The export of another NBD server that `path` leads to; None: a file or device.
        reconnect_delay_s: Seconds that requests wait for a lost server; 0: they fail.
        open_timeout_s: Seconds that a server is tried at the start; 0: once.
    """

    disk: str
    path: str
    format_given: bool = False
    is_qcow2: bool = False
    read_only: bool = False
    discard: bool = True
    direct: bool = False
    locking: bool = True
    remote: Target | None = None
    reconnect_delay_s: float = 0.0
    open_timeout_s: float = 0.0


def check_disk_name(name: str) -> None:
    """Check that a disk may be called `name`.

    Raises:
        ConfigError: It may not.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"'{name}' cannot be the name of a disk: use {NAME_RULE}")


def check_snapshot_name(name: str) -> None:
    """Check that a snapshot may be called `name`: as disks, or as the names that we give ourselves.

    Raises:
        ConfigError: It may not.
    """
    if _NAME.fullmatch(name) is None and _TIME_NAME.fullmatch(name) is None:
        raise ConfigError(f"'{name}' cannot be the name of a snapshot: use {NAME_RULE}")


def parse_location(text: str) -> Location:
    """Return what a disk argument asks for; nothing is opened.

    Raises:
        ConfigError: The argument is malformed.
    """
    return make_location(*split_disk_argument(text))


def make_location(name: str | None, path: str, options: dict[str, str]) -> Location:
    """Return the disk of its parts; `name` is the file's name without its ending by default.

    Raises:
        ConfigError: A part is wrong.
    """
    if not path:
        raise ConfigError(f"disk '{name or ''}': no location is given")
    remote = parse_nbd_uri(path) if is_nbd_uri(path) else None
    if name is None:
        name = Path(path).stem if remote is None else remote.export
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"disk '{without_secrets(path)}': '{without_token(name)}' cannot be the name of a "
                f"disk ({NAME_RULE}); give one as NAME=LOCATION"
            )
    check_disk_name(name)
    for key, value in options.items():
        _check_option(name, key, value, is_remote=remote is not None)
    return Location(
        disk=name,
        path=os.path.abspath(path) if remote is None else without_secrets(path),
        format_given="format" in options,
        is_qcow2=options.get("format") == "qcow2",
        read_only=_SWITCHES[options.get("read-only", "off")],
        discard=options.get("discard", "unmap") == "unmap",
        direct=options.get("cache", "writeback") == "none",
        locking=_SWITCHES[options.get("locking", "on")],
        remote=remote,
        reconnect_delay_s=parse_duration(options.get("reconnect-delay", "0")),
        open_timeout_s=parse_duration(options.get("open-timeout", "0")),
    )


def is_block_device(location: Location) -> bool:
    """Tell whether the disk is a block device; else it is a regular file, or remote.

    Raises:
        CommandError: It is neither, is not there, or holds an image that is not raw. Nothing is
            asked of a remote one.
    """
    if location.remote is not None:
        return False
    try:
        mode = os.stat(location.path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise CommandError(f"disk '{location.disk}': '{location.path}' is {what}")
        if not location.format_given:
            _check_file_is_raw(location)
    except FileNotFoundError as error:
        raise LocationNotFound(
            f"disk '{location.disk}': '{location.path}': {error.strerror}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise CommandError(f"disk '{location.disk}': '{location.path}': {text}") from error
    return stat.S_ISBLK(mode)


def _check_file_is_raw(location: Location) -> None:
    with open(location.path, "rb") as file:
        check_is_raw(location, file.read(PROBE_LENGTH))


def check_is_raw(location: Location, start: bytes) -> None:
    """Check that the first PROBE_LENGTH bytes of a disk are of no image format that we know.

    Raises:
        CommandError: They are, and the format was not given.
    """
    if location.format_given:
        return
    for offset, magic, name in _IMAGE_FORMATS:
        if start[offset : offset + len(magic)] == magic:
            other = "; to serve the disk in it, format=qcow2" if name == "qcow2" else ""
            raise CommandError(
                f"disk '{location.disk}': '{location.path}' looks like a {name} image; "
                f"to serve its bytes as they are, say format=raw{other}"
            )


def _check_option(disk: str, key: str, value: str, *, is_remote: bool) -> None:
    if (key in _DURATIONS and not is_remote) or (key in _NOT_REMOTE and is_remote):
        other = "a file or device" if is_remote else "an NBD server"
        raise ConfigError(f"disk '{disk}': '{key}' is for {other}")
    if key in _DURATIONS:
        parse_duration(value)
        return
    choices = _CHOICES.get(key)
    if choices is None:
        known = ", ".join(KEYS)
        raise ConfigError(f"disk '{disk}': unknown key '{key}' (known: {known})")
    if value not in choices:
        raise ConfigError(f"disk '{disk}': {key}='{value}' is none of {', '.join(choices)}")
