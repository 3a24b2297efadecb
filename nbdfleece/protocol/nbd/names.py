"""Numbers of the wire as the spec's words, for logs and error texts only."""

from __future__ import annotations

from typing import Final

from nbdfleece.protocol.nbd import constants


def _table(prefix: str, *without: str) -> dict[int, str]:
    """Return value -> name of the constants that begin with `prefix` but with none of `without`."""
    return {
        value: name
        for name, value in vars(constants).items()
        if name.startswith(prefix) and not name.startswith(without) and isinstance(value, int)
    }


_OPTIONS: Final = _table("NBD_OPT_", "NBD_OPTION_")
_OPTION_REPLIES: Final = _table("NBD_REP_", "NBD_REP_FLAG_")
_COMMANDS: Final = _table("NBD_CMD_", "NBD_CMD_FLAG_")
_CHUNKS: Final = _table("NBD_REPLY_TYPE_", "NBD_REPLY_TYPE_FLAG_")
_ERRORS: Final = {
    constants.NBD_SUCCESS: "NBD_SUCCESS",
    **_table("NBD_E", "NBD_EXTENDED_"),
}


def option_name(number: int) -> str:
    """Return the name of an option: `NBD_OPT_GO`, or `option 77`."""
    return _OPTIONS.get(number, f"option {number}")


def option_reply_name(number: int) -> str:
    """Return the name of an option reply: `NBD_REP_ACK`, or `option reply 0x80000077`."""
    return _OPTION_REPLIES.get(number, f"option reply {number:#x}")


def command_name(number: int) -> str:
    """Return the name of a request type: `NBD_CMD_READ`, or `command 77`."""
    return _COMMANDS.get(number, f"command {number}")


def chunk_name(number: int) -> str:
    """Return the name of a structured chunk: `NBD_REPLY_TYPE_NONE`, or `chunk type 77`."""
    return _CHUNKS.get(number, f"chunk type {number}")


def error_name(number: int) -> str:
    """Return the name of an error value: `NBD_EIO`, or `error 77`."""
    return _ERRORS.get(number, f"error {number}")
