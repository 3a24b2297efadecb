"""The limits of one server, as configured."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdfleece.base.limits import (
    HANDSHAKE_TIMEOUT_S,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_ADDRESS,
    MAX_CONNECTIONS_PER_EXPORT,
    MAX_CONNECTIONS_PER_IDENTITY,
)
from nbdfleece.datapath.pump import PumpLimits


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits of one server; 0 is no limit.

    Attributes:
        max_connections: Clients at a time, over all listeners.
        max_per_export: Of those, clients of one export.
        max_per_identity: Clients with the same certificate subject, key name, or local user.
        max_per_address: Clients from the same network address.
        handshake_timeout_s: From the greeting to transmission, TLS included.
        extended_headers: Offer NBD_OPT_EXTENDED_HEADERS.
        transmission: What one connection may do in transmission.
    """

    max_connections: int = MAX_CONNECTIONS
    max_per_export: int = MAX_CONNECTIONS_PER_EXPORT
    max_per_identity: int = MAX_CONNECTIONS_PER_IDENTITY
    max_per_address: int = MAX_CONNECTIONS_PER_ADDRESS
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    extended_headers: bool = True
    transmission: PumpLimits = field(default_factory=PumpLimits)
