"""The children that a qcow2 image names in its header, as options of nodes.

No format is ever guessed: what the header does not say, the user has to. A relative name is
relative to the folder of the image.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, ImageError, IoError
from nbdfleece.block.drivers.qcow2.opening import read_header

if TYPE_CHECKING:
    from nbdfleece.block.node import Node

_JSON = "json:"
_FILE = "file:"
_PROTOCOL_FORMATS = ("file", "host_device")


async def implied_children(
    file: Node, given: frozenset[str], *, read_only: bool
) -> dict[str, dict[str, object]]:
    """Return options for the children that an image needs and that were not given.

    Args:
        file: The node with the image.
        given: Names of the children that were.
        read_only: The image is not to be written.

    Raises:
        CommandError: It is no qcow2 image, or names a child in a way that is not understood.
    """
    try:
        header = await read_header(file)
    except (ImageError, IoError) as error:
        raise CommandError(f"Could not open '{file.driver.image_name()}': {error}") from error
    found: dict[str, dict[str, object]] = {}
    folder = _folder(file)
    if header.has_data_file and "data-file" not in given:
        name = header.data_file_name
        if name is None:
            raise CommandError("'data-file' is required for this image")
        found["data-file"] = {**_from_name(name, folder), "read-only": read_only}
    if header.backing_file is not None and "backing" not in given:
        name, format_ = header.backing_file, header.backing_format
        if name.startswith(_JSON):
            backing = _from_name(name, folder)
        elif format_ is None:
            raise CommandError(
                f"'{file.driver.image_name()}' names the backing file '{name}' without its format: "
                "say what it is by 'backing'"
            )
        elif format_ in _PROTOCOL_FORMATS:
            backing = _from_name(name, folder)
        else:
            backing = {"driver": format_, "file": _from_name(name, folder)}
        found["backing"] = {**backing, "read-only": True, "discard": "ignore"}
    return found


def _from_name(name: str, folder: str | None) -> dict[str, object]:
    """Return the options of the node that a name in a header means.

    Raises:
        CommandError: It is not understood.
    """
    if name.startswith(_JSON):
        try:
            options = json.loads(name[len(_JSON) :])
        except (ValueError, RecursionError) as error:
            raise CommandError(f"Could not parse the JSON options '{name}'") from error
        if not isinstance(options, Mapping):
            raise CommandError(f"Could not parse the JSON options '{name}'")
        return dict(options)
    before, colon, _ = name.partition(":")
    path = name.removeprefix(_FILE)
    if colon and "/" not in before and path == name:
        raise CommandError(f"Unknown protocol '{before}' in the name '{name}'")
    if not os.path.isabs(path):
        if folder is None:
            raise CommandError(f"'{name}' is relative, and the image is not in a folder")
        path = os.path.join(folder, path)
    return {"driver": "host_device" if _is_device(path) else "file", "filename": path}


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):  # opening it will say what is wrong
        return False


def _folder(file: Node) -> str | None:
    name = file.driver.image_name()
    return (
        None if name.startswith(_JSON) or "://" in name else os.path.dirname(os.path.abspath(name))
    )
