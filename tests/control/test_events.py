"""News of the rooms below as events."""

from __future__ import annotations

from nbdfleece.control.events import Events
from nbdfleece.server.audit import Audit


def heard(events: Events) -> list:
    found: list = []
    events.published.subscribe(found.append)
    return found


def test_client_that_has_proved_who_it_is() -> None:
    events = Events()
    found = heard(events)
    audit = Audit(3, "192.0.2.1, port 5", "certificate CN=x", "TLSv1.3", "vda")
    events.client_news(audit.connected())
    (event,) = found
    assert event["event"] == "FLEECE_CLIENT_CONNECTED"
    assert event["data"] == {
        "id": 3,
        "peer": "192.0.2.1, port 5",
        "identity": "certificate CN=x",
        "export": "vda",
        "tls": "TLSv1.3",
    }


def test_client_of_whom_nothing_is_known() -> None:
    events = Events()
    found = heard(events)
    audit = Audit(3, "192.0.2.1, port 5", export="vda", bytes_read=7, duration_s=1.23456)
    events.client_news(audit.connected())
    events.client_news(audit.disconnected("kicked"))
    opened, left = found
    assert opened["data"] == {"id": 3, "peer": "192.0.2.1, port 5", "export": "vda"}
    assert left["event"] == "FLEECE_CLIENT_DISCONNECTED"
    assert left["data"] == {
        "id": 3,
        "peer": "192.0.2.1, port 5",
        "export": "vda",
        "bytes-read": 7,
        "bytes-written": 0,
        "requests": 0,
        "duration": 1.235,
        "reason": "kicked",
    }
