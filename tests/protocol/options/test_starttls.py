"""NBD_OPT_STARTTLS: the option itself. What each mode allows around it: test_handshake_tls."""

from __future__ import annotations

import pytest

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.haggle import TlsMode
from tests.support.nbd_machines import Script

MODES = pytest.mark.parametrize("mode", list(TlsMode))
WITH_TLS = pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
GO_DISK = wire.info_request(b"disk", [])


def test_starttls_is_known_but_not_allowed_without_tls() -> None:
    script = Script()

    ((kind, text),) = script.option(c.NBD_OPT_STARTTLS)

    assert kind == c.NBD_REP_ERR_POLICY
    assert b"TLS" in text
    assert not script.server.wants_tls


@MODES
@pytest.mark.parametrize("size", [1, 24, 4096])
def test_starttls_with_data_is_invalid(mode: TlsMode, size: int) -> None:
    script = Script(tls=mode)

    assert script.outcome_type(c.NBD_OPT_STARTTLS, bytes(size)) == c.NBD_REP_ERR_INVALID
    assert not script.server.wants_tls
    assert script.outcome_type(c.NBD_OPT_ABORT) == c.NBD_REP_ACK


def test_client_may_go_on_in_plain_text() -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY)
    script.option(c.NBD_OPT_STARTTLS)
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert script.transmission.structured


@WITH_TLS
def test_refused_starttls_may_be_tried_again(mode: TlsMode) -> None:
    script = Script(tls=mode)
    script.option(c.NBD_OPT_STARTTLS, b"x")

    script.start_tls()

    assert script.outcome_type(c.NBD_OPT_GO, GO_DISK) == c.NBD_REP_ACK


@WITH_TLS
def test_starttls_is_invalid_over_tls(mode: TlsMode) -> None:
    script = Script(tls=mode)
    script.start_tls()

    assert script.outcome_type(c.NBD_OPT_STARTTLS) == c.NBD_REP_ERR_INVALID
    assert not script.server.wants_tls
    assert script.outcome_type(c.NBD_OPT_GO, GO_DISK) == c.NBD_REP_ACK
