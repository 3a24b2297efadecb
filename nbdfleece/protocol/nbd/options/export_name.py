"""NBD_OPT_EXPORT_NAME: enter transmission, the old way without a place for errors.

Spec: NBD proto.md "Option types" (NBD_OPT_EXPORT_NAME).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import OptionRefused, PeerViolation
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.strings import decode

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import Haggle, Option


def answer_export_name(haggle: Haggle, option: Option) -> bytes:
    """Choose the export whose name is the option's whole data ("" is the default export).

    Raises:
        PeerViolation: No such export, a name that cannot be one, or extended headers, which go with
            NBD_OPT_GO only: this option has no other no.
    """
    if haggle.extended:
        raise PeerViolation("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")
    try:
        export = haggle.find(decode(option.data, "export name"))
    except OptionRefused as refusal:
        raise PeerViolation(f"NBD_OPT_EXPORT_NAME: {refusal.text}") from refusal
    haggle.chosen = export
    return wire.export_name_reply(
        size=export.size, flags=haggle.transmission_flags(export), no_zeroes=haggle.no_zeroes
    )
