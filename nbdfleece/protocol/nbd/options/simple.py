"""Options that are only agreed to: ABORT, STRUCTURED_REPLY, EXTENDED_HEADERS.

Spec: NBD proto.md "Option types"; for extended headers, the same on the branch
extension-ext-header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_REP_ACK,
    NBD_REP_ERR_EXT_HEADER_REQD,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_UNSUP,
)

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import Haggle, Option


def answer_abort(haggle: Haggle, option: Option) -> bytes:
    """Acknowledge and end haggling; data, which there should not be, is ignored."""
    haggle.aborted = True
    return wire.option_reply(option.number, NBD_REP_ACK)


def answer_structured_reply(haggle: Haggle, option: Option) -> bytes:
    """Turn structured replies on; asking again changes nothing and is no error.

    Raises:
        OptionRefused: NBD_REP_ERR_EXT_HEADER_REQD: there is no way back from extended headers.
    """
    option.require_empty()
    if haggle.extended:
        raise OptionRefused(NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are on")
    haggle.structured = True
    return wire.option_reply(option.number, NBD_REP_ACK)


def answer_extended_headers(haggle: Haggle, option: Option) -> bytes:
    """Turn extended headers on, and with them replies in chunks.

    Raises:
        OptionRefused: NBD_REP_ERR_UNSUP where they are switched off; NBD_REP_ERR_INVALID: asked
            for again.
    """
    if not haggle.may_extend:
        raise OptionRefused(NBD_REP_ERR_UNSUP, "extended headers are switched off")
    option.require_empty()
    if haggle.extended:
        raise OptionRefused(NBD_REP_ERR_INVALID, "extended headers are on already")
    haggle.structured = haggle.extended = True
    return wire.option_reply(option.number, NBD_REP_ACK)
