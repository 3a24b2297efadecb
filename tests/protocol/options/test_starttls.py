"""NBD_OPT_STARTTLS without TLS."""

from __future__ import annotations

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_machines import Script


def test_starttls_is_known_but_not_allowed() -> None:
    script = Script()

    ((kind, text),) = script.option(c.NBD_OPT_STARTTLS)

    assert kind == c.NBD_REP_ERR_POLICY
    assert b"TLS" in text


def test_starttls_with_data_is_invalid() -> None:
    assert Script().outcome_type(c.NBD_OPT_STARTTLS, b"x") == c.NBD_REP_ERR_INVALID


def test_client_may_go_on_in_plain_text() -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY)
    script.option(c.NBD_OPT_STARTTLS)
    script.option(c.NBD_OPT_GO, wire.info_request(b"disk", []))

    assert script.transmission.structured
