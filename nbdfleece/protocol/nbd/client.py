"""Client side of the handshake: talks (see `talk`) that a client strings together.

A connection begins with `greet`; then come any of the option talks; `go` or `export_name` end it
and enter transmission. `connect` is the usual sequence in one. A refused option raises
`OptionRefused` and haggling may go on; `PeerViolation` means that the other end is no NBD server.

With TLS the conversation is in two parts: `begin_tls`, the TLS handshake, then the rest over TLS.
Whoever runs it calls `check_tls_may_begin` between them: what a server (or somebody on the way)
sent in plaintext behind its ACK must not be taken for something that came over TLS.

A server's answers are bounded in number and bytes, and may only be what was asked for.

Spec: NBD proto.md "Fixed newstyle negotiation", "Option types".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import OptionRefused, PeerViolation
from nbdfleece.base.limits import (
    MAX_OPTION_REPLIES,
    MAX_OPTION_REPLY_BYTES,
    MAX_PAYLOAD,
    MAX_SIZE,
    MAX_STRING,
)
from nbdfleece.base.units import KiB, is_power_of_2
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    IHAVEOPT,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_NO_ZEROES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_OPTION_REPLY_MAGIC,
    NBD_REP_ACK,
    NBD_REP_ERR_UNSUP,
    NBD_REP_FLAG_ERROR,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    NBDMAGIC,
)
from nbdfleece.protocol.nbd.names import option_name, option_reply_name
from nbdfleece.protocol.nbd.strings import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdfleece.protocol.nbd.talk import Conversation, Talk

ALL_INFOS: Final = (NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE)

_MAX_REPLY_DATA: Final = 4 + 2 * MAX_STRING  # NBD_REP_SERVER with a full name and description
_INFO_SIZES: Final = {
    NBD_INFO_EXPORT: wire.INFO_EXPORT.size,
    NBD_INFO_BLOCK_SIZE: wire.INFO_BLOCK_SIZE.size,
}


@dataclass(frozen=True, slots=True)
class RemoteExport:
    """An export as a server describes it.

    Attributes:
        size: Bytes.
        flags: Transmission flags.
        name: Canonical name, when asked for and told.
        description: When asked for and told.
        minimum_block: Bytes; 1 unless told otherwise.
        preferred_block: Bytes.
        maximum_block: Bytes of the longest payload.
    """

    size: int
    flags: int
    name: str | None = None
    description: str | None = None
    minimum_block: int = 1
    preferred_block: int = 4 * KiB
    maximum_block: int = MAX_PAYLOAD


@dataclass(frozen=True, slots=True)
class Connected:
    """What `connect` has reached.

    Attributes:
        export: As the server describes it.
        structured: Replies are structured (with extended headers they always are).
        contexts: Metadata context name -> id.
        extended: Headers are extended.
    """

    export: RemoteExport
    structured: bool
    contexts: dict[str, int]
    extended: bool = False


def greet(*, no_zeroes: bool) -> Talk[bool]:
    """Receive the greeting and send the client flags.

    Returns:
        Whether the answer to EXPORT_NAME will come without zeroes.

    Raises:
        PeerViolation: Not a fixed newstyle server.
    """
    magic, option_magic, server_flags = wire.GREETING.unpack((yield wire.GREETING.size))
    if magic != NBDMAGIC or option_magic != IHAVEOPT:
        raise PeerViolation("not a newstyle NBD server")
    if not server_flags & NBD_FLAG_FIXED_NEWSTYLE:
        raise PeerViolation("the server does not do fixed newstyle negotiation")
    no_zeroes = no_zeroes and bool(server_flags & NBD_FLAG_NO_ZEROES)
    client_flags = NBD_FLAG_C_FIXED_NEWSTYLE | (NBD_FLAG_C_NO_ZEROES if no_zeroes else 0)
    yield wire.CLIENT_FLAGS.pack(client_flags)
    return no_zeroes


def ask(number: int, data: bytes = b"") -> Talk[list[tuple[int, bytes]]]:
    """Send an option and receive its replies.

    Returns:
        (type, data) of each reply before the ACK.

    Raises:
        OptionRefused: With the server's error and text.
        PeerViolation: The answer is no answer to this option.
    """
    yield wire.option(number, data)
    replies: list[tuple[int, bytes]] = []
    received = 0
    while len(replies) <= MAX_OPTION_REPLIES and received <= MAX_OPTION_REPLY_BYTES:
        header = yield wire.OPTION_REPLY_HEADER.size
        magic, answered, reply, length = wire.OPTION_REPLY_HEADER.unpack(header)
        if magic != NBD_OPTION_REPLY_MAGIC or answered != number or length > _MAX_REPLY_DATA:
            raise PeerViolation(f"bad reply to {option_name(number)}")
        payload = (yield length) if length else b""
        if reply & NBD_REP_FLAG_ERROR:
            raise OptionRefused(reply, payload.decode(errors="replace"))
        if reply == NBD_REP_ACK:
            if payload:
                raise PeerViolation(f"NBD_REP_ACK to {option_name(number)} with data")
            return replies
        received += length
        replies.append((reply, payload))
    raise PeerViolation(f"endless replies to {option_name(number)}")


def agree(number: int) -> Talk[None]:
    """Send an option that has no data and takes no answer but ACK.

    Raises:
        OptionRefused: With the server's error and text.
        PeerViolation: The answer is no answer to this option.
    """
    if (yield from ask(number)):
        raise PeerViolation(f"replies with data to {option_name(number)}")


def abort() -> Talk[None]:
    """End haggling in good order."""
    yield from agree(NBD_OPT_ABORT)


def structured_reply() -> Talk[bool]:
    """Ask for structured replies; return whether the server does them."""
    return (yield from _try(NBD_OPT_STRUCTURED_REPLY))


def extended_headers() -> Talk[bool]:
    """Ask for extended headers; return whether the server does them."""
    return (yield from _try(NBD_OPT_EXTENDED_HEADERS))


def _try(number: int) -> Talk[bool]:
    """Ask for what one can do without, whatever the refusal says."""
    try:
        yield from agree(number)
    except OptionRefused:
        return False
    return True


def begin_tls(*, no_zeroes: bool) -> Talk[bool]:
    """Greet and ask for TLS; no plaintext may follow, see `check_tls_may_begin`.

    Returns:
        As `greet`.

    Raises:
        OptionRefused: The server does no TLS. One that was to use it must not go on without.
        PeerViolation: As `greet`.
    """
    no_zeroes = yield from greet(no_zeroes=no_zeroes)
    yield from agree(NBD_OPT_STARTTLS)
    return no_zeroes


def check_tls_may_begin(conversation: Conversation[bool]) -> None:
    """Check that nothing was received behind the ACK of STARTTLS: every later byte is TLS.

    Raises:
        PeerViolation: Plaintext came behind it.
    """
    assert conversation.is_over, "STARTTLS has not been acknowledged"
    if conversation.leftover:
        raise PeerViolation("plaintext behind the acknowledgement of NBD_OPT_STARTTLS")


def list_exports() -> Talk[list[tuple[str, str]]]:
    """Return (name, description) of the exports that the server lists."""
    exports = []
    for reply, data in (yield from ask(NBD_OPT_LIST)):
        _expect_reply(NBD_OPT_LIST, reply, NBD_REP_SERVER, data, wire.U32.size)
        (name_length,) = wire.U32.unpack_from(data)
        if name_length > len(data) - wire.U32.size:
            raise PeerViolation("an export name is longer than its reply")
        name_end = wire.U32.size + name_length
        exports.append((_text(data[wire.U32.size : name_end]), _text(data[name_end:])))
    return exports


def list_meta_context(export: str, queries: Sequence[str]) -> Talk[list[str]]:
    """Return the names of the metadata contexts that the queries match."""
    return list((yield from _meta_context(NBD_OPT_LIST_META_CONTEXT, export, queries)))


def set_meta_context(export: str, queries: Sequence[str]) -> Talk[dict[str, int]]:
    """Select metadata contexts; return name -> id of those that the server has."""
    return (yield from _meta_context(NBD_OPT_SET_META_CONTEXT, export, queries))


def info(export: str, infos: Sequence[int] = ALL_INFOS) -> Talk[RemoteExport]:
    """Return what the server tells about an export."""
    return (yield from _describe(NBD_OPT_INFO, export, infos))


def go(export: str, infos: Sequence[int] = ALL_INFOS) -> Talk[RemoteExport]:
    """Enter transmission with an export."""
    return (yield from _describe(NBD_OPT_GO, export, infos))


def export_name(export: str, *, no_zeroes: bool) -> Talk[RemoteExport]:
    """Enter transmission the old way; the server closes the connection to refuse.

    Args:
        export: Name of the export.
        no_zeroes: What `greet` returned.
    """
    yield wire.option(NBD_OPT_EXPORT_NAME, export.encode())
    size, flags = wire.EXPORT_NAME_REPLY.unpack((yield wire.EXPORT_NAME_REPLY.size))
    if not no_zeroes:
        yield len(wire.EXPORT_NAME_ZEROES)
    return _checked(RemoteExport(size, flags))


def connect(
    export: str, *, structured: bool, contexts: Sequence[str], extended: bool = False
) -> Talk[Connected]:
    """Do the whole handshake the usual way, without TLS; arguments as in `haggle`."""
    no_zeroes = yield from greet(no_zeroes=True)
    return (
        yield from haggle(
            export,
            no_zeroes=no_zeroes,
            structured=structured,
            contexts=contexts,
            extended=extended,
        )
    )


def haggle(
    export: str, *, no_zeroes: bool, structured: bool, contexts: Sequence[str], extended: bool
) -> Talk[Connected]:
    """Do the handshake from behind the greeting, or behind TLS, into transmission.

    What the server does not do is gone without: extended headers, structured replies, contexts, and
    GO, for which EXPORT_NAME stands in.

    Args:
        export: Name of the export; "" for the default one.
        no_zeroes: What `greet` or `begin_tls` returned.
        structured: Ask for structured replies.
        contexts: Metadata contexts to select; none without structured replies.
        extended: Ask for extended headers, and for structured replies only without these.

    Raises:
        OptionRefused: The server does not offer the export to us.
        PeerViolation: It broke the protocol.
    """
    is_extended = extended and (yield from extended_headers())
    is_structured = is_extended or (structured and (yield from structured_reply()))
    selected: dict[str, int] = {}
    if is_structured and contexts:
        try:
            selected = yield from set_meta_context(export, contexts)
        except OptionRefused as refused:
            if refused.reply != NBD_REP_ERR_UNSUP:
                raise
    try:
        remote = yield from _describe_and_go(export)
    except OptionRefused as refused:
        if refused.reply != NBD_REP_ERR_UNSUP or is_extended:
            raise
        remote = yield from export_name(export, no_zeroes=no_zeroes)
    return Connected(remote, is_structured, selected, is_extended)


def _describe_and_go(export: str) -> Talk[RemoteExport]:
    """Enter transmission without a promise to keep to a minimum block above 1.

    GO with NBD_INFO_BLOCK_SIZE is such a promise. So a server is asked with INFO before; where it
    has a minimum, GO does not ask again, and then the server has to serve any range, or refuses
    with NBD_REP_ERR_BLOCK_SIZE_REQD.
    """
    try:
        told = yield from info(export)
    except OptionRefused:
        return (yield from go(export))  # which is the one to say why
    if told.minimum_block == 1:
        return (yield from go(export))
    remote = yield from go(export, (NBD_INFO_NAME, NBD_INFO_DESCRIPTION))
    preferred, maximum = told.preferred_block, min(told.maximum_block, remote.maximum_block)
    return replace(remote, minimum_block=1, preferred_block=preferred, maximum_block=maximum)


def _meta_context(number: int, export: str, queries: Sequence[str]) -> Talk[dict[str, int]]:
    """Return name -> id of the contexts in the replies."""
    request = wire.meta_request(export.encode(), [query.encode() for query in queries])
    contexts: dict[str, int] = {}
    for reply, data in (yield from ask(number, request)):
        _expect_reply(number, reply, NBD_REP_META_CONTEXT, data, wire.U32.size)
        (context,) = wire.U32.unpack_from(data)
        name = _text(data[wire.U32.size :])
        if number == NBD_OPT_SET_META_CONTEXT:
            is_used = context in contexts.values() and contexts.get(name) != context
            if name not in queries or is_used or contexts.get(name, context) != context:
                raise PeerViolation(f"metadata context {shown(name)} was not asked for so")
        contexts[name] = context
    return contexts


def _describe(number: int, export: str, infos: Sequence[int]) -> Talk[RemoteExport]:
    """Return what the NBD_REP_INFO replies say, with the spec's defaults where they are silent."""
    size_and_flags: tuple[int, int] | None = None
    texts: dict[int, str] = {}
    blocks = (1, 4 * KiB, MAX_PAYLOAD)
    request = wire.info_request(export.encode(), infos)
    for reply, data in (yield from ask(number, request)):
        _expect_reply(number, reply, NBD_REP_INFO, data, wire.U16.size)
        (kind,) = wire.U16.unpack_from(data)
        if _INFO_SIZES.get(kind, len(data)) != len(data):
            raise PeerViolation(f"information {kind} of {len(data)} bytes")
        if kind == NBD_INFO_EXPORT:
            if size_and_flags is not None:
                raise PeerViolation("two NBD_INFO_EXPORT")
            _, size, flags = wire.INFO_EXPORT.unpack(data)
            size_and_flags = (size, flags)
        elif kind == NBD_INFO_BLOCK_SIZE:
            _, *sizes = wire.INFO_BLOCK_SIZE.unpack(data)
            blocks = (sizes[0], sizes[1], sizes[2])
        elif kind in (NBD_INFO_NAME, NBD_INFO_DESCRIPTION):
            texts[kind] = _text(data[wire.U16.size :])
    if size_and_flags is None:
        raise PeerViolation(f"no NBD_INFO_EXPORT in the answer to {option_name(number)}")
    return _checked(
        RemoteExport(
            *size_and_flags, texts.get(NBD_INFO_NAME), texts.get(NBD_INFO_DESCRIPTION), *blocks
        )
    )


def _checked(export: RemoteExport) -> RemoteExport:
    """Return `export` if it can be worked with."""
    if export.size > MAX_SIZE or not export.flags & NBD_FLAG_HAS_FLAGS:
        raise PeerViolation(f"export of {export.size} bytes with flags {export.flags:#x}")
    minimum, preferred = export.minimum_block, export.preferred_block
    if not (is_power_of_2(minimum) and is_power_of_2(preferred)):
        raise PeerViolation(f"block sizes {minimum} and {preferred} are not powers of two")
    if not minimum <= preferred <= export.maximum_block:
        raise PeerViolation("block sizes are out of order")
    return export


def _expect_reply(number: int, reply: int, wanted: int, data: bytes, least: int) -> None:
    """Check the type of a reply and that it holds at least `least` bytes.

    Raises:
        PeerViolation: It is another type, or shorter.
    """
    if reply != wanted or len(data) < least:
        raise PeerViolation(f"{option_reply_name(reply)} in the answer to {option_name(number)}")


def _text(data: bytes) -> str:
    """Return a server's string, whatever it put into it."""
    return data.decode(errors="replace")
