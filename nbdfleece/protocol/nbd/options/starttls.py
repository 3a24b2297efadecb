"""NBD_OPT_STARTTLS: agree to go on over TLS, or say why not.

The acknowledgement ends the haggle: nothing agreed on in plain text may survive (CVE-2021-3716).
That no plain text behind the option is taken for what comes over TLS is up to `handshake`.

Spec: NBD proto.md "TLS support", "Option types" (NBD_OPT_STARTTLS).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.constants import (
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_POLICY,
)
from nbdfleece.protocol.nbd.haggle import TlsMode

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import Haggle, Option


def answer_starttls(haggle: Haggle, option: Option) -> bytes:
    """End this haggle for one over TLS.

    Raises:
        OptionRefused: NBD_REP_ERR_POLICY: the option is known, but there is no TLS here;
            NBD_REP_ERR_INVALID: TLS is on already, or the option has data.
    """
    option.require_empty()
    if haggle.tls_mode is TlsMode.OFF:
        raise OptionRefused(NBD_REP_ERR_POLICY, "TLS is not configured")
    if haggle.tls:
        raise OptionRefused(NBD_REP_ERR_INVALID, "TLS is on already")
    haggle.starting_tls = True
    return wire.option_reply(option.number, NBD_REP_ACK)
