"""What the log tells of a snapshot to whoever asks why a guest's write fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.base.errors import IoError
from nbdfleece.block.drivers.copy_before_write import OnCbwError
from nbdfleece.fleece.snapshot import SnapshotOptions
from tests.fleece.test_bitmaps import GRANULE, Bench, write


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    assert await bench.fleece.close()
    bench.state.close()


async def test_the_first_guest_write_that_fails_for_a_snapshot_is_logged_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    vda = await bench.add("vda")
    for place in range(3):
        await write(vda, place * GRANULE, b"a" * GRANULE)
    options = SnapshotOptions(on_error=OnCbwError.BREAK_GUEST_WRITE, temp_limit=GRANULE)
    await bench.fleece.create_snapshots(["vda"], "m", options, token_s=None)

    await write(vda, 0, b"b" * GRANULE)
    for place in (1, 2):
        with pytest.raises(IoError):
            await write(vda, place * GRANULE, b"b" * GRANULE)

    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("snapshot vda@m: guest writes fail (break-guest-write): ")
    assert vda.snapshots["m"].error is None
