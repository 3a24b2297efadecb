from __future__ import annotations

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import names


def test_known_numbers_have_their_spec_names() -> None:
    assert names.option_name(c.NBD_OPT_GO) == "NBD_OPT_GO"
    assert names.option_reply_name(c.NBD_REP_ERR_UNKNOWN) == "NBD_REP_ERR_UNKNOWN"
    assert names.command_name(c.NBD_CMD_READ) == "NBD_CMD_READ"
    assert names.command_name(c.NBD_CMD_WRITE) == "NBD_CMD_WRITE"
    assert names.chunk_name(c.NBD_REPLY_TYPE_OFFSET_HOLE) == "NBD_REPLY_TYPE_OFFSET_HOLE"
    assert names.error_name(c.NBD_ENOSPC) == "NBD_ENOSPC"
    assert names.error_name(0) == "NBD_SUCCESS"


def test_unknown_numbers_are_shown_as_numbers() -> None:
    assert names.option_name(77) == "option 77"
    assert names.option_reply_name(0x80000077) == "option reply 0x80000077"
    assert names.command_name(77) == "command 77"
    assert names.chunk_name(77) == "chunk type 77"
    assert names.error_name(77) == "error 77"
