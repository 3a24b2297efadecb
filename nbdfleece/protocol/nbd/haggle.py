"""What the options of one handshake have agreed on so far, and what an export looks like to them.

`ExportInfo` and `Directory` are what this room needs to know of exports; server/ provides them.

Spec: NBD proto.md "Option haggling", "TLS support".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from nbdfleece.base.errors import OptionRefused
from nbdfleece.base.limits import MAX_PAYLOAD
from nbdfleece.base.units import KiB
from nbdfleece.protocol.nbd.constants import (
    NBD_FLAG_BLOCK_STATUS_PAYLOAD,
    NBD_FLAG_SEND_DF,
    NBD_META_BASE_ALLOCATION,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_UNKNOWN,
)
from nbdfleece.protocol.nbd.names import option_name
from nbdfleece.protocol.nbd.strings import shown

if TYPE_CHECKING:
    from collections.abc import Sequence


class TlsMode(Enum):
    """What a connection may, or must, do about TLS; the same from its begin to its end.

    The spec's names are NOTLS, SELECTIVETLS and FORCEDTLS.
    """

    OFF = auto()
    ALLOW = auto()
    REQUIRE = auto()


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as the handshake describes it.

    Attributes:
        name: Canonical name, a string of the spec.
        size: Bytes; below 2^63.
        flags: Transmission flags with NBD_FLAG_HAS_FLAGS, without those that depend on what the
            connection negotiates: NBD_FLAG_SEND_DF and NBD_FLAG_BLOCK_STATUS_PAYLOAD.
        description: For people; may be empty.
        minimum_block: Bytes; a power of two up to 64 KiB.
        preferred_block: Bytes; a power of two, at least 512 and `minimum_block`.
        maximum_block: Bytes of the longest payload; a multiple of `minimum_block`.
        contexts: Names of its metadata contexts; the position of each is its id on the wire.
        generation: Differs when the same name stands for something else than before.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4 * KiB
    maximum_block: int = MAX_PAYLOAD
    contexts: tuple[str, ...] = (NBD_META_BASE_ALLOCATION,)
    generation: int = 0


class Directory(Protocol):
    """The exports that one client may see.

    Before TLS on a connection that allows it (TlsMode.ALLOW), `find` raises NBD_REP_ERR_TLS_REQD
    for what the client might get with TLS, and for what does not exist alike, so that names stay
    hidden; `list` leaves out what needs TLS.
    """

    def find(self, name: str) -> ExportInfo | None:
        """Return the export of that name, the default export for "", or None.

        Raises:
            OptionRefused: Policy, shutdown or TLS stand against it.
        """

    def list(self) -> Sequence[ExportInfo]:
        """Return all exports that are shown to the client.

        Raises:
            OptionRefused: Policy stands against it.
        """


@dataclass(frozen=True, slots=True)
class Option:
    """One option as received.

    Attributes:
        number: NBD_OPT_*; may be unknown.
        length: Bytes of data that the client sent.
        data: The data, or its beginning where no well-formed option of its kind is that long.
    """

    number: int
    length: int
    data: bytes

    @property
    def is_cut(self) -> bool:
        """Whether `data` is only the beginning."""
        return len(self.data) < self.length

    def require_empty(self) -> None:
        """Refuse data with an option that takes none.

        Raises:
            OptionRefused: NBD_REP_ERR_INVALID.
        """
        if self.length:
            raise OptionRefused(NBD_REP_ERR_INVALID, f"{option_name(self.number)} takes no data")


@dataclass(slots=True)
class Haggle:
    """State of option haggling, changed by the options. STARTTLS starts a new one.

    Attributes:
        directory: Where exports are looked up.
        no_zeroes: The client set NBD_FLAG_C_NO_ZEROES; never changes.
        tls_mode: What the connection may do about TLS; never changes.
        may_extend: Extended headers are offered; never changes.
        tls: TLS has been initiated.
        starting_tls: NBD_OPT_STARTTLS was agreed to; ends this haggle.
        structured: Replies come in chunks: NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS was
            acknowledged.
        extended: NBD_OPT_EXTENDED_HEADERS was acknowledged.
        contexts: (id, name) of the contexts that the last SET_META_CONTEXT selected.
        contexts_of: The export they were selected for.
        last_info: Data and answer of an NBD_OPT_INFO that was the very last option.
        chosen: The export that EXPORT_NAME or GO enters transmission with; ends haggling.
        aborted: NBD_OPT_ABORT was received; ends haggling.
    """

    directory: Directory
    no_zeroes: bool
    tls_mode: TlsMode
    may_extend: bool
    tls: bool = False
    starting_tls: bool = False
    structured: bool = False
    extended: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    contexts_of: ExportInfo | None = None
    last_info: tuple[bytes, ExportInfo] | None = None
    chosen: ExportInfo | None = None
    aborted: bool = False

    def find(self, name: str) -> ExportInfo:
        """Return the export of that name ("" is the default export).

        Raises:
            OptionRefused: NBD_REP_ERR_UNKNOWN, or what the directory has against it.
        """
        export = self.directory.find(name)
        if export is None:
            what = f"export {shown(name)}" if name else "default export"
            raise OptionRefused(NBD_REP_ERR_UNKNOWN, f"there is no {what}")
        return export

    def transmission_flags(self, export: ExportInfo) -> int:
        """Return the flags of `export` on this connection, as negotiated up to now.

        The same for INFO as for GO: a client that asks twice must hear the same.
        """
        flags = export.flags
        if self.structured:
            flags |= NBD_FLAG_SEND_DF
        if self.extended and self.contexts_for(export):
            flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD
        return flags

    def contexts_for(self, export: ExportInfo) -> tuple[tuple[int, str], ...]:
        """Return the contexts selected for `export`: none if they were set for another."""
        return self.contexts if self.contexts_of == export else ()
