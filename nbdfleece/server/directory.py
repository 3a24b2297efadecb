"""What one client may see of the exports: the Directory of the handshake, as the policy has it.

Invariants
  V1  An export that the client may not read does not exist for it: the same answer, word for word,
      and the policy is asked before anybody looks whether there is such an export.
  V2  Flags are masked here and nowhere else; what a client was told is what its pump holds it to.
  V3  Where TLS might give the client more, it hears that TLS comes first for everything that it
      does not get, there or not.
  V4  A name with a token is never listed and never logged.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd.constants import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_TLS_REQD,
)
from nbdfleece.server.policy import TOKEN_RIGHTS, Rights

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import ExportInfo
    from nbdfleece.server.export import Export
    from nbdfleece.server.exports import Exports
    from nbdfleece.server.identity import Identity
    from nbdfleece.server.policy import Policy
    from nbdfleece.server.tokens import Tokens

_WRITERS_FLAGS: Final = NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO


@dataclasses.dataclass(slots=True)
class Gate:
    """What decides what clients may see; one for all of a server.

    Attributes:
        exports: All there are.
        policy: Who may do what; None: whoever can connect may do everything.
        tokens: Names that open one export without any identity; None: there are none.
        max_per_export: Connections to one export; 0 for no limit.
        is_for_one: There is never more than one connection, so nobody hears of several.
    """

    exports: Exports
    policy: Policy | None = None
    tokens: Tokens | None = None
    max_per_export: int = 0
    is_for_one: bool = False

    def rights(self, identity: Identity, name: str) -> Rights:
        """Return what a client may do with the export of this name, if there is one."""
        return Rights.ALL if self.policy is None else self.policy.rights(identity, name)


class ClientDirectory:
    """The exports as `identity` sees them.

    Args:
        gate: What decides.
        identity: Who asks.
        may_start_tls: The client has no TLS yet, and can have it.

    Attributes:
        refused: The last export that is there and that the client may not open, for the log; or "".
    """

    def __init__(self, gate: Gate, identity: Identity, *, may_start_tls: bool) -> None:
        self._gate = gate
        self._identity = identity
        self._may_start_tls = may_start_tls
        self.refused = ""
        self._found: Export | None = None  # the last one

    def find(self, name: str) -> ExportInfo | None:
        """Return the export of that name as the client may use it, or None.

        Raises:
            OptionRefused: NBD_REP_ERR_TLS_REQD: V3; NBD_REP_ERR_POLICY: it cannot be opened now, or
                has all the connections that it may have.
        """
        export, rights = self._look_up(name)
        if export is None:
            if self._may_start_tls and self._gate.policy is not None:
                raise OptionRefused(NBD_REP_ERR_TLS_REQD, "TLS comes first")
            return None
        if export.refusal:
            raise OptionRefused(NBD_REP_ERR_POLICY, export.refusal)
        most = self._gate.max_per_export
        if most and export.holders >= most:
            raise OptionRefused(NBD_REP_ERR_POLICY, f"the export has {most} connections: no more")
        self._found = export
        info = self._masked(export.describe(), rights)
        is_default = not name
        # With a token, the name that the client knows is the only one that opens it again.
        return info if is_default or name == info.name else dataclasses.replace(info, name=name)

    def list(self) -> list[ExportInfo]:
        """Return the exports that the client may see in a list."""
        gate, identity = self._gate, self._identity
        return [
            self._masked(info, rights)
            for info in gate.exports.list()
            if Rights.LIST in (rights := gate.rights(identity, info.name))
        ]

    def chosen(self, info: ExportInfo) -> Export:
        """Return the export that `find` has just described, without an await in between.

        It is not looked up again: a token may have expired, or a thread have reloaded the policy.
        """
        export = self._found
        assert export is not None, "no export has been found"
        assert export.generation == info.generation, "another export has taken the name"
        return export

    def _look_up(self, name: str) -> tuple[Export | None, Rights]:
        """Return what `name` opens for this client, and what it may do there (V1)."""
        gate = self._gate
        # The token first: a pattern such as `vda@*` fits `vda@x:TOKEN` too, which is no export.
        opened = None if gate.tokens is None else gate.tokens.find(name)
        canonical = opened or name or gate.exports.default_name or ""
        rights = gate.rights(self._identity, canonical)
        if Rights.READ not in rights and opened is not None:
            rights = TOKEN_RIGHTS
        export = gate.exports.named(canonical)
        if Rights.READ in rights:
            return export, rights
        if export is not None:
            self.refused = canonical
        return None, Rights.NONE

    def _masked(self, info: ExportInfo, rights: Rights) -> ExportInfo:
        """Return an export as somebody with these rights may use it."""
        flags = info.flags
        if Rights.WRITE not in rights:
            flags = (flags | NBD_FLAG_READ_ONLY) & ~_WRITERS_FLAGS
        if Rights.TRIM not in rights:
            flags &= ~NBD_FLAG_SEND_TRIM
        if self._gate.is_for_one:
            flags &= ~NBD_FLAG_CAN_MULTI_CONN
        return info if flags == info.flags else dataclasses.replace(info, flags=flags)
