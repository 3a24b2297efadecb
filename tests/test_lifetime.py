"""A daemon's start and end: cut short, and bounded, whatever is stuck."""

from __future__ import annotations

import asyncio

import pytest

from nbdfleece import lifetime
from nbdfleece.lifetime import Lifetime


class Forced:
    """Notes why the program would have ended by force."""

    def __init__(self) -> None:
        self.why: list[str] = []
        self.came = asyncio.Event()

    def __call__(self, why: str) -> None:
        self.why.append(why)
        self.came.set()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetime, "CLOSE_S", 0.02)


async def uncancellable(go: asyncio.Event) -> None:
    """Wait as for a system call: who is cancelled meanwhile learns of it afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not go.is_set():
        try:
            await go.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def test_a_start_runs_to_its_end() -> None:
    forced = Forced()
    one = Lifetime(0.0, forced)
    assert await one.start(asyncio.sleep(0))
    one.stop()
    assert one.stopping.is_set()
    assert forced.why == []


async def test_a_start_is_cut_short_by_stop() -> None:
    one = Lifetime(0.0, Forced())
    asyncio.get_running_loop().call_soon(one.stop)
    assert not await one.start(asyncio.Event().wait())  # type: ignore[arg-type]


async def test_a_start_that_cannot_be_cut_short_ends_by_force() -> None:
    forced, go = Forced(), asyncio.Event()
    one = Lifetime(0.01, forced)
    starting = asyncio.ensure_future(one.start(uncancellable(go)))
    await asyncio.sleep(0)
    one.stop()
    await forced.came.wait()
    assert forced.why == ["requests had not ended after 0.01 seconds"]
    go.set()
    assert not await starting


async def test_a_time_limit_of_somebody_else_is_not_ours() -> None:
    async def limited() -> None:
        raise TimeoutError("of a server")

    with pytest.raises(TimeoutError, match="of a server"):
        await Lifetime(0.0, Forced()).start(limited())


async def test_what_is_stuck_keeps_nothing_else_open() -> None:
    forced = Forced()
    closed: list[str] = []

    async def stuck() -> None:
        await asyncio.Event().wait()

    async def good() -> bool:
        closed.append("good")
        return True

    async def bad() -> bool:
        return False

    with Lifetime(0.0, forced).end() as ending:
        assert not await ending.close(stuck)
        assert ending.is_late
        assert await ending.close(good)
        assert not await ending.close(bad)
    assert closed == ["good"]
    assert forced.why == []


async def test_the_last_resort_ends_by_force_what_nothing_cancels() -> None:
    forced, go = Forced(), asyncio.Event()
    with Lifetime(0.01, forced).end() as ending:
        closing = asyncio.ensure_future(ending.close(lambda: uncancellable(go)))
        await forced.came.wait()
        go.set()
        await closing
    assert len(forced.why) == 1


async def test_time_for_closing_is_left_when_requests_took_all() -> None:
    with Lifetime(0.0, Forced()).end() as ending:
        assert ending.left(0.0) == 0.0
        assert ending.left(5.0) == 5.0
