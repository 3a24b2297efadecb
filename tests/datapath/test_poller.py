"""The selector that looks before it sleeps: the same events as the plain one, and no spinning."""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterator

import pytest

from nbdfleece.datapath import poller
from tests.reference import poller as plain


@pytest.fixture(params=[poller.PollingSelector, plain.PollingSelector], ids=["polling", "plain"])
def selector(request: pytest.FixtureRequest) -> Iterator[selectors.EpollSelector]:
    with request.param() as made:
        yield made


def test_what_is_ready_is_returned(selector: selectors.EpollSelector) -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    for fd in (first, second):
        selector.register(fd, selectors.EVENT_READ)
    for turn in range(20):
        ready = (first, second)[turn % 2]
        os.eventfd_write(ready, 1)
        for timeout in (None, 0, 0.01, 5):
            assert [key.fd for key, _ in selector.select(timeout)] == [ready]
        os.eventfd_read(ready)
        assert selector.select(0) == []
    os.close(first)
    os.close(second)


def test_a_wait_without_events_ends_at_its_timeout(selector: selectors.EpollSelector) -> None:
    for timeout in (0.00001, 0.0005, 0.01):
        for _ in range(3):
            assert selector.select(timeout) == []


def test_a_long_wait_ends_the_looking_and_a_short_one_begins_it() -> None:
    with poller.PollingSelector() as selector:
        fd = os.eventfd(1)
        selector.register(fd, selectors.EVENT_READ)
        selector.select(1)
        assert 0 < selector._moment <= poller.POLL_MAX_S
        os.eventfd_read(fd)
        selector.select(0.01)
        assert selector._moment == 0
        os.close(fd)
