"""Layouts of everything on the wire, with functions that write and read them.

All integers are big-endian. Each layout is shown where it is defined, as field:bytes. Readers get
exactly the bytes of one item; how long that is, the item's header says.

Extended headers (NBD_OPT_EXTENDED_HEADERS) are not here yet.

Spec: NBD proto.md "Protocol phases", "Option types", "Option reply types", "Transmission phase".
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from nbdfleece.protocol.nbd.constants import (
    IHAVEOPT,
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
    from collections.abc import Iterable

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


def chunk_header(kind: int, *, flags: int, cookie: int, length: int) -> bytes:
    """Return the header of a structured reply chunk with a payload of `length` bytes."""
    return CHUNK_HEADER.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def none_chunk(cookie: int, *, flags: int) -> bytes:
    """Return an NBD_REPLY_TYPE_NONE chunk; legal with NBD_REPLY_FLAG_DONE only."""
    return chunk_header(NBD_REPLY_TYPE_NONE, flags=flags, cookie=cookie, length=0)


def data_chunk_header(cookie: int, *, flags: int, offset: int, length: int) -> bytes:
    """Return an NBD_REPLY_TYPE_OFFSET_DATA chunk up to its `length` (> 0) bytes of data."""
    kind, payload = NBD_REPLY_TYPE_OFFSET_DATA, CHUNK_OFFSET.size + length
    header = chunk_header(kind, flags=flags, cookie=cookie, length=payload)
    return header + CHUNK_OFFSET.pack(offset)


def hole_chunk(cookie: int, *, flags: int, offset: int, length: int) -> bytes:
    """Return an NBD_REPLY_TYPE_OFFSET_HOLE chunk: `length` (> 0) zeroes at `offset`."""
    kind, payload = NBD_REPLY_TYPE_OFFSET_HOLE, CHUNK_HOLE.pack(offset, length)
    return chunk_header(kind, flags=flags, cookie=cookie, length=len(payload)) + payload


def status_chunk(
    cookie: int, *, flags: int, context: int, descriptors: Iterable[tuple[int, int]]
) -> bytes:
    """Return an NBD_REPLY_TYPE_BLOCK_STATUS chunk with (length, status flags) descriptors."""
    parts = [U32.pack(context)]
    parts += [STATUS_DESCRIPTOR.pack(length, status) for length, status in descriptors]
    payload = b"".join(parts)
    kind = NBD_REPLY_TYPE_BLOCK_STATUS
    return chunk_header(kind, flags=flags, cookie=cookie, length=len(payload)) + payload


def error_chunk(cookie: int, *, flags: int, error: int, text: bytes) -> bytes:
    """Return an NBD_REPLY_TYPE_ERROR chunk; `text` within MAX_ERROR_TEXT, for QEMU's client."""
    kind, payload = NBD_REPLY_TYPE_ERROR, CHUNK_ERROR.pack(error, len(text)) + text
    return chunk_header(kind, flags=flags, cookie=cookie, length=len(payload)) + payload


def error_offset_chunk(cookie: int, *, flags: int, error: int, text: bytes, offset: int) -> bytes:
    """Return an NBD_REPLY_TYPE_ERROR_OFFSET chunk: as ERROR, then the offset that failed:8."""
    payload = CHUNK_ERROR.pack(error, len(text)) + text + CHUNK_OFFSET.pack(offset)
    kind = NBD_REPLY_TYPE_ERROR_OFFSET
    return chunk_header(kind, flags=flags, cookie=cookie, length=len(payload)) + payload
