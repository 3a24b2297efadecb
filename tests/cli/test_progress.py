import json

import pytest

from nbdfleece.cli import progress
from nbdfleece.cli.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found.monotonic)
    return found


def test_plain_lines_come_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Progress("vda", as_json=False, quiet=False)
    for _ in range(25):
        clock.now += 1
        told(int(clock.now - 100) << 20, 100 << 20)
    told.end()

    assert capsys.readouterr().err.splitlines() == [
        "vda: 10 MiB of 100 MiB, 1 MiB/s, 2m left",
        "vda: 20 MiB of 100 MiB, 1 MiB/s, 80s left",
    ]


def test_json_lines_come_every_second(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress("vda", as_json=True, quiet=False)
    told(1, 100)
    clock.now += 2
    told(20, 100)
    told(30, 100)

    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == [
        {"type": "progress", "done": 20, "total": 100, "rate": 10, "seconds-left": 8}
    ]


def test_quiet_is_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress("vda", as_json=False, quiet=True)
    clock.now += 100
    told(1, 2)
    told.end()

    assert capsys.readouterr().err == ""


def test_a_terminal_has_one_line(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    told = Progress("vda", as_json=False, quiet=False)
    for _ in range(3):
        clock.now += 1
        told(1 << 20, 2 << 20)
    told.end()

    written = capsys.readouterr().err
    assert "\n" not in written
    assert written.count("\r\033[K") == 4
    assert written.endswith("\r\033[K")


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (89, "89s"), (90, "2m"), (3599, "1h00m"), (11100, "3h05m")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
