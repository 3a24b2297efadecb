"""Layouts of everything on the wire, with functions that write and read them.

All integers are big-endian. Each layout is shown where it is defined, as field:bytes. Readers get
exactly the bytes of one item; how long that is, the item's header says.

The payload of a chunk is the same under a structured and under an extended header, so there are
functions `..._payload` for it, and `chunk` and `extended_chunk` which put a header before it.

Spec: NBD proto.md "Protocol phases", "Option types", "Option reply types", "Transmission phase";
for extended headers, the same on the branch extension-ext-header.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from nbdfleece.protocol.nbd.constants import (
    IHAVEOPT,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_EXPORT,
    NBD_OPTION_REPLY_MAGIC,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    NBDMAGIC,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# --- Handshake -------------------------------------------------------------------------------
GREETING: Final = Struct(">QQH")  # NBDMAGIC:8 IHAVEOPT:8 handshake flags:2
CLIENT_FLAGS: Final = Struct(">I")  # client flags:4
OPTION_HEADER: Final = Struct(">QII")  # IHAVEOPT:8 option:4 length:4, then data:length
OPTION_REPLY_HEADER: Final = Struct(">QIII")  # magic:8 option:4 type:4 length:4, then data:length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size:8 transmission flags:2, then zeroes:124 or nothing
EXPORT_NAME_ZEROES: Final = bytes(124)

U16: Final = Struct(">H")
U32: Final = Struct(">I")
INFO_EXPORT: Final = Struct(">HQH")  # NBD_INFO_EXPORT:2 size:8 transmission flags:2
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # NBD_INFO_BLOCK_SIZE:2 minimum:4 preferred:4 maximum:4

# --- Transmission ----------------------------------------------------------------------------
REQUEST: Final = Struct(">IHHQQI")  # magic:4 flags:2 type:2 cookie:8 offset:8 length:4
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic:4 error:4 cookie:8, then data of a READ
CHUNK_HEADER: Final = Struct(">IHHQI")  # magic:4 flags:2 type:2 cookie:8 length:4, then payload
CHUNK_OFFSET: Final = Struct(">Q")  # OFFSET_DATA: offset:8, then data
CHUNK_HOLE: Final = Struct(">QI")  # OFFSET_HOLE: offset:8 size:4
CHUNK_ERROR: Final = Struct(">IH")  # ERROR: error:4 text length:2, then text (and offset:8)
STATUS_DESCRIPTOR: Final = Struct(">II")  # BLOCK_STATUS: context:4, then (length:4 flags:4) each

# --- Transmission with extended headers ------------------------------------------------------
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")  # magic:4 flags:2 type:2 cookie:8 offset:8 length:8
# magic:4 flags:2 type:2 cookie:8 offset:8 length:8, then payload; `offset` is the request's
EXTENDED_CHUNK_HEADER: Final = Struct(">IHHQQQ")
STATUS_EXT_HEADER: Final = Struct(">II")  # BLOCK_STATUS_EXT: context:4 count:4, then descriptors
STATUS_EXT_DESCRIPTOR: Final = Struct(">QQ")  # length:8 flags:8
STATUS_FILTER: Final = Struct(">Q")  # payload of a request: effect length:8, then context:4 each


# --- Handshake: writing ----------------------------------------------------------------------
def greeting(handshake_flags: int) -> bytes:
    """Return the 18 bytes with which a newstyle server begins."""
    return GREETING.pack(NBDMAGIC, IHAVEOPT, handshake_flags)


def option(number: int, data: bytes = b"") -> bytes:
    """Return a client's option request."""
    return OPTION_HEADER.pack(IHAVEOPT, number, len(data)) + data


def option_reply(number: int, reply: int, data: bytes = b"") -> bytes:
    """Return a reply of type `reply` to the option `number`."""
    return OPTION_REPLY_HEADER.pack(NBD_OPTION_REPLY_MAGIC, number, reply, len(data)) + data


def counted(data: bytes) -> bytes:
    """Return a string as options hold it: length:4 data:length."""
    return U32.pack(len(data)) + data


def info_request(name: bytes, infos: Iterable[int]) -> bytes:
    """Return the data of INFO and GO: name length:4 name count:2, then information type:2 each."""
    wanted = list(infos)
    return counted(name) + U16.pack(len(wanted)) + b"".join(map(U16.pack, wanted))


def meta_request(export: bytes, queries: Iterable[bytes]) -> bytes:
    """Return the data of LIST/SET_META_CONTEXT: name length:4 name count:4, then each query.

    A query is length:4 query:length.
    """
    wanted = list(queries)
    return counted(export) + U32.pack(len(wanted)) + b"".join(map(counted, wanted))


def server_reply(number: int, name: bytes, description: bytes) -> bytes:
    """Return an NBD_REP_SERVER: name length:4 name, the rest is the description."""
    return option_reply(number, NBD_REP_SERVER, counted(name) + description)


def meta_context_reply(number: int, context: int, name: bytes) -> bytes:
    """Return an NBD_REP_META_CONTEXT: context id:4, the rest is its name."""
    return option_reply(number, NBD_REP_META_CONTEXT, U32.pack(context) + name)


def info_export_reply(number: int, *, size: int, flags: int) -> bytes:
    """Return an NBD_REP_INFO with NBD_INFO_EXPORT."""
    return option_reply(number, NBD_REP_INFO, INFO_EXPORT.pack(NBD_INFO_EXPORT, size, flags))


def info_text_reply(number: int, info: int, text: bytes) -> bytes:
    """Return an NBD_REP_INFO with NBD_INFO_NAME or NBD_INFO_DESCRIPTION: type:2 text."""
    return option_reply(number, NBD_REP_INFO, U16.pack(info) + text)


def info_block_size_reply(number: int, *, minimum: int, preferred: int, maximum: int) -> bytes:
    """Return an NBD_REP_INFO with NBD_INFO_BLOCK_SIZE."""
    data = INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum)
    return option_reply(number, NBD_REP_INFO, data)


def export_name_reply(*, size: int, flags: int, no_zeroes: bool) -> bytes:
    """Return the answer to NBD_OPT_EXPORT_NAME, the one option without a reply header."""
    return EXPORT_NAME_REPLY.pack(size, flags) + (b"" if no_zeroes else EXPORT_NAME_ZEROES)


# --- Transmission: writing -------------------------------------------------------------------
def request(command: int, *, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """Return a compact request header; the payload of a WRITE follows it."""
    return REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)


def simple_reply(error: int, cookie: int) -> bytes:
    """Return a simple reply header; the data of a successful READ follows it."""
    return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)


def extended_request(command: int, *, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """Return an extended request header.

    Args:
        command: NBD_CMD_*.
        flags: NBD_CMD_FLAG_*; with PAYLOAD_LEN, `length` bytes of payload follow the header.
        cookie: Any.
        offset: Bytes.
        length: Bytes of the payload or, without PAYLOAD_LEN, those that the request concerns.
    """
    return EXTENDED_REQUEST.pack(NBD_EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)


def status_filter(effect_length: int, contexts: Iterable[int]) -> bytes:
    """Return the payload of an NBD_CMD_BLOCK_STATUS that asks about some contexts only."""
    return STATUS_FILTER.pack(effect_length) + b"".join(map(U32.pack, contexts))


# --- Transmission: chunks and their payloads -------------------------------------------------
def chunk_header(kind: int, *, flags: int, cookie: int, length: int) -> bytes:
    """Return the header of a structured reply chunk with a payload of `length` bytes."""
    return CHUNK_HEADER.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def extended_chunk_header(
    kind: int, *, flags: int, cookie: int, request_offset: int, length: int
) -> bytes:
    """Return the header of an extended reply chunk with a payload of `length` bytes.

    It repeats the offset of the request, whatever the chunk is about.
    """
    return EXTENDED_CHUNK_HEADER.pack(
        NBD_EXTENDED_REPLY_MAGIC, flags, kind, cookie, request_offset, length
    )


def chunk(kind: int, payload: bytes, *, flags: int, cookie: int) -> bytes:
    """Return a whole structured reply chunk."""
    return chunk_header(kind, flags=flags, cookie=cookie, length=len(payload)) + payload


def extended_chunk(
    kind: int, payload: bytes, *, flags: int, cookie: int, request_offset: int
) -> bytes:
    """Return a whole extended reply chunk."""
    header = extended_chunk_header(
        kind, flags=flags, cookie=cookie, request_offset=request_offset, length=len(payload)
    )
    return header + payload


def hole_payload(offset: int, length: int) -> bytes:
    """Return the payload of NBD_REPLY_TYPE_OFFSET_HOLE; `length` has 32 bits in both modes."""
    return CHUNK_HOLE.pack(offset, length)


def status_payload(context: int, descriptors: Iterable[tuple[int, int]]) -> bytes:
    """Return the payload of NBD_REPLY_TYPE_BLOCK_STATUS; (length, flags), each of 32 bits."""
    parts = [U32.pack(context)]
    parts += [STATUS_DESCRIPTOR.pack(length, status) for length, status in descriptors]
    return b"".join(parts)


def status_ext_payload(context: int, descriptors: Sequence[tuple[int, int]]) -> bytes:
    """Return the payload of NBD_REPLY_TYPE_BLOCK_STATUS_EXT; (length, flags), each of 64 bits."""
    parts = [STATUS_EXT_HEADER.pack(context, len(descriptors))]
    parts += [STATUS_EXT_DESCRIPTOR.pack(length, status) for length, status in descriptors]
    return b"".join(parts)


def error_payload(error: int, text: bytes) -> bytes:
    """Return the payload of NBD_REPLY_TYPE_ERROR; `text` within MAX_ERROR_TEXT, for QEMU."""
    return CHUNK_ERROR.pack(error, len(text)) + text


def error_offset_payload(error: int, text: bytes, offset: int) -> bytes:
    """Return the payload of NBD_REPLY_TYPE_ERROR_OFFSET: as ERROR, then the failed offset:8."""
    return error_payload(error, text) + CHUNK_OFFSET.pack(offset)


# --- Transmission: whole structured chunks ---------------------------------------------------
def none_chunk(cookie: int, *, flags: int) -> bytes:
    """Return an NBD_REPLY_TYPE_NONE chunk; legal with NBD_REPLY_FLAG_DONE only."""
    return chunk(NBD_REPLY_TYPE_NONE, b"", flags=flags, cookie=cookie)


def data_chunk_header(cookie: int, *, flags: int, offset: int, length: int) -> bytes:
    """Return an NBD_REPLY_TYPE_OFFSET_DATA chunk up to its `length` (> 0) bytes of data."""
    kind, payload = NBD_REPLY_TYPE_OFFSET_DATA, CHUNK_OFFSET.size + length
    header = chunk_header(kind, flags=flags, cookie=cookie, length=payload)
    return header + CHUNK_OFFSET.pack(offset)


def hole_chunk(cookie: int, *, flags: int, offset: int, length: int) -> bytes:
    """Return an NBD_REPLY_TYPE_OFFSET_HOLE chunk: `length` (> 0) zeroes at `offset`."""
    payload = hole_payload(offset, length)
    return chunk(NBD_REPLY_TYPE_OFFSET_HOLE, payload, flags=flags, cookie=cookie)


def status_chunk(
    cookie: int, *, flags: int, context: int, descriptors: Iterable[tuple[int, int]]
) -> bytes:
    """Return an NBD_REPLY_TYPE_BLOCK_STATUS chunk with (length, status flags) descriptors."""
    payload = status_payload(context, descriptors)
    return chunk(NBD_REPLY_TYPE_BLOCK_STATUS, payload, flags=flags, cookie=cookie)


def error_chunk(cookie: int, *, flags: int, error: int, text: bytes) -> bytes:
    """Return an NBD_REPLY_TYPE_ERROR chunk; `text` within MAX_ERROR_TEXT, for QEMU's client."""
    return chunk(NBD_REPLY_TYPE_ERROR, error_payload(error, text), flags=flags, cookie=cookie)


def error_offset_chunk(cookie: int, *, flags: int, error: int, text: bytes, offset: int) -> bytes:
    """Return an NBD_REPLY_TYPE_ERROR_OFFSET chunk: as ERROR, then the offset that failed:8."""
    payload = error_offset_payload(error, text, offset)
    return chunk(NBD_REPLY_TYPE_ERROR_OFFSET, payload, flags=flags, cookie=cookie)
