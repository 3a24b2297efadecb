"""Stepping by hand gives what a task gives."""

from __future__ import annotations

import asyncio
from types import ModuleType

import pytest

from nbdfleece.datapath import step
from tests.reference import step as plain

both = pytest.mark.parametrize("module", [step, plain], ids=["step", "plain"])


class Ends:
    """Collects how requests end."""

    def __init__(self) -> None:
        self.ends: list[tuple[object, BaseException | None]] = []
        self._wanted = 0
        self._reached: asyncio.Future[None]

    def __call__(self, result: object, error: BaseException | None) -> None:
        self.ends.append((result, error))
        if len(self.ends) == self._wanted:
            self._reached.set_result(None)

    async def wait(self, count: int) -> None:
        if len(self.ends) < count:
            self._wanted = count
            self._reached = asyncio.get_running_loop().create_future()
            await self._reached


@both
async def test_the_end_is_told_once_with_the_result(module: ModuleType) -> None:
    ends = Ends()
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def request() -> int:
        await asyncio.sleep(0)  # a bare yield
        return await future + 1

    module.Step(request(), ends).resume()
    await asyncio.sleep(0)
    assert ends.ends == []
    future.set_result(41)

    await ends.wait(1)
    await asyncio.sleep(0)
    assert ends.ends == [(42, None)]


@both
async def test_an_error_is_told_as_the_end(module: ModuleType) -> None:
    ends = Ends()
    error = OSError(5, "no")

    async def request() -> None:
        await asyncio.sleep(0)
        raise error

    module.Step(request(), ends).resume()

    await ends.wait(1)
    assert ends.ends == [(None, error)]


@both
async def test_an_error_of_what_is_awaited_arrives_in_the_coroutine(module: ModuleType) -> None:
    ends = Ends()
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def request() -> str:
        try:
            await future
        except ValueError as error:
            return str(error)
        return "none"

    module.Step(request(), ends).resume()
    await asyncio.sleep(0)
    future.set_exception(ValueError("told"))

    await ends.wait(1)
    assert ends.ends == [("told", None)]


async def test_what_does_not_suspend_ends_inside_resume() -> None:
    ends = Ends()

    async def request() -> str:
        return "at once"

    step.Step(request(), ends).resume()

    assert ends.ends == [("at once", None)]


@both
async def test_background_gives_result_and_error(module: ModuleType) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await module.background(work()) == 7
    with pytest.raises(KeyError):
        await module.background(fail())


async def test_background_work_goes_on_when_its_result_is_abandoned() -> None:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ended: list[str] = []

    async def work() -> None:
        await gate
        ended.append("work")

    future = step.background(work())
    future.cancel()
    gate.set_result(None)
    await asyncio.sleep(0)

    assert ended == ["work"]


async def test_a_cancelled_future_is_told_as_an_error() -> None:
    """Else the request would count as running for ever, and no drained section would begin."""
    ends = Ends()
    shared: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def request() -> None:
        await shared

    step.Step(request(), ends).resume()
    behind = step.background(request())
    shared.cancel()
    await ends.wait(1)
    ((result, error),) = ends.ends
    assert result is None
    assert isinstance(error, asyncio.CancelledError)
    with pytest.raises(asyncio.CancelledError):
        await behind
