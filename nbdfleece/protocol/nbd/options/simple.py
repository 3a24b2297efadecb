"""Options that are only agreed to: ABORT, STRUCTURED_REPLY.

Spec: NBD proto.md "Option types".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import NBD_REP_ACK

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import Haggle, Option


def answer_abort(haggle: Haggle, option: Option) -> bytes:
    """Acknowledge and end haggling; data, which there should not be, is ignored."""
    haggle.aborted = True
    return wire.option_reply(option.number, NBD_REP_ACK)


def answer_structured_reply(haggle: Haggle, option: Option) -> bytes:
    """Turn structured replies on; asking again changes nothing and is no error."""
    option.require_empty()
    haggle.structured = True
    return wire.option_reply(option.number, NBD_REP_ACK)
