import os
import threading
from pathlib import Path

import pytest

from nbdfleece.backup.errors import BackupError
from nbdfleece.fleece.sinks import StreamSink


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_stream_is_the_whole_disk(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = StreamSink(fifo, 3000)
    sink.put(sink.prepare(1000, bytearray(b"a" * 500), 0, 500))
    sink.put([*sink.zeroes(1500, 1000), *sink.prepare(2500, bytearray(b".." + b"b" * 512), 2, 512)])
    sink.finish()
    sink.close()

    found = os.read(reader, 10000)
    os.close(reader)

    assert found == bytes(1000) + b"a" * 500 + bytes(1000) + b"b" * 500


def test_zeroes_at_the_end_are_written(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = StreamSink(fifo, 30000)
    sink.finish()
    sink.close()

    assert os.read(reader, 100000) == bytes(30000)
    os.close(reader)


def test_nobody_reads(fifo: Path) -> None:
    with pytest.raises(BackupError, match="nobody reads it"):
        StreamSink(fifo, 1)
    with pytest.raises(BackupError, match="No such file"):
        StreamSink(fifo.parent / "none", 1)


def test_a_reader_that_takes_nothing_is_given_up(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = StreamSink(fifo, 10 << 20)
    raised: list[OSError] = []

    def write() -> None:
        try:
            sink.finish()
        except OSError as error:
            raised.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    sink.stop()
    writer.join(20)

    assert len(raised) == 1
    sink.close()
    os.close(reader)
