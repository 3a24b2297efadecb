"""NBD_OPT_LIST: the names and descriptions of the exports.

Spec: NBD proto.md "Option types" (NBD_OPT_LIST), "Option reply types" (NBD_REP_SERVER).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import NBD_REP_ACK
from nbdfleece.protocol.nbd.strings import encode

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import Haggle, Option


def answer_list(haggle: Haggle, option: Option) -> bytes:
    """Return one NBD_REP_SERVER for each export that the directory shows, and the ACK."""
    option.require_empty()
    replies = [
        wire.server_reply(option.number, encode(export.name), encode(export.description))
        for export in haggle.directory.list()
    ]
    replies.append(wire.option_reply(option.number, NBD_REP_ACK))
    return b"".join(replies)
