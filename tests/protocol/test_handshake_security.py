"""Past security defects of NBD servers' handshakes, one test each.

What takes a running server (disconnects, resets, stalled clients) is in tests/server.
"""

from __future__ import annotations

import struct

import pytest

from nbdfleece.base.units import MiB
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.handshake import Handshake
from tests.support.nbd_machines import FakeDirectory, Script

GO_DISK = wire.info_request(b"disk", [])


def is_alive(script: Script) -> bool:
    return script.outcome_type(c.NBD_OPT_GO, GO_DISK) == c.NBD_REP_ACK


@pytest.mark.parametrize("count", range(46))
def test_cve_2011_1925_client_that_leaves_at_any_byte(count: int) -> None:
    """Nbd-server 2.9.21: a client that fails negotiation takes the server down."""
    sent = wire.CLIENT_FLAGS.pack(3) + wire.option(c.NBD_OPT_LIST) + wire.option(7, GO_DISK)
    script = Script(client_flags=None)
    script.raw(sent[:count])
    assert script.is_haggling

    script.server.end_of_stream()

    assert script.closed.quiet is (count in (0, 4, 20))


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFE, 0x80000000])
def test_cve_2022_26495_name_length_that_wraps(length: int) -> None:
    """Nbd-server < 3.24: name length 0xffffffff plus one was allocated as nothing."""
    script = Script()
    data = struct.pack(">I", length) + b"disk" + bytes(2)

    for number in (c.NBD_OPT_INFO, c.NBD_OPT_GO, c.NBD_OPT_LIST_META_CONTEXT):
        assert script.outcome_type(number, data) == c.NBD_REP_ERR_INVALID
    assert is_alive(script)


def test_cve_2022_26496_much_data_behind_a_bad_info() -> None:
    """Nbd-server < 3.24: what a bad INFO had too much was read into a small buffer."""
    script = Script()

    refused = script.outcome_type(c.NBD_OPT_INFO, struct.pack(">I", 1 << 20) + bytes(MiB))

    assert refused == c.NBD_REP_ERR_INVALID
    assert is_alive(script)


def test_cve_2017_7539_unexpected_first_bytes(rng) -> None:
    """Qemu-nbd < 2.10.1: unexpected data in negotiation hit an assertion."""
    for _ in range(3000):
        server = Handshake(FakeDirectory())
        list(server.feed(b""))
        list(server.feed(rng.randbytes(rng.randrange(64))))
        server.end_of_stream()


@pytest.mark.parametrize("size", [255, 256, 257, 1023, 1024, 4095, 4096])
def test_cve_2017_15118_long_names(size: int) -> None:
    """Qemu 2.10: a name of up to 4096 bytes was copied into 256."""
    script = Script()
    request = wire.info_request(b"x" * size, [])

    assert script.outcome_type(c.NBD_OPT_INFO, request) == c.NBD_REP_ERR_UNKNOWN
    assert is_alive(script)


@pytest.mark.parametrize("number", [*range(1, 12), 77])
def test_cve_2017_15119_option_of_4_gib(number: int) -> None:
    """Qemu < 2.11: a claimed option of 4 GiB was read to its end."""
    script = Script()

    script.raw(wire.OPTION_HEADER.pack(c.IHAVEOPT, number, 0xFFFFFFFF))

    assert not script.is_haggling


def test_cve_2020_10761_long_name_in_an_error_text() -> None:
    """Qemu < 5.0.1: an unknown name of 4096 bytes made the error text too long."""
    script = Script()

    for number, data in [
        (c.NBD_OPT_GO, wire.info_request(b"x" * 4096, [])),
        (c.NBD_OPT_LIST_META_CONTEXT, wire.meta_request(b"x" * 4096, [])),
    ]:
        ((kind, text),) = script.option(number, data)
        assert kind == c.NBD_REP_ERR_UNKNOWN
        assert 0 < len(text) < 256


def test_cve_2019_14850_nothing_is_looked_up_before_an_export_is_named() -> None:
    """Nbdkit < 1.15.1: the backend was opened for every TCP connection."""

    class Untouchable(FakeDirectory):
        def find(self, name: str):
            raise AssertionError("looked up too early")

    script = Script(Untouchable())
    script.option(c.NBD_OPT_STRUCTURED_REPLY)
    script.option(c.NBD_OPT_GO, b"malformed")
    script.option(c.NBD_OPT_SET_META_CONTEXT, b"malformed")

    assert script.is_haggling


def test_plain_text_state_does_not_depend_on_starttls() -> None:
    """CVE-2021-3716 (nbdkit): without TLS, a refused STARTTLS must change nothing either way."""
    script = Script()
    script.option(c.NBD_OPT_STARTTLS)
    script.option(c.NBD_OPT_GO, GO_DISK)

    assert not script.transmission.structured


def test_refused_option_leaves_the_stream_in_step() -> None:
    """Nbdkit before 1.33.2: the payload of a refused option was not consumed."""
    script = Script()
    looks_like_go = wire.option(c.NBD_OPT_GO, GO_DISK)

    for number in (c.NBD_OPT_STARTTLS, c.NBD_OPT_LIST, c.NBD_OPT_INFO, 77):
        script.outcome_type(number, looks_like_go)
        assert script.is_haggling
    assert is_alive(script)
