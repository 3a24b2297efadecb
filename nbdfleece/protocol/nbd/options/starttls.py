"""NBD_OPT_STARTTLS on a server without TLS ("NOTLS mode").

With TLS the answer is an acknowledgement, and then a new `Haggle`: nothing agreed on in plain text
may survive (CVE-2021-3716), and no plain text received behind the option may be processed.

Spec: NBD proto.md "TLS support".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd.constants import NBD_REP_ERR_POLICY

if TYPE_CHECKING:
    from nbdfleece.protocol.nbd.haggle import Haggle, Option


def answer_starttls(haggle: Haggle, option: Option) -> bytes:
    """Refuse: the option is known, but TLS is not configured.

    Raises:
        OptionRefused: NBD_REP_ERR_POLICY, or NBD_REP_ERR_INVALID for an option with data.
    """
    del haggle  # the refusal depends on nothing
    option.require_empty()
    raise OptionRefused(NBD_REP_ERR_POLICY, "TLS is not configured")
