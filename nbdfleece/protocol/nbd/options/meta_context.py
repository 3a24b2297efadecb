"""NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: what BLOCK_STATUS can tell, and shall.

A query is `namespace:leaf`. For LIST, a bare namespace with its colon asks for all contexts in it
(`base:`, `qemu:`), `qemu:dirty-bitmap:` for all bitmaps, and no query at all for every context; for
SET only exact names select. What is not known, or has no colon, is passed over. Any further colons
belong to the leaf: a bitmap may have them in its name.

Spec: NBD proto.md "Metadata querying", "Option types" (NBD_OPT_SET_META_CONTEXT); for `qemu:`,
"NBD metadata contexts" in docs/interop/nbd.txt of QEMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_META_DATA, MAX_META_QUERIES
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_META_QEMU_DIRTY_BITMAP,
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_TOO_BIG,
)
from nbdfleece.protocol.nbd.strings import decode

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import ExportInfo, Haggle, Option

_LISTED_ID: Final = 0  # LIST hands out no ids


def answer_list_meta_context(haggle: Haggle, option: Option) -> bytes:
    """Return an NBD_REP_META_CONTEXT for each context asked about, and the ACK.

    What SET_META_CONTEXT selected stays. Structured replies need not be on, as with QEMU.
    """
    name, queries = parse_meta_request(option)
    listed = _listed(haggle.find(name), queries)
    replies = [
        wire.meta_context_reply(option.number, _LISTED_ID, context.encode()) for context in listed
    ]
    replies.append(wire.option_reply(option.number, NBD_REP_ACK))
    return b"".join(replies)


def answer_set_meta_context(haggle: Haggle, option: Option) -> bytes:
    """Select contexts: return an NBD_REP_META_CONTEXT for each, and the ACK.

    What was selected before is gone, also when this fails.
    """
    haggle.contexts = ()
    haggle.contexts_of = None
    if not haggle.structured:
        raise OptionRefused(NBD_REP_ERR_INVALID, "structured replies or extended headers first")
    name, queries = parse_meta_request(option)
    export = haggle.find(name)
    asked = frozenset(queries)
    haggle.contexts = tuple(
        (context_id, context)
        for context_id, context in enumerate(export.contexts)
        if context in asked
    )
    haggle.contexts_of = export
    replies = [
        wire.meta_context_reply(option.number, context_id, context.encode())
        for context_id, context in haggle.contexts
    ]
    replies.append(wire.option_reply(option.number, NBD_REP_ACK))
    return b"".join(replies)


def parse_meta_request(option: Option) -> tuple[str, list[str]]:
    """Return the export's name and the queries.

    Raises:
        OptionRefused: NBD_REP_ERR_INVALID: the data is not exactly what the spec says;
            NBD_REP_ERR_TOO_BIG: more queries, or more bytes of them, than we take.
    """
    name_bytes, position = _counted(option.data, 0, "export name")
    name = decode(name_bytes, "export name")
    if len(option.data) < position + wire.U32.size:
        raise OptionRefused(NBD_REP_ERR_INVALID, "the option has no number of queries")
    (count,) = wire.U32.unpack_from(option.data, position)
    position += wire.U32.size
    if count > MAX_META_QUERIES:
        raise OptionRefused(NBD_REP_ERR_TOO_BIG, f"more than {MAX_META_QUERIES} queries")
    if count and option.is_cut:
        raise OptionRefused(NBD_REP_ERR_TOO_BIG, f"more than {MAX_META_DATA} bytes of queries")
    queries = []
    for _ in range(count):
        query, position = _counted(option.data, position, "query")
        queries.append(decode(query, "query"))
    if position != option.length:
        raise OptionRefused(NBD_REP_ERR_INVALID, "there are bytes behind the last query")
    return name, queries


def _counted(data: bytes, position: int, what: str) -> tuple[bytes, int]:
    """Return the string at `position` (length:4 string) and the position behind it."""
    begin = position + wire.U32.size
    if begin > len(data):
        raise OptionRefused(NBD_REP_ERR_INVALID, f"the option ends before a {what}")
    (length,) = wire.U32.unpack_from(data, position)
    if begin + length > len(data):
        raise OptionRefused(NBD_REP_ERR_INVALID, f"a {what} is longer than the option")
    return data[begin : begin + length], begin + length


def _listed(export: ExportInfo, queries: list[str]) -> list[str]:
    """Return the contexts that the queries of a LIST ask about, each once."""
    if not queries:
        return list(export.contexts)
    exact = frozenset(queries)
    return [context for context in export.contexts if not exact.isdisjoint(_queries_for(context))]


def _queries_for(context: str) -> tuple[str, ...]:
    """Return the queries of a LIST that find `context`."""
    namespace, colon, _ = context.partition(":")
    if context.startswith(NBD_META_QEMU_DIRTY_BITMAP):
        return context, namespace + colon, NBD_META_QEMU_DIRTY_BITMAP
    return context, namespace + colon
