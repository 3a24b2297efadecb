"""NBD_OPT_INFO and NBD_OPT_GO: describe an export, and enter transmission with it.

GO answers like INFO. When it follows an INFO with the same data at once, it gives the same answer
or an error: a client may have allocated by that size.

All information is sent unasked except name and description: the spec allows it, and clients that do
not ask for block sizes use them all the same.

Spec: NBD proto.md "Option types" (NBD_OPT_INFO and NBD_OPT_GO), "Block size constraints".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_STRING
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_INFO_DESCRIPTION,
    NBD_INFO_NAME,
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_UNKNOWN,
)
from nbdfleece.protocol.nbd.strings import decode, encode, shown

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import ExportInfo, Haggle, Option

MAX_INFO_DATA: Final = 4 + MAX_STRING + 2 + 2 * 0xFFFF  # a full name and as many types as count

_NAME_AT: Final = 4
_COUNT_BYTES: Final = 2


def answer_info(haggle: Haggle, option: Option) -> bytes:
    """Return what is known of the export, and the ACK."""
    name, infos = parse_info_request(option)
    export = haggle.find(name)
    haggle.last_info = (option.data, export)
    return _describe(haggle, option, export, infos)


def answer_go(haggle: Haggle, option: Option) -> bytes:
    """Choose the export and return what is known of it, and the ACK."""
    name, infos = parse_info_request(option)
    export = haggle.find(name)
    if haggle.last_info is not None:
        data, promised = haggle.last_info
        if data == option.data and promised != export:
            raise OptionRefused(NBD_REP_ERR_UNKNOWN, f"export {shown(name)} has just changed")
    haggle.chosen = export
    return _describe(haggle, option, export, infos)


def parse_info_request(option: Option) -> tuple[str, frozenset[int]]:
    """Return the export's name and the information types asked for, known or not.

    Raises:
        OptionRefused: NBD_REP_ERR_INVALID: the data is not exactly what the spec says.
    """
    data = option.data
    if option.is_cut or len(data) < _NAME_AT + _COUNT_BYTES:
        raise OptionRefused(NBD_REP_ERR_INVALID, "the option has a wrong length")
    (name_length,) = wire.U32.unpack_from(data)
    infos_at = _NAME_AT + name_length + _COUNT_BYTES
    if infos_at > len(data):
        raise OptionRefused(NBD_REP_ERR_INVALID, "the export name is longer than the option")
    (count,) = wire.U16.unpack_from(data, infos_at - _COUNT_BYTES)
    if infos_at + count * wire.U16.size != len(data):
        raise OptionRefused(NBD_REP_ERR_INVALID, "the option and its list differ in length")
    name = decode(data[_NAME_AT : _NAME_AT + name_length], "export name")
    return name, frozenset(info for (info,) in wire.U16.iter_unpack(data[infos_at:]))


def _describe(haggle: Haggle, option: Option, export: ExportInfo, infos: frozenset[int]) -> bytes:
    """Return the NBD_REP_INFO replies, each information at most once, and the ACK."""
    number = option.number
    flags = haggle.transmission_flags(export)
    replies = [wire.info_export_reply(number, size=export.size, flags=flags)]
    if NBD_INFO_NAME in infos:
        replies.append(wire.info_text_reply(number, NBD_INFO_NAME, encode(export.name)))
    if NBD_INFO_DESCRIPTION in infos and export.description:
        text = encode(export.description)
        replies.append(wire.info_text_reply(number, NBD_INFO_DESCRIPTION, text))
    replies.append(
        wire.info_block_size_reply(
            number,
            minimum=export.minimum_block,
            preferred=export.preferred_block,
            maximum=export.maximum_block,
        )
    )
    replies.append(wire.option_reply(number, NBD_REP_ACK))
    return b"".join(replies)
