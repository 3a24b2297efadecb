"""The line that each connection leaves in the log."""

from __future__ import annotations

import json
import logging
import re

import pytest

from nbdfleece.base.limits import MAX_COMPLAINTS
from nbdfleece.server.audit import Audit, ClientDisconnected, Complaints, quoted

LINE = re.compile(
    r'client 7 ends: peer="here" identity="uid 0" tls="TLSv1.3" export="vda" '
    r'read=10 written=20 requests=3 seconds=1.5 how="disconnects"'
)


def audit(**fields: object) -> Audit:
    usual = {"identity": "uid 0", "tls": "TLSv1.3", "export": "vda", "bytes_read": 10}
    more = {"bytes_written": 20, "requests": 3, "duration_s": 1.49}
    return Audit(7, "here", **{**usual, **more, **fields})


def test_line_has_all_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    audit().write("disconnects", logging.INFO)
    (record,) = caplog.records
    assert LINE.fullmatch(record.message)


def test_empty_fields_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Audit(7, "here").write("left", logging.INFO)
    assert "identity" not in caplog.text
    assert "export" not in caplog.text


def test_refusal_by_the_policy_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    audit(export="", refused="vda").write("left", logging.INFO)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert 'refused="vda"' in record.message


@pytest.mark.parametrize(
    "name",
    ['x" how="well', "a\nclient 8 ends", "\x1b[31mred", "\u202eltr", "\x7f\x00", "a\\"],
)
def test_no_name_can_look_like_something_else(caplog: pytest.LogCaptureFixture, name: str) -> None:
    caplog.set_level(logging.INFO)
    audit(export=name).write("disconnects", logging.INFO)
    (record,) = caplog.records
    assert record.message.isascii()
    assert record.message.isprintable()
    found = re.search(r'export=("(?:[^"\\]|\\.)*")', record.message)
    assert found is not None
    assert json.loads(found[1]) == name


def test_long_names_are_cut() -> None:
    assert len(quoted("x" * 5000)) < 100


def test_tokens_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reason = 'NBD_OPT_EXPORT_NAME: there is no export "vda@one:s3cret-token"'
    one = audit(export="vda@one:s3cret-token", refused="vda@one:s3cret-token")
    one.write(reason, logging.INFO)
    assert "s3cret" not in caplog.text
    news = one.disconnected(reason)
    assert isinstance(news, ClientDisconnected)
    assert "s3cret" not in news.reason


def test_complaint_is_made_once_until_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    for _ in range(5):
        complaints.say("address 192.0.2.1", "8 clients, no more")
    assert len(caplog.records) == 1
    complaints.say("address 192.0.2.2", "8 clients, no more")
    complaints.end("address 192.0.2.1")
    complaints.say("address 192.0.2.1", "8 clients, no more")
    assert len(caplog.records) == 3


def test_complaints_about_ever_new_addresses_take_no_ever_new_memory() -> None:
    complaints = Complaints()
    for number in range(100_000):
        complaints.say(f"address 2001:db8::{number:x}", "128 clients, no more")
    assert len(complaints._said) <= MAX_COMPLAINTS
