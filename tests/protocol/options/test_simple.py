"""NBD_OPT_STRUCTURED_REPLY; NBD_OPT_ABORT is tested with the handshake."""

from __future__ import annotations

from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from tests.support.nbd_machines import Script

GO_DISK = wire.info_request(b"disk", [])


def test_structured_replies_are_off_unless_asked_for() -> None:
    script = Script()
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert not script.transmission.structured
    assert not script.transmission.flags & c.NBD_FLAG_SEND_DF


def test_structured_replies_may_be_asked_for_twice() -> None:
    script = Script()

    assert script.option(c.NBD_OPT_STRUCTURED_REPLY) == [(c.NBD_REP_ACK, b"")]
    assert script.option(c.NBD_OPT_STRUCTURED_REPLY) == [(c.NBD_REP_ACK, b"")]
    script.option(c.NBD_OPT_GO, GO_DISK)
    assert script.transmission.structured


def test_refused_request_for_structured_replies_does_not_turn_them_on() -> None:
    script = Script()
    script.option(c.NBD_OPT_STRUCTURED_REPLY, b"x")
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert not script.transmission.structured


def test_abort_ends_haggling() -> None:
    script = Script()

    assert script.option(c.NBD_OPT_ABORT) == [(c.NBD_REP_ACK, b"")]
    assert script.closed.quiet
